"""Many processes are one run: the same results, one stop, one message; and a resumed run may have another number."""

import itertools
import json
import random
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from processes import SERVER, TRAIN, Command, torchrun
from safetensors.torch import load_file
from test_surviving import without_speed
from test_training import SMALL_ARGUMENTS, assert_same_weights, read_metrics, train
from torch.distributed import HashStore

from ride_bf.command_line import processes as run_processes
from ride_bf.training.interruption import Interruption

# The training command, in which the process of one rank does something as it ends its third step.
IN_STEP_THREE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_accelerate
from data import BrokenImageError

after_step = train_accelerate.Trainer.after_step

def does_something(trainer):
    if os.environ["RANK"] == "{rank}" and trainer.progress.steps_done == 3:
        {what}
    after_step(trainer)

train_accelerate.Trainer.after_step = does_something
train_accelerate.main()
"""


def launch(processes, script, output_dir, *options):
    command = (script, *SMALL_ARGUMENTS, "--output_dir", output_dir, *options)
    return Command(*torchrun(processes, *command), ACCELERATE_USE_CPU="true")


def in_step_three(tmp_path, what, *options):
    """What four processes print, and the seconds from the third step to the end of the last of them."""
    script = tmp_path / "script.py"
    script.write_text(IN_STEP_THREE.format(root=str(ROOT), rank=1, what=what))
    process = launch(4, script, tmp_path / "out", "--batch_size", 32, *options)
    process.wait_until((tmp_path / "out/last/checkpoint.json").exists)
    started = time.monotonic()
    code, printed = process.finish(timeout=60)
    assert code != 0
    return printed, time.monotonic() - started


def of_ours(printed):
    """What our processes print: not the launcher's report, which comes after."""
    return printed.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    """Long before a step that logs, evaluates or saves."""
    what = "os.kill(os.getpid(), signal.SIGTERM)"
    script = tmp_path / "script.py"
    script.write_text(IN_STEP_THREE.format(root=str(ROOT), rank=1, what=what))
    code, printed = launch(4, script, tmp_path / "out", "--batch_size", 32, "--logging_steps", 100).finish()
    assert code != 0
    assert printed.count("SIGTERM: stopped after step 5; the checkpoint is") == 1, printed[-3000:]
    assert json.loads((tmp_path / "out/last/checkpoint.json").read_text())["step"] == 5


@pytest.mark.parametrize("seed", range(50))
def test_all_stop_after_the_same_step_however_they_interleave(seed, monkeypatch):
    """Of four processes, two get a signal. A process may be two steps ahead of the slowest, as on a GPU."""
    store = HashStore()
    monkeypatch.setattr(run_processes, "_store", lambda: store)
    rng = random.Random(seed)
    accelerator = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    interruptions = [Interruption() for _ in range(4)]
    signalled = {rng.randrange(4): (rng.randrange(1, 12), signal.SIGTERM) for _ in range(2)}
    steps, stopped = [0] * 4, {}
    while len(stopped) < 4:
        rank = rng.choice([rank for rank in range(4) if rank not in stopped and steps[rank] < min(steps) + 2])
        steps[rank] += 1
        if rank in signalled and steps[rank] >= signalled[rank][0]:
            interruptions[rank].received = signalled[rank][1]
        if interruptions[rank].agreed(accelerator, steps[rank]):
            stopped[rank] = steps[rank]
    assert len(set(stopped.values())) == 1, stopped
    assert min(stopped.values()) <= min(step for step, _ in signalled.values()) + 4


def test_the_program_is_not_two_steps_ahead_of_the_device(monkeypatch):
    done, events = [], itertools.count(1)

    class Event:
        def __init__(self, device):
            self.number = next(events)

        def record(self):
            done.append(f"record {self.number}")

        def synchronize(self):
            done.append(f"wait for {self.number}")

    store = SimpleNamespace(check=lambda keys: done.append("look"))
    monkeypatch.setattr(run_processes, "_store", lambda: store)
    monkeypatch.setattr(torch, "Event", Event)
    interruption = Interruption()
    for step in (1, 2, 3):
        interruption.agreed(SimpleNamespace(num_processes=2, device=torch.device("cuda")), step)
    assert done == ["record 1", "look", "record 2", "wait for 1", "look", "record 3", "wait for 2", "look"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: another process of this command has ended"),
        ("raise BrokenImageError('a.png is broken')", "error: a.png is broken"),
        ("raise RuntimeError('a mistake of ours')", "RuntimeError: a mistake of ours"),
    ],
    ids=["killed", "broken image", "mistake"],
)
def test_a_process_that_ends_is_reported_once(tmp_path, what, said):
    printed, seconds = in_step_three(tmp_path, what, "--save_steps", 1)
    assert seconds < 15
    assert of_ours(printed).count(said) == 1, printed[-5000:]
    assert ("another process of this command" in printed) == ("SIGKILL" in what), "the others are silent"
    root_cause = printed.partition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert ("SIGKILL" in root_cause) == ("SIGKILL" in what)


