"""SADE's losses: three experts that learn for three distributions of the classes."""

from collections.abc import Sequence

import torch

from ride_bf.methods.losses._shared import ExpertAdjustedLoss, log_prior, reversed_shares

_STRENGTH = 2.0  # lambda in the paper


class SadeLoss(ExpertAdjustedLoss):
    """Sum of the cross-entropies of three experts: plain, balanced softmax and inverse softmax.

    With the class shares p, and q the same shares in the reverse order of the classes, log p is added to the logits of
    the second expert and log p - 2 log q to those of the third. So the experts learn for the distribution of the
    training images, for balanced classes, and for the inverse distribution. Zhang et al.: Self-Supervised Aggregation
    of Diverse Experts for Test-Agnostic Long-Tailed Recognition, 2022, section 4.1. Prediction uses the mean of the
    experts; the paper's aggregation at test time is not part of this loss. Raises ValueError for a class without
    images, and for another number of experts.
    """

    num_experts = 3

    def __init__(self, class_counts: Sequence[int]):
        prior = log_prior(class_counts)
        inverse = torch.from_numpy(reversed_shares(class_counts)).log().float()
        super().__init__(torch.stack([torch.zeros_like(prior), prior, prior - _STRENGTH * inverse]))
