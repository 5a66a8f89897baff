"""Cross-entropy, re-weighted by the effective numbers of the classes."""

from collections.abc import Sequence
from typing import ClassVar

from ride_bf.methods.losses._shared import effective_number_weights
from ride_bf.methods.losses.cross_entropy import CrossEntropyLoss


class ReweightedCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy of the mean logits with `effective_number_weights`, from the first epoch on.

    Raises ValueError for a class without images.
    """

    options: ClassVar = {**CrossEntropyLoss.options, "class_weight_beta": "beta"}

    def __init__(self, class_counts: Sequence[int], beta: float = 0.9999, label_smoothing: float = 0.0):
        super().__init__(effective_number_weights(class_counts, beta), label_smoothing)
