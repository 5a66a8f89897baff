"""The benchmarks of the training step: that they compare like with like, and count right. Not how fast anything is."""

import argparse
import json
import time
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from modeling_ride_bf import RideBfOutput
from ride_bf.benchmark import backbone
from ride_bf.benchmark.__main__ import main
from ride_bf.benchmark.arguments import BACKBONES
from ride_bf.benchmark.measure import command, peak_bytes, seconds_in_turns
from ride_bf.benchmark.train import (
    OURS,
    PRODUCT,
    REFERENCE,
    RESNET50,
    ReferenceLoss,
    compare_numbers,
    long_tail,
    random_batch,
    train_report,
)
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.methods.objectives import make_objective
from ride_bf.recipes import RECIPES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_accelerator_of_other_tests():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_calls_take_turns():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = seconds_in_turns(calls, rounds=3, device=CPU, least_seconds=0.0)
    assert turns == ["a", "b"] + ["a", "b"] + ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_short_call_is_repeated_and_its_time_is_that_of_one():
    seconds = seconds_in_turns({"nap": lambda: time.sleep(0.002)}, rounds=1, device=CPU, least_seconds=0.05)
    assert 0.002 <= seconds["nap"][0] < 0.02


def test_peak_memory_is_what_a_call_adds():
    if peak_bytes(lambda: None, CPU) is None:
        pytest.skip("needs Linux with glibc")
    for megabytes in (128, 128, 32):  # the second finds the first one's memory free, and must count it all the same
        peak = peak_bytes(partial(torch.ones, megabytes, 2**20, dtype=torch.uint8), CPU)
        assert peak / 2**20 == pytest.approx(megabytes, abs=16)


def test_the_command_is_told_as_it_was_given():
    options = argparse.Namespace(name="train", rounds=3, windows=[8, 16], compile=True, quiet=False, results="x.json")
    assert command(options) == "python -m ride_bf.benchmark train --rounds 3 --windows 8 16 --compile"


def test_the_command_has_no_place_of_one_machine(tmp_path):
    options = argparse.Namespace(name="clipart", backbone=tmp_path, picture=tmp_path / "a.png", output_dir=tmp_path)
    assert command(options) == f"python -m ride_bf.benchmark clipart --backbone {tmp_path.name}"
    options.backbone = "facebook/dinov2-small"
    assert command(options) == "python -m ride_bf.benchmark clipart --backbone facebook/dinov2-small"


def test_the_tail_of_any_number_of_classes():
    assert long_tail(1) == [1280]
    for classes in (2, 100, 100_000):
        counts = long_tail(classes)
        assert (len(counts), counts[0], counts[-1]) == (classes, 1280, 5)
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", ["digits_lt_resnet32", "imagenet_lt_resnet10"])
def test_the_references_loss_is_ours(name):
    """Written apart from ours, on one stream and on two."""
    recipe, counts = RECIPES[name], long_tail(5)
    logits = 30 * torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    shared = recipe.network["batchformer"] == "shared_classifier"
    outputs = RideBfOutput(expert_logits=logits[0], batchformer_expert_logits=logits[1] if shared else None)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    ours = make_objective(recipe, counts)(outputs, {"labels": labels}, reweight=True)
    torch.testing.assert_close(ReferenceLoss(recipe, counts)(outputs, labels), ours)


@pytest.mark.parametrize("name", ["digits_lt_resnet32", "imagenet_lt_resnet10"])
def test_both_modes_compute_the_same(name):
    depths = [1] * len(RECIPES[name].network["depths"])
    recipe = RECIPES[name].with_overrides(depths=depths, batchformer_window=3)  # of 4 images
    counts = long_tail(10)
    batch = random_batch(4, 16, counts, CPU)
    numbers = compare_numbers(recipe, recipe.config(num_labels=10), counts, batch)
    for mode in (REFERENCE, OURS):
        assert numbers[f"{mode}, float64"]["loss_difference"] < 1e-6
        assert numbers[f"{mode}, float64"]["gradient_difference"] < 1e-6
        assert numbers[f"{mode}, float32"]["loss_difference"] < 1e-5
        assert numbers[f"{mode}, float32"]["gradient_difference"] > 0


def test_report_by_hand():
    results = {
        "recipe": "r",
        "batch_size": 10,
        "image_size": 8,
        "precision": "fp32",
        "machine": "m",
        "seconds_by_round": {
            REFERENCE: [4.0, 6.0, 4.0],
            OURS: [2.0, 2.0, 4.0],
            RESNET50: [1.0, 2.0, 2.0],
            PRODUCT: [1.0, 1.0, 1.0],
        },
        "multiply_adds": {REFERENCE: 2e12, OURS: 2e12, RESNET50: 1e12, PRODUCT: 4e12},
        "peak_bytes": {REFERENCE: 2_500_000_000, OURS: None, RESNET50: 1_000_000_000},
        "numbers": {OURS: {"loss": 1.5, "loss_difference": 1e-7, "gradient_difference": 2e-6}},
    }
    report = train_report(results)
    # quotients by round: 2, 3, 1; per multiply-add 1/1, 1/0.5, 0.5/0.5; of the product 2/8, 2/8, 1/8
    assert f"{OURS}: 2.00 (1.00 to 3.00) x the images/s of {REFERENCE}" in report
    assert f"100 (100 to 200) % of {RESNET50}'s speed per multiply-add" in report
    assert f"| {OURS} | 5.00 | – | 2.000 | 25 % |" in report
    assert f"| {REFERENCE} | 2.50 | 2.50 | 1.000 | 12 % |" in report
    assert f"{OURS}: loss 1.500000, 1.0e-07, gradient 2.0e-06" in report


