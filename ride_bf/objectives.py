"""Objectives: what a run minimises, `objective(outputs, batch, reweight=False)`.

`outputs` is a `RideBfOutput`, `batch` what the loader gave, with `labels` (B,). The recipe chooses the objective, so
that the training step never branches.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ride_bf.losses import (
    CollaborativeLoss,
    Criterion,
    CrossEntropyLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    RideLoss,
    effective_number_weights,
)
from ride_bf.recipes import TrainingRecipe


class ClassificationObjective(nn.Module):
    """The criterion on the one stream of logits a network has."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        return self.criterion(outputs.expert_logits, batch["labels"], reweight=reweight)


class SharedClassifierObjective(nn.Module):
    """The criterion on both streams of a "shared_classifier" network.

    loss = criterion(raw stream) + batchformer_loss_weight * criterion(BatchFormer's stream), each with its own mean
    logits. The paper's weight is 1.
    """

    def __init__(self, criterion: nn.Module, batchformer_loss_weight: float = 1.0):
        super().__init__()
        self.criterion = criterion
        self.batchformer_loss_weight = batchformer_loss_weight

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        if outputs.batchformer_expert_logits is None:
            raise ValueError(
                "outputs have no batchformer_expert_logits: this objective needs a network with "
                "batchformer='shared_classifier' in train mode"
            )
        raw = self.criterion(outputs.expert_logits, batch["labels"], reweight=reweight)
        batchformer = self.criterion(outputs.batchformer_expert_logits, batch["labels"], reweight=reweight)
        return raw + self.batchformer_loss_weight * batchformer


def make_criterion(recipe: TrainingRecipe, class_counts: Sequence[int]) -> Criterion:
    """The recipe's loss for a training split of these counts. Raises ValueError on a class without images."""
    if recipe.loss == "ride":
        return RideLoss(
            class_counts,
            diversity_factor=recipe.diversity_factor,
            diversity_temperature=recipe.diversity_temperature,
            max_margin=recipe.max_margin,
            scale=recipe.margin_scale,
            reweight_factor=recipe.reweight_factor,
        )
    if recipe.loss in ("ldam", "collaborative"):
        kind = LDAMLoss if recipe.loss == "ldam" else CollaborativeLoss
        return kind(class_counts, max_margin=recipe.max_margin, scale=recipe.margin_scale)
    if recipe.loss == "focal":
        return FocalLoss(gamma=recipe.focal_gamma)
    if recipe.loss == "reweighted_cross_entropy":
        return CrossEntropyLoss(effective_number_weights(class_counts, beta=recipe.class_weight_beta))
    if recipe.loss == "cross_entropy":
        return CrossEntropyLoss()
    if recipe.loss in ("balanced_softmax", "logit_adjusted"):
        tau = 1.0 if recipe.loss == "balanced_softmax" else recipe.logit_adjustment_tau
        return LogitAdjustedLoss(class_counts, tau=tau)
    raise ValueError(f"no loss is called {recipe.loss!r}")


def make_objective(recipe: TrainingRecipe, class_counts: Sequence[int]) -> nn.Module:
    """What a run of the recipe minimises on a training split of these counts."""
    criterion = make_criterion(recipe, class_counts)
    if recipe.network.get("batchformer") == "shared_classifier":
        return SharedClassifierObjective(criterion, recipe.batchformer_loss_weight)
    return ClassificationObjective(criterion)
