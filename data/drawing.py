"""Draws splits: a share of each class for the test, and a long tail of what is left for training."""

import numpy as np


class NothingToDrawError(ValueError):
    """No class has an image that could be drawn."""


def draw_share(
    labels: np.ndarray,
    fraction: float,
    groups: np.ndarray | None = None,
    seed: int = 0,
    stay: np.ndarray | None = None,
) -> np.ndarray:
    """Draws `fraction` of each class, but never its last image or group. Returns a mask (N,) of the drawn images.

    `labels` (N,) are classes, `groups` (N,) the numbers of groups whose images stay together. A group is drawn if that
    brings the classes of its images nearer to their shares. A class gets at least one drawn image, if it has a second
    group that can stay. The same arguments draw the same images. Without groups of several images, these are exactly
    max(1, round(fraction * n)) of the n images of a class. No group with an image in the mask `stay` (N,) is drawn.

    Raises ValueError if the fraction is not between 0 and 1, and NothingToDrawError if no class has an image that could
    be drawn.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the share of images to hold out must be between 0 and 1, not {fraction}")
    order = np.random.default_rng(seed).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    share = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    _, groups = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each image in its class

    drawn = np.zeros(len(labels), dtype=bool)
    stays = np.zeros(len(groups), dtype=bool)  # of each group
    if stay is not None:
        stays[groups[stay]] = True
    if len(np.unique(groups)) == len(groups) and not stays.any():
        drawn[grouped[rank < np.repeat(share, counts)]] = True
    else:
        _draw_groups(drawn, labels, groups, grouped, counts, share, stays)
    if not drawn.any():
        raise NothingToDrawError(
            "no class has a second image that could be held out (equal images stay together); provide a separate split "
            "instead"
        )
    return drawn


def _draw_groups(
    drawn: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    grouped: np.ndarray,
    counts: np.ndarray,
    share: np.ndarray,
    stays: np.ndarray,
) -> None:
    """Marks the images of the drawn groups in `drawn`. `grouped` are images by class, in random order within one.

    Groups of which `stays` is true are not drawn.
    """
    by_group = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[by_group], np.arange(groups.max() + 2))
    number, left = np.zeros(len(counts)), counts.copy()  # drawn of each class; that stay
    ends = np.cumsum(counts)

    def draw(group: int) -> None:
        members = by_group[starts[group] : starts[group + 1]]
        drawn[members] = True
        np.add.at(number, labels[members], 1)
        np.subtract.at(left, labels[members], 1)

    def may_be_drawn(group: int, needed: bool) -> bool:
        """Whether every class keeps an image, and the classes come nearer to their shares (or one `needed` it)."""
        if stays[group]:
            return False
        if starts[group + 1] - starts[group] == 1:
            label = labels[by_group[starts[group]]]
            return left[label] > 1 and number[label] < share[label]
        members = by_group[starts[group] : starts[group + 1]]
        classes, more = np.unique(labels[members], return_counts=True)
        if (left[classes] <= more).any():
            return False
        before = np.abs(share[classes] - number[classes]).sum()
        return needed or np.abs(share[classes] - number[classes] - more).sum() < before

    # Rare classes first: their few groups must not be gone when their turn comes.
    for label in np.argsort(counts, kind="stable").tolist():
        images = grouped[ends[label] - counts[label] : ends[label]]
        for image in images[~drawn[images]].tolist():
            if number[label] >= share[label]:
                break
            if not drawn[image] and may_be_drawn(groups[image], needed=False):
                draw(groups[image])
    for label in np.flatnonzero((number == 0) & (share > 0)).tolist():
        images = grouped[ends[label] - counts[label] : ends[label]]
        candidates = dict.fromkeys(groups[images].tolist())
        smallest = sorted(candidates, key=lambda group: starts[group + 1] - starts[group])
        chosen = next((group for group in smallest if may_be_drawn(group, needed=True)), None)
        if chosen is not None and number[label] == 0:
            draw(chosen)


def long_tail(labels: np.ndarray, factor: float, seed: int = 0) -> np.ndarray:
    """Draws a long tail: class sizes decay exponentially, from the largest class to 1 / `factor` of it.

    The classes keep their order by size. A class that has fewer images than its place in the tail keeps all of them.
    Every class keeps at least one. Returns the indices (M,) of the images that stay, in their order.
    Raises ValueError for a factor that is no number from 1 on.
    """
    if not 1 <= factor < np.inf:  # nan is not either
        raise ValueError(
            f"the factor of a long tail is the largest class over the smallest, a number from 1 on, not {factor}; set "
            "--long_tail 100, for example"
        )
    counts = np.bincount(labels)
    by_size = np.argsort(-counts, kind="stable")
    decay = factor ** (-np.arange(len(counts)) / max(len(counts) - 1, 1))
    wanted = np.empty(len(counts), dtype=np.int64)
    wanted[by_size] = np.maximum(1, (counts.max() * decay + 1e-9).astype(np.int64))
    order = np.random.default_rng(seed).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(grouped[rank < np.repeat(wanted, counts)])
