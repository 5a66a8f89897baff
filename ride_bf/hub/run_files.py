"""Reads what the folder of a run or a checkpoint says about a model: its training and its results."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration_ride_bf import RideBfConfig
from data.hub_ids import HUB_PREFIX, is_hub_id
from ride_bf.evaluation.results import RESULTS, read_results
from ride_bf.hub.base_model import BaseModel, read_base_model
from ride_bf.runs.checkpoints import FACTS, read_facts
from ride_bf.runs.models import find_model, loading_errors
from ride_bf.runs.provenance import PATH_OPTIONS, TrainingData, check_same_counts, data_of
from ride_bf.runs.run_folder import ENVIRONMENT, TEST_RESULTS, read_broken_images, run_of

# These may be paths of this machine.
_LOCAL_SETTINGS = {"backbone", "class_names", "data_dir", "init_from", "teacher", *PATH_OPTIONS}


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and what is known about it. Unknown attributes are empty or None.

    Paths of this machine are left out of `recipe`, `settings` and `results`.

    Attributes:
        checkpoint: its folder.
        config: the configuration of the network.
        facts: the content of `checkpoint.json`.
        data: what the model was trained on, from `facts`.
        recipe: the content of `recipe.json`.
        settings: the content of `run.json`.
        starts: the entries of `environment.json`.
        epochs: the lines of `metrics.jsonl` up to this checkpoint, or up to the end of the epoch that it lies in.
        broken_images: how many images of all splits the run could not read and left out.
        results: has the keys that `ride_bf.evaluation.results` describes; `metrics`, `dataset`, `split`, `class_names`
            and `train_class_counts` are always there.
        results_name: the name of the file with the results.
        base: what the card of the backbone says; None without a backbone.
    """

    checkpoint: Path
    config: RideBfConfig
    facts: dict[str, Any] = field(default_factory=dict)
    data: TrainingData | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    broken_images: int = 0
    results: dict[str, Any] | None = None
    results_name: str = RESULTS
    base: BaseModel | None = None

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
        """Whether `results` are those of `ride_bf.evaluate`, not the few numbers from the end of training."""
        return self.results is not None and self.results_name == RESULTS

    @property
    def dataset(self) -> str | None:
        """The name of the data set that the model was trained on."""
        if self.data is not None:
            return self.data.dataset
        return self.recipe.get("dataset") or (self.results or {}).get("dataset")

    @property
    def hub_dataset(self) -> str | None:
        """The Hub id of the data set that the model was trained on; None if the images came from elsewhere."""
        place = self.data.without_place().data_dir if self.data is not None else None
        hub_id = (place or "").removeprefix(HUB_PREFIX)
        return hub_id if is_hub_id(hub_id) and "/" in hub_id else None

    @property
    def backbone(self) -> str | None:
        """The Hub id, or the name of the folder, of the pre-trained backbone that the training started from."""
        return self.recipe.get("backbone")

    @property
    def base_model(self) -> str | None:
        """The Hub id of the backbone; None if it came from a folder, of which only the name is known."""
        return self.backbone if self.backbone is not None and "/" in self.backbone else None

    @property
    def training_seconds(self) -> float | None:
        """Time of the training epochs that were whole at this checkpoint, without evaluation and saving."""
        until = self.facts.get("epoch", math.inf)
        seconds = [line.get("seconds") for line in self.epochs if line["epoch"] <= until]
        return sum(seconds) if seconds and None not in seconds else None


def read_saved_run(folder: Path) -> SavedRun:
    """Reads the output folder of a run, for the checkpoint that it tested, or the folder of a checkpoint.

    Raises ValueError, which names the file, for a folder without a model, for a damaged file, and for results of
    another model or of other images than the checkpoint says.
    """
    checkpoint = find_model(folder)
    if not isinstance(checkpoint, Path):
        raise ValueError(f"{folder} is not a folder; name a run's output folder, or a checkpoint in it such as best")
    run = run_of(checkpoint)
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
            "recipe": {name: _public(name, value) for name, value in recipe.items()},
            "settings": {name: _public(name, value) for name, value in settings.items() if value is not None},
            "base": read_base_model(recipe["backbone"]) if recipe.get("backbone") else None,
            "starts": _read_json(run / ENVIRONMENT, []),
            "epochs": [
                line
                for line in _read_lines(run / "metrics.jsonl")
                if "train_loss" in line and line["epoch"] <= last_epoch
            ],
            "broken_images": len(read_broken_images(run)),
        }
    results_name, results = _read_results(checkpoint, run, recipe)
    data = data_of(facts, checkpoint)
    saved = SavedRun(checkpoint, config, facts, data, results=results, results_name=results_name, **known)
    _check_classes(saved)
    _check_data(saved)
    return saved


def _read_results(checkpoint: Path, run: Path | None, recipe: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name and content of `results.json` beside the weights; without it, those of the test at the end of training."""
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
            f"the results beside {saved.checkpoint} are of other classes than the model's; evaluate it again"
        )
    counts = saved.train_class_counts
    if counts is not None and len(counts) != saved.config.num_labels:
        raise ValueError(
            f"{saved.checkpoint} has {saved.config.num_labels} classes, but its training counts have {len(counts)}"
        )


def _check_data(saved: SavedRun) -> None:
    """Raises ValueError, with both values, if the results contradict the checkpoint's record of its data."""
    results, data = saved.results, saved.data
    if results is None:
        return
    anew = f"Evaluate it again: python -m ride_bf.evaluate --model {saved.checkpoint}"
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
                f"is {known} in the first and {measured or 'missing'} in the second. {anew}"
            )


def _public(name: str, value: Any) -> Any:
    """A setting without folders of this machine: only the last part of a path stays."""
    if name not in _LOCAL_SETTINGS or value is None:
        return value
    if Path(value).exists() or Path(value).is_absolute() or (name == "backbone" and not is_hub_id(value)):
        return Path(value).name
    return value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file if it is not valid JSON."""
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
