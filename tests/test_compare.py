"""Comparing evaluations of the same test images."""

import json

import numpy as np
import pytest

from ride_bf import compare
from ride_bf.evaluation import comparison
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


def write(folder, predictions, digest="0" * 64, counts=COUNTS):
    facts = {"model": f"models/{folder.name}", "dataset": "digits_lt", "split": "test", "images_digest": digest}
    write_results(folder, facts, predictions, counts)
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
