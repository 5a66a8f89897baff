"""The logit-adjusted loss of each expert."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from ride_bf.methods.losses._shared import Criterion, log_prior


class ExpertLogitAdjustedLoss(Criterion):
    """Sum over the experts of the cross-entropy of an expert's own logits plus `tau` times the log of the class shares.

    With one `tau` every expert learns for balanced classes. With one for each expert they learn for different
    distributions of the classes: 0 for that of the training images, 1 for balanced classes, 2 for the inverse one. Then
    the mean logits suit balanced classes if the mean `tau` is 1. Aimar et al.: Balanced Product of Calibrated Experts
    for Long-Tailed Recognition, 2023. Raises ValueError for a class without images, and for another number of experts.
    """

    options: ClassVar = {"logit_adjustment_tau": "tau"}

    def __init__(self, class_counts: Sequence[int], tau: float | Sequence[float] = 1.0):
        super().__init__()
        self.taus = (tau,) if isinstance(tau, int | float) else tuple(tau)
        adjustments = torch.tensor(self.taus)[:, None] * log_prior(class_counts)
        self.register_buffer("adjustments", adjustments, persistent=False)  # (1 or E, C)

    def compute(self, expert_logits, labels, reweight):
        experts = expert_logits.shape[1]
        if len(self.taus) not in (1, experts):
            raise ValueError(
                f"logit_adjustment_tau has {len(self.taus)} numbers for {experts} experts; give one for all or one each"
            )
        adjusted = (expert_logits + self.adjustments).flatten(0, 1)  # (B * E, C)
        return experts * F.cross_entropy(adjusted, labels.repeat_interleave(experts))
