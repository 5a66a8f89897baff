"""Metrics of a long-tailed classifier, from arrays: accuracy by group of classes, calibration, confusion, agreement.

A mean over classes ignores classes without test images.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

MANY_SHOT_ABOVE, FEW_SHOT_BELOW = 100, 20
TEST_IMBALANCES = (50, 25)  # of the long-tailed test distributions
CALIBRATION_BINS = 15


def shot_groups(class_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns boolean masks (C,) of the `many`, `medium` and `few` shot classes.

    Many-shot classes have more than 100 training images, medium-shot 20 to 100, few-shot less than 20. Liu et al.:
    Large-Scale Long-Tailed Recognition in an Open World, 2019.
    """
    counts = np.asarray(class_counts)
    many, few = counts > MANY_SHOT_ABOVE, counts < FEW_SHOT_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def groups_with_images(labels: np.ndarray, class_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns masks (C,) of `all` classes and of the shot groups, without those that have no image of `labels` (N,)."""
    groups = {"all": np.ones(len(class_counts), dtype=bool), **shot_groups(class_counts)}
    return {name: mask for name, mask in groups.items() if mask[labels].any()}


def shot_accuracy(predictions: Sequence[int], labels: Sequence[int], class_counts: Sequence[int]) -> dict:
    """Computes accuracies, as fractions.

    Args:
        predictions (N,): predicted classes.
        labels (N,): true classes.
        class_counts (C,): training images of each class.

    Returns `accuracy` over the images; `balanced_accuracy`, the mean over the classes; `many_shot_accuracy`,
    `medium_shot_accuracy` and `few_shot_accuracy`, the means over the classes of a group, left out for a group without
    classes; and `per_class_accuracy` (C,), None for a class without images in `labels`. The means ignore such classes.
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
                f"but class_counts has classes 0 to {num_classes - 1}"
            )
    accuracy, images = class_means(predictions == labels, labels, num_classes)
    result: dict[str, Any] = {
        name: weighted_mean(accuracy, weights) for name, weights in accuracy_weights(class_counts, images).items()
    }
    result["per_class_accuracy"] = none_for_nan(accuracy)
    return result


def class_summary(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float | int]:
    """Summarises the classes in other ways than by the mean of their accuracies.

    Args:
        predictions (N,), labels (N,): predicted and true classes.
        num_classes: C.

    Returns `macro_f1`, the mean over the classes of the harmonic mean of precision and recall; `harmonic_mean_accuracy`
    and `geometric_mean_accuracy` of the classes' accuracies, 0 if one of them is 0; `worst_class_accuracy`; and
    `worst_class`, the label of that class, the first of several. Classes without images in `labels` are left out.
    """
    from sklearn.metrics import f1_score  # its import takes a second

    accuracy, images = class_means(predictions == labels, labels, num_classes)
    present = np.flatnonzero(images)
    worst = present[accuracy[present].argmin()]
    with np.errstate(divide="ignore"):  # 1 / 0 and log 0 make the mean 0
        return {
            "macro_f1": float(f1_score(labels, predictions, labels=present, average="macro", zero_division=0)),
            "harmonic_mean_accuracy": float(1 / np.mean(1 / accuracy[present])),
            "geometric_mean_accuracy": float(np.exp(np.mean(np.log(accuracy[present])))),
            "worst_class_accuracy": float(accuracy[worst]),
            "worst_class": int(worst),
        }


