"""Training a part of a network and leaving the rest as it is."""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from modeling_ride_bf import RideBfForImageClassification

# What a later stage of training may learn -> the prefixes of its parameters.
TRAINABLE_PARTS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "classifiers": ("classifiers.",),
    "class_scales": ("classifiers.",),
    "router": ("router.",),
}


def train_only(model: nn.Module, part: str) -> None:
    """Freezes every parameter outside `part`, a key of `TRAINABLE_PARTS`. Raises ValueError if the network has none."""
    prefixes = TRAINABLE_PARTS[part]
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        trained += parameter.requires_grad
    if not trained:
        raise ValueError(f"the network has no {part} to train")
    if part == "class_scales":
        _train_only_scales(model)


def _train_only_scales(model: nn.Module) -> None:
    """Learnable weight scaling: of each class's weights only the length learns. Kang et al., 2020, section 4.3.

    With w = f w0, a step of SGD on f moves w along w0 by its gradient's component on w0 times |w0|^2; so does a step
    on w with that gradient, momentum and weight decay included. The scale needs no parameter of its own, and what is
    saved is an ordinary classifier. Raises ValueError for cosine classifiers, which length does not change.
    """
    if model.config.classifier != "linear":
        raise ValueError("class_scales needs --classifier linear: a cosine classifier has no lengths to learn")
    for classifier in model.classifiers:
        classifier.bias.requires_grad_(False)
        start = classifier.weight.detach().clone()
        classifier.weight.register_hook(
            lambda gradient, start=start: (gradient * start.to(gradient)).sum(dim=1, keepdim=True) * start.to(gradient)
        )


def set_train_mode(model: nn.Module) -> None:
    """Like `model.train()`, but a normalisation whose parameters are frozen keeps its statistics too."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def check_exists(folder: str | Path) -> None:
    """Raises ValueError for what can only be a folder, not an id on the Hub, and is not there."""
    looks_local = Path(folder).is_absolute() or str(folder).startswith(".") or len(Path(folder).parts) > 2
    if looks_local and not Path(folder).is_dir():
        raise ValueError(f"{folder} does not exist, or is no folder")


def load_model(folder: str | Path) -> RideBfForImageClassification:
    """A saved model of ours, by folder or Hub id; code that comes with it is not run. Raises as `check_exists`."""
    check_exists(folder)
    return RideBfForImageClassification.from_pretrained(folder)


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


def load_teacher(folder: str | Path, class_names: Sequence[str]) -> PreTrainedModel:
    """An image classifier to learn from, of any kind that transformers loads; code that comes with it is run.

    Raises ValueError if its classes are not `class_names`, in that order; unnamed ones are taken on trust.
    """
    check_exists(folder)
    teacher = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    check_classes(teacher, class_names, f"the teacher {folder}")
    return teacher


def check_classes(model: PreTrainedModel, class_names: Sequence[str], who: str) -> None:
    """Raises ValueError if a model's classes are not `class_names`, in that order; unnamed ones are taken on trust.

    `who` is what the error calls the model.
    """
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    unnamed = names == [f"LABEL_{label}" for label in range(len(names))]
    if len(names) != len(class_names) or not (unnamed or names == list(class_names)):
        differing = [pair for pair in zip(names, class_names, strict=False) if pair[0] != pair[1]][:3]
        raise ValueError(
            f"{who} has {len(names)} classes, the data {len(class_names)}; the first that differ, the model's and the "
            f"data's: {differing}. It must know the same classes in the same order"
        )
