"""Sets up trackers through Accelerate: TensorBoard, Weights & Biases or Trackio."""

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ride_bf.recipes import TrainingRecipe

PROJECT = "ride_bf"


def check_tracker(name: str) -> None:
    """Raises ValueError if the tracker, a choice of `--report_to`, is not installed."""
    if name != "none" and name not in map(str, get_available_trackers()):
        raise ValueError(f"{name} is not installed: pip install {name}, or set --report_to none")


def start_tracker(
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    settings: dict[str, Any],
    *,
    tracker: str,
    name: str,
    run_id: str,
    steps_done: int,
) -> None:
    """Starts the tracker, or continues the same run in it. Recipe and settings are the run's configuration.

    The tracker identifies the run by `run_id` and shows it as `name`. A run that resumes after `steps_done` steps
    replaces later logs, if the tracker supports that.
    """
    resumed = steps_done > 0
    init_kwargs = {
        "tensorboard": {"purge_step": steps_done + 1} if resumed else {},
        "wandb": {"id": run_id, "name": name, "resume": "allow"},
        "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},
    }
    # TensorBoard already writes to a folder of this run
    project = "" if tracker == "tensorboard" else PROJECT
    config = None if resumed else configuration(recipe, settings)
    accelerator.init_trackers(project, config=config, init_kwargs=init_kwargs)


def configuration(recipe: TrainingRecipe, settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Recipe and settings as a flat dict of plain values, which every tracker accepts; None becomes "None"."""
    options = {name: value for name, value in asdict(recipe).items() if name not in ("description", "network")}
    options |= {f"network/{name}": value for name, value in recipe.network.items()}
    options |= {f"run/{name}": value for name, value in settings.items()}
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> int | float | str | bool:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, int | float | str) else str(value)
