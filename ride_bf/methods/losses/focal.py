"""The focal loss."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from ride_bf.methods.losses._shared import Criterion


class FocalLoss(Criterion):
    """Focal loss of the mean logits: (1 - p)^gamma times the cross-entropy. Lin et al., 2017."""

    options: ClassVar = {"focal_gamma": "gamma"}

    def __init__(self, gamma: float = 1.0):
        super().__init__()
        if gamma < 0:
            raise ValueError(f"focal gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def compute(self, expert_logits, labels, reweight):
        cross_entropy = F.cross_entropy(expert_logits.mean(dim=1), labels, reduction="none")  # (B,)
        # -expm1(-x) is 1 - p, without the cancellation that makes the gradient infinite at p = 1
        return ((-torch.expm1(-cross_entropy)).clamp_min(1e-12) ** self.gamma * cross_entropy).mean()
