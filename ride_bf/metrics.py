"""Accuracy on the many-, medium- and few-shot classes."""

from collections.abc import Sequence

import numpy as np

MANY_SHOT_ABOVE, FEW_SHOT_BELOW = 100, 20


def shot_groups(class_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Boolean masks (C,) of the `many`, `medium` and `few` shot classes.

    By training images: many more than 100, medium 20 to 100, few less than 20. Liu et al.: Large-Scale Long-Tailed
    Recognition in an Open World, 2019.
    """
    counts = np.asarray(class_counts)
    many, few = counts > MANY_SHOT_ABOVE, counts < FEW_SHOT_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def shot_accuracy(predictions: Sequence[int], labels: Sequence[int], class_counts: Sequence[int]) -> dict:
    """Accuracies as fractions.

    Args:
        predictions (N,): predicted classes.
        labels (N,): true classes.
        class_counts (C,): training images of each class.

    Returns `accuracy` over the images; `balanced_accuracy`, the mean over the classes; `many_shot_accuracy`,
    `medium_shot_accuracy` and `few_shot_accuracy`, each the mean over its classes, left out if it has none; and
    `per_class_accuracy` (C,), None for a class without images among `labels`. Such classes count in no mean.
    Raises ValueError for empty input, different lengths, or a class outside 0 to C - 1.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    num_classes = len(class_counts)
    if predictions.shape != labels.shape or labels.ndim != 1 or labels.size == 0:
        raise ValueError(
            f"predictions {predictions.shape} and labels {labels.shape} must be two lists of one length, not empty"
        )
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(
                f"{name} range from {values.min()} to {values.max()}, "
                f"but class_counts names classes 0 to {num_classes - 1}"
            )
    totals = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[predictions == labels], minlength=num_classes)
    present = totals > 0
    per_class = np.divide(hits, totals, out=np.full(num_classes, np.nan), where=present)
    result = {
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": float(per_class[present].mean()),
    }
    for group, members in shot_groups(class_counts).items():
        if (members & present).any():
            result[f"{group}_shot_accuracy"] = float(per_class[members & present].mean())
    result["per_class_accuracy"] = [None if np.isnan(value) else float(value) for value in per_class]
    return result


def expert_use(
    experts_used: Sequence[int], labels: Sequence[int], class_counts: Sequence[int], num_experts: int
) -> dict[str, list[float]]:
    """Shares of the images that a router gave 1, 2, ... `num_experts` experts, each list summing to 1.

    Returns `experts_used` over all images and `many_shot_experts_used`, `medium_shot_experts_used`,
    `few_shot_experts_used` over those of each group of classes; a group without images is left out.
    """
    experts_used, labels = np.asarray(experts_used), np.asarray(labels)

    def shares(of: np.ndarray) -> list[float]:
        return (np.bincount(of, minlength=num_experts + 1)[1:] / len(of)).tolist()

    result = {"experts_used": shares(experts_used)}
    for group, members in shot_groups(class_counts).items():
        inside = members[labels]
        if inside.any():
            result[f"{group}_shot_experts_used"] = shares(experts_used[inside])
    return result
