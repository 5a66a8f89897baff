"""Conversion of checkpoints of the authors' code (RIDE and BatchFormer) to this library's format and back.

The authors' file is read without executing anything in it. Pickled objects become inert placeholders. A file with
objects that the authors' code does not save is refused.
"""

import hashlib
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from tqdm.auto import tqdm

from configuration_ride_bf import RideBfConfig
from data import NUM_CLASSES, evaluation_processor
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.reference.configurations import (
    FOLDER_OF_LOADER,
    RECIPE_OF_LOADER,
    ConversionError,
    read_reference_config,
    reference_arch,
)

# Objects that their trainer pickles with the tensors: its configuration with paths, the criterion, the best accuracy.
_EXPECTED_OBJECTS = re.compile(
    r"parse_config\.ConfigParser"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|model\.loss\.\w+"
    r"|torch\.nn\.functional\.\w+|torch\.nn\.modules\.\w+\.\w+"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)|_codecs\.encode"
)


def _convert_block_part(name: str) -> str:
    """Renames conv1, bn1, conv2, ... to layers.0.convolution, layers.0.bn, ... and downsample.0, .1 to shortcut.*."""
    if match := re.fullmatch(r"(conv|bn)(\d)\.(\w+)", name):
        return f"layers.{int(match[2]) - 1}.{'convolution' if match[1] == 'conv' else 'bn'}.{match[3]}"
    if match := re.fullmatch(r"downsample\.([01])\.(\w+)", name):
        return f"shortcut.{'bn' if match[1] == '1' else 'convolution'}.{match[2]}"
    raise KeyError(name)


def convert_key(key: str, num_shared_stages: int) -> str:
    """Returns the name in `RideBfForImageClassification` of a parameter or buffer of the authors' networks.

    `key` must not start with `module.` or `backbone.`. Raises KeyError for a name that their networks do not have.
    """
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"ride_bf.trunk.stem.0.{'convolution' if match[1] == 'conv' else 'bn'}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", key):  # a shared stage, or a network with one expert
        stage, rest = int(match[1]) - 1, f"{match[2]}.{_convert_block_part(match[3])}"
        if stage < num_shared_stages:
            return f"ride_bf.trunk.stages.{stage}.{rest}"
        return f"ride_bf.experts.0.stages.{stage - num_shared_stages}.{rest}"
    if match := re.fullmatch(r"layer(\d)s\.(\d+)\.(\d+)\.(.+)", key):  # a stage of an expert
        stage = int(match[1]) - 1 - num_shared_stages
        return f"ride_bf.experts.{match[2]}.stages.{stage}.{match[3]}.{_convert_block_part(match[4])}"
    if match := re.fullmatch(r"linear\.(weight|bias)", key):
        return f"classifiers.0.{match[1]}"
    if match := re.fullmatch(r"linears\.(\d+)\.(weight|bias)", key):
        return f"classifiers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"encoder_layers\.layers\.(\d+)\.(.+)", key):
        return f"batchformer.layers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"encoder_layers\.(.+)", key):
        return f"batchformer.layers.0.{match[1]}"
    if match := re.fullmatch(r"expert_help_pred_hidden_fcs\.(\d+)\.(weight|bias)", key):
        return f"router.hidden_layers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"expert_help_pred_fcs\.(\d+)\.(weight|bias)", key):
        return f"router.output_layers.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"expert_help_pred_fc\.(weight|bias)", key):
        return f"router.output_layers.0.{match[1]}"
    raise KeyError(f"no parameter of the authors' networks is called {key!r}")


def convert_state_dict(reference: Mapping[str, Tensor], num_shared_stages: int, cosine: bool) -> dict[str, Tensor]:
    """Renames the authors' parameters and converts them to float32. Cosine weights (D, C) are transposed to (C, D).

    Raises ConversionError, with all unknown names, if their networks do not have a name.
    """
    check_names(reference)
    converted = {}
    for key, tensor in reference.items():
        name = convert_key(key, num_shared_stages)
        if cosine and name.startswith("classifiers."):
            tensor = tensor.t().contiguous()
        converted[name] = tensor.float() if tensor.is_floating_point() else tensor
    return converted


