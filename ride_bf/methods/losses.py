"""Losses for long-tailed classification, and the objectives that apply them to a network's outputs.

Every loss is called as `criterion(expert_logits, labels, reweight=False)` with `expert_logits` (B, E, C), `labels` (B,)
and `reweight` true once deferred re-weighting has begun, and returns a scalar. Under autocast they compute in float32:
half precision ends at 65,504, and a sum over the batch of losses of logits around 30 x E gets there.

A loss is a mean over the images of a step. In a distributed run that is those of all processes: the mean over the
processes of a loss's gradient, which is what DistributedDataParallel takes, is what one process with all the images
would have, re-weighted or not, if all hold equally many.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def _checked_counts(class_counts: Sequence[int]) -> Tensor:
    """Class counts as float64 (C,). Raises ValueError on a class without images."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts must be one number a class, got {class_counts!r}")
    empty = torch.nonzero(counts < 1).flatten().tolist()
    if empty:
        raise ValueError(
            f"classes without images: {empty[:10]}{' and more' if len(empty) > 10 else ''}; "
            "are these the counts of the training split?"
        )
    return counts


def ldam_margins(class_counts: Sequence[int], max_margin: float = 0.5) -> Tensor:
    """LDAM margins (C,), in cosine units: n_c^(-1/4), scaled so that the rarest class has `max_margin`.

    Raises ValueError on a class without images. Cao et al.: Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss, 2019, eq. 12.
    """
    margins = _checked_counts(class_counts).pow(-0.25)
    return (margins * (max_margin / margins.max())).float()


def effective_number_weights(class_counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights (C,), summing to C: inverse of the effective number of samples.

    Raises ValueError on a class without images. Cui et al.: Class-Balanced Loss Based on Effective Number of
    Samples, 2019.
    """
    weights = (1.0 - beta) / (1.0 - beta ** _checked_counts(class_counts))
    return (weights * (len(weights) / weights.sum())).float()


def log_prior(class_counts: Sequence[int]) -> Tensor:
    """Logarithm of each class's share of the training images (C,). Raises ValueError on a class without images."""
    counts = _checked_counts(class_counts)
    return (counts / counts.sum()).log().float()


def diversity_temperatures(class_counts: Sequence[int], reweight_factor: float) -> Tensor:
    """RIDE's distribution-aware factors (C,) on the temperature of the diversity term, in (0, 1].

    d_c = C p_c f + 1 - f, divided by its largest, with p_c the class's share of the images: the rarer a class, the
    smaller its temperature and the more different the experts may be on it.
    """
    counts = _checked_counts(class_counts)
    factors = len(counts) * counts / counts.sum() * reweight_factor + 1.0 - reweight_factor
    return (factors / factors.max()).float()


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of `losses` (B,) weighted with `weights` (B,), as PyTorch's weighted cross-entropy has it.

    The weights it divides by are of the images of all processes, over the number of processes: every process must call
    it in the same step.
    """
    total = weights.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return (weights * losses).sum() / total


class Criterion(nn.Module):
    """A loss of float32 logits. Subclasses define `compute`, which autocast does not touch."""

    def forward(self, expert_logits: Tensor, labels: Tensor, reweight: bool = False) -> Tensor:
        classes = next((buffer.numel() for buffer in self.buffers() if buffer.numel() > 1), None)
        if expert_logits.ndim != 3 or classes not in (None, expert_logits.shape[2]):
            expected = f"(batch, experts, {'classes' if classes is None else classes})"
            raise ValueError(f"expert_logits must be {expected}, got {tuple(expert_logits.shape)}")
        with torch.autocast(expert_logits.device.type, enabled=False):
            return self.compute(expert_logits.float(), labels, reweight)

    def compute(self, expert_logits: Tensor, labels: Tensor, reweight: bool) -> Tensor:
        raise NotImplementedError


class CrossEntropyLoss(Criterion):
    """Cross-entropy of the mean logits; with `class_weights` (C,), weighted from the first epoch on.

    `label_smoothing` spreads that share of the target over all classes; an image's weight is its class's all the same.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def compute(self, expert_logits, labels, reweight):
        logits = expert_logits.mean(dim=1)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)  # (B,)
        return losses.mean() if self.class_weights is None else _weighted_mean(losses, self.class_weights[labels])


