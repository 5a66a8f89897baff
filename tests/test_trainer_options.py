"""What a trainer is expected to offer, each by what it changes; and the configurations for accelerate launch."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, tiny_model
from processes import run
from safetensors.torch import load_file
from test_streams import write_shards
from test_training import SMALL_ARGUMENTS, read_metrics, train

import train_accelerate
from ride_bf.methods.losses import CrossEntropyLoss, LDAMLoss, RideLoss
from ride_bf.recipes import RECIPES
from ride_bf.training.cost import activation_bytes
from ride_bf.training.ema import WeightAverage

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def weights(output_dir):
    return load_file(output_dir / "model.safetensors")


def test_max_steps_and_evaluation_within_epochs(tmp_path):
    train(tmp_path / "out", "--epochs", 9, "--max_steps", 8, "--eval_steps", 2)
    lines = read_metrics(tmp_path / "out")
    assert [(line["step"], line.get("epoch")) for line in lines] == [(2, None), (4, None), (6, 1), (8, 2)]
    assert all("validation_accuracy" in line for line in lines)
    results = json.loads((tmp_path / "out/test_results.json").read_text())
    best = max(lines, key=lambda line: (line["validation_balanced_accuracy"], line["step"]))
    assert results["step"] == best["step"]
    last = json.loads((tmp_path / "out/last/checkpoint.json").read_text())
    assert (last["step"], last["epoch"]) == (8, pytest.approx(1 + 2 / 6, abs=1e-3))


def test_early_stopping(tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.3, 0.3, 0.1, 0.9, 0.9])
    evaluate = train_accelerate.evaluate

    def scripted(*arguments):
        return {**evaluate(*arguments), "balanced_accuracy": next(accuracies)}

    monkeypatch.setattr(train_accelerate, "evaluate", scripted)
    train(tmp_path / "out", "--epochs", 9, "--early_stopping_patience", 2)
    assert len(read_metrics(tmp_path / "out")) == 4
    assert json.loads((tmp_path / "out/best/checkpoint.json").read_text())["epoch"] == 3, "of equals the later one"


def test_the_average_is_what_is_evaluated_and_saved(tmp_path):
    """And it changes nothing of the training itself."""
    plain = train(tmp_path / "plain", "--epochs", 2)
    average = train(tmp_path / "average", "--epochs", 2, "--ema_decay", 0.9)
    losses = [[line["train_loss"] for line in read_metrics(run)] for run in (plain, average)]
    assert losses[0] == losses[1]
    raw = load_file(average / "last/training_state/model.safetensors")
    assert all(torch.equal(tensor, weights(plain / "last")[name]) for name, tensor in raw.items())
    averaged = weights(average / "last")
    name = "classifiers.0.weight"
    assert not torch.equal(averaged[name], raw[name])


def test_the_average_by_hand():
    model = tiny_model()
    average = WeightAverage(model, 0.75)
    expected = model.classifiers[0].weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.classifiers[0].weight.add_(step + 1)
        average.update()
        # the first update starts the average from the weights as they are then
        current = model.classifiers[0].weight.detach()
        expected = current.clone() if step == 0 else 0.75 * expected + 0.25 * current
    torch.testing.assert_close(average.evaluated.classifiers[0].weight.detach(), expected)


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def measured(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    train(tmp_path / "free", "--epochs", 1)
    free, norms[:] = list(norms), []
    train(tmp_path / "clipped", "--epochs", 1, "--max_grad_norm", 0.5)
    assert min(free) > 0.5
    assert max(norms) <= 0.5001


def test_accumulated_batches_make_one_step(tmp_path, capsys):
    options = ("--epochs", 1, "--gradient_accumulation_steps", 4, "--batchformer_window", 64)
    train(tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert "windows hold 16 images, not 64: a step's 64 are accumulated from 4 batches" in printed
    assert "6 steps of 64 images" in printed
    with pytest.raises(SystemExit):
        train(tmp_path / "out", "--gradient_accumulation_steps", 3)
    assert "batch_size 64 is that of a whole step" in capsys.readouterr().err


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Where the batch is not looked at as a whole: statistics fixed, no BatchFormer. One step of each."""
    options = "--batchformer none --train_only classifiers --max_steps 1 --loss cross_entropy --classifier linear"
    start = train(tmp_path / "start", "--epochs", 1, "--batchformer", "none", "--classifier", "linear")
    options += f" --init_from {start / 'last'}"
    whole, parts = (
        train(
            tmp_path / f"of_{count}",
            *options.split(),
            "--init_from",
            start / "last",
            "--gradient_accumulation_steps",
            count,
        )
        for count in (1, 4)
    )
    for name, tensor in weights(whole / "last").items():
        torch.testing.assert_close(tensor, weights(parts / "last")[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [CrossEntropyLoss, partial(LDAMLoss, [5, 3, 2], max_margin=0.0)])
def test_label_smoothing_is_pytorch_s(kind):
    logits, labels = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits[:, 0], labels, label_smoothing=0.2)
    # a margin of none leaves the logits as they are
    torch.testing.assert_close(kind(label_smoothing=0.2)(logits, labels), expected)


