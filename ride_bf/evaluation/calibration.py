"""Temperature scaling: none, one for all images, or one for a group of classes, whatever cross-validation shows.

Guo et al.: On Calibration of Modern Neural Networks, 2017, section 4.2: the logits of an image are divided by a
temperature that minimises the cross-entropy on images that the network was not trained on. The group of an image is the
shot group of its predicted class, which is known without the label; its logits are all divided by one number, so the
prediction does not change and the probabilities sum to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FOLDS = 5
FEWEST_IMAGES = 20  # predicted as a group, so that it decides for itself
_RANGE = (0.05, 20.0)  # of temperatures


@dataclass(frozen=True, kw_only=True)
class GroupTemperature:
    """The temperature of a group, or of all images.

    Attributes:
        images: how many images it was decided on.
        temperature: the one that is used.
        losses: mean cross-entropy of images that the fit did not see, by cross-validation: with "none", with that of
            "all" images, and with the group's "own". None for a group of too few images.
        used: which of the three it is.
    """

    images: int
    temperature: float
    losses: dict[str, float] | None
    used: str


def fit_temperature(logits: Tensor, labels: Tensor, at_least: float = _RANGE[0]) -> float:
    """Returns the temperature that minimises the cross-entropy of logits (N, C) and labels (N,).

    The target of an image gives 1 / (N + 2) to the other classes, as in Platt: Probabilistic Outputs for Support
    Vector Machines, 1999. Without this, the temperature would go to 0 if all predictions were right. The cross-entropy
    is convex in the inverse of the temperature, so the minimum in the range from `at_least` to 20 is found.
    """
    from scipy.optimize import minimize_scalar

    size = len(labels)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = (logits.sum(dim=1) - own) / max(logits.shape[1] - 1, 1)
    target = own + (others - own) / (size + 2)  # (N,) the mean logit under the target

    def loss(log_temperature: float) -> float:
        inverse = float(np.exp(-log_temperature))
        return ((logits * inverse).logsumexp(dim=1) - target * inverse).double().mean().item()

    bounds = (float(np.log(at_least)), float(np.log(_RANGE[1])))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)) if found.fun < min(map(loss, bounds)) else float(np.exp(min(bounds, key=loss)))


def cross_entropies(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy (N,) of each image."""
    return torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="none").double()


def choose_temperatures(
    logits: Tensor, labels: Tensor, groups: Mapping[str, np.ndarray], never_sharper: bool = False
) -> dict[str, GroupTemperature]:
    """Chooses the temperatures of "all" images and of each group of classes.

    Args:
        logits (N, C), labels (N,): of images that the network was not trained on.
        groups: name -> mask (C,) of classes. An image belongs to the group of its predicted class.
        never_sharper: no temperature is below 1, for images that the network was trained on.

    Cross-validation over `FOLDS` folds decides: a temperature is used if it lowers the mean cross-entropy of images
    that it was not fitted on by more than the standard error of the difference. For a group this is asked of the
    temperature of all images, and then of the group's own. A group of fewer than `FEWEST_IMAGES` images does as all
    images do.
    Raises ValueError if there are fewer than `FOLDS` images.
    """
    size = len(labels)
    if size < FOLDS:
        raise ValueError(f"{size} images are too few to calibrate on; at least {FOLDS} are needed")
    at_least = 1.0 if never_sharper else _RANGE[0]
    predicted = logits.argmax(dim=1).numpy()
    members = {name: torch.from_numpy(mask[predicted]) for name, mask in groups.items() if mask.any()}
    folds = torch.from_numpy(np.random.default_rng(0).permutation(size) % FOLDS)
    plain = cross_entropies(logits, labels)
    losses = {"none": plain, "all": plain.clone(), "own": plain.clone()}  # (N,) each
    for fold in range(FOLDS):
        seen, held = folds != fold, folds == fold
        shared = fit_temperature(logits[seen], labels[seen], at_least)
        losses["all"][held] = cross_entropies(logits[held], labels[held], shared)
        for inside in members.values():
            if (inside & seen).any():
                own = fit_temperature(logits[inside & seen], labels[inside & seen], at_least)
                rows = inside & held
                losses["own"][rows] = cross_entropies(logits[rows], labels[rows], own)

    everywhere = torch.ones(size, dtype=torch.bool)
    used = _best(losses, ("none", "all"), everywhere)
    temperature = fit_temperature(logits, labels, at_least) if used == "all" else 1.0
    chosen = {
        "all": GroupTemperature(
            images=size, temperature=temperature, losses=_means(losses, ("none", "all"), everywhere), used=used
        )
    }
    for name, inside in members.items():
        images = int(inside.sum())
        enough = images >= FEWEST_IMAGES
        candidates = ("none", "own") if used == "none" else ("none", "all", "own")
        of_group = _best(losses, candidates, inside) if enough else used
        own = of_group == "own"
        chosen[name] = GroupTemperature(
            images=images,
            temperature=fit_temperature(logits[inside], labels[inside], at_least)
            if own
            else {"all": temperature, "none": 1.0}[of_group],
            losses=_means(losses, candidates, inside) if enough else None,
            used=of_group,
        )
    return chosen


def _best(losses: Mapping[str, Tensor], candidates: Sequence[str], rows: Tensor) -> str:
    """The last of the candidates that is better than those before it by more than the standard error."""
    best, *others = candidates
    for other in others:
        gain = (losses[best] - losses[other])[rows]
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            best = other
    return best


def _means(losses: Mapping[str, Tensor], candidates: Sequence[str], rows: Tensor) -> dict[str, float]:
    return {name: losses[name][rows].mean().item() for name in candidates}


def temperature_for_each_class(
    chosen: Mapping[str, GroupTemperature], groups: Mapping[str, np.ndarray]
) -> float | list[float]:
    """The entry `temperature` of `Confidence`: a number, or a list (C,) if groups differ."""
    temperatures = np.full(len(next(iter(groups.values()))), chosen["all"].temperature)
    for name, mask in groups.items():
        if name in chosen:
            temperatures[mask] = chosen[name].temperature
    return temperatures.tolist() if len(set(temperatures)) > 1 else float(temperatures[0])
