"""Objectives: the losses that a run minimises, called as `objective(outputs, batch, reweight=False)`.

`outputs` is a `RideBfOutput`, and `batch` comes from the loader and has `labels` (B,). The recipe chooses the
objective, so the training step never branches.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_bf.methods.losses import make_loss
from ride_bf.methods.losses._shared import Criterion
from ride_bf.recipes import TrainingRecipe


class ClassificationObjective(nn.Module):
    """Applies the criterion to the logits of a network with a single stream."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def streams(self, outputs) -> list[tuple[float, Tensor]]:
        """Weight and logits (B, E, C) of each trained stream."""
        return [(1.0, outputs.expert_logits)]

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        losses = [
            weight * self.criterion(expert_logits, batch["labels"], reweight=reweight)
            for weight, expert_logits in self.streams(outputs)
        ]
        return torch.stack(losses).sum()


class SharedClassifierObjective(ClassificationObjective):
    """Applies the criterion to both streams of a "shared_classifier" network.

    loss = criterion(raw stream) + batchformer_loss_weight * criterion(BatchFormer's stream), each with its own mean
    logits. The weight is 1 in the paper. In evaluation, without gradients, there is only the raw stream.
    """

    def __init__(self, criterion: nn.Module, batchformer_loss_weight: float = 1.0):
        super().__init__(criterion)
        self.batchformer_loss_weight = batchformer_loss_weight

    def streams(self, outputs) -> list[tuple[float, Tensor]]:
        if outputs.batchformer_expert_logits is None and not torch.is_grad_enabled():
            return super().streams(outputs)
        if outputs.batchformer_expert_logits is None:
            raise ValueError(
                "outputs have no batchformer_expert_logits: this objective needs a network with "
                "batchformer='shared_classifier' in train mode"
            )
        return [(1.0, outputs.expert_logits), (self.batchformer_loss_weight, outputs.batchformer_expert_logits)]


class MixedObjective(ClassificationObjective):
    """Applies an objective to images mixed by mixup or CutMix: to both classes, each by its share in the mixture.

    loss = label_weight * objective(labels) + (1 - label_weight) * objective(mixed_labels). `data.TrainBatch` adds
    `label_weight` and `mixed_labels` to the batch. Each term uses the margins and weights of its own class.
    """

    def __init__(self, objective: ClassificationObjective):
        super().__init__(objective.criterion)
        self.objective = objective

    def streams(self, outputs) -> list[tuple[float, Tensor]]:
        return self.objective.streams(outputs)

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        loss = self.objective(outputs, batch, reweight=reweight)
        mixed = self.objective(outputs, {**batch, "labels": batch["mixed_labels"]}, reweight=reweight)
        return torch.lerp(mixed, loss, batch["label_weight"].to(loss))


class DistillationObjective(nn.Module):
    """Adds the divergence from a teacher's prediction to an objective.

    loss = loss_factor * objective + distillation_factor * T^2 * KL(softmax(teacher / T) || softmax(mean logits / T)).
    The divergence is summed over the streams of the objective, with the objective's weights.

    Args:
        objective: the objective without the teacher.
        teacher: an image classifier of the same classes, called with `pixel_values`. It stays in evaluation mode and
            is not trained.
        distillation_factor: weight of the divergence.
        temperature: T.
        loss_factor: weight of the objective.
    """

    def __init__(
        self,
        objective: ClassificationObjective,
        teacher: nn.Module,
        distillation_factor: float = 1.0,
        temperature: float = 1.5,
        loss_factor: float = 1.0,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"the temperature of distillation must be positive, got {temperature}")
        self.objective = objective
        self.teacher = teacher.requires_grad_(False)
        self.distillation_factor = distillation_factor
        self.temperature = temperature
        self.loss_factor = loss_factor
        self.train(False)

    def train(self, mode: bool = True) -> "DistillationObjective":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        with torch.no_grad():
            teacher_logits = self.teacher(batch["pixel_values"]).logits
        loss = self.loss_factor * self.objective(outputs, batch, reweight=reweight)
        with torch.autocast(loss.device.type, enabled=False):
            target = F.softmax(teacher_logits.float() / self.temperature, dim=1)
            for weight, expert_logits in self.objective.streams(outputs):
                student = F.log_softmax(expert_logits.float().mean(dim=1) / self.temperature, dim=1)
                divergence = F.kl_div(student, target, reduction="batchmean")
                loss = loss + weight * self.distillation_factor * self.temperature**2 * divergence
        return loss


class RouterObjective(nn.Module):
    """Trains each router to predict whether a later expert is needed. RIDE, section 3.3.

    The loss is the binary cross-entropy, averaged over the routers. A later expert is needed if the mean of the logits
    so far predicts the wrong class and any later mean predicts the right one. `positive_weight` is the weight of these
    images.
    """

    def __init__(self, positive_weight: float = 100.0):
        super().__init__()
        if positive_weight <= 0:
            raise ValueError(f"positive_weight must be positive, got {positive_weight}")
        self.register_buffer("positive_weight", torch.tensor(float(positive_weight)), persistent=False)

    def forward(self, outputs, batch: Mapping[str, Tensor], reweight: bool = False) -> Tensor:
        if outputs.router_logits is None:
            raise ValueError("outputs have no router_logits: this objective needs a network with router=True")
        with torch.autocast(outputs.router_logits.device.type, enabled=False):
            needed = next_expert_needed(outputs.expert_logits.float(), batch["labels"])
            return F.binary_cross_entropy_with_logits(
                outputs.router_logits.float(), needed.float(), pos_weight=self.positive_weight
            )


def next_expert_needed(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Targets (B, E - 1) of the routers: true if the mean so far is wrong and any later mean is right."""
    right = (
        expert_logits.cumsum(dim=1).argmax(dim=2) == labels[:, None]
    )  # (B, E); a sum predicts the same class as its mean
    any_right_from = right.flip(1).cumsum(dim=1).flip(1) > 0  # (B, E): right at this expert or a later one
    return ~right[:, :-1] & any_right_from[:, 1:]


def make_criterion(recipe: TrainingRecipe, class_counts: Sequence[int]) -> Criterion:
    """The recipe's loss for these class counts (C,).

    Raises ValueError for a network whose number of experts the loss cannot train, and the errors of `make_loss`.
    """
    criterion = make_loss(recipe.loss, class_counts, recipe.loss_options())
    criterion.check_experts(recipe.network_value("num_experts"))
    return criterion


def make_objective(recipe: TrainingRecipe, class_counts: Sequence[int], teacher: nn.Module | None = None) -> nn.Module:
    """The objective of a recipe for these class counts (C,), with distillation if there is a teacher."""
    if recipe.train_only == "router":
        return RouterObjective()
    criterion = make_criterion(recipe, class_counts)
    objective = ClassificationObjective(criterion)
    if recipe.network.get("batchformer") == "shared_classifier":
        objective = SharedClassifierObjective(criterion, recipe.batchformer_loss_weight)
    if recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0:
        objective = MixedObjective(objective)
    if teacher is None:
        return objective
    return DistillationObjective(
        objective,
        teacher,
        distillation_factor=recipe.distillation_factor,
        temperature=recipe.distillation_temperature,
    )
