"""Plots of a `results.json`. Each function takes its contents and returns a matplotlib figure.

`FIGURES` lists the functions by name. A function returns None if its figure does not apply, for example a comparison of
experts for a single expert.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ride_bf.evaluation.metrics import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, TEST_IMBALANCES, shot_groups

# Each colour has only one name, so that a page can replace the colours.
COLOURS = {
    "ink": "#1c2430",
    "muted": "#66707d",
    "line": "#d5dae1",
    "all": "#4a5568",
    "many": "#2f6fba",
    "medium": "#1b9382",
    "few": "#dd6b2f",
    "accent": "#5b5fc7",
}
_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "ride_bf",  # the same results give the same file
}
_SIZE = (4.8, 3.2)  # inches
_GROUP_NAMES = {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}


def styled(function: Callable) -> Callable:
    """Decorates a function to draw or save in this module's style, independent of matplotlib's settings."""

    @wraps(function)
    def in_style(*arguments, **options):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return function(*arguments, **options)

    return in_style


@styled
def save(figure: Figure, file: Any, **options) -> None:
    """`figure.savefig` in this module's style."""
    figure.savefig(file, **options)


def _axes(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _groups_present(results: dict[str, Any]) -> list[str]:
    return [group for group in _GROUP_NAMES if f"{group}_shot_accuracy" in results["metrics"]]


def _percent_axis(axis, low: float = 0.0, high: float = 1.0) -> None:
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0, symbol=" %"))
    axis.axes.set_ylim(low, high) if axis is axis.axes.yaxis else axis.axes.set_xlim(low, high)


def _value_label(axes: Axes, place: float, height: float, value: float) -> None:
    """Writes a fraction in percent above `height`."""
    style = {"ha": "center", "fontsize": 8.5, "fontweight": "bold"}
    axes.annotate(f"{100 * value:.1f}", (place, height), xytext=(0, 4), textcoords="offset points", **style)


