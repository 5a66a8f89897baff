"""The embed command: features, what the nearest training images say, and likely label errors."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT
from datasets import Image
from processes import run, torchrun
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize
from test_evaluate import DIGITS, prepared, save_model
from test_left_out import TINY
from test_training import train

from data import load_long_tailed
from ride_bf import embed, evaluate
from ride_bf.evaluation.embedding import SplitEmbeddings, check_written, read_embeddings
from ride_bf.evaluation.label_errors import Judged, find_label_errors, judge
from ride_bf.evaluation.neighbours import nearest, nearest_mean_without_itself, vote
from ride_bf.evaluation.results import Predictions, read_results
from ride_bf.runs.provenance import read_data

SWAPPED = {0: 3, 130: 7, 200: 0, 260: 5, 300: 1}  # row of the training split -> a wrong class


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as files, some of them in the folder of a wrong class, and a model whose classifiers know the classes.

    Returns the folder of the data, that of the model, and the paths, in the folder, of the swapped images.
    """
    place = tmp_path_factory.mktemp("digits")
    swapped = set()
    for split, rows in load_long_tailed("digits_lt").items():
        for row, image in enumerate(rows):
            wrong = split == "train" and row in SWAPPED
            name = f"{split}/{SWAPPED[row] if wrong else image['label']}/{row:03}.png"
            assert not wrong or image["label"] != SWAPPED[row]
            swapped |= {name} if wrong else set()
            (place / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            image["image"].save(place / "set" / name)
    save_model(place / "model", depths=[1, 1, 1], hidden_sizes=[16, 32, 64])
    return place / "set", place / "model", swapped


@pytest.fixture(scope="module")
def embedded(digits):
    place, model, _ = digits
    embed.main([str(model), "--dataset", "custom", "--data_dir", str(place)])
    return pyarrow.parquet.read_table(model / "embeddings.parquet")


def test_evaluate_has_the_accuracy_of_the_neighbours_beside_its_own(digits, embedded, tmp_path, capsys):
    place, model, _ = digits
    words = [str(model), "--dataset", "custom", "--data_dir", str(place)]  # the model without --model, as elsewhere
    evaluate.main([*words, "--neighbours", "--output_dir", str(tmp_path / "with")])
    said = capsys.readouterr().out
    evaluate.main([*words, "--output_dir", str(tmp_path / "without")])
    measured = read_results(tmp_path / "with")["neighbours"]
    assert "neighbours" not in read_results(tmp_path / "without")
    train, test = (embedded.filter(pyarrow.compute.field("split") == split) for split in ("train", "test"))
    features = [np.stack(part["feature"].to_numpy()) for part in (train, test)]
    classifier = KNeighborsClassifier(5, weights="distance", metric="cosine").fit(
        features[0], train["label"].to_pylist()
    )
    right = classifier.predict(features[1]) == np.array(test["label"].to_pylist())
    assert (measured["count"], measured["metrics"]["accuracy"]) == (5, pytest.approx(right.mean(), abs=0.005))
    assert {"many_shot_accuracy", "few_shot_accuracy"} <= measured["metrics"].keys()
    assert "vote of the 5 nearest training images:" in said
    assert "<th>Neighbours</th>" in (tmp_path / "with" / "report.html").read_text()
    assert "<th>Neighbours</th>" not in (tmp_path / "without" / "report.html").read_text()
    save_model(tmp_path / "bare")
    with pytest.raises(
        SystemExit, match=rf"parquet does not exist; python -m ride_bf\.embed {tmp_path}/bare writes it"
    ):
        evaluate.main([str(tmp_path / "bare"), *words[1:], "--neighbours"])
    shutil.copyfile(model / "embeddings.parquet", tmp_path / "bare" / "embeddings.parquet")
    with pytest.raises(SystemExit, match="has the features of another model"):
        evaluate.main([str(tmp_path / "bare"), *words[1:], "--neighbours"])


def listed(path):
    return {line for line in path.read_text().splitlines() if line.startswith("train/")}


class TestFeatures:
    @pytest.mark.parametrize("expert", [None, 1])
    def test_they_are_those_of_the_model(self, expert, tmp_path):
        model, (pixels, labels) = save_model(tmp_path / "saved"), prepared("test")
        words = [] if expert is None else ["--expert", "1"]
        file = tmp_path / "deep/features.parquet"
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", "--output", str(file), "--splits", "test", *words])
        table = pyarrow.parquet.read_table(file)
        with torch.no_grad():
            outputs = model(pixels)
        expected = outputs.expert_features[:, 1]
        if expert is None:
            expected = torch.nn.functional.normalize(outputs.expert_features, dim=2).flatten(1) / 3**0.5
            assert torch.allclose(expected.norm(dim=1), torch.ones(len(labels)))
        features = np.stack(table["feature"].to_numpy())
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)
        assert table["label"].to_pylist() == [DIGITS[label] for label in labels]
        scores, predictions = outputs.logits.softmax(dim=1).max(dim=1)
        assert table["prediction"].to_pylist() == [DIGITS[label] for label in predictions]
        np.testing.assert_allclose(table["score"].to_numpy(), scores, rtol=1e-4)
        assert set(table["split"].to_pylist()) == {"test"}
        assert table["row"].to_pylist() == list(range(len(labels)))
        assert set(table["path"].to_pylist()) == {None}  # they come with a package
        read = read_embeddings(file, "test")
        assert read.source.expert == expert
        np.testing.assert_array_equal(read.features, features)

    def test_the_scores_of_a_calibrated_model_are_calibrated(self, tmp_path):
        model = save_model(tmp_path / "saved")
        model.config.confidence = {"temperature": 4.0}
        model.save_pretrained(tmp_path / "saved")
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", "--splits", "test"])
        table = pyarrow.parquet.read_table(tmp_path / "saved/embeddings.parquet")
        with torch.no_grad():
            expected = (model(prepared("test")[0]).logits / 4).softmax(dim=1).amax(dim=1)
        np.testing.assert_allclose(table["score"].to_numpy(), expected, rtol=1e-4)

    def test_paths(self, embedded, digits):
        assert embedded.num_rows == 337 + 80 + 500
        assert embedded["path"][0].as_py().startswith(str(digits[0]))
        assert set(embedded["split"].to_pylist()) == {"train", "validation", "test"}

    def test_broken_images_are_left_out(self, digits, tmp_path):
        place, model, _ = digits
        shutil.copytree(place, tmp_path / "set")
        broken = sorted((tmp_path / "set/test/4").iterdir())[3]
        broken.write_bytes(b"no image")
        words = [
            str(model),
            "--dataset",
            "custom",
            "--data_dir",
            f"{tmp_path}/set",
            "--output",
            f"{tmp_path}/a.parquet",
        ]
        with pytest.raises(SystemExit, match=f"{broken.name} cannot be read"):
            embed.main(words)
        assert not (tmp_path / "a.parquet").exists()
        embed.main([*words, "--on_broken_image", "skip"])
        table = pyarrow.parquet.read_table(tmp_path / "a.parquet", filters=[("split", "=", "test")])
        assert len(table) == 499
        assert str(broken) not in table["path"].to_pylist()
        pictures = load_long_tailed("custom", tmp_path / "set")["test"].cast_column("image", Image(decode=False))
        for path, row in zip(table["path"].to_pylist(), table["row"].to_pylist(), strict=True):
            assert pictures[row]["image"]["path"] == path

    def test_two_processes_write_what_one_writes(self, embedded, digits, tmp_path):
        place, model, _ = digits
        words = [str(model), "--dataset", "custom", "--data_dir", str(place), "--output", f"{tmp_path}/two.parquet"]
        script = tmp_path / "embed.py"
        script.write_text("from ride_bf.embed import main\n\nmain()\n")
        run(*torchrun(2, str(script), *words, "--batch_size", 37), ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
        found = pyarrow.parquet.read_table(tmp_path / "two.parquet")
        assert found.drop(["feature", "score"]) == embedded.drop(["feature", "score"])
        for name in ("feature", "score"):
            one, two = (np.stack(table[name].to_numpy()) for table in (embedded, found))
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


class TestNeighbours:
    FEATURES = np.array([[1, 0], [10, 1], [0, 1], [1, 20], [-1, 0]], dtype=np.float32)

    def test_nearest_by_hand(self):
        distances, rows = nearest(self.FEATURES, count=2)
        assert rows[:, 0].tolist() == [1, 0, 3, 2, 2]
        assert distances[0, 0] == pytest.approx(1 - 10 / 101**0.5, abs=1e-6)
        distances, rows = nearest(self.FEATURES, np.array([[3, 0]], dtype=np.float32), count=9)
        assert rows[0].tolist()[:2] == [0, 1]
        assert rows[0].tolist()[-1] == 4
        assert distances[0, -1] == pytest.approx(2)
        with pytest.raises(ValueError, match=r"1 image\(s\) have no neighbours"):
            nearest(self.FEATURES[:1])

    def test_votes_by_hand(self):
        labels = np.array([[7, 2, 2], [7, 2, 2], [4, 5, 5], [1, 3, 3]])
        distances = np.array([[0.1, 0.3, 0.3], [0.1, 0.15, 0.15], [0.0, 0.1, 0.1], [0.1, 0.2, 0.2]])
        classes, shares = vote(labels, distances)
        assert classes.tolist() == [7, 2, 4, 1]
        assert shares[:2].tolist() == pytest.approx([10 / (10 + 20 / 3), (40 / 3) / (10 + 40 / 3)])
        assert shares[2] > 0.999

    def test_votes_are_those_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(60, 4)), rng.integers(0, 5, 60)
        distances, rows = nearest(features)
        known = KNeighborsClassifier(5, weights="distance", metric="cosine", algorithm="brute").fit(features, labels)
        for row in range(60):
            others = np.arange(60) != row
            known.fit(features[others], labels[others])
            assert vote(labels[rows[row : row + 1]], distances[row : row + 1])[0] == known.predict(features[[row]])

    def test_nearest_means_are_those_without_the_image(self):
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(60, 4)), np.append(rng.integers(0, 4, 59), 9)
        found = nearest_mean_without_itself(features, labels)
        unit = normalize(features)
        for row in range(60):
            others = np.arange(60) != row
            means = NearestCentroid().fit(unit[others], labels[others])
            assert found[row] == means.classes_[(normalize(means.centroids_) @ unit[row]).argmax()]
        assert found[59] != 9  # alone in its class

    def test_the_command_prints_both_accuracies_by_group(self, embedded, digits, tmp_path, capsys):
        place, model, _ = digits
        words = [str(model), "--dataset", "custom", "--data_dir", str(place), "--output", f"{tmp_path}/again.parquet"]
        embed.main(words)
        printed = capsys.readouterr().out.splitlines()
        (line,) = (line for line in printed if line.startswith("test") and "5 neighbours" in line)
        train, test = (embedded.filter(pyarrow.compute.equal(embedded["split"], name)) for name in ("train", "test"))
        known = KNeighborsClassifier(5, weights="distance", metric="cosine", algorithm="brute")
        known.fit(np.stack(train["feature"].to_numpy()), train["label"].to_pylist())
        right = known.predict(np.stack(test["feature"].to_numpy())) == np.array(test["label"].to_pylist())
        assert float(line.split("all images")[1].split()[0]) == pytest.approx(
            100 * right.mean(), abs=0.21
        )  # a tied image
        assert sum("classifier" in line for line in printed) == 3


