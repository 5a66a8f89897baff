"""Loaders whose batches are ready for the network."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import BitImageProcessor

from data.batches import EvaluationBatch, FinishedBatches, TrainBatch, derived_seed
from data.columns import undecoded
from data.formats import MAX_IMAGE_PIXELS
from data.order import in_pieces
from data.streams import SHUFFLE_BUFFER, ImageStream, StreamCollate, TrainStream
from data.transforms import OnBrokenImage, collate_prepared, evaluation_transform, leave_out_broken, only_whole


def settle_worker(_worker: int) -> None:
    """Sets up a worker, for `DataLoader(worker_init_fn)`: it keeps memory shared and ignores most stop signals.

    The garbage collector would touch every object that a forked worker shares with the main process, and so copy over
    100 MB. Signals that stop a run often reach its workers too, but the main process needs its workers until it has
    saved a checkpoint. So a worker ignores SIGINT and SIGUSR1. It obeys SIGTERM only if the main process sent it,
    because multiprocessing ends leftover workers that way. Python can identify the sender on Linux, where workers are
    forked. On other systems every SIGTERM ends a worker.
    """
    gc.freeze()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    if main_process is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that are started later inherit this
        threading.Thread(target=_end_with, args=(main_process.pid,), daemon=True).start()


def _end_with(main_process: int) -> None:
    """Ends this process at the first SIGTERM that comes from the process `main_process`."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)  # torch would report any other code as a failed worker


def _worker_options(number: int) -> dict[str, Any]:
    """Returns the options of a `DataLoader` with `number` workers."""
    # By default Python 3.14 does not fork: each worker would import torch again and share no memory.
    forks = number > 0 and sys.platform == "linux"
    return {
        "num_workers": number,
        "worker_init_fn": settle_worker,
        "multiprocessing_context": "fork" if forks else None,
    }


def training_batches(
    split: Dataset | ImageStream,
    transform: Callable[[dict], dict],
    finish: TrainBatch,
    batch_size: int,
    accelerator: Accelerator,
    *,
    sampler: Sampler[int] | None = None,
    passes: int = 1,
    batches_per_step: int = 1,
    num_workers: int = 0,
    seed: int = 0,
) -> FinishedBatches:
    """Returns a loader of training batches on the accelerator's device. Each process gets its share.

    Args:
        split: images to train on. The shards of a stream are divided among the processes if their number allows it.
            Each process repeats its part of the stream, and the number of images determines the length of an epoch.
        transform: from `train_transform`; the workers apply it to each image.
        finish: is applied to each batch on the device.
        batch_size: of all processes together. Raises ValueError if the processes cannot share it evenly. With a single
            process the last batch of an epoch may be smaller, but a single last image joins the batch before it.
        sampler: draws the images of an epoch. By default each image comes once, in random order.
        passes: how often an epoch goes through the images.
        batches_per_step: number of batches whose gradients are accumulated. An epoch of a stream ends with a full
            step. In other epochs the last step may have fewer batches.
        num_workers: processes that prepare images, for each process of the accelerator.
        seed: of the order, of the augmentation, and of the random numbers in a training step.
    """
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {batch_size} is for all processes together, and {accelerator.num_processes} processes cannot "
            f"share it evenly; set --batch_size to a multiple of {accelerator.num_processes}"
        )
    options = {
        "batch_size": batch_size // accelerator.num_processes,
        **_worker_options(num_workers),
        "pin_memory": accelerator.device.type == "cuda",
        "persistent_workers": num_workers > 0,
    }
    finish = finish.to(accelerator.device)
    step_seed = (seed, accelerator.process_index)
    if isinstance(split, ImageStream):
        if sampler is not None:
            raise ValueError("a sampler cannot draw from a stream; with --streaming set --sampler instance")
        rows = split.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rows = split_dataset_by_node(rows, accelerator.process_index, accelerator.num_processes).repeat(None)
        num_workers = min(num_workers, rows.num_shards)  # `datasets` gives each worker shards of its own
        loader = DataLoader(
            TrainStream(rows, options["batch_size"], num_workers),
            collate_fn=StreamCollate(transform, split.codes, leave_out=True, seed=step_seed),
            **options | _worker_options(num_workers),
        )
        # By default Accelerate lets the first process read for all. Here each process already has its own share.
        loader = prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
        num_batches = max(1, len(split) * passes // (batch_size * batches_per_step)) * batches_per_step
        return FinishedBatches(loader, finish, num_batches, seed=step_seed)
    rows = TrainRows(undecoded(split), transform, seed)
    collate = partial(leave_out_broken, full=options["batch_size"])
    order = sampler if sampler is not None else Shuffle(len(split), passes, seed)
    loader = draws_loader(rows, order, accelerator, collate_fn=collate, **options)
    return FinishedBatches(accelerator.prepare(loader), finish, seed=step_seed)


def draws_loader(
    rows: TorchDataset, order: Sampler[int], accelerator: Accelerator, *, batch_size: int, **options: Any
) -> DataLoader:
    """Returns a loader of the draws of `order`, with `batch_size` rows of one process in a batch."""
    # With several processes Accelerate fills the last batches with images of the first ones, so all are full.
    kind = JoiningBatchSampler if accelerator.num_processes == 1 else BatchSampler
    batches = kind(NumberedDraws(order, len(rows)), batch_size, drop_last=False)
    return DataLoader(rows, batch_sampler=batches, **options)


def view_batches(
    split: Dataset,
    transform: Callable[[dict], dict],
    finish: TrainBatch,
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int = 0,
    seed: int = 0,
) -> FinishedBatches:
    """Returns a loader of augmented images in their order. `set_epoch` chooses the draw of the augmentation.

    Broken images stay, with the label `data.BROKEN`. The arguments are those of `training_batches`.
    """
    rows = ViewRows(undecoded(split), transform, seed)
    batches = BatchSampler(NumberedDraws(SequentialSampler(rows), len(rows)), batch_size, drop_last=False)
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate_prepared, **_worker_options(num_workers))
    return FinishedBatches(
        accelerator.prepare(loader), finish.to(accelerator.device), seed=(seed, accelerator.process_index)
    )


