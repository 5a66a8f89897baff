"""Corrections of a trained classifier, and the router's curve, on models of the default images."""

import json

import pytest
import torch
from conftest import tiny_model
from test_training import read_metrics, train

from modeling_ride_bf import RideBfForImageClassification
from ride_bf import decouple, route
from ride_bf.evaluation import decoupling, routing
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
    with pytest.raises(ValueError, match="class_scales needs --classifier linear"):
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


def test_the_routers_curve(tmp_path, capsys):
    first = train(tmp_path / "first", "--epochs", 3, "--batchformer", "none")
    stage_two = ["--recipe", "digits_lt_resnet32_router", "--epochs", "2", "--batchformer", "none", "--init_from"]
    routed = train(tmp_path / "routed", *stage_two, first / "last") / "last"
    route.main([str(routed), "--output_dir", str(tmp_path / "curve")])
    curve = json.loads((tmp_path / "curve" / "routing.json").read_text())
    assert [point["threshold"] for point in curve] == list(routing.THRESHOLDS)
    experts = [point["mean_experts"] for point in curve]
    assert experts == sorted(experts, reverse=True)
    assert (experts[0], experts[-1]) == (3.0, 1.0)
    costs = [point["multiply_adds"] for point in curve]
    assert costs == sorted(costs, reverse=True)
    assert all(point["images_per_second"] > 0 for point in curve)
    model = RideBfForImageClassification.from_pretrained(routed)
    assert model.config.router_threshold == 0.5
    assert (tmp_path / "curve" / "routing.png").stat().st_size > 5000
    route.main([str(routed), "--set_threshold", "0.2"])
    assert RideBfForImageClassification.from_pretrained(routed).config.router_threshold == 0.2
    with pytest.raises(SystemExit, match="has no router"):
        route.main([str(first / "last")])