def class_means(values: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of `values` (N,) over each class (C,), NaN for a class without images, and the images (C,)."""
    images = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=values, minlength=num_classes)
    return np.divide(sums, images, out=np.full(num_classes, np.nan), where=images > 0), images


def weighted_mean(per_class: np.ndarray, weights: np.ndarray) -> float:
    """Returns the weighted mean of `per_class` (C,). NaN is allowed where the weight is 0."""
    return float(np.average(np.where(weights > 0, per_class, 0.0), weights=weights))


def none_for_nan(values: np.ndarray) -> list:
    """Converts an array to lists with None for NaN, because JSON has no NaN."""
    return np.where(np.isnan(values), None, values).tolist()


def accuracy_weights(class_counts: Sequence[int], images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns weights (C,) by name: each accuracy of `shot_accuracy` is a weighted mean of the per-class accuracies.

    `images` (C,) are the test images of each class. A group without test images is left out.
    """
    present = images > 0
    weights = {"accuracy": images, "balanced_accuracy": present}
    for group, members in shot_groups(class_counts).items():
        if (members & present).any():
            weights[f"{group}_shot_accuracy"] = members & present
    return {name: values.astype(float) for name, values in weights.items()}


def distribution_weights(class_counts: Sequence[int], images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the class proportions (C,) of long-tailed test sets, by the name of the accuracy on them.

    The K classes with test images are ranked r = 0, 1, ... by their training images, and equal counts by label. The
    share of a class is proportional to f^(-r / (K - 1)). `forward_50_accuracy` has f = 50, `backward_50_accuracy` has
    the ranks reversed, and `uniform_accuracy` has equal shares. These weighted means equal the expected accuracy on a
    random subsample of the test images. Zhang et al.: Self-Supervised Aggregation of Diverse Experts for Test-Agnostic
    Long-Tailed Recognition, 2022, section 5.1.
    """
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    order = order[images[order] > 0]
    place = np.arange(len(order)) / max(len(order) - 1, 1)  # 0 for the most frequent class, 1 for the rarest
    shares = {f"forward_{factor}": factor**-place for factor in TEST_IMBALANCES}
    shares["uniform"] = np.ones(len(order))
    shares |= {f"backward_{factor}": factor ** (place - 1) for factor in reversed(TEST_IMBALANCES)}
    weights = {}
    for name, share in shares.items():
        weights[f"{name}_accuracy"] = np.zeros(len(images))
        weights[f"{name}_accuracy"][order] = share / share.sum()
    return weights


def bootstrap(
    values: np.ndarray,
    labels: np.ndarray,
    weights: Mapping[str, np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Resamples weighted means of the class means of `values`. Returns `resamples` values for each name in `weights`.

    Args:
        values (N,): a value for each image, with few distinct values: 1 for a right prediction and 0 for a wrong one,
            or, for a paired bootstrap, the difference between two models.
        labels (N,): true classes.
        weights: name -> weights (C,).

    The bootstrap is stratified by class, so the weights of the classes do not change. From a class of n images, n - 1
    are drawn with replacement. This makes the variance unbiased for any n (Rao and Wu: Resampling Inference with
    Complex Survey Data, 1988). A class with one image adds no variance, because its variance is unknown. One
    multinomial draw gives the number of each outcome in a class.
    """
    num_classes = len(next(iter(weights.values())))
    outcomes, codes = np.unique(values, return_inverse=True)
    counts = np.bincount(labels * len(outcomes) + codes, minlength=num_classes * len(outcomes))
    counts = counts.reshape(num_classes, len(outcomes))
    images = counts.sum(axis=1)
    draws = np.maximum(images - 1, 1)
    shares = counts / np.maximum(images, 1)[:, None]
    columns = np.stack([weight / weight.sum() for weight in weights.values()], axis=1)  # (C, names)
    generator = np.random.default_rng(seed)
    rows = []
    for start in range(0, resamples, 100):  # a hundred at a time, to limit memory
        drawn = generator.multinomial(draws, shares, size=(min(100, resamples - start), num_classes))
        rows.append((drawn @ outcomes / draws) @ columns)  # (., C, outcomes) -> (., C) -> (., names)
    return dict(zip(weights, np.concatenate(rows).T, strict=True))


def confidence_interval(resampled: np.ndarray, level: float = 0.95) -> list[float]:
    """Returns the lower and the upper bound: percentiles of a bootstrap's values (resamples,)."""
    return np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]).tolist()


