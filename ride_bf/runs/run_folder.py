"""The output folder of a training run: its files, and the checks before a run starts or resumes there."""

import json
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from data.notices import notify
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.changes import SOUND_CHANGES
from ride_bf.runs.checkpoints import (
    BEST,
    LAST,
    OLDER,
    is_checkpoint,
    is_training_state,
    newest_whole_checkpoint,
    recover,
)
from ride_bf.runs.environment import describe_environment

RECIPE, SETTINGS, METRICS = "recipe.json", "run.json", "metrics.jsonl"
ENVIRONMENT = "environment.json"  # one entry for every start of the run, including resumed ones
TEST_RESULTS = "test_results.json"  # written at the end of training
LOST_LOSS = "lost_loss.json"  # the images of the batch in which a loss was not finite
BROKEN_IMAGES = "broken_images.txt"  # one line each time a run skips a broken image
PUSH, PUSH_LOG = ".push", "push.log"  # of a push to the Hub in progress
EXCLUDED = "excluded_images.txt"  # a copy of the list that --exclude named when the run began
TENSORBOARD = "tensorboard"
LOCK = "run.lock"  # held during a run; the operating system releases it however the run ends
_RUN_ID = "id"  # in run.json: identifies the run for trackers

# Files of a run that has made progress. A new run beside them needs --overwrite_output_dir.
_RESULTS = (METRICS, TEST_RESULTS, LOST_LOSS)
_FILES = (RECIPE, SETTINGS, ENVIRONMENT, BROKEN_IMAGES, EXCLUDED, PUSH_LOG, *_RESULTS)


