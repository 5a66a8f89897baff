"""Classification of image files with a saved model. Files are read as in training and evaluation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

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
        self.max_image_pixels = max_image_pixels or limit_in_training(place)

    def pixel_values(self, image: str | Path | bytes) -> Tensor:
        """Returns what `prepare_file` makes of an image file or of its bytes."""
        return prepare_file(image, self.processor, self.max_image_pixels)

    @torch.inference_mode()
    def __call__(self, image: str | Path | bytes, top_k: int) -> list[dict[str, Any]]:
        """Returns the `top_k` most probable classes, best first. `label` is the name and `score` the probability.

        Raises BrokenImageError, with the file's name, if the image cannot be read.
        """
        probabilities = self.model(self.pixel_values(image).to(self.model.dtype)).logits[0].float().softmax(dim=0)
        scores, labels = probabilities.topk(min(top_k, len(probabilities)))
        pairs = zip(labels.tolist(), scores.tolist(), strict=True)
        return [{"label": self.model.config.id2label[label], "score": score} for label, score in pairs]