def launch_on_two_machines(script, output_dir, *options):
    """The launchers of two machines with two processes each, by the committed configuration, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ("--config_file", ROOT / "configs/several_machines.yaml", "--mixed_precision", "no")
    network = ("--num_processes", 4, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    command = (script, *SMALL_ARGUMENTS, "--output_dir", output_dir, "--batch_size", 32, *options)
    forks = {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # of torchrun, which accelerate launch calls
    together = SERVER.Barrier(2)
    return [
        Command(
            *("accelerate.commands.launch", *config, *network, "--machine_rank", machine, *command),
            together=together,
            **(forks | {"ACCELERATE_USE_CPU": "true"}),
        )
        for machine in (0, 1)
    ]


def test_two_machines_equal_one(tmp_path):
    """The same bits as four processes of one machine."""
    code, printed = launch(4, TRAIN, tmp_path / "one", "--batch_size", 32, "--epochs", 2).finish()
    assert code == 0, printed[-3000:]
    ends = [machine.finish() for machine in launch_on_two_machines(TRAIN, tmp_path / "two", "--epochs", 2)]
    assert [code for code, _ in ends] == [0, 0], "".join(printed for _, printed in ends)[-5000:]
    for checkpoint in ("last", "best"):
        assert_same_weights(tmp_path / "one" / checkpoint, tmp_path / "two" / checkpoint)
    assert without_speed(tmp_path / "one") == without_speed(tmp_path / "two")


@pytest.mark.parametrize("rank", [1, 3], ids=["on the first machine", "on the second machine"])
def test_a_killed_process_ends_those_of_the_other_machine(tmp_path, rank):
    script = tmp_path / "script.py"
    script.write_text(IN_STEP_THREE.format(root=str(ROOT), rank=rank, what="os.kill(os.getpid(), signal.SIGKILL)"))
    machines = launch_on_two_machines(script, tmp_path / "out", "--save_steps", 1)
    machines[0].wait_until((tmp_path / "out/last/checkpoint.json").exists)
    started = time.monotonic()
    ends = [machine.finish(timeout=60) for machine in machines]
    assert time.monotonic() - started < 30
    assert all(code != 0 for code, _ in ends)
    said = [of_ours(printed).count("error: another process of this command has ended") for _, printed in ends]
    # If the launcher that keeps the store ends first, the other machine cannot know that the message is out.
    assert sorted(said) in ([0, 1], [1, 1]), ends
    assert f"rank      : {rank} (local_rank: 1)" in ends[rank // 2][1].partition("Root Cause")[2]


def test_a_mistake_in_the_options_is_said_once(tmp_path):
    for options, said in (
        (("--epochs", -1), "epochs must be 1 or more"),
        (("--batch_size", 30), "batch_size 30 is that of a whole step"),
        (("--learning_rat", 1), "did you mean --learning_rate?"),
    ):
        code, printed = launch(4, ROOT / "train_accelerate.py", tmp_path / "out", *options).finish()
        assert code != 0
        assert printed.count(said) == 1, printed
    assert not (tmp_path / "out").exists()


# The training command, but for norms, which use their running statistics: those of a batch are each process's own.
WITH_FIXED_NORMS = """
import sys
sys.path.insert(0, {root!r})
import train_accelerate
from torch.nn import BatchNorm2d

set_train_mode = train_accelerate.set_train_mode

def with_fixed_norms(model):
    set_train_mode(model)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.eval()

train_accelerate.set_train_mode = with_fixed_norms
train_accelerate.main()
"""


# Speed; and a mean over the pairs of images that each process holds
NOT_COMPARED = {"images_per_second", "seconds", "batchformer_cosine"}


def assert_weights_equal_to_rounding(left, right):
    one, other = (load_file(checkpoint / "model.safetensors") for checkpoint in (left, right))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


def assert_metrics_equal_to_rounding(left, right):
    for name in left.keys() - NOT_COMPARED:
        assert left[name] == pytest.approx(right[name], rel=1e-4), name


def assert_equal_to_rounding(left, right):
    assert_weights_equal_to_rounding(left / "last", right / "last")
    for line, same in zip(read_metrics(left), read_metrics(right), strict=True):
        assert_metrics_equal_to_rounding(line, same)
    tested = [json.loads((out / "test_results.json").read_text())["test"] for out in (left, right)]
    for name in tested[0]:
        assert tested[0][name] == pytest.approx(tested[1][name], rel=1e-4), name


def test_two_four_and_eight_processes_equal_one(tmp_path):
    """Losses, sampler, windows, clipping, average and metrics; also resumed in mid-epoch by another number.

    The ninth batch of an epoch has 17 images in one process. Several fill it up with the first images of the epoch.
    """
    start = train(tmp_path / "start", "--epochs", 1) / "last"
    script = tmp_path / "script.py"
    script.write_text(WITH_FIXED_NORMS.format(root=str(ROOT)))
    options = ("--init_from", start, "--batch_size", 40, "--epochs", 2, "--reweight_epoch", 0, "--learning_rate", 0.01)
    options += ("--sampler", "class_balanced", "--batchformer_window", 16, "--batchformer_dropout", 0)
    options += ("--ema_decay", 0.9, "--max_grad_norm", 5, "--eval_steps", 4, "--eval_batch_size", 39)

    def run(processes, name, *more):
        code, printed = launch(processes, script, tmp_path / name, *options, *more).finish()
        assert code == 0, printed[-3000:]
        return tmp_path / name

    one, eight = (run(processes, str(processes), "--max_steps", 8) for processes in (1, 8))
    assert_equal_to_rounding(one, eight)
    resumed = run(4, eight.name, "--max_steps", 11, "--resume", "--allow_changes", "num_processes")
    assert_equal_to_rounding(run(2, "2", "--max_steps", 11), resumed)
