"""Loaders of batches that are ready for the network."""

from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BitImageProcessor

from data.batches import EvaluationBatch, FinishedBatches
from data.splits import undecoded
from data.transforms import OnBrokenImage, evaluation_transform


def evaluation_batches(
    split: Dataset,
    processor: BitImageProcessor,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Any = None,
    on_broken: OnBrokenImage | None = None,
) -> FinishedBatches:
    """Batches of `pixel_values` (B, 3, height, width), as `processor` makes them, and `labels` (B,), in order.

    With an `accelerate.Accelerator` they come on its device, and each of its processes gets its share. Images that
    `on_broken` lets pass have the label `data.BROKEN`.
    """
    rows = undecoded(split).with_transform(evaluation_transform(processor, on_broken))
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )
    finish = EvaluationBatch(
        processor.image_mean if processor.do_normalize else (0.0,) * 3,
        processor.image_std if processor.do_normalize else (1.0,) * 3,
        processor.rescale_factor if processor.do_rescale else 1.0,
    )
    if accelerator is None:
        return FinishedBatches(loader, finish)
    return FinishedBatches(accelerator.prepare(loader), finish.to(accelerator.device))
