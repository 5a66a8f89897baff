"""Loaders of batches that are ready for the network."""

import gc
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler
from transformers import BitImageProcessor

from data.batches import EvaluationBatch, FinishedBatches, TrainBatch
from data.splits import undecoded
from data.streams import SHUFFLE_BUFFER, ImageStream, StreamCollate
from data.transforms import OnBrokenImage, evaluation_transform, leave_out_broken


def share_memory(_worker: int) -> None:
    """For `DataLoader(worker_init_fn)`: what a forked worker inherits stays shared.

    A collection of garbage would touch, and so copy, every object of the process that it comes from: over 100 MB.
    """
    gc.freeze()


def training_batches(
    split: Dataset | ImageStream,
    transform: Callable[[dict], dict],
    finish: TrainBatch,
    batch_size: int,
    accelerator: Accelerator,
    *,
    sampler: Sampler[int] | None = None,
    passes: int = 1,
    num_workers: int = 0,
    seed: int = 0,
) -> FinishedBatches:
    """Batches to train on, on the accelerator's device, to each of its processes its share.

    Args:
        split: images to train on. Of a stream, whole shards go to each process where their number allows it; what a
            process is given is read over and over, and an epoch is as many batches as the images make.
        transform: `train_transform`'s, which workers apply to each image.
        finish: what is then done to each batch on the device.
        batch_size: of all processes together. Raises ValueError if they cannot share it out evenly.
        sampler: what draws an epoch's images; by default each comes once, in random order.
        passes: how often an epoch goes through the images.
        num_workers: processes that prepare images, for each process of the accelerator.
        seed: of the order of a stream.
    """
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {batch_size} is that of all processes together and cannot be shared out among "
            f"{accelerator.num_processes}; set --batch_size to a multiple"
        )
    options = {
        "batch_size": batch_size // accelerator.num_processes,
        "num_workers": num_workers,
        "worker_init_fn": share_memory,
        "pin_memory": accelerator.device.type == "cuda",
        "persistent_workers": num_workers > 0,
    }
    finish = finish.to(accelerator.device)
    if isinstance(split, ImageStream):
        if sampler is not None:
            raise ValueError("a stream gives each image in its turn; with --streaming set --sampler instance")
        rows = split.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rows = split_dataset_by_node(rows, accelerator.process_index, accelerator.num_processes).repeat(None)
        loader = DataLoader(rows, collate_fn=StreamCollate(transform, split.codes, leave_out=True), **options)
        # Accelerate would have the first process read for all; this one's rows are its own share already.
        loader = prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
        return FinishedBatches(loader, finish, num_batches=max(1, len(split) * passes // batch_size))
    rows = undecoded(split).repeat(passes).with_transform(transform)
    loader = DataLoader(rows, sampler=sampler, shuffle=sampler is None, collate_fn=leave_out_broken, **options)
    return FinishedBatches(accelerator.prepare(loader), finish)


def evaluation_batches(
    split: Dataset | ImageStream,
    processor: BitImageProcessor,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    on_broken: OnBrokenImage | None = None,
) -> FinishedBatches:
    """Batches of `pixel_values` (B, 3, height, width), as `processor` makes them, and `labels` (B,), in order.

    With an accelerator they come on its device, and each of its processes gets its share. Images that `on_broken` lets
    pass have the label `data.BROKEN`.
    """
    transform = evaluation_transform(processor, on_broken)
    streamed = isinstance(split, ImageStream)
    loader = DataLoader(
        split.rows if streamed else undecoded(split).with_transform(transform),
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=share_memory,
        collate_fn=StreamCollate(transform, split.codes, leave_out=False) if streamed else None,
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
