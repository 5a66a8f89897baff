"""What is done to each image by itself, where it is read: decoding, cropping and resizing, on uint8 tensors.

The rest, which is arithmetic on whole batches, is in `data.batches`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import default_collate
from torchvision.transforms import v2
from transformers import BitImageProcessor
from transformers.image_utils import PILImageResampling

from data.augmentations import AUGMENTATIONS, AUTO_AUGMENT
from data.reading import BrokenImageError, read_image

BROKEN = -100  # label of an image that could not be read; the losses of torch ignore it


@dataclass(frozen=True)
class OnBrokenImage:
    """What happens to an image that cannot be read.

    "stop": BrokenImageError, whose message has the place that `find_entry(path)` gives. "skip": the row is passed on
    with the label `BROKEN` and black pixels, for the loader or the evaluation to leave out, and a line about it is
    added to the file `log`.
    """

    action: Literal["stop", "skip"] = "stop"
    find_entry: Callable[[str], str | None] | None = None
    log: Path | None = None

    def __call__(self, image: dict, error: BrokenImageError) -> None:
        place = self.find_entry(image["path"]) if self.find_entry and image["path"] else None
        message = f"{error} ({place})" if place else str(error)
        if self.action == "stop":
            raise BrokenImageError(
                f"{message}. Mend or remove it, find all of them by python -m ride_bf.check_data, or go on without "
                "such images: --on_broken_image skip"
            ) from error
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:  # one write of one line: processes do not mix theirs
                file.write(message.replace("\n", " ") + "\n")


@dataclass(frozen=True)
class _Rows:
    """A function for `Dataset.with_transform`; a class, so that workers of a spawned DataLoader can be sent it."""

    prepare: Callable[[torch.Tensor], torch.Tensor]
    size: tuple[int, int]
    on_broken: OnBrokenImage

    def __call__(self, rows: dict) -> dict:
        pixel_values, labels = [], []
        for image, label in zip(rows["image"], rows["label"], strict=True):
            try:
                pixel_values.append(self.prepare(read_image(image)))
                labels.append(label)
            except BrokenImageError as error:
                self.on_broken(image, error)
                pixel_values.append(torch.zeros(3, *self.size, dtype=torch.uint8))
                labels.append(BROKEN)
        return {"pixel_values": pixel_values, "labels": labels}


def train_transform(
    augmentation: str, image_size: int, auto_augment: str = "none", on_broken: OnBrokenImage | None = None
) -> Callable[[dict], dict]:
    """A function for `Dataset.with_transform`, on a column `image` that is not decoded (see `undecoded`).

    Rows of `image` and `label` become uint8 `pixel_values` (3, image_size, image_size), cropped and varied in geometry
    by `augmentation`, a key of `AUGMENTATIONS`, and then by `auto_augment`, one of `AUTO_AUGMENT`; and `labels`.
    Flip, colours and normalisation are `data.batches.TrainBatch`'s. Raises ValueError for an unknown name.
    """
    for value, known, kind in ((augmentation, AUGMENTATIONS, "augmentation"), (auto_augment, AUTO_AUGMENT, "policy")):
        if value not in known:
            raise ValueError(f"no {kind} is called {value!r}; there are {', '.join(known)}")
    steps = [*AUGMENTATIONS[augmentation].crop(image_size), *AUTO_AUGMENT[auto_augment]()]
    return _Rows(v2.Compose(steps), (image_size, image_size), on_broken or OnBrokenImage())


def evaluation_processor(
    resize_size: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> BitImageProcessor:
    """The stock image processor that is saved beside the model: shorter side to `resize_size`, then a centre crop.

    Evaluation goes through it too, so that a published number and a `pipeline` call see the same pixels.
    """
    return BitImageProcessor(
        size={"shortest_edge": resize_size},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(mean),
        image_std=list(std),
    )


@dataclass(frozen=True)
class _ProcessorSteps:
    """A processor's resizing and crop, without the checks and grouping that cost as much again for each call."""

    processor: BitImageProcessor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.processor
        if processor.do_resize:
            pixels = processor.resize(pixels, processor.size, processor.resample)
        return processor.center_crop(pixels, processor.crop_size) if processor.do_center_crop else pixels


def evaluation_transform(
    processor: BitImageProcessor, on_broken: OnBrokenImage | None = None
) -> Callable[[dict], dict]:
    """A function for `Dataset.with_transform` that resizes and crops images as `processor` does, without chance.

    As `train_transform`; normalisation is `data.batches.EvaluationBatch`'s.
    """
    size = (processor.crop_size["height"], processor.crop_size["width"])
    return _Rows(_ProcessorSteps(processor), size, on_broken or OnBrokenImage())


def only_whole(rows: list[dict]) -> int | None:
    """The place of the only row of several that could be read; None if there are more, or none, or one row in all.

    BatchNorm cannot normalise a single image where a feature map is one pixel: whoever makes the batch adds another
    augmentation of that image. Images of other batches cannot take the place of those that are left out, because each
    process must take the same number of steps.
    """
    whole = [place for place, row in enumerate(rows) if row["labels"] != BROKEN]
    return whole[0] if len(whole) == 1 < len(rows) else None


def leave_out_broken(rows: list[dict], full: int = 1) -> dict[str, torch.Tensor]:
    """A batch of the rows that could be read, for `DataLoader(collate_fn)`.

    Raises BrokenImageError if none could of `full` rows or more; fewer, as the last of an epoch may be, give {}.
    """
    whole = [row for row in rows if row["labels"] != BROKEN]
    if not whole and len(rows) < full:
        return {}
    if not whole:
        raise BrokenImageError(
            f"none of a batch's {len(rows)} images can be read; is the folder still there? If it is, mend or remove "
            "them (python -m ride_bf.check_data lists them), or set a larger --batch_size"
        )
    return default_collate(whole)
