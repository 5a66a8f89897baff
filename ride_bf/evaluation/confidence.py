"""Calibrates a model's confidence on images that it was not trained on, and measures it on test images."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

from confidence_ride_bf import KNOWN_SCORES, Confidence
from data import FinishedBatches, ImageStream
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.calibration import choose_temperatures, temperature_for_each_class
from ride_bf.evaluation.conformal import By, make_cells, threshold_for_each_class
from ride_bf.evaluation.metrics import (
    calibration,
    class_means,
    class_wise_calibration,
    expected_calibration_error,
    groups_with_images,
    none_for_nan,
    shot_groups,
    wilson_interval,
)
from ride_bf.evaluation.predict import gather_whole
from ride_bf.evaluation.results import Predictions
from ride_bf.evaluation.unknown import choose_known_score, known_threshold, measure_rejected
from ride_bf.runs.checkpoints import update_manifest
from ride_bf.runs.models import load_config

CALIBRATION = "calibration.json"
CONFIDENCE = "confidence"  # a key of results.json
ERRORS = {"expected_calibration_error": "expected", "class_wise_calibration_error": "class-wise"}
ERRORS |= {"adaptive_calibration_error": "adaptive"}
GROUPS = ("all", "many", "medium", "few")
_USED = {"none": "none", "all": "that of all images", "own": "its own"}  # temperatures, in words
_FOLD = 5  # without validation images, one in so many training images is taken
_WITH_VALIDATION = "--validation_fraction 0.1, or a stream with a validation split of its own (val-*.tar)"
_ROWS = 4096  # images whose probabilities are computed at a time, to limit memory


def calibration_images(splits: Mapping[str, Dataset | ImageStream]) -> tuple[Dataset | ImageStream, str]:
    """The images to calibrate on, and the name of their split: "validation" or, without one, a fold of "train"."""
    if "validation" in splits:
        return splits["validation"], "validation"
    train = splits["train"]
    if isinstance(train, ImageStream):
        return train, "train"
    rows = np.random.default_rng(0).permutation(len(train))[: -(-len(train) // _FOLD)]
    return train.select(np.sort(rows)), "train"


def check_promises(split: str, coverage: float | None, reject_known: float | None) -> None:
    """Raises ValueError for a promise from training images."""
    for option, share in {"coverage": coverage, "reject_known": reject_known}.items():
        if split == "train" and share is not None:
            raise ValueError(
                f"--{option} {share:g} cannot be promised from training images: the model knows them. Train with "
                f"{_WITH_VALIDATION}, so that there are validation images"
            )


def logits_of(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of all images of the loader. Model and loader come from `accelerator.prepare`."""
    columns = gather_whole(model, loader, accelerator, lambda outputs, labels: {"logits": outputs.logits.float()})
    if not np.isfinite(columns["logits"]).all():
        raise FloatingPointError("some logits are not finite: is the model damaged, or the precision too low for it?")
    return torch.from_numpy(columns["logits"]), torch.from_numpy(columns["labels"])


def calibrate(
    logits: Tensor,
    labels: Tensor,
    class_counts: Sequence[int],
    split: str,
    coverage: float | None = None,
    by: By = "group",
    reject_known: float | None = None,
) -> tuple[Confidence, dict[str, Any]]:
    """Returns the confidence of a model, and what it was decided on.

    Args:
        logits (N, C), labels (N,): of the calibration images.
        class_counts (C,): training images of each class.
        split: "validation", or "train" for images that the model was trained on. On these it is surer than on others,
            so no temperature below 1 is accepted, and nothing is promised.
        coverage, by: see `make_cells`; None: no sets.
        reject_known: see `known_threshold`; None: no image is rejected.

    Raises ValueError for too few images, and for a promise from training images.
    """
    check_promises(split, coverage, reject_known)
    groups = shot_groups(class_counts)
    chosen = choose_temperatures(logits, labels, groups, never_sharper=split == "train")
    record: dict[str, Any] = {
        "split": split,
        "images": len(labels),
        "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "temperatures": {name: asdict(found) for name, found in chosen.items()},
    }
    promises: dict[str, Any] = {"calibrated_on": split}
    if coverage is not None:
        scores = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1).numpy()
        cells = make_cells(scores, labels.numpy(), groups, coverage, by)
        record["sets"] = {"coverage": coverage, "by": by, "cells": [asdict(cell) for cell in cells]}
        promises |= {"coverage": coverage, "set_thresholds": threshold_for_each_class(cells, len(class_counts))}
    if reject_known is not None:
        name, aurocs = choose_known_score(logits, labels, groups)
        scores = KNOWN_SCORES[name](logits).numpy()
        threshold, cells = known_threshold(scores, labels.numpy(), groups, reject_known)
        record["rejection"] = {"reject_known": reject_known, "score": name, "aurocs_without_own_class": aurocs}
        record["rejection"] |= {"threshold": threshold, "cells": [asdict(cell) for cell in cells]}
        promises |= {"reject_known": reject_known, "known_score": name, "known_threshold": threshold}
    return Confidence(temperature=temperature_for_each_class(chosen, groups), **promises), record


