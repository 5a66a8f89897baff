"""Classifies an image file with a published model. Gradio is not needed.

The handler that is published with the model reads and classifies the images, so the page and an Inference Endpoint
give the same answers.
"""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import get_token, snapshot_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open

TOP_K = 5
MOST_NEAREST = 5  # training images, as few as a rare class may have
NEIGHBOURS = "neighbours.safetensors"
MANY_SHOT_ABOVE, FEW_SHOT_BELOW = 100, 20


@dataclass(frozen=True)
class Answer:
    """A class, by its index and name, and its probability."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Neighbour:
    """A training image: its class, by index and name, and a JPEG file of it.

    `similarity` is the cosine of its features with those of the image that is classified.
    """

    label: int
    name: str
    similarity: float
    picture: bytes


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes, best first, and that of each expert; None for an expert that was not needed.

    `in_set` are the classes of which one is the true one in a promised share of the cases, and `rejected` is whether
    the image is of none of the classes; None if the model does not say. `nearest` are the training images with the most
    similar features, nearest first; None if none are published.
    """

    top: list[Answer]
    experts: list[Answer | None]
    in_set: list[Answer] | None = None
    rejected: bool | None = None
    nearest: list[Neighbour] | None = None


class NoModelError(ValueError):
    """A model that cannot be loaded. The message is for the owner of the page."""


class NoPredictionError(ValueError):
    """An image that cannot be classified. The message is for the user."""


