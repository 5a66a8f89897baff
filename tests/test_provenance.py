"""A checkpoint knows what it was trained on, and what comes after training asks for nothing again."""

import json
import re
import shutil
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, tiny_model
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from loopback_hub import LoopbackHub
from PIL import Image
from test_publish import environment
from test_streams import write_shards
from test_training import train

from data import class_counts, evaluation_processor, load_long_tailed
from data.class_names import name_classes, with_names
from data.digest import DIGITS, images_digest
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import compare, decouple, evaluate, publish
from ride_bf.evaluation.results import read_results
from ride_bf.runs.checkpoints import read_facts, write_facts
from ride_bf.runs.provenance import OtherDataError, describe_data, load_splits_of, read_data

COUNTS = {"sand": 40, "sea": 12, "sky": 6}
LEFT = [28, 8, 4]  # of which 0.3 are held out
OPTIONS = ("--recipe", "digits_lt_resnet32", "--dataset", "custom", "--validation_fraction", 0.3, "--epochs", 1)
OPTIONS += ("--batchformer", "none")
LINEAR = ("--classifier", "linear", "--loss", "cross_entropy")


def write_images(folder, counts=COUNTS, seed=0):
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "coast"
    write_images(folder / "train")
    write_images(folder / "test", dict.fromkeys(COUNTS, 4), seed=1)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "out", "--data_dir", images, *OPTIONS, *LINEAR)


@pytest.fixture
def own(run, images, tmp_path):
    """A copy of the run, and of its data, that may be changed."""
    shutil.copytree(run, tmp_path / "own")
    shutil.copytree(images, tmp_path / "coast")
    facts = read_facts(tmp_path / "own/best")
    write_facts(tmp_path / "own/best", {**facts, "data": {**facts["data"], "data_dir": str(tmp_path / "coast")}})
    return tmp_path / "own"


def forget(run, *names):
    """Makes a run's checkpoint an older one, which knew less."""
    facts = {name: value for name, value in read_facts(run / "best").items() if name not in names}
    if "data" in names and "train_class_counts" not in names:
        facts["train_class_counts"] = LEFT
    write_facts(run / "best", facts)
    return run


def test_a_checkpoint_says_what_it_was_trained_on(run, images):
    for place in (run, run / "best", run / "last"):
        data = read_data(place)
        assert (data.dataset, data.data_dir, data.options) == ("custom", str(images), {"validation_fraction": 0.3})
        assert (data.class_names, data.train_class_counts) == (list(COUNTS), LEFT)
        assert {name: split.images for name, split in data.splits.items()} == {
            "train": 40,
            "validation": 18,
            "test": 12,
        }
    assert {name: split.drawn for name, split in data.splits.items()} == {
        "train": False,
        "validation": True,
        "test": False,
    }
    assert read_facts(run / "best")["data"] == json.loads(json.dumps(data.as_dict()))


def test_evaluation_needs_no_option_and_counts_what_was_trained_on(own, capsys):
    evaluate.main(["--model", str(own)])
    results = read_results(own / "best")
    assert results["train_class_counts"] == LEFT
    assert "many_shot_accuracy" not in results["metrics"]
    assert (results["dataset"], results["dataset_options"]) == ("custom", {"validation_fraction": 0.3})
    data = read_data(own)
    assert results["images_digest"] == data.splits["test"].digest
    train_split = {"images": 40, "digest": data.splits["train"].digest}
    assert results["training_data"] == {"dataset": "custom", "options": {"validation_fraction": 0.3}, **train_split}
    assert results["other_images"] is False
    assert re.search(r"^all images +3 +40 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation_fraction", "0.5"], r"trained with --validation_fraction 0\.3, not 0\.5"),
        (["--dataset", "digits_lt"], "trained with --dataset custom, not digits_lt"),
    ],
)
def test_an_option_that_contradicts_is_an_error_with_both_values(run, tmp_path, options, message):
    command = ["--model", str(run), "--output_dir", str(tmp_path), *options]
    with pytest.raises(SystemExit, match=f"error: .*{message}.* pass --other_images"):
        evaluate.main(command)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        decouple.main(["logit_adjustment", str(run), "--output_dir", str(tmp_path / "x"), *options])


