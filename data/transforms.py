"""Transforms of single images, in the process that reads them: decoding, cropping and resizing, on uint8 tensors.

Operations on whole batches are in `data.batches`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import default_collate
from torchvision.transforms import v2
from transformers import BaseImageProcessor, BitImageProcessor
from transformers.image_utils import PILImageResampling

from data.augmentations import AUGMENTATIONS, AUTO_AUGMENT
from data.crops import Reader, ScaledCrop
from data.formats import MAX_IMAGE_PIXELS
from data.reading import BrokenImageError, read_image

BROKEN = -100  # label of an image that cannot be read; torch's losses ignore it


@dataclass(frozen=True)
class OnBrokenImage:
    """What to do with an image that cannot be read.

    "stop" raises BrokenImageError, with the place in the list that `find_entry(path)` returns. "skip" passes the row on
    with the label `BROKEN` and black pixels, so that the loader or the evaluation leaves it out, and adds a line about
    it to the file `log`.
    """

    action: Literal["stop", "skip"] = "stop"
    find_entry: Callable[[str], str | None] | None = None
    log: Path | None = None

    def __call__(self, image: dict, error: BrokenImageError) -> None:
        place = self.find_entry(image["path"]) if self.find_entry and image["path"] else None
        message = f"{error} ({place})" if place else str(error)
        if self.action == "stop":
            raise BrokenImageError(
                f"{message}. Repair or remove it (python -m ride_bf.check_data lists all broken images), or leave out "
                "broken images: --on_broken_image skip"
            ) from error
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:  # one write a line: processes do not mix lines
                file.write(message.replace("\n", " ") + "\n")


@dataclass(frozen=True)
class _Rows:
    """A function for `Dataset.with_transform`. It is a class, so that it can be pickled for spawned workers."""

    prepare: Callable[[torch.Tensor], torch.Tensor]
    size: tuple[int, int] | None
    """Height and width of a prepared image; None if they depend on the image. Then broken images are not skipped."""
    on_broken: OnBrokenImage
    max_image_pixels: int
    read: Reader = read_image

    def __call__(self, rows: dict) -> dict:
        pixel_values, labels = [], []
        for image, label in zip(rows["image"], rows["label"], strict=True):
            try:
                pixel_values.append(self.prepare(self.read(image, self.max_image_pixels)))
                labels.append(label)
            except BrokenImageError as error:
                self.on_broken(image, error)
                if self.size is None:
                    raise
                pixel_values.append(torch.zeros(3, *self.size, dtype=torch.uint8))
                labels.append(BROKEN)
        return {"pixel_values": pixel_values, "labels": labels}


def train_transform(
    augmentation: str,
    image_size: int,
    auto_augment: str = "none",
    on_broken: OnBrokenImage | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    processor: BitImageProcessor | None = None,
    jpeg_scaling: bool = False,
) -> Callable[[dict], dict]:
    """Returns a function for `Dataset.with_transform`. The column `image` must be undecoded (see `undecoded`).

    It turns rows of `image` and `label` into `labels` and uint8 `pixel_values` (3, image_size, image_size). The images
    are cropped and varied in geometry by `augmentation`, a key of `AUGMENTATIONS`, and then by `auto_augment`, a key of
    `AUTO_AUGMENT`. `data.batches.TrainBatch` does the flips, the colours and the normalisation. Images of more than
    `max_image_pixels` are broken. An augmentation that does not vary the images prepares them as `processor` does. With
    `jpeg_scaling` large JPEG files are decoded at a lower scale, as far as the crop allows; see `data.crops`. Raises
    ValueError for an unknown name, and for `jpeg_scaling` with an augmentation without random crops.
    """
    for value, known, kind in ((augmentation, AUGMENTATIONS, "augmentation"), (auto_augment, AUTO_AUGMENT, "policy")):
        if value not in known:
            raise ValueError(f"no {kind} is called {value!r}; there are {', '.join(known)}")
    crop = AUGMENTATIONS[augmentation].crop(image_size)
    if not AUGMENTATIONS[augmentation].varies:
        if processor is None:
            raise ValueError(f"the augmentation {augmentation!r} leaves images to the image processor: pass processor")
        crop = [_ProcessorSteps(processor)]
    read: Reader = read_image
    if jpeg_scaling:
        if not AUGMENTATIONS[augmentation].crops_at_random:
            raise ValueError(f"the augmentation {augmentation!r} takes no random crops: set jpeg_scaling to False")
        read, crop = ScaledCrop(image_size), []
    steps = [*crop, *AUTO_AUGMENT[auto_augment]()]
    prepare = v2.Compose(steps) if steps else v2.Identity()
    size = (image_size, image_size) if AUGMENTATIONS[augmentation].varies else prepared_size(processor)
    return _Rows(prepare, size, on_broken or OnBrokenImage(), max_image_pixels, read)


def evaluation_processor(
    resize_size: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> BitImageProcessor:
    """Returns the image processor that is saved with the model: resize the shorter side, then crop the centre.

    Evaluation uses it too, so a published accuracy and a `pipeline` call see the same pixels.
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
    """A processor's resize and crop, without its checks and grouping, which would double the time of each call."""

    processor: BitImageProcessor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.processor
        if processor.do_resize:
            pixels = processor.resize(pixels, processor.size, processor.resample)
        return processor.center_crop(pixels, processor.crop_size) if processor.do_center_crop else pixels


