"""Publishes small copies of training images with their features, for a page that shows the nearest ones.

The file is read by `hub_cards/space/predict.py`. Its tensors are

    features      (N, D) float16, of length 1: the features of each expert, scaled to length 1, one after another
    labels        (N,) int64
    pictures      (B,) uint8: JPEG files, one after another
    picture_ends  (N,) int64: where each of them ends

and its metadata `experts` is a JSON list of the experts whose features they are.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from sklearn.preprocessing import normalize
from torchvision.transforms.v2.functional import to_pil_image

from data import BrokenImageError, read_image, undecoded
from ride_bf.evaluation.embedding import EMBEDDINGS, read_neighbours
from ride_bf.evaluation.pages import as_jpeg
from ride_bf.runs.models import load_model
from ride_bf.runs.provenance import load_stored_splits_of

NEIGHBOURS = "neighbours.safetensors"
SIDE = 96  # pixels of the longer side of a picture, at most
_BYTES = 3_000  # of a picture, if the lowest quality allows it
_MOST_OF_A_CLASS = 50
_MOST_BYTES = 200 * 2**20  # of the file, so that a page starts soon


@dataclass(frozen=True)
class PublishedNeighbours:
    """What a file of `write_neighbours` holds.

    Attributes:
        images: how many training images are in it, of how many `of`.
        most: how many of one class, at most.
        broken: how many were left out because they cannot be read.
    """

    images: int
    of: int
    most: int
    broken: int

    def describe(self) -> str:
        """A sentence for the one who publishes."""
        left_out = f"; {self.broken:,} cannot be read and were left out" if self.broken else ""
        return (
            f"{NEIGHBOURS} has small copies of {self.images:,} of the {self.of:,} training images, at most {self.most} "
            f"a class, for all who can read the repository{left_out}"
        )


def write_neighbours(checkpoint: Path, path: Path, **data_options: Any) -> PublishedNeighbours:
    """Writes the file that this module describes, from the embeddings beside a checkpoint and its training images.

    `data_options` are those of `ride_bf.runs.provenance.load_splits_of`. The images are drawn at random, always the
    same ones. The file has no names of files, and the pictures have no metadata. Raises FileNotFoundError, with the
    command that makes them, if there are no embeddings; ValueError if they are of another model; the errors of
    `load_stored_splits_of`; and BrokenImageError if no image can be read.
    """
    model = load_model(checkpoint)
    embedded = read_neighbours(checkpoint / EMBEDDINGS, model, checkpoint)
    splits, data = load_stored_splits_of(checkpoint, ["train"], **data_options)
    images = undecoded(splits["train"])
    labels = embedded.label_numbers()
    width = embedded.features.shape[1]
    most = _most_of_a_class(np.bincount(labels), _MOST_BYTES // (_BYTES + 2 * width))
    places, pictures, broken, taken = [], [], 0, np.zeros(len(embedded.source.class_names), dtype=int)
    for place in np.random.default_rng(0).permutation(len(labels)):
        if taken[labels[place]] == most:
            continue
        try:
            picture = _picture(images[int(embedded.rows[place])]["image"], data.max_image_pixels)
        except BrokenImageError:
            broken += 1
            continue
        taken[labels[place]] += 1
        places.append(place)
        pictures.append(picture)
    if not pictures:
        raise BrokenImageError(
            f"none of the {len(labels):,} training images can be read; does their folder still exist?"
        )
    save_file(
        {
            "features": normalize(embedded.features[places]).astype(np.float16),
            "labels": labels[places].astype(np.int64),
            "pictures": np.frombuffer(b"".join(pictures), dtype=np.uint8),
            "picture_ends": np.cumsum([len(picture) for picture in pictures], dtype=np.int64),
        },
        path,
        metadata={"experts": json.dumps(_experts(embedded.source.expert, model.config.num_experts))},
    )
    return PublishedNeighbours(len(pictures), len(labels), most, broken)


def _experts(expert: int | None, num_experts: int) -> list[int]:
    return list(range(num_experts)) if expert is None else [expert]


def _most_of_a_class(counts: Iterable[int], most: int) -> int:
    """How many images of a class may be taken, so that those of all classes with `counts` (C,) are at most `most`."""
    counts = np.asarray(counts)
    return next((n for n in range(_MOST_OF_A_CLASS, 1, -1) if np.minimum(counts, n).sum() <= most), 1)


def _picture(image: dict[str, Any], max_image_pixels: int) -> bytes:
    """A small copy of what training sees of an image. Very small images are enlarged, so that one sees their pixels."""
    picture = to_pil_image(read_image(image, max_image_pixels))
    picture.thumbnail((SIDE, SIDE))
    factor = SIDE // max(picture.size)
    return as_jpeg(ImageOps.scale(picture, factor, Image.Resampling.NEAREST), _BYTES)