def test_an_option_that_training_was_not_given_is_decided_by_the_images(tmp_path, images):
    data = describe_data(load_long_tailed("custom", images), "custom", images)
    write_facts(tmp_path, {"data": data.as_dict()})
    tiny_model().config.save_pretrained(tmp_path)
    message = r"with --validation_fraction 0\.3 that training was not given: train had 58 images in training and has 40"
    with pytest.raises(OtherDataError, match=message):
        load_splits_of(tmp_path, validation_fraction=0.3)


@pytest.mark.filterwarnings("ignore:.*has no test split")
def test_a_drawn_test_split_is_recorded_also_of_renamed_classes(images):
    splits, _ = name_classes(load_long_tailed("custom", images / "train"), None)
    for loaded in (splits, with_names(splits, ["a", "b", "c"])):
        data = describe_data(loaded, "custom", images / "train")
        assert {name: split.drawn for name, split in data.splits.items()} == {"train": False, "test": True}


def test_data_may_be_moved_but_not_changed(own, tmp_path):
    (tmp_path / "coast").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match=r"trained on the data in .*coast, which are not there.* with --data_dir"):
        evaluate.main(["--model", str(own)])
    evaluate.main(["--model", str(own), "--data_dir", str(tmp_path / "moved")])
    assert read_results(own / "best")["train_class_counts"] == LEFT

    write_images(tmp_path / "moved/test", {"sky": 5}, seed=2)
    with pytest.raises(SystemExit, match="test had 12 images in training and has 13 here"):
        evaluate.main(["--model", str(own), "--data_dir", str(tmp_path / "moved")])
    (tmp_path / "moved/test/sky/0.png").unlink()
    with pytest.raises(SystemExit, match=r"test has 12 images as in training, but other ones.*\(digest"):
        evaluate.main(["--model", str(own), "--data_dir", str(tmp_path / "moved")])


def test_a_run_that_cannot_resume_leaves_its_folder_as_it_is(own, tmp_path):
    write_images(tmp_path / "coast/train", {"sky": 9}, seed=2)
    before = {path.name: path.read_bytes() for path in own.glob("*.json*")}
    changes = ("--allow_changes", "data_dir", "num_workers")
    resume = ("--data_dir", tmp_path / "coast", *OPTIONS, *LINEAR, "--resume", *changes, "--num_workers", 1)
    with pytest.raises(SystemExit, match=r"train had \d+ images in training and has \d+ here"):
        train(own, *resume)
    assert {path.name: path.read_bytes() for path in own.glob("*.json*")} == before


def test_classes_by_other_names_are_other_data(own, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "coast" / split / "sky").rename(tmp_path / "coast" / split / "clouds")
    with pytest.raises(SystemExit, match=r"the first that differ: \[\('sand', 'clouds'\)"):
        evaluate.main(["--model", str(own)])


def test_a_checkpoint_that_does_not_know_needs_the_options(own, tmp_path):
    forget(own, "data", "train_class_counts")
    with pytest.raises(SystemExit, match="does not say what it was trained on: name the data set with --dataset"):
        evaluate.main(["--model", str(own)])
    evaluate.main(["--model", str(own), "--dataset", "custom", "--data_dir", str(tmp_path / "coast")])
    results = read_results(own / "best")
    assert results["train_class_counts"] == list(COUNTS.values())
    assert "training_data" not in results


def test_an_older_checkpoint_knows_its_counts_at_least(own, tmp_path):
    forget(own, "data")
    told = ["--model", str(own), "--dataset", "custom", "--data_dir", str(tmp_path / "coast")]
    with pytest.raises(SystemExit, match=r"trained on 40 images, 28 in the largest class; custom .* has 58, 40 in"):
        evaluate.main(told)
    evaluate.main([*told, "--validation_fraction", "0.3"])
    assert read_results(own / "best")["train_class_counts"] == LEFT