def test_train_command(tmp_path, capsys):
    main(f"train --recipe digits_lt_resnet32 --batch_size 2 --rounds 1 --results {tmp_path}/out.json".split())
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["command"].endswith("--recipe digits_lt_resnet32 --batch_size 2 --rounds 1 --mixed_precision no")
    parts = profile(RECIPES["digits_lt_resnet32"].config(num_labels=10), 16, window=2)
    expected = 3 * 2 * (inference_cost(parts) + parts["BatchFormer"]["multiply_adds"])
    assert results["multiply_adds"][REFERENCE] == results["multiply_adds"][OURS] == expected
    assert set(results["seconds_by_round"]) == {REFERENCE, OURS, RESNET50, PRODUCT}
    assert f"x the images/s of {REFERENCE}" in capsys.readouterr().out


def test_scale_command(tmp_path, capsys):
    arguments = "--recipe digits_lt_resnet32 --batch_size 2 --rounds 1 --experts 1 2 --classes 1000 --windows 4 8"
    main(f"scale {arguments} --results {tmp_path}/out.json".split())
    results = json.loads((tmp_path / "out.json").read_text())
    assert arguments in results["command"]
    assert [(row["experts"], row["classes"]) for row in results["steps"]] == [(3, 10), (1, 10), (2, 10), (3, 1000)]
    costs = [row["multiply_adds_per_image"] for row in results["steps"]]
    parameters = [row["parameters"] for row in results["steps"]]
    assert costs[1] < costs[2] < costs[0] < costs[3]
    assert parameters[3] - parameters[0] == 3 * 48 * 990
    assert [(row["window"], row["images"]) for row in results["windows"]] == [(4, 8), (8, 8)]
    assert "| 3 | 1,000 | 0.9 |" in capsys.readouterr().out


def test_backbone_ratios_by_hand():
    seconds = {
        backbone.PLAIN: [1.0, 2.0],
        backbone.OURS: [2.0, 2.0],
        backbone.OWN_STEP: [3.0, 3.0],
        backbone.OUR_STEP: [4.0, 2.0],
        backbone.EXPERTS_STEP: [8.0, 8.0],
    }
    results = {
        "backbone": "vit",
        "batch_size": 10,
        "image_size": 8,
        "precision": "fp32",
        "machine": "m",
        "seconds_by_round": seconds,
        "multiply_adds": {backbone.OUR_STEP: 100, backbone.EXPERTS_STEP: 150},
    }
    found = backbone.ratios(results)
    assert found == {"forward": [0.5, 1.0], "step": [0.75, 1.5], "three experts": [0.75, 0.375]}
    report = backbone.backbone_report(results)
    assert f"| {backbone.OURS} | 5.00 |" in report
    assert "step: 1.12 (0.75 to 1.50) x the images/s of the backbone's own classifier" in report
    assert "three experts: 0.56 (0.38 to 0.75) x the speed that 1.50 x the multiply-adds allow" in report


def test_backbone_command(tmp_path, monkeypatch, capsys):
    assert set(backbone.SMALL) == set(BACKBONES)
    runs = []

    def once(calls, rounds, device):
        for name, call in calls.items():
            call()
            runs.append(name)
        return {name: [1.0] * rounds for name in calls}

    monkeypatch.setattr(backbone, "seconds_in_turns", once)
    monkeypatch.setattr(backbone, "IMAGE_SIZE", 32)
    main(f"train --backbone resnet --batch_size 2 --rounds 2 --results {tmp_path}/out.json".split())
    assert runs == [backbone.PLAIN, backbone.OURS, backbone.OWN_STEP, backbone.OUR_STEP, backbone.EXPERTS_STEP]
    results = json.loads((tmp_path / "out.json").read_text())
    repeated = "train --backbone resnet --batch_size 2 --rounds 2 --mixed_precision no"
    assert results["command"] == f"python -m ride_bf.benchmark {repeated}"
    assert results["multiply_adds"][backbone.EXPERTS_STEP] > results["multiply_adds"][backbone.OUR_STEP] > 0
    assert "forward: 1.00 (1.00 to 1.00)" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--recipe digits_lt_resnet32", "--compile"])
def test_options_that_a_backbone_does_not_read_are_refused(options):
    with pytest.raises(SystemExit):
        main(f"train --backbone vit {options}".split())
