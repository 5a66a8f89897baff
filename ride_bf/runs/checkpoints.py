"""Writes checkpoints that are never half written, reads them, and finds damaged ones."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

LAST, BEST, OLDER = "last", "best", "checkpoints"
TRAINING_STATE = "training_state"  # subfolder that a checkpoint needs for resuming
# Written by Accelerator.save_state, the second one if the network is divided among the processes
_STATE_FILES = (f"{TRAINING_STATE}/optimizer.bin", _SHARDED_STATE := f"{TRAINING_STATE}/optimizer_0/.metadata")
_MANIFEST = "files.json"  # every file's length and checksum, written last
FACTS = "checkpoint.json"
# Words in the errors of torch and safetensors when a file cannot be written
_WRITE_ERRORS = ("file write failed", "failed writing", "i/o error", "no space left", "os error")


class CheckpointError(OSError):
    """A checkpoint could not be written. The previous one is unchanged."""


def write_folder(folder: Path, accelerator: Accelerator, write: Callable[[Path], None]) -> Path | None:
    """Every process calls `write(path)` on an empty folder, which then replaces `folder`.

    All files are on the disk before the folder gets its name. If the file system can exchange two names, `folder`
    exists at every instant. If it cannot, and a process dies between two renames, `recover` restores the folder.

    Returns the place of the former content of `folder` to the main process, which keeps or removes it; None if there
    was none. Raises CheckpointError if the files cannot be written, for example because the disk is full. Any other
    error of `write` is raised unchanged. In both cases `folder` is untouched.
    """
    new = _beside(folder, "writing")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(new)
        accelerator.wait_for_everyone()
        former = None
        if accelerator.is_main_process:
            _write_manifest(new)
            _sync(new)
            former = _put_in_place(new, folder)
            _sync_folder(folder.parent)
    except Exception as error:
        if accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)  # a half-written folder only takes up space
        if not is_write_error(error):
            raise
        before = f"; the previous checkpoint is untouched: {folder}" if folder.exists() else ""
        raise CheckpointError(f"{folder} could not be written ({error}){before}. {_remedy(error)}") from error
    accelerator.wait_for_everyone()
    return former


def is_write_error(error: Exception) -> bool:
    """Whether an error comes from writing a file. torch and safetensors have no special type for it."""
    if isinstance(error, OSError):
        return True
    by_name = type(error).__name__ in ("RuntimeError", "SafetensorError")  # memory errors of CUDA have another type
    return by_name and any(words in str(error).lower() for words in _WRITE_ERRORS)


def _remedy(error: Exception) -> str:
    text = str(error).lower()
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or not isinstance(error, OSError):  # the errors of the libraries rarely say why writing failed
        return "Free space on the disk"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS) or "permission" in text:
        return "Give this user write permission there"
    return "Check the disk"


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _write_manifest(folder: Path) -> None:
    entries = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, folder: Path) -> Path | None:
    if not folder.exists():
        new.rename(folder)
        return None
    former = _beside(folder, "previous")
    shutil.rmtree(former, ignore_errors=True)
    if _exchange(new, folder):
        new.rename(former)
    else:
        folder.rename(former)
        new.rename(folder)
    return former


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names atomically with Linux's renameat2. Returns False if the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def recover(folder: Path) -> None:
    """Restores the former content of a folder if a process died while it was being replaced."""
    if not folder.exists() and _beside(folder, "previous").exists():
        _beside(folder, "previous").rename(folder)


def save_model(
    folder: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    facts: dict[str, Any],
) -> None:
    """Writes a folder that `from_pretrained` and `pipeline` load: weights, configuration, code, image processor.

    The `facts` about the checkpoint go into its own `checkpoint.json`, so they always belong to these weights.
    """
    former = write_folder(folder, accelerator, lambda path: _write_model(path, accelerator, model, processor, facts))
    if former is not None:
        shutil.rmtree(former)


def save_training_state(
    output_dir: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    facts: dict[str, Any],
    keep: int = 1,
) -> None:
    """Writes `output_dir/last`: the files of `save_model`, and the state that training needs to resume.

    The newest `keep - 1` of the former checkpoints stay in `output_dir/checkpoints`.
    """
    folder = output_dir / LAST

    def write(path: Path) -> None:
        accelerator.save_state(str(path / TRAINING_STATE))
        accelerator.wait_for_everyone()
        _write_model(path, accelerator, model, processor, facts)
        if accelerator.is_main_process:
            _share_equal_file(path / TRAINING_STATE / "model.safetensors", path / "model.safetensors")

    former = write_folder(folder, accelerator, write)
    if former is not None:
        _keep_older(former, output_dir / OLDER, keep - 1)


def _write_model(path, accelerator, model, processor, facts) -> None:
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(path)
        processor.save_pretrained(path)
        write_facts(path, facts)


def _share_equal_file(one: Path, other: Path) -> None:
    """Stores two files with the same content only once, if the file system can."""
    if one.is_file() and _checksum(one) == _checksum(other):
        with contextlib.suppress(OSError):
            linked = other.with_name(f"{other.name}.linked")
            os.link(one, linked)
            linked.replace(other)


def _keep_older(former: Path, older: Path, keep: int) -> None:
    if keep > 0 and is_training_state(former):
        older.mkdir(exist_ok=True)
        name = older / f"step-{read_facts(former).get('step', 0):08d}"
        shutil.rmtree(name, ignore_errors=True)
        former.rename(name)
    else:
        shutil.rmtree(former)
    for path in _older_checkpoints(older)[max(0, keep) :]:
        shutil.rmtree(path)
    if older.is_dir() and not any(older.iterdir()):
        older.rmdir()


def _older_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads the facts that `save_model` wrote into `folder`; empty if there are none.

    Raises ValueError, which names the file, if it is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged: it does not hold a JSON object")
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the facts that `read_facts` reads."""
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def update_manifest(folder: Path, name: str) -> None:
    """Records the new content of a file that was changed on purpose, such as config.json, as undamaged."""
    path = folder / _MANIFEST
    if path.is_file():
        changed = folder / name
        entries = {**json.loads(path.read_text()), name: [changed.stat().st_size, _checksum(changed)]}
        path.write_text(json.dumps(entries, indent=1) + "\n")


def is_checkpoint(folder: Path) -> bool:
    """Whether a run wrote `folder`. It may be damaged."""
    return any((folder / name).is_file() for name in (_MANIFEST, FACTS))


def is_training_state(folder: Path) -> bool:
    """Whether training can resume from `folder`, if it is undamaged."""
    return any((folder / name).is_file() for name in _STATE_FILES)


def check_loadable(folder: Path, sharded: bool) -> None:
    """Raises ValueError if FSDP wrote the training state in `folder` and cannot read it, or the other way round."""
    if (folder / _SHARDED_STATE).is_file() != sharded:
        written, remedy = ("without FSDP", "--multi_gpu") if sharded else ("under FSDP", "configs/fsdp.yaml")
        raise ValueError(
            f"{folder} was written {written}, and its optimizer can only be read that way; launch with {remedy}, or "
            f"start a new run with --init_from {folder}"
        )


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are all unchanged."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text())
        for name, (size, checksum) in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if _checksum(path) != checksum:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError) as error:
        return f"its list of files cannot be read: {error}"
    return None


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, or None, and what is wrong with each newer one."""
    problems = []
    for folder in (output_dir / LAST, *_older_checkpoints(output_dir / OLDER)):
        if folder.exists():
            problem = damage(folder)
            if problem is None and not is_training_state(folder):
                problem = "it has no training state"
            if problem is None:
                return folder, problems
            problems.append(f"{folder}: {problem}")
    return None, problems
