"""The weights that a run starts from: those of another model."""

from collections.abc import Collection
from pathlib import Path

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.runs.models import load_model
from ride_bf.training.freezing import TRAINABLE_PARTS


def initialise_from(model: RideBfForImageClassification, folder: str | Path, new_parts: Collection[str] = ()) -> None:
    """Copies the weights of a saved model into `model`.

    What only the saved model has (a BatchFormer, say) is left out. `new_parts`, keys of `TRAINABLE_PARTS`, keep their
    initialisation, and so do the classifiers if the saved model's are of another number of classes. Raises ValueError
    listing anything else that does not fit.
    """
    start = load_model(folder)
    options = ("stem_type", "block_type", "depths", "hidden_sizes", "groups", "width_per_group", "num_experts")
    options += ("num_shared_stages", "classifier")
    differing = [
        f"{name} {getattr(start.config, name)} there, {getattr(model.config, name)} here"
        for name in options
        if getattr(start.config, name) != getattr(model.config, name)
    ]
    if differing:
        raise ValueError(f"{folder} is another network: {'; '.join(differing)}. Pass the options it was trained with")
    saved = start.state_dict()
    other_classes = saved["classifiers.0.weight"].shape[0] != model.config.num_labels
    new_parts = {*new_parts, "classifiers"} if other_classes else new_parts
    prefixes = tuple(prefix for part in new_parts for prefix in TRAINABLE_PARTS[part])
    wanted = {
        name: tensor for name, tensor in model.state_dict().items() if not (prefixes and name.startswith(prefixes))
    }
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [
        f"{name} is {tuple(saved[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{folder} is another network: {shown}")
    model.load_state_dict({name: saved[name] for name in wanted}, strict=False)
