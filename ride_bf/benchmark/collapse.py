"""How often the BatchFormer collapses: the paper's layer, remedies and the gated one, over windows, rates and weights.

A run has collapsed if its balanced accuracy is more than ten points below that of RIDE alone with the same learning
rate, precision and seed. A cell of the grid is below RIDE alone if the mean difference over the seeds is, by a
one-sided t-test at 5 %. One of twenty cells without any difference is, by chance.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

from ride_bf.benchmark.clipart_lists import drawings_digest, find_drawings, run_inputs, write_split
from ride_bf.benchmark.efficientnet_lite0 import backbone_folder
from ride_bf.benchmark.measure import command, machine, read_results, write_results
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.evaluation.comparison import paired_gain

_KEPT = ("balanced_accuracy", "batchformer_cosine", "batchformer_warned")  # of a run's results, one for each seed
_COLUMNS = ("layer", "stream", "collapsed", "the paper's there", "below RIDE alone", "lowest cell", "mean difference")
POINTS = 0.1  # of balanced accuracy below RIDE alone
PAPER, GATED = "paper", "gated"
FORMS = {
    PAPER: "",
    "paper, its rate x 0.1": "--batchformer_learning_rate_factor 0.1",
    "paper, its rate x 0.5": "--batchformer_learning_rate_factor 0.5",
    "paper, after warm-up": "--batchformer_start_epoch {warmup_epochs}",
    "paper, bfloat16": "",
    "paper, bfloat16, layer in float32": "--batchformer_float32",
    GATED: "--batchformer_layer_scale_init_value 0",
}
WINDOWS = (8, 32, 128)  # 128 is the whole batch
RATES = (0.3, 1.0, 3.0)  # times the learning rate of the data
WEIGHTS = {"insert": (None,), "shared_classifier": (0.1, 1.0)}
# Remedies are tried where the paper's layer collapses most: at these windows and rates, without the small weight.
HARD = {"windows": (8, 128), "rates": (1.0, 3.0), "weights": (None, 1.0)}


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        options: of every run, but for its learning rate and its warm-up.
        learning_rate: that the factors multiply.
        warmup_epochs: of every run.
        forms: of the BatchFormer that are compared.
        mixed_precision: of the runs whose form does not name another.
    """

    options: str
    learning_rate: float
    warmup_epochs: int
    forms: tuple[str, ...]
    mixed_precision: str = "no"


DATA = {
    "digits": Data(
        "--recipe digits_lt_resnet32 --depths 1 1 1 --batch_size 128 --epochs 10 --reweight_epoch 8",  # a ResNet-8
        learning_rate=0.07,
        warmup_epochs=2,
        forms=tuple(FORMS),
    ),
    "clipart": Data(
        "--recipe probe --epochs 3 --num_experts 3 --expert_adapter_size 256 --loss ride",
        learning_rate=0.01,  # with factors, the rates at which docs/results.md has RIDE alone within 1.2 points
        warmup_epochs=1,
        forms=(PAPER, GATED),
        mixed_precision="bf16",  # a layer of 1,280 numbers is twice as fast
    ),
}


@dataclass(frozen=True)
class Cell:
    """A place in the grid. `form` is "none" or "none, bfloat16" for RIDE alone."""

    form: str
    rate: float
    mode: str | None = None
    window: int | None = None
    weight: float | None = None

    def options(self, data: Data) -> str:
        words = (
            f"{data.options} --learning_rate {data.learning_rate * self.rate:g} --warmup_epochs {data.warmup_epochs}"
        )
        words += f" --batchformer {self.mode or 'none'}"
        if self.mode is not None:
            words += f" --batchformer_window {self.window} "
            words += FORMS[self.form].format(warmup_epochs=data.warmup_epochs)
        if self.weight is not None:
            words += f" --batchformer_loss_weight {self.weight}"
        return words

    def mixed_precision(self, data: Data) -> str:
        return "bf16" if "bfloat16" in self.form else data.mixed_precision


def _alone(form: str) -> str:
    """RIDE alone in the precision of a form."""
    return "none, bfloat16" if "bfloat16" in form else "none"


def cells(forms: Sequence[str]) -> Iterator[Cell]:
    """RIDE alone at every learning rate, the whole grid for the paper's and the gated layer, and remedies at `HARD`."""
    alone = dict.fromkeys(_alone(form) for form in forms)
    yield from (Cell(form, rate) for form, rate in product(alone, RATES))
    for form, mode in product(forms, WEIGHTS):
        is_remedy = form not in (PAPER, GATED)
        windows, rates = (HARD["windows"], HARD["rates"]) if is_remedy else (WINDOWS, RATES)
        weights = [weight for weight in WEIGHTS[mode] if not is_remedy or weight in HARD["weights"]]
        yield from (Cell(form, rate, mode, *place) for rate, *place in product(rates, windows, weights))