def judged(votes, labels, opinions, shares):
    columns = {name: np.zeros(len(labels)) for name in ("predictions", "label_ranks", "confidences", "losses")}
    images = Predictions(labels=np.array(labels), expert_predictions=np.array(opinions), **columns)
    part = SplitEmbeddings(None, np.arange(len(labels)), images, np.zeros(len(labels)), np.zeros((len(labels), 2)))
    return Judged(part, None, None, np.array(votes), np.array(shares), np.array(opinions))


class TestLabelErrors:
    def test_the_rule_by_hand(self):
        opinions = {
            "the label is right": [0, 0, 0],
            "two of three experts": [2, 2, 0],
            "one of three experts": [2, 0, 0],
            "experts of a third opinion": [1, 1, 1],
            "all, the clearest": [2, 2, 2],
            "the only one that ran": [2, -1, -1],
        }
        votes, shares = [0, 2, 2, 2, 2, 2], [1, 0.9, 1, 1, 0.8, 0.5]
        found = find_label_errors({"test": judged(votes, [0] * 6, [*opinions.values()], shares)})
        assert found["test"].tolist() == [4, 1, 5]

    def test_two_clusters(self):
        """A class of two images beside one of six, and one image of the large one under the name of the small one."""
        angles = np.array([0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 1.5, 1.51])
        features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
        columns = {name: np.zeros(9) for name in ("label_ranks", "confidences", "losses")}
        images = Predictions(labels=labels, predictions=labels, expert_predictions=labels[:, None], **columns)
        of_train = judge({"train": SplitEmbeddings(None, np.arange(9), images, np.zeros(9), features)}, None)["train"]
        assert of_train.votes.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
        assert find_label_errors({"train": of_train})["train"].tolist() == [6]  # though the model learned it by heart

    def test_swapped_labels_are_found(self, embedded, digits):
        _, model, swapped = digits
        found = listed(model / "embeddings_label_errors.txt")
        assert len(found & swapped) >= 4
        assert len(found) <= 15  # of 337, by a network that was not trained
        page = (model / "embeddings_label_errors.html").read_text()
        assert "<h2>Train" in page
        assert "data:image/jpeg" in page

    def test_a_training_run_takes_the_list(self, embedded, digits, tmp_path):
        place, model, _ = digits
        file = model / "embeddings_label_errors.txt"
        train(tmp_path / "run", *TINY, "--data_dir", place, "--exclude", file)
        facts = read_data(tmp_path / "run")
        assert facts.splits["train"].images == 337 - len(listed(file))

    def test_images_in_a_table_are_listed_by_their_content(self, tmp_path):
        save_model(tmp_path / "saved")
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt"])
        lines = (tmp_path / "saved/embeddings_label_errors.txt").read_text().splitlines()
        assert [line for line in lines if line.startswith("content ")]
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", "--expert", "0", "--splits", "train"])

    def test_no_error_no_list(self, tmp_path, capsys):
        save_model(tmp_path / "saved")
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", "--splits", "test"])
        assert "without the train split there are no neighbours" in capsys.readouterr().out
        assert not list((tmp_path / "saved").glob("*label_errors*"))


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "place", "command"),
        [
            ("outputs/user_name/embeddings.parquet", "user/name", "user/name"),
            ("runs/a b/best/embeddings.parquet", Path("runs/a b/best"), "'runs/a b/best'"),
            ("features.parquet", "user/name", "user/name --output features.parquet"),
        ],
    )
    def test_the_command_that_writes_the_file(self, path, place, command):
        """It names the model, not the folder of the results, and the file unless it is the default."""
        with pytest.raises(FileNotFoundError) as caught:
            check_written(Path(path), place)
        assert str(caught.value) == f"{path} does not exist; python -m ride_bf.embed {command} writes it"

    @pytest.mark.parametrize(
        ("options", "words", "message"),
        [
            ({}, ["--expert", "3"], "--expert must be 0 to 2, the experts of the model, not 3"),
            ({"router": True}, [], "the model has a router, so only expert 0 sees every image; give --expert 0"),
            ({}, ["--splits", "train", "tests"], "digits_lt has no split 'tests'; it has train"),
        ],
    )
    def test_one_line(self, options, words, message, tmp_path):
        save_model(tmp_path / "saved", **options)
        with pytest.raises(SystemExit) as caught:
            embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", *words])
        assert message in str(caught.value)

    def test_a_file_of_another_kind(self, tmp_path):
        (tmp_path / "features.parquet").write_bytes(b"PAR1 no table")
        with pytest.raises(ValueError, match=r"is not a file of python -m ride_bf.embed, or is damaged"):
            read_embeddings(tmp_path / "features.parquet", "train")

    def test_the_routed_first_expert(self, tmp_path):
        save_model(tmp_path / "saved", router=True, router_threshold=0.5)
        embed.main([f"{tmp_path}/saved", "--dataset", "digits_lt", "--expert", "0", "--splits", "train"])
        assert read_embeddings(tmp_path / "saved/embeddings.parquet", "train").features.shape[0] == 337
