"""RIDE (several experts on a shared trunk) with BatchFormer (attention across the images of a batch).

RIDE: Wang, Lian, Miao, Liu, Yu: Long-tailed Recognition by Routing Diverse Distribution-Aware Experts, ICLR 2021.
BatchFormer: Hou, Yu, Tao: BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning,
CVPR 2022.

Shapes are written with B images, E experts, C classes and D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, ImageClassificationPipeline, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, ModelOutput
from transformers.utils.generic import can_return_tuple

try:
    from .backbone_ride_bf import (
        RideBfBackboneTrunk,
        RideBfStandardise,
        RideBfZeroLinear,
        batch_norm_names,
        build_backbone,
        check_gradient_checkpointing,
        checkpoint_once,
        copy_backbone_weights,
    )
    from .confidence_ride_bf import Confidence
    from .configuration_ride_bf import RideBfConfig
    from .page_ride_bf import keep_page
except ImportError:
    from backbone_ride_bf import (
        RideBfBackboneTrunk,
        RideBfStandardise,
        RideBfZeroLinear,
        batch_norm_names,
        build_backbone,
        check_gradient_checkpointing,
        checkpoint_once,
        copy_backbone_weights,
    )
    from confidence_ride_bf import Confidence
    from configuration_ride_bf import RideBfConfig
    from page_ride_bf import keep_page


@dataclass
class RideBfOutput(ModelOutput):
    """What the networks return; a field that does not apply is None.

    Attributes:
        loss: cross-entropy of `logits`, a scalar, if labels were given.
        logits (B, C): mean of `expert_logits` over the experts that ran.
        expert_logits (B, E, C): the logits of each expert; NaN for an expert that the router did not run. While an
            "insert" BatchFormer trains, they are computed from its output.
        expert_features (B, E, D): pooled features, always before the BatchFormer; NaN as in `expert_logits`.
        batchformer_expert_logits (B, E, C): logits of the BatchFormer's stream, while a "shared_classifier"
            BatchFormer trains.
        router_logits (B, E - 1): the larger, the more likely the next expert is needed; None without a router, NaN
            where the router did not decide.
        num_experts_used (B,): how many experts ran, if there is a router.
        hidden_states: with `output_hidden_states`, the feature maps: (B, c, h, w) for the stem and each shared stage,
            then (B, E, c, h, w) for each stage of the experts. With a backbone: the states that the trunk hands on, see
            `RideBfBackboneTrunk`, then (B, E, ...) for each block that the experts have for themselves.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    expert_logits: Tensor | None = None
    expert_features: Tensor | None = None
    batchformer_expert_logits: Tensor | None = None
    router_logits: Tensor | None = None
    num_experts_used: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RideBfConvLayer(nn.Module):
    """Convolution without bias, batch normalisation and, unless `activation=False`, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride=1, groups=1, activation: bool = True
    ):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.activation(self.bn(self.convolution(hidden_state)))


class RideBfZeroPadShortcut(nn.Module):
    """Parameter-free shortcut: keeps every `stride`-th pixel and pads channels of zeros, half of them on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.channels_before = (out_channels - in_channels) // 2
        self.channels_after = out_channels - in_channels - self.channels_before

    def forward(self, hidden_state: Tensor) -> Tensor:
        hidden_state = hidden_state[:, :, :: self.stride, :: self.stride]
        return F.pad(hidden_state, (0, 0, 0, 0, self.channels_before, self.channels_after))


