"""How often the BatchFormer collapses: the paper's layer, remedies and the gated one, over windows, rates and weights.

A run has collapsed if its balanced accuracy is more than ten points below that of RIDE alone with the same learning
rate and seed. A cell of the grid is below RIDE alone if the mean difference over the seeds is, by a t-test at 5 %.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from scipy import stats

from ride_bf.benchmark.clipart_lists import find_drawings, write_split
from ride_bf.benchmark.measure import command, machine, write_results
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.evaluation.comparison import paired_gain

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
    """

    options: str
    learning_rate: float
    warmup_epochs: int
    forms: tuple[str, ...]


DATA = {
    "digits": Data(
        "--recipe digits_lt_resnet32 --depths 1 1 1 --batch_size 128 --epochs 10 --reweight_epoch 8",  # a ResNet-8
        learning_rate=0.07,
        warmup_epochs=2,
        forms=tuple(FORMS),
    ),
    "clipart": Data(
        "--recipe probe --epochs 5 --num_experts 3 --expert_adapter_size 256 --loss ride",
        learning_rate=0.03,
        warmup_epochs=1,
        forms=(PAPER, GATED),
    ),
}


@dataclass(frozen=True)
class Cell:
    """A place in the grid. `form` is "none" for RIDE alone."""

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
        if self.form != "none":
            words += f" --batchformer_window {self.window} "
            words += FORMS[self.form].format(warmup_epochs=data.warmup_epochs)
        if self.weight is not None:
            words += f" --batchformer_loss_weight {self.weight}"
        return words

    @property
    def mixed_precision(self) -> str:
        return "bf16" if "bfloat16" in self.form else "no"


def cells(forms: Sequence[str]) -> Iterator[Cell]:
    """RIDE alone at every learning rate, the whole grid for the paper's and the gated layer, and remedies at `HARD`."""
    yield from (Cell("none", rate) for rate in RATES)
    for form, mode in product(forms, WEIGHTS):
        is_remedy = form not in (PAPER, GATED)
        windows, rates = (HARD["windows"], HARD["rates"]) if is_remedy else (WINDOWS, RATES)
        weights = [weight for weight in WEIGHTS[mode] if not is_remedy or weight in HARD["weights"]]
        yield from (Cell(form, rate, mode, *place) for rate, *place in product(rates, windows, weights))


def run(options: argparse.Namespace) -> None:
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    if not options.table_only:
        results = {"command": command(options), "machine": machine(), "grids": results.get("grids", {})}
        for name in options.data:
            results["grids"][name] = measure(name, options)
            write_results(options.results, "collapse", results)
    for name, grid in results["grids"].items():
        print(f"\n### {name}\n\n{table(grid)}")


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains each cell of the grid with each seed. Returns the cells with `balanced_accuracy`, one for each seed."""
    grid, of_data = list(cells(DATA[name].forms)), _data_options(name, options)
    wanted = [(cell, seed) for seed in options.seeds for cell in grid]
    runs = []
    for number, (cell, seed) in enumerate(wanted):
        words = [*cell.options(DATA[name]).split(), *of_data[seed], "--seed", str(seed)]
        folder = options.output_dir / name / f"cell_{number % len(grid)}" / str(seed)
        shown = ", ".join(f"{key} {value}" for key, value in asdict(cell).items() if value is not None)
        shown = f"{name}: {shown}, seed {seed}"
        runs.append(Run(name=shown, options=tuple(words), folder=folder, mixed_precision=cell.mixed_precision))
    rows = {cell: {**asdict(cell), "seeds": options.seeds, "balanced_accuracy": []} for cell in grid}
    for (cell, _), result in zip(wanted, train_all(runs, options.jobs), strict=True):
        rows[cell]["balanced_accuracy"].append(result["balanced_accuracy"])
    return list(rows.values())


def _data_options(name: str, options: argparse.Namespace) -> dict[int, list[str]]:
    """The options that name the data, for each seed. On drawings a seed has a split of its own."""
    if name == "digits":
        return {seed: [] for seed in options.seeds}
    drawings, words = find_drawings(options.data_dir), {}
    for seed in options.seeds:
        lists = options.output_dir / "lists" / str(seed)
        write_split(lists, drawings, seed)
        where = {"dataset": "custom", "data_dir": options.data_dir, "lists": lists, "backbone": options.backbone}
        words[seed] = [str(word) for key, value in where.items() for word in (f"--{key}", value)]
    return words


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("form", "mode", "window", "rate", "weight"))


def table(grid: list[dict[str, Any]]) -> str:
    """A Markdown table: how many runs of each form collapsed, how many cells are below RIDE alone, and the worst.

    Beside the runs that collapsed stands how many did with the paper's layer in the same cells.
    """
    alone = {row["rate"]: row["balanced_accuracy"] for row in grid if row["form"] == "none"}
    collapsed = {
        _place(row): [
            other < first - POINTS for first, other in zip(alone[row["rate"]], row["balanced_accuracy"], strict=True)
        ]
        for row in grid
        if row["form"] != "none"
    }
    lines = ["| layer | mode | runs collapsed | the paper's there | cells below RIDE alone | lowest cell, difference |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for form, mode in product(dict.fromkeys(row["form"] for row in grid if row["form"] != "none"), WEIGHTS):
        own = [row for row in grid if (row["form"], row["mode"]) == (form, mode)]
        runs = [run for row in own for run in collapsed[_place(row)]]
        papers = [run for row in own for run in collapsed.get(_place(row | {"form": PAPER}), [])]
        gains = [paired_gain(alone[row["rate"]], row["balanced_accuracy"]) for row in own]
        bound = stats.t.ppf(0.95, df=max(1, len(own[0]["seeds"]) - 1))  # of a seed alone nothing is significant
        below = sum(gain["mean"] < -bound * gain["standard_error"] for gain in gains)
        worst = min(gain["mean"] for gain in gains)
        cells = [form, mode, f"{sum(runs)} of {len(runs)}", f"{sum(papers)} of {len(papers)}"]
        lines.append(f"| {' | '.join([*cells, f'{below} of {len(own)}', f'{100 * worst:+.1f}'])} |")
    return "\n".join(lines)
