"""Maps of the parts of an image that speak for a class, by expert: Grad-CAM for residual networks and backbones.

Selvaraju et al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017.

Shapes are written with E experts, c channels and N tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone_ride_bf import FAMILIES
from modeling_ride_bf import RideBfForImageClassification


def expert_maps(model: RideBfForImageClassification, pixel_values: Tensor, label: int) -> list[Tensor | None]:
    """Computes for each expert which parts of an image speak for a class.

    Args:
        model: in evaluation mode.
        pixel_values (1, num_channels, height, width): the image.
        label: the class.

    Returns E maps (height, width) from 0 to 1, the place that speaks most for the class being 1. A map is 0 everywhere
    if no place speaks for it, and None if the router did not run the expert. The maps are of the last stage of a
    network of feature maps, and of the tokens that enter the last block of a transformer: of those that leave it,
    often only the class token counts. Raises ValueError for a backbone whose blocks are not known, if that is so.
    """
    layers = [_last_layer(model, expert) for expert in range(model.config.num_experts)]
    with _recorded(layers) as recorded, torch.enable_grad():
        # a graph, whatever parameters are frozen
        outputs = model(pixel_values.detach().requires_grad_())
    logits = outputs.expert_logits[0, :, label]  # (E,)
    ran = logits.detach().isfinite().tolist()
    maps: list[Tensor | None] = []
    for layer, logit, has_run in zip(layers, logits, ran, strict=True):
        if not has_run:
            maps.append(None)
            continue
        states = recorded[layer]
        (gradient,) = torch.autograd.grad(logit, states, retain_graph=True)
        parts = (_as_map(part.detach(), pixel_values.shape[2:], _prefix_tokens(model)) for part in (states, gradient))
        activations, gradient = parts
        if not gradient.any() and layer is model.ride_bf.trunk:
            raise ValueError(
                f"no map for {layer.family_name}: after its last block only the class token counts, and its blocks are "
                f"not known. Those of {', '.join(FAMILIES)} are"
            )
        weights = gradient.float().mean(dim=(1, 2), keepdim=True)  # (c, 1, 1)
        seen = (weights * activations.float()).sum(dim=0).relu()  # (h, w)
        seen = F.interpolate(seen[None, None], pixel_values.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        maps.append(seen / seen.max().clamp(min=torch.finfo(seen.dtype).tiny))
    return maps


def _last_layer(model: RideBfForImageClassification, expert: int) -> nn.Module:
    """The last stage or block of an expert; of a trunk, if the experts have none of their own."""
    trunk, part = model.ride_bf.trunk, model.ride_bf.experts[expert]
    if model.config.backbone_config is None:
        return part.stages[-1]
    if part.tail is not None:
        return part.family.blocks_of(part.tail)[-1]
    return trunk if trunk.family is None else trunk.family.blocks_of(trunk.backbone)[-1]


def _prefix_tokens(model: RideBfForImageClassification) -> int | None:
    """How many tokens precede those of the patches; None if it is not known."""
    trunk = model.ride_bf.trunk
    family = getattr(trunk, "family", None)
    return None if family is None else family.prefix_tokens(trunk.backbone)


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Records, while it is open, the maps (B, c, h, w) that layers hand on, or the tokens (B, N, c) that enter them."""
    states: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple, options: dict[str, Any], output: Any) -> None:
        result = _first_tensor(output)
        started = inputs[0] if inputs else options["hidden_states"]
        states[layer] = result if result.ndim == 4 or started.ndim != 3 else started

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in dict.fromkeys(layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):  # a tuple or list, whose first entry has the states
        output = output[0]
    return output


def _as_map(states: Tensor, size: Sequence[int], prefix_tokens: int | None) -> Tensor:
    """A map (c, h, w) from (1, c, h, w), or from tokens (1, N, c) of an image of `size` pixels (height, width).

    The grid has the shape of the image. If the number of other tokens is not known, it is the largest such grid.
    """
    if states.ndim == 4:
        return states[0]
    ratio = size[0] / size[1]
    if prefix_tokens is None:
        height, width = int((states.shape[1] * ratio) ** 0.5), int((states.shape[1] / ratio) ** 0.5)
        tokens = states[0, states.shape[1] - height * width :]  # (h w, c)
    else:
        tokens = states[0, prefix_tokens:]  # (h w, c)
        heights = [height for height in range(1, len(tokens) + 1) if len(tokens) % height == 0]
        height = min(heights, key=lambda height: abs(math.log(height * height / len(tokens) / ratio)))
    return tokens.T.unflatten(1, (height, len(tokens) // height))
