"""What the folders of a run or a checkpoint tell about a model: how it was trained, and what was measured of it."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration_ride_bf import RideBfConfig
from ride_bf.evaluation.results import RESULTS, read_results
from ride_bf.runs.checkpoints import read_facts
from ride_bf.runs.run_folder import ENVIRONMENT

TEST_RESULTS = "test_results.json"  # in the run's folder, from the end of training
_LOCAL_SETTINGS = ("data_dir", "init_from", "teacher")  # may be paths of this machine


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and what is known about it; empty or None is what is not.

    `recipe` and `settings` are `recipe.json` and `run.json`, `starts` the entries of `environment.json`, `epochs` the
    lines of `metrics.jsonl` up to this checkpoint, `facts` its `checkpoint.json`. `results` has the keys that
    `ride_bf.evaluation.results` describes, of which `metrics`, `dataset`, `split`, `class_names` and
    `train_class_counts` are always there; `results_name` is the file they are from. Paths of this machine are left out
    of `settings` and `results`.
    """

    checkpoint: Path
    config: RideBfConfig
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    results_name: str = RESULTS

    @property
    def class_names(self) -> list[str]:
        return [str(self.config.id2label[label]) for label in range(self.config.num_labels)]

    @property
    def train_class_counts(self) -> list[int] | None:
        """Training images of each class (C,)."""
        if self.results is not None:
            return self.results["train_class_counts"]
        return self.facts.get("train_class_counts")

    @property
    def is_evaluated(self) -> bool:
        """Whether `results` are all that `ride_bf.evaluate` measures, not the few numbers that end a training."""
        return self.results is not None and self.results_name == RESULTS

    @property
    def dataset(self) -> str | None:
        return self.recipe.get("dataset") or (self.results or {}).get("dataset")

    @property
    def training_seconds(self) -> float | None:
        """Time of the training epochs, without evaluation and saving."""
        seconds = [line.get("seconds") for line in self.epochs]
        return sum(seconds) if seconds and None not in seconds else None


def read_saved_run(folder: Path) -> SavedRun:
    """Reads a run's output folder, of which the checkpoint that was tested counts, or a checkpoint's own folder.

    Raises ValueError, naming the file, for a folder without a model, a damaged file, and results of another model.
    """
    checkpoint = _find_checkpoint(folder)
    run = checkpoint.parent if checkpoint.name in ("best", "last") else None
    run = run if run is not None and (run / "recipe.json").is_file() else None
    config = RideBfConfig.from_pretrained(checkpoint)
    with _naming(checkpoint / "checkpoint.json"):
        facts = read_facts(checkpoint)
    recipe = _read_json(run / "recipe.json", {}) if run else {}
    known: dict[str, Any] = {}
    if run:
        last_epoch = math.ceil(facts.get("epoch", sys.maxsize))
        settings = _read_json(run / "run.json", {})
        known = {
            "recipe": recipe,
            "settings": {name: _public(name, value) for name, value in settings.items() if value is not None},
            "starts": _read_json(run / ENVIRONMENT, []),
            "epochs": [
                line
                for line in _read_lines(run / "metrics.jsonl")
                if "train_loss" in line and line["epoch"] <= last_epoch
            ],
        }
    results_name, results = _read_results(checkpoint, run, recipe)
    saved = SavedRun(checkpoint, config, facts, results=results, results_name=results_name, **known)
    _check_classes(saved)
    return saved


def _find_checkpoint(folder: Path) -> Path:
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no model; name a run's output folder, or a checkpoint in it such as best")


def _read_results(checkpoint: Path, run: Path | None, recipe: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name and content of `results.json` beside the weights, else of the training's own test if it was of them."""
    if (checkpoint / RESULTS).is_file():  # where ride_bf.evaluate writes it
        measured = read_results(checkpoint)
        return RESULTS, {name: value for name, value in measured.items() if name != "model"}
    tested = _read_json(run / TEST_RESULTS, None) if run else None
    if tested is None or tested["checkpoint"] != checkpoint.name:
        return TEST_RESULTS, None
    return TEST_RESULTS, {
        "dataset": recipe["dataset"],
        "split": "test",
        "class_names": tested["class_names"],
        "train_class_counts": tested["train_class_counts"],
        "metrics": tested["test"],
    }


def _check_classes(saved: SavedRun) -> None:
    if saved.results is not None and list(saved.results["class_names"]) != saved.class_names:
        raise ValueError(
            f"the results beside {saved.checkpoint} are of other classes than the model's; evaluate it anew"
        )
    counts = saved.train_class_counts
    if counts is not None and len(counts) != saved.config.num_labels:
        raise ValueError(f"{saved.checkpoint} has {saved.config.num_labels} classes, its training counts {len(counts)}")


def _public(name: str, value: Any) -> Any:
    """A setting without the folders of this machine: of a path only its last part."""
    if name in _LOCAL_SETTINGS and (Path(value).exists() or Path(value).is_absolute()):
        return Path(value).name
    return value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which file it was that is no JSON."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_json(path: Path, missing: Any) -> Any:
    with _naming(path):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with _naming(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
