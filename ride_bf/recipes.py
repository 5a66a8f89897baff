"""Training recipes: everything that a result depends on, as values.

`RECIPES` maps names to `TrainingRecipe`s; a new one is best derived with `dataclasses.replace`. Numbers follow the
configurations released with RIDE and BatchFormer unless a description says otherwise. In their runs the BatchFormer's
window is one GPU's share of the batch: 4 GPUs, 8 for ResNeXt-50 and iNaturalist, 1 for CIFAR. Here it is that number of
images on any number of GPUs.
"""

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
    batch_size: int = _option("images in a step, all processes together")
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
            **dict.fromkeys(("momentum", "class_weight_beta"), "0 or more and less than 1"),
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


RESNET32 = {
    "stem_type": "cifar",
    "block_type": "basic",
    "depths": [5, 5, 5],
    "hidden_sizes": [16, 24, 48],
    "num_experts": 3,
    "num_shared_stages": 1,
}
RESNET10 = {
    "stem_type": "imagenet",
    "block_type": "basic",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [64, 128, 192, 384],
    "num_experts": 3,
    "num_shared_stages": 2,
}
RESNET50 = {**RESNET10, "block_type": "bottleneck", "depths": [3, 4, 6, 3]}
RESNEXT50 = {**RESNET50, "groups": 32, "width_per_group": 4}
RESNET152 = {**RESNET50, "depths": [3, 8, 36, 3]}

DIGITS_LT_RESNET32 = TrainingRecipe(
    name="digits_lt_resnet32",
    description="""Digits-LT: scikit-learn's handwritten digits, 337 training images, 120 zeros down to 2 nines. Ours;
no paper trains on it. Measured results are in the README.
Why the settings are what they are; all were chosen on images that are in neither the training nor the test split:
- 16x16 pixels: the scans have 8x8, and four times the pixels would be four times the cost.
- Three passes an epoch and batches of 32, 1,280 steps in all. At 64 images a step, half as many steps, the accuracy of
  RIDE spread more over the seeds: standard deviation 1.1 points of 5 runs, against 0.2 of 3.
- Rotation, shift, scale and shear: two nines are but two shapes of a nine. No flips: a mirrored digit is none.
- A cosine schedule: no run depends on where in an epoch the rate drops. The step schedule did as well on average.
- The BatchFormer shares the classifier and its stream's loss is weighted 0.1. In batches this small the paper's weight
  of 1 and its "insert" are known to collapse the paper's layer; 0.3 did as well as 0.1. The gated layer, inserted, was
  as accurate at 64 images a step; with a dropout of 0.1 instead of the paper's 0.5 it lost four points.
Cost: 25 M multiply-adds an image, 0.8 M parameters; two minutes on two CPU cores.""",
    dataset="digits_lt",
    network={**RESNET32, "batchformer": "shared_classifier"},
    image_size=16,
    resize_size=16,
    augmentation="digits",
    image_mean=(0.305,) * 3,
    image_std=(0.376,) * 3,
    epochs=40,
    passes_per_epoch=3,
    batch_size=32,
    learning_rate=0.07,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=7,
    diversity_factor=-0.45,
    reweight_epoch=32,
    batchformer_loss_weight=0.1,
    batchformer_window=32,
)

CIFAR100_LT_RESNET32 = TrainingRecipe(
    name="cifar100_lt_resnet32",
    description="""CIFAR-100-LT, imbalance factor 100. The schedule and losses are RIDE's; the BatchFormer shares the
classifier, without which it collapses here, as the authors say.
Published: RIDE with expert assignment 48.6 (many 67.0, medium 49.9, few 25.7), from RIDE's model zoo; with BatchFormer
nothing is published for RIDE. Test accuracies of the authors are of the epoch that was best on the test images.
Cost: 0.100 G multiply-adds an image, 0.8 M parameters and 0.01 M in the BatchFormer.""",
    dataset="cifar100_lt",
    network={**RESNET32, "batchformer": "shared_classifier"},
    image_size=32,
    resize_size=32,
    augmentation="cifar",
    image_mean=(0.4914, 0.4822, 0.4465),
    image_std=(0.2023, 0.1994, 0.2010),
    epochs=200,
    batch_size=128,
    weight_decay=5e-4,
    lr_steps=(160, 180),
    lr_gamma=0.01,
    diversity_factor=-0.45,
    reweight_epoch=160,
    batchformer_window=128,
)