def wilson_interval(share: float, images: float, level: float = 0.95) -> list[float]:
    """Returns the lower and the upper bound of a share of `images`, which need not be a whole number.

    It has a width even if the share is 0 or 1. Wilson: Probable Inference, the Law of Succession, and Statistical
    Inference, 1927.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    reach = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    return [min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))]  # rounding aside


def effective_images(weights: np.ndarray, images: np.ndarray) -> float:
    """Returns how many independent images vary as much as a weighted mean of class means, if all classes are alike.

    Args:
        weights (C,): the weight of each class.
        images (C,): images of each class.
    """
    shares = weights / weights.sum()
    return float(1 / (shares**2 / np.maximum(images, 1)).sum())


def calibration(confidences: np.ndarray, correct: np.ndarray, num_bins: int = CALIBRATION_BINS) -> dict[str, list]:
    """Computes how often predictions with a certain confidence are right.

    Args:
        confidences (N,): probability of the predicted class.
        correct (N,): whether the prediction is right.

    Returns the `count`, the mean `confidence` and the `accuracy` of each bin. Bins have equal width and include their
    upper ends 1/num_bins, 2/num_bins, ..., 1. `confidence` and `accuracy` are None for an empty bin.
    """
    upper_ends = np.arange(1, num_bins) / num_bins
    bins = np.searchsorted(upper_ends, confidences, side="left")
    confidence, count = class_means(confidences, bins, num_bins)
    accuracy, _ = class_means(correct, bins, num_bins)
    return {"count": count.tolist(), "confidence": none_for_nan(confidence), "accuracy": none_for_nan(accuracy)}


def expected_calibration_error(bins: Mapping[str, list]) -> float:
    """Returns the mean of |accuracy - confidence| of the bins from `calibration`, weighted by their images.

    Guo et al.: On Calibration of Modern Neural Networks, 2017, eq. 3.
    """
    count, confidence, accuracy = (np.asarray(bins[name], dtype=float) for name in ("count", "confidence", "accuracy"))
    filled = count > 0
    return float(np.average(np.abs(accuracy - confidence)[filled], weights=count[filled]))


def class_wise_calibration(
    log_probabilities: np.ndarray,
    labels: np.ndarray,
    num_bins: int = CALIBRATION_BINS,
    classes: np.ndarray | None = None,
) -> dict[str, float]:
    """Computes calibration errors of the probabilities of all classes, not only of the predicted one.

    For a class, the images are put into bins by the probability that they get for it, and the gap of a bin is the
    difference between its mean probability and the share of its images that are of the class. Classes without images
    in `labels` are left out. Nixon et al.: Measuring Calibration in Deep Learning, 2019, sections 3 and 4.

    Args:
        log_probabilities (N, C): logarithms of the predicted probabilities.
        labels (N,): true classes.
        classes: mask (C,) of the classes whose mean is taken; None: all.

    Returns `class_wise_calibration_error`, the mean over the classes of the mean gap, weighted by the images of the
    bins, of bins of equal width (SCE in the paper); and `adaptive_calibration_error`, the mean over the classes and
    bins of the gap, for bins of equally many images (ACE).
    """
    present = np.unique(labels) if classes is None else np.unique(labels[classes[labels]])
    num_ranges = min(num_bins, len(labels))
    starts = np.arange(num_ranges) * len(labels) // num_ranges
    sizes = np.diff([*starts, len(labels)])
    by_width, by_mass = [], []
    for label in present:
        probabilities = np.exp(log_probabilities[:, label].astype(np.float64))
        is_label = labels == label
        by_width.append(expected_calibration_error(calibration(probabilities, is_label, num_bins)))
        order = np.argsort(probabilities, kind="stable")
        by_mass.append(np.abs(np.add.reduceat((is_label - probabilities)[order], starts) / sizes).mean())
    return {
        "class_wise_calibration_error": float(np.mean(by_width)),
        "adaptive_calibration_error": float(np.mean(by_mass)),
    }


def confused_pairs(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int, most: int = 20
) -> list[dict[str, int | float]]:
    """Returns up to `most` mistakes: `true` and `predicted` class, `images`, and their `share` of the true class.

    The most frequent come first, and equally frequent ones in descending order of `share`.
    """
    wrong = predictions != labels
    codes, images = np.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    true, predicted = codes // num_classes, codes % num_classes
    shares = images / np.bincount(labels, minlength=num_classes)[true]
    order = np.lexsort((codes, -shares, -images))[:most]
    return [
        {
            "true": int(true[index]),
            "predicted": int(predicted[index]),
            "images": int(images[index]),
            "share": float(shares[index]),
        }
        for index in order
    ]


def worst_classes(predictions: np.ndarray, labels: np.ndarray, num_classes: int, most: int = 10) -> dict[str, list]:
    """Returns a part of the confusion matrix: up to `most` classes with the lowest accuracy.

    `true` (R,) are these classes, the worst first. `predicted` (K,) are the same classes, followed by the most frequent
    mistake of each. `shares` (R, K) are the shares of each true class's images, and `other` (R,) is the share that is
    predicted as any other class.
    """
    accuracy, images = class_means(predictions == labels, labels, num_classes)
    order = np.lexsort((-images, accuracy))  # NaN, a class without images, comes last
    rows = order[images[order] > 0][:most].tolist()
    columns = list(rows)
    matrix = np.zeros((len(rows), num_classes))
    for row, label in enumerate(rows):
        matrix[row] = np.bincount(predictions[labels == label], minlength=num_classes) / images[label]
        mistakes = np.where(np.arange(num_classes) == label, 0, matrix[row])
        taken_for = int(mistakes.argmax())
        if mistakes[taken_for] > 0 and taken_for not in columns:
            columns.append(taken_for)
    shares = matrix[:, columns]
    return {
        "true": rows,
        "predicted": columns,
        "shares": shares.tolist(),
        "other": np.maximum(1 - shares.sum(axis=1), 0).round(12).tolist(),
    }


def expert_agreement(expert_predictions: np.ndarray) -> np.ndarray:
    """Returns how often two experts predict the same class (E, E), as a share of the images that both saw.

    `expert_predictions` (N, E) are classes, or -1 if the expert did not see the image. The result is NaN for two
    experts that saw no image together.
    """
    num_experts = expert_predictions.shape[1]
    agreement = np.full((num_experts, num_experts), np.nan)
    for one in range(num_experts):
        for other in range(num_experts):
            pair = expert_predictions[:, [one, other]]
            pair = pair[(pair >= 0).all(axis=1)]
            if len(pair):
                agreement[one, other] = (pair[:, 0] == pair[:, 1]).mean()
    return agreement


def mean_agreement(expert_predictions: np.ndarray) -> float:
    """Returns the mean of `expert_agreement` over pairs of different experts, or NaN if no pair saw the same image."""
    agreement = expert_agreement(expert_predictions)
    pairs = agreement[np.triu_indices_from(agreement, k=1)]
    pairs = pairs[~np.isnan(pairs)]
    return float(pairs.mean()) if pairs.size else float("nan")


def expert_use(
    experts_used: Sequence[int], labels: Sequence[int], class_counts: Sequence[int], num_experts: int
) -> dict[str, list[float]]:
    """Returns the shares of the images that used 1, 2, ... `num_experts` experts. Each list sums to 1.

    `experts_used` is for all images. `many_shot_experts_used`, `medium_shot_experts_used` and `few_shot_experts_used`
    are for the images of a group of classes; a group without images is left out.
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
