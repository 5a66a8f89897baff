"""Evaluation of a classifier on a split, each image once, over any number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ride_bf.metrics import expert_use, shot_accuracy


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """What `ride_bf.metrics.shot_accuracy` gives, and `loss`, the mean cross-entropy of the mean logits.

    With a router, what `ride_bf.metrics.expert_use` gives too.

    Model and loader come from `accelerator.prepare`; the model is left in evaluation mode. Every process gets the
    same numbers, computed from all images.
    """
    model.eval()
    columns: dict[str, list[torch.Tensor]] = {}
    for batch in loader:
        outputs = model(batch["pixel_values"])
        logits = outputs.logits.float()
        values = {
            "predictions": logits.argmax(dim=1),
            "labels": batch["labels"],
            "losses": F.cross_entropy(logits, batch["labels"], reduction="none"),  # (B,)
        }
        if outputs.get("num_experts_used") is not None:
            values["experts_used"] = outputs.num_experts_used
        for name, gathered in accelerator.gather_for_metrics(values).items():
            columns.setdefault(name, []).append(gathered.cpu())
    images = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    read = images["labels"] >= 0  # what could not be read comes with a label below
    images = {name: column[read] for name, column in images.items()}
    metrics = {
        "loss": float(images["losses"].astype(np.float64).mean()),
        **shot_accuracy(images["predictions"], images["labels"], class_counts),
    }
    if "experts_used" in images:
        num_experts = accelerator.unwrap_model(model).config.num_experts
        metrics |= expert_use(images["experts_used"], images["labels"], class_counts, num_experts)
    return metrics
