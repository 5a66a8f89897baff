"""The output folder of a training run: what is in it, and whether a run may begin or go on there."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.checkpoints import BEST, LAST, OLDER, newest_whole_checkpoint, recover
from ride_bf.runs.environment import describe_environment
from ride_bf.training.loss_monitor import LOST_LOSS

ENVIRONMENT = "environment.json"  # what each start of a run, the first and every resumed one, was made with
BROKEN_IMAGES = "broken_images.txt"  # a line for each that a run left out, as often as it met it
_FOLDERS = (LAST, BEST, OLDER, "tensorboard", ".push")
_FILES = (
    *("recipe.json", "run.json", "metrics.jsonl", "test_results.json", "push.log"),
    *(ENVIRONMENT, BROKEN_IMAGES, LOST_LOSS),
)


def open_run_folder(
    folder: Path,
    recipe: TrainingRecipe,
    settings: dict[str, Any],
    accelerator: Accelerator,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: Collection[str] = (),
) -> Path | None:
    """Prepares `folder` for a new run, or finds the checkpoint from which the run that it holds goes on.

    `settings` is what a result depends on beside the recipe: seed, data, initial weights and processes. Returns the
    newest whole checkpoint when resuming, and says what it passes over. Raises ValueError, naming the differences or
    the remedy, where a run would be lost, or continued as another one. Called by every process.
    """
    if accelerator.is_main_process:
        for checkpoint in (LAST, BEST):
            recover(folder / checkpoint)
    accelerator.wait_for_everyone()
    problem, checkpoint = None, None
    if resume:
        checkpoint, damaged = newest_whole_checkpoint(folder)
        changed = [] if checkpoint is None else _changes(folder, recipe, settings, allow_changes)
        if checkpoint is None and damaged:
            problem = (
                f"{folder} holds no whole checkpoint ({'; '.join(damaged)}); start anew with --overwrite_output_dir"
            )
        elif checkpoint is None:
            problem = f"{folder} holds no checkpoint to resume; start without --resume, or name the run's --output_dir"
        elif changed:
            problem = f"{folder} holds another run; differences: {'; '.join(changed)}"
        for message in damaged:
            accelerator.print(f"passed over a damaged checkpoint: {message}")
    elif (folder / LAST).exists() and not overwrite:
        problem = (
            f"{folder} holds a run already; go on with it by --resume, delete it by --overwrite_output_dir, "
            "or name another --output_dir"
        )
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if problem:
        raise ValueError(problem)
    if accelerator.is_main_process:
        if not resume:
            for name in _FOLDERS:
                for path in (folder / name, *folder.glob(f".{name}.*")):
                    shutil.rmtree(path, ignore_errors=True)
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(recipe.as_json())
        (folder / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    if accelerator.is_main_process:
        path = folder / ENVIRONMENT
        starts = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*starts, describe_environment(accelerator)], indent=2) + "\n")
    accelerator.wait_for_everyone()
    return checkpoint


def _changes(folder: Path, recipe: TrainingRecipe, settings: dict[str, Any], allowed: Collection[str]) -> list[str]:
    """What is different from the run in `folder`, "option: theirs -> ours", but for what may be."""
    changed = recipe.differences((folder / "recipe.json").read_text())
    before = json.loads((folder / "run.json").read_text())
    changed += [
        f"{name}: {before.get(name)} -> {settings.get(name)}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    return [change for change in changed if change.partition(":")[0] not in allowed]


def read_broken_images(folder: Path) -> list[str]:
    """What is written about each image that the run has left out because it cannot be read."""
    path = folder / BROKEN_IMAGES
    return sorted(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def log_metrics(folder: Path, step: int, metrics: dict[str, Any], accelerator: Accelerator) -> None:
    """The line of a step in metrics.jsonl, in place of those that an interrupted run left, and its scalars."""
    if accelerator.is_main_process:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] < step]
        written = path.with_suffix(".writing")
        written.write_text("\n".join([*kept, json.dumps({"step": step, **metrics})]) + "\n")
        written.replace(path)
    accelerator.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step=step)
