"""Clients of the network that are not our own training command: transformers.Trainer, nn.DataParallel, the README."""

import copy
import logging
import re
from importlib import import_module

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_utils import get_last_checkpoint

from configuration_ride_bf import RideBfConfig
from data import load_long_tailed
from modeling_ride_bf import RideBfForImageClassification, RideBfModel
from ride_bf.evaluation.compute import profile
from ride_bf.methods import BatchFormer, SharedClassifierObjective, TrainerLoss, make_objective
from ride_bf.methods.windows import BatchFormerWindows, set_window, set_windows
from ride_bf.recipes import RECIPES

COUNTS = [12, 8, 5, 3, 2]


class Images(Dataset):
    """Thirty images whose class is in their brightness."""

    labels = np.repeat(np.arange(5), COUNTS)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pixel_values = torch.randn(3, 12, 12, generator=generator) * 0.1 + float(self.labels[index]) - 2
        return {"pixel_values": pixel_values, "labels": int(self.labels[index])}


def accuracy(evaluated):
    """What every example of the library computes."""
    return {"accuracy": float((np.argmax(evaluated.predictions, axis=1) == evaluated.label_ids).mean())}


def arguments(folder, **options):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 10, "learning_rate": 0.01, "seed": 0}
    settings |= {"save_strategy": "epoch", "eval_strategy": "epoch"}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **{**settings, **options})


NETWORKS = {
    "plain": {},
    "shared classifier": {"batchformer": "shared_classifier"},
    "insert": {"batchformer": "insert"},
    "router": {"router": True, "router_top_k": 2},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_trainer_trains_evaluates_and_predicts(tmp_path, name):
    trainer = Trainer(
        tiny_model(**NETWORKS[name]),
        arguments(tmp_path),
        train_dataset=Images(),
        eval_dataset=Images(),
        compute_metrics=accuracy,
    )
    trainer.train()
    predicted = trainer.predict(Images())
    assert predicted.predictions.shape == (30, 5)
    assert np.isfinite(predicted.predictions).all()
    assert predicted.metrics["test_accuracy"] == accuracy(predicted)["accuracy"]
    model = RideBfForImageClassification.from_pretrained(get_last_checkpoint(tmp_path))
    batch = [Images()[index] for index in range(30)]
    with torch.no_grad():
        logits = model(torch.stack([image["pixel_values"] for image in batch])).logits
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits, rtol=1e-4, atol=1e-4)


def test_trainer_resumes(tmp_path):
    def train(folder, epochs, resume=None, **options):
        trainer = Trainer(tiny_model(), arguments(folder, num_train_epochs=epochs, **options), train_dataset=Images(),
                          eval_dataset=Images())  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    constant = {"lr_scheduler_type": "constant"}
    whole = train(tmp_path / "whole", 3, **constant)
    train(tmp_path / "parts", 1, **constant)
    resumed = train(tmp_path / "parts", 3, get_last_checkpoint(tmp_path / "parts"), **constant)
    for parameter, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
    ],
    ids=lambda extra: " ".join(extra),
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its name before transformers 5.23
def test_trainer_s_switches(tmp_path, extra):
    trainer = Trainer(tiny_model(), arguments(tmp_path, **extra), train_dataset=Images(), eval_dataset=Images())
    losses = [trainer.train().training_loss, trainer.evaluate()["eval_loss"]]
    assert np.isfinite(losses).all()


def test_a_16_bit_network_takes_the_pixels_of_image_processors(images):
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(images).logits
        logits = model.to(torch.bfloat16)(images).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    with pytest.raises(TypeError, match=r"torch.float64, the model is torch.bfloat16"):
        model(images.double())


RECIPE = RECIPES["cifar100_lt_resnet32"].with_overrides(
    epochs=4, lr_steps=(3,), reweight_epoch=2, batchformer="shared_classifier"
)


def recipe_for(network, **options):
    return RECIPE.with_overrides(batchformer=NETWORKS[network].get("batchformer", "none"), **options)


def trainer_with(loss, folder, network="shared classifier", **options):
    return Trainer(
        tiny_model(**NETWORKS[network]),
        arguments(folder, **options),
        train_dataset=Images(),
        eval_dataset=Images(),
        compute_metrics=accuracy,
        compute_loss_func=loss,
        callbacks=[loss],
    )


