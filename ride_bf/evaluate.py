"""Evaluation of a classifier on a split, each image once, over any number of processes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ride_bf.metrics import shot_accuracy


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, class_counts: Sequence[int]) -> dict:
    """What `ride_bf.metrics.shot_accuracy` gives, and `loss`, the mean cross-entropy of the mean logits.

    Model and loader come from `accelerator.prepare`; the model is left in evaluation mode. Every process gets the
    same numbers, computed from all images.
    """
    model.eval()
    predictions, labels, losses = [], [], []
    for batch in loader:
        logits = model(batch["pixel_values"]).logits.float()
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")  # (B,)
        gathered = accelerator.gather_for_metrics((logits.argmax(dim=1), batch["labels"], loss))
        for store, values in zip((predictions, labels, losses), gathered, strict=True):
            store.append(values.cpu())
    return {
        "loss": torch.cat(losses).double().mean().item(),
        **shot_accuracy(torch.cat(predictions).numpy(), torch.cat(labels).numpy(), class_counts),
    }
