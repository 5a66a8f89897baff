"""Classification of image files with a saved model. Files are read as in training and evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from confidence_ride_bf import Confidence
from data import read_image
from ride_bf.runs.models import to_fast_layout
from ride_bf.runs.provenance import limit_in_training


def prepare_file(image: str | Path | bytes, processor: BaseImageProcessor, max_image_pixels: int) -> Tensor:
    """Returns the pixels (1, 3, height, width) of an image file or of its bytes, prepared as in evaluation.

    Raises BrokenImageError, with the file's name, if the image cannot be read.
    """
    content = image if isinstance(image, bytes) else None
    stored = {"bytes": content, "path": None if content is not None else str(image)}
    pixels = read_image(stored, max_image_pixels)
    # The image processor cannot guess where the channels are if an image is 3 pixels high or wide.
    return processor(pixels, input_data_format="channels_first", return_tensors="pt")["pixel_values"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says about an image.

    Attributes:
        top: the most probable classes, best first, as dicts of `label`, the name, and `score`, the probability.
        in_set: the classes of a set that holds the true one in the share of images that calibration promised, best
            first; None if the model has no sets.
        rejected: whether the image is of none of the classes; None if the model does not say.
    """

    top: list[dict[str, Any]]
    in_set: list[str] | None = None
    rejected: bool | None = None


class ImageClassifier:
    """A saved model with its image processor. The model may come with its own code.

    Args:
        place: folder of a checkpoint, or a model's id on the Hub. The model's own code is run.
        max_image_pixels: images of more pixels are broken; None: the limit in training.
    """

    def __init__(self, place: str | Path, max_image_pixels: int | None = None):
        self.processor = AutoImageProcessor.from_pretrained(place)
        model = AutoModelForImageClassification.from_pretrained(place, trust_remote_code=True)
        self.model = to_fast_layout(model).eval()
        config = self.model.config
        # the code of the model may be older than calibration
        self.confidence = Confidence.from_dict(getattr(config, "confidence", None), config.num_labels)
        self.max_image_pixels = max_image_pixels or limit_in_training(place)

    def pixel_values(self, image: str | Path | bytes) -> Tensor:
        """Returns what `prepare_file` makes of an image file or of its bytes."""
        return prepare_file(image, self.processor, self.max_image_pixels)

    def __call__(self, image: str | Path | bytes, top_k: int) -> list[dict[str, Any]]:
        """Returns the `top_k` most probable classes, best first. `label` is the name and `score` the probability.

        Raises BrokenImageError, with the file's name, if the image cannot be read.
        """
        return self.answer(image, top_k).top

    @torch.inference_mode()
    def answer(self, image: str | Path | bytes, top_k: int) -> Answer:
        """Returns what the model says about an image. Raises BrokenImageError as above."""
        logits = self.model(self.pixel_values(image).to(self.model.dtype)).logits  # (1, C)
        names = self.model.config.id2label
        scores, labels = self.confidence.probabilities(logits)[0].sort(descending=True, stable=True)
        ranked = [(names[label], score) for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]
        inside = None
        if self.confidence.coverage is not None:
            in_set = self.confidence.prediction_sets(logits)[0][labels].tolist()
            inside = [name for (name, _), member in zip(ranked, in_set, strict=True) if member]
        rejected = None if self.confidence.reject_known is None else bool(self.confidence.rejected(logits)[0])
        top = [{"label": name, "score": score} for name, score in ranked[:top_k]]
        return Answer(top=top, in_set=inside, rejected=rejected)