class Shuffle(Sampler[int]):
    """Draws each row `passes` times, in a random order that depends only on the seed and the epoch."""

    def __init__(self, num_rows: int, passes: int, seed: int):
        self.num_rows, self.passes, self.seed = num_rows, passes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows * self.passes

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        order %= self.num_rows
        return in_pieces(order)


class JoiningBatchSampler(BatchSampler):
    """Makes the same batches as torch, except that a single last image joins the batch before it.

    The BatchFormer and BatchNorm need several images in a batch. BatchNorm even raises an error for a single image if
    a feature map has one pixel. A batch size of 1 is kept.
    """

    def _sizes(self) -> list[int]:
        full, rest = divmod(len(self.sampler), self.batch_size)
        sizes = [self.batch_size] * full
        if rest == 1 and full:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[list[int]]:
        draws = iter(self.sampler)
        return (list(islice(draws, size)) for size in self._sizes())


class NumberedDraws(Sampler[int]):
    """Adds a unique number to each draw of a sampler: yields number * num_rows + row.

    The number keeps counting over the epochs, so a row that is drawn twice is augmented in two ways.
    """

    def __init__(self, sampler: Sampler[int], num_rows: int):
        self.sampler, self.num_rows = sampler, num_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):  # torch's samplers have none
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.sampler)
        return (number * self.num_rows + row for number, row in enumerate(self.sampler, first))


@dataclass(frozen=True)
class TrainRows(TorchDataset):
    """Prepared images. The augmentation depends only on the number of the draw, not on the worker or the process.

    A prepared row has the columns that `transform` returns, and `index`, its row in the data set. If only one image of
    a batch can be read, the batch also has a second augmentation of it.
    """

    rows: Dataset
    transform: Callable[[dict], dict]
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self, indices: list[int]) -> list[str]:
        """Returns the paths of images; for an image that is stored in the data set, its number."""
        images = self.rows[indices]["image"]
        return [image["path"] or f"image {index}" for index, image in zip(indices, images, strict=True)]

    def __getitems__(self, draws: list[int]) -> list[dict]:
        return self.prepared(draws, replace_broken=True)

    def prepared(self, draws: list[int], replace_broken: bool) -> list[dict]:
        numbers, indices = zip(*(divmod(draw, len(self.rows)) for draw in draws), strict=True)
        images = self.rows[list(indices)]

        def prepare(place: int, *seed: int) -> dict:
            torch.default_generator.manual_seed(derived_seed(self.seed, numbers[place], *seed))
            row = self.transform({name: [values[place]] for name, values in images.items()})
            return {name: values[0] for name, values in row.items()} | {"index": indices[place]}

        with torch.random.fork_rng(devices=[]):  # without workers the training step uses the same generator
            prepared = [prepare(place) for place in range(len(draws))]
            alone = only_whole(prepared) if replace_broken else None
            return prepared if alone is None else [*prepared, prepare(alone, 1)]

    def __getitem__(self, draw: int) -> dict:
        return self.__getitems__([draw])[0]


class ViewRows(TrainRows):
    """The same images, one row for each draw."""

    def __getitems__(self, draws: list[int]) -> list[dict]:
        return self.prepared(draws, replace_broken=False)


def evaluation_batches(
    split: Dataset | ImageStream,
    processor: BitImageProcessor,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    on_broken: OnBrokenImage | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> FinishedBatches:
    """Returns a loader of `pixel_values` (B, 3, height, width), prepared as `processor` does, and `labels` (B,).

    The images keep their order. With an accelerator the batches are on its device, and each process gets its share.
    Images of more than `max_image_pixels` are broken. Broken images that `on_broken` skips have the label
    `data.BROKEN`.
    """
    transform = evaluation_transform(processor, on_broken, max_image_pixels)
    streamed = isinstance(split, ImageStream)
    loader = DataLoader(
        split.rows if streamed else undecoded(split).with_transform(transform),
        batch_size=batch_size,
        **_worker_options(num_workers),
        collate_fn=StreamCollate(transform, split.codes, leave_out=False) if streamed else collate_prepared,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )
    finish = EvaluationBatch.of_processor(processor)
    if accelerator is None:
        return FinishedBatches(loader, finish)
    return FinishedBatches(accelerator.prepare(loader), finish.to(accelerator.device))