class TrainingImages:
    """The published training images. `ride_bf.hub.neighbours` writes and describes the file."""

    def __init__(self, path: Path):
        try:
            with safe_open(path, "pt") as file:
                self.experts = json.loads(file.metadata()["experts"])
                self.features = file.get_tensor("features").float()  # (N, D): float16 is slow on CPUs
                self.labels = file.get_tensor("labels").tolist()
                self.ends = file.get_tensor("picture_ends").tolist()
                self.pictures = file.get_tensor("pictures").numpy()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise NoModelError(f"{path.name} is damaged: {error}. Publish the model again.") from error

    def nearest(self, expert_features: torch.Tensor, names: list[str]) -> list[Neighbour]:
        """The images nearest to one with `expert_features` (E, D). `names` are those of the classes."""
        query = F.normalize(F.normalize(expert_features[self.experts], dim=1).flatten(), dim=0)
        similarities, rows = (self.features @ query).topk(min(MOST_NEAREST, len(self.labels)))
        return [
            Neighbour(self.labels[row], names[self.labels[row]], similarity, self._picture(row))
            for similarity, row in zip(similarities.tolist(), rows.tolist(), strict=True)
        ]

    def _picture(self, row: int) -> bytes:
        return self.pictures[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()


@dataclass(frozen=True)
class Model:
    """A published model and the facts that the page shows."""

    name: str  # name of its repository or folder
    card: str | None  # URL of its card; None for a folder
    handler: Any
    errors: type[Exception]
    counts: list[int] | None = None  # training images of each class
    examples: list[Path] = field(default_factory=list)
    training_images: TrainingImages | None = None

    @property
    def labels(self) -> list[str]:
        return self.handler.labels

    @property
    def confidence(self) -> dict[str, Any] | None:
        """What calibration measured, see `RideBfConfig.confidence`; None for a model that is not calibrated."""
        return getattr(self.handler, "confidence", None)  # an earlier version's handler has none

    @property
    def is_calibrated(self) -> bool:
        """Whether a temperature, from images that the model was not trained on, makes the scores other than softmax."""
        confidence = self.confidence or {}
        on_validation = confidence.get("calibrated_on", "validation") == "validation"
        temperature = confidence.get("temperature", 1.0)  # a number, or one of each class
        return on_validation and any(
            value != 1 for value in (temperature if type(temperature) is list else [temperature])
        )

    def predict(self, image: str | Path | bytes | Image.Image) -> Prediction:
        """Classifies an image, given as a path, as bytes or as a PIL image. Raises NoPredictionError."""
        if isinstance(image, str | Path):
            image = self._read(Path(image))
        try:
            if self.training_images is not None:
                (probabilities, experts, in_set, rejected), features = self.handler.answer_with_features([image])
            elif hasattr(self.handler, "answer"):
                probabilities, experts, in_set, rejected = self.handler.answer([image])
            else:  # published by an earlier version
                probabilities, experts, in_set, rejected = *self.handler.classify([image]), None, None
        except self.errors as error:
            raise NoPredictionError(str(error)) from error
        scores, classes = probabilities[0].sort(descending=True, stable=True)
        ranked = [self._answer(label, score) for label, score in zip(classes.tolist(), scores.tolist(), strict=True)]
        return Prediction(
            top=ranked[:TOP_K],
            in_set=None if in_set is None else [answer for answer in ranked if in_set[0, answer.label]],
            rejected=None if rejected is None else bool(rejected[0]),
            nearest=None if self.training_images is None else self.training_images.nearest(features[0], self.labels),
            experts=[
                None if own.isnan().any() else self._answer(own.argmax().item(), own.max().item()) for own in experts[0]
            ],
        )

    def _answer(self, label: int, probability: float) -> Answer:
        return Answer(label, self.labels[label], probability)

    def _read(self, path: Path) -> bytes:
        limit = self.handler.max_bytes
        try:
            with path.open("rb") as file:
                return file.read(limit + 1)  # one byte over the limit is enough to reject the file
        except OSError as error:
            raise NoPredictionError(f"the file cannot be read: {error.strerror or error}") from error

    def group(self, label: int) -> str | None:
        """`many`, `medium` or `few`, by the training images of a class; None if they are unknown."""
        if self.counts is None:
            return None
        count = self.counts[label]
        return "many" if count > MANY_SHOT_ABOVE else "few" if count < FEW_SHOT_BELOW else "medium"


def load(model: str, revision: str | None = None) -> Model:
    """Loads a model from a folder of `ride_bf.publish` or from the Hub. Its code is run.

    `revision` is a branch or commit on the Hub. Raises NoModelError if the Hub does not give the model, or if it was
    not published by `ride_bf.publish`.
    """
    local = Path(model).is_dir()
    folder = Path(model) if local else _download(model, revision)
    if not (folder / "handler.py").is_file():
        raise NoModelError(f"{model} has no handler.py: publish it with python -m ride_bf.publish")
    handler = _import(folder / "handler.py")
    counts, neighbours = folder / "class_counts.json", folder / NEIGHBOURS
    return Model(
        name=folder.resolve().name if local else model,
        card=None if local else f"{ENDPOINT}/{model}" + (f"/tree/{revision}" if revision else ""),
        handler=handler.EndpointHandler(str(folder)),
        errors=handler.BadRequestError,
        counts=json.loads(counts.read_text())["train"] if counts.is_file() else None,
        examples=sorted(path for path in (folder / "examples").glob("*") if path.is_file()),
        training_images=TrainingImages(neighbours) if neighbours.is_file() else None,
    )


def _download(model: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision))
    except RevisionNotFoundError as error:
        raise NoModelError(f"{model} has no branch or commit {revision}.") from error
    except RepositoryNotFoundError as error:
        raise NoModelError(
            f"The Hub has no model {model} that this page may read. If it is private, make a token that may read it, "
            "add it in the settings of this Space as the secret HF_TOKEN, and restart the Space."
        ) from error
    except (HTTPError, OSError) as error:  # the Hub is out of reach or has an error, or the disk is full
        reason = " ".join(str(error).split())
        reason = reason.replace(token, "***") if (token := get_token()) else reason  # the page is public
        raise NoModelError(
            f"{model} could not be downloaded from the Hub: {reason} Restart the Space, or try again later."
        ) from error


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_handler", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
