"""Configuration of the RIDE + BatchFormer image classifier."""

import copy
import json
from functools import lru_cache
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

try:
    from .confidence_ride_bf import Confidence
except ImportError:
    from confidence_ride_bf import Confidence

# Keywords that transformers itself passes to a configuration, though they are not fields of it.
_HUGGING_FACE_KEYWORDS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "torch_dtype",
    "use_return_dict",
}

# What only the residual network reads, and what only a backbone reads.
RESIDUAL_OPTIONS = ("stem_type", "block_type", "depths", "hidden_sizes", "groups", "width_per_group")
RESIDUAL_OPTIONS += ("num_shared_stages",)
BACKBONE_OPTIONS = ("backbone_config", "backbone_pooling", "num_expert_layers", "expert_adapter_size")
BACKBONE_OPTIONS += ("standardise_features",)

# Model type of a backbone -> the features that the family's own classifier takes. DINOv3 has no classifier in
# transformers; its vision transformers take what the authors' linear classifiers take.
OWN_POOLING = {
    "vit": "cls",
    "deit": "cls",
    "dinov2": "cls_mean",
    "dinov2_with_registers": "cls_mean",
    "dinov3_vit": "cls_mean",
    "dinov3_convnext": "pooler",
    "clip_vision_model": "mean",
    "siglip_vision_model": "mean",
    "siglip2_vision_model": "mean",
    "convnext": "pooler",
    "convnextv2": "pooler",
    "swin": "pooler",
    "swinv2": "pooler",
    "resnet": "pooler",
    "timm_wrapper": "pooler",
}


