"""Predictions of a model for a whole split, over all processes, and what is written about them."""

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

from data import FinishedBatches, ImageStream, class_counts, class_labels, evaluation_batches
from ride_bf.evaluation.html_report import write_report
from ride_bf.evaluation.results import Predictions, describe_machine, main_metrics, write_results

# A batch of fewer is filled up: other kernels compute small ones, to other last bits, and how small a last batch is
# depends on the number of processes.
_FEWEST_IMAGES = 32


def evaluate(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """What `ride_bf.evaluation.metrics.shot_accuracy` gives, and `loss`, the mean cross-entropy of the mean logits.

    With a router, what `ride_bf.evaluation.metrics.expert_use` gives too. Model, loader and processes are as in
    `predict`.
    """
    return main_metrics(predict(model, loader, accelerator), class_counts)


@torch.no_grad()
def predict(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator) -> Predictions:
    """Each image of the loader once, in order, over all processes.

    Model and loader come from `accelerator.prepare`; the model is left in evaluation mode. Every process gets the
    predictions of all images. Raises FloatingPointError if some are not finite.
    """
    return as_predictions(gather_columns(model, loader, accelerator, image_facts))


@torch.no_grad()
def gather_columns(
    model: nn.Module,
    loader: FinishedBatches,
    accelerator: Accelerator,
    facts: Callable[[Any, Tensor], dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """What `facts(outputs, labels)` gives for the images of each batch, as columns (N, ...) over all images, in order.

    Only these columns are kept, not the outputs. Model, loader and processes are as in `predict`. Images that could not
    be read are left out; `labels` (N,) are among the columns.
    """
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    for batch in loader:
        count = len(batch["labels"])
        rows = torch.arange(max(count, _FEWEST_IMAGES), device=batch["labels"].device).clamp(max=count - 1)
        labels = batch["labels"][rows]
        values = {"labels": labels, **facts(model(batch["pixel_values"][rows]), labels)}
        values = {name: column[:count] for name, column in values.items()}
        for name, gathered in accelerator.gather_for_metrics(values).items():
            columns.setdefault(name, []).append(gathered.cpu())
    images = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    read = images["labels"] >= 0  # what could not be read comes with a label below
    return {name: column[read] for name, column in images.items()}


def as_predictions(columns: dict[str, np.ndarray]) -> Predictions:
    """The columns that `image_facts` makes, as one. Raises FloatingPointError if some logits were not finite."""
    if not np.isfinite(columns["confidences"]).all():
        raise FloatingPointError("some logits are not finite: is the model damaged, or the precision too low for it?")
    return Predictions(**columns)


def image_facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """The columns of `Predictions` for a batch, computed where the logits are, so that these need not be kept."""
    logits = outputs.logits.float()  # (B, C)
    expert_logits = outputs.expert_logits  # (B, E, C)
    classes = torch.arange(logits.shape[1], device=logits.device)
    label = labels.clamp(min=0)[:, None]  # (B, 1)
    own = logits.gather(1, label)
    before = (logits > own) | ((logits == own) & (classes < label))  # of equal logits the first class wins
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
) -> dict[str, Any] | None:
    """Evaluates a prepared model and writes `results.json`, `predictions.npz` and `report.html` into `output_dir`.

    `train_class_counts` (C,) are the training images of each class; `facts` what `results.json` is to say of the model
    and the data, its keys from `model` to `training_data`. Called by every process; returns what `results.json` holds
    in the first one, which writes it, and None in the others.
    """
    loader = evaluation_batches(split, processor, batch_size, num_workers, accelerator)
    started = time.perf_counter()
    images = predict(model, loader, accelerator)
    seconds = time.perf_counter() - started
    if isinstance(split, ImageStream):  # whose order is not known beforehand
        as_it_is = np.array_equal(np.bincount(images.labels, minlength=len(split.counts)), class_counts(split))
    else:
        as_it_is = np.array_equal(images.labels, class_labels(split))
    if not as_it_is:
        raise RuntimeError("the images came in another order than the split has them in, or not each of them once")
    if not accelerator.is_main_process:
        return None
    facts = {
        **facts,
        "class_names": split.features["label"].names,
        "speed": {
            "images_per_second": len(split) / seconds,
            "seconds": seconds,
            "batch_size": batch_size,
            "num_processes": accelerator.num_processes,
            "num_workers": num_workers,
            "mixed_precision": accelerator.mixed_precision,
        },
        "machine": describe_machine(accelerator.device),
    }
    results = write_results(output_dir, facts, images, train_class_counts)
    write_report(results, output_dir)
    return results
