"""Cross-entropy."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ride_bf.methods.losses._shared import Criterion, weighted_mean


class CrossEntropyLoss(Criterion):
    """Cross-entropy of the mean logits. With `class_weights` (C,), it is weighted from the first epoch on.

    `label_smoothing` is the share of the target that is spread over all classes. The weight of an image is still that
    of its true class.
    """

    options: ClassVar = {"label_smoothing": "label_smoothing"}

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def compute(self, expert_logits, labels, reweight):
        logits = expert_logits.mean(dim=1)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)  # (B,)
        return losses.mean() if self.class_weights is None else weighted_mean(losses, self.class_weights[labels])

    def learned_prior(self, log_shares, reweight):
        return log_shares if self.class_weights is None else log_shares + self.class_weights.log()
