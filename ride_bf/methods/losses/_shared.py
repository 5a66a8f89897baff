"""Shared by the losses: their base class, and margins and weights computed from the class counts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Criterion(nn.Module):
    """A loss on float32 logits. Subclasses define `compute`, which runs outside autocast.

    If the constructor has an argument `class_counts`, it gets the training images of each class.

    Attributes:
        options: maps each recipe option that the loss reads to an argument of its constructor.
        reweights: whether deferred re-weighting (`reweight=True`) changes the loss.
        num_experts: the number of experts that the loss is for; None: any.
    """

    options: ClassVar[Mapping[str, str]] = {}
    reweights: ClassVar[bool] = False
    num_experts: ClassVar[int | None] = None

    def forward(self, expert_logits: Tensor, labels: Tensor, reweight: bool = False) -> Tensor:
        classes = next((buffer.shape[-1] for buffer in self.buffers() if buffer.numel() > 1), None)
        if expert_logits.ndim != 3 or classes not in (None, expert_logits.shape[2]):
            expected = f"(batch, experts, {'classes' if classes is None else classes})"
            raise ValueError(f"expert_logits must be {expected}, got {tuple(expert_logits.shape)}")
        self.check_experts(expert_logits.shape[1])
        with torch.autocast(expert_logits.device.type, enabled=False):
            return self.compute(expert_logits.float(), labels, reweight)

    @classmethod
    def check_experts(cls, num_experts: int) -> None:
        """Raises ValueError unless the loss can train this many experts."""
        if cls.num_experts not in (None, num_experts):
            raise ValueError(
                f"{cls.__name__} trains {cls.num_experts} experts, not {num_experts}: set --num_experts "
                f"{cls.num_experts}, or another --loss"
            )

    def compute(self, expert_logits: Tensor, labels: Tensor, reweight: bool) -> Tensor:
        raise NotImplementedError

    def learned_prior(self, log_shares: Tensor, reweight: bool) -> Tensor:
        """The distribution of the classes that the mean logits are for, as logarithms (C,) up to a constant.

        `log_shares` (C,) are the logarithms of the class shares of the images that the loss was trained on, and
        `reweight` is as in `forward`. The softmax of the logits is the posterior for this distribution, so a loss that
        shifts the logits or weights the classes overrides it. Margins are left aside: they move the boundaries of a
        class, but not as a prior does.
        """
        return log_shares


def checked_counts(class_counts: Sequence[int]) -> Tensor:
    """Class counts as float64 (C,). Raises ValueError for a class without images."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts must be one number for each class, got {class_counts!r}")
    empty = torch.nonzero(counts < 1).flatten().tolist()
    if empty:
        raise ValueError(
            f"classes without images: {empty[:10]}{' and more' if len(empty) > 10 else ''}; "
            "are these the counts of the training split?"
        )
    return counts


def ldam_margins(class_counts: Sequence[int], max_margin: float = 0.5) -> Tensor:
    """LDAM margins (C,), in cosine units: n_c^(-1/4), scaled so that the rarest class has `max_margin`.

    Raises ValueError for a class without images. Cao et al.: Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss, 2019, eq. 12.
    """
    margins = checked_counts(class_counts).pow(-0.25)
    return (margins * (max_margin / margins.max())).float()


def effective_number_weights(class_counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights (C,): the inverse of the effective number of samples, scaled to sum to C.

    Raises ValueError for a class without images. Cui et al.: Class-Balanced Loss Based on Effective Number of
    Samples, 2019.
    """
    weights = (1.0 - beta) / (1.0 - beta ** checked_counts(class_counts))
    return (weights * (len(weights) / weights.sum())).float()


def log_prior(class_counts: Sequence[int]) -> Tensor:
    """Logarithm of each class's share of the training images (C,). Raises ValueError for a class without images."""
    counts = checked_counts(class_counts)
    return (counts / counts.sum()).log().float()


def reversed_shares(class_counts: Sequence[int]) -> np.ndarray:
    """The class shares in reverse order (C,): the rarest class gets the share of the most frequent one, and so on.

    Of equally frequent classes, the later one counts as rarer. Zhang et al.: Self-Supervised Aggregation of Diverse
    Experts for Test-Agnostic Long-Tailed Recognition, 2022, section 4.1.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    order = np.argsort(-counts, kind="stable")
    shares = np.empty_like(counts)
    shares[order] = counts[order[::-1]] / counts.sum()
    return shares


def diversity_temperatures(class_counts: Sequence[int], reweight_factor: float) -> Tensor:
    """RIDE's distribution-aware factors (C,) on the temperature of the diversity term, in (0, 1].

    d_c = C p_c f + 1 - f, divided by the largest d_c, where p_c is the class's share of the images. The rarer a class,
    the smaller its temperature, and the more the experts may differ on it.
    """
    counts = checked_counts(class_counts)
    factors = len(counts) * counts / counts.sum() * reweight_factor + 1.0 - reweight_factor
    return (factors / factors.max()).float()


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of `losses` (B,) weighted by `weights` (B,), as in PyTorch's weighted cross-entropy.

    The sum of weighted losses is divided by the mean over the processes of the sum of weights. So every process must
    call it in the same step.
    """
    total = weights.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return (weights * losses).sum() / total


class ExpertAdjustedLoss(Criterion):
    """Base of losses that sum the cross-entropies of the experts' own logits plus `adjustments` (1 or E, C)."""

    def __init__(self, adjustments: Tensor):
        super().__init__()
        self.register_buffer("adjustments", adjustments, persistent=False)

    def compute(self, expert_logits: Tensor, labels: Tensor, reweight: bool) -> Tensor:
        experts = expert_logits.shape[1]
        adjusted = (expert_logits + self.adjustments).flatten(0, 1)  # (B * E, C)
        return experts * F.cross_entropy(adjusted, labels.repeat_interleave(experts))

    def learned_prior(self, log_shares: Tensor, reweight: bool) -> Tensor:
        return log_shares - self.adjustments.mean(dim=0)


class MarginLoss(Criterion):
    """Base of LDAM and RIDE: margins, and the weights of deferred re-weighting."""

    options: ClassVar = {"max_margin": "max_margin", "margin_scale": "scale", "label_smoothing": "label_smoothing"}
    reweights = True

    def __init__(self, class_counts: Sequence[int], max_margin: float, scale: float, label_smoothing: float):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("margins", scale * ldam_margins(class_counts, max_margin), persistent=False)
        self.register_buffer("class_weights", effective_number_weights(class_counts), persistent=False)

    def margin_cross_entropy(self, expert_logits: Tensor, labels: Tensor, reweight: bool) -> Tensor:
        """Cross-entropy, summed over the experts (B, E, C), with the true class's logit lowered by its margin."""
        batch, experts, classes = expert_logits.shape
        lowered = expert_logits - (F.one_hot(labels, classes) * self.margins)[:, None]
        each = F.cross_entropy(  # (B * E,)
            lowered.flatten(0, 1),
            labels.repeat_interleave(experts),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        losses = each.unflatten(0, (batch, experts)).sum(dim=1)
        return weighted_mean(losses, self.class_weights[labels]) if reweight else losses.mean()

    def learned_prior(self, log_shares: Tensor, reweight: bool) -> Tensor:
        return log_shares + self.class_weights.log() if reweight else log_shares
