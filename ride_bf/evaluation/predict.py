"""Predictions of a model for a whole split, on all processes, and the files written about them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import BaseImageProcessor

from data import (
    MAX_IMAGE_PIXELS,
    BrokenImageError,
    FinishedBatches,
    ImageStream,
    OnBrokenImage,
    class_counts,
    class_labels,
    evaluation_batches,
    undecoded,
)
from ride_bf.evaluation.html_report import write_report
from ride_bf.evaluation.leakage import also_trained_on, measure_leakage
from ride_bf.evaluation.pages import thumbnail
from ride_bf.evaluation.results import Predictions, describe_machine, main_metrics, write_results
from ride_bf.evaluation.views import CENTRE, VIEWS, MeanOverViews

# Smaller batches are padded. Other kernels compute small batches and round differently, and the size of the last batch
# depends on the number of processes.
_FEWEST_IMAGES = 32


def evaluate(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """Returns the metrics of `ride_bf.evaluation.metrics.shot_accuracy`, and `loss`, the cross-entropy of mean logits.

    With a router it also returns those of `ride_bf.evaluation.metrics.expert_use`. See `predict` for the arguments and
    the use of several processes.
    """
    return main_metrics(predict(model, loader, accelerator), class_counts)


@torch.no_grad()
def predict(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator) -> Predictions:
    """Predicts each image of the loader once, in order, on all processes.

    Model and loader come from `accelerator.prepare`. The model stays in evaluation mode. Every process gets the
    predictions of all images. Raises FloatingPointError if some are not finite.
    """
    return as_predictions(gather_columns(model, loader, accelerator, image_facts))


@torch.no_grad()
def gather_columns(
    model: nn.Module,
    loader: FinishedBatches,
    accelerator: Accelerator,
    facts: Callable[[Any, Tensor], dict[str, Tensor]],
    with_broken: bool = False,
    speeds: list[float] | None = None,
) -> dict[str, np.ndarray]:
    """Gathers the results of `facts(outputs, labels)` for each batch, as columns (N, ...) over all images, in order.

    Only these columns are kept, not the outputs. `labels` (N,) is one of them. Broken images, whose label is negative,
    are left out, unless `with_broken`. The images per second of each batch are added to `speeds`. See `predict` for the
    other arguments and the use of several processes.
    """
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    started = time.perf_counter()
    for batch in loader:
        count = len(batch["labels"])
        rows = torch.arange(max(count, _FEWEST_IMAGES), device=batch["labels"].device).clamp(max=count - 1)
        labels = batch["labels"][rows]
        values = {"labels": labels, **facts(model(batch["pixel_values"][rows]), labels)}
        values = {name: column[:count] for name, column in values.items()}
        for name, gathered in accelerator.gather_for_metrics(values).items():
            columns.setdefault(name, []).append(gathered.cpu())
        if speeds is not None:
            speeds.append(len(columns["labels"][-1]) / (time.perf_counter() - started))
            started = time.perf_counter()
    images = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    return images if with_broken else _rows(images, images["labels"] >= 0)


def _rows(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def as_predictions(columns: dict[str, np.ndarray]) -> Predictions:
    """Makes `Predictions` of the columns of `image_facts`. Raises FloatingPointError if logits were not finite."""
    if not np.isfinite(columns["confidences"]).all():
        raise FloatingPointError("some logits are not finite: is the model damaged, or the precision too low for it?")
    return Predictions(**columns)


def image_facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """Computes the columns of `Predictions` for a batch on its device, so that the logits need not be kept."""
    logits = outputs.logits.float()  # (B, C)
    expert_logits = outputs.expert_logits  # (B, E, C)
    classes = torch.arange(logits.shape[1], device=logits.device)
    label = labels.clamp(min=0)[:, None]  # (B, 1)
    own = logits.gather(1, label)
    before = (logits > own) | ((logits == own) & (classes < label))  # among equal logits the first class wins
    facts = {
        "predictions": logits.argmax(dim=1),
        "label_ranks": before.sum(dim=1),
        "confidences": logits.softmax(dim=1).amax(dim=1),
        "losses": F.cross_entropy(logits, label.squeeze(1), reduction="none"),
        "expert_predictions": expert_logits.argmax(dim=2).where(~expert_logits[..., 0].isnan(), -1),
    }
    if outputs.get("num_experts_used") is not None:
        facts["experts_used"] = outputs.num_experts_used
    return facts


def describe_broken(results: dict[str, Any]) -> str | None:
    """Says how many images were left out because they cannot be read; None without such."""
    broken = results.get("broken_images_left_out")
    return f"{broken:,} more image(s) cannot be read and are left out; check_data names them" if broken else None


def evaluate_split(
    model: nn.Module,
    split: Dataset | ImageStream,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    train_class_counts: Sequence[int],
    output_dir: Path,
    facts: dict[str, Any],
    batch_size: int = 256,
    num_workers: int = 0,
    training_images: Dataset | ImageStream | None = None,
    views: str = CENTRE,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    on_broken: OnBrokenImage | None = None,
) -> dict[str, Any] | None:
    """Evaluates a prepared model and writes `results.json`, `predictions.npz` and `report.html` into `output_dir`.

    `train_class_counts` (C,) are the training images of each class. `facts` are the keys of `results.json` about the
    model and the data, from `model` to `training_data`. With `training_images` the accuracy is also given without the
    images that are among them. `views` is a key of `VIEWS`. Images that cannot be read and that `on_broken` skips are
    left out. Every process calls this function. The first one writes the files and returns the contents of
    `results.json`; the others return None. Raises BrokenImageError if no image can be read.
    """
    if views != CENTRE:
        model, processor = MeanOverViews(model, views), VIEWS[views].processor(processor)
    loader = evaluation_batches(split, processor, batch_size, num_workers, accelerator, on_broken, max_image_pixels)
    started, speeds = time.perf_counter(), []
    columns = gather_columns(model, loader, accelerator, image_facts, with_broken=True, speeds=speeds)
    seconds = time.perf_counter() - started
    read = columns["labels"] >= 0  # (N,)
    if not read.any():
        raise BrokenImageError(f"none of the split's {len(read):,} images can be read; does their folder still exist?")
    images = as_predictions(_rows(columns, read))
    if len(read) != len(split):
        as_it_is = False
    elif isinstance(split, ImageStream):  # its order is not known in advance
        counts = np.bincount(images.labels, minlength=len(split.counts))
        as_it_is = len(counts) == len(split.counts) and bool((counts <= class_counts(split)).all())
    else:
        as_it_is = np.array_equal(images.labels, class_labels(split)[read])
    if not as_it_is:
        raise RuntimeError("the loader changed the order of the split's images, or did not return each of them once")
    if not accelerator.is_main_process:
        return None
    seen = also_trained_on(split, training_images)
    left_out = {} if read.all() else {"broken_images_left_out": int((~read).sum())}
    facts = {
        **facts,
        "views": views,
        **left_out,
        **measure_leakage(images, None if seen is None else seen[read], train_class_counts),
        "class_names": split.features["label"].names,
        "speed": {
            "images_per_second": float(np.median(speeds[1:] or speeds)),
            "timed_batches": len(speeds[1:] or speeds),
            "seconds": seconds,
            "batch_size": batch_size,
            "num_processes": accelerator.num_processes,
            "num_workers": num_workers,
            "mixed_precision": accelerator.mixed_precision,
        },
        "machine": describe_machine(accelerator.device),
    }
    results = write_results(output_dir, facts, images, train_class_counts)
    write_report(results, output_dir, _pictures_of_mistakes(results, split, np.flatnonzero(read), max_image_pixels))
    return results


def _pictures_of_mistakes(
    results: dict[str, Any], split: Dataset | ImageStream, rows: np.ndarray, max_image_pixels: int
) -> dict[int, str | None]:
    """Pictures for `write_report`. `rows` (N,) are the rows of the split that the predictions are of.

    There are none of a stream, which gives its images only once.
    """
    if isinstance(split, ImageStream):
        return {}
    images = [mistake["image"] for mistake in results["mistakes"]]
    stored = undecoded(split)
    return {image: thumbnail(stored[int(rows[image])]["image"], max_image_pixels) for image in images}
