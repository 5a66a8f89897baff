"""Saved models, by folder or Hub id."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from data.hub_ids import is_hub_id
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.runs.checkpoints import BEST, LAST


def check_exists(folder: str | Path) -> None:
    """Raises ValueError for what is neither a folder on this machine nor an id that the Hub accepts."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; name the folder of a saved model")
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ValueError(f"{folder} does not exist, and the Hub accepts no such id; name a folder or USER/NAME")


def find_model(place: str | Path) -> str | Path:
    """The model at a place: of a run's output folder its checkpoint `best`, else `last`; any other place itself.

    Raises ValueError for a folder that holds no model, and as `check_exists`.
    """
    check_exists(place)
    folder = Path(place)
    if not folder.is_dir():
        return place  # an id on the Hub
    for candidate in (folder, folder / BEST, folder / LAST):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no model; name a run's output folder, or a checkpoint in it such as {BEST}")


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
