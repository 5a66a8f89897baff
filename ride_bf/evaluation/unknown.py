"""Scores of belonging to some known class, their choice and threshold, and how well they tell other images apart.

The scores are computed from the logits (`confidence_ride_bf.KNOWN_SCORES`); low means "none of the classes".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from confidence_ride_bf import KNOWN_SCORES
from ride_bf.evaluation.conformal import Cell, fewest_images, make_cells
from ride_bf.evaluation.metrics import groups_with_images, shot_groups

UNKNOWN = "unknown"  # a key of results.json
_KEPT = 0.95  # share of the known images that are kept where the false positive rate is measured


def known_columns(logits: Tensor) -> dict[str, Tensor]:
    """Columns (B,) of all scores, from logits (B, C), for `gather_columns`."""
    return {name: score(logits.float()) for name, score in KNOWN_SCORES.items()}


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that a known image scores higher than an unknown one; equal scores count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])))


def false_positive_rate(known: np.ndarray, unknown: np.ndarray) -> float:
    """Share of the unknown images that are kept by the highest threshold that keeps 95 % of the known images."""
    threshold = np.sort(known)[int(np.floor(round(len(known) * (1 - _KEPT), 6)))]
    return float((unknown >= threshold).mean())


def choose_known_score(
    logits: Tensor, labels: Tensor, groups: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, dict[str, float]]]:
    """Returns the name of the best score, and the AUROC of each on every group.

    Args:
        logits (N, C), labels (N,): of images of known classes that the network was not trained on.
        groups: name -> mask (C,) of classes.

    There are no unknown images yet. So the images stand in for them: an image without the logit of its own class is
    like one whose class the network does not have. The AUROC of a group is between its images with and without this
    logit. The best score has the highest mean over the groups; of equal ones, the first.
    """
    without = logits.scatter(1, labels[:, None], torch.finfo(logits.dtype).min)
    inside = {name: mask[labels.numpy()] for name, mask in groups.items()}
    found = {}
    for name, score in KNOWN_SCORES.items():
        known, unknown = score(logits).numpy(), score(without).numpy()
        found[name] = {group: auroc(known[rows], unknown[rows]) for group, rows in inside.items() if rows.any()}
    return max(found, key=lambda name: np.mean(list(found[name].values()))), found


def known_threshold(
    scores: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray], reject: float
) -> tuple[float, list[Cell]]:
    """Returns the threshold below which an image is rejected, and the cells of classes that it was decided on.

    Of the known images of each shot group, a share of at most `reject` is rejected. The threshold is the lowest of
    those that the groups need, because the group of an image is not known. See `make_cells` for the arguments. Raises
    ValueError if all images together are too few.
    """
    if len(scores) < (fewest := fewest_images(1 - reject)):
        least = math.ceil(1000 / (len(scores) + 1)) / 1000
        raise ValueError(
            f"--reject_known {reject:g} needs at least {fewest} calibration images, and there are {len(scores)}: raise "
            f"it to {least:g}, or calibrate on more images"
        )
    cells = make_cells(scores, labels, groups, 1 - reject, "group")
    return min(cell.threshold for cell in cells), cells


def measure_rejected(rejected: np.ndarray, labels: np.ndarray, class_counts: Sequence[int]) -> dict[str, float]:
    """Shares of the known images that are rejected, (N,) bool, over all images and by group of the true class."""
    groups = groups_with_images(labels, class_counts)
    return {name: float(rejected[mask[labels]].mean()) for name, mask in groups.items()}


def measure_unknown(
    known: Mapping[str, np.ndarray],
    labels: np.ndarray,
    unknown: Mapping[str, np.ndarray],
    predictions: np.ndarray,
    class_counts: Sequence[int],
    score: str | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """The key `unknown` of `results.json`.

    Args:
        known: columns (N,) of `known_columns`, of test images with `labels` (N,).
        unknown: the same (M,), of images of no known class, with their `predictions` (M,).
        class_counts (C,): training images of each class.
        score, threshold: of a model that was calibrated to reject.
    """
    rows = {name: mask[labels] for name, mask in groups_with_images(labels, class_counts).items()}
    results: dict[str, Any] = {
        "images": len(predictions),
        "scores": {
            name: {
                group: {
                    "auroc": auroc(known[name][inside], unknown[name]),
                    "false_positive_rate_95": false_positive_rate(known[name][inside], unknown[name]),
                }
                for group, inside in rows.items()
            }
            for name in KNOWN_SCORES
        },
        "taken_for": {
            name: float(mask[predictions].mean()) for name, mask in shot_groups(class_counts).items() if mask.any()
        },
    }
    if score is not None:
        results |= {"score": score, "rejected": float((unknown[score] < threshold).mean())}
    return results


def unknown_table(measured: Mapping[str, Any]) -> str:
    """The key `unknown` of `results.json` as text, in percent."""
    lines = [
        f"{measured['images']:,} unknown images: AUROC, and share of them that is kept with 95 % of the known ones",
        f"{'':<18}" + "".join(f"{name:>18}" for name in KNOWN_SCORES),
    ]
    for group in measured["scores"]["max_logit"]:
        own = [measured["scores"][name][group] for name in KNOWN_SCORES]
        values = (f"{100 * one['auroc']:>9.1f},{100 * one['false_positive_rate_95']:>6.1f} %" for one in own)
        lines.append(f"{group:<18}" + "".join(values))
    taken = ", ".join(f"{100 * share:.1f} % {group}-shot" for group, share in measured["taken_for"].items())
    lines.append(f"taken for classes: {taken}")
    if "rejected" in measured:
        lines.append(f"rejected by {measured['score']}: {100 * measured['rejected']:.1f} % of the unknown images")
    if measured.get("broken_images_left_out"):
        lines.append(f"note: {measured['broken_images_left_out']:,} more cannot be read and are left out")
    return "\n".join(lines)
