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
from ride_bf.runs.checkpoints import FACTS, read_facts
from ride_bf.runs.models import find_model, loading_errors
from ride_bf.runs.provenance import TrainingData, check_same_counts, data_of
from ride_bf.runs.run_folder import ENVIRONMENT

TEST_RESULTS = "test_results.json"  # in the run's folder, from the end of training
_LOCAL_SETTINGS = ("data_dir", "init_from", "teacher")  # may be paths of this machine


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and what is known about it; empty or None is what is not.

    `recipe` and `settings` are `recipe.json` and `run.json`, `starts` the entries of `environment.json`, `epochs` the
    lines of `metrics.jsonl` up to this checkpoint, `facts` its `checkpoint.json`, of which `data` is what the model was
    trained on. `results` has the keys that
    `ride_bf.evaluation.results` describes, of which `metrics`, `dataset`, `split`, `class_names` and
    `train_class_counts` are always there; `results_name` is the file they are from. Paths of this machine are left out
    of `settings` and `results`.
    """

    checkpoint: Path
    config: RideBfConfig
    facts: dict[str, Any] = field(default_factory=dict)
    data: TrainingData | None = None
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
        if self.data is not None:
            return self.data.train_class_counts
        return self.facts.get("train_class_counts") or (self.results or {}).get("train_class_counts")

    @property
    def is_evaluated(self) -> bool:
        """Whether `results` are all that `ride_bf.evaluate` measures, not the few numbers that end a training."""
        return self.results is not None and self.results_name == RESULTS

    @property
    def dataset(self) -> str | None:
        """The name of the data set that the model was trained on."""
        if self.data is not None:
            return self.data.dataset
        return self.recipe.get("dataset") or (self.results or {}).get("dataset")

    @property
    def training_seconds(self) -> float | None:
        """Time of the training epochs, without evaluation and saving."""
        seconds = [line.get("seconds") for line in self.epochs]
        return sum(seconds) if seconds and None not in seconds else None


def read_saved_run(folder: Path) -> SavedRun:
    """Reads a run's output folder, of which the checkpoint that was tested counts, or a checkpoint's own folder.

    Raises ValueError, naming the file, for a folder without a model, a damaged file, and results of another model or of
    other images than the checkpoint says.
    """
    checkpoint = find_model(folder)
    if not isinstance(checkpoint, Path):
        raise ValueError(f"{folder} is no folder; name a run's output folder, or a checkpoint in it such as best")
    run = checkpoint.parent if checkpoint.name in ("best", "last") else None
    run = run if run is not None and (run / "recipe.json").is_file() else None
    with loading_errors(checkpoint):
        config = RideBfConfig.from_pretrained(checkpoint)
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
    data = data_of(facts, checkpoint)
    saved = SavedRun(checkpoint, config, facts, data, results=results, results_name=results_name, **known)
    _check_classes(saved)
    _check_data(saved)
    return saved


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


def _check_data(saved: SavedRun) -> None:
    """Raises ValueError, with both values, if the results contradict what the checkpoint says of its data."""
    results, data = saved.results, saved.data
    if results is None:
        return
    anew = f"Evaluate it anew: python -m ride_bf.evaluate --model {saved.checkpoint}"
    if saved.train_class_counts is not None:
        remedy = f"{saved.results_name} beside it"
        check_same_counts(saved.checkpoint, saved.train_class_counts, results["train_class_counts"], remedy, anew)
    if data is None or "images_digest" not in results:
        return
    trained_on = results.get("training_data", {}).get("digest", "")
    pairs = [("the training images", data.splits["train"].digest, trained_on)]
    if not results.get("other_images"):
        split = results["split"]
        known = data.splits[split].digest if split in data.splits else "none"
        pairs.append((f"the {split} images", known, results["images_digest"]))
    for images, known, measured in pairs:
        if known != measured:
            raise ValueError(
                f"{saved.checkpoint}: {FACTS} and {saved.results_name} are of different data: the digest of {images} "
                f"is {known} in one, {measured or 'missing'} in the other. {anew}"
            )


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
