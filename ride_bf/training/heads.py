"""Starts the heads on a pre-trained backbone: the statistics of its features, and the class vectors."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.recipes import TrainingRecipe

if TYPE_CHECKING:
    from ride_bf.training.loaders import RunLoaders

_ROWS_AT_ONCE = 65_536


def start_heads(
    model: RideBfForImageClassification,
    recipe: TrainingRecipe,
    loaders: "RunLoaders",
    text_vectors: Tensor | None = None,
) -> None:
    """Sets what the heads start from: `text_vectors` (C, D), or the features of the training images.

    The features, seen as in evaluation, give the statistics of `standardise_features` and, with `classifier_init`
    "class_means", the class vectors of every expert: the mean direction of the features of a class. Images that cannot
    be read are left out.
    """
    if text_vectors is not None:
        set_class_vectors(model, text_vectors)
    if not starts_from_features(model, recipe):
        return
    rows = loaders.centre_features("train")
    read = rows.labels >= 0
    features, labels = torch.from_numpy(rows.features[0][read]), torch.from_numpy(rows.labels[read])
    if model.config.standardise_features:
        model.ride_bf.set_feature_statistics(*feature_statistics(features))
    if _starts_from_means(model, recipe):
        set_class_vectors(model, class_means(model, features, labels))


def starts_from_features(model: RideBfForImageClassification, recipe: TrainingRecipe) -> bool:
    """Whether `start_heads` needs the features of the training images."""
    return model.config.standardise_features or _starts_from_means(model, recipe)


def _starts_from_means(model: RideBfForImageClassification, recipe: TrainingRecipe) -> bool:
    # a recipe's own start does not hold for the linear classifiers that it is run with
    return recipe.classifier_init == "class_means" and model.config.classifier == "cosine"


@torch.no_grad()
def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (N, D). A feature that is constant has the deviation 1."""
    mean, std = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    constant = std <= 1e-6 * mean.abs().clamp(min=1)
    return mean.float(), torch.where(constant, 1.0, std).float()


@torch.no_grad()
def class_means(model: RideBfForImageClassification, features: Tensor, labels: Tensor) -> Tensor:
    """The mean direction (C, D) of the features (N, D) of each class, after they are standardised."""
    standardise = model.ride_bf.experts[0].standardise.cpu()
    sums = torch.zeros(model.config.num_labels, features.shape[1], dtype=torch.float64)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        directions = F.normalize(standardise(features[rows].float()), dim=1)
        sums.index_add_(0, labels[rows], directions.double())
    return F.normalize(sums, dim=1).float()


@torch.no_grad()
def set_class_vectors(model: RideBfForImageClassification, vectors: Tensor) -> None:
    """Gives every expert's cosine classifier these class vectors (C, D)."""
    for classifier in model.classifiers:
        classifier.weight.copy_(vectors)
