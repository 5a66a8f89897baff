"""Interruptions, kills, full disks and damaged files: nothing is lost, and a resumed run is the uninterrupted one."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from processes import TRAIN, Command, torchrun
from safetensors.torch import load_file
from test_training import SMALL_ARGUMENTS, assert_same_weights, read_metrics, train

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.command_line import messages
from ride_bf.command_line.messages import dead_workers_as_messages, errors_as_messages
from ride_bf.runs.checkpoints import damage, newest_whole_checkpoint
from ride_bf.training.interruption import EXIT_CODE, Interruption
from train_accelerate import Trainer

OPTIONS = ("--epochs", 2, "--batch_size", 32, "--ema_decay", 0.9, "--max_grad_norm", 5, "--eval_steps", 4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "out", *OPTIONS)


def interrupted_at(step, monkeypatch, number=signal.SIGTERM):
    """A signal that comes while the step is under way."""
    after_step = Trainer.after_step

    def signalled(trainer):
        if trainer.progress.steps_done == step:
            os.kill(os.getpid(), number)
        after_step(trainer)

    monkeypatch.setattr(Trainer, "after_step", signalled)


def without_speed(output_dir):
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "seconds")}
        for line in read_metrics(output_dir)
    ]


def assert_same_run(left, right):
    for checkpoint in ("last", "best"):
        assert_same_weights(left / checkpoint, right / checkpoint)
    state = ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_2.pkl")
    for name in state:
        one, other = (torch.load(run / "last/training_state" / name, weights_only=True) for run in (left, right))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert without_speed(left) == without_speed(right)


@pytest.mark.parametrize(
    ("steps", "extra"),
    [
        ((3, 15), ()),
        ((7,), ("--num_workers", 1)),
        ((2,), ("--gradient_accumulation_steps", 2, "--mixup_alpha", 0.5)),
        ((5,), ("--optimizer", "adamw", "--schedule", "cosine_by_step", "--head_learning_rate_factor", 3)),
    ],
)
def test_resumed_in_mid_epoch_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, steps, extra):
    """Bit for bit: order, augmentation, dropout, clipping, average, schedule, log and best so far."""
    whole = train(tmp_path / "whole", *OPTIONS, *extra) if len(extra) > 2 else uninterrupted
    for step in steps:
        with monkeypatch.context() as patch:
            interrupted_at(step, patch)
            with pytest.raises(SystemExit) as exit_info:
                train(tmp_path / "out", *OPTIONS, *extra, *(("--resume",) if step != steps[0] else ()))
        assert exit_info.value.code == EXIT_CODE == 75
        facts = json.loads((tmp_path / "out/last/checkpoint.json").read_text())
        assert facts["step"] == step
    train(tmp_path / "out", *OPTIONS, *extra, "--resume")
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_ways_of_asking(tmp_path, monkeypatch, capsys, number):
    interrupted_at(1, monkeypatch, number)
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path / "out", *OPTIONS)
    assert exit_info.value.code == EXIT_CODE
    assert f"{number.name}: stopped after step 1; the checkpoint is" in capsys.readouterr().out
    assert damage(tmp_path / "out/last") is None


def test_ctrl_c_twice_does_not_wait():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_checkpoints_are_pruned(tmp_path):
    train(tmp_path / "out", "--epochs", 1, "--batch_size", 32, "--save_steps", 2, "--keep_last", 3)
    assert [path.name for path in sorted((tmp_path / "out/checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000010",
    ]
    train(tmp_path / "one", "--epochs", 1, "--save_steps", 2, "--keep_last", 1)
    assert not (tmp_path / "one/checkpoints").exists()
    assert not list((tmp_path / "one").glob(".*"))


@pytest.mark.parametrize("file", ["model.safetensors", "training_state/optimizer.bin", "config.json"])
@pytest.mark.parametrize("how", ["cut off", "changed", "removed"])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, capsys, file, how):
    shutil.copytree(uninterrupted, tmp_path / "out")
    path = tmp_path / "out/last" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if how != "removed":
        path.write_bytes(content[:-10] if how == "cut off" else content)
    if file == "model.safetensors" and how == "changed":  # once to the end; finding it is enough for the others
        train(tmp_path / "out", *OPTIONS, "--resume")
        assert (
            f"skipped a damaged checkpoint: {tmp_path / 'out/last'}: {file} has changed since it was written"
            in capsys.readouterr().out
        )
        assert_same_run(tmp_path / "out", uninterrupted)
    else:
        found, problems = newest_whole_checkpoint(tmp_path / "out")
        assert found.parent.name == "checkpoints"
        assert len(problems) == 1
        assert file in problems[0]


def test_nothing_whole_is_said(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoints")
    (tmp_path / "out/last/files.json").unlink()
    with pytest.raises(
        SystemExit,
        match=r"no whole checkpoint .*last: its list of files .*; start again with --overw",
    ):
        train(tmp_path / "out", *OPTIONS, "--resume")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, error):
    save = RideBfForImageClassification.save_pretrained
    calls = []

    def fills_up(self, folder, *arguments, **options):
        calls.append(folder)
        save(self, folder, *arguments, **options)
        if len(calls) == 4:  # best and last of the first epoch, best of the second, then this
            raise error

    monkeypatch.setattr(RideBfForImageClassification, "save_pretrained", fills_up)
    with pytest.raises(SystemExit, match=r"last could not be written .*is untouched: .*Free space .*--resume"):
        train(tmp_path / "out", "--epochs", 2)
    assert damage(tmp_path / "out/last") is None
    assert json.loads((tmp_path / "out/last/checkpoint.json").read_text())["epoch"] == 1
    assert not list((tmp_path / "out").glob(".*.writing")), "what is of no use takes no room"
    monkeypatch.undo()
    train(tmp_path / "out", "--epochs", 2, "--resume")
    assert len(read_metrics(tmp_path / "out")) == 2


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_before_the_first_checkpoint_there_is_nothing_to_resume(tmp_path, monkeypatch, checkpoint):
    """`best` is saved before `last`, and its folder may be the only one of the run."""
    save = RideBfForImageClassification.save_pretrained

    def fills_up(self, folder, *arguments, **options):
        save(self, folder, *arguments, **options)
        if checkpoint in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(RideBfForImageClassification, "save_pretrained", fills_up)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "out", "--epochs", 1)
    assert str(stopped.value).startswith(f"error: {tmp_path}/out/{checkpoint} could not be written")
    assert str(stopped.value).endswith("; there is no checkpoint yet: start again with --overwrite_output_dir")
    train(tmp_path / "out", "--epochs", 1, "--overwrite_output_dir")


@pytest.mark.parametrize("go_on", [lambda: "continue with --resume", None], ids=["training", "another command"])
def test_only_training_says_how_to_go_on_when_a_process_is_lost(monkeypatch, go_on):
    monkeypatch.setattr(messages, "_has_lost_another", lambda error: True)
    monkeypatch.setattr(messages.time, "sleep", lambda seconds: None)
    with (
        pytest.raises(SystemExit, match=r"^error: another process of this command has ended \(gone\)") as stopped,
        errors_as_messages(go_on=go_on),
    ):
        raise RuntimeError("gone")
    assert str(stopped.value).endswith("; continue with --resume" if go_on else "too little memory")


def test_a_worker_that_dies_is_explained():
    rows = torch.utils.data.DataLoader(Dies(), num_workers=1)
    with (
        pytest.raises(SystemExit, match=r"process that prepares images has died .*; go on, with fewer --num_workers"),
        dead_workers_as_messages(lambda: "go on"),
    ):
        list(rows)


class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("changed", "allowed", "message"),
    [
        (("--learning_rate", 0.01), (), "differences: learning_rate: 0.1 -> 0.01"),
        (("--epochs", 3), (), r"differences: epochs: 2 -> 3\. .*, or allow the change with --allow_changes epochs$"),
        (
            ("--epochs", 3, "--seed", 1),
            ("--allow_changes", "epochs"),
            r"differences: seed: 0 -> 1\. Give the options of that run, or start a new run without --resume",
        ),
        (
            ("--epochs", 3, "--seed", 1),
            (),
            r"differences: epochs: 2 -> 3; seed: 0 -> 1\. Give the options of that run, or start a new run",
        ),
        (
            ("--epochs", 3),
            ("--allow_changes", "num_workers"),
            r"allow the change with --allow_changes epochs num_workers$",
        ),
    ],
)
def test_another_run_is_not_gone_on_with(uninterrupted, changed, allowed, message):
    with pytest.raises(SystemExit, match=message):
        train(uninterrupted, *OPTIONS, *changed, *allowed, "--resume")


def test_more_epochs_by_name(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    train(tmp_path / "out", *OPTIONS, "--epochs", 3, "--allow_changes", "epochs", "--resume")
    assert read_metrics(tmp_path / "out")[-1]["epoch"] == 3


def test_what_no_run_can_go_on_with(capsys):
    with pytest.raises(SystemExit):
        train("unused", "--resume", "--allow_changes", "seed")
    assert "allow_changes cannot allow ['seed']; it can allow num_processes" in capsys.readouterr().err


KILLED = ("--epochs", "3", "--batch_size", "32", "--save_steps", "1", "--batchformer_window", "global")


def launch(output_dir, *options):
    command = (TRAIN, *SMALL_ARGUMENTS, *KILLED, "--output_dir", output_dir, *options)
    return Command(*torchrun(2, *command), ACCELERATE_USE_CPU="true")


def kill_and_resume(output_dir, kills, rng):
    """Kills every process of the run at random moments, most of them while it writes a checkpoint at every step."""
    left = kills
    while left:
        before = (output_dir / "last/checkpoint.json").read_text() if (output_dir / "last").exists() else ""
        process = launch(output_dir, *(("--resume",) if before else ("--overwrite_output_dir",)))
        deadline = time.monotonic() + 120
        while process.poll() is None:  # until it has gone on, so that every life is worth something
            checkpoint = output_dir / "last/checkpoint.json"
            if checkpoint.exists() and checkpoint.read_text() != before:
                break
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.signal(signal.SIGKILL)
            left -= 1
        code, _ = process.finish()
        assert (output_dir / "last").is_dir()
        assert damage(output_dir / "last") is None, "a process killed at any moment leaves a whole checkpoint"
        if code == 0:
            return left
    return 0


def run_whole(output_dir, *options):
    code, printed = launch(output_dir, *options).finish()
    assert code == 0, printed[-3000:]


def killed_equals_uninterrupted(tmp_path, kills):
    run_whole(tmp_path / "whole")
    rng = random.Random(0)
    left, attempt = kills, 0
    while left:  # a run that ends before it has been killed often enough is followed by another
        attempt += 1
        out = tmp_path / f"killed_{attempt}"
        left = kill_and_resume(out, left, rng)
        run_whole(out, "--resume") if not (out / "test_results.json").exists() else None
        assert_same_run(out, tmp_path / "whole")


def test_two_processes_killed_and_resumed_equal_an_uninterrupted_run(tmp_path):
    killed_equals_uninterrupted(tmp_path, kills=2)


@pytest.mark.slow
def test_two_processes_killed_twenty_times(tmp_path):
    killed_equals_uninterrupted(tmp_path, kills=20)


def test_two_processes_agree_to_stop_and_one_goes_on(tmp_path):
    process = launch(tmp_path / "out")
    process.wait_until((tmp_path / "out/last/checkpoint.json").exists)
    process.signal(signal.SIGTERM)
    code, printed = process.finish(timeout=60)
    assert "SIGTERM: stopped after step" in printed
    assert code != 0
    step = json.loads((tmp_path / "out/last/checkpoint.json").read_text())["step"]
    options = [*SMALL_ARGUMENTS, *KILLED, "--resume"]
    with pytest.raises(SystemExit, match="differences: num_processes: 2 -> 1"):
        train(tmp_path / "out", *options)
    train(tmp_path / "out", *options, "--allow_changes", "num_processes")
    lines = read_metrics(tmp_path / "out")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["step"] > step
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out/last/model.safetensors").values())