class Recorded(nn.Module):
    """An objective that records in which steps the loss was re-weighted."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective
        self.reweighted = []

    def forward(self, outputs, batch, reweight):
        self.reweighted.append(reweight)
        return self.objective(outputs, batch, reweight=reweight)


def recording_loss(recipe):
    loss = TrainerLoss(recipe, COUNTS)
    loss.objective = Recorded(loss.objective)
    return loss


@pytest.mark.parametrize("network", list(NETWORKS))
def test_the_loss_trains_and_evaluates(tmp_path, network):
    """In evaluation it is what the model says itself, with a router too."""
    trainer = trainer_with(recording_loss(recipe_for(network)), tmp_path, network, num_train_epochs=4)
    trainer.train()
    assert trainer.compute_loss_func.objective.reweighted == [False] * 6 + [True] * 6
    metrics = trainer.evaluate()
    plain = Trainer(trainer.model, arguments(tmp_path), eval_dataset=Images(), compute_metrics=accuracy).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert metrics["eval_accuracy"] == plain["eval_accuracy"]


@pytest.mark.parametrize("stop", [3, 8], ids=["between epochs", "within the third epoch"])
def test_the_loss_resumes(tmp_path, stop):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == stop

    def train(folder, resume=None, callbacks=()):
        loss = recording_loss(RECIPE)
        trainer = trainer_with(loss, folder, num_train_epochs=4, save_strategy="no", lr_scheduler_type="constant")
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), loss.objective.reweighted

    whole, reweighted = train(tmp_path / "whole")
    _, first = train(tmp_path / "parts", callbacks=[Stop()])
    resumed, second = train(tmp_path / "parts", resume=get_last_checkpoint(tmp_path / "parts"))
    assert first + second == reweighted == [False] * 6 + [True] * 6
    for parameter, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[parameter], rtol=1e-5, atol=1e-6)


def test_an_epoch_of_the_recipe_may_be_several_of_trainer(tmp_path):
    recipe = recipe_for("plain", passes_per_epoch=2, reweight_epoch=1)
    loss = recording_loss(recipe)
    trainer_with(loss, tmp_path, "plain", num_train_epochs=4, per_device_train_batch_size=30).train()
    assert loss.objective.reweighted == [False, False, True, True]


def test_trainer_starts_the_batchformer_in_its_epoch(tmp_path):
    recipe = recipe_for("shared classifier", batchformer_start_epoch=1)
    trainer = trainer_with(TrainerLoss(recipe, COUNTS), tmp_path, num_train_epochs=2)
    seen = [copy.deepcopy(trainer.model.batchformer.state_dict())]

    class AfterEpoch(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            seen.append(copy.deepcopy(model.batchformer.state_dict()))

    trainer.add_callback(AfterEpoch())
    trainer.train()
    weights = [torch.cat([tensor.flatten() for tensor in state.values()]) for state in seen]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_accumulated_batches_give_the_loss_of_the_whole(tmp_path):
    """Its gradient is that of one batch with all images of the step, the last and smaller batch included."""
    recipe = recipe_for("plain", loss="ldam")

    def gradient(**options):
        trainer = trainer_with(TrainerLoss(recipe, COUNTS), tmp_path, "plain", num_train_epochs=1,
                               eval_strategy="no", max_grad_norm=0.0, **options)  # fmt: skip
        for module in trainer.model.modules():  # its statistics differ between batches
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
        seen = []

        class Gradient(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                seen.append([parameter.grad.clone() for parameter in model.parameters()])

        trainer.add_callback(Gradient())
        trainer.train()
        (gradients,) = seen
        return gradients

    whole = gradient(per_device_train_batch_size=30)
    for part, expected in zip(
        gradient(per_device_train_batch_size=8, gradient_accumulation_steps=4), whole, strict=True
    ):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_the_loss_does_not_grow_with_the_gpus_of_data_parallel(tmp_path, gpus, average, training):
    """Trainer's own arithmetic around the loss of the gathered outputs."""
    loss = TrainerLoss(RECIPE, COUNTS)
    trainer = trainer_with(loss, tmp_path, average_tokens_across_devices=average)
    trainer.args._n_gpu = gpus
    loss.on_train_begin(trainer.args, trainer.state, None, model=trainer.model)
    batch = {
        "pixel_values": torch.stack([Images()[index]["pixel_values"] for index in range(30)]),
        "labels": torch.as_tensor(Images.labels),
    }
    trainer.model.train(training)
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    with torch.set_grad_enabled(training):
        value = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).mean()
        outputs = trainer.model(**batch)
        expected = make_objective(RECIPE, COUNTS)(outputs, batch) if training else outputs.loss
    torch.testing.assert_close(value, expected)