def describe_calibration(record: Mapping[str, Any]) -> str:
    """What the command prints about a record of `calibrate`."""
    where = "validation images" if record["split"] == "validation" else "training images"
    lines = [f"{record['images']:,} {where}, {100 * record['accuracy']:.1f} % right"]
    if record["split"] == "train":
        lines.append(
            "note: the model was trained on these images and is surer of them than of others. Only temperatures of 1 "
            "or more are accepted, and they are too low. For calibrated scores, train with "
            f"{_WITH_VALIDATION}"
        )
    for name, found in record["temperatures"].items():
        losses = "too few images to decide for itself"
        if found["losses"] is not None:
            each = (f"{_USED[kind]} {loss:.4f}" for kind, loss in found["losses"].items())
            losses = f"cross-entropy of held-out images: {', '.join(each)}"
        used = _USED[found["used"]] if name != "all" or found["used"] == "none" else "used"
        lines.append(
            f"{name:<7} {found['images']:>7,} images  temperature {found['temperature']:.3f}, {used}; {losses}"
        )
    if all(found["used"] == "none" for found in record["temperatures"].values()):
        lines.append("no temperature is better than none, so the scores stay as they are: they are not calibrated")
    if (sets := record.get("sets")) is not None:
        lines.append(f"\nsets that hold the true class of {100 * sets['coverage']:g} % of the images of")
        for cell in sets["cells"]:
            size = len(cell["classes"])
            lines.append(
                f"  {cell['name']}: {size:,} class{'es' if size > 1 else ''}, {cell['images']:,} calibration images, "
                f"probability of {cell['threshold']:.3g} or more"
            )
    if (rejection := record.get("rejection")) is not None:
        lines.append(
            f"\nat most {100 * rejection['reject_known']:g} % of the known images of a cell are rejected, by "
            f"{rejection['score']} below {rejection['threshold']:.4g}"
        )
        lines += [f"  {cell['name']}: {cell['images']:,} calibration images" for cell in rejection["cells"]]
    return "\n".join(lines)


