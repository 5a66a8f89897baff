"""Split conformal prediction: sets of classes that hold the true class of a promised share of the images.

The score of a class is its softmax probability (the least ambiguous sets of Sadinle, Lei, Wasserman: Least Ambiguous
Set-Valued Classifiers with Bounded Error Levels, 2019). A class is in the set if its probability reaches a threshold.
With thresholds by cells of classes the promise holds for the images of each cell (Vovk: Conditional Validity of
Inductive Conformal Predictors, 2012). With `by="class"`, classes with few calibration images share a threshold with
classes whose scores are distributed alike (Ding, Angelopoulos, Bates, Jordan, Tibshirani: Class-Conditional Conformal
Prediction with Many Classes, 2023).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

By = Literal["all", "group", "class"]
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the scores of a class; by these, classes are alike
_SLACK = 1e-5  # by which thresholds are lowered: another batch size or device rounds probabilities differently
_EXACT_ENOUGH = 10  # times the fewest images that can promise anything; then the threshold is the 10th lowest score


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Classes that share a threshold.

    Attributes:
        name: "all classes", "many-shot", "class 3", "cluster 1" or, if cells were merged, their names with "+".
        classes: their labels.
        images: calibration images that the threshold is from.
        threshold: of the score of the true class; `images + 1` and the promise decide its rank.
    """

    name: str
    classes: list[int]
    images: int
    threshold: float


def fewest_images(coverage: float) -> int:
    """Returns how many calibration images a promise needs: n images cannot promise more than n / (n + 1)."""
    return math.ceil(round(coverage / (1 - coverage), 6))


def lower_threshold(scores: np.ndarray, coverage: float) -> float:
    """Returns the largest threshold that a new score reaches with a probability of at least `coverage`.

    It is the k-th lowest of `scores` (n,), with k = floor((n + 1) (1 - coverage)). If the new score is exchangeable
    with them, it is below the k-th lowest with a probability of at most k / (n + 1). Raises ValueError if k is 0.
    """
    rank = math.floor(round((len(scores) + 1) * (1 - coverage), 6))
    if rank < 1:
        most = len(scores) / (len(scores) + 1)
        raise ValueError(
            f"{len(scores)} calibration images cannot promise {100 * coverage:g} %, at most {100 * most:.1f} %; at "
            f"least {fewest_images(coverage)} are needed: lower --coverage, or calibrate on more images"
        )
    return float(np.sort(scores)[rank - 1])


def make_cells(
    scores: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray], coverage: float, by: By = "group"
) -> list[Cell]:
    """Divides the classes into cells, and finds the threshold of each.

    Args:
        scores (N,): score of the true class of each calibration image; the higher, the surer.
        labels (N,): true classes.
        groups: name -> mask (C,) of classes; each class is in one group.
        coverage: share of the images of each cell whose true class reaches the threshold.
        by: "all", one cell; "group", a cell for each group; "class", a cell for each class with enough images, cells of
            classes with similar scores for those with fewer, and the cells of groups for the rest, which have too few.

    A cell that has too few images for the promise is merged with the smallest other cell. Raises ValueError if all
    images together are too few.
    """
    num_classes = len(next(iter(groups.values())))
    images = np.bincount(labels, minlength=num_classes)  # (C,)
    parts: dict[str, np.ndarray] = {}  # name -> mask of classes
    used = np.ones(len(labels), dtype=bool)  # images that thresholds are from
    if by == "all":
        parts["all classes"] = np.ones(num_classes, dtype=bool)
    else:
        rest = np.ones(num_classes, dtype=bool)
        if by == "class":
            parts, used = _by_class(scores, labels, images, coverage)
            for mask in parts.values():
                rest &= ~mask
        names = {f"{name}-shot": mask & rest for name, mask in groups.items()}
        parts |= {name: mask for name, mask in names.items() if mask.any()}
    return [
        Cell(
            name=name,
            classes=np.flatnonzero(mask).tolist(),
            images=int((used & mask[labels]).sum()),
            threshold=lower_threshold(scores[used & mask[labels]], coverage),
        )
        for name, mask in _merged(parts, labels[used], coverage).items()
    ]


def threshold_for_each_class(cells: list[Cell], num_classes: int) -> float | list[float]:
    """The entry `set_thresholds` of `Confidence`: a number for one cell, else a list (C,)."""
    thresholds = np.zeros(num_classes)
    for cell in cells:
        thresholds[cell.classes] = cell.threshold * (1 - _SLACK)
    return float(thresholds[0]) if len(cells) == 1 else thresholds.tolist()


def _by_class(
    scores: np.ndarray, labels: np.ndarray, images: np.ndarray, coverage: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Cells of single and of clustered classes, and a mask (N,) of the images that did not decide on the clusters."""
    from sklearn.cluster import KMeans

    fewest, num_classes = fewest_images(coverage), len(images)
    parts = {}
    for label in np.flatnonzero(images >= _EXACT_ENOUGH * fewest):
        parts[f"class {label}"] = np.arange(num_classes) == label
    used = np.ones(len(labels), dtype=bool)
    alike = np.flatnonzero((images >= fewest) & (images < _EXACT_ENOUGH * fewest))
    if len(alike) < 2:
        return parts, used
    generator = np.random.default_rng(0)
    left, quantiles = 0, []
    for label in alike:  # one half of its images decides on the cluster, the other on the threshold
        rows = generator.permutation(np.flatnonzero(labels == label))
        used[rows[: len(rows) // 2]] = False
        left += len(rows) - len(rows) // 2
        quantiles.append(np.quantile(scores[rows[: len(rows) // 2]], _QUANTILES))
    clusters = min(len(alike), max(1, left // (_EXACT_ENOUGH * fewest)))
    found = KMeans(clusters, n_init=10, random_state=0).fit_predict(
        np.array(quantiles), sample_weight=np.sqrt(images[alike])
    )
    for cluster in np.unique(found):
        mask = np.zeros(num_classes, dtype=bool)
        mask[alike[found == cluster]] = True
        parts[f"cluster {cluster + 1}"] = mask
    return parts, used


def _merged(parts: dict[str, np.ndarray], labels: np.ndarray, coverage: float) -> dict[str, np.ndarray]:
    """Merges cells that have too few images with the smallest other one, until each has enough, or one is left."""
    parts = dict(parts)
    while len(parts) > 1:
        by_size = sorted(parts, key=lambda name: (parts[name][labels].sum(), name))
        if parts[by_size[0]][labels].sum() >= fewest_images(coverage):
            break
        one, other = (parts.pop(name) for name in by_size[:2])
        parts[" + ".join(by_size[:2])] = one | other
    return parts
