"""The evaluation command on the default images, with networks small enough to check by hand."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    top_k_accuracy_score,
)

from data import evaluation_processor, load_long_tailed
from ride_bf import evaluate
from ride_bf.evaluation import report, results
from ride_bf.evaluation.html_report import write_report
from ride_bf.evaluation.plots import COLOURS, FIGURES
from ride_bf.evaluation.priors import ModelPrior, TestPrior, correct, find_model_prior, make_test_prior, read_shares
from ride_bf.evaluation.results import Predictions, measure, read_results, write_results
from ride_bf.recipes import RECIPES

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
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert metrics["worst_class_accuracy"] == pytest.approx(min(per_class))
    assert per_class[metrics["worst_class"]] == min(per_class)
    gaps = [calibration_error(probabilities[:, label], labels == label) for label in range(10)]
    assert metrics["class_wise_calibration_error"] == pytest.approx(np.mean(gaps), abs=2e-3)  # kept in float16
    assert found["speed"]["images_per_second"] > 0
    assert found["speed"]["timed_batches"] == 7  # of eight, without the first


def calibration_error(confidences, correct):
    """Guo et al.'s definition, and Nixon et al.'s for one class, written down bin by bin."""
    error = 0.0
    for upper in range(1, 16):
        inside = (confidences > (upper - 1) / 15) & (confidences <= upper / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    return error


def test_intervals_hold_their_value(evaluated):
    _, _, found = evaluated
    no_means = ("per_class_accuracy", "per_class_top_5_accuracy", "worst_class_accuracy")
    no_means += ("harmonic_mean_accuracy", "geometric_mean_accuracy")
    assert set(found["confidence_intervals"]) == {
        name for name in found["metrics"] if name.endswith("accuracy") and name not in no_means
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
    images = Predictions.load(folder / "predictions.npz", with_log_probabilities=True)
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


def copied(folder, target):
    target.mkdir()
    for name in ("results.json", "predictions.npz", "log_probabilities.npy"):
        shutil.copy(folder / name, target / name)
    return target


class TestAgain:
    """All numbers anew from the predictions, without images and model."""

    def test_the_same_numbers(self, evaluated, tmp_path, capsys):
        folder, _, found = evaluated
        place = copied(folder, tmp_path / "alone")
        for name in ("predictions.npz", ""):
            evaluate.main(["--predictions", str(place / name)])
            assert read_results(place) == found
        assert "macro F1" in capsys.readouterr().out
        evaluate.main(["--predictions", str(place), "--output_dir", str(tmp_path / "there")])
        assert read_results(tmp_path / "there") == found
        assert (tmp_path / "there/report.html").is_file()

    def test_predictions_of_an_earlier_version(self, evaluated, tmp_path, capsys):
        folder, _, found = evaluated
        place = copied(folder, tmp_path / "old")
        (place / "log_probabilities.npy").unlink()
        evaluate.main(["--predictions", str(place)])
        assert "no log_probabilities.npy" in capsys.readouterr().out
        missing = {"class_wise_calibration_error", "adaptive_calibration_error"}
        assert set(found["metrics"]) - set(read_results(place)["metrics"]) == missing
        with pytest.raises(
            SystemExit, match=r"has no probabilities of all classes.*Evaluate the model again: python -m"
        ):
            evaluate.main(["--predictions", str(place), "--test_prior", "train", "--model_prior", "uniform"])

    def test_log_probabilities_of_other_images_are_refused(self, evaluated, tmp_path):
        place = copied(evaluated[0], tmp_path / "mixed")
        np.save(place / "log_probabilities.npy", np.zeros((3, 10), np.float16))
        with pytest.raises(SystemExit, match=r"log_probabilities\.npy is of 3 images, predictions\.npz of 500"):
            evaluate.main(["--predictions", str(place)])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--predictions x --batch_size 3", "--batch_size cannot act with --predictions"),
            ("--predictions x --dataset digits_lt", "--dataset cannot act with --predictions"),
            ("--predictions x --train_images", "--train_images cannot act with --predictions"),
            ("--predictions x --model y", "not allowed with"),
            ("--model x --model_prior train", "--model_prior cannot act without --test_prior"),
            ("--model x --train_images --other_images", "--train_images cannot act with --other_images"),
            ("--model x --neighbours --views flip", "--neighbours cannot act with --views flip"),
            ("x --model y", "not allowed with"),
            ("", "one of the arguments MODEL --model --predictions is required"),
        ],
    )
    def test_options_that_cannot_act(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            evaluate.main(arguments.split())
        assert message in capsys.readouterr().err

    def test_too_many_probabilities_are_not_kept(self, evaluated, tmp_path, monkeypatch, capsys):
        folder, _, _ = evaluated
        monkeypatch.setattr(report, "MOST_NUMBERS", 4999)
        place = copied(folder, tmp_path / "many")
        arguments = ["--dataset", "digits_lt", "--output_dir", str(place)]
        evaluate.main(["--model", str(folder), *arguments])
        assert not (place / "log_probabilities.npy").exists(), "those of the evaluation before would be others"
        assert "no log_probabilities.npy" in capsys.readouterr().out
        with pytest.raises(
            SystemExit, match="at most 4,999 are kept: leave it out, or name a smaller split with --split"
        ):
            evaluate.main(["--model", str(folder), *arguments, "--test_prior", "train", "--model_prior", "train"])


class TestTestPrior:
    def test_the_correction_is_bayes_rule(self):
        """Posteriors for one distribution of the classes, corrected to another, are the posteriors for that one."""
        generator = np.random.default_rng(0)
        likelihood = generator.dirichlet(np.ones(50), size=4).T  # (feature value, class)
        labels = generator.integers(0, 4, 50)

        def posterior(shares):
            joint = likelihood * shares
            return joint / joint.sum(axis=1, keepdims=True)

        trained, tested = np.array([0.7, 0.2, 0.08, 0.02]), np.array([0.1, 0.2, 0.3, 0.4])
        zeros = np.zeros(50)
        log_probabilities = np.log(posterior(trained)).astype(np.float16)
        images = Predictions(labels, labels, zeros, zeros, zeros, labels[:, None], None, log_probabilities)
        model_prior = ModelPrior(basis="", shares=trained.tolist())
        found = correct(images, TestPrior(name="", shares=tested.tolist(), model_prior=model_prior))
        expected = posterior(tested)
        assert np.exp(found.log_probabilities) == pytest.approx(expected, abs=2e-3)  # float16
        assert found.confidences == pytest.approx(expected.max(axis=1), abs=2e-3)
        assert found.losses == pytest.approx(-np.log(expected[np.arange(50), labels]), abs=5e-3)
        sure = np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)[:, 0] > 0.01
        assert np.array_equal(found.predictions[sure], expected.argmax(axis=1)[sure])

    def test_results_have_both(self, evaluated, tmp_path, capsys):
        folder, _, found = evaluated
        place = copied(folder, tmp_path / "prior")
        evaluate.main(["--predictions", str(place), "--test_prior", "train", "--model_prior", "uniform"])
        new = read_results(place)
        prior = new.pop("test_prior")
        assert new == found, "beside the uncorrected numbers"
        counts = np.array(found["train_class_counts"])
        assert prior["shares"] == pytest.approx(counts / counts.sum())
        assert prior["model_prior"] == {"basis": "--model_prior uniform", "shares": pytest.approx([0.1] * 10)}
        for name, metrics in (("uncorrected_", found["metrics"]), ("", prior["metrics"])):
            expected = np.dot(prior["shares"], metrics["per_class_accuracy"])
            value = prior[f"{name}test_prior_accuracy"] if name else metrics["test_prior_accuracy"]
            assert value == pytest.approx(expected)
        assert prior["metrics"]["per_class_accuracy"] != found["metrics"]["per_class_accuracy"]
        assert prior["metrics"]["many_shot_accuracy"] >= found["metrics"]["many_shot_accuracy"]
        assert "corrected for the test prior train, from the model's prior by --model_prior" in capsys.readouterr().out
        assert "Corrected for a known distribution" in (place / "report.html").read_text()
        evaluate.main(["--predictions", str(place)])
        assert read_results(place)["test_prior"] == prior, "kept, and computed again"

    def test_an_evaluation_with_prior_and_training_images(self, evaluated, tmp_path, capsys):
        folder, model, found = evaluated
        options = ["--dataset", "digits_lt", "--output_dir", str(tmp_path), "--train_images"]
        evaluate.main(["--model", str(folder), *options, "--test_prior", "inverse", "--model_prior", "train"])
        new = read_results(tmp_path)
        assert new["metrics"]["accuracy"] == found["metrics"]["accuracy"]
        assert new["test_prior"]["shares"] == pytest.approx(read_shares("inverse", DIGITS, found["train_class_counts"]))
        pixels, labels = prepared("train")
        with torch.no_grad():
            right = model(pixels).logits.argmax(dim=1).numpy() == labels
        assert new["training_images"]["num_images"] == 337
        assert new["training_images"]["metrics"]["accuracy"] == pytest.approx(right.mean())
        assert "on the 337 training images: all" in capsys.readouterr().out
        assert "training images</td>" in (tmp_path / "report.html").read_text()
        with pytest.raises(SystemExit, match=r"no readable recipe\.json.*--model_prior train .* or uniform"):
            evaluate.main(["--model", str(folder), *options, "--test_prior", "train"])

    @pytest.mark.parametrize(
        ("options", "facts", "shares"),
        [
            ({"loss": "cross_entropy"}, {}, [0.6, 0.3, 0.1]),
            ({"loss": "balanced_softmax"}, {}, [1 / 3] * 3),
            ({"loss": "cross_entropy", "sampler": "class_balanced"}, {}, [1 / 3] * 3),
            ({"loss": "logit_adjusted", "logit_adjustment_tau": 2.0}, {}, [1 / 6, 1 / 3, 1]),
            ({"loss": "ride", "reweight_epoch": None}, {}, [0.6, 0.3, 0.1]),
            ({"loss": "ride", "reweight_epoch": 20}, {"epoch": 20}, [0.6, 0.3, 0.1]),
            ({"loss": "ride", "reweight_epoch": 20}, {"epoch": 20.5}, [1 / 3] * 3),
            ({"loss": "cross_entropy", "sampler": "progressively_balanced"}, {"epoch": 0}, [0.6, 0.3, 0.1]),
            ({"loss": "cross_entropy"}, {"correction": {"method": "tau_normalisation"}}, None),
        ],
    )
    def test_the_models_own_prior_follows_from_its_training(self, tmp_path, options, facts, shares):
        best = tmp_path / "run/best"
        best.mkdir(parents=True)
        (best / "config.json").write_text("{}")
        (best / "checkpoint.json").write_text(json.dumps(facts))
        recipe = RECIPES["digits_lt_resnet32"].with_overrides(**options)
        (tmp_path / "run/recipe.json").write_text(recipe.as_json())
        for place in (best, tmp_path / "run"):
            found = find_model_prior(place, [60, 30, 10])
            if shares is None:
                assert found is None
                continue
            # the effective numbers of so few images are nearly the numbers themselves
            assert found.shares == pytest.approx(np.array(shares) / sum(shares), abs=2e-3)
            assert options["loss"] in found.basis
        (tmp_path / "run/recipe.json").write_text("{}")
        assert find_model_prior(best, [60, 30, 10]) is None

    def test_a_file_of_numbers(self, tmp_path):
        path = tmp_path / "prior.json"
        for content in ([3, 1], {"cat": 1, "dog": 3}):
            path.write_text(json.dumps(content))
            assert read_shares(str(path), ["dog", "cat"], [5, 5]) == [0.75, 0.25]
        for content, message in (
            ([1], "must have a list of 2 numbers.*not 1 numbers"),
            ({"dog": 1, "fox": 2}, "these names are not in both: cat, fox"),
            ([1, 0], "has 0 for class 1; each class needs a number above 0"),
            ([1, "a"], "not all are numbers"),
            (3, "must have a list of 2 numbers"),
        ):
            path.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=message):
                read_shares(str(path), ["dog", "cat"], [5, 5])
        path.write_text("[3, 1]")
        made = make_test_prior(str(path), ModelPrior(basis="", shares=[0.5, 0.5]), ["dog", "cat"], [5, 5])
        assert made.name == "prior.json", "published results name no folder"
        path.write_text("dog 3")
        with pytest.raises(ValueError, match="is not a JSON file"):
            read_shares(str(path), ["dog", "cat"], [5, 5])
        with pytest.raises(FileNotFoundError, match="there is no file balanced; name a JSON file, or one of train"):
            read_shares("balanced", ["dog", "cat"], [5, 5])