def write_confidence(
    model: RideBfForImageClassification, confidence: Confidence, record: Mapping[str, Any], folder: Path
) -> None:
    """Writes the confidence into the configuration of the model in `folder`, and the record beside it.

    The code beside the model becomes the present one, which knows how to use it; the weights are not touched.
    """
    config = load_config(folder)  # not that of the loaded model, which may have another precision
    config.confidence = confidence.as_dict()
    config.save_pretrained(folder)
    code = custom_object_save(model, folder)
    (folder / CALIBRATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in ("config.json", CALIBRATION, *(path.name for path in code)):
        update_manifest(folder, name)


def confidence_facts(confidence: Confidence) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    """Makes the function of the columns (B,) that `measure_confidence` takes, for `gather_columns`."""

    def facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        label = labels.clamp(min=0)[:, None]
        probabilities = confidence.probabilities(outputs.logits)
        columns = {
            "calibrated_confidences": probabilities.amax(dim=1),
            "calibrated_losses": -probabilities.gather(1, label).squeeze(1).clamp(min=1e-30).log(),
        }
        if confidence.coverage is not None:
            sets = confidence.prediction_sets(outputs.logits)
            columns |= {"set_sizes": sets.sum(dim=1), "covered": sets.gather(1, label).squeeze(1)}
        if confidence.reject_known is not None:
            columns["rejected"] = confidence.rejected(outputs.logits)
        return columns

    return facts


def measure_confidence(
    images: Predictions, columns: Mapping[str, np.ndarray], confidence: Confidence, class_counts: Sequence[int]
) -> dict[str, Any]:
    """The key `confidence` of `results.json`, from the columns of `confidence_facts`.

    Calibration errors are of the images that are predicted as a group: a calibrated probability tells how often such
    predictions are right. Given the true class, as for coverage, they are right more often for common classes than for
    rare ones, however honest the model is.
    """
    labels = images.labels
    groups = groups_with_images(labels, class_counts)
    after = _calibrated_log_probabilities(images.log_probabilities, confidence)
    results: dict[str, Any] = {
        "temperature": confidence.temperature,
        "before": _errors(images, images.confidences, images.losses, images.log_probabilities, groups),
        "after": _errors(images, columns["calibrated_confidences"], columns["calibrated_losses"], after, groups),
    }
    if confidence.coverage is not None:
        covered, sizes = columns["covered"], columns["set_sizes"]
        per_class, _ = class_means(covered, labels, len(class_counts))
        results["sets"] = {
            "promised": confidence.coverage,
            **{
                name: {
                    "images": int(mask[labels].sum()),
                    "coverage": float(covered[mask[labels]].mean()),
                    "interval": wilson_interval(float(covered[mask[labels]].mean()), int(mask[labels].sum())),
                    "mean_size": float(sizes[mask[labels]].mean()),
                }
                for name, mask in groups.items()
            },
            "per_class_coverage": none_for_nan(per_class),
            "per_class_mean_size": none_for_nan(class_means(sizes, labels, len(class_counts))[0]),
        }
    if confidence.reject_known is not None:
        promised = {"promised": confidence.reject_known, "score": confidence.known_score}
        results["rejected"] = {**promised, **measure_rejected(columns["rejected"], labels, class_counts)}
    return results


def error_rows(measured: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Each group with its errors, by the order of `ERRORS`, before and after; from the key `confidence`."""
    before, after = measured["before"], measured["after"]
    return [
        (group, [(before[group][name], after[group][name]) for name in ERRORS if name in before[group]])
        for group in GROUPS
        if group in before
    ]


def confidence_table(measured: Mapping[str, Any]) -> str:
    """The key `confidence` of `results.json` as text, in percent."""
    rows = error_rows(measured)
    names = list(ERRORS.values())[: len(rows[0][1])]
    lines = [f"{'calibration error':<18}" + "".join(f"{name:>18}" for name in names)]
    for group, pairs in rows:
        lines.append(
            f"{group:<18}" + "".join(f"{100 * before:>9.2f} ->{100 * after:>5.2f} %" for before, after in pairs)
        )
    if (sets := measured.get("sets")) is not None:
        lines.append(f"\nsets that promise {100 * sets['promised']:g} %: coverage, mean number of classes")
        lines += [
            f"{group:<18}{100 * sets[group]['coverage']:>7.1f} %{sets[group]['mean_size']:>8.2f}"
            for group in GROUPS
            if group in sets
        ]
    if (rejected := measured.get("rejected")) is not None:
        lines.append(f"\nknown images rejected, of which {100 * rejected['promised']:g} % are promised")
        lines += [f"{group:<18}{100 * rejected[group]:>7.1f} %" for group in GROUPS if group in rejected]
    return "\n".join(lines)


def _errors(
    images: Predictions,
    confidences: np.ndarray,
    losses: np.ndarray,
    log_probabilities: np.ndarray | None,
    groups: Mapping[str, np.ndarray],
) -> dict[str, dict[str, float]]:
    correct = images.predictions == images.labels
    errors = {}
    for name, mask in groups.items():
        inside = mask[images.predictions]
        if not inside.any():
            continue
        errors[name] = {
            "loss": float(losses[inside].astype(np.float64).mean()),
            "expected_calibration_error": expected_calibration_error(calibration(confidences[inside], correct[inside])),
        }
        if log_probabilities is not None:
            errors[name] |= class_wise_calibration(log_probabilities, images.labels, classes=mask)
    return errors


def _calibrated_log_probabilities(log_probabilities: np.ndarray | None, confidence: Confidence) -> np.ndarray | None:
    """Log-probabilities are logits with another constant for each image, so the same temperature calibrates them."""
    if log_probabilities is None:
        return None
    rows = torch.from_numpy(log_probabilities).split(_ROWS)
    return torch.cat([confidence.calibrated_logits(part).log_softmax(dim=1) for part in rows]).numpy()
