"""The logit-adjusted loss of each expert."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from ride_bf.methods.losses._shared import ExpertAdjustedLoss, log_prior


class ExpertLogitAdjustedLoss(ExpertAdjustedLoss):
    """Sum over the experts of the cross-entropy of an expert's own logits plus `tau` times the log of the class shares.

    With one `tau` every expert learns for balanced classes. With one for each expert they learn for different
    distributions of the classes: 0 for that of the training images, 1 for balanced classes, 2 for the inverse one. Then
    the mean logits suit balanced classes if the mean `tau` is 1. Aimar et al.: Balanced Product of Calibrated Experts
    for Long-Tailed Recognition, 2023. Raises ValueError for a class without images, and for another number of experts.
    """

    options: ClassVar = {"logit_adjustment_tau": "tau"}

    def __init__(self, class_counts: Sequence[int], tau: float | Sequence[float] = 1.0):
        taus = (tau,) if isinstance(tau, int | float) else tuple(tau)
        super().__init__(torch.tensor(taus)[:, None] * log_prior(class_counts))

    def compute(self, expert_logits, labels, reweight):
        taus, experts = len(self.adjustments), expert_logits.shape[1]
        if taus not in (1, experts):
            raise ValueError(
                f"logit_adjustment_tau has {taus} numbers for {experts} experts; give one for all or one each"
            )
        return super().compute(expert_logits, labels, reweight)
