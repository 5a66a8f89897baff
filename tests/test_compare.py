"""Comparing evaluations of the same test images."""

import json
import shutil

import numpy as np
import pytest

from ride_bf import compare
from ride_bf.evaluation import comparison
from ride_bf.evaluation.comparison import paired_gain
from ride_bf.evaluation.results import Predictions, write_results

COUNTS = [500, 300, 50, 30, 5, 3]
LABELS = np.repeat(np.arange(6), 60)


def outcome(right, seed):
    """Predictions of which each is right with the probability that `right` gives for its class."""
    generator = np.random.default_rng(seed)
    correct = generator.random(len(LABELS)) < np.asarray(right)[LABELS]
    predictions = np.where(correct, LABELS, (LABELS + 1) % 6)
    zeros = np.zeros(len(LABELS))
    return Predictions(LABELS, predictions, zeros, zeros + 0.5, zeros, predictions[:, None])


def write(folder, predictions, digest="0" * 64, counts=COUNTS, names=None, **known):
    facts = {"model": f"models/{folder.name}", "dataset": "digits_lt", "split": "test", "images_digest": digest}
    facts["class_names"] = names or list("abcdef")
    write_results(folder, facts | known, predictions, counts)
    return folder


def test_a_model_that_is_not_evaluated(tmp_path):
    run = tmp_path / "my run"
    (run / "last").mkdir(parents=True)
    (run / "last/config.json").write_text("{}")
    with pytest.raises(
        SystemExit, match=r"has not been evaluated; first run: python -m ride_bf.evaluate --model '.*my"
    ):
        compare.main([str(run), str(run)])
    with pytest.raises(SystemExit, match="gone does not exist; name the output folder of a run"):
        compare.main([str(tmp_path / "gone"), str(run)])


def test_a_known_difference_is_found_where_it_is():
    common, rare = [0.8, 0.8, 0.7, 0.7, 0.3, 0.3], [0.8, 0.8, 0.7, 0.7, 0.7, 0.7]
    first, other = outcome(common, 0), outcome(rare, 0)
    found = comparison.differences(first, other, COUNTS)
    gains = [(other.predictions == LABELS)[LABELS >= 4].mean() - (first.predictions == LABELS)[LABELS >= 4].mean()]
    assert found["few_shot_accuracy"]["difference"] == pytest.approx(gains[0])
    low, high = found["few_shot_accuracy"]["interval"]
    assert 0.2 < low < gains[0] < high < 0.6
    assert found["many_shot_accuracy"] == {"difference": 0.0, "interval": [0.0, 0.0]}  # the same images are right
    assert found["backward_50_accuracy"]["difference"] > found["forward_50_accuracy"]["difference"] > 0


def test_no_difference_is_found_where_there_is_none():
    """Two models of the same chance to be right: about 95 of 100 intervals hold 0."""
    right = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    hold = 0
    for seed in range(200):
        found = comparison.differences(outcome(right, 2 * seed), outcome(right, 2 * seed + 1), COUNTS)
        low, high = found["balanced_accuracy"]["interval"]
        hold += low <= 0 <= high
    assert 180 <= hold <= 199


def test_pairing_narrows_the_interval():
    right = [0.7] * 6
    first, unrelated = outcome(right, 0), outcome(right, 1)
    predictions = first.predictions.copy()
    predictions[:6] = (LABELS[:6] + 2) % 6
    near = Predictions(LABELS, predictions, *[np.zeros(len(LABELS))] * 3, predictions[:, None])

    def width(other):
        low, high = comparison.differences(first, other, COUNTS)["accuracy"]["interval"]
        return high - low

    assert width(near) < width(unrelated) / 2


def test_three_side_by_side(tmp_path, capsys):
    folders = [write(tmp_path / name, outcome([share] * 6, 0)) for name, share in (("a", 0.5), ("b", 0.9), ("c", 0.5))]
    compare.main([str(folders[0]), str(folders[1] / "results.json"), str(folders[2]), "--output", f"{tmp_path}/d.json"])
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| few shot"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 6
    assert cells[3].startswith("**+")  # B is better
    assert cells[5] == "+0.0 [+0.0, +0.0]"  # C is A
    assert "C: models/c" in shown
    compared = json.loads((tmp_path / "d.json").read_text())
    assert compared["differences"][0]["accuracy"]["difference"] == pytest.approx(
        compared["metrics"][1]["accuracy"] - compared["metrics"][0]["accuracy"]
    )


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = write(tmp_path / "first", outcome([0.5] * 6, 0))
    for name, options, message in (
        ("images", {"digest": "1" * 64}, "have different test images: 360 of digits_lt's test split"),
        ("views", {"views": "flip"}, "first was evaluated with --views centre, and .*/views with --views flip"),
        ("counts", {"counts": [500, 300, 50, 30, 25, 3]}, "have different training images, 888 and 908"),
    ):
        other = write(tmp_path / name, outcome([0.5] * 6, 0), **options)
        with pytest.raises(SystemExit, match=message):
            compare.main([str(first), str(other)])
    shorter = write(tmp_path / "shorter", outcome([0.5] * 6, 0))
    columns = np.load(shorter / "predictions.npz")
    Predictions(**{name: column[:-1] for name, column in columns.items()}).save(shorter / "predictions.npz")
    with pytest.raises(SystemExit, match=r"has 359 images, but results\.json has 360"):
        compare.main([str(first), str(shorter)])
    (shorter / "predictions.npz").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"was not written by ride_bf\.evaluate"):
        compare.main([str(first), str(shorter)])
    with pytest.raises(SystemExit, match="nothing"):
        compare.main([str(first), str(tmp_path / "nothing")])


