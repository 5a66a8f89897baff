"""What is done to a batch of images at once, on the device: flips, colours, mixing and normalisation."""

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

    With the very arithmetic of the image processors of transformers, so that the numbers are theirs to the last bit.
    Mean and standard deviation (3,) are of the values after these have been multiplied with `rescale_factor`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], rescale_factor: float = 1 / 255):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, (torch.tensor(values) * (1.0 / rescale_factor))[:, None, None], persistent=False)

    @classmethod
    def of_processor(cls, processor: BaseImageProcessor) -> "EvaluationBatch":
        """The arithmetic of an image processor."""
        return cls(
            processor.image_mean if processor.do_normalize else (0.0,) * 3,
            processor.image_std if processor.do_normalize else (1.0,) * 3,
            processor.rescale_factor if processor.do_rescale else 1.0,
        )

    def forward(self, batch: dict) -> dict:
        return {**batch, "pixel_values": self.normalise(batch["pixel_values"].to(torch.float32))}

    def normalise(self, pixels: Tensor) -> Tensor:
        """In place, from float (B, 3, H, W) of values 0 to 255."""
        return pixels.sub_(self.mean).div_(self.std)


class TrainBatch(EvaluationBatch):
    """Mirrors, colours, normalises and mixes a batch, each image by its own draw.

    The distribution is that of torchvision's RandomHorizontalFlip, ColorJitter and Normalize on single images, but
    that colours are not rounded to whole numbers in between. Draws come from torch's generator of the CPU, so that
    they are the same on every device.

    Args:
        augmentation: a key of `AUGMENTATIONS`.
        mean, std: as `EvaluationBatch` has them.
        mixup_alpha, cutmix_alpha: of mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); 0: without it. Where
            both are given, each batch gets one of them. A mixed batch also has `mixed_labels` (B,), the classes of the
            images mixed in, and `label_weight`, the share that is left to `labels`.
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
        """Mixes each image with another of the batch, by torchvision's mixup or CutMix."""
        count = len(batch["labels"])
        mixer, alpha = self.mixers[torch.randint(len(self.mixers), ()).item()]
        # Places in the batch instead of classes: the soft labels then tell which image was mixed with which, and our
        # losses, whose margins need hard labels, can take each in turn.
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
    """Mirrors each image (B, 3, H, W) with a probability of one half."""
    flipped = (torch.rand(len(pixels)) < 0.5).to(pixels.device, non_blocking=True)
    return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)


def draw_jitter(count: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Factors (B, 3) of brightness, contrast and saturation, and for each image the order (B, 3) they come in."""
    factors = 1 - jitter + 2 * jitter * torch.rand(count, 3)
    return factors, torch.rand(count, 3).argsort(dim=1)


def color_jitter(pixels: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes brightness (0), contrast (1) and saturation (2) of images (B, 3, H, W) of values 0 to 255.

    `factors` (B, 3) are in that sequence; `order` (B, 3) is the sequence in which each image is changed. Each change
    blends the image with black, with its mean grey, or with its greys: torchvision's `adjust_brightness`,
    `adjust_contrast` and `adjust_saturation`.
    """
    for step in order.unbind(dim=1):  # (B,): the change whose turn it is
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
    """A loader whose batches are finished on their device by `finish(batch)`.

    Args:
        loader: yields batches; its `set_epoch`, if it has one, is passed on.
        finish: `TrainBatch` or `EvaluationBatch`.
        num_batches: after which an epoch ends, for a loader that has no end of its own.
        seed: numbers from which torch's generators are seeded before each batch is finished, with the epoch and the
            batch's place in it. So what is drawn for a batch, in the step on it too, depends on nothing that went
            before, and a run can go on in the middle of an epoch as if it had not been interrupted. None: never seeded.
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
        """The epoch's batches but for the first `start`, which are not read."""
        loader = skip_first_batches(self.loader, start) if start else self.loader
        stop = None if self.num_batches is None else self.num_batches - start
        for index, batch in enumerate(islice(loader, stop), start):
            if self.seed is not None:
                torch.manual_seed(derived_seed(*self.seed, self.epoch, index))
            if batch:  # of an epoch's last images none may be left (`leave_out_broken`)
                yield self.finish(batch)

    def describe(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Path and class of each image of a batch that this loader gave; of a stream only the class is known."""
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
    """A seed of 64 bits for what these numbers, from 0 up, tell apart."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
