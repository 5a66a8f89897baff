"""The benchmark of confidence: what was put in is measured, its letters are images, and coverage is judged rightly."""

import json

import numpy as np
import torch
from conftest import ROOT
from PIL import Image
from scipy.stats import betabinom
from test_calibrate import drawn

from ride_bf.benchmark import confidence
from ride_bf.benchmark.__main__ import main
from ride_bf.benchmark.confidence import Held, draw_letters, measure, table
from ride_bf.runs.environment import code_version

COUNTS = [200, 150, 60, 30, 10, 5]


def test_what_was_put_in_is_measured(monkeypatch):
    monkeypatch.setattr(confidence, "SPLITS", 3)
    monkeypatch.setattr(confidence, "_RESAMPLES", 5)
    logits, labels = drawn(2000)
    measured = measure(Held(3 * logits, labels, torch.full((40, 6), -100.0), COUNTS, None))
    groups = measured["groups"]
    assert list(groups) == ["all", "many", "medium", "few"]
    for of in groups.values():
        assert 2.5 < of["temperature"] < 3.5
        assert of["expected_calibration_error_after"] < of["expected_calibration_error_before"]
        assert 0.85 < of["coverage"] < 0.95
    assert measured["calibration_images"] == sum(int((labels == label).sum()) // 2 for label in range(6))
    assert sum(measured["cells"].values()) == 9  # three groups in three splits
    assert measured["unknown"]["rejected"] == 1  # nothing speaks for a class
    assert "| difference ± standard error | -" in table(measured)


def test_coverage_is_below_what_chance_allows_or_not():
    cell = {"classes": [1, 2], "images": 99}
    labels = np.repeat([1, 2, 3], 100)  # those of class 3 are another cell's
    low, high = betabinom.interval(0.95, 200, 90, 10)
    for covered, verdict in ((low - 1, "below"), (low, "inside"), (high, "inside"), (high + 1, "above")):
        assert confidence._judge_cell(cell, np.arange(300) < covered, labels) == verdict


def test_letters_are_images_like_those_of_the_digits(tmp_path):
    draw_letters(tmp_path)
    images = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]
    assert len(images) == 4 * (52 - len(confidence._LOOK_LIKE_DIGITS))
    assert {(image.size, image.mode) for image in images} == {((8, 8), "L")}
    assert min(np.asarray(image).max() for image in images) > 100  # none is blank


def test_each_model_says_what_it_was_measured_with(tmp_path, monkeypatch):
    """Also if another command measured it, and that its training may be older than its evaluation."""
    makers = {
        "digits": lambda options: {"one": ("logits", "abc")},
        "clipart": lambda options: {"other": ("logits", None)},
    }
    monkeypatch.setattr(confidence, "_MAKERS", makers)
    monkeypatch.setattr(confidence, "measure", lambda held: {"accuracy": 0.5})
    monkeypatch.setattr(confidence, "table", lambda measured: "a table")
    results = tmp_path / "results.json"
    for data in ("digits", "clipart"):
        main(["confidence", "--data", data, "--results", str(results)])
    models = json.loads(results.read_text())["models"]
    assert {name: own["trained_at_commit"] for name, own in models.items()} == {"one": "abc", "other": None}
    assert ["--data digits" in own["command"] for own in models.values()] == [True, False]
    assert models["one"]["commit"] == models["other"]["commit"] == code_version()["commit"]


def test_the_docs_say_what_was_measured():
    models = json.loads((ROOT / "docs" / "confidence.json").read_text())["models"]
    page = (ROOT / "docs" / "confidence.md").read_text()
    digits, drawings = (
        [models[f"digits_lt, seed {seed}"]["groups"] for seed in (0, 1)],
        models["clip art, probe"]["groups"],
    )

    def both(key, scale=100, digits_shown=1):
        shown = (
            " / ".join(f"{scale * model[group][key]:.{digits_shown}f}" for model in digits)
            for group in ("all", "many", "medium", "few")
        )
        return " | ".join(shown).replace("100.0", "100")

    for key in ("expected_calibration_error_before", "expected_calibration_error_after", "coverage"):
        assert f"| {both(key)} |" in page
        assert f"| {' | '.join(f'{100 * of[key]:.1f}' for of in drawings.values())} |" in page
    for key in ("class_wise_calibration_error_before", "adaptive_calibration_error_after"):
        assert f"| {both(key, 100, 2)} |" in page
    assert f"| {both('loss_after', 1, 2)} |" in page
    verdicts = [model["cells"] for model in models.values()]
    inside, of = sum(cells["inside"] for cells in verdicts), sum(sum(cells.values()) for cells in verdicts)
    assert f"in {inside} of\n  {of} cases" in page