def test_label_smoothing_in_ride():
    logits, labels = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = [RideLoss([5, 3, 2], label_smoothing=share)(logits, labels) for share in (0.0, 0.3)]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"label_smoothing 0.1 would do nothing: the loss focal does not read it"):
        RECIPES["digits_lt_resnet32"].with_overrides(loss="focal", label_smoothing=0.1)


def test_a_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    train(tmp_path / "out", "--epochs", 2, "--dry_run")
    printed = capsys.readouterr().out
    assert "2 epochs of 337 images: 12 steps of 64" in printed
    assert "GiB for weights, gradients and optimizer" in printed
    assert not (tmp_path / "out/recipe.json").exists()


def said_and_done(capsys, folder, *options):
    """Steps that a dry run says, and steps that the run takes."""
    train(folder / "dry", *options, "--dry_run")
    said = re.search(r"(\d[\d,]*) steps of", capsys.readouterr().out).group(1)
    train(folder / "out", *options)
    return int(said.replace(",", "")), read_metrics(folder / "out")[-1]["step"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--epochs 2", 12),
        ("--epochs 2 --batch_size 45 --gradient_accumulation_steps 3", 2 * 8),  # 23 batches of 15
        ("--epochs 2 --batch_size 48 --gradient_accumulation_steps 3", 2 * 7),  # 21 of 16: the last image joins one
        ("--epochs 2 --passes_per_epoch 2", 2 * 11),
        ("--epochs 1 --sampler class_balanced", 6),
        ("--epochs 1 --sampler class_balanced --sampler_epoch largest_class --batch_size 128", 10),  # 1,200 draws
        ("--epochs 9 --max_steps 8", 8),
        ("--epochs 1 --max_steps 8", 6),
    ],
)
def test_a_dry_run_says_the_steps_that_are_taken(tmp_path, capsys, options, steps):
    assert said_and_done(capsys, tmp_path, *options.split()) == (steps, steps)


