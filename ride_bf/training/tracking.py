"""What a tracker is told: TensorBoard, Weights & Biases or Trackio, through Accelerate."""

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
    """Starts the tracker, with recipe and settings as the run's configuration, or goes on with the same run.

    The tracker knows the run by `run_id`, and calls it `name`. A run that goes on after `steps_done` steps replaces
    what was logged after them, where the tracker can.
    """
    resumed = steps_done > 0
    init_kwargs = {
        "tensorboard": {"purge_step": steps_done + 1} if resumed else {},
        "wandb": {"id": run_id, "name": name, "resume": "allow"},
        "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},
    }
    # TensorBoard's folder is the run's own already
    project = "" if tracker == "tensorboard" else PROJECT
    config = None if resumed else configuration(recipe, settings)
    accelerator.init_trackers(project, config=config, init_kwargs=init_kwargs)


def configuration(recipe: TrainingRecipe, settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Recipe and settings as one level of plain values, which every tracker takes; None is the word."""
    options = {name: value for name, value in asdict(recipe).items() if name not in ("description", "network")}
    options |= {f"network/{name}": value for name, value in recipe.network.items()}
    options |= {f"run/{name}": value for name, value in settings.items()}
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> int | float | str | bool:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, int | float | str) else str(value)
