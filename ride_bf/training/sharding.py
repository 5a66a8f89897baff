"""A network that the processes share: FSDP2, PyTorch's `fully_shard`, through Accelerate.

Each process keeps its share of the weights, of their gradients and of the optimizer's state. The weights of a block are
gathered when it runs, and freed after it.
"""

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe
from ride_bf.training.blocks import blocks
from ride_bf.training.ema import WeightAverage
from ride_bf.training.lora import merged


def check_sharding(recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Raises ValueError for what does not work on a network that is divided among the processes."""
    if not accelerator.is_fsdp2:
        return
    if recipe.ema_decay > 0:
        raise ValueError(
            f"--ema_decay {recipe.ema_decay:g} cannot act under FSDP, which does not copy its networks; set "
            "--ema_decay 0, or launch with --multi_gpu"
        )
    if recipe.train_only in ("router", "class_scales"):
        raise ValueError(
            f"--train_only {recipe.train_only} cannot act under FSDP, and needs little memory; launch with --multi_gpu"
        )


class SharedWeights(WeightAverage):
    """The weights of a network that the processes share. They have no average.

    LoRA is merged only in what is saved: to rounding, the network that is evaluated is the same.

    Args:
        accelerator: the accelerator of the run.
        model: the network, which is still whole.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        super().__init__(model, decay=0)
        self.accelerator = accelerator
        weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self._without_weights = copy.deepcopy(model, weights)

    @property
    def evaluated(self) -> nn.Module:
        return self.model

    def whole(self, network: nn.Module) -> nn.Module:
        """The network put together on the CPU of the main process. The others get one without weights."""
        state = self.accelerator.get_state_dict(network)
        whole = copy.deepcopy(self._without_weights)
        if self.accelerator.is_main_process:
            whole.load_state_dict(state, assign=True)
        return merged(whole)


def prepare_network(
    accelerator: Accelerator, model: RideBfForImageClassification, optimizer: Optimizer, ema_decay: float
) -> tuple[nn.Module, Optimizer, WeightAverage]:
    """Prepares network and optimizer for the accelerator's processes. Returns them, and what is evaluated and saved."""
    if not accelerator.is_fsdp2:
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, optimizer, WeightAverage(accelerator.unwrap_model(model), ema_decay)
    weights = SharedWeights(accelerator, model)
    _prepare_to_share(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, weights


def _prepare_to_share(accelerator: Accelerator, model: RideBfForImageClassification) -> None:
    """Makes each block of the network a unit that is gathered on its own, unless the launcher has named the layers.

    In mixed precision, weights are gathered in that precision, and gradients are averaged in float32. Only a network
    with BatchNorm is gathered in float32: PyTorch's needs scales and running statistics of one type.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy  # slow to import, and most runs do without
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    model.to(memory_format=torch.contiguous_format)  # FSDP2 does not take channels_last
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks(model)})
    if accelerator.mixed_precision == "bf16" and not any(isinstance(module, _NormBase) for module in model.modules()):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # Accelerate leaves autocast out under FSDP2. It is what the run has without FSDP.
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
