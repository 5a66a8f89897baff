"""Accuracy and compute of a router for a range of thresholds."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configuration_ride_bf import RideBfConfig
from data import FinishedBatches
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.evaluation.metrics import expert_use, shot_accuracy
from ride_bf.evaluation.predict import gather_whole
from ride_bf.runs.checkpoints import update_manifest
from ride_bf.runs.models import changeable_folder

THRESHOLDS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
TIMED_IMAGES = 256  # images on which the speed is measured


def measure(
    model: nn.Module, loader: FinishedBatches, accelerator: Accelerator, class_counts: Sequence[int]
) -> list[dict[str, Any]] | None:
    """Measures each threshold, from one pass over the loader's images in which every expert sees every image.

    Model and loader come from `accelerator.prepare`. For each image, the predictions of the first 1, 2, ... experts and
    the routers' logits are kept. They determine its prediction for any threshold. `images_per_second` is the speed of
    the network alone, in one process, on `timed_images` images spread over the split. Every process calls this
    function. The first one returns an entry for each threshold, the others None.
    """
    config = accelerator.unwrap_model(model).config
    before, sample = config.router_threshold, Sample(loader, TIMED_IMAGES)
    try:
        config.router_threshold = 0.0  # all experts and all routers see every image
        images = gather_whole(model, sample, accelerator, _outcomes)
        speeds = []
        if accelerator.is_main_process:
            for threshold in THRESHOLDS:
                config.router_threshold = threshold
                speeds.append(_images_per_second(model, sample.batches()))
    finally:
        config.router_threshold = before
    accelerator.wait_for_everyone()  # other processes wait, so that they do not disturb the timing
    if not accelerator.is_main_process:
        return None
    parts = profile(config, sample.image_size, window=1)
    curve = []
    for threshold, speed in zip(THRESHOLDS, speeds, strict=True):
        used = experts_used(torch.from_numpy(images["router_logits"]), threshold).numpy()
        predictions = np.take_along_axis(images["predictions"], used[:, None] - 1, axis=1).squeeze(1)
        use = expert_use(used, images["labels"], class_counts, config.num_experts)
        curve.append(
            {
                "threshold": threshold,
                "mean_experts": float(used.mean()),
                "multiply_adds": inference_cost(parts, use["experts_used"]),
                "images_per_second": speed,
                "timed_images": len(sample),
                **shot_accuracy(predictions, images["labels"], class_counts),
                **use,
            }
        )
    return curve


def _outcomes(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """Returns the joint predictions of the first 1, 2, ... experts (B, E), and the routers' logits (B, E - 1)."""
    counts = torch.arange(1, outputs.expert_logits.shape[1] + 1, device=labels.device)
    running_mean = outputs.expert_logits.cumsum(dim=1) / counts[:, None]  # (B, E, C)
    return {"predictions": running_mean.argmax(dim=2), "router_logits": outputs.router_logits}


def experts_used(router_logits: Tensor, threshold: float) -> Tensor:
    """Returns how many experts (B,) each image uses, from the logits (B, E - 1) of all routers.

    As in `RideBfForImageClassification`, an image goes on to the next expert while the router's probability is above
    `threshold`.
    """
    goes_on = router_logits > torch.logit(torch.tensor(float(threshold))).item()
    return 1 + goes_on.long().cumprod(dim=1).sum(dim=1)


class Sample:
    """Passes on a loader's batches and keeps about `size` of their images, evenly spread."""

    def __init__(self, loader: FinishedBatches, size: int):
        self.loader, self.size, self.batch_size = loader, size, 1
        self.kept: list[Tensor] = []

    def __iter__(self) -> Iterator[dict]:
        try:
            each = -(-self.size // len(self.loader))
        except TypeError:  # a stream has no length: keep its first images
            each = self.size
        for batch in self.loader:
            count = len(batch["labels"])
            self.batch_size = max(self.batch_size, count)
            if len(self) < self.size:
                rows = np.linspace(0, count - 1, min(each, count)).round().astype(int)
                self.kept.append(batch["pixel_values"][rows.tolist()])
            yield batch

    def __len__(self) -> int:
        return sum(map(len, self.kept))

    @property
    def image_size(self) -> int:
        return self.kept[0].shape[-1]

    def batches(self) -> Sequence[Tensor]:
        """Returns the kept images, on their device, in batches of the loader's size."""
        return torch.cat(self.kept).split(self.batch_size)


@torch.no_grad()
def _images_per_second(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Measures the speed of the network on batches (B, 3, height, width) on its device, after a warm-up."""
    model(batches[0])
    started = _now(batches[0].device)
    for pixel_values in batches:
        model(pixel_values)
    return sum(map(len, batches)) / (_now(batches[0].device) - started)


def _now(device: torch.device) -> float:
    """Waits until the device has finished all its work. Returns the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def set_threshold(config: RideBfConfig, threshold: float, folder: Path | str) -> None:
    """Sets the threshold of the model in `folder`, and removes its calibration, which was of other logits.

    Raises ValueError for a threshold outside 0 to 1, and the errors of `changeable_folder`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold is a probability from 0 to 1, not {threshold}")
    folder = changeable_folder(folder)
    config.router_threshold, config.confidence = threshold, None
    config.save_pretrained(folder)
    update_manifest(folder, "config.json")


def draw(curve: list[dict[str, Any]], picture: Path) -> None:
    """Plots the accuracy of all and of the few-shot classes against the multiply-adds of each threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    cost = [point["multiply_adds"] / 1e6 for point in curve]
    for name, label in (("balanced_accuracy", "all classes"), ("few_shot_accuracy", "few-shot classes")):
        if name in curve[0]:
            axes.plot(cost, [100 * point[name] for point in curve], marker="o", label=label)
    together: list[list[int]] = []  # overlapping points share a label
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
