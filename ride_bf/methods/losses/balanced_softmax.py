"""Balanced softmax."""

from collections.abc import Sequence
from typing import ClassVar

from ride_bf.methods.losses.logit_adjusted import LogitAdjustedLoss


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """The logit-adjusted loss with `tau` 1. Ren et al.: Balanced Meta-Softmax, 2020."""

    options: ClassVar = {}

    def __init__(self, class_counts: Sequence[int]):
        super().__init__(class_counts, tau=1.0)
