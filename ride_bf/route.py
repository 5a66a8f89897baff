"""What a router saves and what it costs: `python -m ride_bf.route MODEL --recipe NAME [--output_dir OUT]`.

For thresholds from "every expert for every image" to "one expert for all", on the validation images: accuracy, experts
used, multiply-adds, and images a second as measured. Written as `routing.json` and drawn as `routing.png`. The model's
own threshold is `router_threshold` in its config.json; `--set_threshold T` writes another one there.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor
from transformers.utils import logging

from data import class_counts, evaluation_batches, load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.command_line import RECIPE_OPTIONS, errors_as_messages, parse_arguments
from ride_bf.metrics import expert_use, shot_accuracy
from ride_bf.parts import load_model
from ride_bf.profile import inference_cost, profile

THRESHOLDS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@torch.no_grad()
def measure(
    model: RideBfForImageClassification, pixel_values: torch.Tensor, labels: np.ndarray, counts: list[int], batch: int
) -> list[dict[str, Any]]:
    """One entry a threshold, on images (N, 3, height, width) that lie in memory, so that the network alone is timed."""
    model.eval()
    parts = profile(model.config, pixel_values.shape[-1], window=1)
    before = model.config.router_threshold
    curve = []
    for threshold in (THRESHOLDS[0], *THRESHOLDS):  # the first one twice: once to warm up
        model.config.router_threshold = threshold
        started = time.perf_counter()
        outputs = [model(images) for images in pixel_values.split(batch)]
        seconds = time.perf_counter() - started
        predictions = torch.cat([output.logits.argmax(dim=1) for output in outputs]).numpy()
        used = torch.cat([output.num_experts_used for output in outputs]).numpy()
        use = expert_use(used, labels, counts, model.config.num_experts)
        curve.append(
            {
                "threshold": threshold,
                "mean_experts": float(used.mean()),
                "multiply_adds": inference_cost(parts, use["experts_used"]),
                "images_per_second": len(labels) / seconds,
                **shot_accuracy(predictions, labels, counts),
                **use,
            }
        )
    model.config.router_threshold = before
    return curve[1:]


def draw(curve: list[dict[str, Any]], picture: Path) -> None:
    """Balanced accuracy, and that of the few-shot classes, against the multiply-adds of each threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    cost = [point["multiply_adds"] / 1e6 for point in curve]
    for name, label in (("balanced_accuracy", "all classes"), ("few_shot_accuracy", "few-shot classes")):
        if name in curve[0]:
            axes.plot(cost, [100 * point[name] for point in curve], marker="o", label=label)
    together: list[list[int]] = []  # points that lie on each other share a label
    for index, x in enumerate(cost):
        if together and abs(cost[together[-1][0]] - x) < 0.01 * (max(cost) - min(cost) or 1):
            together[-1].append(index)
        else:
            together.append([index])
    for number, points in enumerate(together):
        first, last = curve[points[0]], curve[points[-1]]
        label = f"{first['threshold']:g}" + (f" to {last['threshold']:g}" if first is not last else "")
        where = (cost[points[0]], 100 * first["balanced_accuracy"])
        axes.annotate(label, where, xytext=(6, -10 if number % 2 else 6), textcoords="offset points", fontsize=7)
    axes.set(
        xlabel="million multiply-adds an image", ylabel="accuracy in %", title="Accuracy against compute, by threshold"
    )
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=RECIPE_OPTIONS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of a model with a trained router")
    parser.add_argument("--output_dir", type=Path, help="where routing.json and routing.png go; MODEL by default")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--set_threshold", type=float, help="write this threshold into the model's config.json")
    options, rest = parser.parse_known_args(arguments)
    run, recipe = parse_arguments(rest)
    logging.disable_progress_bar()
    with errors_as_messages():
        model = load_model(options.model)
        if model.router is None:
            raise ValueError(f"{options.model} has no router; train one with a recipe whose name ends in _router")
        splits = load_long_tailed(recipe.dataset, **run.data_options())
        if "validation" not in splits:
            raise ValueError(f"{recipe.dataset} has no validation images; pass --validation_fraction")
        if options.set_threshold is not None:
            model.config.router_threshold = options.set_threshold
            model.config.save_pretrained(options.model)
    processor = AutoImageProcessor.from_pretrained(options.model)
    batches = list(evaluation_batches(splits["validation"], processor, options.batch, run.num_workers))
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    curve = measure(model, pixel_values, labels, class_counts(splits["train"]), options.batch)

    output_dir = options.output_dir or options.model
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "routing.json").write_text(json.dumps(curve, indent=2) + "\n")
    draw(curve, output_dir / "routing.png")
    print(f"{'threshold':>9} {'balanced':>9} {'experts':>8} {'multiply-adds':>14} {'images/s':>9}")
    for point in curve:
        print(
            f"{point['threshold']:>9g} {100 * point['balanced_accuracy']:>7.1f} % {point['mean_experts']:>8.2f} "
            f"{round(point['multiply_adds']):>14,} {point['images_per_second']:>9.0f}"
        )
    print(output_dir / "routing.png")


if __name__ == "__main__":
    main()
