"""Keeps the page of a published network: its card, and the pictures, numbers and other files that belong to it.

`save_pretrained` and `push_to_hub` of transformers write weights and code, and a card that says nothing.
"""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors import safe_open
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)
CARD = "README.md"
_CODE = ("LICENSE", "handler.py", "requirements.txt")  # true of the network, whatever its weights are
_RESULTS = (
    *("recipe.json", "checkpoint.json", "class_counts.json", "test_results.json", "results.json", "report.html"),
    *("preprocessor_config.json", "model.onnx", "model.onnx.data"),
    *("plots/*.png", "examples/*", "shown/*"),
)
_WEIGHTS = "model*.safetensors"
# Entries of a configuration that a save may change without changing the network
_NO_MATTER = ("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version")
_EMPTY_CARD = "This model card has been automatically generated"  # what transformers writes
_TRAINING_IMAGES = re.compile(r"## Published training images\n.*?(?=## )", re.DOTALL)  # which are not copied
_USE = re.compile(r'(pipeline\("image-classification", model=)"([^"]+)"')  # in our cards


_CHANGED = """---
{data}
---

# {title}

An image classifier that started from {source}. Its weights or its configuration are not those of that model,
so the results on the card there are not of this one. It has not been measured: `python -m ride_bf.evaluate` and
`ride_bf.publish` make a card with results.
"""


def keep_page(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> None:
    """Completes `folder`, where a network was just saved, by the page of the repository that it was loaded from.

    If weights and configuration are as they were, it is the whole page, without the training images that may be
    published there. Otherwise the numbers there are of another network, and the card says only what this one was made
    from. A card that is in `folder` already stays, unless transformers wrote it, or it is the old one of a network that
    has changed. Nothing is done for a network that was not loaded, or from a place without a card. `repo_id` is where
    the folder is uploaded to. If anything fails, a warning says so: weights must be saved in any case.
    """
    folder, place = Path(folder), model.config._name_or_path
    if not place or folder.resolve() == Path(place).resolve():
        return
    try:
        _keep_page(model, folder, place, repo_id)
    except Exception as error:  # of the Hub, of the network, of the disk, of a damaged card
        logger.warning(f"the card of {place} was not kept: {error}. Write one before you publish the model")


def _keep_page(model: PreTrainedModel, folder: Path, place: str, repo_id: str | None) -> None:
    source = _fetch(model, CARD, "config.json")
    if not (source / CARD).is_file():
        return
    card = ModelCard.load(source / CARD)
    unchanged = _same_network(model, folder)
    wanted = _CODE + _RESULTS if unchanged else _CODE
    source = _fetch(model, *wanted)
    for path in (path for pattern in wanted for path in source.glob(pattern)):
        name = path.relative_to(source).as_posix()
        copy = folder / name
        if path.is_file() and not copy.exists() and _is_public(path, name, card):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    present = ModelCard.load(folder / CARD).text.strip() if (folder / CARD).is_file() else _EMPTY_CARD
    if _EMPTY_CARD not in present and (unchanged or present != card.text.strip()):
        return
    text = _TRAINING_IMAGES.sub("", str(card)) if unchanged else _card_of_changed(card, place, repo_id)
    text = text if repo_id is None else _USE.sub(rf'\1"{repo_id}"', text)
    (folder / CARD).write_text(text, encoding="utf-8")


def _is_public(path: Path, name: str, card: ModelCard) -> bool:
    """Whether a file was published; other images may lie in a folder, and a report of `ride_bf.evaluate` shows some."""
    if path.name == "report.html":
        return b"data:image" not in path.read_bytes()
    return "/" not in name or name in str(card)


def _fetch(model: PreTrainedModel, *patterns: str) -> Path:
    """The folder that the network was loaded from; of a repository on the Hub, one with the files that are named."""
    place = model.config._name_or_path
    if Path(place).is_dir():
        return Path(place)
    revision = getattr(model.config, "_commit_hash", None)  # later versions of transformers do not keep it
    return Path(snapshot_download(place, revision=revision, allow_patterns=list(patterns)))


def _same_network(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the weights in `folder`, in whatever precision, and the configuration are those that were loaded."""
    source = _fetch(model, "config.json")
    before, now = (config.to_dict() for config in (type(model.config).from_pretrained(source), model.config))
    if any(before.get(key) != now.get(key) for key in before.keys() | now.keys() if key not in _NO_MATTER):
        return False
    with ExitStack() as opened:
        old, new = (_tensors(place, opened) for place in (_fetch(model, _WEIGHTS), folder))
        return old.keys() == new.keys() and all(
            torch.equal(file.get_tensor(name), old[name].get_tensor(name).to(file.get_tensor(name).dtype))
            for name, file in new.items()
        )


def _tensors(folder: Path, opened: ExitStack) -> dict[str, safe_open]:
    """Name of each tensor -> the file that has it."""
    files = [opened.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob(_WEIGHTS))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _card_of_changed(card: ModelCard, place: str, repo_id: str | None) -> str:
    """A card without results, and without the place on this machine if it was loaded from a folder."""
    used = _USE.search(card.text)
    base = place if not Path(place).is_dir() else used and used[2]
    data = ModelCardData(
        base_model=base,
        license=card.data.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=card.data.tags,
    )
    title = "A model that has not been measured" if repo_id is None else repo_id.rpartition("/")[2]
    source = "another model" if base is None else f"[{base}](https://huggingface.co/{base})"
    return _CHANGED.format(data=data, title=title, source=source)


__all__ = ["keep_page"]
