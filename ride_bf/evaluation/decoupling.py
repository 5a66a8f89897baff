"""Corrections of trained linear classifiers for the long tail: tau-normalisation and post-hoc logit adjustment."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from data import FinishedBatches
from modeling_ride_bf import RideBfForImageClassification, RideBfOutput
from ride_bf.evaluation.metrics import shot_accuracy
from ride_bf.evaluation.predict import as_predictions, gather_whole, image_facts
from ride_bf.evaluation.results import main_metrics
from ride_bf.methods.losses import log_prior

STRENGTHS = tuple(np.linspace(0, 1, 21).round(2).tolist())  # 0 leaves the classifier as it is
_AFTER = "after_"  # prefix of the columns of the corrected model

_WHY_LINEAR = {
    "tau_normalisation": "a cosine classifier normalises each class's weights already. Train with --classifier linear",
    "logit_adjustment": "a cosine classifier has no bias to write the adjustment into. Train with "
    "--loss logit_adjusted, or with --classifier linear",
}


def check_linear(model: RideBfForImageClassification, method: str) -> None:
    """Raises ValueError, with the reason, for a cosine classifier or a network with a router."""
    if model.config.classifier != "linear":
        raise ValueError(f"{method} needs a linear classifier: {_WHY_LINEAR[method]}")
    if model.router is not None:
        raise ValueError(
            f"{method} changes the logits that the router was trained on: correct the model without a router, and "
            "train the router afterwards"
        )


def tau_normalised(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns W_c / ||W_c||^tau and a zero bias. Kang et al.: Decoupling Representation and Classifier, 2020, 4.2."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau, torch.zeros_like(bias)


def logit_adjusted(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Subtracts tau * log(class share) from the bias. Menon et al.: Logit Adjustment, 2021, section 4.1."""
    return weight, bias - tau * log_prior(class_counts).to(bias)


METHODS: dict[str, Callable] = {"tau_normalisation": tau_normalised, "logit_adjustment": logit_adjusted}


@torch.no_grad()
def correct(model: RideBfForImageClassification, method: str, strength: float, class_counts: Sequence[int]) -> None:
    """Corrects the classifiers of all experts in place, and forgets the model's calibration, which was of other logits.

    Raises ValueError unless they are linear.
    """
    check_linear(model, method)
    model.config.confidence = None
    for classifier in model.classifiers:
        assert isinstance(classifier, nn.Linear)
        weight, bias = METHODS[method](classifier.weight, classifier.bias, strength, class_counts)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


def choose_strength(
    model: nn.Module,
    method: str,
    loader: FinishedBatches,
    accelerator: Accelerator,
    class_counts: Sequence[int],
) -> dict[float, float]:
    """Returns the balanced accuracy on the loader's images for each of `STRENGTHS`. The network runs only once.

    Model and loader come from `accelerator.prepare`. Only the predictions of each image are kept.
    """
    classifiers = accelerator.unwrap_model(model).classifiers

    def predictions(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            corrected = (
                corrected_logits(outputs.expert_features, classifiers, method, strength, class_counts)
                for strength in STRENGTHS
            )
            return {"predictions": torch.stack([logits.mean(dim=1).argmax(dim=1) for logits in corrected], dim=1)}

    images = gather_whole(model, loader, accelerator, predictions)
    return {
        strength: shot_accuracy(own, images["labels"], class_counts)["balanced_accuracy"]
        for strength, own in zip(STRENGTHS, images["predictions"].T, strict=True)
    }


def evaluate_both(
    model: nn.Module,
    method: str,
    strength: float,
    loader: FinishedBatches,
    accelerator: Accelerator,
    class_counts: Sequence[int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluates the model without and with corrected classifiers, as `evaluate` does. The network runs only once."""
    classifiers = accelerator.unwrap_model(model).classifiers

    def facts(outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            expert_logits = corrected_logits(outputs.expert_features, classifiers, method, strength, class_counts)
            corrected = RideBfOutput(logits=expert_logits.mean(dim=1), expert_logits=expert_logits)
        after = {f"{_AFTER}{name}": column for name, column in image_facts(corrected, labels).items()}
        return image_facts(outputs, labels) | after

    columns = gather_whole(model, loader, accelerator, facts)
    before = {name: column for name, column in columns.items() if not name.startswith(_AFTER)}
    after = {name.removeprefix(_AFTER): column for name, column in columns.items() if name.startswith(_AFTER)}
    after["labels"] = columns["labels"]
    return tuple(main_metrics(as_predictions(images), class_counts) for images in (before, after))


def corrected_logits(
    expert_features: Tensor, classifiers: nn.ModuleList, method: str, strength: float, class_counts: Sequence[int]
) -> Tensor:
    """Returns the logits (B, E, C) of the corrected classifiers, from the experts' features (B, E, D)."""
    logits = [
        F.linear(features, *METHODS[method](classifier.weight, classifier.bias, strength, class_counts))
        for classifier, features in zip(classifiers, expert_features.unbind(dim=1), strict=True)
    ]
    return torch.stack(logits, dim=1)
