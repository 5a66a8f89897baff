"""Comparison of evaluations on the same test images: differences with intervals from a paired bootstrap."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.digest import DIGITS
from ride_bf.evaluation.metrics import (
    accuracy_weights,
    bootstrap,
    class_means,
    confidence_interval,
    distribution_weights,
    weighted_mean,
)
from ride_bf.evaluation.results import LEVEL, PREDICTIONS, RESAMPLES, RESULTS, SEED, Predictions, read_results
from ride_bf.runs.models import find_model


def read_evaluation(path: Path) -> tuple[dict[str, Any], Predictions]:
    """Reads the results and the predictions of an evaluation.

    `path` is the evaluation's folder, its `results.json`, or a run's output folder. Raises FileNotFoundError if the
    files do not exist, and ValueError if they do not belong together.
    """
    given = path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name the output folder of a run, or a {RESULTS}")
    if path.is_dir() and not (path / RESULTS).is_file():
        path = Path(find_model(path))
        if not (path / RESULTS).is_file():
            command = f"python -m ride_bf.evaluate --model {shlex.quote(str(given))}"
            raise FileNotFoundError(f"{given} has not been evaluated; first run: {command}")
    results = read_results(path)
    beside = (path if path.is_dir() else path.parent) / PREDICTIONS
    predictions = Predictions.load(beside)
    if len(predictions.labels) != results["num_images"]:
        raise ValueError(
            f"{beside} has {len(predictions.labels)} images, but results.json has {results['num_images']}: "
            "evaluate the model again"
        )
    return results, predictions


def check_comparable(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError unless all evaluations have the same test images and the same training counts."""
    first = results[0]
    for path, other in zip(paths[1:], results[1:], strict=True):
        if len(other["images_digest"]) != len(first["images_digest"]):
            older = path if len(other["images_digest"]) != DIGITS else paths[0]
            raise ValueError(
                f"{older} was evaluated by an earlier version, which identified images in another way; evaluate the "
                "model again"
            )
        if other["images_digest"] != first["images_digest"]:
            raise ValueError(
                f"{paths[0]} and {path} have different test images: {first['num_images']:,} of {first['dataset']}'s "
                f"{first['split']} split and {other['num_images']:,} of {other['dataset']}'s {other['split']} split"
            )
        if other["train_class_counts"] != first["train_class_counts"]:
            raise ValueError(
                f"{paths[0]} and {path} have different training images, {sum(first['train_class_counts']):,} and "
                f"{sum(other['train_class_counts']):,}, so their shot groups differ: the models were trained on "
                "different images, or one was evaluated with other options"
            )


def differences(
    first: Predictions, other: Predictions, class_counts: Sequence[int]
) -> dict[str, dict[str, float | list[float]]]:
    """Returns the `difference` of each accuracy, `other` minus `first`, and its confidence `interval`."""
    labels = first.labels
    gains = (other.predictions == labels).astype(int) - (first.predictions == labels)  # (N,), -1, 0 or 1
    per_class, images = class_means(gains, labels, len(class_counts))
    weights = accuracy_weights(class_counts, images) | distribution_weights(class_counts, images)
    resampled = bootstrap(gains, labels, weights, RESAMPLES, SEED)
    return {
        name: {"difference": weighted_mean(per_class, shares), "interval": confidence_interval(resampled[name], LEVEL)}
        for name, shares in weights.items()
    }


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Compares each evaluation with the first one. Raises the errors of `read_evaluation` and `check_comparable`.

    Returns `models`, `dataset`, `split` and `num_images`; `metrics`, the accuracies of each model by name;
    `differences`, the result of `differences` for each model but the first; and `level`, that of the intervals.
    """
    results, predictions = zip(*(read_evaluation(path) for path in paths), strict=True)
    check_comparable(paths, results)
    counts = results[0]["train_class_counts"]
    if any(not np.array_equal(own.labels, predictions[0].labels) for own in predictions):
        raise ValueError("the predictions have different test images, although the results agree: evaluate again")
    gains = [differences(predictions[0], own, counts) for own in predictions[1:]]
    return {
        **{name: results[0][name] for name in ("dataset", "split", "num_images")},
        "models": [own["model"] for own in results],
        "metrics": [{name: own["metrics"][name] for name in gains[0]} for own in results],
        "differences": gains,
        "level": LEVEL,
    }


def table(compared: dict[str, Any]) -> str:
    """Returns a Markdown table with accuracies in percent. A difference is bold if its interval excludes 0."""
    others = range(1, len(compared["models"]))
    headings = ["", "A", *(heading for index in others for heading in (letter(index), f"{letter(index)} − A"))]
    lines = [f"{letter(index)}: {model}" for index, model in enumerate(compared["models"])]
    lines += ["", f"| {' | '.join(headings)} |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for name in compared["metrics"][0]:
        cells = [name.removesuffix("_accuracy").replace("_", " "), f"{100 * compared['metrics'][0][name]:.1f}"]
        for index in others:
            gain = compared["differences"][index - 1][name]
            low, high = gain["interval"]
            shown = f"{100 * gain['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            cells += [f"{100 * compared['metrics'][index][name]:.1f}", f"**{shown}**" if low > 0 or high < 0 else shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"model {index + 1}"
