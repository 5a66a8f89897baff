"""The weights of a network that the processes share under FSDP2, and their average. Only such a run imports this."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.training.blocks import blocks
from ride_bf.training.ema import WeightAverage
from ride_bf.training.lora import merged


class SharedWeights(WeightAverage):
    """The weights of a network that the processes share, and their average, of which each process has its share too.

    Every process must call its methods. LoRA is merged only in what is saved: to rounding, the network that is
    evaluated is the same.

    Args:
        accelerator: the accelerator of the run.
        model: the network, which is still whole. It is made ready to be shared.
        decay: of the average; 0: no average.
    """

    def __init__(self, accelerator: Accelerator, model: RideBfForImageClassification, decay: float):
        weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self._without_weights = copy.deepcopy(model, weights)
        self.accelerator = accelerator
        _prepare_to_share(accelerator, model)
        super().__init__(model, decay)
        self._shared: list[FSDPModule] = []
        if self.averaged is not None:
            self.averaged.multi_avg_fn = _of_own_shares(self.averaged.multi_avg_fn)
            fsdp2_prepare_model(accelerator, self.averaged.module.requires_grad_(False))
            self._shared = [module for module in self.averaged.modules() if isinstance(module, FSDPModule)]

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.averaged is None else self.averaged.module

    def whole(self, network: nn.Module) -> nn.Module:
        """The network put together on the CPU of the main process. The others get one without weights."""
        state = self.accelerator.get_state_dict(network)
        whole = copy.deepcopy(self._without_weights)
        if self.accelerator.is_main_process:
            whole.load_state_dict(state, assign=True)
        return merged(whole)

    def update(self) -> None:
        for module in self._shared:  # an evaluation leaves weights gathered
            module.reshard()
        super().update()

    def state_dict(self) -> dict[str, Any]:
        """The whole average, on the CPU of the main process, so that any number of processes can load it."""
        if self.averaged is None:
            return {}
        average = self.accelerator.get_state_dict(self.averaged.module)
        return {"average": average, "n_averaged": self.averaged.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.averaged is None:
            return
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.averaged.module, state["average"], options=options)
        self.averaged.n_averaged.copy_(state["n_averaged"])


def _of_own_shares(average: Callable[..., None]) -> Callable[..., None]:
    """Makes a function of two lists of tensors act on the share that this process has of each of them."""

    @torch.no_grad()  # so that `to_local` gives the share itself
    def of_own(averaged: Sequence[Tensor], current: Sequence[Tensor], number: Tensor | int) -> None:
        own = ([t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in (averaged, current))
        average(*own, number)

    return of_own


def _prepare_to_share(accelerator: Accelerator, model: RideBfForImageClassification) -> None:
    """Makes each block of the network a unit that is gathered on its own, unless the launcher has named the layers.

    In mixed precision, weights are gathered in that precision, and gradients are averaged in float32. Only a network
    with BatchNorm is gathered in float32: PyTorch's needs scales and running statistics of one type.
    """
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