def test_other_images_are_evaluated_in_the_groups_of_training(own, tmp_path):
    other = tmp_path / "elsewhere"
    write_images(other / "train", {"sand": 200, "sea": 2, "sky": 2}, seed=3)
    write_images(other / "test", dict.fromkeys(COUNTS, 3), seed=4)
    command = ["--model", str(own), "--other_images"]
    with pytest.raises(SystemExit, match="--other_images needs"):
        evaluate.main(command)
    evaluate.main([*command, "--data_dir", str(other)])
    results = read_results(own / "best")
    assert (results["num_images"], results["other_images"]) == (9, True)
    assert results["train_class_counts"] == LEFT
    assert results["training_data"]["images"] == 40
    publish.main([str(own), "--repo_id", "user/name", "--dry_run", "--output_dir", str(tmp_path / "page")])
    assert "another data set than the model was trained on" in (tmp_path / "page/README.md").read_text()

    write_images(other / "train", {"rock": 3})
    with pytest.raises(SystemExit, match="was trained on other classes: 3 classes in training, 4 here"):
        evaluate.main([*command, "--data_dir", str(other)])


@pytest.mark.parametrize("entry", [{}, [], {"splits": {"train": {}}}, {"splits": []}])
def test_a_damaged_entry_is_named(own, entry):
    write_facts(own / "best", {"data": entry})
    with pytest.raises(SystemExit, match=r"error: .*the entry 'data' of checkpoint\.json is damaged"):
        evaluate.main(["--model", str(own)])


def test_a_run_goes_on_with_the_data_that_it_began_with(own, tmp_path):
    write_images(tmp_path / "coast/train", {"sky": 7}, seed=5)
    options = ("--data_dir", tmp_path / "coast", *OPTIONS, *LINEAR, "--resume")
    with pytest.raises(SystemExit, match="train had 40 images in training and has 41 here"):
        train(own, *options, "--allow_changes", "data_dir", "epochs", "--epochs", 2)


# Publishing


def test_what_is_published_is_what_was_trained_on(own, tmp_path):
    publish.main([str(own), "--repo_id", "user/name", "--dry_run", "--output_dir", str(tmp_path / "page")])
    card = (tmp_path / "page/README.md").read_text()
    assert "3 classes: 40 images, 28 to 4 a class; validation fraction 0.3" in card
    assert json.loads((tmp_path / "page/class_counts.json").read_text()) == {"train": LEFT}
    published = read_data(tmp_path / "page")
    assert published == read_data(own).without_place()
    assert published.data_dir is None
    for path in (tmp_path / "page").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_results_that_contradict_the_checkpoint_are_not_published(own, tmp_path):
    def refused(message):
        with pytest.raises(SystemExit, match=f"error: .*{message}.*python -m ride_bf.evaluate --model .*best"):
            publish.main([str(own), "--repo_id", "user/name", "--dry_run", "--output_dir", str(tmp_path / "page")])

    evaluate.main(["--model", str(own)])
    results = read_results(own / "best")

    def write(**changes):
        (own / "best/results.json").write_text(json.dumps({**results, **changes}))

    write(train_class_counts=list(COUNTS.values()))
    refused(r"trained on 40 images, 28 in the largest class; results\.json beside it has 58, 40 in the largest")
    write(images_digest="0" * DIGITS)
    refused(f"digest of the test images is [0-9a-f]{{{DIGITS}}} in the first and 0{{{DIGITS}}} in the second")
    write(training_data={**results["training_data"], "digest": "1" * DIGITS})
    refused("digest of the training images")
    (own / "best/results.json").unlink()
    tested = json.loads((own / "test_results.json").read_text())
    (own / "test_results.json").write_text(json.dumps({**tested, "train_class_counts": [40, 12, 6]}))
    refused(r"test_results\.json beside it has 58")


