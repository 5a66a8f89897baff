"""Compare the input pipeline with the classic one, in one process on the same files.

The classic pipeline is PIL with torchvision's v1 transforms, as in the authors' code: decoding, augmentation, ToTensor
and Normalize, image by image. Ours is the work of a loader's worker; the work on the device is timed separately. Both
use a DataLoader without workers and take turns, and the best round counts. data.synthesize draws the images.

A second table compares ways to decode JPEG files of several sizes for training: all pixels by torchvision, all pixels
as `data.reading` does it, with --jpeg_scaling, and all pixels of the copy that `python -m data.prepare` writes. It
counts the processor's time, so that other work on the machine matters less. The ways take turns, and the median of the
rounds counts.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as classic

from data import (
    TrainBatch,
    evaluation_processor,
    evaluation_transform,
    load_long_tailed,
    reading,
    recognise,
    train_transform,
    undecoded,
)
from data.batches import EvaluationBatch
from data.columns import in_table
from data.prepare import CopyOptions
from data.reading import read_image
from data.synthesize import make_image, synthesize
from ride_bf.benchmark.measure import command, machine, write_results
from ride_bf.recipes import RECIPES

BATCH = 64
JPEG_SIZES = {(500, 375): 64, (1600, 1200): 24, (4000, 3000): 8}  # (width, height) -> number of files


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # like a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        if options.data_dir is None:
            synthesize("imagenet_lt", 0.01, Path(folder))
        place = options.data_dir or folder
        rows = load_long_tailed(recognise(place), place)["train"]
        rows = undecoded(rows.shuffle(seed=0).select(range(min(options.images, len(rows)))))
        if in_table(rows).any():
            raise ValueError(f"{place} has images in a table; name a folder of image files with --data_dir")
        results = {
            "command": command(options),
            "machine": f"{machine()}, one process and thread",
            "images": len(rows),
            "mean_kilobytes": statistics.mean(Path(image["path"]).stat().st_size for image in rows["image"]) / 1000,
            "images_per_second": measure(rows, options.rounds),
            "jpeg": [measure_jpeg(kind, files, options.rounds) for kind, files in jpeg_files(rows, options)],
        }
    write_results(options.results, "input", results)
    print(table(results))


class _Classic(Dataset):
    def __init__(self, rows, steps: Callable):
        self.paths = [image["path"] for image in rows["image"]]
        self.labels = list(rows["label"])
        self.steps = steps

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        with Image.open(self.paths[index]) as image:
            return self.steps(image.convert("RGB")), self.labels[index]


def measure(rows, rounds: int) -> dict[str, float]:
    """Measures the images per second of each pipeline on `rows`."""
    recipe = RECIPES["imagenet_lt_resnet50"]
    last = [classic.ToTensor(), classic.Normalize(recipe.image_mean, recipe.image_std)]
    first = [classic.RandomResizedCrop(224), classic.RandomHorizontalFlip(), classic.ColorJitter(0.4, 0.4, 0.4, 0)]
    crop = classic.CenterCrop(224)
    processor = evaluation_processor(256, 224, recipe.image_mean, recipe.image_std)
    ours = {
        "train": rows.with_transform(train_transform(recipe.augmentation, recipe.image_size)),
        "evaluation": rows.with_transform(evaluation_transform(processor)),
    }
    batches = {name: next(iter(DataLoader(dataset, BATCH))) for name, dataset in ours.items()}
    finish = {
        "train": TrainBatch(recipe.augmentation, recipe.image_mean, recipe.image_std),
        "evaluation": EvaluationBatch(recipe.image_mean, recipe.image_std),
    }
    images, batch = rows["image"], min(BATCH, len(rows))
    ways: dict[str, tuple[Callable[[], Iterable], int]] = {
        "train, classic": (lambda: DataLoader(_Classic(rows, classic.Compose([*first, *last])), BATCH), len(rows)),
        "train, ours": (lambda: DataLoader(ours["train"], BATCH), len(rows)),
        "train, left to the device": (
            lambda: (finish["train"](batches["train"]) for _ in range(2)),
            2 * batch,
        ),
        "evaluation, classic": (
            lambda: DataLoader(_Classic(rows, classic.Compose([classic.Resize(256), crop, *last])), BATCH),
            len(rows),
        ),
        "evaluation, ours": (lambda: DataLoader(ours["evaluation"], BATCH), len(rows)),
        "evaluation, left to the device": (
            lambda: (finish["evaluation"](batches["evaluation"]) for _ in range(2)),
            2 * batch,
        ),
        "decoding alone": (lambda: map(read_image, images), len(rows)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (make, _) in ways.items():
            started = time.perf_counter()
            for _ in make():
                pass
            seconds[name].append(time.perf_counter() - started)
    return {name: count / min(seconds[name]) for name, (_, count) in ways.items()}


def jpeg_files(rows, options: argparse.Namespace) -> Iterator[tuple[str, list[bytes]]]:
    """Yields a description and files: those of --data_dir, or drawn ones of several sizes."""
    if options.data_dir is not None:
        yield "of --data_dir", [Path(image["path"]).read_bytes() for image in rows["image"]]
        return
    for (width, height), number in JPEG_SIZES.items():
        files = []
        for index in range(number):
            # the finest detail of a large photo is less than that of a small one
            drawn = make_image(np.random.default_rng((0, index)), index, (min(width, 800), min(height, 600)))
            buffer = io.BytesIO()
            drawn.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        yield f"{width} x {height}", files


def measure_jpeg(kind: str, files: list[bytes], rounds: int) -> dict[str, Any]:
    """Measures the images per second of processor time for each way to decode training images, and their difference."""
    recipe = RECIPES["imagenet_lt_resnet50"]
    rows = _rows_of(files)
    started = time.process_time()
    copies = [CopyOptions().copy(image)[0] for image in rows["image"]]
    copying = (time.process_time() - started) / len(files)
    copied = _rows_of(copies)
    full, scaled = (
        train_transform(recipe.augmentation, recipe.image_size, jpeg_scaling=scaling) for scaling in (False, True)
    )

    def by_torchvision() -> None:
        decoder, reading.simplejpeg = reading.simplejpeg, None
        try:
            full(rows)
        finally:
            reading.simplejpeg = decoder

    ways = {
        "by torchvision": by_torchvision,
        "all pixels": lambda: full(rows),
        "jpeg_scaling": lambda: scaled(rows),
        "prepared copy": lambda: full(copied),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, call in ways.items():
            torch.manual_seed(turn)  # the same crops
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    torch.manual_seed(0)
    before = full(rows)["pixel_values"]
    torch.manual_seed(0)
    apart = [(a.int() - b.int()).abs().float() for a, b in zip(before, scaled(rows)["pixel_values"], strict=True)]
    return {
        "images": kind,
        "number": len(files),
        "mean_kilobytes": statistics.mean(map(len, files)) / 1000,
        "images_per_second": {name: len(files) / statistics.median(of_way) for name, of_way in seconds.items()},
        "copy_mean_kilobytes": statistics.mean(map(len, copies)) / 1000,
        "seconds_to_copy": copying,
        "mean_difference_of_scaling": statistics.mean(difference.mean().item() for difference in apart),
    }


def _rows_of(files: list[bytes]) -> dict[str, list]:
    return {"image": [{"bytes": content, "path": None} for content in files], "label": [0] * len(files)}


def table(results: dict) -> str:
    """Returns the measurements as Markdown, with the ratios that matter."""
    speed = results["images_per_second"]
    lines = [
        "| images/s | classic | ours | ours / classic | of decoding alone | left to the device |",
        "|" + " --- |" * 6,
    ]
    for name in ("train", "evaluation"):
        ratio = speed[f"{name}, ours"] / speed[f"{name}, classic"]
        share = 100 * speed[f"{name}, ours"] / speed["decoding alone"]
        lines.append(
            f"| {name} | {speed[f'{name}, classic']:.0f} | {speed[f'{name}, ours']:.0f} | {ratio:.2f} | {share:.0f} % "
            f"| {speed[f'{name}, left to the device']:.0f} |"
        )
    lines.append(
        f"\nDecoding alone: {speed['decoding alone']:.0f} images/s, {results['mean_kilobytes']:.0f} kB each.\n"
    )
    lines.append(
        "| JPEG files | kB | by torchvision | all pixels | jpeg_scaling | grey levels apart | copy | its kB | ms |"
    )
    lines.append("|" + " --- |" * 9)
    for of_size in results["jpeg"]:
        speeds = of_size["images_per_second"]
        first = speeds["by torchvision"]
        shown = {name: f"{speed:.0f} ({speed / first:.2f} x)" for name, speed in speeds.items()}
        lines.append(
            f"| {of_size['images']} | {of_size['mean_kilobytes']:.0f} | {first:.0f} | {shown['all pixels']} "
            f"| {shown['jpeg_scaling']} | {of_size['mean_difference_of_scaling']:.2f} | {shown['prepared copy']} "
            f"| {of_size['copy_mean_kilobytes']:.0f} | {1000 * of_size['seconds_to_copy']:.0f} |"
        )
    return "\n".join(lines)
