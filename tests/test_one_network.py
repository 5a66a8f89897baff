"""Several processes hold one network, statistics of normalisation included, whenever it is evaluated or saved."""

import json

import pytest
import torch
from conftest import ROOT, tiny_model
from processes import TRAIN, run, torchrun
from safetensors.torch import load_file
from test_training import SMALL_ARGUMENTS, assert_same_weights, read_metrics

from ride_bf.training.running_statistics import RunningStatistics

EVALUATED = ("loss", "accuracy", "balanced_accuracy", "many_shot_accuracy", "few_shot_accuracy", "per_class_accuracy")


def launch(processes, *command):
    return run(*torchrun(processes, *command), ACCELERATE_USE_CPU="true")


def train(processes, output_dir, *options):
    launch(processes, TRAIN, *SMALL_ARGUMENTS, "--output_dir", output_dir, *options)
    return output_dir


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_is_logged_is_what_the_saved_model_is_worth(tmp_path, processes):
    """To the last bit, by the command, of the average of the weights too."""
    # Of 80 images the last batch has two in one process; of several processes each has as many as before.
    options = ("--epochs", 1, "--max_steps", 5, "--ema_decay", 0.5, "--eval_batch_size", 39)
    out = train(processes, tmp_path / "out", *options)
    logged = read_metrics(out)[-1]
    for evaluating in {1, processes}:
        measured = tmp_path / f"by_{evaluating}"
        command = ("--model", out / "last", "--dataset", "digits_lt", "--split", "validation", "--batch_size", 39)
        launch(evaluating, ROOT / "ride_bf/evaluate.py", *command, "--output_dir", measured)
        metrics = json.loads((measured / "results.json").read_text())["metrics"]
        for name in EVALUATED:
            assert metrics[name] == logged[f"validation_{name}"], name


STATISTICS = """
import os, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from accelerate import Accelerator
from conftest import tiny_model
from ride_bf.training.running_statistics import RunningStatistics

accelerator = Accelerator(cpu=True)
model = tiny_model()
frozen = model.ride_bf.trunk.stem[0].bn
rank = accelerator.process_index
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d) and module is not frozen:
        module.running_mean.fill_(rank + 1.0)
        module.running_var.fill_(10.0 ** rank)
frozen.running_mean.fill_(0.1)
other = model.ride_bf.experts[0].stages[0][0].layers[0].bn
statistics = RunningStatistics(accelerator, model)
with statistics.averaged():
    assert torch.equal(frozen.running_mean, torch.full_like(frozen.running_mean, 0.1)), "exactly"
    assert torch.allclose(other.running_mean, torch.full_like(other.running_mean, 2.0))
    assert torch.allclose(other.running_var, torch.full_like(other.running_var, 37.0))
assert torch.equal(other.running_mean, torch.full_like(other.running_mean, rank + 1.0)), "each has its own again"
gathered = statistics.gather()
other.running_mean.zero_()
statistics.restore(gathered)
assert torch.equal(other.running_mean, torch.full_like(other.running_mean, rank + 1.0))
statistics.restore(gathered[:2])  # of another number of processes: what was loaded stays
print(f"ok{{rank}}\\n", end="", flush=True)  # in one piece, beside those of the others
accelerator.end_training()
"""


def test_statistics_are_averaged_and_given_back(tmp_path):
    script = tmp_path / "averaged.py"
    script.write_text(STATISTICS.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    assert sorted(launch(3, script).split()) == ["ok0", "ok1", "ok2"]


def test_one_process_has_nothing_to_average():
    from accelerate import Accelerator

    statistics = RunningStatistics(Accelerator(cpu=True), tiny_model())
    assert statistics.gather() is None
    before = [buffer.clone() for buffer in statistics.buffers]
    with statistics.averaged():
        assert all(torch.equal(*pair) for pair in zip(before, statistics.buffers, strict=True))


def test_evaluations_and_checkpoints_change_nothing_of_two_processes_training(tmp_path):
    """And a run that goes on has every process's own statistics, the average's too."""
    options = ("--epochs", 2, "--batch_size", 32, "--ema_decay", 0.9, "--eval_batch_size", 32)
    plain = train(2, tmp_path / "plain", *options)
    often = train(2, tmp_path / "often", *options, "--eval_steps", 3, "--save_steps", 2)
    assert_same_weights(plain / "last", often / "last")
    half = train(2, tmp_path / "half", *options, "--max_steps", 15)
    resumed = train(2, half, *options, "--resume")
    assert_same_weights(plain / "last", resumed / "last")
    assert read_metrics(plain)[-1]["validation_loss"] == read_metrics(resumed)[-1]["validation_loss"]
    own = torch.load(resumed / "last/training_state/custom_checkpoint_1.pkl", weights_only=True)["running_statistics"]
    assert len(own) == 2
    assert not torch.equal(own[0], own[1])
    saved = load_file(plain / "last/training_state/model.safetensors")
    name = "ride_bf.trunk.stem.0.bn.running_mean"
    size = saved[name].numel()
    torch.testing.assert_close(saved[name], own[:, :size].mean(dim=0).cpu(), rtol=1e-6, atol=1e-7)
