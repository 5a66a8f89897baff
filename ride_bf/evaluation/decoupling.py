"""Corrections of a trained linear classifier for its long tail: tau-normalisation and post-hoc logit adjustment."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.metrics import shot_accuracy
from ride_bf.methods.losses import log_prior

STRENGTHS = tuple(np.linspace(0, 1, 21).round(2).tolist())  # 0 leaves the classifier as it is


_WHY_LINEAR = {
    "tau_normalisation": "a cosine classifier normalises each class's weights already. Train with --classifier linear",
    "logit_adjustment": "a cosine classifier has no bias to write the adjustment into. Train with "
    "--loss logit_adjusted, or with --classifier linear",
}


def check_linear(model: RideBfForImageClassification, method: str) -> None:
    """Raises ValueError, with the reason, for a cosine classifier."""
    if model.config.classifier != "linear":
        raise ValueError(f"{method} needs a linear classifier: {_WHY_LINEAR[method]}")


def tau_normalised(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W_c / ||W_c||^tau and no bias. Kang et al.: Decoupling Representation and Classifier, 2020, section 4.2."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau, torch.zeros_like(bias)


def logit_adjusted(weight: Tensor, bias: Tensor, tau: float, class_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The bias less tau times the log of the class's share. Menon et al.: Logit Adjustment, 2021, section 4.1."""
    return weight, bias - tau * log_prior(class_counts).to(bias)


METHODS: dict[str, Callable] = {"tau_normalisation": tau_normalised, "logit_adjustment": logit_adjusted}


@torch.no_grad()
def correct(model: RideBfForImageClassification, method: str, strength: float, class_counts: Sequence[int]) -> None:
    """Corrects every expert's classifier in place. Raises ValueError unless they are linear."""
    check_linear(model, method)
    for classifier in model.classifiers:
        assert isinstance(classifier, nn.Linear)
        weight, bias = METHODS[method](classifier.weight, classifier.bias, strength, class_counts)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


@torch.no_grad()
def choose_strength(
    model: RideBfForImageClassification, method: str, loader: DataLoader, class_counts: Sequence[int]
) -> dict[float, float]:
    """Balanced accuracy on the loader's images at each of `STRENGTHS`; the network runs once."""
    model.eval()
    features, labels = [], []
    for batch in loader:
        features.append(model(batch["pixel_values"]).expert_features)
        labels.append(batch["labels"])
    features, labels = torch.cat(features), torch.cat(labels)
    accuracies = {}
    for strength in STRENGTHS:
        logits = torch.zeros(len(labels), model.config.num_labels)
        for classifier, own in zip(model.classifiers, features.unbind(dim=1), strict=True):
            logits += F.linear(own, *METHODS[method](classifier.weight, classifier.bias, strength, class_counts))
        metrics = shot_accuracy(logits.argmax(dim=1).numpy(), labels.numpy(), class_counts)
        accuracies[strength] = metrics["balanced_accuracy"]
    return accuracies
