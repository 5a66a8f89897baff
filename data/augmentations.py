"""The augmentations by name: an entry of these tables is known to the recipes' options, `--help` and the errors.

torchvision is imported where an augmentation is made: the names are needed in no time.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    `crop(size)` gives the steps that change an image's geometry, on uint8 tensors of any size. `flip`: half of the
    images are mirrored. `jitter`: brightness, contrast and saturation are each multiplied with a factor of
    1 - jitter to 1 + jitter.
    """

    crop: Callable[[int], list[Callable]]
    flip: bool = True
    jitter: float = 0.0


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
    # Neither flips nor large rotations: a mirrored 2 or a 6 on its head is another sign, or none.
    "digits": Augmentation(_digits, flip=False),
}
# Policies of further random operations, after the crop.
AUTO_AUGMENT: dict[str, Callable[[], list[Callable]]] = {
    "none": list,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
}
