"""Reads the authors' config.json files, as networks and as recipes."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS

if TYPE_CHECKING:
    from configuration_ride_bf import RideBfConfig

_NETWORKS = {  # arch.type without "Model" or "EAModel" -> depths and whether it is a ResNeXt
    "ResNet10": ([1, 1, 1, 1], False),
    "ResNet32": ([5, 5, 5], False),
    "ResNet50": ([3, 4, 6, 3], False),
    "ResNet101": ([3, 4, 23, 3], False),
    "ResNet152": ([3, 8, 36, 3], False),
    "ResNeXt50": ([3, 4, 6, 3], True),
    "ResNeXt152": ([3, 8, 36, 3], True),
}
_BATCHFORMER_LAYERS = {12: 8, 13: 6}  # add_bt -> layers; every other value means one layer
_SHARED_CLASSIFIER = (32, 33)
RECIPE_OF_LOADER = {
    "ImageNetLTDataLoader": "imagenet_lt_resnet50",
    "iNaturalistDataLoader": "inaturalist18_resnet50",
    "ImbalanceCIFAR100DataLoader": "cifar100_lt_resnet32",
    "ImbalanceCIFAR10DataLoader": "cifar10_lt_resnet32",
}
# The `data_dir` of each loader in their configurations, relative to the folder in which their commands run
FOLDER_OF_LOADER = {
    "ImageNetLTDataLoader": "data/ImageNet_LT",
    "iNaturalistDataLoader": "data/iNaturalist18",
    "ImbalanceCIFAR100DataLoader": "data",
    "ImbalanceCIFAR10DataLoader": "data",
}


class ConversionError(ValueError):
    """A checkpoint or configuration cannot be converted. The message says what was found and what to do."""


def read_reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads options of `RideBfConfig` from the authors' config.json. Raises ConversionError for an unknown network."""
    kind = config["arch"]["type"]
    arguments = config["arch"].get("args", {})
    base = kind.removesuffix("Model").removesuffix("EA")
    if base not in _NETWORKS:
        raise ConversionError(f"config.json names the network {kind!r}; known networks are {', '.join(_NETWORKS)}")
    depths, resnext = _NETWORKS[base]
    cifar = len(depths) == 3
    experts = arguments.get("num_experts", 2 if cifar and kind.endswith("EAModel") else 1)
    first, second = ("layer2_output_dim", "layer3_output_dim") if cifar else ("layer3_output_dim", "layer4_output_dim")
    full, reduced = ((32, 64), (24, 48)) if cifar else ((256, 512), (192, 384))
    defaults = reduced if arguments.get("reduce_dimension", False) else full
    last_widths = [arguments.get(name) or default for name, default in zip((first, second), defaults, strict=True)]
    options: dict[str, Any] = {
        "stem_type": "cifar" if cifar else "imagenet",
        "block_type": "basic" if cifar or base == "ResNet10" else "bottleneck",
        "depths": depths,
        "hidden_sizes": ([16] if cifar else [64, 128]) + last_widths,
        "num_experts": experts,
        "num_labels": arguments["num_classes"],
        "classifier": "cosine" if arguments.get("use_norm", False) else "linear",
        "router": kind.endswith("EAModel"),
    }
    if experts > 1:
        options["num_shared_stages"] = 1 if cifar else 3 if arguments.get("share_layer3", False) else 2
    if resnext:
        options |= {"groups": 32, "width_per_group": 4}
    if "s" in arguments and options["classifier"] == "cosine":
        options["cosine_scale"] = float(arguments["s"])
    add_bt = int(arguments.get("add_bt") or 0)
    options["batchformer"] = _batchformer_mode(add_bt, cifar, resnext, experts)
    if add_bt:
        options["batchformer_num_layers"] = _BATCHFORMER_LAYERS.get(add_bt, 1)
    return options


def _batchformer_mode(add_bt: int, cifar: bool, resnext: bool, experts: int) -> str:
    if add_bt == 0:
        return "none"
    multi_expert_resnet = experts > 1 and not resnext
    if add_bt == 22 and multi_expert_resnet and not cifar:
        raise ConversionError(
            "config.json has add_bt 22, which the authors' ImageNet ResNets cannot train: it doubles the batch but not "
            "its labels. To read it as --batchformer insert, set add_bt to 1 in it"
        )
    return "shared_classifier" if add_bt in _SHARED_CLASSIFIER and multi_expert_resnet else "insert"


