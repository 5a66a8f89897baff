"""LDAM, and LDAM-DRW."""

from collections.abc import Sequence

from ride_bf.methods.losses._shared import MarginLoss


class LDAMLoss(MarginLoss):
    """LDAM loss of the mean logits. It is LDAM-DRW if re-weighting begins late in the run. Cao et al., 2019.

    `scale` is the factor of the cosine classifier. It also multiplies the margins.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        max_margin: float = 0.5,
        scale: float = 30.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(class_counts, max_margin, scale, label_smoothing)

    def compute(self, expert_logits, labels, reweight):
        return self.margin_cross_entropy(expert_logits.mean(dim=1, keepdim=True), labels, reweight)
