"""What a model card calls a data set."""

from collections.abc import Mapping
from typing import Any

from data import CUSTOM
from data.sets import DATA_SETS
from ride_bf.hub.run_files import SavedRun


def dataset_title(saved: SavedRun) -> str | None:
    """The name of the training data for people; a link if they are a data set of the Hub."""
    if saved.hub_dataset is not None and saved.dataset == CUSTOM:
        return hub_link(saved.hub_dataset)
    return title_of(saved.dataset)


def title_of(dataset: str | None) -> str | None:
    """The name of a data set for people; None if it is unknown."""
    if dataset == CUSTOM:
        return "the author's own images"
    return DATA_SETS[dataset].title if dataset in DATA_SETS else dataset


def hub_link(hub_id: str) -> str:
    """A link to a data set of the Hub, in Markdown."""
    return f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"


def told_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that describe the data. What was left out of them is told by the numbers of images."""
    return {name: value for name, value in options.items() if name != "skip_empty_rows"}
