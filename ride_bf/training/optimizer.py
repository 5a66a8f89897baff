"""The optimizer of a run."""

from torch import nn
from torch.optim import SGD

from ride_bf.recipes import TrainingRecipe


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> SGD:
    """The recipe's SGD on every parameter that learns, its update in one pass over memory (fused)."""
    return SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
