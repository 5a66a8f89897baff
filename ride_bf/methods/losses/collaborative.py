"""The experts trained as one classifier."""

from ride_bf.methods.losses.ldam import LDAMLoss


class CollaborativeLoss(LDAMLoss):
    """Trains the experts as one classifier: number of experts times LDAM's loss of the mean logits.

    In the authors' code, a diversity factor of 0 silently turns the RIDE loss into this one. Here it has its own name.
    """

    def compute(self, expert_logits, labels, reweight):
        return expert_logits.shape[1] * super().compute(expert_logits, labels, reweight)