def prepared_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Returns the height and width of the images that `processor` prepares; None if they depend on the image."""
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    elif getattr(processor, "do_resize", False):
        size = processor.size
    else:
        return None
    return (size["height"], size["width"]) if "height" in size and "width" in size else None


def evaluation_transform(
    processor: BitImageProcessor, on_broken: OnBrokenImage | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Callable[[dict], dict]:
    """Returns a function for `Dataset.with_transform` that resizes and crops images as `processor` does.

    Its rows are those of `train_transform`. `data.batches.EvaluationBatch` does the normalisation.
    """
    return _Rows(_ProcessorSteps(processor), prepared_size(processor), on_broken or OnBrokenImage(), max_image_pixels)


def only_whole(rows: list[dict]) -> int | None:
    """Returns the index of the only readable row if all other rows of a batch are broken, else None.

    BatchNorm cannot normalise a single image if a feature map has one pixel, so the caller adds another augmentation of
    that image. Images of other batches cannot replace the broken ones, because each process must take the same number
    of steps.
    """
    whole = [place for place, row in enumerate(rows) if row["labels"] != BROKEN]
    return whole[0] if len(whole) == 1 < len(rows) else None


def collate_prepared(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Makes a batch of rows of `evaluation_transform`, for `DataLoader(collate_fn)`.

    Raises BrokenImageError if the images have different sizes, as some image processors leave them.
    """
    sizes = sorted({tuple(row["pixel_values"].shape[1:]) for row in rows})
    if len(sizes) > 1:
        shown = " and ".join(f"{width} x {height}" for height, width in sizes[:2])
        raise BrokenImageError(
            f"the image processor makes images of different sizes, such as {shown} pixels, which cannot be in one "
            'batch; in training set --crop whole; for a trained model set "do_center_crop": true and a "crop_size" in '
            "its preprocessor_config.json, or use --batch_size 1"
        )
    return default_collate(rows)


def leave_out_broken(rows: list[dict], full: int = 1) -> dict[str, torch.Tensor]:
    """Makes a batch of the rows that are not broken, for `DataLoader(collate_fn)`.

    If all rows are broken, raises BrokenImageError for `full` rows or more. For fewer rows, which the last batch of an
    epoch may have, returns {}.
    """
    whole = [row for row in rows if row["labels"] != BROKEN]
    check_some_read(len(whole), len(rows), full)
    if not whole:
        return {}
    return default_collate(whole)


def check_some_read(read: int, rows: int, full: int) -> None:
    """Raises BrokenImageError if none of a batch's `rows` could be read, and it is a full batch."""
    if not read and rows >= full:
        raise BrokenImageError(
            f"none of a batch's {rows} images can be read; does the folder still exist? If it does, repair or "
            "remove them (python -m ride_bf.check_data lists them), or set a larger --batch_size"
        )