def test_a_dry_run_says_the_steps_of_a_stream(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = f"--recipe digits_lt_resnet32 --dataset custom --data_dir {write_shards(tmp_path / 'tars')} --streaming "
    options += "--epochs 2 --batch_size 8 --gradient_accumulation_steps 2 --hidden_sizes 4 4 4"
    assert said_and_done(capsys, tmp_path, *options.split()) == (4, 4)  # 21 images: two steps of two batches


def test_a_dry_run_of_processes_says_the_steps_that_are_taken(tmp_path):
    """337 images of two processes in batches of 9: they share 19 batches of each, and the last step is of one."""
    command = [*TORCHRUN, "train_accelerate.py", *SMALL_ARGUMENTS, "--epochs", "1", "--batch_size", "36"]
    command += ["--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    # A real interpreter: processes that end while their group lives may be aborted as Python shuts down.
    dry = subprocess.run([*command, "--dry_run"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr[-3000:]
    run(*command[2:], ACCELERATE_USE_CPU="true")
    assert "1 epochs of 337 images: 10 steps of 36" in dry.stdout
    assert read_metrics(tmp_path / "out")[-1]["step"] == 10


def test_activations_are_counted(monkeypatch):
    """Of one convolution, its normalisation and a linear layer on top, by hand in the order of magnitude."""
    model = tiny_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    small, large = (activation_bytes(model, size) for size in (16, 32))
    assert large == pytest.approx(4 * small, rel=0.1)
    assert small > 4 * 16 * 16 * 4 * 3, "three maps of the first stage alone, four channels in float32"
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_trackers(tmp_path, monkeypatch):
    train(tmp_path / "out", "--epochs", 1, "--report_to", "none")
    assert not (tmp_path / "out/tensorboard").exists()
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(SystemExit, match="wandb is not installed: pip install wandb, or set --report_to none"):
        train(tmp_path / "other", "--report_to", "wandb")


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path):
    """In a process of its own, where nothing has been set up before it is looked for."""
    command = [sys.executable, "train_accelerate.py", "--output_dir", str(tmp_path / "out"), "--report_to", "wandb"]
    hidden = (
        "import sys; sys.modules['wandb'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    finished = subprocess.run([command[0], "-c", hidden, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr == "error: wandb is not installed: pip install wandb, or set --report_to none\n"


def test_deterministic(tmp_path):
    try:
        runs = [train(tmp_path / str(number), "--epochs", 1, "--deterministic") for number in range(2)]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (weights(run / "last") for run in runs)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_neither_workers_nor_their_number_change_a_run(tmp_path):
    runs = [train(tmp_path / str(count), "--epochs", 1, "--num_workers", count) for count in (0, 2)]
    one, other = (weights(run / "last") for run in runs)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["save_steps", "eval_steps", "max_steps", "early_stopping_patience", "keep_last"])
def test_numbers_below_one_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        train("unused", f"--{name}", 0)
    assert f"{name} must be 1 or more, not 0" in capsys.readouterr().err


CONFIGURATIONS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_accelerate_reads_the_configurations(path):
    known = vars(launch_command_parser().parse_args(["train_accelerate.py"]))
    content = yaml.safe_load(path.read_text())
    options = content | content.pop("fsdp_config", {})
    for name in set(options) - {"compute_environment", "distributed_type", "use_cpu"}:
        assert name in known, name
    assert load_config_from_file(str(path)).num_processes == content["num_processes"]


def test_the_cpu_configuration_trains(tmp_path):
    command = f"-m accelerate.commands.launch --config_file {ROOT}/configs/cpu.yaml {ROOT}/train_accelerate.py"
    options = f"--max_steps 2 --output_dir {tmp_path / 'out'} --depths 1 1 1 --image_size 8 --resize_size 8"
    finished = subprocess.run([sys.executable, *command.split(), *options.split()], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "1 process(es) on cpu" in finished.stdout


class Slurm:
    """One machine of a cluster: stand-ins for SLURM, Accelerate and the training, which ends as ours when signalled."""

    programs = {  # noqa: RUF012
        "bin/srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
        "bin/scontrol": '#!/bin/bash\necho "$@" >> scontrol.log\n[ "$1" = show ] && echo node1\n',
        ".venv/bin/accelerate": '#!/bin/bash\nwhile [ "$1" != train_accelerate.py ]; do shift; done\npython3 -u "$@"\n',
        "train_accelerate.py": (
            "import json, os, signal, sys, time\n"
            "name = os.environ.get('SLURM_JOB_ID', 'by hand')\n"
            "def stop(*_):\n"
            "    open(f'{name}.writing', 'w').write(json.dumps(sys.argv[1:]))\n"
            "    os.rename(f'{name}.writing', f'{name}.saved')\n"
            "    sys.exit(75)\n"
            "signal.signal(signal.SIGUSR1, stop)\n"
            "open(f'{name}.started', 'w').close()\n"
            "time.sleep(100)\n"
        ),
    }

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        for name, content in self.programs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)

    def start(self, command, name, **environment):
        """A process group of its own, once its training has started."""
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        process = subprocess.Popen(command, cwd=self.folder, env=os.environ | environment, start_new_session=True)
        self.processes.append(process)
        deadline = time.monotonic() + 30
        while not (self.folder / f"{name}.started").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    def submit(self, number, *options, name="train"):
        facts = {"SLURM_JOB_NAME": name, "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "node1"}
        facts |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        return self.start(["bash", str(ROOT / "configs/slurm.sh"), *options], number, **facts)

    def train_by_hand(self, output_dir):
        return self.start(["python3", "-u", "train_accelerate.py", "--output_dir", output_dir], "by hand")

    def saved(self):
        """The arguments of each training that was signalled, by its job's number."""
        return {path.stem: json.loads(path.read_text()) for path in self.folder.glob("*.saved")}

    def requeued(self):
        lines = (self.folder / "scontrol.log").read_text().splitlines()
        return [line for line in lines if line.startswith("requeue")]


@pytest.fixture
def slurm(tmp_path):
    machine = Slurm(tmp_path)
    yield machine
    for process in machine.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_slurm_job_saves_and_queues_itself_again(slurm):
    (slurm.folder / "outputs/train-7/last").mkdir(parents=True)
    job = slurm.submit(7, "--recipe", "imagenet_lt_resnet50")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    arguments = "--output_dir outputs/train-7 --num_workers 8 --resume --recipe imagenet_lt_resnet50"
    assert slurm.saved() == {"7": arguments.split()}
    assert slurm.requeued() == ["requeue 7"]


def test_a_slurm_job_signals_no_other_training_of_its_machine(slurm):
    """Not that of a job whose number or name begins or ends like its own, nor one that is no job's."""
    jobs = {number: slurm.submit(number) for number in (123, 1234, 23)}
    by_hand = slurm.train_by_hand("outputs/train-123")
    for number in (123, 23):
        jobs[number].send_signal(signal.SIGUSR1)
        assert jobs[number].wait(timeout=20) == 0
    assert slurm.requeued() == ["requeue 123", "requeue 23"]
    time.sleep(0.5)
    assert slurm.saved().keys() == {"123", "23"}
    assert jobs[1234].poll() is None
    assert by_hand.poll() is None
    jobs[1234].send_signal(signal.SIGUSR1)
    assert jobs[1234].wait(timeout=20) == 0
    assert by_hand.poll() is None


def test_a_slurm_job_may_have_any_name_and_options(slurm):
    """Characters that mean something to the shell and in patterns."""
    job = slurm.submit(5, "--data_dir", "my images ($HOME)", name="lt c++ [a]")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    arguments = ["--output_dir", "outputs/lt c++ [a]-5", "--num_workers", "8", "--data_dir", "my images ($HOME)"]
    assert slurm.saved() == {"5": arguments}