def test_a_model_from_the_hub_knows_its_data_too(own, tmp_path):
    with LoopbackHub() as hub:
        known = environment(hub, tmp_path / "home")

        def call(module, *arguments, **variables):
            command = [sys.executable, "-m", f"ride_bf.{module}", *map(str, arguments)]
            return subprocess.run(command, cwd=ROOT, env=known | variables, capture_output=True, text=True)

        published = call("publish", own, "--repo_id", "user/name", "--license", "mit")
        assert published.returncode == 0, published.stderr
        options = ("--model", "user/name", "--output_dir", tmp_path / "out")
        missing = call("evaluate", *options)
        assert missing.stderr.startswith("error: your own images need --data_dir")
        done = call("evaluate", *options, "--data_dir", tmp_path / "coast")
        assert done.returncode == 0, done.stderr
        assert read_results(tmp_path / "out")["train_class_counts"] == LEFT
        write_images(tmp_path / "coast/train", {"sky": 7}, seed=5)
        changed = call("evaluate", *options, "--data_dir", tmp_path / "coast")
        assert "train had 40 images in training and has 41 here" in changed.stderr
        for variables in ({}, {"HF_HUB_OFFLINE": "1"}):  # not there, and not to be reached
            absent = call("evaluate", "--model", "user/another", **variables)
            assert absent.returncode == 1
            assert len(absent.stderr.strip().splitlines()) == 1, absent.stderr
            assert absent.stderr.startswith("error: user/another cannot be loaded: ")
            assert "hf download user/another" in absent.stderr


# Later stages


def test_a_corrected_model_knows_what_it_was_trained_on(own, tmp_path):
    decouple.main(["logit_adjustment", str(own), "--output_dir", str(tmp_path / "corrected")])
    results = json.loads((tmp_path / "corrected/decoupling.json").read_text())
    facts = read_facts(tmp_path / "corrected")
    assert facts["correction"] == {"method": "logit_adjustment", "strength": results["strength"]}
    assert read_data(tmp_path / "corrected") == read_data(own)
    evaluate.main(["--model", str(tmp_path / "corrected")])
    measured = read_results(tmp_path / "corrected")
    assert measured["train_class_counts"] == LEFT
    for name in ("accuracy", "balanced_accuracy", "loss"):
        assert measured["metrics"][name] == pytest.approx(results["test"][name])
    page = tmp_path / "page"
    publish.main([str(tmp_path / "corrected"), "--repo_id", "user/name", "--dry_run", "--output_dir", str(page)])
    assert "Corrected after training: logit adjustment" in (page / "README.md").read_text()
    with pytest.raises(SystemExit, match="corrected is not empty"):
        decouple.main(["tau_normalisation", str(own), "--output_dir", str(tmp_path / "corrected")])


def test_the_output_folders_of_runs_can_be_compared(own, run, tmp_path, capsys):
    shutil.copytree(own, tmp_path / "again")
    for place in (own, tmp_path / "again"):
        evaluate.main(["--model", str(place)])
    compare.main([str(own), str(tmp_path / "again")])
    assert "+0.0 [+0.0, +0.0]" in capsys.readouterr().out
    older = {**read_results(own / "best"), "images_digest": "0" * 64}
    (own / "best/results.json").write_text(json.dumps(older))
    with pytest.raises(SystemExit, match=r"own was evaluated by an earlier version.*evaluate the model again"):
        compare.main([str(own), str(tmp_path / "again")])


def test_a_stream_is_known_by_its_counts(tmp_path):
    place = write_shards(tmp_path / "tars")
    splits = load_long_tailed("custom", place, streaming=True)
    data = describe_data(splits, "custom", place, streaming=True)
    names = {str(label): label for label in range(3)}
    labels = {"id2label": {label: name for name, label in names.items()}, "label2id": names}
    tiny_model(num_labels=3, **labels).save_pretrained(tmp_path / "model")
    evaluation_processor(8, 8, (0.5,) * 3, (0.5,) * 3).save_pretrained(tmp_path / "model")
    write_facts(tmp_path / "model", {"data": data.as_dict()})
    evaluate.main(["--model", str(tmp_path / "model"), "--batch_size", "4"])
    results = read_results(tmp_path / "model")
    assert (results["num_images"], results["train_class_counts"]) == (6, [12, 6, 3])
    assert results["dataset_options"] == {"streaming": True}


