"""Loaders of batches that are ready for the network."""

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
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import BitImageProcessor

from data.batches import EvaluationBatch, FinishedBatches, TrainBatch, derived_seed
from data.splits import undecoded
from data.streams import SHUFFLE_BUFFER, ImageStream, StreamCollate
from data.transforms import OnBrokenImage, evaluation_transform, leave_out_broken, only_whole


def settle_worker(_worker: int) -> None:
    """For `DataLoader(worker_init_fn)`: keeps memory shared, and leaves signals that ask a run to stop to the run.

    The garbage collector would touch, and so copy, every object that a forked worker shares with the main process:
    over 100 MB. Signals that ask a run to stop often reach its workers too, but the main process needs them until it
    has saved its checkpoint. So a worker ignores SIGINT and SIGUSR1, and obeys SIGTERM only if the main process sent
    it: that is how multiprocessing ends the workers that are left when a program ends. Python can tell the sender on
    Linux, where workers are forked. Elsewhere every SIGTERM ends a worker.
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
    os._exit(0)  # not another code, which torch reports in the main process as a worker that has failed


def _worker_options(number: int) -> dict[str, Any]:
    """What a `DataLoader` is told about its `number` workers."""
    # Python 3.14 would start them anew: each would import torch again and share no memory.
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
    """Batches to train on, on the accelerator's device, to each of its processes its share.

    Args:
        split: images to train on. Of a stream, whole shards go to each process where their number allows it; what a
            process is given is read over and over, and an epoch is as many batches as the images make.
        transform: `train_transform`'s, which workers apply to each image.
        finish: what is then done to each batch on the device.
        batch_size: of all processes together. Raises ValueError if they cannot share it out evenly. An epoch's last
            batch may be smaller in a single process, but a last image alone joins the batch before it.
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
        **_worker_options(num_workers),
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
    # Accelerate completes the last batches of several processes with images of the first: all of them are full.
    kind = JoiningBatchSampler if accelerator.num_processes == 1 else BatchSampler
    batches = kind(order, options.pop("batch_size"), drop_last=False)
    collate = partial(leave_out_broken, full=batches.batch_size)
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate, **options)
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


class JoiningBatchSampler(BatchSampler):
    """Torch's batches, but a last image that would be a batch of its own joins the batch before it.

    A single image can be compared with no other: not by the BatchFormer, and not by BatchNorm, which raises an error
    where a feature map is one pixel. Batches of one image that were asked for stay as they are.
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

    Besides what `transform` makes of a row it has its `index` in the data set. If only one image of a batch can be
    read, the batch has a second augmentation of it too.
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
        images = self.rows[list(indices)]

        def prepare(place: int, *seed: int) -> dict:
            torch.default_generator.manual_seed(derived_seed(self.seed, numbers[place], *seed))
            row = self.transform({name: [values[place]] for name, values in images.items()})
            return {name: values[0] for name, values in row.items()} | {"index": indices[place]}

        with torch.random.fork_rng(devices=[]):  # without workers, the generator is also that of the training step
            prepared = [prepare(place) for place in range(len(draws))]
            alone = only_whole(prepared)
            return prepared if alone is None else [*prepared, prepare(alone, 1)]

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
        **_worker_options(num_workers),
        collate_fn=StreamCollate(transform, split.codes, leave_out=False) if streamed else None,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )
    finish = EvaluationBatch.of_processor(processor)
    if accelerator is None:
        return FinishedBatches(loader, finish)
    return FinishedBatches(accelerator.prepare(loader), finish.to(accelerator.device))
