"""Loads saved models by folder or Hub id."""

import hashlib
import pickle
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from configuration_ride_bf import RideBfConfig
from data.hub_ids import is_hub_id, refuse_missing
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.runs.checkpoints import BEST, LAST, damage, is_checkpoint

# Errors of transformers, torch and safetensors for files that are missing, damaged or of another model, and for
# missing packages
_LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, ImportError),
    *(SafetensorError, pickle.UnpicklingError, StrictDataclassError),
)


def check_exists(folder: str | Path) -> None:
    """Raises ValueError if the name is neither a folder on this machine nor a valid Hub id.

    A name whose parent is a folder here is meant as a folder, although it could be an id, so the Hub is not asked.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file; name the folder of a saved model")
    refuse_missing(folder)
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ValueError(f"{folder} does not exist, and it is not a valid Hub id; name a folder or USER/NAME")


def find_model(place: str | Path) -> Path | str:
    """The folder of a saved model. In a run's output folder this is `best`, or `last` if there is no `best`.

    A `place` that is not a folder is returned as a Hub id. Raises ValueError for a folder without a model, and for a
    `place` that `check_exists` rejects.
    """
    check_exists(place)
    folder = Path(place)
    if not folder.is_dir():
        return str(place)
    for candidate in (folder, folder / BEST, folder / LAST):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{folder} holds no model: there is no config.json. Name a run's output folder, or a checkpoint in it such as "
        "best"
    )


def changeable_folder(model: Path | str) -> Path:
    """The folder of a model whose config.json a command may change.

    Raises ValueError for a model on the Hub, and for a config.json that is a link: writing through it would change the
    Hub's cache, or another place that counts on the file.
    """
    if not isinstance(model, Path):
        raise ValueError(f"{model}, on the Hub, cannot be changed; hf download {model} --local-dir DIR, and name DIR")
    if (config := model / "config.json").is_symlink():
        raise ValueError(
            f"{config} is a link to {config.resolve()}, which would change too; copy the files themselves, "
            f"{shlex.join(['cp', '-rL', str(model)])} DIR, and name DIR"
        )
    return model


def results_folder(model: Path | str) -> Path:
    """The folder for the results of a model: its own folder, or outputs/NAME for a model from the Hub."""
    return model if isinstance(model, Path) else Path("outputs") / model.replace("/", "_")


def load_model(
    place: str | Path, dtype: torch.dtype | str = torch.float32, **options: Any
) -> RideBfForImageClassification:
    """Loads a RIDE + BatchFormer model from the folder of a checkpoint or a run, or by Hub id.

    Code that comes with the model is not run. The memory layout is that of training, so the logits of an image are
    equal bit for bit. `dtype` "auto" is that of the file. `options` override the model's configuration. Raises
    ValueError, with one line, for files that are missing, damaged or of another kind of model.
    """
    place = find_model(place)
    load_config(place)
    with loading_errors(place):
        # transformers only warns about missing weights, and initialises them at random.
        model, report = RideBfForImageClassification.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        check_weights(report, leftovers=True)
    model.keeps_page = False  # a checkpoint has none, and ride_bf.publish makes one
    return to_fast_layout(model)


def load_config(place: str | Path) -> RideBfConfig:
    """Loads the configuration of a saved model. Raises ValueError, with one line, as `load_model` does."""
    place = find_model(place)
    with loading_errors(place):
        config, _ = RideBfConfig.get_config_dict(place)
        if not isinstance(config, dict) or config.get("model_type") != RideBfConfig.model_type:
            kind = config.get("model_type") if isinstance(config, dict) else None
            raise ValueError(
                f"its config.json is of a {kind or 'nameless'} model, not of a {RideBfConfig.model_type} model"
            )
        return RideBfConfig.from_pretrained(place)


def check_weights(report: dict, leftovers: bool = False) -> None:
    """Raises ValueError if weights are missing or have another shape, by the loading info of `from_pretrained`.

    With `leftovers`, weights that the network does not have are an error too.
    """
    wrong = [
        ("are missing", sorted(report["missing_keys"])),
        ("have another shape", sorted(str(key[0]) for key in report["mismatched_keys"])),
        ("are left over", sorted(report["unexpected_keys"]) if leftovers else []),
    ]
    problems = [
        f"{len(names)} weights {what}, such as {names[0]}" if len(names) > 1 else f"the weights {names[0]} {what}"
        for what, names in wrong
        if names
    ]
    if problems:
        raise ValueError(f"weights and config.json are of different networks: {'; '.join(problems)}")


def load_processor(place: str | Path) -> BaseImageProcessor:
    """Loads the image processor saved beside a model. Raises ValueError if it is missing or damaged."""
    place = find_model(place)
    with loading_errors(place):
        return AutoImageProcessor.from_pretrained(place)


@contextmanager
def loading_errors(place: Path | str) -> Iterator[None]:
    """Turns errors of loading a model into a ValueError of one line that names the file and a remedy."""
    try:
        yield
    except _LOADING_ERRORS as error:
        reason, remedy = _one_line(error), "Copy it again, or name another checkpoint"
        if not isinstance(place, Path):
            remedy = (
                f"Check the id and the connection to the Hub. Download it again: hf download {place} --force-download"
            )
        elif not isinstance(
            error, (ValueError, ImportError, StrictDataclassError)
        ):  # these errors already say what is wrong
            reason = _damaged_file(place) or reason
        raise ValueError(f"{place} cannot be loaded: {reason}. {remedy}") from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError):
        error = error.__cause__ or error  # the outer error names the validator only
    if isinstance(error, pickle.UnpicklingError):  # torch's own message tells how to have it executed
        return "it holds something other than weights"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _damaged_file(folder: Path) -> str | None:
    """Which file of a model is damaged, and how; None if no damage is found."""
    if is_checkpoint(folder) and (problem := damage(folder)) and "cannot be read" not in problem:
        return problem
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        with path.open("rb") as file:
            if file.read(16) == b"version https://":
                return f"{path.name} is a Git LFS pointer, not the file itself; get the file with git lfs pull"
        try:
            if path.suffix == ".bin":
                torch.load(path, map_location="cpu", weights_only=True)
            else:
                with safe_open(path, "pt"):
                    pass
        except Exception as error:  # any error means that this file is damaged
            return f"{path.name} ({path.stat().st_size:,} bytes) is cut off or damaged ({_one_line(error)})"
    return None


def class_names(config: PreTrainedConfig) -> list[str] | None:
    """Names of a model's classes (C,), in the order of its logits; None if they are LABEL_0, ...."""
    names = [str(config.id2label.get(label, f"LABEL_{label}")) for label in range(config.num_labels)]
    return None if names == [f"LABEL_{label}" for label in range(len(names))] else names


def check_classes(model: PreTrainedModel, names: Sequence[str], who: str) -> None:
    """Raises ValueError unless the classes of a model are `names`, in that order.

    Of classes without names only the number is checked. The error calls the model `who`.
    """
    own = class_names(model.config)
    if model.config.num_labels != len(names) or (own is not None and own != list(names)):
        differing = [pair for pair in zip(own or [], names, strict=False) if pair[0] != pair[1]][:3]
        raise ValueError(
            f"{who} has {model.config.num_labels} classes, the data {len(names)}; the first that differ, as (model, "
            f"data): {differing}. The model must have the same classes in the same order"
        )


def to_fast_layout(module: nn.Module) -> nn.Module:
    """Changes the weights of convolutions to channels_last, for faster kernels. Returns the module itself.

    Pixel values may have either layout; the feature maps follow the weights.
    """
    return module.to(memory_format=torch.channels_last)


def weights_digest(module: nn.Module) -> str:
    """A digest of the parameters and buffers of a module."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
