"""RIDE's loss."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from ride_bf.methods.losses._shared import MarginLoss, diversity_temperatures


class RideLoss(MarginLoss):
    """Sum over the experts of LDAM's loss and the distribution-aware diversity term. Wang et al., 2021, section 3.2.

    Args:
        class_counts (C,): training images of each class.
        diversity_factor: weight of each expert's KL divergence from the mean; a negative one rewards difference.
        diversity_temperature: temperature of that divergence.
        max_margin: margin of the rarest class, in cosine units.
        scale: factor of the cosine classifier; it also multiplies the margins.
        reweight_factor: f of `diversity_temperatures`, used once re-weighting has begun.
        label_smoothing: share of each target that is spread over all classes.

    Raises ValueError for a class without images.
    """

    options: ClassVar = {
        **MarginLoss.options,
        "diversity_factor": "diversity_factor",
        "reweight_factor": "reweight_factor",
    }

    def __init__(
        self,
        class_counts: Sequence[int],
        diversity_factor: float = -0.2,
        diversity_temperature: float = 1.0,
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_factor: float = 0.05,
        label_smoothing: float = 0.0,
    ):
        super().__init__(class_counts, max_margin, scale, label_smoothing)
        if diversity_temperature <= 0:
            raise ValueError(f"diversity_temperature must be positive, got {diversity_temperature}")
        self.diversity_factor = diversity_factor
        self.register_buffer("plain_temperatures", torch.full((1,), float(diversity_temperature)), persistent=False)
        self.register_buffer(
            "class_temperatures",
            diversity_temperature * diversity_temperatures(class_counts, reweight_factor),
            persistent=False,
        )

    def compute(self, expert_logits, labels, reweight):
        temperatures = self.class_temperatures if reweight else self.plain_temperatures  # (C,) or (1,)
        target = F.softmax(expert_logits.mean(dim=1, keepdim=True).detach() / temperatures, dim=2)  # (B, 1, C)
        divergence = F.kl_div(  # summed over the experts, averaged over the batch
            F.log_softmax(expert_logits / temperatures, dim=2), target.expand_as(expert_logits), reduction="batchmean"
        )
        divergence_weight = self.diversity_factor * temperatures.mean() ** 2
        return self.margin_cross_entropy(expert_logits, labels, reweight) + divergence_weight * divergence