def write_runs(root, method, shares, seeds=None, **options):
    """Runs as training and evaluation leave them: `run.json` in the run's folder, results beside the weights."""
    runs = []
    for number, share in enumerate(shares):
        run = root / f"{method}_{number}"
        (run / "best").mkdir(parents=True)
        (run / "best/config.json").write_text("{}")
        if seeds is not None:
            (run / "run.json").write_text(json.dumps({"seed": seeds[number]}))
        write(run / "best", outcome([share] * 6, seed=10 * number), **options)
        runs.append(str(run))
    return runs


def compared_runs(tmp_path, a, b):
    compare.main(["--a", *a, "--b", *b, "--output", str(tmp_path / "compared.json")])
    return json.loads((tmp_path / "compared.json").read_text())


class TestSeveralRuns:
    def test_by_hand(self, tmp_path, capsys):
        a = write_runs(tmp_path, "a", [0.5, 0.6, 0.7])
        b = write_runs(tmp_path, "b", [0.6, 0.9, 0.5])
        found = compared_runs(tmp_path, a, b)
        values = {}
        for side, runs in (("a", a), ("b", b)):
            results = [json.loads((tmp_path / run / "best/results.json").read_text()) for run in runs]
            values[side] = np.array([own["metrics"]["balanced_accuracy"] for own in results])
        gains = values["b"] - values["a"]
        accuracy = found["metrics"]["balanced_accuracy"]
        assert (accuracy["a"], accuracy["b"]) == (values["a"].tolist(), values["b"].tolist())
        assert accuracy["differences"] == pytest.approx(gains)
        assert accuracy["mean"] == pytest.approx(gains.mean())
        assert accuracy["standard_error"] == pytest.approx(gains.std(ddof=1) / 3**0.5)
        assert accuracy["above_zero"] == 2
        low, high = accuracy["interval"]
        assert low < gains.mean() < high
        assert "interval" not in found["metrics"]["macro_f1"]
        assert not {"worst_class", "per_class_accuracy"} & set(found["metrics"])
        assert found["paired_by"] == "order"
        shown = capsys.readouterr().out
        row = next(line for line in shown.splitlines() if line.startswith("| balanced |"))
        assert f"{100 * gains.mean():+.2f} ± {100 * accuracy['standard_error']:.2f} | 2 of 3 |" in row

    @pytest.mark.parametrize("first", [0, 1])
    def test_pairs_of_other_training_counts_have_no_interval(self, tmp_path, first):
        """Their shot groups differ: here only one pair has few-shot classes, the first or the second."""
        counts = (COUNTS, [500, 300, 200, 100, 50, 40])
        sides = []
        for method, share in (("a", 0.5), ("b", 0.6)):
            folders = [tmp_path / f"{method}_{number}" for number in (first, 1 - first)]
            for folder, own in zip(folders, (counts[first], counts[1 - first]), strict=True):
                write(folder, outcome([share] * 6, seed=own[2]), counts=own)
            sides.append(list(map(str, folders)))
        metrics = compared_runs(tmp_path, *sides)["metrics"]
        assert "few_shot_accuracy" not in metrics
        assert len(metrics["many_shot_accuracy"]["differences"]) == 2
        assert not any("interval" in found for found in metrics.values())

    def test_runs_of_equal_seeds_are_pairs_whatever_their_order(self, tmp_path):
        a = write_runs(tmp_path, "a", [0.5, 0.6, 0.7], seeds=[3, 1, 2])
        b = write_runs(tmp_path, "b", [0.6, 0.7, 0.8], seeds=[1, 2, 3])
        found = compared_runs(tmp_path, a, b)
        assert found["paired_by"] == "seed"
        assert [pair["seed"] for pair in found["pairs"]] == [3, 1, 2]
        swapped = compared_runs(tmp_path, a, [b[2], b[0], b[1]])
        assert swapped["metrics"] == found["metrics"]

    def test_results_in_a_folder_of_their_own_know_the_seed(self, tmp_path):
        sides = []
        for method, seeds in (("a", [1, 2]), ("b", [2, 1])):
            folders = [tmp_path / f"{method}_{seed}" for seed in seeds]
            for seed, folder in zip(seeds, folders, strict=True):
                write(folder, outcome([0.5] * 6, seed=seed), run={"seed": seed})
            sides.append(map(str, folders))
        found = compared_runs(tmp_path, *sides)
        assert [pair["seed"] for pair in found["pairs"]] == [1, 2]

    @pytest.mark.parametrize("seeds", [[1, 1, 2], [1, 2, None], [4, 5, 6]])
    def test_other_seeds_are_pairs_by_order(self, tmp_path, seeds):
        a = write_runs(tmp_path, "a", [0.5, 0.6, 0.7], seeds=[1, 2, 3])
        b = write_runs(tmp_path, "b", [0.6, 0.7, 0.8], seeds=seeds)
        found = compared_runs(tmp_path, a, b)
        assert found["paired_by"] == "order"
        assert [pair["seed"] for pair in found["pairs"]] == [None] * 3

    def test_each_pair_may_have_a_split_of_its_own(self, tmp_path):
        a, b = [], []
        for split in range(2):
            for method, runs in (("a", a), ("b", b)):
                runs += write_runs(tmp_path / str(split), method, [0.6], digest=str(split) * 64)
        found = compared_runs(tmp_path, a, b)
        assert not any("interval" in own for own in found["metrics"].values())
        with pytest.raises(SystemExit, match="have different test images"):
            compared_runs(tmp_path, a, b[::-1])

    def test_runs_of_a_side_that_are_one_run_are_named(self, tmp_path, capsys):
        a, b = write_runs(tmp_path, "a", [0.5, 0.6, 0.7]), write_runs(tmp_path, "b", [0.5, 0.6, 0.7])
        assert compared_runs(tmp_path, a, b)["equal_runs"] == []  # A and B may well be equal
        assert "one run" not in capsys.readouterr().out
        for run, other in (("b_0", "b_2"), ("b_1", "b_2")):
            shutil.copy(tmp_path / run / "best/predictions.npz", tmp_path / other / "best/predictions.npz")
            results = json.loads((tmp_path / other / "best/results.json").read_text())
            (tmp_path / other / "best/results.json").write_text(json.dumps(results | {"model": other}))
            results = json.loads((tmp_path / run / "best/results.json").read_text())
            (tmp_path / run / "best/results.json").write_text(json.dumps(results | {"model": run}))
            assert compared_runs(tmp_path, a, b)["equal_runs"] == [[run, other]]
            assert f"note: {run}, {other} predict the same, so they are one run" in capsys.readouterr().out

    def test_other_views_of_any_run_are_refused(self, tmp_path):
        a = write_runs(tmp_path, "a", [0.5, 0.6]) + write_runs(tmp_path / "c", "a", [0.7], views="flip")
        b = write_runs(tmp_path, "b", [0.5, 0.6]) + write_runs(tmp_path / "c", "b", [0.7], views="flip")
        with pytest.raises(SystemExit, match=r"/a_0 was evaluated with --views centre, and .*/c/a_0 with --views flip"):
            compared_runs(tmp_path, a, b)
        compared_runs(tmp_path, a[:2], b[:2])

    def test_what_cannot_be_paired_is_refused(self, tmp_path, capsys):
        a, b = (write_runs(tmp_path, method, [0.5, 0.6]) for method in "ab")
        with pytest.raises(SystemExit, match=r"2 run\(s\) of A and 1 of B cannot be compared in pairs"):
            compared_runs(tmp_path, a, b[:1])
        with pytest.raises(SystemExit, match=r"two or more\. Two single runs"):
            compared_runs(tmp_path, a[:1], b[:1])
        other = write_runs(tmp_path, "other", [0.5, 0.6], names=list("abcdeg"))
        with pytest.raises(SystemExit, match="have different classes"):
            compared_runs(tmp_path, a, other)
        for arguments in ([a[0]], ["--a", *a], [*a, "--b", *b], [*a, "--a", *a, "--b", *b], []):
            with pytest.raises(SystemExit):
                compare.main(arguments)
            assert "name two models or more, or the runs of two methods" in capsys.readouterr().err


def test_paired_gains():
    gain = paired_gain([0.5, 0.6, 0.7], [0.6, 0.6, 0.9])
    assert gain["mean"] == pytest.approx(0.1)
    assert gain["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert gain["above_zero"] == 2
    assert np.isnan(paired_gain([0.5], [0.6])["standard_error"])
