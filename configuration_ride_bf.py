"""Configuration of the RIDE + BatchFormer image classifier."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

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


@strict
class RideBfConfig(PreTrainedConfig):
    r"""Describes a multi-expert residual network (RIDE) with an optional BatchFormer.

    The defaults are the three-expert ResNet-50 of the ImageNet-LT recipe. Labels are set as in every
    Hugging Face classifier, with `num_labels` or with `id2label` and `label2id`.

    Args:
        num_channels: channels of an input image.
        stem_type: `"imagenet"`: 7x7 convolution of stride 2 and a max-pool, projection shortcuts;
            `"cifar"`: one 3x3 convolution, parameter-free shortcuts. The weight initialisation follows it.
        block_type: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1; four times wider output).
        depths: number of blocks in each stage.
        hidden_sizes: base width of each stage; the stem has the first one. The output of a bottleneck stage is four
            times as wide.
        groups: groups of a bottleneck's 3x3 convolution (32 in ResNeXt).
        width_per_group: width of one group at a base width of 64 (4 in ResNeXt-50 32x4d, 64 in a ResNet).
        num_experts: how many experts follow the shared trunk; 1 is a plain ResNet.
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

    Raises `StrictDataclassError` (huggingface_hub) for a value of the wrong type or for values that no network can
    have, and `TypeError` for an unknown option.
    """

    model_type = "ride_bf"
    # transformers.Trainer leaves these out of its predictions, so that only `logits` remain
    keys_to_ignore_at_inference = [  # noqa: RUF012 (transformers' own form)
        "expert_logits",
        "expert_features",
        "batchformer_expert_logits",
        "router_logits",
        "num_experts_used",
        "hidden_states",
    ]

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

    @property
    def expansion(self) -> int:
        """How many times wider a stage's output is than its base width."""
        return 4 if self.block_type == "bottleneck" else 1

    @property
    def feature_size(self) -> int:
        """Size D of an expert's pooled features."""
        return self.hidden_sizes[-1] * self.expansion

    @property
    def num_batchformer_heads(self) -> int:
        """Number of attention heads; the paper's choice if the option is None."""
        if self.batchformer_num_heads is not None:
            return self.batchformer_num_heads
        return 4 if self.feature_size > 128 else 1

    def validate_network(self):
        """`@strict` calls this when the configuration is made and when it is saved."""
        self._check_stages()
        self._check_experts()
        self._check_batchformer()
        self._check_router()

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

    def _check_experts(self):
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be 1 or more, not {self.num_experts}")
        if not 0 <= self.num_shared_stages < len(self.depths):
            raise ValueError(
                f"num_shared_stages must be 0 to {len(self.depths) - 1}, so that each expert keeps a stage of "
                f"its own, not {self.num_shared_stages}"
            )
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
        if not 1 <= self.router_top_k <= self.num_labels:
            raise ValueError(f"router_top_k must be 1 to num_labels = {self.num_labels}, not {self.router_top_k}")
        if not 0 <= self.router_threshold <= 1:
            raise ValueError(f"router_threshold must be 0 to 1, not {self.router_threshold}")
        if self.router_hidden_size < 1:
            raise ValueError(f"router_hidden_size must be 1 or more, not {self.router_hidden_size}")


RideBfConfig.register_for_auto_class()

__all__ = ["RideBfConfig"]