def test_the_loss_moves_to_the_outputs():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weights", torch.ones(5))

        def forward(self, outputs, batch, reweight):
            return (outputs * self.weights).sum()

    loss = TrainerLoss(RECIPE, COUNTS)
    loss.objective, loss.passes_begun = Weighted(), 1
    assert loss(torch.ones(2, 5, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": 0.2}, r"mixup_alpha 0.2 .* two labels.*with_overrides\(mixup_alpha=0, cutmix_alpha=0\)"),
        ({"cutmix_alpha": 1.0}, r"cutmix_alpha 1.0 .* two labels"),
        ({"needs_teacher": True}, "distils a teacher, which needs the images.*train_accelerate.py"),
        ({"train_only": "classifiers", "batchformer": "none"}, "train_only 'classifiers' freezes.*train_accelerate.py"),
    ],
)
def test_recipes_that_are_more_than_a_loss_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerLoss(RECIPE.with_overrides(**options), COUNTS)


def test_a_loss_that_trainer_knows_only_half_is_refused(tmp_path):
    loss = TrainerLoss(RECIPE, COUNTS)
    model = tiny_model(batchformer="shared_classifier")
    with pytest.raises(ValueError, match=r"does not know the epoch.*callbacks=\[loss\]"):
        Trainer(model, arguments(tmp_path), train_dataset=Images(), eval_dataset=Images(),
                compute_loss_func=loss).train()  # fmt: skip
    with pytest.raises(ValueError, match="compute_loss_func=loss too"):
        Trainer(model, arguments(tmp_path), train_dataset=Images(), eval_dataset=Images(), callbacks=[loss]).train()


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (
            "insert",
            {},
            r"batchformer 'shared_classifier' and the model 'insert'.*with_overrides\(batchformer='insert'\)",
        ),
        ("shared classifier", {"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1 would do nothing"),
    ],
)
def test_what_does_not_suit_the_recipe_is_refused(tmp_path, network, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_with(TrainerLoss(RECIPE, COUNTS), tmp_path, network, **options).train()


def test_the_loss_sets_the_window(tmp_path):
    loss = TrainerLoss(RECIPE.with_overrides(batchformer_window=5), COUNTS)
    trainer = trainer_with(loss, tmp_path, max_steps=1, eval_strategy="no")
    trainer.train()
    assert trainer.model.batch_module.windows == BatchFormerWindows(5)
    trainer.args._n_gpu = 2
    loss.recipe = RECIPE.with_overrides(batchformer_window="global")
    with pytest.raises(ValueError, match="'global' cannot reach across the 2 GPUs of one process"):
        loss.on_train_begin(trainer.args, trainer.state, None, model=trainer.model)


@pytest.fixture
def warnings_of_transformers():
    """transformers' loggers do not pass their messages on to pytest's."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger("transformers"), logging.getLogger("ride_bf.methods.trainer_loss")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize(("window", "warned"), [(16, True), (10, False), ("global", False), ("local", False)])
def test_a_window_that_the_batches_cannot_fill_is_named(tmp_path, warnings_of_transformers, window, warned):
    loss = TrainerLoss(RECIPE.with_overrides(batchformer_window=window), COUNTS)
    trainer_with(loss, tmp_path, num_train_epochs=3, max_steps=1, eval_strategy="no").train()
    assert ("windows hold 10 images, not 16" in "".join(warnings_of_transformers)) == warned


@pytest.mark.parametrize(("epochs", "warned"), [(2, True), (3, False)])
def test_a_run_that_ends_before_re_weighting_says_so(tmp_path, warnings_of_transformers, epochs, warned):
    options = {"num_train_epochs": epochs, "per_device_train_batch_size": 30, "eval_strategy": "no"}
    trainer_with(TrainerLoss(RECIPE, COUNTS), tmp_path, **options).train()
    said = [message for message in warnings_of_transformers if "re-weights after epoch 2" in message]
    assert bool(said) == warned


def images_with_a_transform():
    rows = datasets.Dataset.from_dict({"index": list(range(30)), "label": Images.labels.tolist()})

    def pixels(rows):
        return {
            "pixel_values": [Images()[index]["pixel_values"] for index in rows["index"]],
            "labels": rows["label"],
        }

    return rows.with_transform(pixels)


def test_removed_columns_are_named(tmp_path):
    loss = TrainerLoss(RECIPE, COUNTS)
    model = tiny_model(batchformer="shared_classifier")
    options = {"eval_strategy": "no", "max_steps": 1}

    def train(**extra):
        return Trainer(
            model,
            arguments(tmp_path, **options, **extra),
            train_dataset=images_with_a_transform(),
            compute_loss_func=loss,
            callbacks=[loss],
        ).train()

    with pytest.raises(ValueError, match=r"no column 'pixel_values', only \['label'\].*remove_unused_columns=False"):
        train()
    assert np.isfinite(train(remove_unused_columns=False).training_loss)
    with pytest.raises(ValueError, match=r"got none.*remove_unused_columns=False"):
        model(labels=torch.arange(5))


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="has no labels: give the data set a column 'label'"):
        TrainerLoss(RECIPE, COUNTS)(None, None)


def code_of(page, word):
    """The Python example of a page that has a word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


def test_the_readme_s_trainer(tmp_path, monkeypatch):
    """The recipe's own network has a BatchFormer that shares the classifier."""
    code = code_of("README.md", "compute_loss_func")
    assert len(code.splitlines()) <= 12
    assert "cifar100_lt_resnet32" in code
    monkeypatch.setitem(RECIPES, "cifar100_lt_resnet32", RECIPE.with_overrides(depths=[1, 1, 1]))
    names = {"class_counts": COUNTS, "train": Images()}
    exec(code.replace('"outputs/trainer"', f"{str(tmp_path)!r}, report_to='none', use_cpu=True"), names)
    trainer, module = names["trainer"], names["model"].batch_module
    before = module.layers[0].linear1.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, module.layers[0].linear1.weight), "its stream is trained"
    assert np.isfinite(trainer.evaluate(Images())["eval_loss"])
    assert isinstance(names["loss"].objective, SharedClassifierObjective)


