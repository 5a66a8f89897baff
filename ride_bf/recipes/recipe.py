"""`TrainingRecipe`: the settings that a result depends on."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from data.augmentations import AUGMENTATIONS, AUTO_AUGMENT
from data.sets import DATA_SETS
from ride_bf.command_line.options import Need, check_values, not_with, only_with, option, shown
from ride_bf.methods.losses import loss_names, losses_that_read, options_read
from ride_bf.methods.samplers import INSTANCE, SAMPLERS
from ride_bf.recipes.network_options import NETWORK_DEFAULTS, NO_BACKBONE, RESIDUAL_OPTIONS, NetworkOptions

if TYPE_CHECKING:
    from configuration_ride_bf import RideBfConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Options of earlier versions and their fixed values now. A recipe with other values can no longer be run.
_FORMER_OPTIONS = {"diversity_temperature": 1.0, "distillation_loss_factor": 1.0, "router_positive_weight": 100.0}

_SEVERAL_EXPERTS = Need("--num_experts 2 or more", ("num_experts",), lambda number: number > 1)
_TRAINED_BY_LOSS = not_with("train_only", "router", in_help=False)

_PRETRAINED = Need(
    "--backbone or --init_from", ("backbone", "init_from"), lambda place, model: (place or model) is not None
)
_BACKBONE_LEARNS = (
    Need("--train_only all or lora", ("train_only",), lambda part: part in ("all", "lora")),
    _PRETRAINED,
)

_image = partial(option, group="images")
_optimisation = partial(option, group="optimisation")
_sampling = partial(option, group="sampling")
_lora = partial(option, group="backbone", needs=(only_with("train_only", "lora"),))
_distillation = partial(option, group="distillation", needs=(only_with("teacher"),))


def _within_epochs(name: str) -> Need:
    """The need of an option that names epochs: the run must reach all of them."""
    return Need(
        "--epochs above that",
        (name, "epochs"),
        lambda named, epochs: max(named if isinstance(named, tuple) else (named,)) < epochs,
        in_help=False,
    )


def _loss(name: str, help: str, default: Any, *, needs: tuple[Need, ...] = (), **facts: Any) -> Any:
    """An option that some losses read."""
    readers = Need(
        lambda: f"a loss that reads it, --loss {' or '.join(losses_that_read(name))}",
        ("loss",),
        lambda loss: name in options_read(loss),
        in_help=False,  # finding the losses needs torch
    )
    return option(help, default, group="loss", needs=(_TRAINED_BY_LOSS, readers, *needs), **facts)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON has the annotated type. A whole number is also a float."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, member) for member in members)
    if origin is Literal:
        return value in members
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(item, members[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else origin or hint)


def _in_words(hint: Any) -> str:
    """An annotation in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, members))
    if origin is Literal:
        return f"one of {', '.join(members)}"
    if origin is tuple:
        return f"a list, each item {_in_words(members[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, "an object with the options of the network")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The settings of a training run, except its seed, the place of its data and its hardware.

    Raises ValueError, which names the value, for a combination that cannot be trained.
    """

    name: str
    description: str = field(repr=False)
    """Source, published result and cost."""

    dataset: str = option("name of the data set", group="data", kind="data set", choices=lambda: DATA_SETS)
    network: dict[str, Any] = field()
    """Options of `RideBfConfig`."""

    backbone: str | None = option(
        "Hub id or folder of a pre-trained vision model to start from, instead of a residual network. It may be one of "
        "transformers, or timm/... with the timm package",
        None,
        group="backbone",
        metavar="PLACE",
    )
    classifier_init: Literal["random", "class_means", "text"] = option(
        "how the class vectors start. class_means: the mean features of a class's training images; text: what the text "
        "tower of a CLIP or SigLIP --backbone makes of the class names, see --class_names",
        "random",
        group="backbone",
        needs=(only_with("classifier", "cosine"),),
        off="random",
    )
    prompt: tuple[str, ...] = option(
        "text about a class, with {} for its name; of several texts the mean is taken",
        ("a photo of a {}.",),
        group="backbone",
        needs=(only_with("classifier_init", "text"),),
    )
    feature_views: int | None = option(
        "number of augmented views of each image to compute the features of a frozen backbone for, once; training then "
        "draws from them. Without augmentation there is one; with augmentation, none: compute features in every epoch",
        None,
        group="backbone",
        must_be="1 or more",
        needs=(
            only_with("train_only", "heads"),
            only_with("num_expert_layers", 0),
            Need(
                "an --augmentation other than none, or --auto_augment",
                ("augmentation", "auto_augment"),
                lambda augmentation, policy: AUGMENTATIONS[augmentation].varies or policy != "none",
                in_help=False,
            ),
            Need(
                "no --teacher",
                ("teacher",),
                lambda teacher: teacher is None,
                in_help=False,
                remedy="train without a teacher",
            ),
            Need(
                "images that are not mixed",
                ("mixup_alpha", "cutmix_alpha"),
                lambda mixup, cutmix: mixup + cutmix == 0,
                in_help=False,
                remedy="set both of these to 0",
            ),
        ),
    )

    lora_rank: int = _lora("rank of LoRA, the low-rank change of a weight matrix", 16, must_be="1 or more")
    lora_alpha: float = _lora("strength of LoRA: its change is multiplied by alpha / rank", 16.0, must_be="positive")
    lora_target_modules: tuple[str, ...] = _lora(
        "names of the layers that have LoRA, such as q_proj v_proj; all linear layers and convolutions without groups "
        "in the blocks of the backbone if not given",
        (),
    )
    freeze_batch_norm: bool = option(
        "keep the batch normalisation of the network, its statistics and parameters, as it is while the rest learns",
        False,
        group="backbone",
        needs=(only_with("train_only", "all"), _PRETRAINED),
    )
    drop_path: float | None = option(
        "rate of stochastic depth of the backbone in training, if its family has it; none: that of its configuration",
        None,
        group="backbone",
        must_be="0 or more and less than 1",
        needs=_BACKBONE_LEARNS,
    )

    image_size: int | None = _image(
        "side of a training crop, and of the image in evaluation, in pixels; none: the backbone's own",
        224,
        must_be="1 or more",
    )
    crop: Literal["backbone", "whole"] = _image(
        "how an image becomes square for a backbone in evaluation, and in training without augmentation. backbone: as "
        "its image processor does it, which often cuts off the edges; whole: the whole image, squeezed into the square",
        "backbone",
        needs=(only_with("backbone"),),
    )
    resize_size: int = _image(
        "length to which evaluation resizes the shorter side, in pixels",
        256,
        must_be="1 or more",
        needs=(NO_BACKBONE,),
    )
    augmentation: str = _image(
        "crops, flips and colour changes of training images", "imagenet", choices=lambda: AUGMENTATIONS
    )
    auto_augment: str = _image("additional random operations on training images", "none", choices=lambda: AUTO_AUGMENT)
    jpeg_scaling: bool = _image(
        "decode large JPEG files at 1/2, 1/4 or 1/8 of their width and height for training, as far as the random crop "
        "still has image_size pixels: faster, and nearly the same pixels",
        False,
        needs=(
            Need(
                "an --augmentation with random crops, imagenet or inaturalist",
                ("augmentation",),
                lambda augmentation: AUGMENTATIONS[augmentation].crops_at_random,
            ),
        ),
    )
    mixup_alpha: float = _image("alpha of mixup, which blends images; 0: no mixup", 0.0, must_be="0 or more")
    cutmix_alpha: float = _image(
        "alpha of CutMix, which pastes a part of another image; 0: no CutMix", 0.0, must_be="0 or more"
    )
    image_mean: tuple[float, ...] = _image(
        "number that is subtracted from each channel", IMAGENET_MEAN, needs=(NO_BACKBONE,)
    )
    image_std: tuple[float, ...] = _image(
        "number that each channel is then divided by", IMAGENET_STD, must_be="positive", needs=(NO_BACKBONE,)
    )

    epochs: int = _optimisation("number of epochs", must_be="1 or more")
    passes_per_epoch: int = _optimisation(
        "number of times that an epoch goes through the training images",
        1,
        must_be="1 or more",
        needs=(
            Need(
                "--sampler instance or --sampler_epoch images",
                ("sampler", "sampler_epoch"),
                lambda sampler, epoch: sampler == INSTANCE or epoch == "images",
            ),
        ),
    )
    batch_size: int = _optimisation(
        "images in a step, all processes and accumulated batches together", must_be="1 or more"
    )
    gradient_accumulation_steps: int = _optimisation(
        "number of batches in a step; a window of the BatchFormer stays within one batch",
        1,
        must_be="1 or more",
    )
    batchnorm: Literal["local", "synchronised"] = _optimisation(
        "whose images a BatchNorm that trains normalises with. local: those of its process; synchronised: those of all "
        "processes, on GPUs",
        "local",
        needs=(
            NO_BACKBONE,
            only_with("train_only", "all"),
            Need(
                "BatchNorm that trains",
                ("freeze_batch_norm",),
                lambda frozen: not frozen,
                in_help=False,
                remedy="set --no_freeze_batch_norm",
            ),
        ),
        off="local",
    )
    max_grad_norm: float = _optimisation("maximum norm of the gradients; 0: no clipping", 0.0, must_be="0 or more")
    ema_decay: float = _optimisation(
        "decay of the moving average of the weights, which is evaluated and saved instead of them; 0: no average",
        0.0,
        must_be="0 or more and less than 1",
    )
    learning_rate: float = _optimisation("learning rate after warm-up and before decay", 0.1, must_be="positive")
    head_learning_rate_factor: float = _optimisation(
        "factor on the learning rate of the classifiers and the adapters", 1.0, must_be="positive", off=1.0
    )
    optimizer: Literal["sgd", "adamw"] = _optimisation("SGD with momentum, or AdamW", "sgd")
    momentum: float = _optimisation(
        "momentum of SGD", 0.9, must_be="0 or more and less than 1", needs=(only_with("optimizer", "sgd"),)
    )
    nesterov: bool = _optimisation("Nesterov's form of the momentum", True, needs=(only_with("optimizer", "sgd"),))
    weight_decay: float = _optimisation(
        "weight decay; of SGD on every parameter, of AdamW not on biases and norms", 2e-4, must_be="0 or more"
    )
    schedule: Literal["step", "cosine", "cosine_by_step"] = _optimisation(
        "schedule of the learning rate. step and cosine change it after each epoch, cosine_by_step after each step",
        "step",
    )
    lr_steps: tuple[int, ...] = _optimisation(
        "0-based epochs at which the learning rate is multiplied by lr_gamma",
        (),
        must_be="1 or more",
        needs=(only_with("schedule", "step"), _within_epochs("lr_steps")),
    )
    lr_gamma: float = _optimisation(
        "factor on the learning rate at each of lr_steps",
        0.1,
        must_be="positive",
        needs=(
            only_with("schedule", "step"),
            Need("--lr_steps", ("lr_steps",), bool),
        ),
    )
    warmup_epochs: int = _optimisation("epochs of linear warm-up; 0: no warm-up", 5, must_be="0 or more")
    layer_learning_rate_decay: float = _optimisation(
        "factor on the learning rate from each block of the backbone, or stage, to the one before it; 1: equal rates. "
        "The last block has this factor, and the classifiers 1",
        1.0,
        must_be="above 0 and at most 1",
        needs=_BACKBONE_LEARNS,
        off=1.0,
    )
    train_only: Literal["all", "heads", "lora", "classifiers", "class_scales", "router"] = _optimisation(
        "what to train. heads: all but the backbone, which stays as it is; lora: the heads, and a low-rank change of "
        "the backbone's weights; classifiers: new classifiers (cRT); class_scales: the lengths of the class vectors "
        "(LWS); router: the router. heads and lora need --backbone or --init_from, the three last ones --init_from",
        "all",
    )

    loss: str = option(
        "loss that trains the experts", "ride", group="loss", choices=loss_names, needs=(_TRAINED_BY_LOSS,)
    )
    reweight_epoch: int | None = _loss(
        "reweight_epoch",
        "1-based epoch after which the loss is re-weighted; none: never",
        None,
        must_be="0 or more",
        needs=(_within_epochs("reweight_epoch"),),
    )
    diversity_factor: float = _loss(
        "diversity_factor",
        "weight of RIDE's diversity term; a negative one rewards experts that differ",
        -0.2,
        needs=(_SEVERAL_EXPERTS,),
    )
    reweight_factor: float = _loss(
        "reweight_factor",
        "how far the temperature of RIDE's diversity term follows the class counts once the loss is re-weighted",
        0.05,
        must_be="0 to 1",
        needs=(_SEVERAL_EXPERTS, only_with("reweight_epoch")),
    )
    max_margin: float = _loss(
        "max_margin", "margin of the rarest class in RIDE's loss and LDAM, in cosine units", 0.5, must_be="0 or more"
    )
    label_smoothing: float = _loss(
        "label_smoothing",
        "share of the target to spread over all classes",
        0.0,
        must_be="0 or more and less than 1",
        off=0.0,
    )
    focal_gamma: float = _loss("focal_gamma", "exponent of the focal loss", 1.0, must_be="0 or more")
    class_weight_beta: float = _loss(
        "class_weight_beta",
        "beta of the effective numbers that re-weight cross-entropy",
        0.9999,
        must_be="0 or more and less than 1",
    )
    logit_adjustment_tau: float | tuple[float, ...] = _loss(
        "logit_adjustment_tau",
        "factor on the log of a class's share of the images in the logit-adjusted losses; expert_logit_adjusted takes "
        "one for each expert too, such as 0 1 2 of BalPoE",
        1.0,
        must_be="0 or more",
    )

    needs_teacher: bool = field(default=False)
    """Whether the recipe needs a teacher."""
    distillation_factor: float = _distillation(
        "weight of the divergence from the teacher, which is added to the loss", 1.0, must_be="0 or more"
    )
    distillation_temperature: float = _distillation("temperature of that divergence", 1.5, must_be="positive")

    sampler: str = _sampling(
        "strategy for drawing training images from the classes", INSTANCE, choices=lambda: SAMPLERS
    )
    sampler_epoch: Literal["images", "largest_class"] = _sampling(
        "number of draws in an epoch. images: the number of training images; largest_class: the number of classes "
        "times the images of the largest class",
        "images",
        needs=(not_with("sampler", INSTANCE),),
    )

    batchformer_loss_weight: float = option(
        "weight of the loss with the BatchFormer, relative to the loss without it; 1 in the paper",
        1.0,
        group="BatchFormer",
        must_be="0 or more",
        needs=(only_with("batchformer", "shared_classifier"),),
    )
    batchformer_learning_rate_factor: float = option(
        "factor on the learning rate of the BatchFormer",
        1.0,
        group="BatchFormer",
        must_be="positive",
        needs=(not_with("batchformer", "none"),),
        off=1.0,
    )
    batchformer_window: int | Literal["local", "global"] = option(
        "which images attend to each other in the BatchFormer. local: the batch of a process; global: the images of a "
        "step; N: windows of N images, gathered across processes or split. Gradient accumulation does not enlarge it",
        "local",
        group="BatchFormer",
        must_be="1 or more",
        needs=(not_with("batchformer", "none"),),
    )
    batchformer_start_epoch: int = option(
        "number of epochs before the BatchFormer acts; until then it passes the features on unchanged",
        0,
        group="BatchFormer",
        must_be="0 or more",
        needs=(not_with("batchformer", "none"), _within_epochs("batchformer_start_epoch")),
        off=0,
    )
    batchformer_float32: bool = option(
        "compute the BatchFormer in float32 under mixed precision",
        False,
        group="BatchFormer",
        needs=(not_with("batchformer", "none"),),
    )

    def __post_init__(self):
        if self.backbone is not None:  # it replaces the residual network that a recipe may describe
            network = {name: value for name, value in self.network.items() if name not in RESIDUAL_OPTIONS}
            object.__setattr__(self, "network", network)
        unknown = sorted(set(self.network) - set(NETWORK_DEFAULTS))
        if unknown:
            raise ValueError(f"a network has no options {unknown}; it has {', '.join(NETWORK_DEFAULTS)}")
        check_values(self)
        check_values(NetworkOptions(**self.network))
        self._check_taus()
        if self.classifier_init == "text":
            self._check_text_start()
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is that of a whole step and cannot be accumulated from "
                f"{self.gradient_accumulation_steps} equal batches; set --batch_size to a multiple of "
                f"{self.gradient_accumulation_steps}"
            )
        if self.label_smoothing and "label_smoothing" not in options_read(self.loss):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} would do nothing: the loss {self.loss} does not read it "
                f"(these do: {', '.join(losses_that_read('label_smoothing'))}); set --label_smoothing 0"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; with momentum 0 set --no_nesterov")
        if list(self.lr_steps) != sorted(set(self.lr_steps)):
            raise ValueError(f"lr_steps must be epochs in ascending order, not {list(self.lr_steps)}")
        if self.image_size is None and self.backbone is None:
            raise ValueError("image_size none is the backbone's own size: set --backbone, or --image_size to a number")
        # With a backbone, its image processor decides how images are resized.
        if self.backbone is None and self.image_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size {self.resize_size} is less than image_size {self.image_size}; set --resize_size to at "
                "least that"
            )
        if not len(self.image_mean) == len(self.image_std) == 3 or self.network.get("num_channels", 3) != 3:
            raise ValueError(
                "images are read in three channels: num_channels must be 3, and image_mean and image_std three numbers"
            )
        if self.network.get("router", False) != (self.train_only == "router"):
            raise ValueError(
                "a router is trained alone, after the experts: train without it first, then with --router true "
                "--train_only router --init_from MODEL, or with a recipe whose name ends in _router"
            )
        if self.train_only == "router" and self.mixup_alpha + self.cutmix_alpha > 0:
            raise ValueError(
                "a router cannot learn from mixed images which images need a later expert: set --mixup_alpha 0 "
                "and --cutmix_alpha 0"
            )
        if self.trains_a_part_of_a_model and self.network.get("batchformer", "none") != "none":
            raise ValueError(
                f"train_only {self.train_only!r} trains on the features of evaluation: set --batchformer none"
            )

    def _check_taus(self) -> None:
        """Writes a single tau as a number. Raises ValueError for several that are not one for each expert."""
        taus = self.logit_adjustment_tau
        if isinstance(taus, tuple) and len(taus) == 1:
            object.__setattr__(self, "logit_adjustment_tau", taus[0])
        elif isinstance(taus, tuple) and self.loss != "expert_logit_adjusted":
            raise ValueError(
                f"logit_adjustment_tau {shown(taus)} has a number for each expert: set --loss expert_logit_adjusted"
            )
        elif isinstance(taus, tuple) and len(taus) != self.network_value("num_experts"):
            raise ValueError(
                f"logit_adjustment_tau {shown(taus)} has {len(taus)} numbers for {self.network_value('num_experts')} "
                "experts; give one for all, or one each"
            )

    def _check_text_start(self) -> None:
        """Raises ValueError unless class vectors from text fit the features, see `ride_bf.training.text_start`."""
        if self.backbone is None:
            raise ValueError(
                "classifier_init text needs a backbone with a text tower: name one with --backbone, such as "
                "openai/clip-vit-base-patch16"
            )
        needed = {"backbone_pooling": "pooler", "standardise_features": False, "classifier": "cosine"}
        if wrong := {name: value for name, value in needed.items() if self.network_value(name) != value}:
            here = ", ".join(f"{name} {self.network_value(name)}" for name in wrong)
            remedy = " ".join(f"--{name} {str(value).lower()}" for name, value in wrong.items())
            raise ValueError(
                "classifier_init text needs features as the backbone's pooler gives them and cosines to them, but here "
                f"is {here}: set {remedy}, or --classifier_init random"
            )
        if without := [prompt for prompt in self.prompt if "{}" not in prompt]:
            raise ValueError(f"prompt {without[0]!r} is the same for every class; write {{}} where the name belongs")
        if not self.prompt:
            raise ValueError('prompt is empty; give it a text, such as "a photo of a {}."')

    @property
    def trains_a_part_of_a_model(self) -> bool:
        """Whether it trains a part of a network of this library that is trained already."""
        return self.train_only not in ("all", "heads", "lora")

    @property
    def varies_images(self) -> bool:
        """Whether training sees an image in another way each time, apart from mixing images."""
        return AUGMENTATIONS[self.augmentation].varies or self.auto_augment != "none"

    @property
    def window_size(self) -> int:
        """Images in the BatchFormer's window if one process holds all images of a step."""
        return self.batch_size if isinstance(self.batchformer_window, str) else self.batchformer_window

    @property
    def margin_scale(self) -> float:
        """Factor on the margins of the losses: `cosine_scale`, even if the classifier is linear."""
        return float(self.network_value("cosine_scale"))

    def network_value(self, name: str) -> Any:
        """The value of a network option, or the default of `RideBfConfig`."""
        return self.network.get(name, NETWORK_DEFAULTS[name])

    def loss_options(self) -> dict[str, Any]:
        """The options that a loss may read."""
        return {"margin_scale": self.margin_scale, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def config(self, **labels) -> "RideBfConfig":
        """The configuration of the network. Pass `num_labels`, or `id2label` and `label2id`.

        With a `backbone`, pass its configuration as `backbone_config` too.
        """
        from configuration_ride_bf import RideBfConfig  # imports transformers

        return RideBfConfig(**self.network, **labels)

    def check_network(self) -> None:
        """Raises ValueError for a network that cannot be built with any number of classes.

        A network with a backbone is checked when its backbone is loaded.
        """
        if self.backbone is not None:
            return
        from huggingface_hub.errors import StrictDataclassError

        try:
            self.config(num_labels=max(2, self.network_value("router_top_k")))
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    def learning_rate_factor(self, epoch: float, unit: float = 1) -> float:
        """Factor on `learning_rate` in the 0-based `epoch`, of which 1.5 is the middle of the second.

        `unit` is the part of an epoch after which the rate changes.
        """
        warmup = min(1.0, (unit + epoch) / max(unit, self.warmup_epochs))
        if self.schedule == "step":
            return warmup * self.lr_gamma ** sum(epoch >= step for step in self.lr_steps)
        if epoch < self.warmup_epochs:
            return warmup
        progress = (epoch - self.warmup_epochs) / max(1, self.epochs - self.warmup_epochs)
        return (1 + math.cos(math.pi * progress)) / 2

    def reweight(self, epoch: int) -> bool:
        """Whether deferred re-weighting is on in the 0-based `epoch`."""
        return self.reweight_epoch is not None and epoch + 1 > self.reweight_epoch

    def as_json(self) -> str:
        """The content of `recipe.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainingRecipe":
        """The recipe that `as_json` wrote. Raises ValueError for unknown or missing options.

        Options of earlier versions are ignored if they have the value that is fixed now.
        """
        known = {own.name: own for own in fields(cls)}
        former = _former_options(content)
        for name, now in former.items():
            if content.get(name, now) != now:
                raise ValueError(
                    f"{name} {content[name]} of an earlier version cannot be set any more; here it is {now:g}"
                )
        unknown = sorted(set(content) - set(known) - set(former))
        missing = sorted(name for name, own in known.items() if own.default is MISSING and name not in content)
        if unknown or missing:
            raise ValueError(
                f"unknown options {unknown}, missing options {missing}; the options are {', '.join(known)}"
            )
        values = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
        }
        for name, hint in get_type_hints(cls).items():
            if name in values and not _is_of(values[name], hint):
                raise ValueError(f"{name} must be {_in_words(hint)}, not {values[name]!r}")
        return cls(**values)

    def differences(self, written: str) -> list[str]:
        """Differences from another recipe, written by `as_json`, as "option: theirs -> ours"."""
        theirs, ours = json.loads(written), json.loads(self.as_json())
        ours |= {name: now for name, now in _former_options(ours).items() if theirs.get(name, now) != now}
        for own in fields(self):  # an option that is newer than the file had its default then
            if own.default is not MISSING:
                theirs.setdefault(own.name, list(own.default) if isinstance(own.default, tuple) else own.default)
        names = [name for name in ours if name != "description"]
        return [f"{name}: {theirs.get(name)} -> {ours[name]}" for name in names if theirs.get(name) != ours[name]]

    def with_overrides(self, **overrides) -> "TrainingRecipe":
        """A copy with other values. Options of `RideBfConfig` go to the network.

        Another `backbone` brings its own `image_size`, unless that is given too.
        """
        if overrides.get("backbone") is not None:
            overrides = {"image_size": None, **overrides}
        own = {f.name for f in fields(self)}
        network = {key: value for key, value in overrides.items() if key not in own}
        rest = {key: value for key, value in overrides.items() if key in own}
        return replace(self, network={**self.network, **network}, **rest)


def _former_options(content: Mapping[str, Any]) -> dict[str, float]:
    """Options that only earlier versions had, and the values that are fixed now for this recipe."""
    network = content.get("network")
    scale = network.get("cosine_scale") if isinstance(network, dict) else None
    return _FORMER_OPTIONS | {"margin_scale": NETWORK_DEFAULTS["cosine_scale"] if scale is None else scale}
