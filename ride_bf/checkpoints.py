"""Folders that are never half written, and what is in a checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

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
    `find_checkpoint` looks for it.
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


def save_model(folder: Path, accelerator: Accelerator, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Writes a folder that `from_pretrained` and `pipeline` load: weights, configuration, code, image processor."""
    write_folder(folder, accelerator, lambda path: _write_model(path, accelerator, model, processor))


def save_training_state(
    folder: Path, accelerator: Accelerator, model: PreTrainedModel, processor: BaseImageProcessor
) -> None:
    """Like `save_model`, and beside the model what `Accelerator.load_state` needs to go on training."""

    def write(path: Path) -> None:
        accelerator.save_state(str(path))
        _write_model(path, accelerator, model, processor)

    write_folder(folder, accelerator, write)


def _write_model(path: Path, accelerator: Accelerator, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(path)
        processor.save_pretrained(path)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint to resume from. Raises FileNotFoundError if there is none, saying what to do."""
    for candidate in (folder, _previous(folder)):
        if (candidate / _STATE_FILE).is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} is no checkpoint to resume from; start without --resume, or name the run's --output_dir"
    )