CIFAR10_LT_RESNET32 = replace(
    CIFAR100_LT_RESNET32,
    name="cifar10_lt_resnet32",
    description="""CIFAR-10-LT, imbalance factor 100, with the settings of CIFAR-100-LT.
Published: nothing for RIDE with BatchFormer. Cost: as CIFAR-100-LT.""",
    dataset="cifar10_lt",
)

IMAGENET_LT_RESNET10 = TrainingRecipe(
    name="imagenet_lt_resnet10",
    description="""ImageNet-LT, ResNet-10, three experts.
Published: 45.7 (many 56.3, medium 42.1, few 28.3); RIDE alone 44.7 (57.0, 40.3, 25.5). BatchFormer's README.
Cost: 1.17 G multiply-adds an image, 9.4 M parameters and 0.9 M in the BatchFormer.""",
    dataset="imagenet_lt",
    network={**RESNET10, "batchformer": "insert"},
    epochs=120,
    batch_size=512,
    lr_steps=(60, 80),
    reweight_factor=0.02,
    reweight_epoch=80,
    batchformer_window=128,
)

IMAGENET_LT_RESNET50 = replace(
    IMAGENET_LT_RESNET10,
    name="imagenet_lt_resnet50",
    description="""ImageNet-LT, ResNet-50, three experts. 400 images a step were 4 GPUs of 100, a window each.
Published: 54.1 (many 64.3, medium 51.4, few 35.1); RIDE alone 53.6 (64.9, 50.4, 33.2). BatchFormer's README.
Cost: 5.77 G multiply-adds an image, 43.7 M parameters and 14.2 M in the BatchFormer.""",
    network={**RESNET50, "batchformer": "insert"},
    epochs=100,
    batch_size=400,
    batchformer_window=100,
)

IMAGENET_LT_RESNEXT50 = replace(
    IMAGENET_LT_RESNET50,
    name="imagenet_lt_resnext50",
    description="""ImageNet-LT, ResNeXt-50 32x4d, three experts, one stage.
Published: 56.5 (many 66.6, medium 54.2, few 36.0); RIDE alone 55.9 (67.3, 52.8, 34.6). BatchFormer's README.
Cost: 6.05 G multiply-adds an image, 42.9 M parameters and 14.2 M in the BatchFormer.""",
    network={**RESNEXT50, "batchformer": "insert"},
    batch_size=256,
    batchformer_window=32,
)

INATURALIST18_RESNET50 = replace(
    IMAGENET_LT_RESNET50,
    name="inaturalist18_resnet50",
    description="""iNaturalist 2018, ResNet-50, three experts.
Published: 74.1 (many 65.5, medium 74.5, few 75.8); RIDE alone 72.5 (68.1, 72.7, 73.2). BatchFormer's README. The
authors choose their best epoch on the test images; here nothing is.
Cost: 5.77 G multiply-adds an image, 76.6 M parameters and 14.2 M in the BatchFormer.""",
    dataset="inaturalist18",
    augmentation="inaturalist",
    image_mean=(0.466, 0.471, 0.380),
    image_std=(0.195, 0.194, 0.192),
    batch_size=128,
    learning_rate=0.2,
    reweight_factor=0.015,
    batchformer_window=16,
)

PLACES_LT_RESNET152 = replace(
    IMAGENET_LT_RESNET50,
    name="places_lt_resnet152",
    description="""Places-LT, ResNet-152, three experts. Ours: neither paper's code has a recipe for Places-LT; this is
ImageNet-LT's at a tenth of the rate, to be started with --init_from on the same network trained on ImageNet (its
classifiers, of other classes, are left out). Weights of other libraries cannot be started from yet.
Published: nothing with BatchFormer. Cost: 98.5 M parameters and 14.2 M in the BatchFormer.""",
    dataset="places_lt",
    network={**RESNET152, "batchformer": "insert"},
    epochs=30,
    batch_size=128,
    learning_rate=0.01,
    lr_steps=(18, 24),
    reweight_epoch=24,
    batchformer_window=128,
)

FULL_WIDTHS = {"cifar": [16, 32, 64], "imagenet": [64, 128, 256, 512]}


def _ride_alone(base: TrainingRecipe, **changes) -> TrainingRecipe:
    """The recipe without BatchFormer."""
    return replace(
        base,
        name=f"{base.name}_ride",
        description=f"{base.name} without BatchFormer: RIDE alone. Published: see {base.name}.",
        network={**base.network, "batchformer": "none"},
        **changes,
    )


def _distilled(base: TrainingRecipe, **changes) -> TrainingRecipe:
    """The recipe with a teacher, to be named by `--teacher`; the authors' is a RIDE of six experts."""
    return replace(
        base,
        name=f"{base.name}_distilled",
        description=f"{base.name} with distillation; needs --teacher, of six experts in the authors' runs "
        "(--num_experts 6 trains one). Nothing is published for it with BatchFormer.",
        needs_teacher=True,
        **changes,
    )


