"""The optimizer's groups and the schedule of the learning rate."""

import math

import pytest
import torch
from conftest import tiny_model
from torch.optim import SGD, AdamW

from ride_bf.recipes import RECIPES
from ride_bf.training.optimizer import Schedule, make_optimizer

RECIPE = RECIPES["imagenet_lt_resnet10"]


def rates(model, recipe):
    """Name of a parameter -> its learning rate and weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }


def test_the_papers_sgd_is_one_group():
    optimizer = make_optimizer(tiny_model(batchformer="insert"), RECIPE)
    assert isinstance(optimizer, SGD)
    assert len(optimizer.param_groups) == 1


def test_rates_of_heads_and_batchformer():
    model = tiny_model(batchformer="insert")
    recipe = RECIPE.with_overrides(head_learning_rate_factor=10.0, batchformer_learning_rate_factor=0.1)
    found = rates(model, recipe)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in found.items():
        factor = 10 if name.startswith("classifiers.") else 0.1 if name.startswith("batchformer.") else 1
        assert rate == pytest.approx(factor * recipe.learning_rate), name
        assert decay == recipe.weight_decay


def test_adamw_spares_biases_and_norms():
    model = tiny_model(batchformer="insert")
    recipe = RECIPE.with_overrides(optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)
    assert isinstance(make_optimizer(model, recipe), AdamW)
    for name, (_, decay) in rates(model, recipe).items():
        assert decay == (0.05 if model.get_parameter(name).ndim > 1 else 0), name


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"nesterov": True}, {"batchformer_learning_rate_factor": 0.1}])
def test_an_option_that_cannot_act_is_refused(options, capsys):
    from ride_bf.training.arguments import parse_arguments

    words = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit):
        parse_arguments(["--optimizer", "adamw", "--batchformer", "none", *words])
    assert f"--{next(iter(options))}" in capsys.readouterr().err


def cosine_by_step(warmup_epochs):
    changes = {"lr_steps": (), "epochs": 3, "reweight_epoch": None}
    return RECIPE.with_overrides(schedule="cosine_by_step", warmup_epochs=warmup_epochs, **changes)


def schedule_of(recipe, steps_per_epoch):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=recipe.learning_rate)
    return optimizer, Schedule(optimizer, recipe, steps_per_epoch)


def test_the_cosine_by_step_is_a_cosine_over_all_steps():
    recipe = cosine_by_step(warmup_epochs=0)
    optimizer, schedule = schedule_of(recipe, steps_per_epoch=4)
    seen = []
    for step in range(12):
        seen.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
        optimizer.step()
        schedule.after_update()
        assert schedule.rate == pytest.approx(seen[-1] * recipe.learning_rate), "the rate of the update just made"
        if step % 4 == 3:
            schedule.after_epoch()
    assert seen == pytest.approx([(1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)])


def test_warm_up_by_step_rises_at_each_step():
    recipe = cosine_by_step(warmup_epochs=1)
    optimizer, schedule = schedule_of(recipe, steps_per_epoch=4)
    seen = []
    for _ in range(5):
        seen.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
        optimizer.step()
        schedule.after_update()
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_schedules_by_epoch_ignore_steps():
    recipe = RECIPE.with_overrides(warmup_epochs=5)
    optimizer, schedule = schedule_of(recipe, steps_per_epoch=4)
    for _ in range(4):
        optimizer.step()
        schedule.after_update()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.learning_rate / 5)
    schedule.after_epoch()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.learning_rate * 2 / 5)