class FocalLoss(Criterion):
    """Focal loss of the mean logits: (1 - p)^gamma times the cross-entropy. Lin et al., 2017."""

    def __init__(self, gamma: float = 1.0):
        super().__init__()
        if gamma < 0:
            raise ValueError(f"focal gamma must not be negative, got {gamma}")
        self.gamma = gamma

    def compute(self, expert_logits, labels, reweight):
        cross_entropy = F.cross_entropy(expert_logits.mean(dim=1), labels, reduction="none")  # (B,)
        # -expm1(-x) is 1 - p without the cancellation that makes its gradient infinite at p = 1
        return ((-torch.expm1(-cross_entropy)).clamp_min(1e-12) ** self.gamma * cross_entropy).mean()


class _MarginLoss(Criterion):
    """What LDAM and RIDE share: margins and the weights of deferred re-weighting."""

    def __init__(self, class_counts: Sequence[int], max_margin: float, scale: float, label_smoothing: float):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("margins", scale * ldam_margins(class_counts, max_margin), persistent=False)
        self.register_buffer("class_weights", effective_number_weights(class_counts), persistent=False)

    def _margin_cross_entropy(self, expert_logits: Tensor, labels: Tensor, reweight: bool) -> Tensor:
        """Cross-entropy with the true class's logit lowered by its margin, summed over the experts (B, E, C)."""
        batch, experts, classes = expert_logits.shape
        lowered = expert_logits - (F.one_hot(labels, classes) * self.margins)[:, None]
        each = F.cross_entropy(  # (B * E,)
            lowered.flatten(0, 1),
            labels.repeat_interleave(experts),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        losses = each.unflatten(0, (batch, experts)).sum(dim=1)
        return _weighted_mean(losses, self.class_weights[labels]) if reweight else losses.mean()


class LDAMLoss(_MarginLoss):
    """LDAM loss of the mean logits; LDAM-DRW if re-weighting begins late in the run. Cao et al., 2019.

    `scale` is what the classifier multiplies its cosine with, and the margins with it.
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
        return self._margin_cross_entropy(expert_logits.mean(dim=1, keepdim=True), labels, reweight)


class CollaborativeLoss(LDAMLoss):
    """The experts trained as one: number of experts times LDAM's loss of the mean logits.

    What the authors' RIDE loss turns into, without saying so, where its diversity factor is 0; here it has a name.
    """

    def compute(self, expert_logits, labels, reweight):
        return expert_logits.shape[1] * super().compute(expert_logits, labels, reweight)


class LogitAdjustedLoss(Criterion):
    """Cross-entropy of the mean logits plus `tau` times the log of the class's share of the training images.

    Menon et al.: Long-tail Learning via Logit Adjustment, 2021, eq. 10. With `tau` 1 it is the balanced softmax of Ren
    et al.: Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020. The network's own logits, without the
    adjustment, are those of balanced classes: nothing is to be done in evaluation. Raises ValueError on a class
    without images.
    """

    def __init__(self, class_counts: Sequence[int], tau: float = 1.0):
        super().__init__()
        self.register_buffer("adjustment", tau * log_prior(class_counts), persistent=False)

    def compute(self, expert_logits, labels, reweight):
        return F.cross_entropy(expert_logits.mean(dim=1) + self.adjustment, labels)


class RideLoss(_MarginLoss):
    """Sum over the experts of LDAM's loss and the distribution-aware diversity term. Wang et al., 2021, section 3.2.

    Args:
        class_counts (C,): training images of each class.
        diversity_factor: weight of each expert's KL divergence from the mean; negative rewards difference.
        diversity_temperature: temperature of that divergence.
        max_margin: margin of the rarest class, in cosine units.
        scale: what the classifier multiplies its cosine with.
        reweight_factor: f of `diversity_temperatures`, used once re-weighting has begun.
        label_smoothing: share of each target spread over all classes.

    Raises ValueError on a class without images.
    """

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
        return self._margin_cross_entropy(expert_logits, labels, reweight) + divergence_weight * divergence
