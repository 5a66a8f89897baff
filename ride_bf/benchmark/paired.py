"""Tables and pictures of the runs on Clipart-LT, apart from what the numbers depend on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from ride_bf.benchmark.runs import mean_and_deviation
from ride_bf.evaluation.comparison import paired_gain

if TYPE_CHECKING:
    from ride_bf.benchmark.clipart import Part

COLUMNS = {
    "balanced_accuracy": "balanced",
    "many_shot_accuracy": "many",
    "medium_shot_accuracy": "medium",
    "few_shot_accuracy": "few",
}
_MORE_COLUMNS = {"macro_f1": "macro F1"}  # where a run has them; older results do not
_COLOURS = ("#c8553d", "#2a9d5c")


def table(part: "Part", measured: dict[str, Any]) -> str:
    """A Markdown table in percent: mean ± standard deviation over the splits, and the paired difference of a method.

    A difference over at least five runs is bold if a two-sided t-test finds it at 5 %. Over five runs, that is 2.8
    standard errors. A method that was measured on fewer splits than others says so: splits differ in difficulty, so its
    means do not compare with theirs.
    """
    known = {column for own in measured["methods"].values() for run in own["runs"] for column in run}
    columns = COLUMNS | {column: heading for column, heading in _MORE_COLUMNS.items() if column in known}
    headings = ["", *columns.values(), "balanced, paired difference", "runs above 0"]
    lines = [f"| {' | '.join(headings)} |", "| --- |" + " --- |" * (len(headings) - 1)]
    most = max((len(own["runs"]) for own in measured["methods"].values()), default=0)
    for method, own in measured["methods"].items():
        number = len(own["runs"])
        cells = [method if number == most else f"{method} ({number} split{'' if number == 1 else 's'})"]
        of_runs = [[run[name] for run in own["runs"] if name in run] for name in columns]
        cells += [mean_and_deviation(values if len(values) == len(own["runs"]) else []) for values in of_runs]
        cells += _gain(part, measured["methods"], method)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def of_splits(measured: dict[str, Any], splits: Collection[int]) -> dict[str, Any]:
    """The measurements of a part on some splits alone. Methods without any are left out."""
    methods = {
        name: {**own, "runs": [run for run in own["runs"] if run["split"] in splits]}
        for name, own in measured["methods"].items()
    }
    return {**measured, "methods": {name: own for name, own in methods.items() if own["runs"]}}


def _gain(part: "Part", methods: dict[str, Any], method: str) -> list[str]:
    gains, above_zero = [], []
    for other in part.pairs.get(method, ()):
        if other not in methods or not (pairs := _paired(methods, other, method))[0]:
            continue
        gain, number = paired_gain(*pairs), len(pairs[0])
        shown = f"{gain['mean']:+.1f}"
        if number > 1:
            shown += f" ± {gain['standard_error']:.1f}"
        if number >= 5 and abs(gain["mean"]) > stats.t.ppf(0.975, df=number - 1) * gain["standard_error"]:
            shown = f"**{shown}**"
        gains.append(f"{shown} over {other}")
        above_zero.append(f"{gain['above_zero']} of {number}")
    return ["; ".join(gains), "; ".join(above_zero)]


def _paired(methods: Mapping[str, Any], one: str, another: str) -> tuple[list[float], list[float]]:
    """Balanced accuracies of two methods in percent, on the splits that both were measured on."""
    values = [
        {run["split"]: 100 * run["balanced_accuracy"] for run in methods[name]["runs"]} for name in (one, another)
    ]
    shared = sorted(values[0].keys() & values[1].keys())
    return tuple([own[split] for split in shared] for own in values)


def draw_windows(methods: Mapping[str, Any], alone: str, lines: Mapping[str, Mapping[int, str]], picture: Path) -> None:
    """Plots differences in balanced accuracy against the window, ± standard error over the splits.

    Args:
        methods: name -> its runs.
        alone: the method without BatchFormer.
        lines: name of a line -> number of images in a window -> method.
        picture: the file that is written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (line, names), colour in zip(lines.items(), _COLOURS, strict=True):
        gains = [paired_gain(*_paired(methods, alone, name)) for name in names.values()]
        means, errors = ([gain[key] for gain in gains] for key in ("mean", "standard_error"))
        axes.errorbar(list(names), means, errors, label=line, color=colour, marker="o", capsize=3)
    axes.axhline(0, color="#8a8f98", linewidth=0.8)
    axes.set_xscale("log", base=2)
    windows = sorted({window for names in lines.values() for window in names})
    axes.set_xticks(windows, list(map(str, windows)))
    axes.set(xlabel="images in a window", ylabel="balanced accuracy, points\nabove the head alone")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
