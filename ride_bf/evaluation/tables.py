"""Results as text: one line for each epoch, and a table by shot group and class."""

from collections.abc import Sequence

from ride_bf.evaluation.metrics import shot_groups


def shot_summary(metrics: dict) -> str:
    """Returns the accuracies in percent on one line. Groups without classes are left out."""
    names = {
        "accuracy": "all",
        "many_shot_accuracy": "many",
        "medium_shot_accuracy": "medium",
        "few_shot_accuracy": "few",
    }
    return "  ".join(f"{short} {100 * metrics[name]:5.1f}" for name, short in names.items() if name in metrics)


def accuracy_table(metrics: dict, class_counts: Sequence[int], class_names: Sequence[str], most_rows: int = 20) -> str:
    """Returns a table of the groups and, if there are at most `most_rows` classes, of each class, largest first."""
    groups = shot_groups(class_counts)
    lines = [f"{'group':<12} {'classes':>7} {'training images':>15} {'accuracy':>9}"]
    lines.append(f"{'all':<12} {len(class_counts):>7} {sum(class_counts):>15} {_percent(metrics['accuracy'])}")
    for group, members in groups.items():
        if f"{group}_shot_accuracy" in metrics:
            images = sum(count for count, inside in zip(class_counts, members, strict=True) if inside)
            accuracy = _percent(metrics[f"{group}_shot_accuracy"])
            lines.append(f"{group + '-shot':<12} {int(members.sum()):>7} {images:>15} {accuracy}")
    if len(class_counts) <= most_rows:
        lines.append("")
        order = sorted(range(len(class_counts)), key=lambda label: -class_counts[label])
        for label in order:
            accuracy = metrics["per_class_accuracy"][label]
            shown = "        –" if accuracy is None else _percent(accuracy)
            lines.append(f"{'class ' + str(class_names[label]):<20} {class_counts[label]:>15} {shown}")
    return "\n".join(lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:>7.1f} %"
