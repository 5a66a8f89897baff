"""Corrections of a trained classifier, and the router's curve, on models of the default images."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, tiny_model
from test_training import assert_same_weights, read_metrics, train

from data import evaluation_batches
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import decouple, route
from ride_bf.evaluation import decoupling, routing
from ride_bf.evaluation.metrics import class_summary
from ride_bf.evaluation.predict import evaluate
from ride_bf.runs.checkpoints import damage
from ride_bf.runs.models import find_model, load_model, load_processor
from ride_bf.runs.provenance import load_splits_of
from ride_bf.training.freezing import train_only

COUNTS = [64, 16, 4, 1, 15]
LINEAR = ["--classifier", "linear", "--loss", "cross_entropy", "--batchformer", "none"]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return train(tmp_path_factory.mktemp("linear") / "out", "--epochs", 4, *LINEAR) / "last"


def test_tau_normalisation_by_hand():
    weight, bias = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, -1.0])
    expected = {
        0.0: [[3.0, 4.0], [0.0, 2.0]],
        0.5: [[3 / 5**0.5, 4 / 5**0.5], [0.0, 2**0.5]],
        1.0: [[0.6, 0.8], [0, 1]],
    }
    for tau, rows in expected.items():
        normalised, no_bias = decoupling.tau_normalised(weight, bias, tau, COUNTS)
        torch.testing.assert_close(normalised, torch.tensor(rows))
        assert no_bias.tolist() == [0.0, 0.0]


def test_logit_adjustment_by_hand(images):
    model = tiny_model(classifier="linear").eval()
    with torch.no_grad():
        before = model(images).logits
        decoupling.correct(model, "logit_adjustment", 0.5, COUNTS)
        after = model(images).logits
    shares = torch.tensor(COUNTS) / 100
    torch.testing.assert_close(after, before - 0.5 * shares.log())


def test_cosine_classifiers_are_refused_with_the_reason():
    for method in decoupling.METHODS:
        with pytest.raises(ValueError, match=f"{method} needs a linear classifier"):
            decoupling.correct(tiny_model(), method, 0.5, COUNTS)
    with pytest.raises(
        ValueError, match="class_scales needs --classifier linear, and --init_from a model that was trained with it"
    ):
        train_only(tiny_model(), "class_scales")


@pytest.mark.parametrize("method", decoupling.METHODS)
def test_the_strength_is_chosen_on_validation(linear, tmp_path, method, capsys):
    decouple.main([method, str(linear), "--output_dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "decoupling.json").read_text())
    curve = {float(tau): accuracy for tau, accuracy in results["validation_balanced_accuracy"].items()}
    assert len(curve) == 21
    assert curve[results["strength"]] == max(curve.values())
    assert all(curve[tau] < max(curve.values()) for tau in curve if tau < results["strength"])
    corrected = RideBfForImageClassification.from_pretrained(tmp_path / "out")
    by_hand = RideBfForImageClassification.from_pretrained(linear)
    decoupling.correct(by_hand, method, results["strength"], [120, 78, 50, 33, 21, 14, 9, 6, 4, 2])
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(corrected(images).logits, by_hand(images).logits)
    assert "test after" in capsys.readouterr().out


def test_a_full_disk_is_a_message_without_the_options_of_training(linear, tmp_path, monkeypatch):
    def fills_up(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RideBfForImageClassification, "save_pretrained", fills_up)
    with pytest.raises(SystemExit, match=r"^error: .*/out could not be written .*Free space on the disk$"):
        decouple.main(["tau_normalisation", str(linear), "--output_dir", str(tmp_path / "out"), "--strength", "1"])


def test_a_given_strength_is_taken(linear, tmp_path):
    decouple.main(["tau_normalisation", str(linear), "--output_dir", str(tmp_path / "out"), "--strength", "1"])
    model = RideBfForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.classifiers[0].weight.norm(dim=1), torch.ones(10))


def test_class_scales_move_the_lengths_alone(linear, tmp_path):
    options = [*LINEAR, "--train_only", "class_scales", "--sampler", "class_balanced", "--weight_decay", 0]
    out = train(tmp_path / "out", "--epochs", 3, "--init_from", linear, *options)
    losses = [line["train_loss"] for line in read_metrics(out)]
    assert losses[-1] < losses[0]
    before = RideBfForImageClassification.from_pretrained(linear)
    after = RideBfForImageClassification.from_pretrained(out / "last")
    for old, new in zip(before.classifiers, after.classifiers, strict=True):
        cosine = torch.nn.functional.cosine_similarity(old.weight, new.weight, dim=1)
        torch.testing.assert_close(cosine, torch.ones(10))
        assert (old.weight.norm(dim=1) - new.weight.norm(dim=1)).abs().max() > 1e-3
        assert torch.equal(old.bias, new.bias)
    assert all(
        torch.equal(tensor, after.ride_bf.state_dict()[name]) for name, tensor in before.ride_bf.state_dict().items()
    )


def test_a_scale_learns_as_a_parameter_of_its_own_would():
    """Against f * w0 with f a parameter, over steps of SGD with momentum and weight decay."""
    torch.manual_seed(0)
    model = tiny_model(classifier="linear", num_experts=1, num_shared_stages=0)
    train_only(model, "class_scales")
    classifier = model.classifiers[0]
    start = classifier.weight.detach().clone()
    scale = torch.nn.Parameter(torch.ones(5, 1))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [torch.optim.SGD([classifier.weight], **settings), torch.optim.SGD([scale], **settings)]
    for _ in range(5):
        features, labels = torch.randn(7, 8), torch.randint(0, 5, (7,))
        for optimizer, weight in zip(optimizers, (classifier.weight, scale * start), strict=True):
            logits = torch.nn.functional.linear(features, weight, classifier.bias)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    torch.testing.assert_close(classifier.weight, scale * start)


def test_each_strength_is_worth_what_the_corrected_model_is(linear):
    """All strengths from one pass, equal to correcting and evaluating the model at each."""
    accelerator = Accelerator()
    splits, data = load_splits_of(linear)
    processor, counts = load_processor(linear), data.train_class_counts
    loader = evaluation_batches(splits["validation"], processor, 33, accelerator=accelerator)
    for method in decoupling.METHODS:
        model = load_model(linear)
        seen = []
        model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        curve = decoupling.choose_strength(model, method, loader, accelerator, counts)
        assert seen == [33, 33, 32]  # 80 images, once; a small last batch is filled up
        assert list(curve) == list(decoupling.STRENGTHS)
        for strength in (0.0, 0.35, 1.0):
            corrected = load_model(linear)
            decoupling.correct(corrected, method, strength, counts)
            found = evaluate(corrected, loader, accelerator, counts)
            assert curve[strength] == pytest.approx(found["balanced_accuracy"])
            before, after = decoupling.evaluate_both(model, method, strength, loader, accelerator, counts)
            for own, expected in ((after, found), (before, evaluate(model, loader, accelerator, counts))):
                assert own.keys() == expected.keys()
                assert all(own[name] == pytest.approx(expected[name], rel=1e-5) for name in own)


def test_a_model_with_a_router_is_not_corrected():
    model = tiny_model(classifier="linear", router=True, router_top_k=3)
    with pytest.raises(ValueError, match="train the router afterwards"):
        decoupling.correct(model, "logit_adjustment", 0.5, COUNTS)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return train(tmp_path_factory.mktemp("first") / "out", "--epochs", 3, "--batchformer", "none")


@pytest.fixture(scope="module")
def routed(first, tmp_path_factory):
    stage_two = ["--recipe", "digits_lt_resnet32_router", "--epochs", "2", "--batchformer", "none", "--init_from"]
    return train(tmp_path_factory.mktemp("routed") / "out", *stage_two, first)


@pytest.fixture
def curve(routed, tmp_path):
    route.main([str(routed), "--output_dir", str(tmp_path / "curve")])
    assert (tmp_path / "curve" / "routing.png").stat().st_size > 5000
    return json.loads((tmp_path / "curve" / "routing.json").read_text())


def test_the_routers_curve(first, routed, curve, tmp_path):
    assert [point["threshold"] for point in curve] == list(routing.THRESHOLDS)
    experts = [point["mean_experts"] for point in curve]
    assert experts == sorted(experts, reverse=True)
    assert (experts[0], experts[-1]) == (3.0, 1.0)
    costs = [point["multiply_adds"] for point in curve]
    assert costs == sorted(costs, reverse=True)
    assert all(point["images_per_second"] > 0 for point in curve)
    assert {point["timed_images"] for point in curve} == {80}
    with pytest.raises(
        SystemExit, match="has no router; train one with --router true --train_only router --init_from "
    ):
        route.main([str(first)])


@pytest.fixture(scope="module")
def undecided(routed):
    """A model with a router that sends about half of the images on after each expert, and validation images."""
    model = load_model(routed).eval()
    splits, data = load_splits_of(routed)
    loader = evaluation_batches(splits["validation"], load_processor(routed), 80)
    pixel_values = next(iter(loader))["pixel_values"]
    with torch.no_grad():
        model.config.router_threshold = 0.0
        decisions = model(pixel_values).router_logits
        model.router.output_layers[0].bias.sub_(decisions.median())
    return model, splits["validation"], data.train_class_counts


def test_an_outcome_at_a_threshold_is_that_of_the_routed_network(undecided, routed):
    model, split, _ = undecided
    loader = evaluation_batches(split, load_processor(routed), 80)
    (batch,) = loader
    with torch.no_grad():
        model.config.router_threshold = 0.0
        outcomes = routing._outcomes(model(batch["pixel_values"]), batch["labels"])
        for threshold in (0.0, 0.3, 0.45, 0.5, 0.55, 0.7, 1.0):
            model.config.router_threshold = threshold
            outputs = model(batch["pixel_values"])
            used = routing.experts_used(outcomes["router_logits"], threshold)
            assert torch.equal(used, outputs.num_experts_used), threshold
            predictions = outcomes["predictions"].gather(1, used[:, None] - 1).squeeze(1)
            assert torch.equal(predictions, outputs.logits.argmax(dim=1)), threshold
            assert 1 < used.float().mean() < 3 or threshold not in (0.45, 0.5, 0.55)


def test_the_curve_is_of_one_pass_and_equals_evaluation_at_each_threshold(undecided, routed):
    model, split, counts = undecided
    accelerator = Accelerator()
    loader = evaluation_batches(split, load_processor(routed), 33, accelerator=accelerator)
    model.config.router_threshold = 0.4
    seen = []
    hook = model.ride_bf.trunk.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    curve = routing.measure(model, loader, accelerator, counts)
    hook.remove()
    summary = class_summary(np.array([0]), np.array([0]), 1)  # not part of the curve
    # Of the pass; then, at each threshold, the images that are timed and before them a batch to warm up
    assert seen == [33, 33, 32, *([33, 33, 33, 14] * len(routing.THRESHOLDS))]
    assert model.config.router_threshold == 0.4
    for point in curve:
        model.config.router_threshold = point["threshold"]
        found = evaluate(model, loader, accelerator, counts)
        del found["loss"]
        for name, value in found.items():
            if name in summary:
                continue
            assert point[name] == pytest.approx(value), (point["threshold"], name)
        assert point["mean_experts"] == pytest.approx(np.dot(found["experts_used"], [1, 2, 3]))


def test_the_images_that_are_timed_are_spread_over_all(undecided, routed):
    _, split, _ = undecided
    loader = evaluation_batches(split, load_processor(routed), 16)
    sample = routing.Sample(loader, 20)
    every = torch.cat([batch["pixel_values"] for batch in sample])
    assert len(sample) == 20
    kept = torch.cat(list(sample.batches()))
    places = [int((every == image).flatten(1).all(dim=1).nonzero()[0]) for image in kept]
    assert places[0] == 0
    assert places[-1] == 79
    assert max(np.diff(places)) <= 8
    assert max(map(len, sample.batches())) == 16


def in_two_processes(*command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    finished = subprocess.run(
        [*torchrun, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_two_processes_give_the_curve_of_one(routed, curve, tmp_path):
    in_two_processes("ride_bf.route", routed, "--batch_size", 16, "--output_dir", tmp_path / "together")
    together = json.loads((tmp_path / "together/routing.json").read_text())
    for alone, other in zip(curve, together, strict=True):
        for name in ("balanced_accuracy", "mean_experts", "experts_used", "per_class_accuracy"):
            assert alone[name] == other[name], name


def test_a_threshold_is_written_where_the_model_is(routed, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(routed, own)
    chosen = find_model(own)
    route.main([str(own), "--output_dir", str(tmp_path / "curve"), "--set_threshold", "0.2"])
    assert RideBfForImageClassification.from_pretrained(chosen).config.router_threshold == 0.2
    assert damage(chosen) is None, "a checkpoint that was changed on purpose is whole"
    with pytest.raises(SystemExit, match="a threshold is a probability from 0 to 1, not 2"):
        route.main([str(own), "--set_threshold", "2"])


def test_two_processes_correct_as_one_does(linear, tmp_path):
    command = ["tau_normalisation", str(linear), "--output_dir"]
    decouple.main([*command, str(tmp_path / "alone")])
    said = in_two_processes("ride_bf.decouple", *command, tmp_path / "together")
    assert said.count("test after") == 1
    alone, together = (json.loads((tmp_path / f"{by}/decoupling.json").read_text()) for by in ("alone", "together"))
    for name in ("strength", "validation_balanced_accuracy"):
        assert alone[name] == together[name]
    assert_same_weights(tmp_path / "alone", tmp_path / "together")
