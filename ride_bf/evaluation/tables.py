"""Results as text: one line for each epoch, and tables by shot group and class."""

from collections.abc import Sequence

from ride_bf.evaluation.metrics import shot_groups


def shot_summary(metrics: dict) -> str:
    """Returns the accuracies in percent on one line: over all images, and means over all classes and over each group's.

    Groups without classes are left out.
    """
    names = {
        "accuracy": "all images",
        "balanced_accuracy": "balanced",
        "many_shot_accuracy": "many",
        "medium_shot_accuracy": "medium",
        "few_shot_accuracy": "few",
    }
    return "  ".join(f"{short} {100 * metrics[name]:5.1f}" for name, short in names.items() if name in metrics)


def accuracy_table(metrics: dict, class_counts: Sequence[int], class_names: Sequence[str], most_rows: int = 20) -> str:
    """Returns a table of the groups and, if there are at most `most_rows` classes, of each class, largest first.

    The row "all images" has the share of the images that are right, "balanced" the mean of the accuracies of all
    classes, and a group's row the mean of those of its classes. Before the rows of the classes are the metrics of
    `class_summary`, if there are any.
    """
    groups = shot_groups(class_counts)
    lines = [f"{'group':<12} {'classes':>7} {'training images':>15} {'accuracy':>9}"]
    for name, metric in (("all images", "accuracy"), ("balanced", "balanced_accuracy")):
        lines.append(f"{name:<12} {len(class_counts):>7} {sum(class_counts):>15} {_percent(metrics[metric])}")
    for group, members in groups.items():
        if f"{group}_shot_accuracy" in metrics:
            images = sum(count for count, inside in zip(class_counts, members, strict=True) if inside)
            accuracy = _percent(metrics[f"{group}_shot_accuracy"])
            lines.append(f"{group + '-shot':<12} {int(members.sum()):>7} {images:>15} {accuracy}")
    rows = summary_rows(metrics, class_names)
    if rows:
        lines += ["", *(f"{name:<36} {_percent(value)}" for name, value in rows)]
    if len(class_counts) <= most_rows:
        lines.append("")
        order = sorted(range(len(class_counts)), key=lambda label: -class_counts[label])
        for label in order:
            accuracy = metrics["per_class_accuracy"][label]
            shown = "        –" if accuracy is None else _percent(accuracy)
            lines.append(f"{'class ' + str(class_names[label]):<20} {class_counts[label]:>15} {shown}")
    return "\n".join(lines)


def summary_rows(metrics: dict, class_names: Sequence[str]) -> list[tuple[str, float]]:
    """Returns the names and values of the metrics of `ride_bf.evaluation.metrics.class_summary` that there are."""
    worst = class_names[metrics["worst_class"]] if "worst_class" in metrics else ""
    names = {
        "macro_f1": "macro F1",
        "harmonic_mean_accuracy": "harmonic mean over the classes",
        "geometric_mean_accuracy": "geometric mean over the classes",
        "worst_class_accuracy": f"worst class, {worst}",
    }
    return [(words, metrics[name]) for name, words in names.items() if name in metrics]


def calibration_table(metrics: dict) -> str:
    """Returns the calibration errors in percent on one line."""
    names = {
        "expected_calibration_error": "expected",
        "class_wise_calibration_error": "class-wise",
        "adaptive_calibration_error": "adaptive",
    }
    shown = "  ".join(f"{words} {100 * metrics[name]:.2f} %" for name, words in names.items() if name in metrics)
    return f"calibration error: {shown}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:>7.1f} %"
