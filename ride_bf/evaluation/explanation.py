"""Pages that show why a model gives an answer: maps of each expert, and the nearest training images."""

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor

from data import undecoded
from data.batches import EvaluationBatch
from data.exclusion import below, folder_of
from data.sets import get_data_set
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.classify import prepare_file
from ride_bf.evaluation.embedding import chosen_features, read_neighbours
from ride_bf.evaluation.grad_cam import expert_maps
from ride_bf.evaluation.neighbours import nearest, vote
from ride_bf.evaluation.pages import picture_source, thumbnail, write_page
from ride_bf.runs.provenance import TrainingData

_SIDE = 224  # of a picture on the page
_TOP = 3  # classes
_COLOURS, _OPACITY = "inferno", 0.65


class TrainingImages:
    """The training images by their features, from a file of `ride_bf.evaluation.embedding.write_embeddings`.

    Args:
        embeddings: the file.
        split: the training split that it is of.
        data: the record of this split.
        model: the model whose features they are. Raises ValueError if they are of another one.
        place: where the model is from, a folder or a Hub id.
    """

    def __init__(
        self,
        embeddings: Path,
        split: Dataset,
        data: TrainingData,
        model: RideBfForImageClassification,
        place: Path | str,
    ):
        self.embedded = read_neighbours(embeddings, model, place)
        self.images, self.max_image_pixels = undecoded(split), data.max_image_pixels
        self.folder = folder_of(get_data_set(data.dataset).place(data.data_dir))

    def nearest(self, expert_features: Tensor) -> dict[str, Any]:
        """The nearest images to one with `expert_features` (1, E, D), and what they vote for."""
        source, labels = self.embedded.source, np.array(self.embedded.labels)
        distances, found = nearest(self.embedded.features, chosen_features(expert_features, source.expert).numpy())
        codes, names = np.unique(labels[found[0]], return_inverse=True)
        winner, share = vote(names[None], distances)
        rows = self.embedded.rows[found[0]].tolist()
        return {
            "vote": str(codes[winner[0]]),
            "share": _percent(share[0]),
            "images": [
                {
                    "label": str(label),
                    "distance": f"{distance:.3f}",
                    "name": f"row {row}" if image["path"] is None else below(image["path"], self.folder),
                    "picture": thumbnail(image, self.max_image_pixels),
                }
                for label, distance, row in zip(labels[found[0]], distances[0], rows, strict=True)
                for image in [self.images[row]["image"]]
            ],
        }


class Explainer:
    """Writes a page about the answer of a model for an image file.

    Args:
        model: in evaluation mode.
        processor: its image processor.
        max_image_pixels: images of more pixels are broken.
        class_name: the class whose evidence the maps show; None: the predicted one. Raises ValueError for a class that
            the model does not have.
    """

    def __init__(
        self,
        model: RideBfForImageClassification,
        processor: BaseImageProcessor,
        max_image_pixels: int,
        class_name: str | None = None,
    ):
        self.model, self.processor, self.max_image_pixels = model.eval(), processor, max_image_pixels
        self.names = [model.config.id2label[label] for label in range(model.config.num_labels)]
        if class_name is not None and class_name not in self.names:
            raise ValueError(f"the model has no class {class_name!r}; it has {', '.join(self.names)}")
        self.label = None if class_name is None else self.names.index(class_name)

    def __call__(self, image: Path, page: Path, training_images: TrainingImages | None = None) -> None:
        """Writes the page about an image file.

        Raises BrokenImageError if the image cannot be read, and the errors of `expert_maps`.
        """
        pixel_values = prepare_file(image, self.processor, self.max_image_pixels)
        with torch.no_grad():
            outputs = self.model(pixel_values)
        confidence = self.model.confidence
        probabilities = confidence.probabilities(outputs.logits)[0]
        of_experts = outputs.expert_logits[0].softmax(dim=1)  # (E, C)
        predicted = int(probabilities.argmax())
        label = predicted if self.label is None else self.label
        seen = self._seen(pixel_values)
        experts = [
            {
                "picture": None if found is None else picture_source(_overlay(seen, found.numpy())),
                "nothing": found is not None and not found.any(),
                "prediction": None if found is None else self.names[int(own.argmax())],
                "score": _percent(own.max()),
                "of_class": _percent(own[label]),
            }
            for own, found in zip(of_experts, expert_maps(self.model, pixel_values, label), strict=True)
        ]
        scores, best = probabilities.topk(min(_TOP, len(self.names)))
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(
            page,
            "explanation.jinja",
            {
                "title": image.name,
                "answer": self.names[predicted],
                "rejected": confidence.known_score is not None and bool(confidence.rejected(outputs.logits)[0]),
                "calibrated": confidence.has_temperature,
                "class_name": self.names[label],
                "answers": [(self.names[one], _percent(score)) for one, score in zip(best, scores, strict=True)],
                "seen": picture_source(_enlarged(seen)),
                "experts": experts,
                "neighbours": None if training_images is None else training_images.nearest(outputs.expert_features),
            },
        )

    def _seen(self, pixel_values: Tensor) -> Image.Image:
        """The picture that the network sees: as large as it, cropped as it is."""
        normalised = EvaluationBatch.of_processor(self.processor)
        pixels = pixel_values[0] * normalised.std + normalised.mean
        return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _overlay(picture: Image.Image, found: np.ndarray) -> Image.Image:
    """Lays a map (height, width) from 0 to 1 over a picture, whose colours give way to those of the map."""
    picture = _enlarged(picture)
    strength = np.asarray(Image.fromarray(found.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    strength = strength.clip(0, 1)[:, :, None]  # (height, width, 1)
    colours = 255 * matplotlib.colormaps[_COLOURS](strength[:, :, 0])[:, :, :3]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[:, :, None]
    opacity = _OPACITY * strength
    return Image.fromarray((grey * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def _enlarged(picture: Image.Image) -> Image.Image:
    """Small pictures are enlarged without smoothing, as the network has no more of them."""
    scale = max(1, round(_SIDE / max(picture.size)))
    return ImageOps.scale(picture, scale, Image.Resampling.NEAREST)


def _percent(share: float | Tensor) -> str:
    return f"{100 * float(share):.1f} %"


def page_paths(images: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """Image -> its page in the folder: NAME.html, or NAME_2.html and so on for images of several folders."""
    pages: dict[Path, Path] = {}
    for image in images:
        names = (f"{image.stem}{'' if number == 1 else f'_{number}'}.html" for number in count(1))
        pages.setdefault(image, next(folder / name for name in names if folder / name not in pages.values()))
    return pages
