"""Clients of the network that are not our own training command: transformers.Trainer, nn.DataParallel, the README."""

import re
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods import BatchFormer, SharedClassifierObjective, make_objective
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


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_trainer_s_switches(tmp_path, extra):
    trainer = Trainer(tiny_model(), arguments(tmp_path, **extra), train_dataset=Images(), eval_dataset=Images())
    losses = [trainer.train().training_loss, trainer.evaluate()["eval_loss"]]
    assert np.isfinite(losses).all()


def test_accumulated_batches_give_the_loss_of_the_whole(tmp_path):
    """`num_items_in_batch` is of all batches of a step."""
    recipe = RECIPES["cifar100_lt_resnet32"].with_overrides(batchformer="none")
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        value = make_objective(recipe, COUNTS)(outputs, {"labels": labels})
        seen.append((len(labels), num_items_in_batch))
        return value if num_items_in_batch is None else value * len(labels) / num_items_in_batch

    options = {"gradient_accumulation_steps": 3, "max_steps": 1, "eval_strategy": "no"}
    Trainer(tiny_model(), arguments(tmp_path, **options), train_dataset=Images(), compute_loss_func=loss).train()
    assert [(count, int(items)) for count, items in seen] == [(10, 30)] * 3


def code_of_readme(word):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


def test_the_readme_s_trainer(tmp_path):
    """With a BatchFormer that shares the classifier, evaluated too."""
    code = code_of_readme("compute_loss_func")
    model = tiny_model(batchformer="shared_classifier")
    before = model.batchformer.layers[0].linear1.weight.detach().clone()
    names = {"class_counts": COUNTS, "model": model, "train": Images()}
    options = f"{str(tmp_path)!r}, report_to='none', use_cpu=True, num_train_epochs=1"
    exec(code.replace('"outputs/trainer"', options), names)
    trainer = names["trainer"]
    trainer.train()
    assert not torch.equal(before, model.batchformer.layers[0].linear1.weight), "its stream is trained"
    assert np.isfinite(trainer.evaluate(Images())["eval_loss"])
    assert isinstance(names["objective"], SharedClassifierObjective)


def test_the_readme_s_batchformer():
    """Trains on torchvision's network; one image's loss reaches the others; a prediction depends on its image alone."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 5])
    names = {"loader": [batch] * 2}
    exec(code_of_readme("resnet18"), names)
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
    with pytest.raises(ValueError, match=r"features must be \(B, D\) or \(B, E, D\)"):
        batchformer(torch.randn(16))


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
