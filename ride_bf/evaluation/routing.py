"""What a router saves and what it costs: accuracy against compute, by threshold."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.evaluation.metrics import expert_use, shot_accuracy

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
