"""The augmentations by name. Add one to these tables, and the recipes' options, `--help` and the errors know it.

torchvision is imported only when an augmentation is built, so that the names are available quickly.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        crop: `crop(size)` returns the steps that change an image's geometry, for uint8 tensors of any size.
        flip: mirror half of the images.
        varies: whether the images are varied at all. If not, training sees them as evaluation does.
        jitter: multiply brightness, contrast and saturation each by a random factor from 1 - jitter to 1 + jitter.
    """

    crop: Callable[[int], list[Callable]]
    flip: bool = True
    jitter: float = 0.0
    varies: bool = True

    @property
    def crops_at_random(self) -> bool:
        """Whether a random part of each image is taken and resized, first of all."""
        return self.crop is _random_resized_crop


def _random_resized_crop(size: int) -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.RandomResizedCrop(size)]


def _cifar(size: int) -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.RandomCrop(size, padding=size // 8), v2.RandomRotation(15)]


def _digits(size: int) -> list[Callable]:
    from torchvision.transforms import InterpolationMode, v2

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


def _nothing(size: int) -> list[Callable]:
    return []


def _randaugment() -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.RandAugment()]


def _trivialaugment() -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.TrivialAugmentWide()]


AUGMENTATIONS: dict[str, Augmentation] = {
    "imagenet": Augmentation(_random_resized_crop, jitter=0.4),
    "inaturalist": Augmentation(_random_resized_crop),
    "cifar": Augmentation(_cifar),
    # No flips and no large rotations: a mirrored 2 is not a digit, and a 6 upside down is a 9.
    "digits": Augmentation(_digits, flip=False),
    "none": Augmentation(_nothing, flip=False, varies=False),
}
# Policies that apply more random operations after the crop.
AUTO_AUGMENT: dict[str, Callable[[], list[Callable]]] = {
    "none": list,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
}
