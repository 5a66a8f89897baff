"""The evaluation command on the default images, with networks small enough to check by hand."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, precision_score, top_k_accuracy_score

from data import evaluation_processor, load_long_tailed
from ride_bf import evaluate
from ride_bf.evaluation import results
from ride_bf.evaluation.html_report import write_report
from ride_bf.evaluation.plots import COLOURS, FIGURES
from ride_bf.evaluation.results import Predictions, measure, read_results, write_results

DIGITS = [str(digit) for digit in range(10)]
GROUPS = {"many": [0], "medium": [1, 2, 3, 4], "few": [5, 6, 7, 8, 9]}
SECTIONS = ["summary", "groups", "distributions", "calibration", "confusion", "experts", "classes", "method"]


PROCESSOR = evaluation_processor(8, 8, [0.5] * 3, [0.5] * 3)


def prepared(split):
    """Pixels (N, 3, 8, 8) as the processor makes them, and labels (N,)."""
    rows = load_long_tailed("digits_lt")[split]
    images = [image.convert("RGB") for image in rows["image"]]
    return PROCESSOR(images, return_tensors="pt")["pixel_values"], np.array(rows["label"])


def save_model(folder, **options):
    """A network of random features whose linear classifiers know the mean of each class: right here, wrong there."""
    names = {"id2label": dict(enumerate(DIGITS)), "label2id": {name: label for label, name in enumerate(DIGITS)}}
    model = tiny_model(**{"num_labels": 10, "classifier": "linear", "router_top_k": 4, **names, **options}).eval()
    pixels, labels = prepared("train")
    with torch.no_grad():
        features = model.ride_bf(pixels).expert_features  # (N, E, D)
        for classifier, own in zip(model.classifiers, features.unbind(dim=1), strict=True):
            means = torch.stack([own[torch.from_numpy(labels == label)].mean(dim=0) for label in range(10)])
            classifier.weight.copy_(means * 20 / own.var())
            classifier.bias.copy_(-10 * means.square().sum(dim=1) / own.var())
        if model.router is not None:  # about half of the images are sent on
            decisions = model.router(0, features[:, 0], model.classifiers[0](features[:, 0]))
            model.router.output_layers[0].bias.sub_(decisions.median())
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return model


def run(folder, *arguments):
    evaluate.main(["--model", str(folder), "--dataset", "digits_lt", "--batch_size", "64", *map(str, arguments)])
    return read_results(folder)


@pytest.fixture(scope="module")
def test_images():
    return prepared("test")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    model = save_model(folder)
    return folder, model, run(folder)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed") / "saved"
    model = save_model(folder, router=True, router_threshold=0.5)
    return folder, model, run(folder)


def test_numbers_equal_hand_computed_ones(evaluated, test_images):
    _, model, found = evaluated
    pixels, labels = test_images
    with torch.no_grad():
        outputs = model(pixels)
    logits, probabilities = outputs.logits.numpy(), outputs.logits.double().softmax(dim=1).numpy()
    predictions = logits.argmax(axis=1)
    metrics = found["metrics"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert metrics["top_5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert metrics["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)), rel=1e-4)
    per_class = [(predictions[labels == label] == label).mean() for label in range(10)]
    top_5 = [(np.argsort(-logits[labels == label])[:, :5] == label).any(axis=1).mean() for label in range(10)]
    assert metrics["per_class_accuracy"] == pytest.approx(per_class)
    assert metrics["per_class_top_5_accuracy"] == pytest.approx(top_5)
    for group, classes in GROUPS.items():
        assert metrics[f"{group}_shot_accuracy"] == pytest.approx(np.mean([per_class[label] for label in classes]))
        assert metrics[f"{group}_shot_top_5_accuracy"] == pytest.approx(np.mean([top_5[label] for label in classes]))
        inside = np.isin(labels, classes)
        error = calibration_error(probabilities[inside].max(axis=1), (predictions == labels)[inside])
        assert metrics[f"{group}_shot_expected_calibration_error"] == pytest.approx(error, abs=1e-6)
    precision = precision_score(labels, predictions, average=None, labels=range(10), zero_division=np.nan)
    assert [np.nan if value is None else value for value in metrics["per_class_precision"]] == pytest.approx(
        precision, nan_ok=True
    )
    for index, own in enumerate(outputs.expert_logits.argmax(dim=2).numpy().T):
        assert found["experts"]["each"][index]["accuracy"] == pytest.approx((own == labels).mean())
    assert (found["num_images"], found["num_experts"], found["class_names"]) == (500, 3, DIGITS)
    assert found["speed"]["images_per_second"] > 0
    assert found["speed"]["timed_batches"] == 7  # of eight, without the first


def calibration_error(confidences, correct):
    """Guo et al.'s definition, written down bin by bin."""
    error = 0.0
    for upper in range(1, 16):
        inside = (confidences > (upper - 1) / 15) & (confidences <= upper / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    return error


def test_intervals_hold_their_value(evaluated):
    _, _, found = evaluated
    assert set(found["confidence_intervals"]) == {
        name for name in found["metrics"] if name.endswith("accuracy") and not name.startswith("per_class")
    }
    for name, (low, high) in found["confidence_intervals"].items():
        assert low - 1e-12 <= found["metrics"][name] <= high + 1e-12
        assert 0.001 < high - low < 0.3


def test_with_a_router_experts_are_measured_where_they_ran(routed, test_images):
    _, model, found = routed
    pixels, labels = test_images
    with torch.no_grad():
        outputs = model(pixels)
    used = outputs.num_experts_used.numpy()
    assert len(np.unique(used)) > 1
    assert found["metrics"]["experts_used"] == pytest.approx([(used == number).mean() for number in (1, 2, 3)])
    for index, expert in enumerate(found["experts"]["each"]):
        ran = used > index
        assert expert["images"] == ran.sum()
        if ran.any():
            own = outputs.expert_logits[torch.from_numpy(ran), index].argmax(dim=1).numpy()
            assert expert["accuracy"] == pytest.approx((own == labels[ran]).mean())
    both = used > 1
    first, second = (outputs.expert_logits[torch.from_numpy(both), index].argmax(dim=1) for index in (0, 1))
    assert found["experts"]["agreement"][0][1] == pytest.approx((first == second).float().mean().item())


def test_two_processes_give_the_numbers_of_one(routed, tmp_path):
    """500 images in batches of 37: neither the batches nor the processes come out even."""
    folder, _, alone = routed
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = ["ride_bf.evaluate", "--model", str(folder), "--dataset", "digits_lt", "--batch_size", "37"]
    completed = subprocess.run(
        [*torchrun, *command, "--output_dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("images/s") == 1
    together = read_results(tmp_path)
    assert together["speed"]["num_processes"] == 2
    left, right = Predictions.load(folder / "predictions.npz"), Predictions.load(tmp_path / "predictions.npz")
    for column in ("labels", "predictions", "label_ranks", "expert_predictions", "experts_used"):
        assert np.array_equal(getattr(left, column), getattr(right, column)), column
    assert together["images_digest"] == alone["images_digest"]
    assert_close(together["metrics"], alone["metrics"])
    assert_close(together["experts"], alone["experts"])


def assert_close(left, right):
    """Equal but for the last digits, which the sizes of batches change."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_close(left[name], right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for own, other in zip(left, right, strict=True):
            assert_close(own, other)
    else:
        assert left == pytest.approx(right, rel=1e-5)


def test_results_are_what_was_written_and_all_documented(evaluated, tmp_path):
    folder, _, found = evaluated
    images = Predictions.load(folder / "predictions.npz")
    images.save(tmp_path / "again.npz")
    again = Predictions.load(tmp_path / "again.npz")
    assert again.experts_used is None
    assert np.array_equal(again.expert_predictions, images.expert_predictions)
    facts = {name: found[name] for name in ("model", "dataset", "split", "images_digest", "class_names")}
    written = write_results(tmp_path, facts, images, found["train_class_counts"])
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == written
    assert written["metrics"] == found["metrics"]
    documented = set(re.findall(r"\w+", re.sub(r"^    \s.*$", "", results.__doc__, flags=re.MULTILINE)))
    assert set(found) <= documented
    assert (tmp_path / "results.json").read_text().count("NaN") == 0


def test_groups_at_their_boundaries():
    """Classes of 19, 20, 100 and 101 training images; the first half of each class's test images is right."""
    labels = np.repeat(np.arange(4), 4)
    shares = np.array([0.25, 0.5, 0.75, 1.0])
    correct = np.tile(np.arange(4), 4) < 4 * shares[labels]
    wrong = (labels + 1) % 4
    zeros = np.zeros(16)
    images = Predictions(
        labels, np.where(correct, labels, wrong), zeros, zeros + 0.5, zeros, np.where(correct, labels, wrong)[:, None]
    )
    metrics = measure(images, [19, 20, 100, 101])["metrics"]
    assert metrics["few_shot_accuracy"] == 0.25
    assert metrics["medium_shot_accuracy"] == pytest.approx((0.5 + 0.75) / 2)
    assert metrics["many_shot_accuracy"] == 1.0
    assert "top_5_accuracy" not in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--split", "third"], "has no split 'third'; it has train, validation, test"),
        (["--imbalance_factor", "10"], "digits_lt has no options"),
        (["--batch_size", "0"], "--batch_size must be 1 or more"),
        (["--dataset", "mnist"], "no data set is called 'mnist'"),
    ],
)
def test_what_cannot_be_evaluated_is_said(evaluated, arguments, message, capsys):
    folder, _, _ = evaluated
    with pytest.raises(SystemExit) as stopped:
        run(folder, *arguments)
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_a_model_of_other_classes_is_refused(tmp_path):
    save_model(tmp_path, num_labels=10, id2label={label: f"digit {label}" for label in range(10)})
    with pytest.raises(SystemExit, match=r"the first that differ.*\('digit 0', '0'\)"):
        run(tmp_path)


def test_a_damaged_model_is_no_result(tmp_path):
    model = save_model(tmp_path)
    with torch.no_grad():
        model.classifiers[0].weight.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="some logits are not finite"):
        run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_an_older_format_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"format_version": 0}))
    with pytest.raises(ValueError, match="format_version 0, not 1"):
        read_results(tmp_path)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.references, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name.split(":")[-1] in ("src", "href", "srcset", "data", "action"):
                self.references.append(value)