def _short(name: str, most: int = 16) -> str:
    """Shortens a long name in the middle, because classes that are confused often begin alike."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - 1) // 2 :]}"


@styled
def accuracy_by_training_images(results: dict[str, Any]) -> Figure:
    """Plots the accuracy of each class against its training images, with a line for the mean of each group."""
    counts = np.asarray(results["train_class_counts"])
    accuracy = np.asarray(results["metrics"]["per_class_accuracy"], dtype=float)
    figure, axes = _axes()
    size, opacity = (34, 0.9) if len(counts) <= 50 else (14, 0.55) if len(counts) <= 500 else (8, 0.35)
    for group, members in shot_groups(counts).items():
        members = members & ~np.isnan(accuracy)
        if not members.any():
            continue
        colour = COLOURS[group]
        axes.scatter(counts[members], accuracy[members], size, colour, alpha=opacity, lw=0, clip_on=False, zorder=3)
        mean = results["metrics"][f"{group}_shot_accuracy"]
        ends = np.array([counts[members].min(), counts[members].max()])
        reach = ends * (0.93, 1.07) if ends[0] < ends[1] else ends * (0.8, 1.25)
        axes.plot(reach, [mean, mean], color=colour, lw=2, label=f"{_GROUP_NAMES[group]} {100 * mean:.1f} %")
    if len(counts) <= 12:
        for label, name in enumerate(results["class_names"]):
            if not np.isnan(accuracy[label]):
                axes.annotate(
                    _short(name, 10),
                    (counts[label], accuracy[label]),
                    xytext=(0, -12),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=COLOURS["muted"],
                    parse_math=False,
                )
    axes.set_xscale("log")
    low, high = counts.min() * 0.8, counts.max() * 1.25
    for boundary in (FEW_SHOT_BELOW - 0.5, MANY_SHOT_ABOVE + 0.5):
        if low < boundary < high:
            axes.axvline(boundary, color=COLOURS["muted"], lw=0.8, ls=(0, (2, 3)), zorder=1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set(xlabel="training images of the class", ylabel="accuracy on its test images")
    _percent_axis(axes.yaxis, 0, 1.02)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.4, labelcolor=COLOURS["ink"])
    return figure


def _bars_with_intervals(axes: Axes, results: dict[str, Any], names: Sequence[str], colours: Sequence[str]) -> None:
    metrics, intervals = results["metrics"], results["confidence_intervals"]
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        value, (low, high) = metrics[name], intervals[name]
        axes.bar(place, value, 0.62, color=colour)
        # by rounding, a bound can lie on the wrong side of the measured value
        axes.errorbar(
            place, value, [[max(value - low, 0)], [max(high - value, 0)]], color=COLOURS["ink"], lw=1.1, capsize=3
        )
        _value_label(axes, place, max(value, high), value)


@styled
def accuracy_by_group(results: dict[str, Any]) -> Figure:
    """Plots the accuracy on all images and for each group of classes, with confidence intervals."""
    groups = _groups_present(results)
    figure, axes = _axes()
    names = ["accuracy", "balanced_accuracy", *(f"{group}_shot_accuracy" for group in groups)]
    colours = [COLOURS["all"], COLOURS["all"], *(COLOURS[group] for group in groups)]
    _bars_with_intervals(axes, results, names, colours)
    labels = ["all\nimages", "mean over\nclasses"]
    counts = np.asarray(results["train_class_counts"])
    for group in groups:
        number = int(shot_groups(counts)[group].sum())
        labels.append(f"{_GROUP_NAMES[group]}\n{number:,} class{'es' if number > 1 else ''}")
    axes.set_xticks(range(len(names)), labels, color=COLOURS["ink"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy")
    _percent_axis(axes.yaxis, 0, 1.1)
    axes.set_yticks(np.linspace(0, 1, 6))
    return figure


@styled
def shifted_distributions(results: dict[str, Any]) -> Figure:
    """Plots the accuracy on long-tailed test distributions, from forward to backward."""
    forward = [f"forward_{factor}" for factor in TEST_IMBALANCES]
    backward = [f"backward_{factor}" for factor in reversed(TEST_IMBALANCES)]
    names = [*forward, "uniform", *backward]
    values = [results["metrics"][f"{name}_accuracy"] for name in names]
    low, high = np.array([results["confidence_intervals"][f"{name}_accuracy"] for name in names]).T
    figure, axes = _axes()
    places = np.arange(len(names))
    axes.fill_between(places, low, high, color=COLOURS["accent"], alpha=0.18, lw=0)
    axes.plot(places, values, color=COLOURS["accent"], lw=2, marker="o", ms=5)
    for place, value in enumerate(values):
        _value_label(axes, place, max(high[place], value), value)
    axes.set_xticks(places, [name.replace("_", "\n") for name in names], color=COLOURS["ink"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy")
    margin = max(0.05, 0.35 * (max(high) - min(low)))
    _percent_axis(axes.yaxis, max(0, min(low) - margin), min(1.1, max(high) + margin))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1.0001])
    axes.set_xlim(-0.4, len(names) - 0.6)
    return figure


@styled
def reliability(results: dict[str, Any]) -> Figure:
    """Plots the accuracy and the number of the predictions by their confidence."""
    bins = results["calibration"]["all"]
    count = np.asarray(bins["count"])
    confidence, accuracy = (np.asarray(bins[name], dtype=float) for name in ("confidence", "accuracy"))
    figure = Figure(figsize=(_SIZE[0], 3.7))
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    width = 1 / len(count)
    centres = (np.arange(len(count)) + 0.5) * width
    filled = count > 0
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    axes.bar(centres[filled], accuracy[filled], width * 0.88, color=COLOURS["accent"], label="accuracy")
    gap_low = np.minimum(accuracy, confidence)[filled]
    gap = np.abs(accuracy - confidence)[filled]
    axes.bar(
        centres[filled], gap, width * 0.88, gap_low, color=COLOURS["few"], alpha=0.45, label="gap to the confidence"
    )
    axes.set_ylabel("accuracy")
    axes.legend(loc="upper left")
    _percent_axis(axes.yaxis, 0, 1.02)
    below.bar(centres, count / count.sum(), width * 0.88, color=COLOURS["all"], alpha=0.75)
    below.set(xlabel="confidence of the prediction", ylabel="of images")
    _percent_axis(below.yaxis, 0, max(count / count.sum()) * 1.1)
    below.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
    _percent_axis(below.xaxis)
    return figure


@styled
def reliability_by_group(results: dict[str, Any]) -> Figure:
    """Plots accuracy against confidence for each group. The area of a point is the share of images in its bin."""
    figure, axes = _axes((_SIZE[0], 3.7))
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
    for group in _groups_present(results):
        bins = results["calibration"][group]
        count = np.asarray(bins["count"])
        filled = count > 0
        confidence, accuracy = (np.asarray(bins[name], dtype=float)[filled] for name in ("confidence", "accuracy"))
        error = results["metrics"][f"{group}_shot_expected_calibration_error"]
        axes.plot(confidence, accuracy, color=COLOURS[group], lw=1.2, alpha=0.7)
        areas = 12 + 260 * count[filled] / count.sum()
        label = f"{_GROUP_NAMES[group]}, ECE {100 * error:.1f}"
        axes.scatter(confidence, accuracy, areas, COLOURS[group], alpha=0.65, lw=0, clip_on=False, zorder=3)
        axes.plot([], [], "o", color=COLOURS[group], ms=5, label=label)
    axes.set(xlabel="confidence of the prediction", ylabel="accuracy")
    axes.legend(loc="upper left", handletextpad=0.2)
    _percent_axis(axes.yaxis, 0, 1.02)
    _percent_axis(axes.xaxis, 0, 1.02)
    return figure


def _matrix(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], colours: np.ndarray, digits: bool
) -> None:
    """Draws a matrix. The opacity of a cell is its value, which works on a light and on a dark background."""
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if np.isnan(value):
            continue
        cell = Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, color=colours[row, column], alpha=0.72 * value, lw=0)
        axes.add_patch(cell)
        if digits and value >= 0.005:
            text = f"{100 * value:.0f}"
            axes.text(column + 0.5, row + 0.52, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    style = {"color": COLOURS["ink"], "fontsize": 7.5, "parse_math": False}
    rotation = {"rotation": 90} if max(map(len, columns)) > 3 else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **style, **rotation)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, **style)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")


@styled
def confusion_of_the_worst_classes(results: dict[str, Any]) -> Figure:
    """Plots the predictions for the classes with the lowest accuracy, in percent."""
    worst = results["confusion"]["worst_classes"]
    names = results["class_names"]
    values = np.column_stack([worst["shares"], worst["other"]])
    right = np.equal.outer(worst["true"], [*worst["predicted"], -1])
    colours = np.where(right, COLOURS["medium"], COLOURS["few"])
    columns = [*(_short(names[label]) for label in worst["predicted"]), "any other"]
    if not any(worst["other"]):
        values, colours, columns = values[:, :-1], colours[:, :-1], columns[:-1]
    figure, axes = _axes((_SIZE[0], 1.2 + 0.3 * len(values)))
    _matrix(axes, values, [_short(names[label]) for label in worst["true"]], columns, colours, digits=True)
    axes.set(xlabel="predicted", ylabel="true class, worst first")
    return figure


@styled
def experts_by_group(results: dict[str, Any]) -> Figure | None:
    """Plots the accuracy of each expert, of their mean, and of an oracle that picks an expert that is right."""
    experts = results.get("experts")
    if experts is None:
        return None
    names = {"accuracy": "all images"}
    names |= {f"{group}_shot_accuracy": _GROUP_NAMES[group] for group in _groups_present(results)}
    figure, axes = _axes()
    each = experts["each"]
    width = 0.8 / (len(each) + 1)
    for index, expert in enumerate(each):
        values = [expert.get(name, np.nan) for name in names]
        places = np.arange(len(names)) - 0.4 + (index + 0.5) * width
        opacity = 0.35 + 0.4 * index / max(1, len(each) - 1)
        label = f"expert {index + 1}"
        axes.bar(places, values, width * 0.9, color=COLOURS["accent"], alpha=opacity, label=label)
    places = np.arange(len(names)) + 0.4 - width / 2
    values = [results["metrics"][name] for name in names]
    axes.bar(places, values, width * 0.9, color=COLOURS["all"], label="together")
    oracle = [experts[name.replace("accuracy", "oracle_accuracy")] for name in names]
    for place, value, line in zip(places, values, oracle, strict=True):
        _value_label(axes, place, line if line - value < 0.08 else value, value)  # not on the line
    axes.hlines(
        oracle,
        np.arange(len(names)) - 0.42,
        np.arange(len(names)) + 0.42,
        color=COLOURS["few"],
        lw=1.4,
        ls=(0, (3, 2)),
        label="some expert is right",
    )
    axes.set_xticks(range(len(names)), names.values(), color=COLOURS["ink"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy")
    _percent_axis(axes.yaxis, 0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2)
    return figure


@styled
def expert_agreement(results: dict[str, Any]) -> Figure | None:
    """Plots how often two experts predict the same class, and the mean over all pairs for each group."""
    experts = results.get("experts")
    if experts is None:
        return None
    agreement = np.asarray(experts["agreement"], dtype=float)
    number = len(agreement)
    figure = Figure(figsize=_SIZE)
    matrix, groups = figure.subplots(1, 2, width_ratios=(1.25, 1))
    names = [f"expert {index + 1}" for index in range(number)]
    _matrix(matrix, agreement, names, names, np.full(agreement.shape, COLOURS["accent"]), digits=number <= 8)
    matrix.set_aspect("equal")
    matrix.set_title("by pair, % of images", color=COLOURS["muted"])
    present = [group for group in _groups_present(results) if f"{group}_shot_mean_agreement" in experts]
    for place, group in enumerate(present):
        value = experts[f"{group}_shot_mean_agreement"]
        groups.bar(place, value, 0.6, color=COLOURS[group])
        _value_label(groups, place, value, value)
    groups.set_xticks(range(len(present)), present, color=COLOURS["ink"])
    groups.tick_params(axis="x", length=0)
    groups.set_title("by group of classes", color=COLOURS["muted"])
    _percent_axis(groups.yaxis, 0, 1.08)
    groups.set_yticks(np.linspace(0, 1, 6))
    return figure


@styled
def experts_used(results: dict[str, Any]) -> Figure | None:
    """Plots the shares of the images for which the router used 1, 2, ... experts."""
    if "experts_used" not in results["metrics"]:
        return None
    shares = {"all images": results["metrics"]["experts_used"]}
    for group in _groups_present(results):
        shares[_GROUP_NAMES[group]] = results["metrics"][f"{group}_shot_experts_used"]
    figure, axes = _axes((_SIZE[0], 2.3))
    for place, values in enumerate(shares.values()):
        start = 0.0
        for index, share in enumerate(values):
            opacity = 0.3 + 0.6 * index / max(1, len(values) - 1)
            name = f"{index + 1} expert{'s' if index else ''}"
            label = name if place == 0 else None
            axes.barh(place, share, 0.62, start, color=COLOURS["accent"], alpha=opacity, label=label)
            if share > 0.07:
                axes.text(start + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
            start += share
    axes.set_yticks(range(len(shares)), shares, color=COLOURS["ink"])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.invert_yaxis()
    _percent_axis(axes.xaxis)
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.2)
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "accuracy_by_training_images": accuracy_by_training_images,
    "accuracy_by_group": accuracy_by_group,
    "shifted_distributions": shifted_distributions,
    "reliability": reliability,
    "reliability_by_group": reliability_by_group,
    "confusion_of_the_worst_classes": confusion_of_the_worst_classes,
    "experts_by_group": experts_by_group,
    "expert_agreement": expert_agreement,
    "experts_used": experts_used,
}
