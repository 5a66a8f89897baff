"""The training command on its default images, shortened; in this process where nothing else is asked for."""

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import tiny_model
from processes import TRAIN, Command, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor

import train_accelerate
from data import evaluation_batches, load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import DEFAULT_RECIPE, RECIPES
from ride_bf.training.start_weights import initialise_from
from train_accelerate import Trainer

# A shallow network on small images, an epoch of which takes a second
SMALL = {
    "depths": [1, 1, 1],
    "image_size": 8,
    "resize_size": 8,
    "passes_per_epoch": 1,
    "batch_size": 64,
    "learning_rate": 0.1,
    "warmup_epochs": 5,
    "schedule": "step",
    "lr_steps": (2,),
    "lr_gamma": 0.01,
    "reweight_epoch": 2,
    "batchformer_window": "global",
}
SMALL_RECIPES = {
    name: recipe.with_overrides(**SMALL) for name, recipe in RECIPES.items() if recipe.dataset == "digits_lt"
}
# The default recipe made small, for processes of their own
FOLDER = tempfile.TemporaryDirectory()
SMALL_RECIPE = Path(FOLDER.name) / "small.json"
SMALL_RECIPE.write_text(SMALL_RECIPES[DEFAULT_RECIPE].as_json())
SMALL_ARGUMENTS = ["--recipe_file", str(SMALL_RECIPE)]


