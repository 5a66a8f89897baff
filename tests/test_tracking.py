"""Trackers get the recipe, the loss as often as asked for, and the same run after a resumption."""

import json
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import read_metrics, train

from ride_bf.recipes import RECIPES
from ride_bf.training.tracking import configuration


class Service:
    """Stands in for the modules `wandb` and `trackio`: notes what it is told."""

    def __init__(self):
        self.starts, self.configurations, self.logged, self.finished = [], [], [], 0
        self.config = SimpleNamespace(update=lambda values, **_: self.configurations.append(values))

    def init(self, project, **options):
        self.starts.append({"project": project, **options})
        return self

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    service = Service()
    service.name = request.param
    monkeypatch.setitem(sys.modules, request.param, service)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(request.param)])
    return service


def test_a_service_gets_the_recipe_the_loss_and_one_run(service, tmp_path):
    options = ("--report_to", service.name, "--logging_steps", 2)
    train(tmp_path / "out", "--epochs", 3, "--max_steps", 9, *options)
    train(tmp_path / "out", "--epochs", 3, *options, "--resume")
    first, second = service.starts
    assert first == second, "the same run, by the same name"
    assert (first["project"], first["resume"]) == ("ride_bf", "allow")
    (told,) = service.configurations
    assert (told["batch_size"], told["network/depths"], told["run/seed"]) == (64, "1 1 1", 0)
    losses = [(step, values["loss"]) for step, values in service.logged if "loss" in values]
    assert [step for step, _ in losses] == [2, 4, 6, 8, 9, 10, 12, 14, 16, 18]
    assert all(loss > 0 for _, loss in losses)
    assert service.finished == 2
    known = json.loads((tmp_path / "out/run.json").read_text())["id"]
    assert known in first.values() or known[:8] in first["name"]


def test_two_runs_are_two_runs_to_a_service(service, tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name / "out", "--epochs", 1, "--report_to", service.name)
    assert service.starts[0] != service.starts[1]


def test_tensorboard_gets_the_recipe_and_steps(tmp_path):
    options = ("--epochs", 3, "--logging_steps", 2)
    train(tmp_path / "out", *options, "--max_steps", 9)
    train(tmp_path / "out", *options, "--resume")
    scalars = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    logged = {event.step: event.value for event in scalars.Scalars("loss")}
    assert set(logged) == {2, 4, 6, 8, 9, 10, 12, 14, 16, 18}
    by_epoch = {event.step: event.value for event in scalars.Scalars("train_loss")}
    # after the interruption the second epoch begins anew in the middle, and its line is of all of it
    assert by_epoch[18] == pytest.approx(read_metrics(tmp_path / "out")[-1]["train_loss"])
    assert len(list((tmp_path / "out/tensorboard").rglob("hparams.yml"))) == 1


def test_the_configuration_is_plain():
    recipe = RECIPES["imagenet_lt_resnet50"]
    told = configuration(recipe, {"seed": 3, "data_dir": None})
    assert all(isinstance(value, int | float | str) for value in told.values())
    assert told["lr_steps"] == "60 80"
    assert told["network/hidden_sizes"] == "64 128 192 384"
    assert (told["run/seed"], told["run/data_dir"]) == (3, "None")