@strict
class RideBfConfig(PreTrainedConfig):
    r"""Describes a multi-expert image classifier (RIDE) with an optional BatchFormer.

    The network is a residual network, or any backbone of transformers with experts on top. The defaults are the
    three-expert ResNet-50 of the ImageNet-LT recipe. Labels are set as in every Hugging Face classifier, with
    `num_labels` or with `id2label` and `label2id`.

    Args:
        backbone_config: the configuration of the backbone, as a `PreTrainedConfig` or a dict with its `model_type`.
            None: the residual network that `stem_type` to `num_shared_stages` describe. With a backbone, these options
            must keep their defaults, and `num_channels` is that of the backbone.
        backbone_pooling: the features of the backbone: `"cls"`, the class token; `"mean"`, the mean over the patches or
            over the map; `"cls_mean"`, both, one after the other; `"pooler"`, the backbone's `pooler_output`. `"auto"`:
            what the family's own classifier takes.
        num_expert_layers: how many of the last blocks each expert has for itself, together with what follows them. In
            a hierarchical backbone it counts stages. 0: the experts share the whole backbone.
        expert_adapter_size: inner width of the residual adapter that each expert has on its pooled features; 0: none.
        num_channels: channels of an input image.
        stem_type: `"imagenet"`: 7x7 convolution of stride 2 and a max-pool, projection shortcuts;
            `"cifar"`: one 3x3 convolution, parameter-free shortcuts. The weight initialisation follows it.
        block_type: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1; four times wider output).
        depths: number of blocks in each stage.
        hidden_sizes: base width of each stage; the stem has the first one. The output of a bottleneck stage is four
            times as wide.
        groups: groups of a bottleneck's 3x3 convolution (32 in ResNeXt).
        width_per_group: width of one group at a base width of 64 (4 in ResNeXt-50 32x4d, 64 in a ResNet).
        standardise_features: subtract a mean from the pooled features and divide them by a standard deviation, both of
            the training images. They are buffers of the network that `RideBfModel.set_feature_statistics` sets.
        num_experts: how many experts follow the shared trunk; 1 is a plain network.
        num_shared_stages: how many stages all experts share; the stem is not counted.
        classifier: `"linear"`, or `"cosine"`: `cosine_scale` times the cosine between feature and class vector.
        cosine_scale: the factor of the cosine classifier.
        batchformer: `"none"`; `"insert"`: while training, the classifiers see only the BatchFormer's output;
            `"shared_classifier"`: while training, the same classifiers see both streams. Never used in evaluation.
        batchformer_num_layers: encoder layers.
        batchformer_num_heads: attention heads; None: 4 if the feature is wider than 128, else 1.
        batchformer_dropout: dropout of the encoder layers.
        batchformer_layer_scale_init_value: None: the paper's post-norm layer; a number: a pre-norm layer whose
            branches are multiplied by learned gates. The gates start at this number. Not in the paper.
        router: adds the expert assignment module, which decides image by image whether the next expert is needed.
        router_top_k: how many of the largest logits a router sees.
        router_hidden_size: width to which a router reduces the features.
        router_shared_output: whether all routers share one output layer; otherwise each has its own.
        router_threshold: probability above which an image is sent on to the next expert; 0: always, 1: never.
        confidence: how to read the logits, as `Confidence.as_dict` describes it; `python -m ride_bf.calibrate` measures
            it. None: the softmax of the logits. The logits do not depend on it.

    Raises `StrictDataclassError` (huggingface_hub) for a value of the wrong type or for values that no network can
    have, and `TypeError` for an unknown option.
    """

    model_type = "ride_bf"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own form)
    # transformers.Trainer leaves these out of its predictions, so that only `logits` remain
    keys_to_ignore_at_inference = [  # noqa: RUF012 (transformers' own form)
        "expert_logits",
        "expert_features",
        "batchformer_expert_logits",
        "router_logits",
        "num_experts_used",
        "hidden_states",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_pooling: Literal["auto", "cls", "mean", "cls_mean", "pooler"] = "auto"
    num_expert_layers: int = 0
    expert_adapter_size: int = 0
    standardise_features: bool = False
    num_channels: int = 3
    stem_type: Literal["imagenet", "cifar"] = "imagenet"
    block_type: Literal["basic", "bottleneck"] = "bottleneck"
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 192, 384)
    groups: int = 1
    width_per_group: int = 64
    num_experts: int = 3
    num_shared_stages: int = 2
    classifier: Literal["linear", "cosine"] = "cosine"
    cosine_scale: float | int = 30.0
    batchformer: Literal["none", "insert", "shared_classifier"] = "none"
    batchformer_num_layers: int = 1
    batchformer_num_heads: int | None = None
    batchformer_dropout: float | int = 0.5
    batchformer_layer_scale_init_value: float | int | None = None
    router: bool = False
    router_top_k: int = 30
    router_hidden_size: int = 16
    router_shared_output: bool = True
    router_threshold: float | int = 0.5
    confidence: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        unknown = sorted(key for key in kwargs if key not in _HUGGING_FACE_KEYWORDS and not key.startswith("_"))
        # A file names the version that wrote it. A later version may have written keys that this one does not know.
        # In a call, an unknown key is a misspelt option.
        if unknown and self.transformers_version is None:
            raise TypeError(
                f"unknown options {unknown} for RideBfConfig; its options are {sorted(RideBfConfig.__annotations__)} "
                "and those of every PreTrainedConfig, such as num_labels and id2label"
            )
        self.depths = list(self.depths)
        self.hidden_sizes = list(self.hidden_sizes)
        if self.backbone_config is not None:
            self.backbone_config = _backbone_config(self.backbone_config)
            self.num_channels = getattr(self.backbone_config, "num_channels", self.num_channels)
        # save_pretrained records only the class of the saved object. With the whole map, a saved classifier can be
        # loaded as AutoModel too.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_ride_bf.RideBfConfig",
                "AutoModel": "modeling_ride_bf.RideBfModel",
                "AutoModelForImageClassification": "modeling_ride_bf.RideBfForImageClassification",
            },
        )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The options as a dict, without those that the network does not read."""
        unread = BACKBONE_OPTIONS if self.backbone_config is None else RESIDUAL_OPTIONS
        options = {name: value for name, value in super().to_dict().items() if name not in unread}
        if self.confidence is None:
            options.pop("confidence", None)
        if self.backbone_config is not None:
            # as transformers does for its own: it may be a folder of the machine that trained
            options["backbone_config"].pop("_name_or_path", None)
        return options

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """The pipeline of calibrated scores, for `transformers.pipeline`; empty without `confidence`."""
        if self.confidence is None:
            return {}
        own = {"impl": "modeling_ride_bf.RideBfImageClassificationPipeline", "pt": ["AutoModelForImageClassification"]}
        return {"image-classification": own}

    @property
    def expansion(self) -> int:
        """How many times wider a stage's output is than its base width."""
        return 4 if self.block_type == "bottleneck" else 1

    @property
    def feature_size(self) -> int:
        """Size D of an expert's pooled features."""
        if self.backbone_config is not None:
            return _backbone_feature_size(self.backbone_config, self.pooling)
        return self.hidden_sizes[-1] * self.expansion

    @property
    def pooling(self) -> str:
        """`backbone_pooling`, or for `"auto"` what the family's own classifier takes.

        It stays `"auto"` for a family that is not in `OWN_POOLING`: `pooler_output` if there is one, else the mean.
        """
        if self.backbone_config is None or self.backbone_pooling != "auto":
            return self.backbone_pooling
        return OWN_POOLING.get(self.backbone_config.model_type, "auto")

    @property
    def num_batchformer_heads(self) -> int:
        """Number of attention heads; the paper's choice if the option is None."""
        if self.batchformer_num_heads is not None:
            return self.batchformer_num_heads
        return 4 if self.feature_size > 128 else 1

    def validate_network(self):
        """`@strict` calls this when the configuration is made and when it is saved."""
        if self.backbone_config is None:
            self._check_stages()
        self._check_backbone()
        self._check_experts()
        self._check_batchformer()
        self._check_router()
        Confidence.from_dict(self.confidence, self.num_labels)

    def _check_stages(self):
        if len(self.depths) == 0 or len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"depths {self.depths} and hidden_sizes {self.hidden_sizes} must both have one entry for each stage"
            )
        if min(self.depths) < 1 or min(self.hidden_sizes) < 1:
            raise ValueError(f"depths {self.depths} and hidden_sizes {self.hidden_sizes} must all be 1 or more")
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be 1 or more, not {self.num_channels}")
        if self.groups < 1 or self.width_per_group < 1:
            raise ValueError(
                f"groups ({self.groups}) and width_per_group ({self.width_per_group}) must both be 1 or more"
            )
        if self.block_type == "basic" and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                f"groups {self.groups} and width_per_group {self.width_per_group} need block_type 'bottleneck'"
            )
        if min(self.hidden_sizes) * self.width_per_group < 64:
            raise ValueError(
                f"width_per_group {self.width_per_group} leaves no channel in a group at a base width of "
                f"{min(self.hidden_sizes)}; it is the width at a base width of 64"
            )
        widths = [self.hidden_sizes[0]] + [size * self.expansion for size in self.hidden_sizes]
        if self.stem_type == "cifar" and widths != sorted(widths):
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} must not decrease with stem_type 'cifar', "
                "whose shortcuts can only add channels; use stem_type 'imagenet'"
            )

        if not 0 <= self.num_shared_stages < len(self.depths):
            raise ValueError(
                f"num_shared_stages must be 0 to {len(self.depths) - 1}, so that each expert keeps a stage of "
                f"its own, not {self.num_shared_stages}"
            )

    def _check_backbone(self):
        if self.backbone_config is None:
            unread, why = BACKBONE_OPTIONS, "is read only with a backbone_config"
        else:
            unread, why = RESIDUAL_OPTIONS, "describes the residual network, which backbone_config replaces"
        for name in unread:
            value, default = getattr(self, name), getattr(type(self), name)
            if value != (list(default) if isinstance(default, tuple) else default):
                raise ValueError(f"{name} {value!r} {why}; leave it at {default!r}")
        for name in ("num_expert_layers", "expert_adapter_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")

    def _check_experts(self):
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be 1 or more, not {self.num_experts}")
        if self.cosine_scale <= 0:
            raise ValueError(f"cosine_scale must be positive, not {self.cosine_scale}")
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be 1 or more, not {self.num_labels}")

    def _check_batchformer(self):
        if self.batchformer_num_layers < 1:
            raise ValueError(
                f"batchformer_num_layers must be 1 or more, not {self.batchformer_num_layers}; "
                "for a network without it use batchformer='none'"
            )
        if not 0 <= self.batchformer_dropout < 1:
            raise ValueError(f"batchformer_dropout must be in [0, 1), not {self.batchformer_dropout}")
        if self.batchformer == "none":
            return
        if self.num_batchformer_heads < 1 or self.feature_size % self.num_batchformer_heads:
            raise ValueError(
                f"batchformer_num_heads must divide the feature size {self.feature_size}; "
                f"{self.num_batchformer_heads} does not"
            )

    def _check_router(self):
        if not self.router:
            return
        if self.num_experts < 2:
            raise ValueError("router=True needs num_experts of 2 or more: there is nothing to choose from")
        if self.backbone_config is not None and self.num_expert_layers == 0:
            raise ValueError(
                "router=True needs num_expert_layers of 1 or more, not 0: experts that share the whole backbone cost "
                "next to nothing, so leaving one out saves nothing"
            )
        if not 1 <= self.router_top_k <= self.num_labels:
            raise ValueError(f"router_top_k must be 1 to num_labels = {self.num_labels}, not {self.router_top_k}")
        if not 0 <= self.router_threshold <= 1:
            raise ValueError(f"router_threshold must be 0 to 1, not {self.router_threshold}")
        if self.router_hidden_size < 1:
            raise ValueError(f"router_hidden_size must be 1 or more, not {self.router_hidden_size}")


