"""Pre-trained backbones: where their weights and their image processors come from."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BitImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from configuration_ride_bf import BACKBONE_OPTIONS, RideBfConfig
from data import prepared_size
from data.hub_ids import is_hub_id, refuse_missing
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.models import check_weights, find_model, load_config, load_processor

_GREY_LEVELS = 3  # by which a converted processor may differ from the original, from rounding at another place


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A pre-trained vision model and how it sees images.

    Attributes:
        place: Hub id or folder.
        config: its configuration; of a two-tower model that of the vision tower.
        processor: its image processor, in the form that this library saves.
        other_size: whether the processor makes images of another size than the model came with.
        model: what `AutoModel.from_pretrained` gives; None for the backbone of a model of this library, whose weights
            `ride_bf.training.start_weights` copies.
    """

    place: str
    config: PreTrainedConfig
    processor: BitImageProcessor
    other_size: bool = False
    model: PreTrainedModel | None = None

    def prepare_images(self, image_size: int | None, crop: str) -> "Backbone":
        """A copy that takes images of this size and crop, the options of a recipe."""
        processor = resized(self.processor, image_size)
        if crop == "whole":
            processor = without_crop(processor)
        other_size = prepared_size(processor) != prepared_size(self.processor)
        return replace(self, processor=processor, other_size=other_size)


def load_backbone(place: str) -> Backbone:
    """Loads a pre-trained vision model by its Hub id or folder, and its image processor.

    Raises ValueError, with the remedy, for a model that is not there, private, gated, damaged or no vision model, and
    for a missing package.
    """
    described, _ = from_place(place, lambda name: PreTrainedConfig.get_config_dict(_folder_of_model(name)))
    if described.get("model_type") == RideBfConfig.model_type:
        config = load_config(place)
        if config.backbone_config is None:
            raise ValueError(f"{place} is a residual network of this library: start from it with --init_from")
        return Backbone(place=place, config=config.backbone_config, processor=load_processor(place))
    # Otherwise transformers would ask on the terminal whether it may run the code of a repository.
    config = from_place(place, lambda name: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if isinstance(vision := getattr(config, "vision_config", None), PreTrainedConfig):
        config = vision
    with _without_report():
        model, report = from_place(
            place, lambda name: AutoModel.from_pretrained(name, config=config, output_loading_info=True)
        )
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(
            f"{place} is a {model.config.model_type} model, which does not read images; name a vision model, such as "
            "facebook/dinov2-small or timm/resnet50.a1_in1k"
        )
    report["missing_keys"] = [name for name in report["missing_keys"] if not _is_unused(name)]
    try:
        check_weights(report)
    except ValueError as error:
        raise ValueError(f"the backbone {place} is damaged: {error}; download it again") from error
    # timm's processor is of one kind, and transformers would warn about the other
    kind = {"backend": "pil"} if model.config.model_type == "timm_wrapper" else {}
    original = from_place(place, lambda name: AutoImageProcessor.from_pretrained(name, **kind))
    processor = as_bit_processor(original, place)
    return Backbone(place=place, config=model.config, processor=processor, model=model.float().eval())


@torch.no_grad()
def check_image_size(model: RideBfForImageClassification, backbone: Backbone) -> None:
    """Raises ValueError for a network that cannot take images of the size that the processor makes."""
    height, width = prepared_size(backbone.processor)
    try:
        model.eval()(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"the backbone {backbone.place} cannot take images of {height} x {width} pixels: {said}; leave out "
            "--image_size, or give a size that it takes"
        ) from error


def with_backbone_of(place: str, recipe: TrainingRecipe, **options: Any) -> TrainingRecipe:
    """The recipe with the backbone of a saved model of this library, and its options; unchanged if neither has one.

    `options` of the recipe replace those that come with the backbone. Raises ValueError for a recipe with a backbone
    and a model without.
    """
    config = load_config(place)
    if config.backbone_config is None:
        if recipe.backbone is not None:
            raise ValueError(
                f"{place} is a residual network, and the recipe {recipe.name} is for a backbone; give the --recipe of "
                "that network"
            )
        return recipe
    inherited = {
        name: getattr(config, name)
        for name in BACKBONE_OPTIONS
        if name != "backbone_config" and name not in recipe.network
    }
    return recipe.with_overrides(backbone=str(place), **inherited, **options)


def with_drop_path(backbone: Backbone, rate: float | None) -> Backbone:
    """The backbone with another rate of stochastic depth, in its configuration's own field; None changes nothing.

    Raises ValueError for a family without stochastic depth.
    """
    if rate is None:
        return backbone
    config = copy.deepcopy(backbone.config)
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "drop_path_rate": rate}
    elif hasattr(config, "drop_path_rate"):
        config.drop_path_rate = rate
    if rate > 0 and not _drops_paths(config):
        name = getattr(config, "architecture", config.model_type)
        raise ValueError(f"--drop_path {rate:g} cannot act: the backbone {name} has no stochastic depth; leave it out")
    return replace(backbone, config=config)