def check_names(reference: Mapping[str, Tensor]) -> None:
    """Raises ConversionError, with all unknown names, if the authors' networks do not have a name."""
    unknown = []
    for key in reference:
        try:
            convert_key(key, num_shared_stages=0)
        except KeyError:
            unknown.append(key)
    if unknown:
        raise ConversionError(f"the authors' networks do not have these {len(unknown)} names: {_some(unknown)}")


def _some(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Inert:
    """A placeholder for a pickled object of the authors. It keeps the pickled state and does nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


def _objects_asked_for(path: Path) -> set[str]:
    """Returns the names of objects in a file, beyond tensors and plain containers. Executes nothing."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    # Before torch 1.6 a checkpoint was five pickles followed by the storages.
    asked_for = set()
    with path.open("rb") as file:
        for _ in range(5):
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "STACK_GLOBAL":
                    raise pickle.UnpicklingError("it is pickled in a way that torch.save never used")
                if operation.name == "GLOBAL":
                    asked_for.add(argument.replace(" ", "."))
    own = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w+Storage")
    return {name for name in asked_for if not own.fullmatch(name)}


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Reads the network's tensors, without `module.` and `backbone.`, and the pickled configuration, if there is one.

    Executes nothing in the file. Raises ConversionError if the file is damaged, contains objects that the authors'
    trainer does not pickle, or is not one of their checkpoints.
    """
    damaged = f"{path} is damaged, cut off or not a torch checkpoint"
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                entry = archive.testzip()
            if entry is not None:
                raise zipfile.BadZipFile(f"the checksum of {entry} in it is wrong")
        asked_for = _objects_asked_for(path)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{damaged}: {error}") from error
    refused = sorted(name for name in asked_for if not _EXPECTED_OBJECTS.fullmatch(name))
    if refused:
        raise ConversionError(
            f"{path} asks for {_some(refused)}, which no checkpoint of the authors contains; it was not loaded"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in asked_for]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConversionError(f"{damaged}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ConversionError(f"{path} has no 'state_dict'; is it a checkpoint of the authors' trainer?")
    state = {
        re.sub(r"^(module\.)?(backbone\.)?", "", key): tensor
        for key, tensor in content["state_dict"].items()
        if isinstance(tensor, Tensor)
    }
    return state, _pickled_config(content.get("config"))


def _pickled_config(pickled: Any) -> dict | None:
    """Returns the plain values of a pickled ConfigParser, or None if there is none."""
    state = getattr(pickled, "state", pickled)
    config = state.get("_config", state) if isinstance(state, Mapping) else None
    return dict(config) if isinstance(config, Mapping) and "arch" in config else None


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infers options of `RideBfConfig` from the names and shapes of the authors' parameters.

    They determine everything but the use of the BatchFormer. Raises ConversionError, with the name, if a parameter is
    missing.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ConversionError(f"{key} is missing, but every such network of the authors has it")
        return state[key].shape

    blocks: dict[tuple[int, bool], set[int]] = {}  # (stage, whether it belongs to an expert) -> indices of its blocks
    for key in state:
        if match := re.match(r"layer(\d)\.(\d+)\.", key):
            blocks.setdefault((int(match[1]), False), set()).add(int(match[2]))
        elif match := re.match(r"layer(\d)s\.0\.(\d+)\.", key):
            blocks.setdefault((int(match[1]), True), set()).add(int(match[2]))
    stages = sorted({stage for stage, _ in blocks})
    if stages not in ([1, 2, 3], [1, 2, 3, 4]):
        raise ConversionError(f"the parameters have stages {stages}; the authors' networks have 1 to 3 or 1 to 4")
    cifar = shape("conv1.weight")[-1] == 3
    one_expert = "linear.weight" in state
    own = [stage for stage in stages if (stage, True) in blocks]
    shared = (1 if cifar else 2) if one_expert else len(stages) - len(own)

    def first_block(stage: int) -> str:
        return f"layer{stage}s.0.0" if stage in own else f"layer{stage}.0"

    bottleneck = f"{first_block(1)}.conv3.weight" in state
    last = "conv3" if bottleneck else "conv2"
    widths = [shape(f"{first_block(stage)}.{last}.weight")[0] // (4 if bottleneck else 1) for stage in stages]
    inner, per_group = shape(f"{first_block(1)}.conv2.weight")[:2]
    classifier = "linear" if one_expert else "linears.0"
    cosine = f"{classifier}.bias" not in state
    classes = shape(f"{classifier}.weight")[1 if cosine else 0]
    experts = 1 if one_expert else 1 + max(int(m[1]) for m in map(re.compile(r"linears\.(\d+)").match, state) if m)
    options: dict[str, Any] = {
        "stem_type": "cifar" if cifar else "imagenet",
        "block_type": "bottleneck" if bottleneck else "basic",
        "depths": [1 + max(blocks[stage, stage in own]) for stage in stages],
        "hidden_sizes": widths,
        "num_experts": experts,
        "num_shared_stages": shared,
        "classifier": "cosine" if cosine else "linear",
        "num_labels": classes,
    }
    if bottleneck and inner != per_group:
        options |= {"groups": inner // per_group, "width_per_group": per_group * 64 // widths[0]}
    encoder = [key for key in state if key.startswith("encoder_layers.")]
    if encoder:
        layers = {match[1] for key in encoder if (match := re.match(r"encoder_layers\.layers\.(\d+)\.", key))}
        options["batchformer_num_layers"] = len(layers) or 1
    if any(key.startswith("expert_help_pred") for key in state):
        together = "expert_help_pred_fc.weight" in state
        hidden = shape("expert_help_pred_hidden_fcs.0.weight")[0]
        inputs = shape("expert_help_pred_fc.weight" if together else "expert_help_pred_fcs.0.weight")[1]
        options |= {
            "router": True,
            "router_hidden_size": hidden,
            "router_top_k": inputs - hidden,
            "router_shared_output": together,
        }
    return options


def reference_options(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, batchformer: str | None
) -> dict[str, Any]:
    """Returns options of `RideBfConfig` for a checkpoint, from its parameters and, if there is one, its configuration.

    Raises ConversionError if the two contradict each other, with all contradictions, or if neither determines how the
    BatchFormer is used.
    """
    check_names(state)
    inferred = infer_options(state)
    told: dict[str, Any] = {}
    if config is not None:
        if batchformer is not None:  # the user's choice overrides add_bt
            arch = {**config["arch"], "args": {**config["arch"].get("args", {}), "add_bt": 0}}
            config = {**config, "arch": arch}
        told = read_reference_config(config)
    if batchformer is not None:
        told["batchformer"] = batchformer
    comparable = {"router": False, "groups": 1, "width_per_group": 64} | inferred
    wrong = [
        f"{name}: {told[name]} there, {value} in the weights"
        for name, value in comparable.items()
        if name in told and told[name] != value
    ]
    has_encoder = "batchformer_num_layers" in inferred
    if told.get("batchformer", "none") != "none" and not has_encoder:
        wrong.append(f"batchformer: {told['batchformer']} there, no encoder in the weights")
    if wrong:
        raise ConversionError(f"the configuration does not match these weights: {'; '.join(wrong)}")
    if has_encoder and told.get("batchformer", "none") == "none":
        raise ConversionError(
            "the weights have a BatchFormer, and nothing says how it was trained: name the run's config.json with "
            "--config, or pass --batchformer insert (add_bt 1, 12, 13) or --batchformer shared_classifier (32, 33)"
        )
    return {**inferred, **{name: told[name] for name in ("batchformer", "cosine_scale") if name in told}}


def build_model(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> RideBfForImageClassification:
    """Builds our network with the authors' parameters. Raises ConversionError if their names or shapes do not fit."""
    config = RideBfConfig(**options)
    converted = convert_state_dict(state, config.num_shared_stages, cosine=config.classifier == "cosine")
    with torch.device("meta"):  # without memory: the tensors of the file are assigned below
        model = RideBfForImageClassification(config)
    expected = model.state_dict()
    counters = [name for name in expected if name.endswith("num_batches_tracked") and name not in converted]
    problems = [f"missing {name}" for name in expected if name not in converted and name not in counters]
    problems += [f"unknown {name}" for name in converted if name not in expected]
    problems += [
        f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise ConversionError(f"{len(problems)} parameters do not fit (by our names): {_some(problems)}")
    for name in counters:  # old torch versions did not save them; nothing depends on them
        converted[name] = torch.zeros((), dtype=torch.long)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def image_settings(options: Mapping[str, Any], config: Mapping[str, Any] | None) -> TrainingRecipe:
    """Returns the recipe with the checkpoint's evaluation images, by its data loader or else by its classes."""
    loader = (config or {}).get("data_loader", {}).get("type")
    if loader in RECIPE_OF_LOADER:
        return RECIPES[RECIPE_OF_LOADER[loader]]
    if options["stem_type"] == "cifar":
        return RECIPES["cifar100_lt_resnet32"]
    return RECIPES["inaturalist18_resnet50" if options["num_labels"] == 8142 else "imagenet_lt_resnet50"]


def convert(path: Path, output_dir: Path, config_path: Path | None = None, batchformer: str | None = None) -> None:
    """Writes a folder that `from_pretrained` loads. Raises ConversionError before anything is written."""
    steps = tqdm(total=4, desc="reading")
    state, pickled = read_checkpoint(path)
    beside = path.parent / "config.json"
    config = pickled
    if config_path is not None or beside.is_file():
        source = config_path or beside
        try:
            config = json.loads(source.read_text())
            if "model_type" in config:
                raise ValueError("it is of this library; a converted model has theirs as reference_config.json")
            config["arch"]["type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{source} is no configuration of the authors' code: {error!r}") from error
    steps.update()
    steps.set_description("converting")
    options = reference_options(state, config, batchformer)
    if (config or {}).get("arch", {}).get("args", {}).get("eval_bt"):
        warnings.warn(
            "config.json has eval_bt: the authors' code then uses the BatchFormer in evaluation too, so a prediction "
            "depends on its batch. This library never does, so results will differ from theirs",
            stacklevel=2,
        )
    model = build_model(state, options)
    recipe = image_settings(options, config)
    steps.update()
    steps.set_description("writing")
    model.save_pretrained(output_dir)
    evaluation_processor(recipe.resize_size, recipe.image_size, recipe.image_mean, recipe.image_std).save_pretrained(
        output_dir
    )
    if config is not None:  # needed to convert back
        (output_dir / "reference_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    steps.update()
    steps.set_description("hashing")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _model_card(path.name, digest, model.config).save(output_dir / "README.md")
    steps.update()
    steps.close()


def _model_card(file_name: str, digest: str, config: RideBfConfig) -> ModelCard:
    data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=["long-tailed"])
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# RIDE{"" if config.batchformer == "none" else " + BatchFormer"}, converted from a checkpoint of the authors' code

Source file: `{file_name}`, SHA-256 `{digest}`.
{config.num_experts} expert(s), {config.num_labels} classes, depths {config.depths}, {config.classifier} classifier,
BatchFormer "{config.batchformer}"{", with a router" if config.router else ""}. This file has not been evaluated.

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("this folder", trust_remote_code=True)
```

Methods: [RIDE](https://arxiv.org/abs/2010.01809), [BatchFormer](https://arxiv.org/abs/2203.01522).
"""
    )


def _reference_key(name: str, config: RideBfConfig) -> str:
    """Returns the authors' name of one of our parameters. Inverse of `convert_key`."""
    parts = name.split(".")
    multi = config.num_experts > 1

    def block(inner: list[str]) -> str:
        if inner[0] == "layers":
            return f"{'conv' if inner[2] == 'convolution' else 'bn'}{int(inner[1]) + 1}.{inner[3]}"
        return f"downsample.{0 if inner[1] == 'convolution' else 1}.{inner[2]}"

    if name.startswith("ride_bf.trunk.stem."):
        return f"{'conv1' if parts[4] == 'convolution' else 'bn1'}.{parts[5]}"
    if name.startswith("ride_bf.trunk.stages."):
        return f"layer{int(parts[3]) + 1}.{parts[4]}.{block(parts[5:])}"
    if name.startswith("ride_bf.experts."):
        stage = int(parts[4]) + 1 + config.num_shared_stages
        prefix = f"layer{stage}s.{parts[2]}" if multi else f"layer{stage}"
        return f"{prefix}.{parts[5]}.{block(parts[6:])}"
    if parts[0] == "classifiers":
        return f"linears.{parts[1]}.{parts[2]}" if multi else f"linear.{parts[2]}"
    if parts[0] == "batchformer":
        layer = "" if config.batchformer_num_layers == 1 else f"layers.{parts[2]}."
        return f"encoder_layers.{layer}{'.'.join(parts[3:])}"
    if name.startswith("router.hidden_layers."):
        return f"expert_help_pred_hidden_fcs.{parts[2]}.{parts[3]}"
    if config.router_shared_output:
        return f"expert_help_pred_fc.{parts[3]}"
    return f"expert_help_pred_fcs.{parts[2]}.{parts[3]}"


def to_reference(folder: Path, output_dir: Path) -> None:
    """Writes `model_best.pth` and `config.json` for the authors' `test.py`.

    Raises ConversionError, before anything is written, if their code cannot build the network.
    """
    model = RideBfForImageClassification.from_pretrained(folder)
    config = model.config
    arch = reference_arch(config)
    state = {}
    for name, tensor in tqdm(model.state_dict().items(), desc="converting"):
        if config.classifier == "cosine" and name.startswith("classifiers."):
            tensor = tensor.t().contiguous()
        state[f"backbone.{_reference_key(name, config)}"] = tensor
    kept = folder / "reference_config.json"
    theirs = json.loads(kept.read_text()) if kept.is_file() else {}
    reference = _default_reference_config(folder, arch) | theirs
    reference["n_gpu"] = 1  # for more GPUs their test.py wraps the network and expects other names
    if "data_loader" not in theirs and config.num_labels not in _classes_of_loaders().values():
        known = ", ".join(f"{loader} ({count:,})" for loader, count in _classes_of_loaders().items())
        warnings.warn(
            f"the authors' code has no data loader for {config.num_labels:,} classes, only {known}. Their network "
            f"can load these weights, but their test.py cannot run: config.json has {reference['data_loader']['type']}",
            stacklevel=2,
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(reference, indent=4) + "\n")
    content = {"arch": arch["type"], "epoch": 0, "state_dict": state, "monitor_best": 0, "config": reference}
    torch.save(content, output_dir / "model_best.pth")


def _classes_of_loaders() -> dict[str, int]:
    """Returns the number of classes that each of the authors' data loaders expects."""
    return {loader: NUM_CLASSES[RECIPES[recipe].dataset] for loader, recipe in RECIPE_OF_LOADER.items()}


def _default_reference_config(folder: Path, arch: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration in the authors' format for a network that was trained here.

    Its data set is the one with the same number of classes. Its other values are those of that data set's recipe.
    """
    other = "ImbalanceCIFAR100DataLoader" if "layer2_output_dim" in arch["args"] else "ImageNetLTDataLoader"
    classes = arch["args"]["num_classes"]
    loader = next((loader for loader, count in _classes_of_loaders().items() if count == classes), other)
    recipe = RECIPES[RECIPE_OF_LOADER[loader]]
    first, second = recipe.lr_steps
    return {
        "name": folder.name,
        "n_gpu": 1,
        "arch": arch,
        "data_loader": {
            "type": loader,
            "args": {
                "data_dir": FOLDER_OF_LOADER[loader],
                "batch_size": recipe.batch_size,
                "shuffle": True,
                "num_workers": 2,
            },
        },
        "optimizer": {
            "type": "SGD",
            "args": {
                "lr": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
                "momentum": recipe.momentum,
                "nesterov": recipe.nesterov,
            },
        },
        "add_extra_info": True,
        "loss": {
            "type": "RIDELoss",
            "args": {
                "additional_diversity_factor": recipe.diversity_factor,
                "reweight": True,
                "reweight_factor": recipe.reweight_factor,
                "reweight_epoch": recipe.reweight_epoch,
            },
        },
        "metrics": ["accuracy"],
        "lr_scheduler": {
            "type": "CustomLR",
            "args": {
                "step1": first,
                "step2": second,
                "gamma": recipe.lr_gamma,
                "warmup_epoch": recipe.warmup_epochs,
            },
        },
        "trainer": {
            "epochs": recipe.epochs,
            "save_dir": "saved/",
            "save_period": recipe.epochs,
            "verbosity": 2,
            "monitor": "max val_accuracy",
            "tensorboard": False,
        },
    }