def reference_arch(config: "RideBfConfig") -> dict[str, Any]:
    """Returns the `arch` entry of the authors' config.json. Raises ConversionError if they have no such network."""
    kinds = {(tuple(depths), resnext): name for name, (depths, resnext) in _NETWORKS.items()}
    resnext = (config.groups, config.width_per_group) == (32, 4)
    kind = kinds.get((tuple(config.depths), resnext))
    cifar = config.stem_type == "cifar"
    first_widths = [16] if cifar else [64, 128]
    block = "basic" if kind in ("ResNet10", "ResNet32") else "bottleneck"
    layers = {count: value for value, count in _BATCHFORMER_LAYERS.items()} | {1: 1}
    gated = config.batchformer != "none" and config.batchformer_layer_scale_init_value is not None
    shared_stages = (1,) if cifar else (2, 3)
    if (
        kind is None
        or (kind == "ResNet32") != cifar
        or block != config.block_type
        or config.hidden_sizes[: len(first_widths)] != first_widths
        or config.num_shared_stages not in shared_stages
        or config.batchformer_num_layers not in layers
        or (config.batchformer == "shared_classifier" and (resnext or config.num_experts == 1))
        or gated
        or config.num_channels != 3
    ):
        raise ConversionError(
            f"the authors' code has no such network: {config.stem_type} stem, {config.block_type} blocks, depths "
            f"{config.depths}, widths {config.hidden_sizes}, groups {config.groups} x {config.width_per_group}, "
            f"{config.num_shared_stages} shared stages, BatchFormer {config.batchformer!r}"
        )
    names = ("layer2_output_dim", "layer3_output_dim") if cifar else ("layer3_output_dim", "layer4_output_dim")
    arguments = {
        "num_classes": config.num_labels,
        "num_experts": config.num_experts,
        "reduce_dimension": False,
        **dict(zip(names, config.hidden_sizes[-2:], strict=True)),
        "use_norm": config.classifier == "cosine",
    }
    if config.batchformer != "none":
        shared = config.batchformer == "shared_classifier"
        arguments["add_bt"] = _SHARED_CLASSIFIER[-1] if shared else layers[config.batchformer_num_layers]
    if config.num_shared_stages == 3:
        arguments["share_layer3"] = True
    if config.router:
        arguments |= {
            "top_choices_num": config.router_top_k,
            "share_expert_help_pred_fc": config.router_shared_output,
        }
    return {"type": f"{kind}{'EA' if config.router else ''}Model", "args": arguments}


_LOSSES = {
    "RIDELoss": "ride",
    "RIDELossWithDistill": "ride",
    "LDAMLoss": "ldam",
    "FocalLoss": "focal",
    "CrossEntropyLoss": "cross_entropy",
}
_SCHEDULES = {"CustomLR": "step", "CosLR": "cosine"}
# Arguments of their losses -> options of our recipes
_LOSS_ARGUMENTS = {
    "additional_diversity_factor": "diversity_factor",
    "reweight_factor": "reweight_factor",
    "reweight_epoch": "reweight_epoch",
    "max_m": "max_margin",
    "gamma": "focal_gamma",
    "distill_temperature": "distillation_temperature",
    "additional_distill_loss_factor": "distillation_factor",
}
_MARGIN_SCALE = 30.0  # their default, with any classifier; here it is the classifier's scale
# Arguments of their losses that are constants here
_LOSS_CONSTANTS = {"base_diversity_temperature": 1.0, "ride_loss_factor": 1.0}
_LOSS_DEFAULTS: dict[str, dict[str, Any]] = {  # their defaults; a reweight_epoch of -1 means never
    "RIDELoss": {"diversity_factor": -0.2, "reweight_factor": 0.05, "reweight_epoch": -1},
    "RIDELossWithDistill": {
        "diversity_factor": -0.2,
        "reweight_factor": 0.05,
        "reweight_epoch": -1,
        "distillation_temperature": 1.0,
    },
    "LDAMLoss": {"reweight_epoch": -1},
    "FocalLoss": {"focal_gamma": 0.0, "reweight_epoch": -1},
    "CrossEntropyLoss": {"reweight_epoch": -1},
}


