"""Any vision model of transformers as a backbone: a trunk that runs once, and the parts that each expert owns.

`FAMILIES` says how each family of backbones is taken apart. A backbone of another family is shared as a whole.

Shapes are written with B images, N tokens, c channels and D features.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

try:
    from .configuration_ride_bf import RideBfConfig
except ImportError:
    from configuration_ride_bf import RideBfConfig


# --- How a family computes its features -------------------------------------------------------------------------------


def _get(module: nn.Module, names: str) -> Any:
    """The part of `module` with this dotted name; None if there is none."""
    for name in names.split("."):
        module = getattr(module, name, None)
    return module


def _in_turn(layers: Iterable[nn.Module | None], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = hidden if layer is None else layer(hidden)
    return hidden


def _plain_step(model: nn.Module, block: nn.Module, hidden: Tensor, **context: Any) -> Tensor:
    return block(hidden, **context)


def _step_without_mask(model: nn.Module, block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden, None)  # these blocks insist on an attention mask


def _swin_step(model: nn.Module, stage: nn.Module, hidden: Tensor) -> Tensor:
    """A stage from map (B, c, h, w) to map, because the shape of tokens (B, h w, c) does not hold their height."""
    size = tuple(hidden.shape[2:])
    tokens = stage(hidden.flatten(2).transpose(1, 2), size)[0]  # (B, c, h, w) -> (B, h w, c)
    if stage.downsample is not None:
        size = tuple((length + 1) // 2 for length in size)
    return tokens.transpose(1, 2).unflatten(2, size)  # (B, h w, c) -> (B, c, h, w)


def _embed_clip(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    return model.pre_layrnorm(model.embeddings(pixel_values, **options)), {}


def _embed_dinov3(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    # While training, the position embeddings are drawn anew in each call. Trunk and experts must see the same ones.
    return model.embeddings(pixel_values), {"position_embeddings": model.rope_embeddings(pixel_values)}


def _embed_siglip2(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    # Its model takes patches of images of many sizes in one batch, each with a mask. All of ours have one size.
    embeddings = model.embeddings
    size = embeddings.patch_size
    height, width = pixel_values.shape[2] // size, pixel_values.shape[3] // size
    patches = pixel_values.unflatten(3, (width, size)).unflatten(2, (height, size))  # (B, c, h, p, w, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h w, p p c)
    positions, grid = embeddings.position_embedding.weight, embeddings.position_embedding_size  # (N, c)
    if (height, width) != (grid, grid):
        maps = positions.float().T.unflatten(1, (1, grid, grid)).transpose(0, 1)  # (N, c) -> (1, c, grid, grid)
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False, antialias=True)
        positions = maps[0].flatten(1).T.to(positions.dtype)  # (1, c, h, w) -> (h w, c)
    return embeddings.patch_embedding(patches) + positions, {}


def _embed_swin(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    tokens, size = model.embeddings(pixel_values, **options)
    return tokens.transpose(1, 2).unflatten(2, size), {}  # (B, h w, c) -> (B, c, h, w)


def _embed_timm_vit(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    timm_model = model.timm_model
    tokens = timm_model._pos_embed(timm_model.patch_embed(pixel_values))
    return timm_model.norm_pre(timm_model.patch_drop(tokens)), {}


def _embed_with(*names: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The first layers of a backbone, one after the other. The first one takes the options."""

    def embed(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        first, *rest = (_get(model, name) for name in names)
        return _in_turn(rest, first(pixel_values, **options)), {}

    return embed


def _nothing_first(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    return pixel_values, {}


def _finish_with(*names: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The layers after the blocks, one after the other."""
    return lambda model, hidden: _in_turn([_get(model, name) for name in names], hidden)


def _finish_dinov3_convnext(model: nn.Module, hidden: Tensor) -> Tensor:
    tokens = torch.cat([model.pool(hidden).flatten(2), hidden.flatten(2)], dim=2)  # (B, c, 1 + h w)
    return model.layer_norm(tokens.transpose(1, 2))


def _finish_swin(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.layernorm(hidden.flatten(2).transpose(1, 2))  # (B, c, h, w) -> (B, h w, c)


@dataclass(frozen=True)
class Family:
    """How a family of backbones is taken apart. All names are dotted names of parts of its model.

    Attributes:
        blocks: the list of the blocks, or of the stages. Several names, if there is no list.
        first: what comes before the blocks; the experts do not have it.
        last: what comes after the blocks; a trunk whose experts have blocks of their own does not have it.
        pooler_only: the part of `last` that only `pooler_output` needs.
        embed: (model, pixel_values, **options) -> the hidden state before the blocks, and what all blocks take too.
        step: (model, one of its blocks, hidden state, **what all blocks take) -> hidden state.
        finish: (model, hidden state after the blocks) -> `last_hidden_state`.
        pooler: (model, `last_hidden_state`) -> `pooler_output`, or None.
        prefix_tokens: (model) -> how many tokens precede those of the patches. The first one is the class token.
        whole_patches: its model takes patches, not images, so that `embed` makes them.
    """

    blocks: str | tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]
    embed: Callable[..., tuple[Tensor, dict[str, Any]]]
    step: Callable[..., Tensor]
    finish: Callable[[nn.Module, Tensor], Tensor]
    pooler: Callable[[nn.Module, Tensor], Tensor | None] = lambda model, states: states[:, 0]
    pooler_only: tuple[str, ...] = ()
    prefix_tokens: Callable[[nn.Module], int] = lambda model: 0
    whole_patches: bool = False

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that a model, or a part of one, has."""
        several = isinstance(self.blocks, tuple)
        blocks = [_get(model, name) for name in self.blocks] if several else _get(model, self.blocks)
        return [block for block in blocks if block is not None]


_VIT = Family(
    blocks="layers",
    first=("embeddings",),
    last=("layernorm", "pooler"),
    pooler_only=("pooler",),
    embed=_embed_with("embeddings"),
    step=_plain_step,
    finish=_finish_with("layernorm"),
    pooler=lambda model, states: model.pooler(states),
    prefix_tokens=lambda model: 1,
)
_DINOV2 = Family(
    blocks="encoder.layer",
    first=("embeddings",),
    last=("layernorm",),
    embed=_embed_with("embeddings"),
    step=_plain_step,
    finish=_finish_with("layernorm"),
    prefix_tokens=lambda model: 1 + getattr(model.config, "num_register_tokens", 0),
)
_SIGLIP = Family(
    blocks="encoder.layers",
    first=("embeddings",),
    last=("post_layernorm", "head"),
    pooler_only=("head",),
    embed=_embed_with("embeddings"),
    step=_step_without_mask,
    finish=_finish_with("post_layernorm"),
    pooler=lambda model, states: None if _get(model, "head") is None else model.head(states),
)
_CONVNEXT = Family(
    blocks="encoder.stages",
    first=("embeddings",),
    last=("layernorm",),
    pooler_only=("layernorm",),
    embed=_embed_with("embeddings"),
    step=_plain_step,
    finish=_finish_with(),
    pooler=lambda model, states: model.layernorm(states.mean(dim=(2, 3))),
)
_SWIN = Family(
    blocks="encoder.layers",
    first=("embeddings",),
    last=("layernorm", "pooler"),
    embed=_embed_swin,
    step=_swin_step,
    finish=_finish_swin,
    pooler=lambda model, states: model.pooler(states.transpose(1, 2)),
)


def _timm(
    blocks: str | tuple[str, ...],
    first: tuple[str, ...],
    last: tuple[str, ...],
    head: tuple[str, ...],
    embed: Callable[..., tuple[Tensor, dict[str, Any]]] | None = None,
    parameters: tuple[str, ...] = (),
    prefix_tokens: Callable[[nn.Module], int] = lambda model: 0,
) -> Family:
    """A family of timm, by the names in its own model.

    `parameters` come before the blocks too, and `head` is what its own `forward_head` uses.
    """

    def own(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"timm_model.{name}" for name in names)

    return Family(
        blocks=own(blocks) if isinstance(blocks, tuple) else f"timm_model.{blocks}",
        first=own(first + parameters),
        last=own(last + head),
        embed=embed or _embed_with(*own(first)),
        step=_plain_step,
        finish=_finish_with(*own(last)),
        pooler=lambda model, states: model.timm_model.forward_head(states),
        prefix_tokens=prefix_tokens,
    )


# Model type of a backbone, for timm's with the class of its network -> how it is taken apart.
FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "deit": Family(**{**vars(_VIT), "prefix_tokens": lambda model: 2}),  # the second one is for distillation
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": Family(
        **{
            **vars(_DINOV2),
            "blocks": "model.layer",
            "first": ("embeddings", "rope_embeddings"),
            "last": ("norm",),
            "embed": _embed_dinov3,
            "finish": _finish_with("norm"),
        }
    ),
    "dinov3_convnext": Family(
        blocks="model.stages",
        first=(),
        last=("layer_norm",),
        embed=_nothing_first,
        step=_plain_step,
        finish=_finish_dinov3_convnext,
        prefix_tokens=lambda model: 1,
    ),
    "clip_vision_model": Family(
        **{
            **vars(_SIGLIP),
            "first": ("embeddings", "pre_layrnorm"),
            "last": ("post_layernorm",),
            "pooler_only": ("post_layernorm",),
            "embed": _embed_clip,
            "finish": _finish_with(),
            "pooler": lambda model, states: model.post_layernorm(states[:, 0]),
            "prefix_tokens": lambda model: 1,
        }
    ),
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": Family(**{**vars(_SIGLIP), "embed": _embed_siglip2, "whole_patches": True}),
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "resnet": Family(
        blocks="encoder.stages",
        first=("embedder",),
        last=("pooler",),
        embed=_embed_with("embedder"),
        step=_plain_step,
        finish=_finish_with(),
        pooler=lambda model, states: model.pooler(states),
    ),
    "timm_wrapper VisionTransformer": _timm(
        blocks="blocks",
        first=("patch_embed", "patch_drop", "norm_pre"),
        last=("norm",),
        head=("attn_pool", "fc_norm", "head_drop", "head"),
        embed=_embed_timm_vit,
        parameters=("cls_token", "reg_token", "pos_embed"),
        prefix_tokens=lambda model: model.timm_model.num_prefix_tokens,
    ),
    "timm_wrapper ResNet": _timm(
        blocks=("layer1", "layer2", "layer3", "layer4"),
        first=("conv1", "bn1", "act1", "maxpool"),
        last=(),
        head=("global_pool", "fc"),
    ),
    "timm_wrapper ConvNeXt": _timm(blocks="stages", first=("stem",), last=("norm_pre",), head=("head",)),
    "timm_wrapper EfficientNet": _timm(
        blocks="blocks", first=("conv_stem", "bn1"), last=("conv_head", "bn2"), head=("global_pool", "classifier")
    ),
}


def family_name(backbone: PreTrainedModel) -> str:
    """The key that the backbone has, or would have, in `FAMILIES`."""
    timm_model = getattr(backbone, "timm_model", None)
    name = backbone.config.model_type
    return name if timm_model is None else f"{name} {type(timm_model).__name__}"


# --- Taking a backbone apart ------------------------------------------------------------------------------------------


class RideBfSkipped(nn.Module):
    """Stands where a part was that nothing needs. Returns its first argument."""

    def forward(self, hidden: Tensor, *arguments: Any) -> Tensor:
        return hidden


def take_apart(backbone: PreTrainedModel, config: RideBfConfig) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Returns copies of the part that all experts share, and of the part that each expert has for itself.

    Both are models of the backbone's class that miss the other one's parts. So the family's own initialisation, names
    of saved weights and attention hold for them. Without own blocks (`num_expert_layers` 0) the first one is the whole
    backbone, and the second one None. The backbone stays as it is.

    Raises ValueError for blocks that the backbone does not have, and for a family that is not in `FAMILIES`.
    """
    own = config.num_expert_layers
    name = family_name(backbone)
    family = FAMILIES.get(name)
    if own == 0:
        trunk, tail = _copy_without(backbone, []), None
        _remove_what_never_learns(trunk, family, config.pooling)
        return trunk, tail
    if family is None:
        raise ValueError(
            f"num_expert_layers {own} needs the blocks of the backbone, and those of {name} are not known; "
            f"use num_expert_layers=0, or one of {', '.join(FAMILIES)}"
        )
    blocks = family.blocks_of(backbone)
    if own > len(blocks):
        raise ValueError(f"num_expert_layers must be 0 to {len(blocks)}, the blocks of this {name}, not {own}")
    shared = len(blocks) - own
    trunk = _copy_without(backbone, [*blocks[shared:], *(_get(backbone, part) for part in family.last)])
    tail = _copy_without(backbone, [*blocks[:shared], *(_get(backbone, part) for part in family.first)])
    for part, kept in ((trunk, slice(0, shared)), (tail, slice(shared, None))):
        if isinstance(family.blocks, str):
            _keep_blocks(part, family.blocks, kept)
    _remove_what_never_learns(trunk, None, config.pooling)
    _remove_what_never_learns(tail, family, config.pooling)
    return trunk, tail


def _copy_without(backbone: PreTrainedModel, parts: Iterable[nn.Module | nn.Parameter | None]) -> PreTrainedModel:
    """A copy in which these parts are None, without copying them. Both have the same configuration."""
    memo: dict[int, Any] = {id(part): None for part in parts if part is not None}
    return copy.deepcopy(backbone, memo | {id(backbone.config): backbone.config})


def _keep_blocks(model: PreTrainedModel, names: str, kept: slice) -> None:
    """Shortens the list of this name to a range of its blocks."""
    blocks = _get(model, names)
    rest = list(blocks._modules.values())[kept]
    parent, _, name = names.rpartition(".")
    setattr(
        _get(model, parent) if parent else model,
        name,
        nn.Sequential(*rest) if isinstance(blocks, nn.Sequential) else nn.ModuleList(rest),
    )


def _remove_what_never_learns(backbone: PreTrainedModel, family: Family | None, pooling: str) -> None:
    """Removes parameters without influence on the features. Distributed training would wait for their gradients."""
    for module in backbone.modules():
        token = module._parameters.get("mask_token")
        if token is not None:
            # No image is masked. A buffer stays, because the family's own initialisation looks for the token.
            del module.mask_token
            module.register_buffer("mask_token", token.detach(), persistent=False)
    if family is not None and pooling != "pooler":
        for name in family.pooler_only:
            if _get(backbone, name) is not None:
                setattr(backbone, name, RideBfSkipped())


@contextmanager
def _running_statistics_kept(module: nn.Module):
    """Batch normalisation uses the statistics of the batch, and its running statistics stay as they are."""
    # Copies are updated in their place. That holds for every kind of batch normalisation.
    kept = [
        (norm, name, buffer)
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        for name, buffer in norm._buffers.items()
        if buffer is not None
    ]
    for norm, name, buffer in kept:
        norm._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer


def checkpoint_once(
    block: nn.Module, checkpoint_function: Callable[..., Any], function: Callable[..., Any], *inputs: Any
) -> Any:
    """Checkpoints `function`, the forward of `block`. Only its first call updates the running statistics.

    The calls after the first are recomputations for the backward pass. They must not count the batch again.
    """
    called = False

    def counted_once(*inputs: Any) -> Any:
        nonlocal called
        if called:
            with _running_statistics_kept(block):
                return function(*inputs)
        called = True
        return function(*inputs)

    return checkpoint_function(counted_once, *inputs)


# --- The network's parts ----------------------------------------------------------------------------------------------


def _pool(states: Tensor, pooler_output: Tensor | None, pooling: str, prefix_tokens: int) -> Tensor:
    """Pools `last_hidden_state`, tokens (B, N, D) or a map (B, D, h, w), to (B, D), or to (B, 2 D) of "cls_mean"."""
    if pooling == "pooler" or (pooling == "auto" and pooler_output is not None):
        if pooler_output is None:
            raise ValueError("backbone_pooling 'pooler' needs a pooler_output, this backbone has none; use 'mean'")
        return pooler_output.flatten(1)  # (B, D, 1, 1) in a ResNet
    if pooling == "cls":
        return states[:, 0]
    mean = states.mean(dim=(2, 3)) if states.ndim == 4 else states[:, prefix_tokens:].mean(dim=1)
    return torch.cat([states[:, 0], mean], dim=1) if pooling == "cls_mean" else mean


# What transformers gathers from the children of a model, and so from the trunk, but not from a model further inside.
_OF_A_NESTED_MODEL = (
    *("_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules"),
    *("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"),
)


class _RunsBlocks(nn.Module):
    """Runs the blocks of a part of a backbone. Layers of transformers checkpoint themselves, blocks of timm do not."""

    def __init__(self, part: PreTrainedModel | None):
        super().__init__()
        self.family_name = None if part is None else family_name(part)
        if self.family is not None and hasattr(part, "timm_model"):
            self.gradient_checkpointing = False  # transformers sets it, and the function, where it finds it

    @property
    def family(self) -> Family | None:
        # Not an attribute: a network can be pickled, functions of the table cannot.
        return FAMILIES.get(self.family_name)

    @property
    def checkpoints(self) -> bool:
        return getattr(self, "gradient_checkpointing", False) and self.training and torch.is_grad_enabled()

    def run_blocks(self, part: PreTrainedModel, hidden: Tensor, context: dict[str, Any]) -> Iterator[Tensor]:
        """Yields the state after each block."""
        for block in self.family.blocks_of(part):
            step = partial(self.family.step, part, block, **context)
            if self.checkpoints:
                hidden = checkpoint_once(block, self._gradient_checkpointing_func, step, hidden)
            else:
                hidden = step(hidden)
            yield hidden

    def features(self, part: PreTrainedModel, hidden: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
        """Returns `last_hidden_state` and the pooled features, from the state after the last block."""
        states = self.family.finish(part, hidden)
        pooler_output = self.family.pooler(part, states) if pooling == "pooler" else None
        return states, _pool(states, pooler_output, pooling, self.family.prefix_tokens(part))


class RideBfBackboneTrunk(_RunsBlocks):
    """The part of the backbone that all experts share.

    `forward` returns the states, the last of which the experts start from, and what their blocks take beside it. If
    the experts have blocks of their own, this is the state before them. If not, it is the pooled features (B, D), and
    before it comes the backbone's `last_hidden_state`, tokens (B, N, c) or a map (B, c, h, w).

    Raises ValueError for a pooling that the family does not have, and `forward` for images of a size that it cannot
    take.
    """

    def __init__(self, backbone: PreTrainedModel, config: RideBfConfig):
        super().__init__(backbone)
        self.backbone = backbone
        self.pooling = config.pooling
        self.whole = config.num_expert_layers == 0
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
        for name in _OF_A_NESTED_MODEL:
            setattr(self, name, getattr(backbone, name, None))
        if self.pooling in ("cls", "cls_mean") and (self.family is None or self.family.prefix_tokens(backbone) < 1):
            raise ValueError(
                f"backbone_pooling {self.pooling!r} needs a class token, and {self.family_name} is not known to have "
                "one; use 'auto', 'mean' or 'pooler'"
            )

    @property
    def has_own_switch(self) -> bool:
        """Whether gradient checkpointing is switched on in the network of timm itself."""
        return hasattr(self.backbone, "timm_model") and self.family is None

    def forward(self, pixel_values: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        if self.whole and pixel_values.ndim == 2:  # the pooled features of images, computed before
            return [pixel_values], {}
        inputs = self._inputs(pixel_values)
        backbone, family = self.backbone, self.family
        if self.whole and not self.checkpoints and not (family is not None and family.whole_patches):
            outputs = backbone(**inputs, return_dict=True)
            states, pooler_output = outputs.last_hidden_state, getattr(outputs, "pooler_output", None)
            prefix_tokens = 0 if family is None else family.prefix_tokens(backbone)
            return [states, _pool(states, pooler_output, self.pooling, prefix_tokens)], {}
        hidden, context = family.embed(backbone, **inputs)
        for state in self.run_blocks(backbone, hidden, context):
            hidden = state  # the states before it are not kept
        return ([*self.features(backbone, hidden, self.pooling)], {}) if self.whole else ([hidden], context)

    def _inputs(self, pixel_values: Tensor) -> dict[str, Any]:
        """The arguments of the backbone for images (B, num_channels, height, width)."""
        config = self.backbone.config
        height, width = pixel_values.shape[2:]
        patch_height, patch_width = _pair(getattr(config, "patch_size", None) or 1)
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than a patch of the backbone, {patch_height} x "
                f"{patch_width}; pass larger ones"
            )
        if self.family is not None and self.family.whole_patches and (height % patch_height or width % patch_width):
            raise ValueError(
                f"images of {height} x {width} pixels do not consist of patches of {patch_height} x {patch_width}; "
                "resize them to multiples of it"
            )
        patches = _get(self.backbone, "timm_model.patch_embed")
        if getattr(patches, "strict_img_size", False) and (height, width) != _pair(patches.img_size):
            raise ValueError(
                f"images of {height} x {width} pixels, but {config.architecture} takes "
                f"{' x '.join(map(str, _pair(patches.img_size)))}; resize them, or give its configuration "
                f"model_args={{'img_size': [{height}, {width}]}} or {{'dynamic_img_size': True}}"
            )
        if not self.interpolates:
            return {"pixel_values": pixel_values}
        other_size = (height, width) != _pair(getattr(config, "image_size", (height, width)))
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": other_size}


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


class RideBfZeroLinear(nn.Linear):
    """A linear layer whose weights and bias start at 0."""


class RideBfAdapter(nn.Module):
    """Residual adapter on features (B, D). It starts as the identity, so the experts start from the same features."""

    def __init__(self, feature_size: int, inner_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.down = nn.Linear(feature_size, inner_size)
        self.up = RideBfZeroLinear(inner_size, feature_size)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.up(F.gelu(self.down(self.norm(features))))


class RideBfStandardise(nn.Module):
    """Standardises features (B, D) by the statistics of the training images, which are not learned."""

    def __init__(self, feature_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("std", torch.ones(feature_size))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class RideBfBackboneExpert(_RunsBlocks):
    """One expert: its own blocks and what follows them, if it has any, and its adapter.

    Takes the trunk's last state and what it gave beside it. Returns features (B, D) and the states after its blocks.
    """

    def __init__(self, tail: PreTrainedModel | None, config: RideBfConfig):
        super().__init__(tail)
        self.tail = tail
        self.pooling = config.pooling
        self.standardise = RideBfStandardise(config.feature_size) if config.standardise_features else nn.Identity()
        size = config.expert_adapter_size
        self.adapter = RideBfAdapter(config.feature_size, size) if size else None

    def forward(self, hidden: Tensor, **context: Any) -> tuple[Tensor, list[Tensor]]:
        features, hidden_states = hidden, []
        if self.tail is not None and not torch.compiler.is_compiling() and not len(hidden):
            # A router sends no image on. Many blocks of transformers cannot reshape a batch of none.
            features, hidden_states = self(hidden.new_zeros(1, *hidden.shape[1:]), **context)
            return features[:0], [state[:0] for state in hidden_states]
        if self.tail is not None:
            hidden_states = list(self.run_blocks(self.tail, hidden, context))
            _, features = self.features(self.tail, hidden_states[-1], self.pooling)
        features = self.standardise(features)
        return (features if self.adapter is None else self.adapter(features)), hidden_states


def build_backbone(config: RideBfConfig) -> tuple[RideBfBackboneTrunk, nn.ModuleList]:
    """Makes the trunk and the experts. All experts start equal."""
    backbone = AutoModel.from_config(config.backbone_config)
    if backbone.main_input_name != "pixel_values":
        raise ValueError(
            f"the backbone {family_name(backbone)} reads {backbone.main_input_name}, not images; choose a vision model "
            "such as 'vit', 'dinov2' or 'convnext'"
        )
    trunk, tail = take_apart(backbone, config)
    tails = [None if tail is None else _copy_without(tail, []) for _ in range(config.num_experts)]
    experts = nn.ModuleList(RideBfBackboneExpert(tail, config) for tail in tails)
    return RideBfBackboneTrunk(trunk, config), experts


def copy_backbone_weights(
    trunk: RideBfBackboneTrunk, experts: Iterable[RideBfBackboneExpert], backbone: PreTrainedModel, config: RideBfConfig
) -> None:
    """Copies the weights of a whole backbone into the trunk and into the own blocks of every expert.

    Raises ValueError if it is not the backbone that the configuration describes.
    """
    shared, own = take_apart(backbone, config)
    pairs = [(trunk.backbone, shared)] + [(expert.tail, own) for expert in experts if own is not None]
    for part, source in pairs:
        if type(part) is not type(source):
            raise ValueError(
                f"the backbone is a {type(source).__name__}, but backbone_config describes a {type(part).__name__}; "
                "build the configuration with backbone_config=backbone.config"
            )
        wanted, given = part.state_dict(), source.state_dict()
        wrong = [
            name
            for name in wanted.keys() | given.keys()
            if name not in wanted or name not in given or wanted[name].shape != given[name].shape
        ]
        if wrong:
            raise ValueError(
                f"the backbone is another {family_name(backbone)} than backbone_config describes: {len(wrong)} weights "
                f"differ, such as {min(wrong)}; build the configuration with backbone_config=backbone.config"
            )
        part.load_state_dict(given)


def check_gradient_checkpointing(trunk: RideBfBackboneTrunk) -> None:
    """Raises ValueError if the backbone has no gradient checkpointing, or none that changes nothing else."""
    backbone = trunk.backbone
    if not backbone.supports_gradient_checkpointing:
        raise ValueError(f"the backbone {family_name(backbone)} has no gradient checkpointing; use smaller batches")
    if trunk.has_own_switch and batch_norm_names(backbone):
        raise ValueError(
            f"gradient checkpointing would count each batch twice in the batch normalisation of {family_name(backbone)}"
            "; use smaller batches with gradient accumulation"
        )


def batch_norm_names(module: nn.Module) -> list[str]:
    """Names of the batch normalisations, whose statistics lose too much in half precision."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


__all__ = [
    "FAMILIES",
    "Family",
    "RideBfAdapter",
    "RideBfBackboneExpert",
    "RideBfBackboneTrunk",
    "RideBfStandardise",
    "RideBfZeroLinear",
    "batch_norm_names",
    "build_backbone",
    "check_gradient_checkpointing",
    "checkpoint_once",
    "copy_backbone_weights",
    "family_name",
    "take_apart",
]
