"""What calibrated scores, sets of classes and rejected images are worth, on the default images and on drawings.

A model is trained once. Its held-out images are split many times at random, class by class, into images for calibration
and for the test. The splits share images, so their spread says nothing of other data. Standard errors are therefore
from a bootstrap over the test images of a split.
"""

import argparse
import shutil
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import betabinom
from torch import Tensor

from confidence_ride_bf import KNOWN_SCORES
from data import evaluation_batches, load_unlabelled
from modeling_ride_bf import RideBfOutput
from ride_bf.benchmark.clipart_lists import drawings_digest, find_drawings, find_left_out, run_inputs, write_split
from ride_bf.benchmark.efficientnet_lite0 import backbone_folder
from ride_bf.benchmark.measure import command, machine, read_results, write_results
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.evaluation.confidence import ERRORS, GROUPS, calibrate, confidence_facts, logits_of, measure_confidence
from ride_bf.evaluation.metrics import calibration, expected_calibration_error, shot_groups
from ride_bf.evaluation.predict import image_facts
from ride_bf.evaluation.results import Predictions
from ride_bf.evaluation.unknown import known_columns, measure_unknown
from ride_bf.runs.environment import code_version
from ride_bf.runs.models import find_model, load_model, load_processor
from ride_bf.runs.provenance import load_splits_of

SPLITS = 20
COVERAGE, REJECT_KNOWN = 0.9, 0.05
_RESAMPLES = 200  # of the bootstrap
_INTERVAL = 0.95
_FONT_SIZES = (8, 9, 10, 11)  # of letters, in pixels; digits_lt's images have 8
_LOOK_LIKE_DIGITS = "BDIOQSZbgiloqsz"
_ERROR = "expected_calibration_error"


@dataclass(frozen=True)
class Held:
    """What a model says of images: logits (N, C) and labels (N,) of held-out ones, and logits (M, C) of unknown ones.

    `calibration` is how many held-out images of each class calibrate; None: half of them.
    """

    logits: Tensor
    labels: Tensor
    unknown: Tensor
    class_counts: list[int]
    calibration: int | None


def run(options: argparse.Namespace) -> None:
    results = read_results(options, required=options.table_only)
    if not options.table_only:
        for name in options.data:
            how = {"command": command(options, data=[name]), "machine": machine(), "commit": code_version()["commit"]}
            measured = {}
            for model, (held, trained_at) in _MAKERS[name](options).items():
                measured[model] = {**how, "trained_at_commit": trained_at, **measure(held)}
            latest = read_results(options, required=False)  # another command may have measured other models
            same = {key: latest.get(key) for key in how}  # of files that have these once, for all models
            models = {model: {**same, **own} for model, own in latest.get("models", {}).items()} | measured
            results = {**latest, "models": models}
            commits = {own.get(key) for own in models.values() for key in ("commit", "trained_at_commit")}
            write_results(options.results, "confidence", results, commits)
    for name, measured in results.get("models", {}).items():
        print(f"\n### {name}\n\n{table(measured)}")


def _digits(options: argparse.Namespace) -> dict[str, tuple[Held, str | None]]:
    """What each model says of its images, and the commit that trained it."""
    runs = [
        Run(
            name=f"digits_lt, seed {seed}",
            options=("--seed", str(seed)),
            folder=options.output_dir / "digits" / str(seed),
        )
        for seed in options.seeds
    ]
    results = train_all(runs, options.jobs)
    letters = options.output_dir / "letters"
    draw_letters(letters)
    return {
        one.name: (_held(one.folder, ("validation", "test"), letters, 8), result["commit"])
        for one, result in zip(runs, results, strict=True)
    }


def _clipart(options: argparse.Namespace) -> dict[str, tuple[Held, str | None]]:
    lists, unknown = options.output_dir / "lists" / "0", options.output_dir / "left_out"
    drawings = find_drawings(options.data_dir)
    _, digest = write_split(lists, drawings, 0)
    shutil.rmtree(unknown, ignore_errors=True)  # those of other drawings
    for name in find_left_out(options.data_dir):
        (unknown / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.data_dir / name, unknown / name)
    backbone = backbone_folder(options.backbone, options.output_dir)
    where = {"dataset": "custom", "data_dir": options.data_dir, "lists": lists, "backbone": backbone}
    words = [str(word) for key, value in where.items() for word in (f"--{key}", value)]
    trained = Run(
        name="clip art, probe",
        options=("--recipe", "probe", *words, "--seed", "0"),
        folder=options.output_dir / "clipart",
        inputs=run_inputs(digest, drawings_digest(options.data_dir, drawings)),
    )
    (result,) = train_all([trained], options.jobs)
    return {trained.name: (_held(trained.folder, ("test",), unknown, None), result["commit"])}


