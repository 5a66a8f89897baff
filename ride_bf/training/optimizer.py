"""The optimizer of a run."""

from torch import nn
from torch.optim import SGD

from ride_bf.recipes import TrainingRecipe


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> SGD:
    """The SGD of the recipe for every parameter that is not frozen. It is fused: one pass over memory per update."""
    return SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
