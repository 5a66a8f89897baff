"""Saved models, by folder or Hub id."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_ride_bf import RideBfForImageClassification


def check_exists(folder: str | Path) -> None:
    """Raises ValueError for what can only be a folder, not an id on the Hub, and is not there."""
    looks_local = Path(folder).is_absolute() or str(folder).startswith(".") or len(Path(folder).parts) > 2
    if looks_local and not Path(folder).is_dir():
        raise ValueError(f"{folder} does not exist, or is no folder")


def load_model(folder: str | Path) -> RideBfForImageClassification:
    """A saved model of ours, by folder or Hub id; code that comes with it is not run. Raises as `check_exists`.

    Its layout is that of training, so that an image's logits are the same to the last bit.
    """
    check_exists(folder)
    return to_fast_layout(RideBfForImageClassification.from_pretrained(folder))


def check_classes(model: PreTrainedModel, class_names: Sequence[str], who: str) -> None:
    """Raises ValueError if a model's classes are not `class_names`, in that order; unnamed ones are taken on trust.

    `who` is what the error calls the model.
    """
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    unnamed = names == [f"LABEL_{label}" for label in range(len(names))]
    if len(names) != len(class_names) or not (unnamed or names == list(class_names)):
        differing = [pair for pair in zip(names, class_names, strict=False) if pair[0] != pair[1]][:3]
        raise ValueError(
            f"{who} has {len(names)} classes, the data {len(class_names)}; the first that differ, the model's and the "
            f"data's: {differing}. It must know the same classes in the same order"
        )


def to_fast_layout(module: nn.Module) -> nn.Module:
    """The module itself, its convolutions' weights with the channels last, as the fast kernels want them.

    Feature maps follow the weights: pixel values may come in either layout.
    """
    return module.to(memory_format=torch.channels_last)