# The digest


FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})


def in_files(folder, names=("c/one.png", "d/two.png"), labels=(0, 1)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)
    paths = [str(folder / name) for name in names]
    return Dataset.from_dict({"image": paths, "label": list(labels)}, features=FEATURES)


def test_the_digest_knows_the_images_and_not_their_place(tmp_path):
    here = images_digest(in_files(tmp_path / "here"))
    assert re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", here)
    assert here == images_digest(in_files(tmp_path / "far/away"))
    others = (
        in_files(tmp_path / "labels", labels=(1, 1)),
        in_files(tmp_path / "name", names=("c/one.png", "d/3.png")),
        in_files(tmp_path / "folder", names=("c/one.png", "e/two.png")),
        in_files(tmp_path / "order").select([1, 0]),
        in_files(tmp_path / "fewer").select([0]),
    )
    assert len({here, *map(images_digest, others)}) == 6


def test_the_digest_of_selected_rows_is_that_of_the_rows(tmp_path):
    names = [f"{index % 3}/{index}.png" for index in range(9)]
    labels = [index % 2 for index in range(9)]
    every = in_files(tmp_path / "every", names, labels)
    chosen = [0, 5, 3, 7]
    alone = in_files(tmp_path / "alone", [names[index] for index in chosen], [labels[index] for index in chosen])
    assert images_digest(every.select(chosen)) == images_digest(alone)


def stored(*contents, paths=None):
    paths = paths or [None] * len(contents)
    images = [{"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)]
    return Dataset.from_dict({"image": images, "label": [0] * len(images)}, features=FEATURES.copy())


def encoded(colour, **options):
    file = BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, **options)
    return file.getvalue()


def test_stored_images_are_known_by_their_content():
    red, blue = (0, 200, 0), (0, 0, 200)
    png = images_digest(stored(encoded(red, format="PNG")))
    assert png == images_digest(stored(encoded(red, format="PNG", compress_level=0)))  # other bytes, the same pixels
    assert png == images_digest(stored(encoded(red, format="PPM")))
    assert png != images_digest(stored(encoded(blue, format="PNG")))
    assert png != images_digest(stored(encoded((0, 200, 1), format="PNG")))
    jpeg = images_digest(stored(encoded(red, format="JPEG", quality=90)))
    assert jpeg != images_digest(stored(encoded(red, format="JPEG", quality=50)))
    assert images_digest(stored(b"damaged")) != images_digest(stored(b"damaged too"))
    same_name = ["image.png", "image.png"]
    one = images_digest(stored(encoded(red, format="PNG"), encoded(blue, format="PNG"), paths=same_name))
    other = images_digest(stored(encoded(blue, format="PNG"), encoded(red, format="PNG"), paths=same_name))
    assert one != other, "names that do not tell images apart are none"


def test_half_a_million_paths_take_no_time():
    count = 437_513
    paths = pa.array([f"/data/train_val2018/Plantae/{index % 8142}/{index:032x}.jpg" for index in range(count)])
    images = pa.StructArray.from_arrays([pa.nulls(count, pa.binary()), paths], names=["bytes", "path"])
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=8142)})
    labels = pa.array(np.arange(count) % 8142)
    rows = Dataset(pa.table({"image": images, "label": labels}, schema=features.arrow_schema))
    rows = rows.select(np.flatnonzero(np.arange(count) % 10))  # as a validation split leaves them
    started = time.process_time()
    images_digest(rows)
    assert time.process_time() - started < 2


def test_counts_are_those_of_the_splits(run):
    splits, data = load_splits_of(run)
    assert class_counts(splits["train"]) == data.train_class_counts == LEFT
    assert RideBfForImageClassification.from_pretrained(run / "best").config.id2label == dict(enumerate(COUNTS))
