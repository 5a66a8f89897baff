"""`NetworkOptions`: the options of `RideBfConfig` for the command line.

Importing `RideBfConfig` takes seconds, so its names, types and defaults are repeated here. A test checks that they are
equal.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from ride_bf.command_line.options import Need, not_with, only_with, option
from ride_bf.methods.losses import options_read

_network = partial(option, group="network")
# Of options that a backbone decides: it has its own network and its own image processor
NO_BACKBONE = Need(
    "no --backbone", ("backbone",), lambda place: place is None, in_help=False, remedy="train without a backbone"
)
_SCALED = Need(
    "--classifier cosine or a loss with margins",
    ("classifier", "loss"),
    lambda classifier, loss: classifier == "cosine" or "margin_scale" in options_read(loss),
)
_residual = partial(option, group="network", needs=(NO_BACKBONE,))
_backbone = partial(option, group="backbone", needs=(only_with("backbone"),))
_batchformer = partial(option, group="BatchFormer", needs=(not_with("batchformer", "none"),))
_router = partial(option, group="router", needs=(only_with("router", True),))


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The options that a recipe's `network` may have, with their defaults."""

    backbone_pooling: Literal["auto", "cls", "mean", "cls_mean", "pooler"] = _backbone(
        "features of the backbone. cls: the class token; mean: the mean over the patches or the map; cls_mean: both; "
        "pooler: the backbone's own pooler; auto: what the classifier of its family takes",
        "auto",
    )
    num_expert_layers: int = _backbone(
        "number of last blocks, or stages, of which each expert has its own copy; 0: all experts share the backbone",
        0,
        must_be="0 or more",
    )
    expert_adapter_size: int = _backbone(
        "inner width of a residual adapter on the features of each expert; 0: no adapter", 0, must_be="0 or more"
    )
    standardise_features: bool = _backbone(
        "standardise the features by their mean and standard deviation over the training images", False
    )
    num_channels: int = 3
    """Not an option of the command line: images are read in three channels."""
    stem_type: Literal["imagenet", "cifar"] = _residual(
        "imagenet: a 7x7 convolution of stride 2 and a max-pool, projection shortcuts; cifar: one 3x3 convolution, "
        "parameter-free shortcuts. The initialisation of the weights follows it",
        "imagenet",
    )
    block_type: Literal["basic", "bottleneck"] = _residual(
        "basic: two 3x3 convolutions; bottleneck: 1x1, 3x3 and 1x1, whose output is four times as wide", "bottleneck"
    )
    depths: list[int] | tuple[int, ...] = _residual(  # noqa: RUF009
        "number of blocks in each stage", (3, 4, 6, 3)
    )
    hidden_sizes: list[int] | tuple[int, ...] = _residual(  # noqa: RUF009
        "base width of each stage; the stem has the first one. The output of a bottleneck stage is four times as wide",
        (64, 128, 192, 384),
    )
    groups: int = _network(
        "groups of a bottleneck's 3x3 convolution; 32 in ResNeXt",
        1,
        needs=(NO_BACKBONE, only_with("block_type", "bottleneck")),
    )
    width_per_group: int = _network(
        "width of one group at a base width of 64; 4 in ResNeXt-50 32x4d, 64 in a ResNet",
        64,
        needs=(NO_BACKBONE, only_with("block_type", "bottleneck")),
    )
    num_experts: int = _network("number of experts on the shared trunk or backbone; 1: an ordinary network", 3)
    num_shared_stages: int = _residual("number of stages that all experts share; the stem is not counted", 2)
    classifier: Literal["linear", "cosine"] = _network(
        "linear, or cosine: cosine_scale times the cosine between feature and class vector", "cosine"
    )
    cosine_scale: float | int = _network(
        "factor of the cosine classifier, and of the loss's margins", 30.0, needs=(_SCALED,)
    )
    batchformer: Literal["none", "insert", "shared_classifier"] = option(
        "layer across the images of a batch, in training only. insert: the classifiers see only its output; "
        "shared_classifier: the same classifiers see the features with and without it",
        "none",
        group="BatchFormer",
    )
    batchformer_num_layers: int = _batchformer("number of encoder layers", 1)
    batchformer_num_heads: int | None = _batchformer(
        "number of attention heads; none: 4 if the feature is wider than 128, else 1", None
    )
    batchformer_dropout: float | int = _batchformer("dropout of the encoder layers", 0.5)
    batchformer_layer_scale_init_value: float | int | None = _batchformer(
        "none: the paper's post-norm layer; a number: a pre-norm layer whose branches are multiplied by learned gates. "
        "The gates start at this number. Not in the paper",
        None,
    )
    router: bool = option(
        "add the expert assignment module, which decides for each image whether the next expert is needed",
        False,
        group="router",
    )
    router_top_k: int = _router("how many of the largest logits a router sees", 30)
    router_hidden_size: int = _router("width to which a router reduces the features", 16)
    router_shared_output: bool = _router("whether all routers share one output layer; otherwise each has its own", True)
    router_threshold: float | int = _router(
        "probability above which an image is sent on to the next expert; 0: always, 1: never", 0.5
    )


NETWORK_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(NetworkOptions)}
# Options of the residual network, which a backbone replaces
RESIDUAL_OPTIONS = ("stem_type", "block_type", "depths", "hidden_sizes", "groups", "width_per_group")
RESIDUAL_OPTIONS += ("num_shared_stages",)
