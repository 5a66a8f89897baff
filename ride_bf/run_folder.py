"""The output folder of a training run: what is in it, and whether a run may begin or go on there."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ride_bf.checkpoints import is_training_state, recover
from ride_bf.environment import describe_environment
from ride_bf.recipes import TrainingRecipe

ENVIRONMENT = "environment.json"  # what each start of a run, the first and every resumed one, was made with
BROKEN_IMAGES = "broken_images.txt"  # a line for each that a run left out, as often as it met it
_FOLDERS = ("last", "best", "tensorboard")
_FILES = ("recipe.json", "run.json", "metrics.jsonl", "test_results.json", ENVIRONMENT, BROKEN_IMAGES)


def open_run_folder(
    folder: Path,
    recipe: TrainingRecipe,
    settings: dict[str, Any],
    accelerator: Accelerator,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Prepares `folder` for a new run, or checks that it holds the very run that is to go on.

    `settings` is what a result depends on beside the recipe: seed, data and initial weights. Raises ValueError, naming
    the differences or the remedy, where a run would be lost, or continued as another one. Called by every process.
    """
    if accelerator.is_main_process:
        for checkpoint in ("last", "best"):
            recover(folder / checkpoint)
    accelerator.wait_for_everyone()
    problem = None
    if resume and not is_training_state(folder / "last"):
        problem = f"{folder} holds no checkpoint to resume; start without --resume, or name the run's --output_dir"
    elif resume:
        changed = recipe.differences((folder / "recipe.json").read_text())
        before = json.loads((folder / "run.json").read_text())
        changed += [
            f"{name}: {before.get(name)} -> {settings.get(name)}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changed:
            problem = f"{folder} holds another run; differences: {'; '.join(changed)}"
    elif (folder / "last").exists() and not overwrite:
        problem = (
            f"{folder} holds a run already; go on with it by --resume, delete it by --overwrite_output_dir, "
            "or name another --output_dir"
        )
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if problem:
        raise ValueError(problem)
    if accelerator.is_main_process and not resume:
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


def read_broken_images(folder: Path) -> list[str]:
    """What is written about each image that the run has left out because it cannot be read."""
    path = folder / BROKEN_IMAGES
    return sorted(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def log_epoch(folder: Path, epoch: int, metrics: dict[str, Any], accelerator: Accelerator) -> None:
    """The line of the 1-based `epoch` in metrics.jsonl, in place of one that an interrupted run left, and scalars."""
    if accelerator.is_main_process:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < epoch]
        path.write_text("\n".join([*kept, json.dumps({"epoch": epoch, **metrics})]) + "\n")
    accelerator.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step=epoch)
