"""Measure time and memory of a training step for numbers of experts, classes and window sizes.

Only one number changes at a time. Each network is created again in every round and freed after its turn, because all
networks together might not fit into memory. The window is measured on the BatchFormer alone: forward and backward on
the features of a large batch.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from data import NUM_CLASSES
from ride_bf.benchmark.measure import command, default_precision, machine, peak_bytes, seconds_in_turns, write_results
from ride_bf.benchmark.train import long_tail, network_multiply_adds, random_batch, this_repository
from ride_bf.methods.windows import set_window
from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.runs.engine import start_accelerator


def run(options: argparse.Namespace) -> None:
    options.mixed_precision = options.mixed_precision or default_precision()
    accelerator = start_accelerator(mixed_precision=options.mixed_precision)
    recipe = RECIPES[options.recipe].with_overrides(batch_size=options.batch_size)
    results = {
        "command": command(options),
        "machine": machine(accelerator.device),
        "recipe": recipe.name,
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size,
        "steps": measure_steps(recipe, accelerator, options.rounds, options.experts, options.classes),
        "windows": measure_windows(recipe, accelerator, options.rounds, options.windows),
    }
    print(scale_report(results))
    write_results(options.results, "scale", results)


def measure_steps(
    recipe: TrainingRecipe, accelerator: Accelerator, rounds: int, experts: tuple[int, ...], classes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Measures seconds by round, memory and size of a step for each number of experts and of classes."""
    own = (recipe.network["num_experts"], NUM_CLASSES[recipe.dataset])
    networks = dict.fromkeys([own, *((count, own[1]) for count in experts), *((own[0], count) for count in classes)])
    rows = [{"experts": count, "classes": labels, "seconds_by_round": []} for count, labels in networks]
    for _ in range(rounds):
        for row in rows:
            changed = recipe.with_overrides(num_experts=row["experts"])
            config, counts = changed.config(num_labels=row["classes"]), long_tail(row["classes"])
            batch = random_batch(recipe.batch_size, recipe.image_size, counts, accelerator.device)
            contender = this_repository(changed, config, counts, batch, accelerator)
            row["seconds_by_round"] += seconds_in_turns({"step": contender.step}, 1, accelerator.device)["step"]
            row["peak_bytes"] = contender.peak_bytes(accelerator.device)
            row["parameters"] = contender.network.num_parameters()
            row["multiply_adds_per_image"] = network_multiply_adds(changed, config)
            del contender
            accelerator.free_memory()  # else it keeps the prepared objects
    return rows


def measure_windows(
    recipe: TrainingRecipe, accelerator: Accelerator, rounds: int, windows: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Measures seconds by round and memory of the BatchFormer, on as many images as the largest window has."""
    config, device = recipe.config(num_labels=2), accelerator.device
    batch = random_batch(1, 32, [1, 1], device)
    model = this_repository(recipe, config, [1, 1], batch, accelerator).network
    shape = (max(windows), config.num_experts, config.feature_size)
    features = torch.randn(shape, device=device, requires_grad=True)

    def call_of(window: int) -> Callable[[], None]:
        def call() -> None:
            set_window(model, window)
            with accelerator.autocast():
                encoded = model.batch_module(features)
            encoded.sum().backward()
            model.zero_grad()
            features.grad = None

        return call

    calls = {window: call_of(window) for window in windows}
    seconds = seconds_in_turns(calls, rounds, device)
    return [
        {
            "window": window,
            "images": max(windows),
            "seconds_by_round": seconds[window],
            "peak_bytes": peak_bytes(call, device),
        }
        for window, call in calls.items()
    ]


def scale_report(results: dict[str, Any]) -> str:
    """Returns the measurements as Markdown tables."""
    images = results["batch_size"]
    lines = [
        f"{results['recipe']}: {images} images of {results['image_size']} x {results['image_size']} pixels a step; "
        f"{results['machine']}; median of {len(results['windows'][0]['seconds_by_round'])} rounds",
        "",
        "| experts | classes | parameters, M | multiply-adds an image, G | s a step | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["steps"]:
        lines.append(
            f"| {row['experts']} | {row['classes']:,} | {row['parameters'] / 1e6:.1f} "
            f"| {row['multiply_adds_per_image'] / 1e9:.2f} | {_median(row):.2f} | {_gigabytes(row)} |"
        )
    lines += [
        "",
        f"The BatchFormer on {results['windows'][0]['images']} images:",
        "",
        "| window | ms an image | peak memory, GB |",
        "| --- | --- | --- |",
    ]
    for row in results["windows"]:
        lines.append(f"| {row['window']} | {1000 * _median(row) / row['images']:.2f} | {_gigabytes(row)} |")
    return "\n".join(lines)


def _median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds_by_round"])


def _gigabytes(row: dict[str, Any]) -> str:
    return "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