def run(options: argparse.Namespace) -> None:
    results = read_results(options, required=options.table_only)
    if not options.table_only:
        for name in options.data:
            grid = measure(name, options)
            results = read_results(options, required=False)  # another command may have measured another grid
            results["grids"] = {**results.get("grids", {}), name: grid}
            commits = {commit for grid in results["grids"].values() for commit in grid["commits"]}
            write_results(options.results, "collapse", results, commits)
    for name, grid in results.get("grids", {}).items():
        print(f"\n### {name}\n\n{table(grid['cells'])}")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains each cell of the grid with each seed.

    Returns the `cells`, each with a list for each of `_KEPT`, a number for each seed, and how they were measured.
    """
    grid, of_data, inputs = list(cells(DATA[name].forms)), *_data_options(name, options)
    wanted = [(cell, seed) for seed in options.seeds for cell in grid]
    runs = []
    for number, (cell, seed) in enumerate(wanted):
        words = [*cell.options(DATA[name]).split(), *of_data[seed], "--seed", str(seed)]
        folder = options.output_dir / name / f"cell_{number % len(grid)}" / str(seed)
        shown = ", ".join(f"{key} {value}" for key, value in asdict(cell).items() if value is not None)
        shown = f"{name}: {shown}, seed {seed}"
        how = {"mixed_precision": cell.mixed_precision(DATA[name]), "inputs": inputs[seed], "keeps_model": False}
        runs.append(Run(name=shown, options=tuple(words), folder=folder, **how))
    rows: dict[Cell, dict[str, Any]] = {cell: {**asdict(cell), "seeds": options.seeds} for cell in grid}
    commits = set()
    for (cell, _), result in zip(wanted, train_all(runs, options.jobs), strict=True):
        commits.add(result["commit"])
        if result.get("modified"):
            rows[cell]["modified"] = True
        for key in _KEPT:
            if key in result:
                rows[cell].setdefault(key, []).append(result[key])
    return {
        "command": command(options, data=[name]),
        "machine": machine(),
        "commits": sorted(filter(None, commits)),
        "cells": list(rows.values()),
    }


def _data_options(name: str, options: argparse.Namespace) -> tuple[dict[int, list[str]], dict[int, str]]:
    """The options that name the data, and a digest of its files, for each seed. Each has its own split of drawings."""
    if name == "digits":
        return {seed: [] for seed in options.seeds}, dict.fromkeys(options.seeds, "")
    backbone = backbone_folder(options.backbone, options.output_dir)
    drawings, words, inputs = find_drawings(options.data_dir), {}, {}
    contents = drawings_digest(options.data_dir, drawings)
    for seed in options.seeds:
        lists = options.output_dir / "lists" / str(seed)
        _, digest = write_split(lists, drawings, seed)
        inputs[seed] = run_inputs(digest, contents)
        where = {"dataset": "custom", "data_dir": options.data_dir, "lists": lists, "backbone": backbone}
        words[seed] = [str(word) for key, value in where.items() for word in (f"--{key}", value)]
    return words, inputs


def table(grid: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the forms and weights: the share of runs that collapsed, and differences from RIDE alone.

    Beside the runs that collapsed stands how many did with the paper's layer in the same cells. The mean difference is
    over the cells; its standard error is over the seeds.
    """
    gains = {_place(row): _gains(row, grid) for row in grid if row["mode"] is not None}
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    for form, mode, weight in dict.fromkeys(place[:3] for place in gains):
        own = {place: gain for place, gain in gains.items() if place[:3] == (form, mode, weight)}
        of_paper = [gains[PAPER, *place[1:]] for place in own if (PAPER, *place[1:]) in gains]
        stream = mode if weight is None else f"{mode}, weight {weight:g}"
        below = sum(_is_below(gain) for gain in own.values())
        over_cells = paired_gain(np.zeros(len(next(iter(own.values())))), np.mean(list(own.values()), axis=0))
        mean = f"{100 * over_cells['mean']:+.1f} ± {100 * over_cells['standard_error']:.1f}"
        lowest = f"{100 * min(gain.mean() for gain in own.values()):+.1f}"
        cells = [form, stream, _collapsed(own.values()), _collapsed(of_paper), f"{below} of {len(own)}", lowest, mean]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("form", "mode", "weight", "window", "rate"))


def _gains(row: dict[str, Any], grid: Sequence[dict[str, Any]]) -> np.ndarray:
    """Balanced accuracy (seeds,) of a cell, less that of RIDE alone."""
    alone = next(other for other in grid if (other["form"], other["rate"]) == (_alone(row["form"]), row["rate"]))
    return np.subtract(row["balanced_accuracy"], alone["balanced_accuracy"])


def _collapsed(gains: Iterable[np.ndarray]) -> str:
    gains = list(gains)
    return f"{sum(int((gain < -POINTS).sum()) for gain in gains)} of {sum(map(len, gains))}"


def _is_below(gain: np.ndarray) -> bool:
    """Whether the mean over the seeds is below 0, by a one-sided t-test at 5 %. That of a seed alone never is."""
    found = paired_gain(np.zeros(len(gain)), gain)
    return len(gain) > 1 and found["mean"] < -stats.t.ppf(0.95, df=len(gain) - 1) * found["standard_error"]
