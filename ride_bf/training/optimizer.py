"""The optimizer of a run, and the schedule of its learning rate."""

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ride_bf.recipes import TrainingRecipe
from ride_bf.training.blocks import depths_from_top
from ride_bf.training.freezing import is_of_adapter

_BATCH_MODULE = "batchformer."


def make_optimizer(model: nn.Module, recipe: TrainingRecipe, sharded: bool = False) -> Optimizer:
    """The optimizer of the recipe for every parameter that is not frozen.

    Parameters with the same learning rate and weight decay form a group. It is fused: one pass over memory per update.
    Only SGD is not, if the network is to be `sharded`, because PyTorch has no fused SGD for that.
    With `layer_learning_rate_decay`, a block of the backbone has a lower rate the farther it is from the classifiers.
    """
    layer_decay = recipe.layer_learning_rate_decay
    depths = {} if layer_decay == 1 else depths_from_top(model, f"--layer_learning_rate_decay {layer_decay:g}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = recipe.learning_rate * rate_factor(name, recipe) * layer_decay ** depths.get(name, 0)
            key = (rate, _decay(parameter, recipe))
            groups.setdefault(key, []).append(parameter)
    parameters = [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]
    if recipe.optimizer == "adamw":
        return AdamW(parameters, lr=recipe.learning_rate, fused=True)
    options = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "fused": None if sharded else True}
    return SGD(parameters, lr=recipe.learning_rate, **options)


def rate_factor(name: str, recipe: TrainingRecipe) -> float:
    """Factor on the learning rate for the parameter of this name."""
    if name.startswith("classifiers.") or is_of_adapter(name):
        return recipe.head_learning_rate_factor
    if name.startswith(_BATCH_MODULE):
        return recipe.batchformer_learning_rate_factor
    return 1.0


def _decay(parameter: nn.Parameter, recipe: TrainingRecipe) -> float:
    """Weight decay of a parameter. AdamW spares biases and the scales of norms; SGD decays all, as in the papers."""
    return 0.0 if recipe.optimizer == "adamw" and parameter.ndim < 2 else recipe.weight_decay


class Schedule:
    """The learning rate over the run, by epoch or by step as the recipe says.

    Args:
        optimizer: its groups keep their ratios.
        recipe: gives the factor for a place in the run.
        steps_per_epoch: updates of the weights in an epoch.
    """

    def __init__(self, optimizer: Optimizer, recipe: TrainingRecipe, steps_per_epoch: int):
        self.recipe, self.by_step = recipe, recipe.schedule == "cosine_by_step"
        self.unit = 1 / max(1, steps_per_epoch) if self.by_step else 1
        self._scheduler = LambdaLR(optimizer, self._factor)

    def _factor(self, units: int) -> float:
        return self.recipe.learning_rate_factor(units * self.unit, self.unit)

    @property
    def rate(self) -> float:
        """The learning rate of the last update, for parameters without a factor of their own."""
        return self.recipe.learning_rate * self._factor(max(0, self._scheduler.last_epoch - self.by_step))

    def after_update(self) -> None:
        if self.by_step:
            self._scheduler.step()

    def after_epoch(self) -> None:
        if not self.by_step:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scheduler = self._scheduler
        scheduler.load_state_dict(state)
        # The recipe may have other epochs than the run that was saved, so the saved rates may not be those of now.
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * self._factor(scheduler.last_epoch)
