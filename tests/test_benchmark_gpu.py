"""The benchmark for GPUs: what it measures and how it counts. On a CPU it measures all but CUDA's own ways."""

import json

import pytest
import torch
from conftest import tiny_model
from test_benchmark_train import _no_accelerator_of_other_tests  # noqa: F401  a fixture

from ride_bf.benchmark import backbone, gpu, side_by_side
from ride_bf.benchmark.__main__ import main
from ride_bf.benchmark.train import OURS, PRODUCT, REFERENCE, RESNET50


def test_gpu_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CURVES", {"ResNet-32": "--recipe digits_lt_resnet32 --batch_size 16"})
    monkeypatch.setattr(backbone, "IMAGE_SIZE", 32)
    networks = "--recipes digits_lt_resnet32 --side_by_side digits_lt_resnet32 --backbone resnet"
    options = f"gpu {networks} --precisions bf16 --batch_size 2 --rounds 1 --curve_steps 12"
    main(f"{options} --results {tmp_path}/gpu.json --output_dir {tmp_path}/runs".split())
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["command"].startswith("python -m ride_bf.benchmark gpu --parts steps backbones side_by_side curves")
    assert [set(each["seconds_by_round"]) for each in results["steps"]] == [{REFERENCE, OURS, RESNET50, PRODUCT}]
    assert [each["precision"] for each in results["backbones"]] == ["bf16"]
    assert [set(each["seconds_by_round"]) for each in results["side_by_side"]] == [{OURS, side_by_side.GROUPED}]
    assert results["side_by_side"][0]["failed"] == {}
    curves = results["curves"]["ResNet-32"]
    assert {name: len(losses) for name, losses in curves.items()} == {"no": 12, "bf16": 12}
    assert curves["bf16"][0] == pytest.approx(curves["no"][0], rel=0.02)  # the same images and weights
    assert curves["bf16"] != curves["no"]
    report = capsys.readouterr().out
    assert f"x the images/s of {REFERENCE}" in report
    assert "ResNet-32, bf16: the loss is" in report


def test_the_distance_between_curves_by_hand():
    exact = [2.0] * gpu.SMOOTHED + [2.0 + gpu.SMOOTHED]  # means 2 and 3
    other = [2.2] * gpu.SMOOTHED + [2.2 + 4 * gpu.SMOOTHED / 5]  # means 2.2 and 3
    distances = gpu.curve_distances({"no": exact, "bf16": other, "fp16": exact})
    assert list(distances) == ["bf16", "fp16"]
    assert distances["bf16"] == pytest.approx({"mean": 0.05, "most": 0.1, "last": 3.0, "last_in_float32": 3.0})
    assert distances["fp16"]["most"] == 0


def test_fp16_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"fp16 needs a GPU.*leave it out of --precisions"):
        main(f"gpu --results {tmp_path}/gpu.json".split())
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--curve_steps 9", "--curve_steps must be 10 or more, not 9"),
        ("--rounds 0", "argument --rounds: it must be a whole number, 1 or more, not '0'"),
        ("--batch_size -1", "argument --batch_size: it must be a whole number, 1 or more, not '-1'"),
    ],
)
def test_numbers_that_measure_nothing_are_refused_before_anything_runs(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(f"gpu --precisions bf16 {options} --results {tmp_path}/gpu.json".split())
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("network", ["cifar", "imagenet_basic", "bottleneck", "resnext"])
def test_grouped_experts_do_the_work_of_all(network, images, labels):
    """With the weights of the experts, they give the experts' features."""
    model, grouped = tiny_model(network).eval(), side_by_side.group_experts(tiny_model(network)).eval()
    experts, whole = model.ride_bf.experts, grouped.ride_bf.experts[0].whole
    states = [expert.state_dict() for expert in experts]
    joined = {
        name: torch.cat([state[name] for state in states]) if value.dim() else value
        for name, value in states[0].items()
    }
    whole.expert.load_state_dict(joined)
    with torch.no_grad():
        expected, found = model(images).expert_features, grouped(images).expert_features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_run_side_by_side_is_told():
    results = {
        "recipe": "r",
        "batch_size": 10,
        "image_size": 8,
        "precision": "bf16",
        "seconds_by_round": {OURS: [2.0, 3.0, 2.0], side_by_side.GROUPED: [1.0, 3.0, 4.0]},
        "failed": {side_by_side.GRAPHS: "RuntimeError: no"},
    }
    report = side_by_side.side_by_side_report(results)
    assert f"| {side_by_side.GROUPED} | 3 | 1.00 x (0.50 to 2.00) |" in report
    assert f"{side_by_side.GRAPHS} did not run: RuntimeError: no" in report
