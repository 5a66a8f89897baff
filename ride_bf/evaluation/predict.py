"""Predictions of a model for a whole split, on all processes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from data import FinishedBatches
from ride_bf.evaluation.results import Predictions, main_metrics

# Smaller batches are padded. Other kernels compute small batches and round differently, and the size of the last batch
# depends on the number of processes.
_FEWEST_IMAGES = 32


def evaluate(model: nn.Module, loader: FinishedBatches, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """Returns the metrics of `ride_bf.evaluation.results.main_metrics`.

    See `predict` for the arguments and the use of several processes.
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
    return images if with_broken else rows_of(images, images["labels"] >= 0)


def gather_whole(
    model: nn.Module,
    loader: FinishedBatches,
    accelerator: Accelerator,
    facts: Callable[[Any, Tensor], dict[str, Tensor]],
) -> dict[str, np.ndarray]:
    """`gather_columns` for a command that writes no list of broken images: it prints how many are left out.

    Raises ValueError if all are.
    """
    columns = gather_columns(model, loader, accelerator, facts, with_broken=True)
    whole = columns["labels"] >= 0
    if not whole.any():
        raise ValueError(f"none of the {len(whole):,} images can be read; repair them")
    if not whole.all():
        accelerator.print(f"{(~whole).sum():,} image(s) that cannot be read are left out")
    return rows_of(columns, whole)


def rows_of(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of columns (N, ...), by a mask (N,)."""
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
