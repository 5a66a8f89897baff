"""The report of an evaluation: what it says of experts, runs and mistakes, and how it looks on paper and on a phone."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hostile_images import encoded
from PIL import Image
from test_space import CHROMIUM, FOR_CONTAINERS
from traces import traces

from data import MAX_IMAGE_PIXELS, evaluation_processor
from ride_bf.evaluation.html_report import write_report
from ride_bf.evaluation.report import evaluate_split
from ride_bf.evaluation.results import Predictions, describe_machine, worst_mistakes, write_results
from ride_bf.runs.provenance import EvaluationData, describe_run

COUNTS = [200, 120, 50, 19, 12, 2]
NAMES = [f"a species with a long name and its author, {letter}" for letter in "abcdef"]


def predictions(experts=3, rng=None):
    rng = rng or np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 10)
    guesses = np.where(rng.random((60, experts)) < 0.7, labels[:, None], rng.integers(0, 6, (60, experts)))
    guesses[:, 1] = labels  # the second expert is always right
    return Predictions(
        labels=labels,
        predictions=guesses[:, 0],
        label_ranks=np.where(guesses[:, 0] == labels, 0, 1),
        confidences=rng.random(60),
        losses=rng.random(60),
        expert_predictions=guesses,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    speed = {"images_per_second": 10.0, "timed_batches": 3, "seconds": 9.0, "batch_size": 16, "num_processes": 1}
    facts = {
        "model": "user/name",
        "dataset": "custom",
        "split": "test",
        "dataset_options": {},
        "images_digest": "0",
        "class_names": NAMES,
        "machine": describe_machine(torch.device("cpu")),
        "speed": {**speed, "num_workers": 0, "mixed_precision": "no"},
        "run": {"recipe": "digits_lt_resnet32", "seed": 7, "commit": "c0ffee" * 6, "modified": True, "epoch": 40},
    }
    return folder, write_results(folder, facts, predictions(), COUNTS)


def test_the_most_confident_mistakes_come_first():
    images = predictions()
    mistakes = worst_mistakes(images, most=5)
    wrong = images.predictions != images.labels
    assert [mistake["confidence"] for mistake in mistakes] == sorted(images.confidences[wrong], reverse=True)[:5]
    for mistake in mistakes:
        row = mistake["image"]
        assert (mistake["true"], mistake["predicted"]) == (images.labels[row], images.predictions[row])


def test_it_says_where_one_expert_is_better_and_where_the_model_comes_from(written, tmp_path):
    _, results = written
    text = write_report(results, tmp_path).read_text()
    few = 100 * results["metrics"]["few_shot_accuracy"]
    assert "One expert by itself is better than all together" in text
    assert f"expert 2 100.0 on few-shot classes against {few:.1f}" in text
    assert "recipe digits_lt_resnet32, seed 7, epoch 40 of the checkpoint, commit c0ffeec0ffee with changes" in text
    assert "the median of 3 batches after the first" in text
    same = {**results, "experts": {**results["experts"], "each": [results["metrics"]] * 3}}
    assert "is better than all together" not in write_report(same, tmp_path).read_text()


def test_a_report_of_an_earlier_version(written, tmp_path):
    _, results = written
    earlier = {name: value for name, value in results.items() if name not in ("mistakes", "run")}
    earlier["speed"] = {name: value for name, value in results["speed"].items() if name != "timed_batches"}
    earlier["bootstrap"] = {name: value for name, value in results["bootstrap"].items() if name != "without_width"}
    text = write_report(earlier, tmp_path).read_text()
    assert "most confident mistakes" not in text
    assert "They do not" in text


def test_an_interval_of_a_class_that_is_always_right_has_a_width(tmp_path, written):
    images = predictions()
    right = Predictions(**{**vars(images), "predictions": images.labels, "label_ranks": np.zeros(60, int)})
    facts = {name: written[1][name] for name in ("model", "dataset", "split", "dataset_options", "images_digest")}
    facts |= {name: written[1][name] for name in ("class_names", "machine", "speed")}
    results = write_results(tmp_path, facts, right, COUNTS)
    low, high = results["confidence_intervals"]["accuracy"]
    assert (low, high) == (pytest.approx(0.9398, abs=1e-4), 1.0)  # Wilson's of 60 in 60
    for low, high in results["confidence_intervals"].values():
        assert low < high <= 1.0


def test_the_run_of_a_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "best")
    assert describe_run(tmp_path / "best") == {}
    (tmp_path / "recipe.json").write_text('{"name": "digits_lt_resnet32"}')
    assert describe_run(tmp_path / "best") == {"recipe": "digits_lt_resnet32"}
    (tmp_path / "run.json").write_text('{"seed": 3}')
    (tmp_path / "environment.json").write_text('[{"commit": "a"}, {"commit": "b", "modified": false}]')
    (tmp_path / "best" / "checkpoint.json").write_text('{"epoch": 2}')
    whole = {"recipe": "digits_lt_resnet32", "seed": 3, "commit": "b", "modified": False, "epoch": 2}
    assert describe_run(tmp_path / "best") == whole
    shutil.copytree(tmp_path / "best", tmp_path / "checkpoints/step-5")
    shutil.copytree(tmp_path / "best", tmp_path / "corrected")
    assert describe_run(tmp_path / "checkpoints/step-5") == whole
    assert describe_run(tmp_path / "corrected") == {}


def test_pictures_of_mistakes_are_in_the_report_and_not_in_what_is_published(tmp_path):
    from accelerate import Accelerator

    rng = np.random.default_rng(1)
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=NAMES[:5])})
    files = [encoded(Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)), "PNG") for _ in range(20)]
    images = [{"bytes": content, "path": str(tmp_path / "secret.png")} for content in files]
    split = Dataset.from_dict({"image": images, "label": [row % 5 for row in range(20)]}, features=features)
    processor = evaluation_processor(24, 24, (0.5,) * 3, (0.25,) * 3)
    facts = {"model": "m", "dataset": "custom", "split": "test", "dataset_options": {}, "images_digest": "0"}
    data = EvaluationData(
        split=split,
        split_name="test",
        dataset="custom",
        options={},
        digest="0",
        other_images=False,
        trained_on=None,
        class_names=NAMES[:5],
        train_class_counts=[20] * 5,
        max_image_pixels=MAX_IMAGE_PIXELS,
    )
    arguments = (tiny_model().eval(), data, processor, Accelerator(), tmp_path / "out", facts)
    results = evaluate_split(*arguments, batch_size=4)
    text = (tmp_path / "out" / "report.html").read_text()
    assert results["mistakes"]
    assert text.count('src="data:image/jpeg;base64,') == len(results["mistakes"])
    assert results["speed"]["timed_batches"] == 4  # five without the first
    assert traces(tmp_path / "out", tmp_path) == []
    published = write_report(json.loads((tmp_path / "out" / "results.json").read_text()), tmp_path).read_text()
    assert "data:image" not in published
    assert "without their pictures" in published


@pytest.mark.skipif(not CHROMIUM, reason="needs requirements-extras.txt and chromium: make extras")
def test_on_paper_and_on_a_phone(written, tmp_path):
    from playwright.sync_api import sync_playwright

    address = write_report(written[1], tmp_path).as_uri()
    cut = """() => [...document.querySelectorAll('th, td')].filter(cell => {
        const box = cell.getBoundingClientRect();
        return box.right > document.documentElement.clientWidth + 1 || cell.scrollWidth > cell.clientWidth + 1;
    }).map(cell => cell.textContent.trim())"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FOR_CONTAINERS)
        page = browser.new_page(viewport={"width": 688, "height": 1000})  # A4 without its margins
        page.goto(address)
        page.emulate_media(media="print")
        assert page.evaluate(cut) == []
        assert page.locator("#per-class").evaluate("table => getComputedStyle(table.parentNode).overflowY") == "visible"
        page.emulate_media(media="screen")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shadows = page.locator(".scroll").first.evaluate("element => getComputedStyle(element).backgroundImage")
        assert len(re.findall("linear-gradient", shadows)) == 4  # shows that a table goes on at its side
        browser.close()
