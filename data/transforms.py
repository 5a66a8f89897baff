"""Augmentation for training, and the image processor that evaluation and the saved model share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from transformers import BitImageProcessor
from transformers.image_utils import PILImageResampling


def _imagenet(size: int) -> list[Callable]:
    return [
        v2.RandomResizedCrop(size),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0),
    ]


def _inaturalist(size: int) -> list[Callable]:
    return [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]


def _cifar(size: int) -> list[Callable]:
    return [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip(), v2.RandomRotation(15)]


def _digits(size: int) -> list[Callable]:
    # Neither flips nor large rotations: a mirrored 2 or a 6 on its head is another sign, or none.
    return [
        v2.Resize((size, size), InterpolationMode.BILINEAR),
        v2.RandomAffine(
            degrees=15,
            translate=(0.125, 0.125),
            scale=(0.8, 1.2),
            shear=(-10, 10),
            interpolation=InterpolationMode.BILINEAR,
        ),
    ]


AUGMENTATIONS: dict[str, Callable[[int], list[Callable]]] = {
    "imagenet": _imagenet,
    "inaturalist": _inaturalist,
    "cifar": _cifar,
    "digits": _digits,
}


def train_transform(
    augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[dict], dict]:
    """A function for `Dataset.with_transform`: rows of `image` and `label` to `pixel_values` and `labels`.

    `augmentation` is a name in `AUGMENTATIONS`. `pixel_values` are float32 (3, image_size, image_size) each, normalised
    with `mean` and `std`. Raises ValueError for an unknown name.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"no augmentation is called {augmentation!r}; there are {', '.join(AUGMENTATIONS)}")
    steps = [
        v2.PILToTensor(),
        *AUGMENTATIONS[augmentation](image_size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    return _TrainTransform(v2.Compose(steps))


@dataclass(frozen=True)
class _TrainTransform:  # a class, so that workers of a spawned DataLoader can be sent it
    steps: v2.Compose

    def __call__(self, rows: dict) -> dict:
        images = [self.steps(convert_to_rgb(image)) for image in rows["image"]]
        return {"pixel_values": images, "labels": rows["label"]}


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; what is transparent in it lies on white.

    So have it the image processors of transformers 5.23 in a pipeline; those of 5.17 drop the transparency instead.
    """
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


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


def evaluation_transform(processor: BitImageProcessor) -> Callable[[dict], dict]:
    """A function for `Dataset.with_transform` that prepares images as `processor` does, without chance."""

    return _EvaluationTransform(processor)


@dataclass(frozen=True)
class _EvaluationTransform:
    processor: BitImageProcessor

    def __call__(self, rows: dict) -> dict:
        images = [convert_to_rgb(image) for image in rows["image"]]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": rows["label"]}