_MAKERS = {"digits": _digits, "clipart": _clipart}


def draw_letters(folder: Path) -> None:
    """Draws letters as large and as grey as the images of digits_lt, without those that look like digits."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in _FONT_SIZES:
        font = ImageFont.load_default(size)
        for letter in sorted(set(string.ascii_letters) - set(_LOOK_LIKE_DIGITS)):
            image = Image.new("L", (8, 8))
            ImageDraw.Draw(image).text((4, 4), letter, fill=255, font=font, anchor="mm")
            image.save(folder / f"{ord(letter)}_{size}.png")


def _held(run: Path, splits: Sequence[str], unknown: Path, calibration: int | None) -> Held:
    accelerator = Accelerator()
    place = find_model(run)
    model, processor = load_model(place), load_processor(place)
    stored, data = load_splits_of(place)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)

    def read(images: Any) -> tuple[Tensor, Tensor]:
        loader = evaluation_batches(images, processor, 32, 0, accelerator, max_image_pixels=data.max_image_pixels)
        return logits_of(prepared, loader, accelerator)

    logits, labels = (torch.cat(parts) for parts in zip(*(read(stored[name]) for name in splits), strict=True))
    return Held(logits, labels, read(load_unlabelled(unknown))[0], list(data.train_class_counts), calibration)


def measure(held: Held) -> dict[str, Any]:
    """Means over the splits, by shot group, with how often coverage is outside of what chance allows."""
    generator = np.random.default_rng(0)
    splits = [_measure_split(held, generator) for _ in range(SPLITS)]
    groups = [name for name in GROUPS if all(name in split["errors"] and name in split["sets"] for split in splits)]
    return {
        "images": len(held.labels),
        "calibration_images": splits[0]["calibration_images"],
        "accuracy": (held.logits.argmax(dim=1) == held.labels).double().mean().item(),
        "splits": SPLITS,
        "groups": {
            name: {
                **{key: _mean(split["errors"][name][key] for split in splits) for key in splits[0]["errors"][name]},
                **{key: _mean(split["sets"][name][key] for split in splits) for key in splits[0]["sets"][name]},
                "known_rejected": _mean(split["rejected"][name] for split in splits),
            }
            for name in groups
        },
        "cells": _count_cells([split["cells"] for split in splits]),
        "unknown": {**_measure_unknown(held), "rejected": _mean(split["unknown_rejected"] for split in splits)},
    }


def _measure_split(held: Held, generator: np.random.Generator) -> dict[str, Any]:
    calibrating = _draw(held.labels.numpy(), held.calibration, generator)
    confidence, record = calibrate(
        held.logits[calibrating],
        held.labels[calibrating],
        held.class_counts,
        "validation",
        COVERAGE,
        "group",
        REJECT_KNOWN,
    )
    logits, labels = held.logits[~calibrating], held.labels[~calibrating]
    outputs = RideBfOutput(logits=logits, expert_logits=logits[:, None])
    facts = {name: column.numpy() for name, column in image_facts(outputs, labels).items()}
    images = Predictions(labels=labels.numpy(), log_probabilities=logits.log_softmax(dim=1).half().numpy(), **facts)
    columns = {name: column.numpy() for name, column in confidence_facts(confidence)(outputs, labels).items()}
    measured = measure_confidence(images, columns, confidence, held.class_counts)
    temperatures = np.broadcast_to(confidence.temperature, len(held.class_counts))
    errors = {}
    for name, before in measured["before"].items():
        after = measured["after"][name]
        inside = {**shot_groups(held.class_counts), "all": np.full(len(held.class_counts), True)}[name]
        rows = inside[images.predictions]
        errors[name] = {
            **{f"{key}_before": value for key, value in before.items()},
            **{f"{key}_after": value for key, value in after.items()},
            "standard_error": _standard_error(
                images.predictions[rows] == images.labels[rows],
                images.confidences[rows],
                columns["calibrated_confidences"][rows],
                generator,
            ),
            "temperature": float(np.exp(np.log(temperatures[inside]).mean())),
        }
    return {
        "calibration_images": int(calibrating.sum()),
        "errors": errors,
        "sets": {
            name: {"coverage": of["coverage"], "set_size": of["mean_size"]}
            for name, of in measured["sets"].items()
            if name in GROUPS
        },
        "rejected": measured["rejected"],
        "unknown_rejected": float(confidence.rejected(held.unknown).double().mean()),
        "cells": [_judge_cell(cell, columns["covered"], images.labels) for cell in record["sets"]["cells"]],
    }


def _draw(labels: np.ndarray, count: int | None, generator: np.random.Generator) -> np.ndarray:
    """A mask (N,) of `count` images of each class, or of half of them."""
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        drawn[rows[: len(rows) // 2 if count is None else count]] = True
    return drawn


def _standard_error(
    right: np.ndarray, before: np.ndarray, after: np.ndarray, generator: np.random.Generator
) -> float | None:
    """Of the difference of two expected calibration errors of the same images, by a paired bootstrap."""
    differences = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(len(right), size=len(right))
        pair = (
            expected_calibration_error(calibration(confidences[rows], right[rows])) for confidences in (after, before)
        )
        differences.append(next(pair) - next(pair))
    return float(np.std(differences, ddof=1))


def _judge_cell(cell: dict[str, Any], covered: np.ndarray, labels: np.ndarray) -> str:
    """Whether the coverage of a cell's images is "below", "inside" or "above" what chance allows, at 95 %.

    Of m images the number of covered ones has a beta-binomial distribution, over the choice of the n calibration images
    too (Vovk, 2012). It is exact for a score without ties, of images that are drawn without regard to their class.
    """
    inside = covered[np.isin(labels, cell["classes"])]
    n = cell["images"]
    rank = int(np.floor(round((n + 1) * (1 - COVERAGE), 6)))
    low, high = betabinom.interval(_INTERVAL, len(inside), n + 1 - rank, rank)
    return "below" if inside.sum() < low else "above" if inside.sum() > high else "inside"


def _count_cells(splits: Sequence[Sequence[str]]) -> dict[str, int]:
    verdicts = [verdict for cells in splits for verdict in cells]
    return {verdict: verdicts.count(verdict) for verdict in ("below", "inside", "above")}


def _measure_unknown(held: Held) -> dict[str, Any]:
    known, unknown = (
        {name: column.numpy() for name, column in known_columns(logits).items()}
        for logits in (held.logits, held.unknown)
    )
    predictions = held.unknown.argmax(dim=1).numpy()
    return measure_unknown(known, held.labels.numpy(), unknown, predictions, held.class_counts)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def table(measured: dict[str, Any]) -> str:
    """The measurements of a model as Markdown, in percent but for cross-entropies, temperatures and sizes."""
    groups, unknown = measured["groups"], measured["unknown"]

    def row(title: str, show: Any) -> str:
        return f"| {title} | {' | '.join(show(groups[name]) for name in groups)} |"

    lines = [f"| | {' | '.join(groups)} |", f"| --- |{' --- |' * len(groups)}"]
    for key, name in ERRORS.items():
        lines.append(row(f"{name} calibration error, before", lambda own, key=key: f"{100 * own[f'{key}_before']:.2f}"))
        lines.append(row("after", lambda own, key=key: f"{100 * own[f'{key}_after']:.2f}"))
        if key == _ERROR:
            lines.append(row("difference ± standard error", _difference))
    lines += [
        row("cross-entropy, before", lambda own: f"{own['loss_before']:.2f}"),
        row("after", lambda own: f"{own['loss_after']:.2f}"),
        row("temperature", lambda own: f"{own['temperature']:.2f}"),
        row("coverage of the sets", lambda own: f"{100 * own['coverage']:.1f}"),
        row("classes in a set", lambda own: f"{own['set_size']:.2f}"),
        row("known images rejected", lambda own: f"{100 * own['known_rejected']:.1f}"),
    ]
    for name in KNOWN_SCORES:
        aurocs = (f"{100 * unknown['scores'][name][group]['auroc']:.1f}" for group in groups)
        lines.append(f"| AUROC of `{name}` | {' | '.join(aurocs)} |")
    cells = measured["cells"]
    lines += [
        "",
        f"{measured['images']:,} held-out images, {measured['calibration_images']:,} of them for calibration, "
        f"{100 * measured['accuracy']:.1f} % right; {measured['splits']} splits. Coverage of {sum(cells.values())} "
        f"cells: {cells['below']} below the 95 % interval, {cells['inside']} inside, {cells['above']} above. "
        f"{unknown['images']:,} unknown images, {100 * unknown['rejected']:.1f} % rejected.",
    ]
    return "\n".join(lines)


def _difference(own: dict[str, Any]) -> str:
    return f"{100 * (own[f'{_ERROR}_after'] - own[f'{_ERROR}_before']):+.2f} ± {100 * own['standard_error']:.2f}"
