"""How many wrong labels `python -m ride_bf.embed` finds, on the default images and on drawings.

Some training labels are replaced by other classes. On the default images the network is trained on these labels from
scratch, for more and more epochs. On drawings the backbone is frozen, so that its features depend on no label.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from data import class_labels, evaluation_batches, load_long_tailed
from data.annotation_lists import CLASS_NAMES
from ride_bf.benchmark.clipart_lists import find_drawings, write_split
from ride_bf.benchmark.measure import command, machine, write_results
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.evaluation.embedding import SplitEmbeddings, embed_split
from ride_bf.evaluation.label_errors import TRAIN, find_label_errors, judge
from ride_bf.evaluation.metrics import FEW_SHOT_BELOW
from ride_bf.runs.models import find_model, load_model, load_processor
from ride_bf.runs.provenance import load_splits_of

FLIPPED = 0.08  # of the training labels
EPOCHS = (2, 5, 10, 20, 40)
_DRAWS = 5  # of wrong labels for the drawings


def run(options: argparse.Namespace) -> None:
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    if not options.table_only:
        named = argparse.Namespace(**{**vars(options), "backbone": Path(options.backbone).name})
        results = {"command": command(named), "machine": machine(), "rows": results.get("rows", {})}
        for name in options.data:
            results["rows"][name] = _MEASURES[name](options)
            write_results(options.results, "label_errors", results)
    for name, rows in results["rows"].items():
        print(f"\n### {name}\n\n{table(rows)}")


def flip(labels: np.ndarray, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), of which a share is replaced by another class at random, and a mask (N,) of those."""
    generator = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[generator.permutation(len(labels))[: round(FLIPPED * len(labels))]] = True
    others = (labels + generator.integers(1, num_classes, size=len(labels))) % num_classes
    return np.where(wrong, others, labels), wrong


def _digits(options: argparse.Namespace) -> list[dict[str, Any]]:
    folder = options.output_dir / "digits"
    splits = load_long_tailed("digits_lt")
    right = np.asarray(class_labels(splits["train"]))
    given, wrong = flip(right, 10, seed=0)
    for name, labels in {"train": given, "test": class_labels(splits["test"])}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(splits[name]["image"]):
            image.save(folder / name / f"{index}.png")
        lines = (f"{name}/{index}.png {label}\n" for index, label in enumerate(labels))
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / CLASS_NAMES).write_text("".join(f"{digit}\n" for digit in range(10)))
    words = f"--recipe digits_lt_resnet32 --dataset custom --data_dir {folder} --lists {folder} --seed 0".split()
    runs = [
        Run(
            name=f"digits, {epochs} epochs",
            options=(*words, "--epochs", str(epochs), "--warmup_epochs", "1", "--reweight_epoch", str(epochs - 1)),
            folder=options.output_dir / "runs" / str(epochs),
        )
        for epochs in EPOCHS
    ]
    train_all(runs, options.jobs)
    rows = []
    for epochs, trained in zip(EPOCHS, runs, strict=True):
        part = _embed_training(trained.folder)
        accuracy = float((part.images.predictions == part.images.labels).mean())
        rows.append({"epochs": epochs, "accuracy": accuracy, **_count(part, wrong)})
    return rows


def _clipart(options: argparse.Namespace) -> list[dict[str, Any]]:
    lists = options.output_dir / "lists" / "0"
    write_split(lists, find_drawings(options.data_dir), 0)
    where = {"dataset": "custom", "data_dir": options.data_dir, "lists": lists, "backbone": options.backbone}
    words = [str(word) for key, value in where.items() for word in (f"--{key}", value)]
    trained = Run(
        name="clip art, probe",
        options=("--recipe", "probe", *words, "--seed", "0"),
        folder=options.output_dir / "clipart",
    )
    train_all([trained], options.jobs)
    part = _embed_training(trained.folder)
    right, rows = part.images.labels, []
    for seed in range(_DRAWS):
        given, wrong = flip(right, int(right.max()) + 1, seed)
        rows.append({"draw": seed, **_count(replace(part, images=replace(part.images, labels=given)), wrong)})
    return rows


def _embed_training(run: Path) -> SplitEmbeddings:
    accelerator = Accelerator()
    place = find_model(run)
    stored, data = load_splits_of(place, [TRAIN])
    model = accelerator.prepare_model(load_model(place), evaluation_mode=True)
    loader = evaluation_batches(
        stored[TRAIN], load_processor(place), 32, 0, accelerator, max_image_pixels=data.max_image_pixels
    )
    return embed_split(model, stored[TRAIN], loader, accelerator)


def _count(part: SplitEmbeddings, wrong: np.ndarray) -> dict[str, int]:
    """How many of the wrong labels (N,) are found, and how many right ones are listed, also of rare given classes."""
    listed = np.zeros(len(wrong), dtype=bool)
    listed[find_label_errors(judge({TRAIN: part}, None))[TRAIN]] = True
    labels = part.images.labels
    rare = np.bincount(labels)[labels] < FEW_SHOT_BELOW
    return {
        "wrong": int(wrong.sum()),
        "found": int((listed & wrong).sum()),
        "right": int((~wrong).sum()),
        "listed_though_right": int((listed & ~wrong).sum()),
        "of_these_rare": int((listed & ~wrong & rare).sum()),
    }


_MEASURES = {"digits": _digits, "clipart": _clipart}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The counts as a Markdown table; of several draws of wrong labels, their means."""
    first = rows[0]
    columns = {
        "found": f"found, of {first['wrong']:,}",
        "listed_though_right": f"listed though right, of {first['right']:,}",
        "of_these_rare": f"of these, of classes below {FEW_SHOT_BELOW} images",
    }
    if "epochs" not in first:
        cells = [_mean_and_range([row[key] for row in rows]) for key in columns]
        return "\n".join(_lines([f"mean of {len(rows)} draws", *columns.values()], [["", *cells]]))
    header = ["epochs", "right on the given labels", *columns.values()]
    body = [[row["epochs"], f"{100 * row['accuracy']:.0f} %", *(f"{row[key]:,}" for key in columns)] for row in rows]
    return "\n".join(_lines(header, body))


def _mean_and_range(values: Sequence[int]) -> str:
    return f"{statistics.fmean(values):,.0f} ({min(values):,} to {max(values):,})"


def _lines(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows)]
