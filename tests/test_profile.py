"""Costs against the published ones and by hand."""

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.profile import main
from ride_bf.recipes import RECIPES


@pytest.mark.parametrize(
    ("name", "num_labels", "giga", "parameters"),
    [
        ("imagenet_lt_resnet10", 1000, 1.17, 10_290_368),
        ("imagenet_lt_resnet50", 1000, 5.77, 57_848_384),
        ("imagenet_lt_resnext50", 1000, 6.05, 57_060_160),
        ("cifar100_lt_resnet32", 100, 0.100, 798_160),
    ],
)
def test_published_networks(name, num_labels, giga, parameters):
    recipe = RECIPES[name]
    parts = profile(recipe.config(num_labels=num_labels), recipe.image_size, window=recipe.batch_size)
    assert inference_cost(parts) / 1e9 == pytest.approx(giga, abs=0.005)
    assert sum(part["parameters"] for part in parts.values()) == parameters


def test_by_hand():
    config = tiny_config(num_experts=2, batchformer="insert", router=True, router_top_k=3, router_hidden_size=4)
    parts = profile(config, image_size=8, window=10)
    # stem 3 -> 4 and one block of 4 channels at 8x8; two blocks of 8 channels at 4x4, the first from 4
    trunk = 64 * 9 * (3 * 4 + 2 * 4 * 4)
    expert = 16 * 9 * (4 * 8 + 3 * 8 * 8)
    assert parts["trunk"] == {"parameters": 9 * 44 + 2 * 12, "multiply_adds": trunk}
    assert parts["expert 1"] == parts["expert 2"] == {"parameters": 9 * 224 + 2 * 32, "multiply_adds": expert}
    assert parts["classifier 1"] == {"parameters": 40, "multiply_adds": 40}
    assert parts["router"] == {"parameters": 8 * 4 + 4 + 7 + 1, "multiply_adds": 8 * 4 + 7}
    # in-projection, out-projection, two linears, and scores and mixture over a window of ten
    assert parts["BatchFormer"]["multiply_adds"] == 2 * (8 * 24 + 8 * 8 + 2 * 8 * 8 + 2 * 10 * 8)
    assert inference_cost(parts, [1.0, 0.0]) == trunk + expert + 40 + 39
    assert inference_cost(parts, [0.25, 0.75]) == trunk + 1.75 * (expert + 40) + 39


def test_agrees_with_a_prediction():
    config = tiny_config("resnext", num_experts=3)
    model = RideBfForImageClassification(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert inference_cost(profile(config, 32, window=4)) == counter.get_total_flops() // 2


def test_impossible_shares():
    parts = profile(tiny_config(num_experts=2), 8, window=4)
    for shares in ([1.0], [0.5, 0.6]):
        with pytest.raises(ValueError, match="2 numbers, one for each expert, that sum to 1"):
            inference_cost(parts, shares)


def test_command(capsys):
    main(["--recipe", "cifar100_lt_resnet32", "--num_experts", "6"])
    output = capsys.readouterr().out
    assert "100 classes, 32 x 32 pixels" in output
    assert "expert 6" in output
    assert "The BatchFormer is used in training only." in output


def test_results_of_a_router(tmp_path, capsys):
    path = tmp_path / "test_results.json"
    path.write_text('{"test": {"experts_used": [0.5, 0.25, 0.25]}}')
    main(["--recipe", "imagenet_lt_resnet50_router", "--results", str(path)])
    assert "if 50.0 %, 25.0 %, 25.0 % of the images use 1, 2, ... experts: " in capsys.readouterr().out
    for arguments, message in (
        (["--recipe", "imagenet_lt_resnet50", "--results", str(path)], "imagenet_lt_resnet50 has no router"),
        (["--results", str(tmp_path / "nowhere.json")], "nowhere.json"),
    ):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert message in capsys.readouterr().err + str(info.value)
