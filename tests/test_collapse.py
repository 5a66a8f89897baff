"""The monitor of the BatchFormer: the cosine it measures, what it warns of, and what it leaves as it was."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from processes import TRAIN, run, torchrun
from safetensors.torch import load_file
from test_training import SMALL_ARGUMENTS, read_metrics, train
from torch import nn

from modeling_ride_bf import RideBfBatchFormer
from ride_bf.methods import BatchFormer
from ride_bf.training.collapse import BATCHES, EVERY, CollapseMonitor, mean_pairwise_cosine
from ride_bf.training.progress import Progress


def features(images=6, experts=3, size=8, seed=0):
    return torch.randn(images, experts, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "first"), [(None, 0), (6, 0), (2, 0), (4, 0), (4, 2), (4, 7), (100, 0), (3, 1), (5, 18)]
)
def test_the_cosine_is_that_of_all_pairs_of_a_window(size, first):
    vectors = features()
    units = nn.functional.normalize(vectors, dim=2)
    cosines = [
        (units[one, expert] @ units[other, expert]).item()
        for expert in range(3)
        for one in range(6)
        for other in range(6)
        if one != other and (size is None or (first + one) // size == (first + other) // size)
    ]
    assert mean_pairwise_cosine(vectors, size, first).item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_cosines_at_the_edges():
    alike = features()[:1].expand(6, -1, -1) * torch.arange(1.0, 7)[:, None, None]
    assert mean_pairwise_cosine(alike).item() == pytest.approx(1, abs=1e-6)
    assert mean_pairwise_cosine(alike.half()).item() == pytest.approx(1, abs=1e-3)
    assert mean_pairwise_cosine(torch.eye(4)[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert mean_pairwise_cosine(torch.zeros(4, 1, 3)) == 0
    for no_pair in (features(1), features(0)):
        assert mean_pairwise_cosine(no_pair).isnan()
    assert mean_pairwise_cosine(features(), 1).isnan()


class Alike(nn.Module):
    """A module across the batch that gives every image nearly the same features, behind dropout."""

    def __init__(self, share):
        super().__init__()
        self.share, self.dropout = share, nn.Dropout(0.5)

    def forward(self, expert_features):
        return self.dropout(self.share * torch.ones_like(expert_features) + (1 - self.share) * expert_features)


def watch(module, batches, read_every=7, state=None, window="local"):
    """Gives the monitor random features; returns it and what each read gave."""
    monitor = CollapseMonitor(Accelerator(cpu=True), module, window, {} if state is None else state)
    given = []
    for batch in range(1, batches + 1):
        monitor.add(features(16, 2, 32, seed=batch))
        if batch % read_every == 0:
            given.append(monitor.read())
    return monitor, given


def test_a_batchformer_that_collapses_is_warned_of_once(capsys):
    watch(Alike(0.99).train(), BATCHES - EVERY)
    assert "warning" not in capsys.readouterr().out
    _, given = watch(Alike(0.99).train(), 3 * BATCHES)
    printed = capsys.readouterr().out
    assert printed.count("warning: for 50 batches the BatchFormer has made the images of a window alike") == 1
    for option in ("learning_rate_factor 0.1", "loss_weight 0.1"):
        assert f"--batchformer_{option}" in printed
    assert given[-1]["batchformer_cosine"] > 0.999


@pytest.mark.parametrize("module", [Alike(0.3), RideBfBatchFormer(32, 4), BatchFormer(32)])
def test_one_that_does_not_is_not(module, capsys):
    _, given = watch(module.train(), 3 * BATCHES)
    assert not capsys.readouterr().out
    assert -1 < given[-1]["batchformer_cosine"] < 0.9


def test_a_layer_that_does_not_act_is_not_blamed(capsys):
    """Before its start epoch, or with closed gates, it passes on images that the network made alike."""
    monitor = CollapseMonitor(Accelerator(cpu=True), nn.Sequential(nn.Identity()).train(), "local", {})
    for batch in range(3 * BATCHES):
        monitor.add(1 + 0.01 * features(16, 2, 32, seed=batch))
    assert monitor.read()["batchformer_cosine"] > 0.999
    assert not capsys.readouterr().out
    assert monitor.state["alike"] == 0


def test_a_batchformer_that_recovers_is_not_warned_of(capsys):
    module = Alike(0.99).train()
    monitor = CollapseMonitor(Accelerator(cpu=True), module, "local", {})
    for batch in range(1, 10 * EVERY + 1):
        module.share = 0.3 if batch == 4 * EVERY else 0.99
        monitor.add(features(16, 2, 32, seed=batch))
    monitor.read()
    assert monitor.state["alike"] == 6 * EVERY
    assert "warning" in capsys.readouterr().out  # from the fifth measurement on
    module.share = 0.3
    for batch in range(EVERY):
        monitor.add(features(16, 2, 32, seed=batch))
    monitor.read()
    assert monitor.state["alike"] == 0


def test_the_count_goes_on_in_a_resumed_run(capsys):
    progress = Progress()
    watch(Alike(0.99).train(), 4 * EVERY, read_every=EVERY, state=progress.collapse)
    resumed = Progress()
    resumed.load_state_dict(copy.deepcopy(progress.state_dict()))
    watch(Alike(0.99).train(), EVERY, read_every=EVERY, state=resumed.collapse)
    assert capsys.readouterr().out.count("warning") == 1
    old = {name: value for name, value in progress.state_dict().items() if name != "collapse"}
    before = Progress()
    before.load_state_dict(old)  # a checkpoint of an earlier version
    assert before.collapse == {}


def test_the_cosine_is_measured_without_dropout_and_training_goes_on_as_before():
    """In the paper's layer, dropout 0.5 makes two equal images differ."""
    module = RideBfBatchFormer(32, 4, dropout=0.5).train()
    alike = features(1, 2, 32).expand(16, -1, -1)
    assert mean_pairwise_cosine(module(alike)) < 0.9
    monitor = CollapseMonitor(Accelerator(cpu=True), module, "local", {})
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in range(EVERY):
        monitor.add(alike)
    assert monitor.read()["batchformer_cosine"] == pytest.approx(1, abs=1e-5)
    assert torch.equal(torch.rand(3), expected), "the measurement draws nothing"
    assert all(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_windows_are_measured_one_by_one():
    """Two windows, each of equal images, but different between the windows."""
    module = nn.Sequential(nn.Identity()).train()
    images = features(2, 1, 32).repeat_interleave(8, dim=0)
    for window, cosine in ((8, 1.0), ("local", mean_pairwise_cosine(images).item())):
        monitor = CollapseMonitor(Accelerator(cpu=True), module, window, {})
        for _ in range(EVERY):
            monitor.add(images)
        assert monitor.read()["batchformer_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert cosine < 0.9


@pytest.mark.parametrize("module", [None, RideBfBatchFormer(32, 4).eval()])
def test_nothing_is_measured_where_no_batchformer_trains(module):
    monitor, given = watch(module, 3 * EVERY)
    assert not any(given)
    assert monitor.latest() == monitor.state == {}


def test_the_measured_stream_is_the_networks(images):
    model = tiny_model(batchformer="insert").train()
    monitor = CollapseMonitor(Accelerator(cpu=True), model.batch_module, "local", {})
    outputs = model(images)
    for _ in range(EVERY):
        monitor.add(outputs.expert_features)
    model.batch_module.eval()
    expected = mean_pairwise_cosine(model.batch_module(outputs.expert_features))
    assert monitor.read()["batchformer_cosine"] == pytest.approx(expected.item(), abs=1e-6)


STEPS = ("--epochs", 3, "--max_steps", 16, "--logging_steps", 4)


def test_a_run_logs_it_beside_the_loss_only_with_a_batchformer(tmp_path):
    train(tmp_path / "with", *STEPS, "--batchformer", "insert")
    train(tmp_path / "without", *STEPS, "--batchformer", "none")
    assert all(-1 <= line["batchformer_cosine"] <= 1 for line in read_metrics(tmp_path / "with") if line["step"] >= 10)
    assert not any("batchformer_cosine" in line for line in read_metrics(tmp_path / "without"))


def test_an_interrupted_run_logs_what_an_uninterrupted_one_does(tmp_path):
    cosines = {}
    for name, stops in (("whole", [17]), ("parts", [8, 13, 17])):
        for number, stop in enumerate(stops):
            steps = ("--epochs", 5, "--max_steps", stop)
            train(tmp_path / name, *steps, *(["--resume"] if number else []))
        last = read_metrics(tmp_path / name)[-1]
        cosines[name] = (last["step"], last["batchformer_cosine"])
    assert cosines["whole"] == cosines["parts"]


def test_two_processes_measure_in_step(tmp_path):
    """Windows across processes are gathered when they are measured, too."""
    steps = ("--max_steps", 12, "--gradient_accumulation_steps", 2, "--batchformer_window", 24)
    arguments = (*SMALL_ARGUMENTS, "--output_dir", tmp_path / "out", "--overwrite_output_dir", *steps)
    run(*torchrun(2, TRAIN, *arguments), ACCELERATE_USE_CPU="true")
    last = read_metrics(tmp_path / "out")[-1]
    assert last["step"] == 12
    assert -1 < last["batchformer_cosine"] < 1


def test_training_starts_the_batchformer_in_its_epoch(tmp_path, capsys):
    options = (*SMALL_ARGUMENTS, "--batchformer", "insert", "--batchformer_start_epoch", 1, "--weight_decay", 0)
    steps = [load_file(train(tmp_path / str(steps), *options, "--max_steps", steps) / "last" / "model.safetensors")
             for steps in (1, 2)]  # fmt: skip
    same = {name: torch.equal(steps[0][name], steps[1][name]) for name in steps[0]}
    assert all(same[name] for name in same if name.startswith("batchformer."))
    assert not any(same[name] for name in same if name.startswith("classifiers."))
    with pytest.raises(SystemExit, match="2"):
        train(
            tmp_path / "late",
            *SMALL_ARGUMENTS,
            "--batchformer",
            "insert",
            "--epochs",
            2,
            "--batchformer_start_epoch",
            2,
        )
    assert "--batchformer_start_epoch 2 cannot act: it needs --epochs above that" in capsys.readouterr().err
