"""The output folder of a training run: what is in it, and whether a run may begin or go on there."""

import json
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.checkpoints import BEST, LAST, OLDER, is_checkpoint, newest_whole_checkpoint, recover
from ride_bf.runs.environment import describe_environment

RECIPE, SETTINGS, METRICS = "recipe.json", "run.json", "metrics.jsonl"
ENVIRONMENT = "environment.json"  # what each start of a run, the first and every resumed one, was made with
TEST_RESULTS = "test_results.json"  # from the end of training
LOST_LOSS = "lost_loss.json"  # the images of the batch in which a loss was not finite
BROKEN_IMAGES = "broken_images.txt"  # a line for each that a run left out, as often as it met it
PUSH, PUSH_LOG = ".push", "push.log"  # of a push to the Hub that is under way
TENSORBOARD = "tensorboard"
LOCK = "run.lock"  # while a run is under way; the operating system frees it, however the run ends
_RUN_ID = "id"  # in run.json: under which trackers know the run

# What only a run that has got somewhere leaves; a start beside it needs to be asked for.
_RESULTS = (METRICS, TEST_RESULTS, LOST_LOSS)
_FILES = (RECIPE, SETTINGS, ENVIRONMENT, BROKEN_IMAGES, PUSH_LOG, *_RESULTS)


class RunFolder:
    """The output folder of one run, from its start to its end.

    Use as a context manager: while it is entered, no other run can have the folder.

    Attributes:
        path: the folder.
        run_id: under which trackers know the run, the same after a resumption.
        checkpoint: the checkpoint from which the run goes on; None for a new run.
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
    ) -> None:
        """Prepares the folder for a new run, or finds the checkpoint from which the run that it holds goes on.

        `settings` is what a result depends on beside the recipe: seed, data, initial weights and processes. When
        resuming, the newest whole checkpoint is taken, and those that are passed over are named. Raises ValueError,
        naming the differences or the remedy, where a run would be lost, or continued as another one, and if another
        run has the folder now. Called by every process.
        """
        found: list[Any] = [None]
        if accelerator.is_main_process:  # the others learn what it has decided
            try:
                found = [
                    self._open(recipe, settings, describe_environment(accelerator), resume, overwrite, allow_changes)
                ]
            except (ValueError, OSError) as error:
                self.close()
                found = [error]
        (outcome,) = broadcast_object_list(found)
        if isinstance(outcome, Exception):
            raise outcome
        self.checkpoint, self.run_id = outcome

    def close(self) -> None:
        """Lets other runs have the folder."""
        if self._lock.is_locked:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, recipe, settings, environment, resume, overwrite, allow_changes) -> tuple[Path | None, str]:
        if resume and not self.path.exists():
            raise ValueError(_NOTHING_TO_RESUME.format(folder=self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"another run is training in {self.path}{self._holder()}. Wait for its end, or name another "
                "--output_dir"
            ) from None
        for checkpoint in (LAST, BEST):
            recover(self.path / checkpoint)
        checkpoint, run_id = None, uuid.uuid4().hex
        if resume:
            checkpoint = self._checkpoint_to_resume(recipe, settings, allow_changes)
            run_id = read_settings(self.path).get(_RUN_ID, run_id)
        else:
            self._make_room(overwrite)
        (self.path / RECIPE).write_text(recipe.as_json())
        (self.path / SETTINGS).write_text(json.dumps({**settings, _RUN_ID: run_id}, indent=2) + "\n")
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*starts, environment], indent=2) + "\n")
        return checkpoint, run_id

    def _holder(self) -> str:
        """Which run has the folder now, as far as it has said so."""
        path = self.path / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.is_file() else []
        if not starts or "process" not in starts[-1]:
            return ""
        return " (process {process} on {host}, started {started})".format(**starts[-1])

    def _checkpoint_to_resume(self, recipe, settings, allow_changes) -> Path:
        checkpoint, damaged = newest_whole_checkpoint(self.path)
        if checkpoint is None and damaged:
            raise ValueError(
                f"{self.path} holds no whole checkpoint ({'; '.join(damaged)}); start anew with --overwrite_output_dir"
            )
        if checkpoint is None:
            raise ValueError(_NOTHING_TO_RESUME.format(folder=self.path))
        changed = _changes(self.path, recipe, settings, allow_changes)
        if changed:
            raise ValueError(f"{self.path} holds another run; differences: {'; '.join(changed)}")
        for message in damaged:
            print(f"passed over a damaged checkpoint: {message}")
        return checkpoint

    def _make_room(self, overwrite: bool) -> None:
        """Removes what an earlier run left, if that was asked for. What no run wrote stays, or is an error."""
        foreign = [name for name in (LAST, BEST) if (self.path / name).exists() and not is_checkpoint(self.path / name)]
        if foreign:
            raise ValueError(
                f"{self.path} has {' and '.join(foreign)}, which no run wrote and which a run would replace; move it "
                "away, or name another --output_dir"
            )
        older = sorted(path for path in (self.path / OLDER).glob("step-*") if is_checkpoint(path))
        left = [name for name in (LAST, BEST, *_RESULTS) if (self.path / name).exists()]
        if (left or older) and not overwrite:
            raise ValueError(
                f"{self.path} holds a run already; go on with it by --resume, delete it by --overwrite_output_dir, or "
                f"name another --output_dir. Of that run there are: {', '.join([*left, *([OLDER] if older else [])])}"
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
    """Removes a folder and those in it, unless they hold a file."""
    if folder.is_dir():
        for below in folder.iterdir():
            _remove_empty(below)
        if not any(folder.iterdir()):
            folder.rmdir()


def read_settings(folder: Path) -> dict[str, Any]:
    """What `run.json` says; empty if there is none."""
    path = folder / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else {}


def _changes(folder: Path, recipe: TrainingRecipe, settings: dict[str, Any], allowed: Collection[str]) -> list[str]:
    """What is different from the run in `folder`, "option: theirs -> ours", but for what may be."""
    changed = recipe.differences((folder / RECIPE).read_text())
    before = read_settings(folder)
    changed += [
        f"{name}: {before.get(name)} -> {settings.get(name)}"
        for name in {**before, **settings}
        if name != _RUN_ID and before.get(name) != settings.get(name)
    ]
    return [change for change in changed if change.partition(":")[0] not in allowed]


def read_broken_images(folder: Path) -> list[str]:
    """What is written about each image that the run has left out because it cannot be read."""
    path = folder / BROKEN_IMAGES
    return sorted(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def log_metrics(folder: Path, step: int, metrics: dict[str, Any]) -> None:
    """Writes the line of a step in metrics.jsonl, in place of those that an interrupted run left."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    written = path.with_suffix(".writing")
    written.write_text("\n".join([*kept, json.dumps({"step": step, **metrics})]) + "\n")
    written.replace(path)