class RideBfBlock(GradientCheckpointingLayer):
    """One residual block, basic or bottleneck; the stride sits in its first 3x3 convolution."""

    def __init__(self, config: RideBfConfig, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = width * config.expansion
        if config.block_type == "basic":
            self.layers = nn.Sequential(
                RideBfConvLayer(in_channels, width, 3, stride),
                RideBfConvLayer(width, out_channels, 3, activation=False),
            )
        else:
            inner = width * config.width_per_group // 64 * config.groups
            self.layers = nn.Sequential(
                RideBfConvLayer(in_channels, inner, 1),
                RideBfConvLayer(inner, inner, 3, stride, config.groups),
                RideBfConvLayer(inner, out_channels, 1, activation=False),
            )
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif config.stem_type == "cifar":
            self.shortcut = RideBfZeroPadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = RideBfConvLayer(in_channels, out_channels, 1, stride, activation=False)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        # transformers sets this function and calls it. A property binds it to the block that runs: a replica of
        # nn.DataParallel has running statistics of its own.
        return partial(checkpoint_once, self, self._checkpoint_function)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        self._checkpoint_function = function

    def forward(self, hidden_state: Tensor) -> Tensor:
        # In place, like every ReLU of the network: nothing else needs the output of a batch normalisation.
        return self.layers(hidden_state).add_(self.shortcut(hidden_state)).relu_()


class RideBfStage(nn.Sequential):
    """Stage `index` of the network, shared or an expert's own; every stage but the first halves the resolution."""

    def __init__(self, config: RideBfConfig, index: int):
        width = config.hidden_sizes[index]
        out_channels = width * config.expansion
        in_channels = config.hidden_sizes[0] if index == 0 else config.hidden_sizes[index - 1] * config.expansion
        first = RideBfBlock(config, in_channels, width, stride=1 if index == 0 else 2)
        rest = (RideBfBlock(config, out_channels, width, stride=1) for _ in range(config.depths[index] - 1))
        super().__init__(first, *rest)


class RideBfStem(nn.Sequential):
    """`"imagenet"`: 7x7 convolution and max-pool, resolution / 4; `"cifar"`: 3x3 convolution, resolution kept."""

    def __init__(self, config: RideBfConfig):
        width = config.hidden_sizes[0]
        if config.stem_type == "imagenet":
            super().__init__(
                RideBfConvLayer(config.num_channels, width, 7, stride=2),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        else:
            super().__init__(RideBfConvLayer(config.num_channels, width, 3))


class RideBfTrunk(nn.Module):
    """Stem and shared stages. Returns every intermediate map; the experts start from the last one.

    The second value it returns is what a backbone's experts take beside a map. There is nothing of the kind here.
    """

    def __init__(self, config: RideBfConfig):
        super().__init__()
        self.stem = RideBfStem(config)
        self.stages = nn.ModuleList(RideBfStage(config, index) for index in range(config.num_shared_stages))

    def forward(self, pixel_values: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        hidden_states = [self.stem(pixel_values)]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        return hidden_states, {}


class RideBfExpert(nn.Module):
    """One expert's own stages and global pooling. Returns its features (B, D) and its intermediate maps."""

    def __init__(self, config: RideBfConfig):
        super().__init__()
        own_stages = range(config.num_shared_stages, len(config.depths))
        self.stages = nn.ModuleList(RideBfStage(config, index) for index in own_stages)

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden_states = []
        for stage in self.stages:
            hidden_state = stage(hidden_state)
            hidden_states.append(hidden_state)
        return hidden_state.mean(dim=(2, 3)), hidden_states  # (B, D, h, w) -> (B, D)


def _unit_length(vectors: Tensor) -> Tensor:
    """Scales the rows of (N, D) to length 1. In float32: the epsilon that prevents NaN is 0 in half precision."""
    return F.normalize(vectors.float(), dim=1).to(vectors.dtype)


class RideBfCosineClassifier(nn.Module):
    """`scale` times the cosine between a feature and each class's weight vector."""

    def __init__(self, feature_size: int, num_labels: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, feature_size))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        products = F.linear(_unit_length(features), self.weight)  # (B, C)
        # Divides the products, not the weights, by their lengths: with many classes the weights are far larger.
        lengths = torch.linalg.vector_norm(self.weight.float(), dim=1).clamp_min(1e-12)
        return (products * (self.scale / lengths)).to(products.dtype)


class RideBfGatedEncoderLayer(nn.Module):
    """Pre-norm encoder layer whose branches are multiplied by learned gates, one for each channel.

    If the gates start at 0, the layer starts as the identity. The gates are the LayerScale of Touvron et al.:
    Going deeper with Image Transformers, 2021. Not part of the BatchFormer paper.
    """

    def __init__(self, feature_size: int, num_heads: int, dropout: float, gate_init_value: float):
        super().__init__()
        gate_init_value = float(gate_init_value)  # torch.full makes integers of an int
        self.gate_init_value = gate_init_value
        self.norm1 = nn.LayerNorm(feature_size)
        self.self_attn = nn.MultiheadAttention(feature_size, num_heads, dropout=dropout)
        self.attention_gate = nn.Parameter(torch.full((feature_size,), gate_init_value))
        self.norm2 = nn.LayerNorm(feature_size)
        self.linear1 = nn.Linear(feature_size, feature_size)
        self.linear2 = nn.Linear(feature_size, feature_size)
        self.feedforward_gate = nn.Parameter(torch.full((feature_size,), gate_init_value))
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor) -> Tensor:
        normed = self.norm1(sequence)
        attended, _ = self.self_attn(normed, normed, normed, need_weights=False)
        sequence = sequence + self.attention_gate * self.dropout(attended)
        expanded = self.dropout(F.relu(self.linear1(self.norm2(sequence))))
        return sequence + self.feedforward_gate * self.dropout(self.linear2(expanded))


def _batch_is_window(expert_features: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Lets all images of the batch attend to each other."""
    return encode(expert_features)  # (B, E, D) read as (sequence, columns, D): the images are the sequence


class RideBfBatchFormer(nn.Module):
    """Encoder whose sequence is the batch: every image attends to every other one, expert by expert.

    There is no positional encoding, so a permutation of the images permutes the output. One encoder serves all
    experts. Another module can take the place of this one (`RideBfForImageClassification._batch_module`). It has the
    same two methods: `forward(expert_features)` and `set_windows(windows)`.

    Args:
        feature_size: D.
        num_heads: attention heads.
        num_layers: encoder layers.
        dropout: of the encoder layers.
        layer_scale_init_value: None: the paper's post-norm layers; a number: gated layers whose gates start at it.
    """

    def __init__(
        self,
        feature_size: int,
        num_heads: int,
        num_layers: int = 1,
        dropout: float = 0.5,
        layer_scale_init_value: float | None = None,
    ):
        super().__init__()
        if layer_scale_init_value is None:
            layers = (
                nn.TransformerEncoderLayer(feature_size, num_heads, dim_feedforward=feature_size, dropout=dropout)
                for _ in range(num_layers)
            )
        else:
            layers = (
                RideBfGatedEncoderLayer(feature_size, num_heads, dropout, layer_scale_init_value)
                for _ in range(num_layers)
            )
        self.layers = nn.ModuleList(layers)
        self.windows = _batch_is_window

    @classmethod
    def from_config(cls, config: RideBfConfig) -> "RideBfBatchFormer":
        return cls(
            feature_size=config.feature_size,
            num_heads=config.num_batchformer_heads,
            num_layers=config.batchformer_num_layers,
            dropout=float(config.batchformer_dropout),
            layer_scale_init_value=config.batchformer_layer_scale_init_value,
        )

    def forward(self, expert_features: Tensor) -> Tensor:
        return self.windows(expert_features, self.encode)  # (B, E, D)

    def set_windows(self, windows: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        """Sets which images attend to each other; at first, those of the batch.

        `windows(expert_features, encode)` maps (B, E, D) to the same shape. It calls `encode` on sequences of images.
        """
        self.windows = windows

    def encode(self, sequences: Tensor) -> Tensor:
        """Encodes a batch of sequences (length, number, D) to the same shape; attention stays within a sequence."""
        for layer in self.layers:
            sequences = layer(sequences)
        return sequences


class RideBfRouter(nn.Module):
    """Expert assignment: decides after each expert whether the image needs the next one. RIDE, section 3.3."""

    def __init__(self, config: RideBfConfig):
        super().__init__()
        num_decisions = config.num_experts - 1
        self.top_k = config.router_top_k
        self.hidden_layers = nn.ModuleList(
            nn.Linear(config.feature_size, config.router_hidden_size) for _ in range(num_decisions)
        )
        self.output_layers = nn.ModuleList(
            nn.Linear(config.router_top_k + config.router_hidden_size, 1)
            for _ in range(1 if config.router_shared_output else num_decisions)
        )

    def forward(self, expert_index: int, features: Tensor, mean_logits: Tensor) -> Tensor:
        """Returns a logit (B,): how likely it is that expert `expert_index + 1` is needed.

        `features` (B, D) are those of expert `expert_index`. `mean_logits` (B, C) is the mean over this expert and all
        experts before it.
        """
        hidden = F.relu(self.hidden_layers[expert_index](_unit_length(features)))
        top_logits = mean_logits.topk(self.top_k, dim=1).values  # (B, k), in descending order
        output_layer = self.output_layers[expert_index % len(self.output_layers)]
        return output_layer(torch.cat([top_logits, hidden], dim=1)).squeeze(1)  # (B, 1) -> (B,)


class RideBfPreTrainedModel(PreTrainedModel):
    config_class = RideBfConfig
    base_model_prefix = "ride_bf"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Whether a backbone has them, it checks itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["RideBfBlock"]  # noqa: RUF012 (transformers' own form)
    # Statistics of batch normalisation lose too much in half precision.
    _keep_in_fp32_modules_strict = ["bn"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors' initialisation. transformers calls this for each module, children first."""
        cifar = self.config.stem_type == "cifar"
        if isinstance(module, nn.Conv2d):
            if cifar:
                init.kaiming_normal_(module.weight)
            else:
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels  # groups left aside
                init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        elif isinstance(module, RideBfZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if cifar:
                init.kaiming_normal_(module.weight)
            else:
                init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, RideBfCosineClassifier):
            init.uniform_(module.weight, -1.0, 1.0)
            init.copy_(module.weight, F.normalize(module.weight.float(), dim=1))
        elif isinstance(module, RideBfGatedEncoderLayer):
            init.constant_(module.attention_gate, module.gate_init_value)
            init.constant_(module.feedforward_gate, module.gate_init_value)
        elif isinstance(module, RideBfStandardise):
            init.zeros_(module.mean)
            init.ones_(module.std)

    def get_input_embeddings(self) -> None:
        """There are none: a backbone's belong to its trunk. Without this, transformers raises NotImplementedError."""

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """transformers calls this to switch it on or off."""
        if self.config.backbone_config is None:
            super()._set_gradient_checkpointing(enable, **options)
            return
        if enable:
            check_gradient_checkpointing(self.base_model.trunk)
        for part in self.modules():  # the networks of timm whose blocks are not known have a switch of their own
            if isinstance(part, RideBfBackboneTrunk) and part.has_own_switch:
                part.backbone.timm_model.set_grad_checkpointing(enable)
                return
        super()._set_gradient_checkpointing(enable, **options)

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, config: RideBfConfig) -> "RideBfPreTrainedModel":
        """Makes a network whose trunk and experts have the weights of a backbone. Everything else is new.

        Args:
            backbone: what `AutoModel.from_pretrained` gives. Every expert starts with its own copy of the last
                `config.num_expert_layers` blocks.
            config: has the configuration of this backbone as its `backbone_config`.

        Raises ValueError if it is not the backbone that the configuration describes.
        """
        if config.backbone_config is None:
            raise ValueError("the configuration describes a residual network; set backbone_config=backbone.config")
        model = cls(config)
        copy_backbone_weights(model.base_model.trunk, model.base_model.experts, backbone, config)
        return model

    def _checked_pixel_values(self, pixel_values: Tensor | None) -> Tensor:
        """Returns the pixel values in the type that the network computes in."""
        channels = self.config.num_channels
        expected = f"pixel_values must be a float tensor (batch, {channels}, height, width), as image processors make"
        if pixel_values is None:
            raise ValueError(
                f"{expected}; got none. transformers.Trainer drops the columns that a transform or a collator reads; "
                "set TrainingArguments(remove_unused_columns=False) to keep them"
            )
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"{expected}; got {type(pixel_values).__name__}")
        pooled = getattr(self.base_model.trunk, "whole", False) and pixel_values.ndim == 2  # features, see RideBfModel
        if not pooled and (pixel_values.ndim != 4 or pixel_values.shape[1] != channels or 0 in pixel_values.shape):
            raise ValueError(f"{expected}; got shape {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise TypeError(f"{expected}; got {pixel_values.dtype}")
        # Not `self.dtype`, which looks through the parameters: a replica of nn.DataParallel has none.
        layers = (module for module in self.base_model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        dtype = next(layers).weight.dtype
        if pixel_values.dtype == dtype or torch.is_autocast_enabled(pixel_values.device.type):
            return pixel_values
        if pixel_values.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
            return pixel_values.to(dtype)  # image processors make float32, whatever the model is
        raise TypeError(
            f"pixel_values are {pixel_values.dtype}, the model is {dtype}: "
            "pass pixel_values.to(model.dtype), or run under torch.autocast"
        )

    def _check_labels(self, labels: Tensor, batch_size: int):
        expected = f"labels must be integers 0 to {self.config.num_labels - 1} of shape ({batch_size},)"
        if not isinstance(labels, Tensor):
            raise TypeError(f"{expected}, torch.int64; got {type(labels).__name__}")
        if labels.dtype != torch.long or tuple(labels.shape) != (batch_size,):
            raise ValueError(f"{expected}, torch.int64; got {labels.dtype} of shape {tuple(labels.shape)}")
        if not torch.compiler.is_compiling():
            outside = labels[(labels < 0) | (labels >= self.config.num_labels)]
            if outside.numel():
                raise ValueError(f"{expected}; got {outside.unique().tolist()[:5]}")


class RideBfModel(RideBfPreTrainedModel):
    """The trunk and the experts, without classifiers."""

    # a classifier's checkpoint also holds these
    _keys_to_ignore_on_load_unexpected = [r"^batchformer\.", r"^classifiers\.", r"^router\."]  # noqa: RUF012

    def __init__(self, config: RideBfConfig):
        super().__init__(config)
        if config.backbone_config is None:
            self.trunk = RideBfTrunk(config)
            self.experts = nn.ModuleList(RideBfExpert(config) for _ in range(config.num_experts))
        else:
            self.trunk, self.experts = build_backbone(config)
            self._keep_in_fp32_modules_strict = batch_norm_names(self)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor | None = None, output_hidden_states: bool | None = None) -> RideBfOutput:
        """Computes the features of every expert.

        Args:
            pixel_values (B, num_channels, height, width): float, of any size. A 16-bit model takes float32 too. If the
                experts share a whole backbone, these may also be its pooled features (B, D), computed before by
                `pooled_features`.
            output_hidden_states: return the intermediate maps too.

        Returns `RideBfOutput` with `expert_features` and, if asked for, `hidden_states`. Raises `ValueError` or
        `TypeError` for pixel values of another shape or type.
        """
        trunk_states, context = self.trunk(self._checked_pixel_values(pixel_values))
        features, expert_states = zip(*(expert(trunk_states[-1], **context) for expert in self.experts), strict=True)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = None
        if output_hidden_states:
            hidden_states = (*trunk_states, *(torch.stack(maps, 1) for maps in zip(*expert_states, strict=True)))
        return RideBfOutput(expert_features=torch.stack(features, dim=1), hidden_states=hidden_states)

    def pooled_features(self, pixel_values: Tensor) -> Tensor:
        """Pooled features (B, D) of the backbone that the experts share, before they are standardised.

        Raises ValueError for a network whose experts have layers of their own.
        """
        if not getattr(self.trunk, "whole", False):
            raise ValueError("the experts have layers of their own, so there are no features that all of them share")
        trunk_states, _ = self.trunk(self._checked_pixel_values(pixel_values))
        return trunk_states[-1]

    def set_feature_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the mean and the standard deviation (D,) of `standardise_features`, for every expert.

        Raises ValueError for a network that does not standardise, and for a standard deviation that is not positive.
        """
        if not self.config.standardise_features:
            raise ValueError("the network does not standardise its features; set standardise_features=True")
        if not (std > 0).all():
            raise ValueError("the standard deviation of a feature must be positive; set constant features to 1")
        for expert in self.experts:
            expert.standardise.mean.copy_(mean)
            expert.standardise.std.copy_(std)


class RideBfForImageClassification(RideBfPreTrainedModel):
    """Multi-expert image classifier: the mean of the experts' logits."""

    # `from_pretrained(folder, batchformer="none")` leaves these out
    _keys_to_ignore_on_load_unexpected = [r"^batchformer\."]  # noqa: RUF012
    keeps_page = True  # whether a save keeps the card of the repository that the network was loaded from

    def __init__(self, config: RideBfConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ride_bf = RideBfModel(config)
        # Under this name in every checkpoint, whatever module it is.
        self.batchformer = None if config.batchformer == "none" else self._batch_module(config)
        self.classifiers = nn.ModuleList(self._classifier(config) for _ in range(config.num_experts))
        self.router = RideBfRouter(config) if config.router else None
        self.post_init()

    @property
    def confidence(self) -> Confidence:
        """How to read the logits: `model.confidence.probabilities(outputs.logits)` are calibrated, if the model is."""
        return Confidence.from_dict(self.config.confidence, self.num_labels)

    @property
    def batch_module(self) -> nn.Module | None:
        """The module across the images of a batch, which runs in training only; None without one."""
        return self.batchformer

    def _batch_module(self, config: RideBfConfig) -> nn.Module:
        """Makes the module across the images of a batch. A subclass overrides this to put another in its place.

        The module needs `forward(expert_features)`, (B, E, D) -> (B, E, D). For windows other than the batch, it also
        needs `set_windows(windows)`. See `RideBfBatchFormer`.
        """
        return RideBfBatchFormer.from_config(config)

    @staticmethod
    def _classifier(config: RideBfConfig) -> nn.Module:
        if config.classifier == "cosine":
            return RideBfCosineClassifier(config.feature_size, config.num_labels, float(config.cosine_scale))
        return nn.Linear(config.feature_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> RideBfOutput:
        """Classifies images.

        In evaluation the BatchFormer is left out, so a result does not depend on the other images of the batch. With
        a router, each expert then runs only on the images that need it.

        Args:
            pixel_values (B, num_channels, height, width): float, of any size. A 16-bit model takes float32 too.
            labels (B,): int64 class indices.
            output_hidden_states: return the intermediate maps too.

        Returns `RideBfOutput`. Its `loss` is the plain cross-entropy of `logits`, the validation loss. Train with the
        losses of the `ride_bf` package instead: the stream of a "shared_classifier" BatchFormer does not enter
        `logits`, so this `loss` gives it no gradient.

        Raises `ValueError` or `TypeError` for pixel values or labels of another shape, type or range.
        """
        routed = self.router is not None and not self.training
        outputs = (self._forward_routed if routed else self._forward_all)(pixel_values, output_hidden_states)
        if labels is None:
            return outputs
        self._check_labels(labels, batch_size=pixel_values.shape[0])
        return RideBfOutput(**{**outputs, "loss": F.cross_entropy(outputs.logits.float(), labels)})

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True, *arguments: Any, **options: Any
    ) -> None:
        """Saves the network as transformers does, with the page of the repository that it was loaded from."""
        super().save_pretrained(save_directory, is_main_process, *arguments, **options)
        if self.keeps_page and is_main_process:
            keep_page(self, save_directory)

    def _upload_modified_files(self, working_dir: str | PathLike, repo_id: str, *arguments: Any, **options: Any) -> Any:
        """transformers calls this at the end of a push, when it has put a card of its own in place of ours."""
        if self.keeps_page:
            keep_page(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *arguments, **options)

    def _forward_all(self, pixel_values: Tensor, output_hidden_states: bool | None) -> RideBfOutput:
        """Runs every expert on every image."""
        base = self.ride_bf(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        features = base.expert_features
        batchformer_expert_logits = None
        if self.batch_module is None or not self.training:
            expert_logits = self._classify(features)
        elif self.config.batchformer == "insert":
            expert_logits = self._classify(self.batch_module(features))
        else:
            expert_logits = self._classify(features)
            batchformer_expert_logits = self._classify(self.batch_module(features))
        router_logits = num_experts_used = None
        if self.router is not None:
            counts = torch.arange(1, self.config.num_experts + 1, device=features.device)
            running_mean = expert_logits.cumsum(dim=1) / counts[:, None]  # (B, E, C)
            decisions = [
                self.router(index, features[:, index], running_mean[:, index])
                for index in range(self.config.num_experts - 1)
            ]
            router_logits = torch.stack(decisions, dim=1)
            num_experts_used = counts[-1].expand(features.shape[0])
        return RideBfOutput(
            logits=expert_logits.mean(dim=1),
            expert_logits=expert_logits,
            expert_features=features,
            batchformer_expert_logits=batchformer_expert_logits,
            router_logits=router_logits,
            num_experts_used=num_experts_used,
            hidden_states=base.hidden_states,
        )

    def _classify(self, expert_features: Tensor) -> Tensor:
        """(B, E, D) -> (B, E, C); each expert has its own classifier."""
        pairs = zip(self.classifiers, expert_features.unbind(dim=1), strict=True)
        return torch.stack([classifier(features) for classifier, features in pairs], dim=1)

    def _forward_routed(self, pixel_values: Tensor, output_hidden_states: bool | None) -> RideBfOutput:
        """Runs the experts one after the other, each only on the images that the router sent to it."""
        pixel_values = self._checked_pixel_values(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        batch_size, num_experts = pixel_values.shape[0], self.config.num_experts
        trunk_states, context = self.ride_bf.trunk(pixel_values)
        rows = torch.arange(batch_size, device=pixel_values.device)  # the images that still need an expert
        threshold = torch.logit(torch.tensor(float(self.config.router_threshold))).item()
        sum_logits = num_experts_used = None
        columns: dict[str, list[Tensor]] = {"logits": [], "features": [], "router": []}
        state_columns: list[list[Tensor]] = []

        def column(values: Tensor) -> Tensor:
            """The computed rows in a batch whose other rows are NaN."""
            return values.new_full((batch_size, *values.shape[1:]), torch.nan).index_copy(0, rows, values)

        for index, (expert, classifier) in enumerate(zip(self.ride_bf.experts, self.classifiers, strict=True)):
            features, states = expert(trunk_states[-1][rows], **context)
            logits = classifier(features)
            if index == 0:
                sum_logits = torch.zeros_like(logits)
                num_experts_used = torch.zeros_like(rows)
            sum_logits = sum_logits.index_add(0, rows, logits)
            num_experts_used = num_experts_used.index_add(0, rows, torch.ones_like(rows))
            columns["logits"].append(column(logits))
            columns["features"].append(column(features))
            state_columns.append([column(state) for state in states] if output_hidden_states else [])
            if index < num_experts - 1:
                decision = self.router(index, features, sum_logits[rows] / (index + 1))
                columns["router"].append(column(decision))
                rows = rows[decision > threshold]
        hidden_states = None
        if output_hidden_states:
            hidden_states = (*trunk_states, *(torch.stack(maps, 1) for maps in zip(*state_columns, strict=True)))
        return RideBfOutput(
            logits=sum_logits / num_experts_used[:, None],
            expert_logits=torch.stack(columns["logits"], dim=1),
            expert_features=torch.stack(columns["features"], dim=1),
            router_logits=torch.stack(columns["router"], dim=1),
            num_experts_used=num_experts_used,
            hidden_states=hidden_states,
        )


class RideBfImageClassificationPipeline(ImageClassificationPipeline):
    """The image-classification pipeline of a calibrated model: its scores are calibrated probabilities.

    `pipeline("image-classification", model=FOLDER_OR_ID, trust_remote_code=True)` finds it in the configuration.
    """

    def postprocess(self, model_outputs, function_to_apply=None, top_k=5):
        """Returns dicts of `score` and `label`, best first. A `function_to_apply` is applied to the logits as usual."""
        if function_to_apply is None:
            confidence = Confidence.from_dict(self.model.config.confidence, self.model.config.num_labels)
            model_outputs = {"logits": confidence.calibrated_logits(model_outputs["logits"])}
        return super().postprocess(model_outputs, function_to_apply, top_k)


RideBfModel.register_for_auto_class("AutoModel")
RideBfForImageClassification.register_for_auto_class("AutoModelForImageClassification")

# The auto classes build a network from an imported `RideBfConfig`, and pipelines take it. AutoConfig does not know it:
# a folder is loaded with its own code, which may differ. So the code of a folder does not register itself either.
if __name__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
    AutoModel.register(RideBfConfig, RideBfModel, exist_ok=True)
    AutoModelForImageClassification.register(RideBfConfig, RideBfForImageClassification, exist_ok=True)

__all__ = [
    "RideBfForImageClassification",
    "RideBfImageClassificationPipeline",
    "RideBfModel",
    "RideBfOutput",
    "RideBfPreTrainedModel",
]