def test_the_page_on_trainer(tmp_path, monkeypatch):
    few = {"epochs": 2, "passes_per_epoch": 1, "reweight_epoch": 1, "warmup_epochs": 0, "batchformer_window": 16}
    small = RECIPES["digits_lt_resnet32"].with_overrides(**few, batch_size=16, depths=[1, 1, 1])
    monkeypatch.setitem(RECIPES, "digits_lt_resnet32", small)
    dataset = load_long_tailed("digits_lt")
    labels = np.asarray(dataset["train"]["label"])
    of_each_class = [image for label in range(10) for image in np.flatnonzero(labels == label)[:3]]
    dataset = {"train": dataset["train"].select(of_each_class), "validation": dataset["validation"].shard(4, 0)}
    code = code_of("docs/trainer.md", "compute_loss_func")
    options = f"{str(tmp_path)!r}, report_to='none', use_cpu=True, save_strategy='epoch',"
    names = {"dataset": dataset}
    exec(code.replace('"outputs/trainer",', options), names)
    group = names["trainer"].optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert 0 <= names["trainer"].evaluate()["eval_accuracy"] <= 1


def test_the_page_on_the_batchformer():
    names = {}
    exec(code_of("docs/batchformer_alone.md", "both_streams"), names)
    assert (names["both"].shape, names["twice"].shape) == ((64, 64), (64,))


