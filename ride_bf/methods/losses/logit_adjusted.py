"""The logit-adjusted loss."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F

from ride_bf.methods.losses._shared import Criterion, log_prior


class LogitAdjustedLoss(Criterion):
    """Cross-entropy of the mean logits plus `tau` times the log of the class's share of the training images.

    Menon et al.: Long-tail Learning via Logit Adjustment, 2021, eq. 10. With `tau` 1 it is the balanced softmax of Ren
    et al.: Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020. Evaluation uses the logits of the network
    without the adjustment: they are already suited to balanced classes. Raises ValueError for a class without images.
    """

    options: ClassVar = {"logit_adjustment_tau": "tau"}

    def __init__(self, class_counts: Sequence[int], tau: float = 1.0):
        super().__init__()
        self.register_buffer("adjustment", tau * log_prior(class_counts), persistent=False)

    def compute(self, expert_logits, labels, reweight):
        return F.cross_entropy(expert_logits.mean(dim=1) + self.adjustment, labels)

    def learned_prior(self, log_shares, reweight):
        return log_shares - self.adjustment
