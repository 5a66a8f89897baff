"""What a training step costs on a GPU, and what 16-bit precision changes.

- Steps of the published networks and of a ViT-B with heads, in fp16 and bf16: see `benchmark/train.py` and
  `benchmark/backbone.py`.
- Ways to run the experts at the same time, on two of the networks: see `benchmark/side_by_side.py`.
- Loss curves of the training command in every precision, on the same images with the same seed.

Everything but the loss curves runs on images that are on the device already.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from ride_bf.benchmark.backbone import backbone_report, measure_backbone
from ride_bf.benchmark.measure import command, machine, write_results
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.benchmark.side_by_side import measure_side_by_side, side_by_side_report
from ride_bf.benchmark.train import measure_train, train_report
from ride_bf.recipes import RECIPES
from ride_bf.runs.engine import start_accelerator

SMOOTHED = 10  # steps of a loss curve whose mean is compared
# Name -> recipe and options of a loss curve: a residual network of each kind, on images that need no download
CURVES = {
    "ResNet-32": "--recipe digits_lt_resnet32",
    "ResNet-50": "--recipe imagenet_lt_resnet50 --dataset digits_lt --image_size 64 --batch_size 64 --epochs 100",
}


def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available() and "fp16" in options.precisions:
        raise SystemExit("error: fp16 needs a GPU, and PyTorch finds none; for a CPU leave it out of --precisions")
    if options.curve_steps < SMOOTHED:
        raise SystemExit(f"error: --curve_steps must be {SMOOTHED} or more, not {options.curve_steps}")
    results: dict[str, Any] = {"command": command(options)}
    parts: dict[str, Callable[[], Any]] = {
        "steps": lambda: _steps(options),
        "backbones": lambda: _backbones(options),
        "side_by_side": lambda: _side_by_side(options),
        "curves": lambda: measure_curves(options.curve_steps, options.precisions, options.output_dir),
    }
    for part in options.parts:  # each is written as soon as it is known
        results["machine"], results[part] = machine(_accelerator("no").device), parts[part]()
        write_results(options.results, "gpu", results)
    print(gpu_report(results))


def _accelerator(precision: str) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):  # one process measures several precisions
        state._reset_state()
    return start_accelerator(mixed_precision=precision)


def _steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = []
    for name in options.recipes:
        recipe = RECIPES[name].with_overrides(batch_size=options.batch_size)
        for precision in options.precisions:
            measured.append(measure_train(recipe, _accelerator(precision), options.rounds, compiled=False))
            _free()
    return measured


def _backbones(options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = []
    for precision in options.precisions:
        accelerator = _accelerator(precision)
        measured.append(measure_backbone(options.backbone, options.batch_size, accelerator, options.rounds))
        _free()
    return measured


def _side_by_side(options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = []
    for name in options.side_by_side:
        recipe = RECIPES[name].with_overrides(batch_size=options.batch_size)
        precision = options.precisions[-1]
        measured.append(measure_side_by_side(recipe, _accelerator(precision), options.rounds, options.compile))
        _free()
    return measured


def _free() -> None:
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_curves(steps: int, precisions: Sequence[str], output_dir: Path) -> dict[str, dict[str, list[float]]]:
    """Trains each network in float32 and in each precision. Returns network -> precision -> loss of every step."""
    runs = {
        (name, precision): Run(
            name=f"{name}, {precision}",
            options=tuple(f"{words} --max_steps {steps} --logging_steps 1 --report_to tensorboard".split()),
            folder=output_dir / name / precision,
            mixed_precision=precision,
        )
        for name, words in CURVES.items()
        for precision in ("no", *precisions)
    }
    train_all(list(runs.values()), jobs=1)
    curves: dict[str, dict[str, list[float]]] = {name: {} for name in CURVES}
    for (name, precision), each in runs.items():
        curves[name][precision] = logged_losses(each.folder)
    return curves


def logged_losses(folder: Path) -> list[float]:
    """The loss of every step that a run has logged for TensorBoard, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def gpu_report(results: dict[str, Any]) -> str:
    """The measurements as Markdown: the reports of the single benchmarks, and the distance between loss curves."""
    texts = [train_report({**each, "machine": results["machine"]}) for each in results.get("steps", ())]
    texts += [backbone_report({**each, "machine": results["machine"]}) for each in results.get("backbones", ())]
    texts += [side_by_side_report(each) for each in results.get("side_by_side", ())]
    for name, curves in results.get("curves", {}).items():
        for precision, distance in curve_distances(curves).items():
            texts.append(
                f"{name}, {precision}: the loss is {100 * distance['mean']:.1f} % from float32's in the mean of "
                f"{len(curves['no'])} steps and {100 * distance['most']:.1f} % at most, smoothed over {SMOOTHED} "
                f"steps; at the end {distance['last']:.4f} against {distance['last_in_float32']:.4f}"
            )
    return "\n\n".join(texts)


def curve_distances(curves: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How far each precision's smoothed curve is from float32's, relative to it: in the mean, at most, and the ends."""
    exact = _smooth(curves["no"])
    distances = {}
    for precision in curves.keys() - {"no"}:
        own = _smooth(curves[precision])
        relative = [abs(one - other) / abs(other) for one, other in zip(own, exact, strict=True)]
        distances[precision] = {
            "mean": statistics.mean(relative),
            "most": max(relative),
            "last": own[-1],
            "last_in_float32": exact[-1],
        }
    return dict(sorted(distances.items()))


def _smooth(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[end - SMOOTHED : end]) for end in range(SMOOTHED, len(losses) + 1)]