def test_the_page_s_module_takes_the_place_of_the_batchformer(tmp_path, monkeypatch):
    """It trains, and keeps the BatchFormer's name in a checkpoint."""
    (tmp_path / "batch_mean.py").write_text(code_of("docs/batchformer_alone.md", "_batch_module"))
    monkeypatch.syspath_prepend(tmp_path)
    page = import_module("batch_mean")
    network, kind = page.RideWithBatchMean, page.BatchMean
    assert isinstance(page.model.batch_module, kind)
    for mode in ("insert", "shared_classifier"):
        torch.manual_seed(0)
        model = network(tiny_config(batchformer=mode)).train()
        recipe = RECIPE.with_overrides(batchformer=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = {"labels": torch.arange(5)}
        make_objective(recipe, COUNTS)(model(torch.randn(5, 3, 12, 12)), batch).backward()
        optimizer.step()
        assert model.batch_module.share.abs().sum() > 0
        model.save_pretrained(tmp_path / mode)
        loaded = network.from_pretrained(tmp_path / mode)
        assert torch.equal(loaded.batch_module.share, model.state_dict()["batchformer.share"])
    set_window(model, "local")
    with pytest.raises(TypeError, match=r"BatchMean has no windows.*window 4.*set_windows\(windows\)"):
        set_window(model, 4)
    for options, named in (
        ({"batchformer_start_epoch": 2}, "batchformer_start_epoch 2 and batchformer_float32 False"),
        ({"batchformer_float32": True}, "batchformer_start_epoch 0 and batchformer_float32 True"),
    ):
        local = RECIPE.with_overrides(batchformer="insert", batchformer_window="local", **options)
        with pytest.raises(TypeError, match=rf"BatchMean has no windows, so it cannot have {named}: .*them to 0 and F"):
            set_windows(model, local, 0)
    kind.set_windows = lambda self, windows: setattr(self, "given", windows)
    set_window(model, 4)
    assert model.batch_module.given == BatchFormerWindows(4)
    assert network(tiny_config(batchformer="none")).batch_module is None


def test_the_parts_of_a_network_are_counted_with_another_module(monkeypatch):
    monkeypatch.setattr(RideBfForImageClassification, "_batch_module", lambda self, config: nn.Linear(8, 8))
    part = profile(tiny_config(batchformer="insert"), image_size=12, window=4)["BatchFormer"]
    assert part == {"parameters": 72, "multiply_adds": 3 * 8 * 8}


def test_the_readme_s_batchformer():
    """Trains on torchvision's network; one image's loss reaches the others; a prediction depends on its image alone."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 5])
    names = {"loader": [batch] * 2}
    exec(code_of("README.md", "resnet18"), names)
    backbone, classifier, batchformer = names["backbone"], names["classifier"], names["batchformer"]
    with torch.no_grad():
        together = classifier(batchformer(backbone(batch[0])))
        alone = classifier(batchformer(backbone(batch[0][:1])))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("shape", [(6, 16), (6, 3, 16)])
def test_gradients_cross_the_batch(shape, scale):
    torch.manual_seed(0)
    batchformer = BatchFormer(16, dropout=0.0, layer_scale_init_value=scale)
    features = torch.randn(shape, requires_grad=True)
    # not its sum, which the normalisation of the paper's layer holds constant
    batchformer(features)[0].square().mul(torch.arange(16)).sum().backward()
    assert all(own.abs().sum() > 0 for own in features.grad)
    assert torch.equal(batchformer.eval()(features), features)


@pytest.mark.parametrize("shape", [(16,), (4, 8), (2, 3, 4, 16), (4, 16, 2, 2)])
def test_features_of_another_shape_are_refused(shape):
    expected = rf"\(B, D\) or \(B, E, D\) with D = feature_size = 16, got {re.escape(str(shape))}"
    for training in (True, False):
        with pytest.raises(ValueError, match=expected):
            BatchFormer(16).train(training)(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_size": 30, "num_heads": 4}, "feature_size=30 channels, which 4 attention heads.*such as 15"),
        ({"feature_size": 16, "num_heads": 0}, "which 0 attention heads"),
        ({"feature_size": 130}, "which 4 attention heads cannot share equally; set num_heads to a divisor of 130"),
        ({"feature_size": 0}, r"feature_size \(0\) and num_layers \(1\) must both be 1 or more"),
        ({"feature_size": 16, "num_layers": 0}, r"num_layers \(0\) must both be 1 or more"),
        ({"feature_size": 16, "window": 0}, "must hold 1 image or more, not 0"),
        ({"feature_size": 16, "window": "all"}, "a window is 'local', 'global' or a number of images, not 'all'"),
        ({"feature_size": 16, "window": True}, "not True"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchFormer(**options)


def test_a_whole_number_may_start_the_gates():
    layer = BatchFormer(16, layer_scale_init_value=0).layers[0]
    assert layer.attention_gate.dtype == layer.feedforward_gate.dtype == torch.float32
    assert layer.attention_gate.requires_grad


def test_a_gate_of_zero_starts_as_the_identity_and_windows_part_the_batch():
    features = torch.randn(6, 16)
    torch.testing.assert_close(BatchFormer(16, layer_scale_init_value=0.0)(features), features)
    batchformer = BatchFormer(16, dropout=0.0, window=3)
    halves = torch.cat([batchformer(features[:3]), batchformer(features[3:])])
    torch.testing.assert_close(batchformer(features), halves)


def test_both_streams():
    batchformer, features, labels = BatchFormer(16), torch.randn(4, 16), torch.arange(4)
    both, twice = batchformer.both_streams(features, labels)
    assert both.shape == (8, 16)
    assert torch.equal(both[:4], features)
    assert twice.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batchformer.eval().both_streams(features, labels)[0] is features
    with pytest.raises(ValueError, match="features are of 4 images and labels of 8"):
        batchformer.both_streams(features, twice)


def replicas(model, monkeypatch):
    """What nn.DataParallel makes of a model on two GPUs: copies without parameters."""
    module = import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)

    def copies(tensors, devices, detach=False):
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return module.replicate(model, [0, 1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_replicas_of_data_parallel(monkeypatch, images, labels, name, training):
    """Copies have no parameters to ask for their type; outputs are gathered field by field."""
    model = tiny_model(**NETWORKS[name]).train(training)
    copies = replicas(model, monkeypatch)
    assert not list(copies[0].parameters())
    outputs = [
        copy(own, labels=classes, output_hidden_states=True)
        for copy, own, classes in zip(copies, images.chunk(2), labels.chunk(2), strict=True)
    ]
    expected = [model(own, labels=classes) for own, classes in zip(images.chunk(2), labels.chunk(2), strict=True)]
    for output, alone in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.logits, alone.logits)

    class Gather:
        @staticmethod
        def apply(_device, _dim, *tensors):
            return torch.stack(tensors) if tensors[0].ndim == 0 else torch.cat(tensors)

    monkeypatch.setattr("torch.nn.parallel.scatter_gather.Gather", Gather)
    gathered = import_module("torch.nn.parallel.scatter_gather").gather(outputs, "cpu")
    assert type(gathered) is type(outputs[0])
    assert gathered.logits.shape == (6, 5)
    assert gathered.expert_logits.shape == (6, 3, 5)
    assert gathered.hidden_states[0].shape[0] == 6


def checkpointed(model, **options):
    newer = "activation_checkpointing_enable"  # its name since transformers 5.23
    getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")(options or None)
    return model


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("parallel", [False, True], ids=["one device", "replicas"])
def test_a_recomputation_does_not_count_a_batch_again(monkeypatch, images, labels, parallel, options):
    """The buffers of the first replica are those of the model itself; the other replicas' are copies."""
    plain = tiny_model("bottleneck").train()
    repeated = checkpointed(copy.deepcopy(plain), **options)
    results = []
    for model in (plain, repeated):
        runs = replicas(model, monkeypatch) if parallel else [model]
        parts = zip(runs, images.chunk(len(runs)), labels.chunk(len(runs)), strict=True)
        sum(run(own, labels=classes).loss for run, own, classes in parts).backward()
        results.append([statistics(run) for run in runs])
    assert len(results[0]) == (2 if parallel else 1)
    for before, after in zip(*results, strict=True):
        assert before
        for name, expected in before.items():
            assert torch.equal(after[name], expected), name
    for (name, expected), actual in zip(plain.named_parameters(), repeated.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_a_recomputation_does_not_count_a_batch_again_in_other_normalisations(images, labels):
    """As SyncBatchNorm, which is no BatchNorm2d and needs a GPU."""

    class Counted(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, values):
            assert values.ndim == 4

    model = tiny_model("bottleneck").train()
    for module in list(model.modules()):
        if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
            module.bn = Counted(module.bn.num_features)
    checkpointed(model)(images, labels=labels).loss.backward()
    counts = [module.num_batches_tracked.item() for module in model.modules() if isinstance(module, Counted)]
    assert counts
    assert set(counts) == {1}


def test_auto_classes_build_an_imported_configuration():
    config = RideBfConfig(**tiny_config().to_diff_dict())
    assert type(AutoModelForImageClassification.from_config(config)) is RideBfForImageClassification
    assert type(AutoModel.from_config(config)) is RideBfModel


def test_a_pipeline_takes_a_model(warnings_of_transformers):
    processor = BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    classify = pipeline("image-classification", model=tiny_model().eval(), image_processor=processor)
    image = (np.random.default_rng(0).random((30, 30, 3)) * 255).astype("uint8")
    answers = classify(import_module("PIL.Image").fromarray(image), top_k=5)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)
    assert warnings_of_transformers == []


def test_a_folder_is_loaded_with_its_own_code_beside_ours(tmp_path, warnings_of_transformers):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    source = tmp_path / "modeling_ride_bf.py"
    source.write_text(source.read_text() + "\nOF_THIS_FOLDER = True\n")
    for auto, own in ((AutoModelForImageClassification, RideBfForImageClassification), (AutoModel, RideBfModel)):
        for _ in range(2):
            loaded = auto.from_pretrained(tmp_path, trust_remote_code=True)
            assert type(loaded).__name__ == own.__name__
            assert import_module(type(loaded).__module__).OF_THIS_FOLDER
    assert type(AutoModel.from_config(tiny_config())) is RideBfModel
    assert warnings_of_transformers == []
