"""What makes a training step fast and leaves its numbers what they are, but for rounding.

Training and `python -m ride_bf.benchmark train` use the very same.
"""

import torch
from torch import nn
from torch.optim import SGD

from ride_bf.recipes import TrainingRecipe


def to_fast_layout(module: nn.Module) -> nn.Module:
    """The module itself, its convolutions' weights with the channels last, as the fast kernels want them.

    Feature maps follow the weights: pixel values may come in either layout.
    """
    return module.to(memory_format=torch.channels_last)


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
