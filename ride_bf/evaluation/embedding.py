"""Features and predictions of a model for every image of a data set, in a Parquet file.

The file has a row for each image, with the columns

    path        of the image's file; null for an image that is stored in a table
    split, row  where the image is in the data set
    label       name of its class
    prediction  name of the class that the model predicts
    score       the model's probability of that class, as `pipeline` gives it
    feature     float32, see `chosen_features`

and the metadata `ride_bf`, a JSON object with the fields of `Source`.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from data import BrokenImageError, FinishedBatches
from data.columns import image_field
from data.writing import whole_file
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.predict import as_predictions, gather_columns, image_facts, rows_of
from ride_bf.evaluation.results import Predictions
from ride_bf.runs.models import results_folder, weights_digest

EMBEDDINGS = "embeddings.parquet"  # in a model's folder
_METADATA = b"ride_bf"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the features are of.

    Attributes:
        weights: `ride_bf.runs.models.weights_digest` of the network without its classifiers.
        expert: number of the expert whose features they are; None for all of them.
        class_names: (C,).
    """

    weights: str
    expert: int | None
    class_names: list[str]


@dataclass(frozen=True)
class SplitEmbeddings:
    """Features of the images of a split that can be read.

    Attributes:
        split: all images of the split.
        rows (N,): of the split.
        images: predictions for the N images.
        scores (N,): probabilities of the predicted classes, calibrated if the model is.
        features (N, D).
    """

    split: Dataset
    rows: np.ndarray
    images: Predictions
    scores: np.ndarray
    features: np.ndarray


def check_expert(expert: int | None, num_experts: int, routed: bool) -> None:
    """Raises ValueError for an expert that the model does not have, or that its router may leave out."""
    if expert is not None and not 0 <= expert < num_experts:
        raise ValueError(f"--expert must be 0 to {num_experts - 1}, the experts of the model, not {expert}")
    if routed and expert != 0:
        raise ValueError("the model has a router, so only expert 0 sees every image; give --expert 0")


def chosen_features(expert_features: Tensor, expert: int | None) -> Tensor:
    """The features (B, D) of an expert, as they are in the model's `expert_features` (B, E, D).

    For None, (B, E D): the features of each expert scaled to length 1, one after another, and then divided by the root
    of E. The experts' spaces have different axes, so their features cannot be averaged. The cosine of two such vectors
    is the mean of the experts' cosines.
    """
    if expert is not None:
        return expert_features[:, expert]
    return F.normalize(expert_features, dim=2).flatten(1) / expert_features.shape[1] ** 0.5


@torch.no_grad()
def embed_split(
    model: nn.Module, split: Dataset, loader: FinishedBatches, accelerator: Accelerator, expert: int | None = None
) -> SplitEmbeddings:
    """Computes the features of a split on all processes; each gets those of all images.

    See `ride_bf.evaluation.predict.predict` for the arguments and `chosen_features` for `expert`. Images that the
    loader could not read are left out. Raises BrokenImageError if it could read none.
    """

    confidence = accelerator.unwrap_model(model).confidence

    def facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        features = chosen_features(outputs.expert_features.float(), expert)
        scores = confidence.probabilities(outputs.logits).amax(dim=1)
        return {**image_facts(outputs, labels), "scores": scores, "features": features}

    columns = gather_columns(model, loader, accelerator, facts, with_broken=True)
    rows = np.flatnonzero(columns["labels"] >= 0)
    if not len(rows):
        raise BrokenImageError(f"none of the {len(split):,} images can be read; does their folder still exist?")
    columns = rows_of(columns, rows)
    scores, features = columns.pop("scores"), columns.pop("features")
    return SplitEmbeddings(split, rows, as_predictions(columns), scores, features)


def write_embeddings(path: Path, splits: dict[str, SplitEmbeddings], source: Source) -> None:
    """Writes the file that this module describes."""
    table = pa.concat_tables([_table(name, part, source.class_names) for name, part in splits.items()])
    table = table.replace_schema_metadata({_METADATA: json.dumps(asdict(source))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as written:
        pyarrow.parquet.write_table(table, written)


def _table(name: str, part: SplitEmbeddings, class_names: Sequence[str]) -> pa.Table:
    def names(labels: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(labels, pa.int32()), pa.array(class_names, pa.string()))

    features = np.ascontiguousarray(part.features, dtype=np.float32)  # (N, D)
    return pa.table(
        {
            "path": image_field(part.split, "path").take(pa.array(part.rows)),
            "split": pa.array([name] * len(part.rows), pa.string()),
            "row": pa.array(part.rows, pa.int64()),
            "label": names(part.images.labels),
            "prediction": names(part.images.predictions),
            "score": pa.array(part.scores, pa.float32()),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1]),
        }
    )


@dataclass(frozen=True)
class Embedded:
    """What `read_embeddings` reads of a split: rows of the split (N,), names of classes (N,), features (N, D)."""

    source: Source
    rows: np.ndarray
    labels: list[str]
    features: np.ndarray

    def label_numbers(self) -> np.ndarray:
        """The labels (N,) as indices into the class names of the source."""
        numbers = {name: number for number, name in enumerate(self.source.class_names)}
        return np.array([numbers[name] for name in self.labels])


def read_embeddings(path: Path, split: str) -> Embedded:
    """Reads the images of a split from a file of `write_embeddings`. Raises ValueError if there are none."""
    try:
        table = pyarrow.parquet.read_table(path, filters=[("split", "=", split)])
        source = Source(**json.loads(table.schema.metadata[_METADATA]))
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of python -m ride_bf.embed, or is damaged ({error})") from error
    if not len(table):
        raise ValueError(f"{path} has no images of the {split} split; run python -m ride_bf.embed without --splits")
    feature = table["feature"].combine_chunks()
    features = feature.flatten().to_numpy().reshape(len(table), feature.type.list_size)
    return Embedded(source, table["row"].to_numpy(), table["label"].to_pylist(), features)


def read_neighbours(path: Path, model: RideBfForImageClassification, place: Path | str) -> Embedded:
    """Reads the training images from a file of `write_embeddings`, as neighbours for the features of a model.

    `place` is where the model is from, a folder or a Hub id. Raises ValueError if the features are those of another
    model, and the errors of `check_written`.
    """
    check_written(path, place)
    embedded = read_embeddings(path, "train")
    if embedded.source.weights != weights_digest(model.ride_bf):
        own = results_folder(place) / EMBEDDINGS  # not `path`, which the other model may need
        raise ValueError(
            f"{path} has the features of another model; {_command(own, place)} writes those of this one into {own}"
        )
    return embedded


def check_written(path: Path, place: Path | str) -> None:
    """Raises FileNotFoundError, with the command that writes it, if there is no file `path` of the model in `place`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {_command(path, place)} writes it")


def _command(path: Path, place: Path | str) -> str:
    """The command that writes the embeddings of the model in `place` into `path`."""
    words = ["python", "-m", "ride_bf.embed", str(place)]
    if path != results_folder(place) / EMBEDDINGS:
        words += ["--output", str(path)]
    return shlex.join(words)
