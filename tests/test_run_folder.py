"""The output folder: nothing is deleted that a run did not write, nothing of a run unasked, and one run has it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator
from conftest import ROOT
from datasets import IterableDataset
from filelock import Timeout
from test_training import SMALL_ARGUMENTS, read_metrics, train

import train_accelerate
from data import FinishedBatches, TrainBatch, train_transform, training_batches
from data.streams import ImageStream
from ride_bf.runs.checkpoints import CheckpointError, is_write_error, write_folder
from ride_bf.runs.run_folder import RunFolder
from train_accelerate import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished") / "out", "--epochs", 1, "--save_steps", 3)


@pytest.mark.parametrize(
    ("removed", "remedy"),
    [
        (("best",), "continue it with --resume, delete it with --overwrite_output_dir"),
        (("last", "checkpoints"), "delete it with --overwrite_output_dir, or name another"),
        (("last", "metrics.jsonl", "test_results.json"), "continue it with --resume, "),
        (("last", "best"), "continue it with --resume, "),
    ],
)
def test_what_is_left_of_a_run_is_not_deleted_unasked(finished, tmp_path, removed, remedy):
    shutil.copytree(finished, tmp_path / "out")
    for name in removed:
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=rf"holds a run already; {remedy}"):
        train(tmp_path / "out", "--epochs", 1)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("option", [(), ("--overwrite_output_dir",)])
def test_a_folder_of_somebody_else_is_not_replaced(tmp_path, name, option):
    """A run would put its own in its place: it is told so before it has begun."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "photo.jpg").write_text("mine")
    with pytest.raises(SystemExit, match=f"has {name}, which no run wrote"):
        train(tmp_path / "out", "--epochs", 1, *option)
    assert (tmp_path / "out" / name / "photo.jpg").read_text() == "mine"


def test_what_lies_beside_a_run_s_own_files_stays(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    kept = ["checkpoints/notes.txt", "checkpoints/step-by-step/mine.txt", "tensorboard/mine.txt", "notes.txt"]
    for name in kept:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    train(tmp_path / "out", "--epochs", 1, "--overwrite_output_dir", "--keep_last", 1)
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in kept)
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"notes.txt", "step-by-step"}
    assert len(list((tmp_path / "out/tensorboard").glob("events.out.tfevents.*"))) == 1


def test_foreign_folders_called_checkpoints_are_kept_by_a_first_run(tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/checkpoints/mine.txt").write_text("mine")
    train(tmp_path / "out", "--epochs", 1)
    assert (tmp_path / "out/checkpoints/mine.txt").read_text() == "mine"


def test_an_evaluation_and_a_checkpoint_a_step(tmp_path, monkeypatch):
    """A step on which several things are due, the run's end among them, is evaluated once and saved once."""
    calls = []
    for name in ("evaluate", "save"):
        method = getattr(Trainer, name)

        def counted(trainer, name=name, method=method):
            calls.append((name, trainer.progress.steps_done))
            return method(trainer)

        monkeypatch.setattr(Trainer, name, counted)
    options = ("--epochs", 9, "--eval_steps", 3, "--save_steps", 3, "--keep_last", 9)
    train(tmp_path / "out", *options, "--max_steps", 9)
    assert calls == [(name, step) for step in (3, 6, 9) for name in ("evaluate", "save")]
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [3, 6, 9]
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_early_stopping_within_an_epoch_evaluates_once(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.4, 0.9])
    evaluate = train_accelerate.evaluate

    def scripted(*arguments):
        return {**evaluate(*arguments), "balanced_accuracy": next(accuracies)}

    monkeypatch.setattr(train_accelerate, "evaluate", scripted)
    train(tmp_path / "out", "--epochs", 9, "--eval_steps", 2, "--early_stopping_patience", 1)
    lines = read_metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["epoch"] == 1
    assert json.loads((tmp_path / "out/last/checkpoint.json").read_text())["step"] == 4


class CudaOutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError, which cannot be made without a GPU that runs out."""


@pytest.mark.parametrize(
    "error",
    [
        CudaOutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("Expected all tensors to be on the same device"),
        KeyError("batchformer"),
    ],
)
def test_an_error_that_is_not_the_disk_s_is_raised_as_it_is(tmp_path, error):
    def fails(path):
        raise error

    with pytest.raises(type(error), match=str(error.args[0])):
        write_folder(tmp_path / "last", OneProcess(), fails)
    assert not list(tmp_path.iterdir())
    assert not is_write_error(error)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(28, "No space left on device"), "Free space on the disk"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"),
            "Free space",
        ),
        (PermissionError(13, "Permission denied"), "Give this user write permission there"),
        (OSError(5, "Input/output error"), "Check the disk"),
    ],
)
def test_an_error_of_writing_says_what_to_do(tmp_path, error, remedy):
    def fails(path):
        (path / "model.safetensors").write_text("half")
        raise error

    with pytest.raises(CheckpointError, match=remedy):
        write_folder(tmp_path / "last", OneProcess(), fails)
    assert not list(tmp_path.iterdir())


class OneProcess:
    """What `write_folder` asks of an accelerator."""

    is_main_process = True

    def wait_for_everyone(self):
        pass


SLEEPS_AFTER_A_STEP = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import train_accelerate
after_step = train_accelerate.Trainer.after_step

def slow(trainer):
    after_step(trainer)
    open(sys.argv[sys.argv.index("--output_dir") + 1] + "/stepped", "w").close()
    time.sleep(60)

train_accelerate.Trainer.after_step = slow
train_accelerate.main()
"""


def test_a_second_run_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    code = SLEEPS_AFTER_A_STEP.format(tests=str(ROOT / "tests"), root=str(ROOT))
    first = subprocess.Popen(
        [sys.executable, "-c", code, *SMALL_ARGUMENTS, "--output_dir", str(out), "--save_steps", "1"]
    )
    deadline = time.monotonic() + 120
    while not (out / "stepped").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for options in ((), ("--resume",), ("--overwrite_output_dir",)):
        with pytest.raises(
            SystemExit, match=rf"another run is training in .*out \(process {first.pid} on .*, started 20"
        ):
            train(out, *options)
    assert (out / "last").is_dir()
    first.send_signal(signal.SIGKILL)
    first.wait()
    (out / "stepped").unlink()
    train(out, "--epochs", 1, "--resume", "--save_steps", 1, "--allow_changes", "epochs")
    assert not (out / "run.lock").exists()


DIES_BEFORE_ITS_WORKER = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from ride_bf.runs.run_folder import RunFolder
folder = RunFolder(Path({folder!r}))
folder._lock.acquire(blocking=False)
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    """Loaders fork, and what they inherit must not be the lock."""
    code = DIES_BEFORE_ITS_WORKER.format(root=str(ROOT), folder=str(tmp_path))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    with pytest.raises(Timeout):
        RunFolder(tmp_path)._lock.acquire(blocking=False)
    run.kill()
    run.wait()
    try:
        RunFolder(tmp_path)._lock.acquire(timeout=5)
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lost_accumulation_is_stepped_at_the_end_of_a_stream_s_epoch():
    """Two batches make a step and an epoch has an odd number: no gradient is left over, nor lost."""

    def rows():
        for index in range(7):
            yield {"image": {"bytes": _ppm(index), "path": None}, "label": index % 2}

    stream = ImageStream(IterableDataset.from_generator(rows), ["a", "b"], [4, 3], {0: 0, 1: 1})
    loader = training_batches(
        stream,
        train_transform("cifar", 8),
        TrainBatch("cifar", (0.5,) * 3, (0.5,) * 3),
        2,
        Accelerator(cpu=True),
        batches_per_step=2,
    )
    assert len(loader) == 2
    assert len(list(loader)) == 2


def _ppm(value):
    return b"P6 8 8 255\n" + bytes([value * 10]) * 192


def test_an_epoch_that_ends_in_broken_images_ends_with_a_step(tmp_path, monkeypatch):
    """With gradients accumulated and not yet stepped, and nothing more to come."""
    steps = []
    monkeypatch.setattr(Trainer, "after_step", _recorded(Trainer.after_step, steps))
    whole = FinishedBatches.batches_from

    def without_the_last(self, start):
        last = len(self) - 1 if self.seed is not None else len(self)  # of training alone
        for index, batch in enumerate(whole(self, start), start):
            if index < last:
                yield batch

    monkeypatch.setattr(FinishedBatches, "batches_from", without_the_last)
    # 337 images in batches of 32: eleven, of which the last has none left; two make a step
    train(tmp_path / "out", "--epochs", 2, "--gradient_accumulation_steps", 2, "--batchformer_window", 32)
    lines = read_metrics(tmp_path / "out")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(gradients == 0 for gradients in steps), "nothing is left over in the next epoch"


def _recorded(after_step, left):
    def recorded(trainer):
        left.append(sum(parameter.grad is not None for parameter in trainer.model.parameters()))
        after_step(trainer)

    return recorded
