"""Starts a run from the weights of another model."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configuration_ride_bf import RESIDUAL_OPTIONS, RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.models import class_names, load_model
from ride_bf.training.freezing import TRAINABLE_PARTS

_SHOWN = 5  # number of names in a message


@dataclass(frozen=True)
class StartedFrom:
    """What `initialise_from` did.

    Attributes:
        place: the saved model.
        rule: how classes were matched. "name": by their names; "place": by their order, if they have no names and the
            numbers of classes are equal; "none": not at all.
        copied: number of classes whose weights were copied, in every expert's classifier.
        new: names of the classes that start with new weights.
    """

    place: str
    rule: str
    copied: int
    new: list[str]

    def __str__(self) -> str:
        how = {
            "name": "by their names",
            "place": "by their order, because its classes have no names",
            "none": "because its classes have no names and their number differs",
        }
        shown = ", ".join(self.new[:_SHOWN]) + (", ..." if len(self.new) > _SHOWN else "")
        new = f"; {len(self.new)} start with new weights: {shown}" if self.new else ""
        total = self.copied + len(self.new)
        return f"Started from {self.place}: {self.copied} of {total} classes were copied {how[self.rule]}{new}"


def initialise_from(
    model: RideBfForImageClassification, place: str | Path, new_parts: Collection[str] = ()
) -> StartedFrom:
    """Copies the weights of a saved model into `model`.

    Parts that only the saved model has, such as a BatchFormer, are left out. The weights of a class are copied from
    the class of the same name, in any order; a new class keeps its initialisation. So do `new_parts`, keys of
    `TRAINABLE_PARTS`. Raises ValueError that lists anything else that does not fit, and with one line for files that
    are missing, damaged or of another kind of model.
    """
    start = load_model(place)
    there, here = _network(start.config), _network(model.config)
    differing = [f"{name} {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    if differing:
        raise ValueError(f"{place} is another network: {'; '.join(differing)}. Pass the options it was trained with")
    saved, own = start.state_dict(), model.state_dict()
    rule, here, there = _same_classes(model, start)
    for name in own:
        if name.startswith("classifiers.") and name in saved:  # weight (C, D) or bias (C,) of an expert's classifier
            moved = own[name].clone()
            moved[here] = saved[name][there].to(moved)
            saved[name] = moved
    prefixes = tuple(prefix for part in new_parts for prefix in TRAINABLE_PARTS[part])
    wanted = {name: tensor for name, tensor in own.items() if not (prefixes and name.startswith(prefixes))}
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [
        f"{name} is {tuple(saved[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{place} is another network: {shown}")
    model.load_state_dict({name: saved[name] for name in wanted}, strict=False)
    copied = set() if "classifiers" in new_parts else set(here.tolist())
    names = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]
    return StartedFrom(str(place), rule, len(copied), [name for label, name in enumerate(names) if label not in copied])


def check_frozen_classes(started: StartedFrom, recipe: TrainingRecipe) -> None:
    """Raises ValueError if there are new classes and the recipe does not train their weights."""
    if started.new and recipe.train_only in ("router", "class_scales"):
        raise ValueError(
            f"train_only {recipe.train_only!r} needs a model that knows all classes, but {started.place} does not know "
            f"{len(started.new)} of them, such as {started.new[0]}; if only their names differ, give both runs the "
            "same --class_names"
        )


def _network(config: RideBfConfig) -> dict[str, Any]:
    """What must be equal for weights to fit. Of a backbone it is the family: the shapes of its weights say the rest."""
    options = {name: getattr(config, name) for name in (*RESIDUAL_OPTIONS, "num_experts", "classifier")}
    backbone = config.backbone_config
    return options | {
        "backbone_config": None if backbone is None else backbone.model_type,
        "backbone_pooling": config.pooling,
        "num_expert_layers": config.num_expert_layers,
        "expert_adapter_size": config.expert_adapter_size,
        "standardise_features": config.standardise_features,
    }


def _same_classes(
    model: RideBfForImageClassification, start: RideBfForImageClassification
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The matching rule, and the labels of the matched classes in `model` (K,) and in `start` (K,)."""
    here, there = class_names(model.config), class_names(start.config)
    if here is None or there is None:
        same = start.config.num_labels == model.config.num_labels
        every = torch.arange(model.config.num_labels if same else 0)
        return ("place" if same else "none"), every, every
    only_one = {name: label for label, name in enumerate(there) if there.count(name) == 1}
    pairs = [(label, only_one[name]) for label, name in enumerate(here) if name in only_one]
    labels = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return "name", labels[:, 0], labels[:, 1]