def _backbone_config(given: dict | PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of its own for the network, which sets the type of the weights and the attention in it."""
    model_type = given.get("model_type") if isinstance(given, dict) else given.model_type
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"backbone_config has the model_type {model_type!r}, which this version of transformers does not know; "
            "pass the configuration of one of its vision models, such as 'vit', 'dinov2' or 'convnext'"
        )
    config = copy.deepcopy(given)
    if isinstance(config, dict):
        config = CONFIG_MAPPING[model_type].from_dict(config)
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PreTrainedConfig):
        raise ValueError(
            f"backbone_config is of a {config.model_type} model, which reads images and text; pass its vision tower: "
            f"backbone_config=config.vision_config, a {vision.model_type}"
        )
    return config


def _backbone_feature_size(config: PreTrainedConfig, pooling: str) -> int:
    """Size D of the backbone's pooled features."""
    if config.model_type not in OWN_POOLING or config.model_type == "timm_wrapper":
        return _measured_feature_size(json.dumps(config.to_dict(), sort_keys=True, default=str), pooling)
    if pooling == "pooler" and getattr(config, "pooler_output_size", None):
        return config.pooler_output_size
    sizes = getattr(config, "hidden_sizes", None)
    width = config.hidden_size if sizes is None else sizes[-1]
    return 2 * width if pooling == "cls_mean" else width


@lru_cache
def _measured_feature_size(backbone_config: str, pooling: str) -> int:
    """The same, measured on meta tensors: not every configuration says how wide its features are."""
    import torch
    from transformers import AutoModel

    config = _backbone_config(json.loads(backbone_config))
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config).eval()
        timm_model = getattr(model, "timm_model", None)
        size = getattr(config, "image_size", None) or 224
        if timm_model is not None:
            patches = getattr(timm_model, "patch_embed", None)
            size = getattr(patches, "img_size", None) or timm_model.default_cfg["input_size"][-2:]
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        outputs = model(torch.empty(1, getattr(config, "num_channels", 3), height, width))
    pooled = getattr(outputs, "pooler_output", None)
    if pooling in ("pooler", "auto") and pooled is not None:
        return pooled.flatten(1).shape[1]
    states = outputs.last_hidden_state  # tokens (1, N, D) or a map (1, D, h, w)
    width = states.shape[1 if states.ndim == 4 else 2]
    return 2 * width if pooling == "cls_mean" else width


RideBfConfig.register_for_auto_class()

__all__ = ["BACKBONE_OPTIONS", "OWN_POOLING", "RESIDUAL_OPTIONS", "RideBfConfig"]
