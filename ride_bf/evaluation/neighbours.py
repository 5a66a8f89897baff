"""What an image is like in feature space: its nearest images, and the class whose mean is nearest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from ride_bf.evaluation.metrics import shot_accuracy

NEIGHBOURS = "neighbours"  # a key of results.json
_COUNT = 5  # few, because a rare class has no more
_EQUAL = 1e-6  # a smaller distance is rounding
_ROWS_AT_ONCE = 4096  # to limit memory


def nearest(
    features: np.ndarray, queries: np.ndarray | None = None, count: int = _COUNT
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the images of `features` (N, D) that are nearest to `queries` (M, D), nearest first.

    Without `queries`, those nearest to each of the N images among the others. Returns cosine distances (M, K), from 0
    to 2, and rows (M, K) of `features`; K is `count`, or fewer if there are fewer images. Raises ValueError without an
    image to find.
    """
    count = min(count, len(features) - (queries is None))
    if count < 1:
        raise ValueError(f"{len(features)} image(s) have no neighbours; embed the whole training split")
    # of unit vectors, cosine distances are half the squares of Euclidean ones, which take half the time
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(normalize(features))
    distances, rows = search.kneighbors(None if queries is None else normalize(queries))
    return distances**2 / 2, rows


def vote(labels: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes (M,) that neighbours vote for, and their shares (M,) of the votes.

    `labels` (M, K) are the neighbours' classes. Each votes with the inverse of its distance (M, K): Dudani: The
    Distance-Weighted k-Nearest-Neighbor Rule, 1976. Of classes with equal votes, that of the nearest neighbour wins.
    """
    votes = 1 / np.maximum(distances, _EQUAL)
    of_class = ((labels[:, :, None] == labels[:, None]) * votes[:, None]).sum(axis=2)  # (M, K)
    winner = of_class.argmax(axis=1)[:, None]
    classes, shares = (np.take_along_axis(values, winner, axis=1)[:, 0] for values in (labels, of_class))
    return classes, shares / votes.sum(axis=1)


def measure_neighbours(
    features: np.ndarray, training: np.ndarray, training_labels: np.ndarray, labels: np.ndarray, counts: Sequence[int]
) -> dict[str, Any]:
    """The key `neighbours` of `results.json`: how many nearest training images vote, and the accuracy of their votes.

    `features` (N, D) and `labels` (N,) are of the evaluated images, `training` (M, D) and `training_labels` (M,) of the
    training images, and `counts` (C,) the training images of each class.
    """
    distances, rows = nearest(training, features)
    votes, _ = vote(training_labels[rows], distances)
    return {"count": rows.shape[1], "metrics": shot_accuracy(votes, labels, counts)}


def nearest_mean_without_itself(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class (N,) whose mean feature has the largest cosine with each image, which is left out of its own class.

    `features` are (N, D), `labels` (N,). The features have length 1 before the mean. A class of one image has no mean
    for this image. Nearest class means: Mensink et al.: Distance-Based Image Classification, 2013.
    """
    unit = normalize(features)
    classes, own = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), unit.shape[1]), dtype=np.float64)
    np.add.at(sums, own, unit)
    alone = np.bincount(own) == 1
    best = np.empty(len(unit), dtype=np.int64)
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        cosines = unit[rows] @ normalize(sums).T  # (n, C)
        without = np.sum(unit[rows] * normalize(sums[own[rows]] - unit[rows]), axis=1)
        np.put_along_axis(cosines, own[rows, None], np.where(alone[own[rows]], -np.inf, without)[:, None], axis=1)
        best[rows] = cosines.argmax(axis=1)
    return classes[best]
