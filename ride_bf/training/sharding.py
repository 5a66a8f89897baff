"""A network that the processes share: FSDP2, PyTorch's `fully_shard`, through Accelerate.

Each process keeps its share of the weights, of their gradients and of the optimizer's state. The weights of a block are
gathered when it runs, and freed after it.
"""

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe
from ride_bf.training.ema import WeightAverage


def check_sharding(recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Raises ValueError for what does not work on a network that is divided among the processes."""
    if not accelerator.is_fsdp2:
        return
    if recipe.train_only in ("router", "class_scales"):
        raise ValueError(
            f"--train_only {recipe.train_only} cannot act under FSDP, and needs little memory; launch with --multi_gpu"
        )


def prepare_network(
    accelerator: Accelerator, model: RideBfForImageClassification, optimizer: Optimizer, ema_decay: float
) -> tuple[nn.Module, Optimizer, WeightAverage]:
    """Prepares network and optimizer for the accelerator's processes. Returns them, and what is evaluated and saved."""
    if not accelerator.is_fsdp2:
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, optimizer, WeightAverage(accelerator.unwrap_model(model), ema_decay)
    from ride_bf.training.shared_weights import SharedWeights  # slow to import, and most runs do without

    weights = SharedWeights(accelerator, model, ema_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, weights