class RunFolder:
    """The output folder of one run, from its start to its end.

    Use it as a context manager. Once it is open, no other run can use the folder until the context ends.

    Attributes:
        path: the folder.
        run_id: identifies the run for trackers; a resumed run keeps it.
        checkpoint: the checkpoint to resume from; None for a new run.
    """

    def __init__(self, path: Path):
        self.path = path
        self.run_id = ""
        self.checkpoint: Path | None = None
        self._lock = FileLock(path / LOCK)

    def open(
        self,
        accelerator: Accelerator,
        recipe: TrainingRecipe,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: Collection[str] = (),
        check: Callable[[Path], object] = lambda checkpoint: None,
    ) -> None:
        """Prepares the folder for a new run, or finds the checkpoint to resume from.

        `settings` is what a result depends on, apart from the recipe: seed, data, initial weights and processes.
        `allow_changes` names settings that may differ from the resumed run, of `SOUND_CHANGES`. `check` raises
        ValueError for a checkpoint that this run cannot resume from, before the folder is changed.
        A resumed run takes the newest undamaged checkpoint and prints those that it skips. Every process must call
        this.

        Raises ValueError, which names the differences or the remedy, if a run would be lost, if it would be resumed
        with other settings, or if another run uses the folder now.
        """
        found: list[Any] = [None]
        if accelerator.is_main_process:  # broadcasts the outcome to the others
            try:
                found = [
                    self._open(
                        recipe, settings, describe_environment(accelerator), resume, overwrite, allow_changes, check
                    )
                ]
            except (ValueError, OSError) as error:
                self.close()
                found = [error]
        (outcome,) = broadcast_object_list(found)
        if isinstance(outcome, Exception):
            raise outcome
        self.checkpoint, self.run_id = outcome

    def how_to_go_on(self) -> str:
        """How to go on with this run after it has ended early. Before its first checkpoint it cannot be resumed."""
        if self._has_checkpoint():
            return "continue with --resume"
        return "there is no checkpoint yet: start again with --overwrite_output_dir"

    def _has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from. It may be damaged."""
        return any(map(is_training_state, (self.path / LAST, *(self.path / OLDER).glob("step-*"))))

    def close(self) -> None:
        """Releases the folder for other runs."""
        if self._lock.is_locked:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, recipe, settings, environment, resume, overwrite, allow_changes, check) -> tuple[Path | None, str]:
        if resume and not self.path.exists():
            raise ValueError(_NOTHING_TO_RESUME.format(folder=self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"another run is training in {self.path}{self._holder()}. Wait until it ends, or name another "
                "--output_dir"
            ) from None
        for checkpoint in (LAST, BEST):
            recover(self.path / checkpoint)
        checkpoint, run_id = None, uuid.uuid4().hex
        if resume:
            checkpoint = self._checkpoint_to_resume(recipe, settings, allow_changes)
            check(checkpoint)
            run_id = read_settings(self.path).get(_RUN_ID, run_id)
        else:
            self._make_room(overwrite)
        (self.path / RECIPE).write_text(recipe.as_json())
        (self.path / SETTINGS).write_text(json.dumps({**settings, _RUN_ID: run_id}, indent=2) + "\n")
        if settings.get("exclude") is not None and not resume:
            shutil.copyfile(settings["exclude"], self.path / EXCLUDED)
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*starts, environment], indent=2) + "\n")
        return checkpoint, run_id

    def _holder(self) -> str:
        """Which run uses the folder now; empty if it has not written that yet."""
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.is_file() else []
        if not starts or "process" not in starts[-1]:
            return ""
        return " (process {process} on {host}, started {started})".format(**starts[-1])

    def _checkpoint_to_resume(self, recipe, settings, allow_changes) -> Path:
        checkpoint, damaged = newest_whole_checkpoint(self.path)
        if checkpoint is None and damaged:
            raise ValueError(
                f"{self.path} holds no whole checkpoint ({'; '.join(damaged)}); start again with "
                "--overwrite_output_dir in place of --resume"
            )
        if checkpoint is None:
            raise ValueError(_NOTHING_TO_RESUME.format(folder=self.path))
        changed = _changes(self.path, recipe, settings, allow_changes)
        if changed:
            names = {change.partition(":")[0] for change in changed}
            other = "start a new run without --resume in another --output_dir"
            if names <= set(SOUND_CHANGES):
                other = f"allow the change with --allow_changes {' '.join(sorted(names.union(allow_changes)))}"
            raise ValueError(
                f"{self.path} holds another run; differences: {'; '.join(changed)}. Give the options of that run, or "
                f"{other}"
            )
        for message in damaged:
            print(f"skipped a damaged checkpoint: {message}")
        return checkpoint

    def _make_room(self, overwrite: bool) -> None:
        """Removes an earlier run if `overwrite`. Other files stay; ValueError if the new run would replace them."""
        foreign = [name for name in (LAST, BEST) if (self.path / name).exists() and not is_checkpoint(self.path / name)]
        if foreign:
            raise ValueError(
                f"{self.path} has {' and '.join(foreign)}, which no run wrote and which this run would replace; "
                "move it away, or name another --output_dir"
            )
        older = sorted(path for path in (self.path / OLDER).glob("step-*") if is_checkpoint(path))
        left = [name for name in (LAST, BEST, *_RESULTS) if (self.path / name).exists()]
        if (left or older) and not overwrite:
            resume = "continue it with --resume, " if self._has_checkpoint() else ""
            raise ValueError(
                f"{self.path} holds a run already; {resume}delete it with --overwrite_output_dir, or name another "
                f"--output_dir. The folder has: {', '.join([*left, *([OLDER] if older else [])])}"
            )
        for name in (LAST, BEST):
            for path in (self.path / name, *self.path.glob(f".{name}.*")):
                shutil.rmtree(path, ignore_errors=True)
        for path in older:
            shutil.rmtree(path)
        shutil.rmtree(self.path / PUSH, ignore_errors=True)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("events.out.tfevents.*", "hparams.yml"):
            for path in (self.path / TENSORBOARD).rglob(pattern):
                path.unlink()
        for folder in (self.path / OLDER, self.path / TENSORBOARD):
            _remove_empty(folder)


_NOTHING_TO_RESUME = "{folder} holds no checkpoint to resume; start without --resume, or name the run's --output_dir"


def _remove_empty(folder: Path) -> None:
    """Removes a folder and its subfolders, unless they hold a file."""
    if folder.is_dir():
        for below in folder.iterdir():
            _remove_empty(below)
        if not any(folder.iterdir()):
            folder.rmdir()


def run_of(checkpoint: Path) -> Path | None:
    """The output folder of a run, by a checkpoint that it saved: `best`, `last` or an older one; None for others."""
    checkpoint = checkpoint.resolve()
    if checkpoint.name in (BEST, LAST):
        return checkpoint.parent
    is_older = checkpoint.parent.name == OLDER and checkpoint.name.startswith("step-")
    return checkpoint.parent.parent if is_older else None


def excluded_in(folder: Path | None, exclude: str | None) -> str | None:
    """The list of excluded images that the run in `folder` trained without: its copy, or `exclude` if it has none.

    A notice says so if the file `exclude` has changed since the run began.
    """
    copy = None if folder is None else folder / EXCLUDED
    if exclude is None or copy is None or not copy.is_file():
        return exclude
    if Path(exclude).is_file() and Path(exclude).read_bytes() != copy.read_bytes():
        notify(f"{exclude} has changed since the run began, which goes by its copy {copy}")
    return str(copy)


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads `run.json`; empty if there is none."""
    path = folder / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else {}


def _changes(folder: Path, recipe: TrainingRecipe, settings: dict[str, Any], allowed: Collection[str]) -> list[str]:
    """Differences from the run in `folder`, as "option: theirs -> ours", without the `allowed` options."""
    changed = recipe.differences((folder / RECIPE).read_text())
    before = read_settings(folder)
    changed += [
        f"{name}: {before.get(name)} -> {settings.get(name)}"
        for name in {**before, **settings}
        if name != _RUN_ID and before.get(name) != settings.get(name)
    ]
    return [change for change in changed if change.partition(":")[0] not in allowed]


def read_broken_images(folder: Path) -> list[str]:
    """Lines about the images that the run skipped because they cannot be read."""
    path = folder / BROKEN_IMAGES
    return sorted(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def log_metrics(folder: Path, step: int, metrics: dict[str, Any]) -> None:
    """Adds the line of a step to metrics.jsonl, and removes later lines that an interrupted run left."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    written = path.with_suffix(".writing")
    written.write_text("\n".join([*kept, json.dumps({"step": step, **metrics})]) + "\n")
    written.replace(path)
