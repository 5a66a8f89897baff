"""Operations on a whole batch of images, on the device: flips, colour jitter, mixing and normalisation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from accelerate import skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale
from transformers import BaseImageProcessor

from data.augmentations import AUGMENTATIONS


class EvaluationBatch(nn.Module):
    """Normalises `pixel_values` from uint8 (B, 3, H, W).

    The arithmetic is that of the image processors of transformers, so the results are equal to the last bit. The mean
    and the standard deviation (3,) apply to pixel values that are already multiplied by `rescale_factor`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], rescale_factor: float = 1 / 255):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, (torch.tensor(values) * (1.0 / rescale_factor))[:, None, None], persistent=False)

    @classmethod
    def of_processor(cls, processor: BaseImageProcessor) -> "EvaluationBatch":
        """Normalises as an image processor does."""
        return cls(
            processor.image_mean if processor.do_normalize else (0.0,) * 3,
            processor.image_std if processor.do_normalize else (1.0,) * 3,
            processor.rescale_factor if processor.do_rescale else 1.0,
        )

    def forward(self, batch: dict) -> dict:
        return {**batch, "pixel_values": self.normalise(batch["pixel_values"].to(torch.float32))}

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalises float pixels (B, 3, H, W) of values 0 to 255, in place."""
        return pixels.sub_(self.mean).div_(self.std)


class TrainBatch(EvaluationBatch):
    """Flips, jitters, normalises and mixes a batch, with random numbers of its own for each image.

    The distribution is that of torchvision's RandomHorizontalFlip, ColorJitter and Normalize on single images, except
    that colours are not rounded in between. The random numbers come from torch's CPU generator, so they are the same
    on every device.

    Args:
        augmentation: a key of `AUGMENTATIONS`.
        mean, std: as for `EvaluationBatch`.
        mixup_alpha, cutmix_alpha: parameters of mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); 0 turns it
            off. If both are on, each batch gets one of them at random. A mixed batch also has `mixed_labels` (B,),
            the classes of the images mixed in, and `label_weight`, the weight that is left for `labels`.
    """

    def __init__(
        self,
        augmentation: str,
        mean: Sequence[float],
        std: Sequence[float],
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ):
        super().__init__(mean, std)
        self.flip, self.jitter = AUGMENTATIONS[augmentation].flip, AUGMENTATIONS[augmentation].jitter
        self.mixers = [
            (mixer, alpha) for mixer, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha > 0
        ]

    def forward(self, batch: dict) -> dict:
        pixels = batch["pixel_values"]
        if self.flip:
            pixels = _flip_half(pixels)
        pixels = pixels.to(torch.float32)
        if self.jitter:
            pixels = color_jitter(pixels, *draw_jitter(len(pixels), self.jitter))
        batch = {**batch, "pixel_values": self.normalise(pixels)}
        return self.mix(batch) if self.mixers else batch

    def mix(self, batch: dict) -> dict:
        """Mixes each image with another image of the batch, with torchvision's mixup or CutMix."""
        count = len(batch["labels"])
        mixer, alpha = self.mixers[torch.randint(len(self.mixers), ()).item()]
        # Pass positions in the batch instead of classes: the soft labels then show which images were mixed. Our losses
        # have margins that need hard labels, so they handle the two labels one after the other.
        places = torch.arange(count, device=batch["labels"].device)
        pixels, shares = mixer(alpha=alpha, num_classes=count)(batch["pixel_values"], places)  # shares (B, B)
        own = shares.diagonal()
        partners = (shares - torch.diag(own)).argmax(dim=1)
        partners = torch.where(own < 1, partners, places)
        return {
            **batch,
            "pixel_values": pixels,
            "mixed_labels": batch["labels"][partners],
            "label_weight": own[0],  # one draw for the whole batch
        }


def _flip_half(pixels: Tensor) -> Tensor:
    """Mirrors each image (B, 3, H, W) with probability 0.5."""
    flipped = (torch.rand(len(pixels)) < 0.5).to(pixels.device, non_blocking=True)
    return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)


def draw_jitter(count: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Draws factors (B, 3) for brightness, contrast and saturation, and their order (B, 3) for each image."""
    factors = 1 - jitter + 2 * jitter * torch.rand(count, 3)
    return factors, torch.rand(count, 3).argsort(dim=1)


def color_jitter(pixels: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes brightness (0), contrast (1) and saturation (2) of images (B, 3, H, W) of values 0 to 255.

    The columns of `factors` (B, 3) belong to these three changes. `order` (B, 3) says in which order each image is
    changed. Each change blends the image with black, with its mean grey, or with its grey version, as torchvision's
    `adjust_brightness`, `adjust_contrast` and `adjust_saturation` do.
    """
    for step in order.unbind(dim=1):  # (B,): the change to make now
        factor = factors.gather(1, step[:, None])[:, :, None, None].to(pixels.device, non_blocking=True)  # (B, 1, 1, 1)
        contrast, saturation = (
            (step == change)[:, None, None, None].to(pixels.device, non_blocking=True) for change in (1, 2)
        )
        grey = rgb_to_grayscale(pixels)  # (B, 1, H, W)
        mean = grey.mean(dim=(1, 2, 3), keepdim=True)
        blended_with = grey * saturation + mean * contrast
        pixels = (pixels * factor + blended_with * (1 - factor)).clamp_(0, 255)
    return pixels


class FinishedBatches:
    """A loader that applies `finish(batch)` to each batch, on the batch's device.

    Args:
        loader: yields batches. `set_epoch` is passed on to it if it has one.
        finish: `TrainBatch` or `EvaluationBatch`.
        num_batches: length of an epoch, for a loader that never ends.
        seed: numbers that, with the epoch and the batch's index, seed torch's generators before each batch. The random
            numbers of a batch and of its training step then do not depend on earlier batches, so a run resumed in the
            middle of an epoch goes on as if it had not been interrupted. None: do not seed.
    """

    def __init__(
        self,
        loader: DataLoader,
        finish: Callable[[dict], dict],
        num_batches: int | None = None,
        seed: Sequence[int] | None = None,
    ):
        self.loader, self.finish, self.num_batches, self.seed = loader, finish, num_batches, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loader) if self.num_batches is None else self.num_batches

    def __iter__(self) -> Iterator[dict]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[dict]:
        """Yields the epoch's batches without the first `start`.

        Their images are not read, or of a stream, which has no other way to find its place, read but not decoded.
        """
        for index, batch in enumerate(self._from(start), start):
            if self.seed is not None:
                torch.manual_seed(derived_seed(*self.seed, self.epoch, index))
            if batch:  # empty if all images of a last batch are broken (`leave_out_broken`)
                yield self.finish(batch)

    def _from(self, start: int) -> Iterator[dict]:
        if hasattr(self.loader.dataset, "skip_batches"):
            skipped = self.loader.dataset.skip_batches(start)
            return islice(self.loader, start - skipped, self.num_batches - skipped)
        loader = skip_first_batches(self.loader, start) if start else self.loader
        return islice(loader, None if self.num_batches is None else self.num_batches - start)

    def describe(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Describes each image of a batch from this loader by its path and class; for a stream, by its class only."""
        dataset, labels = self.loader.dataset, batch["labels"].tolist()
        if "index" not in batch:
            return [f"an image of class {label}" for label in labels]
        paths = dataset.paths(batch["index"].tolist())
        return [f"{path}, class {label}" for path, label in zip(paths, labels, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


def derived_seed(*numbers: int) -> int:
    """Returns a 64-bit seed made from these numbers, which must be 0 or more."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
