"""Compare the input pipeline with the classic one, in one process on the same files.

The classic pipeline is PIL with torchvision's v1 transforms, as in the authors' code: decoding, augmentation, ToTensor
and Normalize, image by image. Ours is the work of a loader's worker; the work on the device is timed separately. Both
use a DataLoader without workers and take turns, and the best round counts. data.synthesize draws the images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as classic

from data import TrainBatch, evaluation_processor, evaluation_transform, load_long_tailed, train_transform, undecoded
from data.batches import EvaluationBatch
from data.reading import read_image
from data.synthesize import synthesize
from ride_bf.benchmark.measure import machine, write_results
from ride_bf.recipes import RECIPES

BATCH = 64


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # like a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        if options.data_dir is None:
            synthesize("imagenet_lt", 0.01, Path(folder))
        rows = load_long_tailed("imagenet_lt", options.data_dir or folder)["train"]
        rows = undecoded(rows.shuffle(seed=0).select(range(min(options.images, len(rows)))))
        results = {
            "command": "python -m ride_bf.benchmark input",
            "machine": f"{machine()}, one process and thread",
            "images": len(rows),
            "mean_kilobytes": statistics.mean(Path(image["path"]).stat().st_size for image in rows["image"]) / 1000,
            "images_per_second": measure(rows, options.rounds),
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
    images = rows["image"]
    ways: dict[str, tuple[Callable[[], Iterable], int]] = {
        "train, classic": (lambda: DataLoader(_Classic(rows, classic.Compose([*first, *last])), BATCH), len(rows)),
        "train, ours": (lambda: DataLoader(ours["train"], BATCH), len(rows)),
        "train, left to the device": (lambda: (finish["train"](batches["train"]) for _ in range(2)), 2 * BATCH),
        "evaluation, classic": (
            lambda: DataLoader(_Classic(rows, classic.Compose([classic.Resize(256), crop, *last])), BATCH),
            len(rows),
        ),
        "evaluation, ours": (lambda: DataLoader(ours["evaluation"], BATCH), len(rows)),
        "evaluation, left to the device": (
            lambda: (finish["evaluation"](batches["evaluation"]) for _ in range(2)),
            2 * BATCH,
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
    lines.append(f"\nDecoding alone: {speed['decoding alone']:.0f} images/s, {results['mean_kilobytes']:.0f} kB each.")
    return "\n".join(lines)