def train(output_dir, *arguments):
    """Runs the command on a small recipe in this process, as `accelerate launch` does in one of its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    command = ["train_accelerate.py", "--output_dir", str(output_dir), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        for name, recipe in SMALL_RECIPES.items():
            patch.setitem(RECIPES, name, recipe)
        train_accelerate.main()
    return output_dir


def read_metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(left, right):
    left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_reloads_to_the_same(output_dir):
    """The model that was saved gives the validation loss that was logged before it was saved."""
    model = RideBfForImageClassification.from_pretrained(output_dir / "last")
    processor = AutoImageProcessor.from_pretrained(output_dir / "last")
    rows = next(iter(evaluation_batches(load_long_tailed("digits_lt")["validation"], processor, 80)))
    with torch.no_grad():
        loss = model(rows["pixel_values"], labels=rows["labels"]).loss
    assert loss.item() == pytest.approx(read_metrics(output_dir)[-1]["validation_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "out", "--epochs", 4)


def test_what_a_run_leaves(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        "best",
        "checkpoints",
        "environment.json",
        "last",
        "metrics.jsonl",
        "recipe.json",
        "run.json",
        "tensorboard",
        "test_results.json",
    }
    metrics = read_metrics(uninterrupted)
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in metrics] == pytest.approx([0.02, 0.04, 0.0006, 0.0008])
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"]  # from the third on it is re-weighted
    for line in metrics:
        groups = [line[f"validation_{group}_shot_accuracy"] for group in ("many", "medium", "few")]
        by_hand = (groups[0] * 1 + groups[1] * 4 + groups[2] * 5) / 10  # classes in each group
        assert line["validation_accuracy"] == pytest.approx(by_hand)
        assert line["images_per_second"] > 0
    scalars = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    logged = [event.value for event in scalars.Scalars("train_loss")]
    assert logged == pytest.approx([line["train_loss"] for line in metrics])
    recipe = json.loads((uninterrupted / "recipe.json").read_text())
    assert (recipe["name"], recipe["epochs"], recipe["network"]["depths"]) == ("digits_lt_resnet32", 4, [1, 1, 1])


def test_the_test_report_is_of_the_best_checkpoint(uninterrupted):
    results = json.loads((uninterrupted / "test_results.json").read_text())
    accuracies = [line["validation_accuracy"] for line in read_metrics(uninterrupted)]
    best_epoch = max(range(4), key=lambda epoch: (accuracies[epoch], epoch)) + 1
    assert (results["checkpoint"], results["epoch"]) == ("best", best_epoch)
    assert results["train_class_counts"] == [120, 78, 50, 33, 21, 14, 9, 6, 4, 2]

    model = RideBfForImageClassification.from_pretrained(uninterrupted / "best")
    processor = AutoImageProcessor.from_pretrained(uninterrupted / "best")
    rows = next(iter(evaluation_batches(load_long_tailed("digits_lt")["test"], processor, 500)))
    with torch.no_grad():
        predictions = model(rows["pixel_values"]).logits.argmax(dim=1)
    labels = rows["labels"]
    assert results["test"]["accuracy"] == pytest.approx((predictions == labels).double().mean().item())
    assert results["test"]["per_class_accuracy"][9] == pytest.approx(
        (predictions[labels == 9] == 9).double().mean().item()
    )


def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch):
    """Bit for bit: order, augmentation, dropout, momentum, schedule, statistics and the best so far."""
    epoch = Trainer.train_epoch

    def dies_in_epoch_three(trainer):
        if trainer.progress.epochs_done == 2:
            raise KeyboardInterrupt
        return epoch(trainer)

    monkeypatch.setattr(Trainer, "train_epoch", dies_in_epoch_three)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", "--epochs", 4)
    monkeypatch.setattr(Trainer, "train_epoch", epoch)
    train(tmp_path / "out", "--epochs", 4, "--resume")

    for checkpoint in ("last", "best"):
        assert_same_weights(uninterrupted / checkpoint, tmp_path / "out" / checkpoint)

    def without_speed(lines):
        return [
            {key: value for key, value in line.items() if key not in ("images_per_second", "seconds")} for line in lines
        ]

    assert without_speed(read_metrics(tmp_path / "out")) == without_speed(read_metrics(uninterrupted))
    assert (tmp_path / "out" / "test_results.json").read_text() == (uninterrupted / "test_results.json").read_text()


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    train(tmp_path / "out", "--epochs", 1, "--seed", 1)
    assert read_metrics(tmp_path / "out")[0]["train_loss"] != read_metrics(uninterrupted)[0]["train_loss"]


def test_an_earlier_run_is_not_overwritten_by_accident(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match="holds a run already; continue it with --resume"):
        train(uninterrupted, "--epochs", 1)
    with pytest.raises(SystemExit, match=r"holds another run; differences: epochs: 4 -> 5"):
        train(uninterrupted, "--epochs", 5, "--resume")
    with pytest.raises(SystemExit, match=r"holds another run; differences: seed: 0 -> 5"):
        train(uninterrupted, "--epochs", 4, "--resume", "--seed", 5)
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_resuming_from_nothing_is_explained(tmp_path):
    with pytest.raises(SystemExit, match="holds no checkpoint to resume"):
        train(tmp_path / "out", "--resume")


def test_a_lost_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    epoch = Trainer.train_epoch

    def breaks_in_epoch_two(trainer):
        if trainer.progress.epochs_done == 1:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.nan)
        return epoch(trainer)

    monkeypatch.setattr(Trainer, "train_epoch", breaks_in_epoch_two)
    with pytest.raises(SystemExit, match=r"loss is nan .*lost_loss.json, and the last checkpoint is intact. Start ag"):
        train(tmp_path / "out", "--epochs", 3)
    lost = json.loads((tmp_path / "out" / "lost_loss.json").read_text())
    assert lost["loss"] == "nan"
    assert len(lost["images"]) == 64
    assert all(line.startswith("image ") and ", class " in line for line in lost["images"])
    model = RideBfForImageClassification.from_pretrained(tmp_path / "out" / "last")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_loss_that_is_lost_before_the_first_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match=r"loss is nan near step \d+ .*lost_loss.json. Start again in another --outp"):
        train(tmp_path / "out", "--epochs", 1, "--learning_rate", 1e30, "--logging_steps", 1)


@pytest.mark.parametrize(
    "options",
    [
        "--batchformer insert",
        "--batchformer insert --batchformer_layer_scale_init_value 0",
        "--batchformer none --num_experts 1 --loss ldam --classifier cosine",
        "--batchformer none --num_experts 1 --loss cross_entropy --classifier linear",
        "--batchformer none --loss focal",
        "--loss reweighted_cross_entropy --schedule cosine",
        "--loss balanced_softmax",
        "--batchformer none --loss collaborative",
    ],
)
def test_methods(tmp_path, options):
    train(tmp_path / "out", "--epochs", 2, *options.split())
    losses = [line["train_loss"] for line in read_metrics(tmp_path / "out")]
    assert losses[1] < losses[0]
    assert_reloads_to_the_same(tmp_path / "out")


ROUTER = (
    "--batchformer none --router true --router_top_k 5 --train_only router --sampler class_balanced "
    "--schedule cosine --warmup_epochs 1 --learning_rate 0.01"
)


def test_router_stage(uninterrupted, tmp_path):
    """Everything but the router stays as it was, statistics included; the test report tells the experts' use."""
    train(tmp_path / "out", "--epochs", 3, "--init_from", uninterrupted / "last", *ROUTER.split())
    losses = [line["train_loss"] for line in read_metrics(tmp_path / "out")]
    assert losses[-1] < losses[0]
    before = load_file(uninterrupted / "last" / "model.safetensors")
    after = load_file(tmp_path / "out" / "last" / "model.safetensors")
    kept = {name for name in after if not name.startswith("router.")}
    assert kept == {name for name in before if not name.startswith("batchformer.")}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert_reloads_to_the_same(tmp_path / "out")
    used = json.loads((tmp_path / "out" / "test_results.json").read_text())["test"]
    for group in ("", "many_shot_", "medium_shot_", "few_shot_"):
        assert sum(used[f"{group}experts_used"]) == pytest.approx(1)


