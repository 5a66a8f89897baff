"""Test images that the model was also trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from data import ImageStream
from data.groups import equal_images
from ride_bf.evaluation.results import Predictions, main_metrics


def also_trained_on(split: Dataset | ImageStream, training: Dataset | ImageStream | None) -> np.ndarray | None:
    """Returns which images of `split` are equal, byte for byte, to a training image, (N,) bool.

    None if that is not known: for streams, and without training images.
    """
    if not isinstance(split, Dataset) or not isinstance(training, Dataset):
        return None
    groups = equal_images([training, split])
    return np.isin(groups[len(training) :], groups[: len(training)])


def measure_leakage(images: Predictions, seen: np.ndarray | None, class_counts: Sequence[int]) -> dict[str, Any]:
    """Returns the key `also_trained_on` of `results.json`, for the images `seen` (N,) in training; empty for None."""
    if seen is None:
        return {}
    found: dict[str, Any] = {"images": int(seen.sum())}
    if seen.any() and not seen.all():
        found["metrics_without"] = main_metrics(images.select(~seen), class_counts)
    return {"also_trained_on": found}


def describe_leakage(results: dict[str, Any]) -> str | None:
    """Says how many evaluated images were also trained on, and the accuracy without them; None without such."""
    found = results.get("also_trained_on", {"images": 0})
    if not found["images"]:
        return None
    seen = f"{found['images']:,} of the {results['num_images']:,} images are equal to a training image"
    without = found.get("metrics_without")
    if without is None:
        return f"{seen}, so these numbers say nothing about new images"
    names = {"accuracy": "accuracy", "balanced_accuracy": "balanced"}
    names |= {f"{group}_shot_accuracy": f"{group}-shot" for group in ("many", "medium", "few")}
    shown = ", ".join(f"{words} {100 * without[name]:.1f} %" for name, words in names.items() if name in without)
    return f"{seen}. Without them: {shown}"
