"""The BatchFormer's window, and losses, on one process and on two: DistributedDataParallel over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate.data_loader import prepare_data_loader
from conftest import tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ride_bf.methods.objectives import make_objective
from ride_bf.methods.windows import BatchFormerWindows, set_window, set_windows
from ride_bf.recipes import RECIPES

PROCESSES, IMAGES, COUNTS = 2, 32, [120, 40, 9, 3, 2]
LOSSES = (
    "ride",
    "expert_logit_adjusted",
    "collaborative",
    "ldam",
    "focal",
    "cross_entropy",
    "reweighted_cross_entropy",
    "logit_adjusted",
)


def batch():
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(IMAGES, 3, 8, 8, generator=generator),
        # in order, so that the processes' weights differ
        "labels": torch.randint(0, 5, (IMAGES,), generator=generator).sort().values,
    }


def step(window, mode="insert", loss="ride", reweight=True, autocast=False, teacher=False, train_only="all"):
    """The BatchFormer's output for this process's images, and every gradient, as DistributedDataParallel leaves it."""
    router = {"router": True, "router_top_k": 3} if train_only == "router" else {}
    model = tiny_model(batchformer=mode, **router).train()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        module.requires_grad_(train_only == "all" or name.startswith(train_only))
    set_window(model, window)
    recipe = RECIPES["digits_lt_resnet32"].with_overrides(loss=loss, batchformer=mode, train_only=train_only, **router)
    objective = make_objective(recipe, COUNTS, tiny_model().eval() if teacher else None)
    own = batch()
    wrapped = model
    if dist.is_initialized():
        own = {name: values.chunk(PROCESSES)[dist.get_rank()] for name, values in own.items()}
        wrapped = DistributedDataParallel(model)
    outputs = []
    if mode != "none":
        model.batchformer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        objective(wrapped(own["pixel_values"]), own, reweight=reweight).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return torch.cat([output.detach() for output in outputs]) if outputs else torch.empty(0), gradients


# What two processes are asked for, and what one process is to match it with
CASES = {
    **{
        f"{mode}, window {two}": ({"window": two, "mode": mode}, {"window": one, "mode": mode})
        for mode in ("insert", "shared_classifier")
        for two, one in (
            ("global", "global"),  # 16 images a process, completed from the other
            (32, "local"),
            ("local", 16),  # one process's batch is cut
            (16, 16),
            (8, 8),
            (24, 24),  # the first window reaches into the second process
            (7, 7),  # four windows of 7 and one of 4, the third shared
            (100, "local"),  # more than there are
        )
    },
    **{
        f"{loss}, reweight {reweight}": ({"window": "global", "loss": loss, "reweight": reweight},) * 2
        for loss in LOSSES
        for reweight in (False, True)
    },
    "distillation": ({"window": "global", "mode": "shared_classifier", "teacher": True},) * 2,
    "without BatchFormer": ({"window": "local", "mode": "none"},) * 2,
    "router": ({"window": "local", "mode": "none", "train_only": "router"},) * 2,
    "bfloat16": ({"window": "global", "autocast": True},) * 2,
}
DIFFERENT = ({"window": "local"}, {"window": "global"})


def in_one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    results = {name: step(**two) for name, (two, _) in CASES.items()}
    results["different"] = step(**DIFFERENT[0])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(in_one_of_two_processes, (str(folder),), PROCESSES)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    for name in ranks[0]:  # the gradients are averaged: every process has the same
        for key, gradient in ranks[0][name][1].items():
            assert torch.equal(gradient, ranks[1][name][1][key]), (name, key)
    return {name: (torch.cat([rank[name][0] for rank in ranks]), ranks[0][name][1]) for name in ranks[0]}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(on_two_processes, name):
    output, gradients = on_two_processes[name]
    expected_output, expected_gradients = step(**CASES[name][1])
    rtol = 0.05 if "bfloat16" in name else 1e-4
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    torch.testing.assert_close(output, expected_output, rtol=rtol, atol=rtol)
    assert gradients.keys() == expected_gradients.keys()
    assert largest > 0
    for key, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[key], expected, rtol=rtol, atol=largest * rtol / 100, msg=key)


def test_another_window_computes_something_else(on_two_processes):
    """What makes the comparisons above tell something."""
    output, gradients = on_two_processes["different"]
    expected_output, expected_gradients = step(**DIFFERENT[1])
    assert (output - expected_output).abs().max() > 0.01
    name = "ride_bf.trunk.stem.0.convolution.weight"
    assert (gradients[name] - expected_gradients[name]).norm() > 0.01 * expected_gradients[name].norm()


def test_in_one_process_a_window_is_as_a_batch_of_its_own():
    """Windows of 4 of 10 images: 4, 4 and 2."""
    model = tiny_model(batchformer="insert", batchformer_num_layers=2).train()
    features = torch.randn(10, 3, 8)
    expected = torch.cat([model.batchformer(window) for window in features.split(4)])
    set_window(model, 4)
    torch.testing.assert_close(model.batchformer(features), expected)
    assert model.batchformer(features[:3]).shape == (3, 3, 8)


def test_a_window_survives_a_copy_and_leaves_no_trace_in_what_is_saved():
    model = tiny_model(batchformer="insert").train()
    names = list(model.state_dict())
    set_window(model, 4)
    assert list(model.state_dict()) == names
    features = torch.randn(10, 3, 8)
    assert torch.equal(copy.deepcopy(model).batchformer(features), model.batchformer(features))


def test_a_network_without_batchformer_needs_no_window():
    set_window(tiny_model(batchformer="none"), "global")
    set_windows(tiny_model(batchformer="none"), batchformer_recipe(batchformer_start_epoch=1), epoch=0)


def batchformer_recipe(**changes):
    return RECIPES["digits_lt_resnet32"].with_overrides(batchformer="insert", **changes)


@pytest.mark.parametrize("window", ["local", 4])
def test_a_late_batchformer_passes_the_features_on_until_its_epoch(window):
    model = tiny_model(batchformer="insert", batchformer_dropout=0.0).train()
    recipe = batchformer_recipe(batchformer_start_epoch=2, batchformer_window=window)
    features = torch.randn(10, 3, 8, requires_grad=True)
    set_window(model, window)
    expected = model.batchformer(features)
    for epoch in (0, 1):
        set_windows(model, recipe, epoch)
        output = model.batchformer(features)
        assert torch.equal(output, features)
        (gradient,) = torch.autograd.grad(output.square().sum(), features, retain_graph=True)
        assert torch.equal(gradient, 2 * features)
        output.sum().backward()
        # DistributedDataParallel waits for a gradient of each parameter
        assert all(parameter.grad.abs().max() == 0 for parameter in model.batchformer.parameters())
    set_windows(model, recipe, 2)
    assert torch.equal(model.batchformer(features), expected)


def test_the_batchformer_in_float32_under_mixed_precision():
    model = tiny_model(batchformer="insert", batchformer_dropout=0.0).train()
    features = torch.randn(10, 3, 8)
    expected = model.batchformer(features)
    outputs = {}
    for float32 in (False, True):
        set_windows(model, batchformer_recipe(batchformer_window=16, batchformer_float32=float32), epoch=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs[float32] = model.batchformer(features.bfloat16()).float()
    rounded = model.batchformer(features.bfloat16().float())
    assert torch.equal(outputs[True], rounded)
    assert not torch.equal(outputs[False], rounded)
    torch.testing.assert_close(outputs[False], expected, rtol=0.1, atol=0.1)  # bfloat16 has three digits


def test_an_impossible_window_is_refused():
    with pytest.raises(ValueError, match="must hold 1 image or more, not 0"):
        BatchFormerWindows(0)


def test_accelerates_loaders_give_every_process_equally_many_images():
    """What windows that reach across processes rely on, at the end of an epoch too."""
    loaders = [
        prepare_data_loader(
            DataLoader(range(37), batch_size=8), num_processes=2, process_index=index, put_on_device=False
        )
        for index in range(2)
    ]
    assert [len(images) for images in loaders[0]] == [len(images) for images in loaders[1]]