@pytest.mark.parametrize("name", ["evaluated", "routed"])
def test_the_report_has_every_section_and_needs_nothing_else(name, request):
    folder, _, found = request.getfixturevalue(name)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert set(SECTIONS) <= set(page.ids)
    pictures = {figure for figure in FIGURES if figure != "experts_used" or name == "routed"}
    assert set(FIGURES) & set(page.ids) == pictures
    assert len(page.ids) == len(set(page.ids))
    pictures_of_mistakes = [reference for reference in page.references if reference.startswith("data:image/jpeg;")]
    assert len(pictures_of_mistakes) == len(found["mistakes"]) > 0
    links = [reference for reference in page.references if reference not in pictures_of_mistakes]
    assert all(reference.startswith("#") for reference in links)
    assert {reference[1:] for reference in links} <= set(page.ids)
    assert not page.tags & {"link", "iframe", "object", "base", "image"}
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", text)
    assert "default-src 'none'" in text
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert svgs.count("<svg") == len(pictures)
    assert not any(colour in svgs for colour in COLOURS.values())  # the page's own, for light and for dark
    assert f"{100 * found['metrics']['few_shot_accuracy']:.1f}" in text


def test_names_of_classes_are_shown_as_they_are(evaluated, tmp_path):
    _, _, found = evaluated
    names = ["<script>alert(1)</script>", 'a $b$ & "c"', *DIGITS[2:]]
    text = write_report({**found, "class_names": names, "model": "<b>model</b>"}, tmp_path).read_text()
    assert "<script>alert" not in text
    assert "<b>model" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "a $b$ &amp; " in text


def test_one_expert_and_one_group_leave_their_pictures_out(evaluated, tmp_path):
    folder, _, found = evaluated
    columns = {name: column for name, column in np.load(folder / "predictions.npz").items()}
    columns["expert_predictions"] = columns["expert_predictions"][:, :1]
    names = ("model", "dataset", "split", "dataset_options", "images_digest", "class_names", "speed", "machine")
    written = write_results(tmp_path, {name: found[name] for name in names}, Predictions(**columns), [50] * 10)
    text = write_report(written, tmp_path).read_text()
    assert 'id="experts"' not in text
    assert "few-shot classes are" not in text
    assert "experts" not in written
    assert "many_shot_accuracy" not in written["metrics"]
