"""Loaders of batches that are ready for the network."""

import atexit
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import BitImageProcessor

from data.batches import EvaluationBatch, FinishedBatches, TrainBatch, derived_seed
from data.splits import undecoded
from data.streams import SHUFFLE_BUFFER, ImageStream, StreamCollate
from data.transforms import OnBrokenImage, evaluation_transform, leave_out_broken


@atexit.register
def _end_workers() -> None:
    """Ends workers that are left when the program ends: to being terminated by multiprocessing they do not listen."""
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for a failure
    for child in left:
        child.kill()


def settle_worker(_worker: int) -> None:
    """For `DataLoader(worker_init_fn)`: what a forked worker inherits stays shared, and signals are not its business.

    A collection of garbage would touch, and so copy, every object of the process that it comes from: over 100 MB. And
    signals that ask a run to stop are the main process's to answer, which still needs its workers then.
    """
    gc.freeze()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
    """Batches to train on, on the accelerator's device, to each of its processes its share.

    Args:
        split: images to train on. Of a stream, whole shards go to each process where their number allows it; what a
            process is given is read over and over, and an epoch is as many batches as the images make.
        transform: `train_transform`'s, which workers apply to each image.
        finish: what is then done to each batch on the device.
        batch_size: of all processes together. Raises ValueError if they cannot share it out evenly.
        sampler: what draws an epoch's images; by default each comes once, in random order.
        passes: how often an epoch goes through the images.
        batches_per_step: whose gradients are accumulated. An epoch of a stream ends with a step; the last step of
            any other epoch may be of fewer batches.
        num_workers: processes that prepare images, for each process of the accelerator.
        seed: of the order, of the augmentation, and of what is drawn in a training step.
    """
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {batch_size} is that of all processes together and cannot be shared out among "
            f"{accelerator.num_processes}; set --batch_size to a multiple"
        )
    options = {
        "batch_size": batch_size // accelerator.num_processes,
        "num_workers": num_workers,
        "worker_init_fn": settle_worker,
        "pin_memory": accelerator.device.type == "cuda",
        "persistent_workers": num_workers > 0,
    }
    finish = finish.to(accelerator.device)
    step_seed = (seed, accelerator.process_index)
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
        num_batches = max(1, len(split) * passes // (batch_size * batches_per_step)) * batches_per_step
        return FinishedBatches(loader, finish, num_batches, seed=step_seed)
    rows = TrainRows(undecoded(split), transform, seed)
    order = NumberedDraws(sampler if sampler is not None else Shuffle(len(split), passes, seed), len(split))
    # Of several processes each gets full batches, so that only one that trains alone can meet a smaller one.
    collate = partial(leave_out_broken, full=options["batch_size"])
    loader = DataLoader(rows, sampler=order, collate_fn=collate, **options)
    return FinishedBatches(accelerator.prepare(loader), finish, seed=step_seed)


class Shuffle(Sampler[int]):
    """Each row `passes` times in an order that depends on seed and epoch alone."""

    def __init__(self, num_rows: int, passes: int, seed: int):
        self.num_rows, self.passes, self.seed = num_rows, passes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows * self.passes

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        return iter((order % self.num_rows).tolist())


class NumberedDraws(Sampler[int]):
    """What a sampler draws, each draw with a number of its own, in one: number * num_rows + row.

    The number counts on over the epochs, so that a row drawn twice is augmented in two ways.
    """

    def __init__(self, sampler: Sampler[int], num_rows: int):
        self.sampler, self.num_rows = sampler, num_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):  # torch's own have none
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.sampler)
        return (number * self.num_rows + row for number, row in enumerate(self.sampler, first))


@dataclass(frozen=True)
class TrainRows(TorchDataset):
    """Prepared images, each augmented by the number of its draw alone: whichever worker or process has it, and when.

    Besides what `transform` makes of a row it has its `index` in the data set.
    """

    rows: Dataset
    transform: Callable[[dict], dict]
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self, indices: list[int]) -> list[str]:
        """Where images are; of one that is stored in the data set its number."""
        images = self.rows[indices]["image"]
        return [image["path"] or f"image {index}" for index, image in zip(indices, images, strict=True)]

    def __getitems__(self, draws: list[int]) -> list[dict]:
        numbers, indices = zip(*(divmod(draw, len(self.rows)) for draw in draws), strict=True)
        prepared = []
        images = self.rows[list(indices)]
        with torch.random.fork_rng(devices=[]):  # without workers, the generator is also that of the training step
            for place, (number, index) in enumerate(zip(numbers, indices, strict=True)):
                torch.default_generator.manual_seed(derived_seed(self.seed, number))
                row = self.transform({name: [values[place]] for name, values in images.items()})
                prepared.append({name: values[0] for name, values in row.items()} | {"index": index})
        return prepared

    def __getitem__(self, draw: int) -> dict:
        return self.__getitems__([draw])[0]


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
        worker_init_fn=settle_worker,
        collate_fn=StreamCollate(transform, split.codes, leave_out=False) if streamed else None,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )
    finish = EvaluationBatch.of_processor(processor)
    if accelerator is None:
        return FinishedBatches(loader, finish)
    return FinishedBatches(accelerator.prepare(loader), finish.to(accelerator.device))