def recipe_from_reference(config: Mapping[str, Any]) -> TrainingRecipe:
    """Converts one of the authors' config.json files to a recipe.

    Batch size and epochs come from the file, and the augmentation from the recipe for its data loader's data set. The
    BatchFormer's window is the number of images on one of the file's GPUs. Raises ConversionError, with the entry, if
    an entry has no counterpart here.
    """
    loader, loss, optimizer = config["data_loader"], config["loss"], config["optimizer"]
    if loader["type"] not in RECIPE_OF_LOADER:
        raise ConversionError(f"data_loader {loader['type']!r} is not one of {', '.join(RECIPE_OF_LOADER)}")
    if loss["type"] not in _LOSSES:
        raise ConversionError(f"loss {loss['type']!r} is not one of {', '.join(_LOSSES)}")
    if optimizer["type"] != "SGD":
        raise ConversionError(f"optimizer {optimizer['type']!r} is not SGD")
    base = RECIPES[RECIPE_OF_LOADER[loader["type"]]]
    network = read_reference_config(config)
    del network["num_labels"]  # depends on the data

    arguments = dict(loss.get("args", {}))
    reweight, reweight_ce = arguments.pop("reweight", True), arguments.pop("reweight_CE", False)
    scale = float(network.get("cosine_scale", NETWORK_DEFAULTS["cosine_scale"]))
    if _LOSSES[loss["type"]] in ("ride", "ldam"):  # the losses with margins
        arguments.setdefault("s", _MARGIN_SCALE)
    for name, constant in (_LOSS_CONSTANTS | {"s": scale}).items():
        if (value := arguments.pop(name, constant)) != constant:
            raise ConversionError(f"{loss['type']} has {name} {value}; here it is {constant:g} and cannot be set")
    unknown = sorted(set(arguments) - set(_LOSS_ARGUMENTS))
    if unknown:
        raise ConversionError(f"arguments {unknown} of {loss['type']} have no counterpart here")
    loss_options = dict(_LOSS_DEFAULTS[loss["type"]])
    loss_options |= {_LOSS_ARGUMENTS[name]: value for name, value in arguments.items()}
    if not reweight or loss_options["reweight_epoch"] == -1:
        loss_options["reweight_epoch"] = None
    kind = _LOSSES[loss["type"]]
    if kind == "ride" and not config.get("add_extra_info", False):
        kind = "cross_entropy"  # without the logits of each expert, their RIDE loss is cross-entropy
    elif kind == "ride" and loss_options["diversity_factor"] == 0:
        kind = "collaborative"  # without the diversity term their loss is this one
    elif kind == "cross_entropy" and reweight_ce:
        kind = "reweighted_cross_entropy"

    schedule = config.get("lr_scheduler", {})
    if schedule.get("type") not in _SCHEDULES:
        raise ConversionError(f"lr_scheduler {schedule.get('type')!r} is not one of {', '.join(_SCHEDULES)}")
    steps = schedule["args"]
    batch_size = loader["args"]["batch_size"]
    settings = optimizer["args"]
    return replace(
        base,
        name=config["name"],
        description=f"From the authors' configuration {config['name']!r}.",
        network=network,
        batch_size=batch_size,
        # their DataParallel gives each GPU an equal share of the batch
        batchformer_window=math.ceil(batch_size / max(1, config.get("n_gpu", 1))),
        epochs=config["trainer"]["epochs"],
        learning_rate=float(settings["lr"]),
        weight_decay=float(settings.get("weight_decay", 0.0)),
        momentum=float(settings.get("momentum", 0.0)),
        nesterov=settings.get("nesterov", False),
        schedule=_SCHEDULES[schedule["type"]],
        lr_steps=tuple(steps[name] for name in ("step1", "step2") if name in steps),
        lr_gamma=float(steps["gamma"]),
        warmup_epochs=steps.get("warmup_epoch", 0),
        loss=kind,
        batchformer_loss_weight=1.0,
        needs_teacher=loss["type"] == "RIDELossWithDistill",
        **loss_options,
    )


def read_recipe_file(path: Path) -> TrainingRecipe:
    """Reads a recipe from a file that `--print_recipe` printed, or from one of the authors' config.json files.

    Raises ValueError, with the file and the reason, if it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        if "model_type" in content:
            raise ValueError("it is a model's configuration; the recipe is in the recipe.json of the run")
        return recipe_from_reference(content) if "arch" in content else TrainingRecipe.from_json(content)
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from error