def _drops_paths(config: PreTrainedConfig) -> bool:
    """Whether a backbone of this configuration has stochastic depth. Not every network of timm takes a rate."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except TypeError:
        return False
    return any(type(module).__name__.endswith("DropPath") for module in model.modules())


def _folder_of_model(place: str) -> str:
    """The place; for a run's output folder, that of its checkpoint."""
    return str(find_model(place)) if os.path.isdir(place) else place


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers from listing, line by line, the weights that a part of a model does not need."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_unused(name: str) -> bool:
    """Whether a weight may be missing: ViT's dense pooler is in few files, and its features are not used by default."""
    return name.startswith("pooler.")


def from_place(place: str, load: Callable[[str], Any]) -> Any:
    """Returns `load(place)`, from a Hub id or folder. Raises ValueError with what is wrong and the remedy."""
    is_folder = os.path.isdir(place)
    if not is_folder and (Path(place).is_absolute() or place.startswith(".") or not is_hub_id(place)):
        raise ValueError(
            f"the backbone {place} is neither a folder nor an id on the Hub, such as facebook/dinov2-small"
        )
    refuse_missing(place)
    try:
        return load(place)
    except ImportError as error:
        package = "timm" if "timm" in str(error) else getattr(error, "name", None) or "a package"
        raise ValueError(f"the backbone {place} needs {package}: pip install {package}") from error
    except (OSError, ValueError, HfHubHTTPError, KeyError) as error:
        raise _why(place, error, is_folder) from error


class UnreachableError(ValueError):
    """A backbone is not on this machine, and the Hub cannot be reached."""


def _why(place: str, error: Exception, is_folder: bool) -> ValueError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    causes = [error, error.__cause__, error.__context__]
    if "trust_remote_code" in str(error):
        return ValueError(
            f"the backbone {place} has code of its own, which is not run here; name a model of transformers or timm"
        )
    if is_folder:
        return ValueError(f"the backbone in {place} cannot be loaded: {said}")
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
        return ValueError(
            f"the backbone {place} is gated: accept its terms at https://huggingface.co/{place}, and log in with "
            "`hf auth login`"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ValueError(f"the Hub has no public model {place}; if it is private, log in with `hf auth login`")
    offline = any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes)
    if offline or "couldn't connect" in str(error) or "We couldn't" in str(error):
        return UnreachableError(
            f"the backbone {place} is not in the cache, and the Hub cannot be reached; download it once: hf download "
            f"{place}; or name a folder: --backbone FOLDER"
        )
    return ValueError(f"the backbone {place} cannot be loaded: {said}")


def as_bit_processor(processor: Any, place: str) -> BitImageProcessor:
    """Describes any family's processor as a `BitImageProcessor`: resize, crop, rescale, normalise.

    So every saved model has a processor that transformers alone loads, and training reads images as it does. Raises
    ValueError for a processor that does something else, by comparing both on an image.
    """
    kind = type(processor).__name__
    if kind == "TimmWrapperImageProcessor":
        options = _of_timm(processor.data_config)
    elif kind.startswith("ConvNext"):
        options = _of_convnext(processor)
    else:
        size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
        if kind.startswith("Siglip2"):  # it keeps the proportions; whole square images are what its training saw
            side = processor.patch_size * int(processor.max_num_patches**0.5)
            size = {"height": side, "width": side}
        options = {
            "size": _given(size),
            "crop_size": _given(crop) or None,
            "do_resize": bool(getattr(processor, "do_resize", True)),
            "do_center_crop": bool(getattr(processor, "do_center_crop", False)),
            "resample": getattr(processor, "resample", PILImageResampling.BILINEAR),
        }
        for name in ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor"):
            if getattr(processor, name, None) is not None:
                options[name] = getattr(processor, name)
    converted = BitImageProcessor(**options)
    if not kind.startswith("Siglip2"):
        _check_same_pixels(processor, converted, place)
    return converted