def _router(base: TrainingRecipe, top_k: int) -> TrainingRecipe:
    """Stage 2 of RIDE: expert assignment on a trained model, to be named by `--init_from`."""
    return replace(
        base,
        name=f"{base.name}_router",
        description=f"Expert assignment, RIDE's second stage, on a model of {base.name}; needs --init_from. All but "
        "the router is frozen. The BatchFormer, not used in evaluation, is left out: the router learns from the logits "
        "that it will see.",
        network={**base.network, "batchformer": "none", "router": True, "router_top_k": top_k},
        train_only="router",
        sampler="class_balanced",
        epochs=5,
        batch_size=512 if base.batch_size > 64 else base.batch_size,
        learning_rate=0.01,
        weight_decay=5e-4,
        schedule="cosine",
        lr_steps=(),
        warmup_epochs=0,
        reweight_epoch=None,
    )


def _one_expert(base: TrainingRecipe, loss: Literal["cross_entropy", "ldam"], **changes) -> TrainingRecipe:
    """A baseline: a plain ResNet of full width, trained as long."""
    short, classifier = ("ce", "linear") if loss == "cross_entropy" else ("ldam_drw", "cosine")
    network = {
        **base.network,
        "batchformer": "none",
        "num_experts": 1,
        "hidden_sizes": FULL_WIDTHS[base.network["stem_type"]],
        "classifier": classifier,
    }
    return replace(
        base,
        name=f"{base.name}_{short}",
        description=f"Baseline to {base.name}: one expert of full width, {loss}, the same schedule.",
        network=network,
        loss=loss,
        **changes,
    )


_CIFAR_LDAM = {"weight_decay": 2e-4, "nesterov": False}  # as LDAM's authors have it
VARIANTS = (
    _ride_alone(DIGITS_LT_RESNET32),
    _one_expert(DIGITS_LT_RESNET32, "cross_entropy"),
    _one_expert(DIGITS_LT_RESNET32, "ldam"),
    _distilled(DIGITS_LT_RESNET32),
    _router(DIGITS_LT_RESNET32, top_k=5),
    _ride_alone(CIFAR100_LT_RESNET32),
    _one_expert(CIFAR100_LT_RESNET32, "cross_entropy", **_CIFAR_LDAM),
    _one_expert(CIFAR100_LT_RESNET32, "ldam", **_CIFAR_LDAM),
    _distilled(CIFAR100_LT_RESNET32, warmup_epochs=20),
    _router(CIFAR100_LT_RESNET32, top_k=30),
    _ride_alone(IMAGENET_LT_RESNET10, batch_size=256, epochs=100),
    _one_expert(IMAGENET_LT_RESNET10, "cross_entropy"),
    _distilled(IMAGENET_LT_RESNET10, batch_size=256, epochs=100, batchformer_window=64),
    _router(IMAGENET_LT_RESNET10, top_k=30),
    _ride_alone(IMAGENET_LT_RESNET50),
    _one_expert(IMAGENET_LT_RESNET50, "cross_entropy"),
    _distilled(IMAGENET_LT_RESNET50, batch_size=256, batchformer_window=64),
    _router(IMAGENET_LT_RESNET50, top_k=50),
    _ride_alone(IMAGENET_LT_RESNEXT50),
    _one_expert(IMAGENET_LT_RESNEXT50, "cross_entropy"),
    _distilled(IMAGENET_LT_RESNEXT50),
    _router(IMAGENET_LT_RESNEXT50, top_k=50),
    _ride_alone(INATURALIST18_RESNET50),
    _one_expert(INATURALIST18_RESNET50, "cross_entropy"),
    _distilled(INATURALIST18_RESNET50, batch_size=512, batchformer_window=64),
    _router(INATURALIST18_RESNET50, top_k=50),
)

DEFAULT_RECIPE = DIGITS_LT_RESNET32.name
RECIPES: dict[str, TrainingRecipe] = {
    recipe.name: recipe
    for recipe in (
        DIGITS_LT_RESNET32,
        CIFAR10_LT_RESNET32,
        CIFAR100_LT_RESNET32,
        IMAGENET_LT_RESNET10,
        IMAGENET_LT_RESNET50,
        IMAGENET_LT_RESNEXT50,
        INATURALIST18_RESNET50,
        PLACES_LT_RESNET152,
        *VARIANTS,
    )
}
