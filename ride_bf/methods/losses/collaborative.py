"""The experts trained as one."""

from ride_bf.methods.losses.ldam import LDAMLoss


class CollaborativeLoss(LDAMLoss):
    """The experts trained as one: number of experts times LDAM's loss of the mean logits.

    What the authors' RIDE loss turns into, without saying so, where its diversity factor is 0; here it has a name.
    """

    def compute(self, expert_logits, labels, reweight):
        return expert_logits.shape[1] * super().compute(expert_logits, labels, reweight)