def test_classifier_retraining(uninterrupted, tmp_path):
    options = "--batchformer none --train_only classifiers --sampler class_balanced --loss cross_entropy"
    train(tmp_path / "out", "--epochs", 3, "--init_from", uninterrupted / "last", *options.split())
    losses = [line["train_loss"] for line in read_metrics(tmp_path / "out")]
    assert losses[-1] < losses[0]
    before = load_file(uninterrupted / "last" / "model.safetensors")
    after = load_file(tmp_path / "out" / "last" / "model.safetensors")
    for name, tensor in after.items():
        assert torch.equal(before[name], tensor) != name.startswith("classifiers."), name


def test_distillation(uninterrupted, tmp_path):
    alone = train(tmp_path / "alone", "--epochs", 2)
    taught = train(tmp_path / "taught", "--epochs", 2, "--teacher", uninterrupted / "best", "--distillation_factor", 2)
    losses = [line["train_loss"] for line in read_metrics(taught)]
    assert losses[1] < losses[0]
    assert losses[0] > read_metrics(alone)[0]["train_loss"], "the divergence from the teacher is on top"


@pytest.mark.parametrize("sampler", ["square_root", "class_balanced", "progressively_balanced"])
def test_samplers(tmp_path, sampler):
    train(tmp_path / "out", "--epochs", 2, "--sampler", sampler, "--sampler_epoch", "largest_class")
    first, second = read_metrics(tmp_path / "out")
    assert second["validation_accuracy"] > first["validation_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--depths 2 1 1 --init_from {run}/last", r"is another network: depths \[1, 1, 1\] there, \[2, 1, 1\] here"),
        ("--recipe digits_lt_resnet32_distilled", "name the teacher with --teacher"),
        ("--recipe digits_lt_resnet32_router --batchformer none", "needs a trained model: name it with --init_from"),
        ("--recipe digits_lt_resnet32_router --batchformer none --init_from x --teacher y", "not from a --teacher"),
        ("--teacher {run}/nowhere", "there is no folder .*nowhere"),
        ("--teacher {other}", r"has 5 classes, the data 10; .*must know the same classes"),
        ("--dataset imagenet_lt --data_dir {run}", "imagenet_lt needs the lists .*ImageNet_LT_train.txt"),
        ("--validation_fraction 0.1", "has a validation split of its own"),
        ("--init_from {run}/nowhere", "there is no folder .*nowhere"),
        ("--recipe digits_lt_resnet32_router --router_top_k 11 --batchformer none --init_from {run}/last", "not 11"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(uninterrupted, tmp_path, options, message):
    tiny_model(num_labels=5).save_pretrained(tmp_path / "other")
    options = options.format(run=uninterrupted, other=tmp_path / "other")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        train(tmp_path / "out", "--epochs", 1, *options.split())
    assert not (tmp_path / "out" / "last").exists()


def test_a_model_of_other_classes_is_started_from_without_its_classifiers(tmp_path):
    options = {"depths": [1, 1, 1], "hidden_sizes": [16, 24, 48], "batchformer": "shared_classifier"}
    other = tiny_model(num_labels=5, **options)
    other.save_pretrained(tmp_path / "other")
    model = tiny_model(num_labels=10, **options)
    before = model.classifiers[0].weight.clone()
    initialise_from(model, tmp_path / "other")
    assert torch.equal(model.classifiers[0].weight, before)
    assert torch.equal(model.batchformer.layers[0].linear1.weight, other.batchformer.layers[0].linear1.weight)


def test_a_run_that_died_before_its_first_checkpoint_is_no_run(tmp_path, monkeypatch):
    def dies(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_epoch", dies)
    for _ in range(2):  # begun again without being asked to overwrite anything
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "out", "--epochs", 1)


def test_a_death_between_two_renames_is_recovered_from(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    for name in ("last", "best"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / f".{name}.previous")
    train(tmp_path / "out", "--epochs", 4, "--resume")
    assert_same_weights(tmp_path / "out" / "best", uninterrupted / "best")
    assert not list((tmp_path / "out").glob(".*"))


def test_overwriting_leaves_nothing_of_the_earlier_run(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    (tmp_path / "out" / ".last.previous").mkdir()
    (tmp_path / "out" / ".best.writing").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    train(tmp_path / "out", "--epochs", 1, "--overwrite_output_dir")
    assert len(read_metrics(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out" / "notes.txt").exists(), "what no run wrote is not deleted"


def test_a_line_of_metrics_is_lost_or_doubled_by_no_interruption(uninterrupted, tmp_path, monkeypatch):
    """A death after the line was written and before the checkpoint was: the epoch is done again."""
    save = train_accelerate.save_training_state

    def dies_in_epoch_two(folder, accelerator, model, processor, facts, keep):
        if facts["epoch"] == 2:
            raise KeyboardInterrupt
        save(folder, accelerator, model, processor, facts, keep)

    monkeypatch.setattr(train_accelerate, "save_training_state", dies_in_epoch_two)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", "--epochs", 4)
    monkeypatch.setattr(train_accelerate, "save_training_state", save)
    train(tmp_path / "out", "--epochs", 4, "--resume")
    assert [line["epoch"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / "out" / "last", uninterrupted / "last")


def test_fp16_on_a_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit, match="fp16 needs a GPU"):
        train(tmp_path / "out")


def test_bf16(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tmp_path / "out", "--epochs", 1)
    assert read_metrics(tmp_path / "out")[0]["train_loss"] > 0
    weights = load_file(tmp_path / "out" / "last" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}


def test_a_killed_run_goes_on_where_it_was(uninterrupted, tmp_path):
    """SIGKILL after two epochs, resumed by `accelerate launch` from another folder, in an interpreter of its own."""
    command = (TRAIN, *SMALL_ARGUMENTS, "--output_dir", tmp_path / "out", "--epochs", 4)
    process = Command(*command, folder=tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    process.wait_until(lambda: metrics.is_file() and len(read_metrics(tmp_path / "out")) >= 2)
    process.signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    launcher = ("accelerate.commands.launch", "--num_processes", 1)
    printed = run(*launcher, *command, "--resume", folder=tmp_path)
    assert "resumed after epoch" in printed
    assert "few-shot" in printed
    assert [line["epoch"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3, 4]
    assert_same_weights(uninterrupted / "last", tmp_path / "out" / "last")


def test_two_processes(tmp_path):
    """Distributed data parallelism over gloo, in interpreters of their own; every test image is counted once."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    command = (TRAIN, *SMALL_ARGUMENTS, "--output_dir", tmp_path / "out", "--epochs", 1)
    printed = run(*torchrun, *command, folder=tmp_path, ACCELERATE_USE_CPU="true")
    assert "2 process(es) on cpu" in printed
    results = json.loads((tmp_path / "out" / "test_results.json").read_text())
    hits = [accuracy * 50 for accuracy in results["test"]["per_class_accuracy"]]
    assert hits == pytest.approx([round(hit) for hit in hits])
    assert results["test"]["accuracy"] == pytest.approx(sum(hits) / 500)
    assert len(read_metrics(tmp_path / "out")) == 1
    RideBfForImageClassification.from_pretrained(tmp_path / "out" / "best")