def _given(size: dict) -> dict[str, int]:
    return {name: value for name, value in size.items() if value}


def _of_timm(config: dict[str, Any]) -> dict[str, Any]:
    _, height, width = config["input_size"]
    scaled = [int(np.floor(side / config["crop_pct"])) for side in (height, width)]
    square = height == width
    whole = config["crop_mode"] == "squash" or not square
    return {
        "size": {"height": scaled[0], "width": scaled[1]} if whole else {"shortest_edge": scaled[0]},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "resample": PILImageResampling[config["interpolation"].upper()],
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }


def _of_convnext(processor: Any) -> dict[str, Any]:
    side = processor.size["shortest_edge"]
    options = {name: getattr(processor, name) for name in ("resample", "image_mean", "image_std")}
    if side >= 384:  # it squeezes the whole image
        return options | {"size": {"height": side, "width": side}, "do_center_crop": False, "crop_size": None}
    resized = {"shortest_edge": int(side / processor.crop_pct)}
    return options | {"size": resized, "do_center_crop": True, "crop_size": {"height": side, "width": side}}


def _check_same_pixels(processor: Any, converted: BitImageProcessor, place: str) -> None:
    """Raises ValueError unless both processors make the same of an image, to `_GREY_LEVELS`."""
    from PIL import Image

    across, down = np.linspace(0, 255, 400), np.linspace(0, 255, 300)
    pixels = np.stack(np.broadcast_arrays(across[None], down[:, None], (across[None] + down[:, None]) / 2), axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    theirs, ours = (own(image, return_tensors="pt")["pixel_values"] for own in (processor, converted))
    tolerance = _GREY_LEVELS / 255 / min(converted.image_std)
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > tolerance:
        raise ValueError(
            f"the image processor of {place}, a {type(processor).__name__}, does more than resize, crop and normalise; "
            "save the model with a BitImageProcessor that has its values"
        )


def resized(processor: BitImageProcessor, image_size: int | None) -> BitImageProcessor:
    """A copy of a processor that makes square images of another side; the margin of its crop grows with it."""
    if image_size is None:
        return processor
    described = processor.to_dict()
    crop = described.get("crop_size") if processor.do_center_crop else None
    size = _given(dict(described["size"]))
    old = (crop or size).get("height") or size["shortest_edge"]
    described["size"] = {name: round(value * image_size / old) for name, value in size.items()}
    if crop:
        described["crop_size"] = {"height": image_size, "width": image_size}
    return BitImageProcessor.from_dict(described)


def without_crop(processor: BitImageProcessor) -> BitImageProcessor:
    """A copy of a processor that squeezes the whole image into its square, and cuts off nothing."""
    height, width = prepared_size(processor) or (processor.size["shortest_edge"],) * 2
    size = {"height": height, "width": width}
    described = {"do_resize": True, "size": size, "do_center_crop": False, "crop_size": None}
    return BitImageProcessor.from_dict({**processor.to_dict(), **described})


def processor_facts(processor: BitImageProcessor) -> dict[str, Any]:
    """The options of a recipe that a processor decides."""
    size, crop = processor.size, processor.crop_size
    resize = size.get("shortest_edge") or size.get("height")
    side = crop["height"] if processor.do_center_crop else size.get("height") or resize
    return {
        "image_size": int(side),
        "resize_size": int(max(resize, side)),
        "image_mean": tuple(map(float, processor.image_mean)),
        "image_std": tuple(map(float, processor.image_std)),
    }
