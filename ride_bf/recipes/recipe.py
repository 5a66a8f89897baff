"""`TrainingRecipe`: everything that a result depends on, as values."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from configuration_ride_bf import RideBfConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _option(meaning: str, default: Any = MISSING) -> Any:
    """A field with the text that `train_accelerate.py --help` shows."""
    return field(default=default, metadata={"help": meaning})


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of an annotation; a whole number is also a float."""
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


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """One training run, but for its seed, its data's place and its hardware.

    Raises ValueError, naming the value, for a combination that cannot be trained.
    """

    name: str
    description: str = field(repr=False)
    """Source, published result and cost."""

    dataset: str = _option("name for data.load_long_tailed")
    network: dict[str, Any] = field()
    """Options of `RideBfConfig`."""

    image_size: int = _option("side of a training crop and of evaluation's centre crop, in pixels", 224)
    resize_size: int = _option("length to which evaluation resizes the shorter side, in pixels", 256)
    augmentation: str = _option("name for data.train_transform", "imagenet")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = _option("policy of more augmentation", "none")
    mixup_alpha: float = _option("of mixup: images blended with another; 0: none", 0.0)
    cutmix_alpha: float = _option("of CutMix: a part of another image put in; 0: none", 0.0)
    image_mean: tuple[float, ...] = _option("of each channel, subtracted", IMAGENET_MEAN)
    image_std: tuple[float, ...] = _option("of each channel, divided by", IMAGENET_STD)

    epochs: int = _option("how many")
    passes_per_epoch: int = _option("how often an epoch goes through the training images", 1)
    batch_size: int = _option("images in a step, all processes and accumulated batches together")
    gradient_accumulation_steps: int = _option("batches whose gradients make a step; a window is within one batch", 1)
    max_grad_norm: float = _option("to which the gradient's norm is clipped; 0: not", 0.0)
    ema_decay: float = _option("of an average of the weights, evaluated and saved in their place; 0: without", 0.0)
    learning_rate: float = _option("after warm-up, before decay", 0.1)
    momentum: float = _option("of SGD", 0.9)
    nesterov: bool = _option("Nesterov's momentum", True)
    weight_decay: float = _option("on every parameter", 2e-4)
    schedule: Literal["step", "cosine"] = _option("of the learning rate, by epoch", "step")
    lr_steps: tuple[int, ...] = _option("0-based epochs from which the rate is multiplied by lr_gamma", ())
    lr_gamma: float = _option("factor at each of lr_steps", 0.1)
    warmup_epochs: int = _option("epochs of linear warm-up; 0: none", 5)

    loss: Literal[
        "ride",
        "collaborative",
        "ldam",
        "focal",
        "cross_entropy",
        "reweighted_cross_entropy",
        "balanced_softmax",
        "logit_adjusted",
    ] = _option("criterion", "ride")
    diversity_factor: float = _option("weight of RIDE's diversity term; negative rewards difference", -0.2)
    diversity_temperature: float = _option("temperature of RIDE's diversity term", 1.0)
    reweight_factor: float = _option("how far that temperature follows the class counts once re-weighted", 0.05)
    reweight_epoch: int | None = _option("re-weighting is on after this 1-based epoch; None: never", None)
    label_smoothing: float = _option("share of the target spread over all classes", 0.0)
    max_margin: float = _option("margin of the rarest class, in cosine units", 0.5)
    margin_scale: float = _option("what the margins are multiplied with, as the classifier's cosine", 30.0)
    focal_gamma: float = _option("exponent of the focal loss", 1.0)
    class_weight_beta: float = _option("beta of the effective numbers that re-weight cross-entropy", 0.9999)
    logit_adjustment_tau: float = _option("factor on the log of a class's share in the logit-adjusted loss", 1.0)
    needs_teacher: bool = field(default=False)
    """Whether it is meant to be trained with a teacher."""
    distillation_factor: float = _option("weight of the divergence from the teacher, if there is one", 1.0)
    distillation_loss_factor: float = _option("weight of the loss itself beside that divergence", 1.0)
    distillation_temperature: float = _option("temperature of that divergence", 1.5)
    sampler: Literal["instance", "square_root", "class_balanced", "progressively_balanced"] = _option(
        "how often each class is drawn", "instance"
    )
    sampler_epoch: Literal["images", "largest_class"] = _option(
        "draws in an epoch, unless by instance: as many as there are images, or classes times the largest", "images"
    )
    train_only: Literal["all", "classifiers", "class_scales", "router"] = _option(
        "part that learns: classifiers anew (cRT), their lengths (LWS), the router; needs --init_from", "all"
    )
    router_positive_weight: float = _option("weight of the images that need a later expert", 100.0)
    batchformer_loss_weight: float = _option('of its stream in "shared_classifier" networks; the paper has 1', 1.0)
    batchformer_window: int | Literal["local", "global"] = _option(
        "images that attend to each other in the BatchFormer: a number, to which a process's batch is cut or completed "
        "from other processes; local: a process's batch; global: all of a step. Gradient accumulation adds none",
        "local",
    )

    def __post_init__(self):
        allowed = {
            **dict.fromkeys(("epochs", "passes_per_epoch", "batch_size", "image_size", "resize_size"), "1 or more"),
            **dict.fromkeys(
                ("warmup_epochs", "weight_decay", "focal_gamma", "max_margin", "margin_scale"), "0 or more"
            ),
            **dict.fromkeys(
                ("mixup_alpha", "cutmix_alpha", "distillation_factor", "distillation_loss_factor"), "0 or more"
            ),
            **dict.fromkeys(("learning_rate", "lr_gamma", "diversity_temperature"), "positive"),
            **dict.fromkeys(("distillation_temperature", "router_positive_weight"), "positive"),
            **dict.fromkeys(
                ("momentum", "class_weight_beta", "ema_decay", "label_smoothing"), "0 or more and less than 1"
            ),
            "gradient_accumulation_steps": "1 or more",
            "max_grad_norm": "0 or more",
        }
        holds = {
            "1 or more": lambda value: value >= 1,
            "0 or more": lambda value: value >= 0,
            "positive": lambda value: value > 0,
            "0 or more and less than 1": lambda value: 0 <= value < 1,
        }
        for name, rule in allowed.items():
            if not holds[rule](getattr(self, name)):
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is that of a whole step and cannot be accumulated from "
                f"{self.gradient_accumulation_steps} equal batches; set --batch_size to a multiple"
            )
        if self.label_smoothing and self.loss in ("focal", "balanced_softmax", "logit_adjusted"):
            raise ValueError(f"label_smoothing is for losses of cross-entropy, not for {self.loss}")
        if isinstance(self.batchformer_window, int) and self.batchformer_window < 1:
            raise ValueError(f"batchformer_window must be local, global or 1 or more, not {self.batchformer_window}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; with momentum 0 set --no_nesterov")
        if list(self.lr_steps) != sorted(set(self.lr_steps)):
            raise ValueError(f"lr_steps must be epochs in ascending order, not {list(self.lr_steps)}")
        if self.resize_size < self.image_size:
            raise ValueError(f"resize_size {self.resize_size} is less than image_size {self.image_size}")
        if not len(self.image_mean) == len(self.image_std) == 3 or self.network.get("num_channels", 3) != 3:
            raise ValueError(
                "images are read in three channels: num_channels must be 3, and image_mean and image_std three numbers"
            )
        if self.network.get("router", False) != (self.train_only == "router"):
            raise ValueError(
                "a router is trained after the experts, and alone: train without it first, then with --router true "
                "--train_only router --init_from MODEL, or with a recipe whose name ends in _router"
            )
        if self.train_only == "router" and self.mixup_alpha + self.cutmix_alpha > 0:
            raise ValueError("a router learns which images need a later expert, which mixed ones do not tell: no mixup")
        if self.train_only != "all" and self.network.get("batchformer", "none") != "none":
            raise ValueError(
                f"train_only {self.train_only!r} learns on features as evaluation sees them: set --batchformer none"
            )

    @property
    def window_size(self) -> int:
        """Images in the BatchFormer's window when one process has all of a step."""
        return self.batch_size if isinstance(self.batchformer_window, str) else self.batchformer_window

    def config(self, **labels) -> RideBfConfig:
        """The network's configuration; pass `num_labels`, or `id2label` and `label2id`."""
        return RideBfConfig(**self.network, **labels)

    def learning_rate_factor(self, epoch: int) -> float:
        """What `learning_rate` is multiplied with throughout the 0-based `epoch`."""
        warmup = min(1.0, (1 + epoch) / max(1, self.warmup_epochs))
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
        """The recipe as it is written to `recipe.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainingRecipe":
        """The recipe that `as_json` wrote. Raises ValueError for unknown or missing options."""
        known = {option.name: option for option in fields(cls)}
        unknown = sorted(set(content) - set(known))
        missing = sorted(name for name, option in known.items() if option.default is MISSING and name not in content)
        if unknown or missing:
            raise ValueError(f"unknown options {unknown}, missing options {missing}; known are {', '.join(known)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        for name, hint in get_type_hints(cls).items():
            if name in values and not _is_of(values[name], hint):
                expected = hint.__name__ if isinstance(hint, type) else hint
                raise ValueError(f"{name} must be {expected}, not {values[name]!r}")
        return cls(**values)

    def differences(self, written: str) -> list[str]:
        """What another recipe, written by `as_json`, has that this one has not: "option: theirs -> ours"."""
        theirs, ours = json.loads(written), json.loads(self.as_json())
        for option in fields(self):  # one that a later version brought was at its default before
            if option.default is not MISSING:
                default = option.default
                theirs.setdefault(option.name, list(default) if isinstance(default, tuple) else default)
        names = [name for name in ours if name != "description"]
        return [f"{name}: {theirs.get(name)} -> {ours[name]}" for name in names if theirs.get(name) != ours[name]]

    def with_overrides(self, **overrides) -> "TrainingRecipe":
        """A copy with other values; an option of `RideBfConfig` goes to the network."""
        own = {f.name for f in fields(self)}
        network = {key: value for key, value in overrides.items() if key not in own}
        rest = {key: value for key, value in overrides.items() if key in own}
        return replace(self, network={**self.network, **network}, **rest)
