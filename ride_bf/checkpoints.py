"""Folders that are never half written, and what is in a checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

# Beside the model in a checkpoint from which training can go on; written by Accelerator.save_state.
_STATE_FILE = "optimizer.bin"


def _previous(folder: Path) -> Path:
    """Where a folder's last version is while the new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def write_folder(folder: Path, accelerator: Accelerator, write: Callable[[Path], None]) -> None:
    """Has every process call `write(path)` on an empty folder, which then replaces `folder`.

    A process that dies on the way leaves the last version, as `folder` or, within the moment of the exchange, where
    `recover` finds it.
    """
    new, previous = folder.with_name(f".{folder.name}.writing"), _previous(folder)
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in new.iterdir():  # on disk before it has the name
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        new.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    accelerator.wait_for_everyone()


def recover(folder: Path) -> None:
    """Puts a folder's last version back if a process died between taking it away and putting the new one there."""
    if not folder.exists() and _previous(folder).exists():
        _previous(folder).rename(folder)


def save_model(
    folder: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    facts: dict[str, Any],
) -> None:
    """Writes a folder that `from_pretrained` and `pipeline` load: weights, configuration, code, image processor.

    `facts` about the checkpoint go into its `checkpoint.json`, so that they cannot be of another one.
    """

    def write(path: Path) -> None:
        _write_model(path, accelerator, model, processor, facts)

    write_folder(folder, accelerator, write)


def save_training_state(
    folder: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    facts: dict[str, Any],
) -> None:
    """Like `save_model`, and beside the model what `Accelerator.load_state` needs to go on training."""

    def write(path: Path) -> None:
        accelerator.save_state(str(path))  # names the weights as save_pretrained does, which writes them once more
        _write_model(path, accelerator, model, processor, facts)

    write_folder(folder, accelerator, write)


def _write_model(path, accelerator, model, processor, facts) -> None:
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(path)
        processor.save_pretrained(path)
        (path / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `save_model` was told about the checkpoint in `folder`; empty if there is none."""
    path = folder / "checkpoint.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def is_training_state(folder: Path) -> bool:
    """Whether training can go on from `folder`."""
    return (folder / _STATE_FILE).is_file()
