"""Saved models, by folder or Hub id."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from data.hub_ids import is_hub_id
from modeling_ride_bf import RideBfForImageClassification


def check_exists(folder: str | Path) -> None:
    """Raises ValueError for what is neither a folder on this machine nor an id that the Hub accepts."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; name the folder of a saved model")
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ValueError(f"{folder} does not exist, and the Hub accepts no such id; name a folder or USER/NAME")


def load_model(folder: str | Path) -> RideBfForImageClassification:
    """A saved model of ours, by folder or Hub id; code that comes with it is not run. Raises as `check_exists`."""
    check_exists(folder)
    return RideBfForImageClassification.from_pretrained(folder)


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
