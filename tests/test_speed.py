"""What is fast must be the same: layout, optimizer, and a step that leaves nothing behind."""

import copy
import gc
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from conftest import TINY_NETWORKS, tiny_model
from processes import SERVER
from safetensors.torch import load_file
from torch import nn

from ride_bf.methods.objectives import make_objective
from ride_bf.recipes import RECIPES
from ride_bf.runs.models import to_fast_layout
from ride_bf.training.optimizer import make_optimizer

COUNTS = [50, 20, 10, 5, 2]
RECIPE = RECIPES["digits_lt_resnet32"]


def training_step(model, objective, optimizer, images, labels):
    loss = objective(model(images), {"labels": labels}, reweight=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_every_feature_map_and_gradient_has_the_channels_last(network, images):
    model = to_fast_layout(tiny_model(network, batchformer="shared_classifier").train())
    maps = 0

    def is_channels_last(tensor):
        assert tensor.is_contiguous(memory_format=torch.channels_last)

    def check(module, inputs, output):
        nonlocal maps
        maps += 1
        is_channels_last(output)
        output.register_hook(is_channels_last)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(check)
    outputs = model(images)
    outputs.logits.sum().backward()
    assert maps >= 10


@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_the_layout_changes_neither_numbers_nor_what_is_saved(network, images, labels, tmp_path):
    plain = tiny_model(network, batchformer="shared_classifier").train()
    fast = to_fast_layout(copy.deepcopy(plain))
    objective = make_objective(RECIPE, COUNTS)
    losses = [objective(model(images), {"labels": labels}, reweight=True) for model in (plain, fast)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
    for name, model in (("plain", plain), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fast")]
    weights = [name for name in saved[0] if "running" not in name]
    assert weights
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in weights)


def test_the_optimizer_is_sgd_with_nesterovs_momentum():
    model = tiny_model().train()
    model.classifiers[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, RECIPE)
    rate, momentum, decay = RECIPE.learning_rate, RECIPE.momentum, RECIPE.weight_decay
    parameter = model.classifiers[1].weight
    expected, velocity = parameter.detach().clone(), torch.zeros_like(parameter)
    frozen = model.classifiers[0].weight.clone()
    for step in range(3):
        for value in model.parameters():
            value.grad = torch.full_like(value, 0.1 + step)
        optimizer.step()
        gradient = 0.1 + step + decay * expected
        velocity = momentum * velocity + gradient
        expected = expected - rate * (gradient + momentum * velocity)
    torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(model.classifiers[0].weight, frozen)


def memory_of_steps(images, labels):
    """Number of tensors and resident bytes after 50 and after 200 steps, and the sum of the losses."""
    model = to_fast_layout(tiny_model(batchformer="shared_classifier").train())
    objective, optimizer = make_objective(RECIPE, COUNTS), make_optimizer(model, RECIPE)
    process, tensors, resident = psutil.Process(), {}, {}
    total_loss = torch.zeros(())
    for step in range(1, 201):
        total_loss += training_step(model, objective, optimizer, images, labels)
        if step in (50, 200):
            gc.collect()
            tensors[step] = sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())
            resident[step] = process.memory_info().rss
    return tensors, resident, total_loss.item()


def test_memory_does_not_grow_with_the_steps(images, labels):
    """A step of this network keeps half a megabyte for its backward pass: ten steps' would show.

    It has a process of its own: what other tests have left makes the memory of this one come and go.
    """
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        tensors, resident, total_loss = pool.submit(memory_of_steps, images, labels).result()
    assert np.isfinite(total_loss)
    assert tensors[200] == tensors[50]
    assert resident[200] - resident[50] < 5 * 2**20
