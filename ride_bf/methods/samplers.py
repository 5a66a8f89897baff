"""Decides which training images an epoch shows, and how often.

To add a sampler, decorate a function in this file with `_sampler`. The recipe's option `sampler`, `--help` and the
errors then know its name. Kang et al.: Decoupling Representation and Classifier for Long-Tailed Recognition, 2020,
section 3.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data.order import in_pieces

# name -> (training images of each class (C,) in float64, progress of the run from 0 to 1) -> probabilities (C,)
SAMPLERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {}
INSTANCE = "instance"  # every image once in an epoch, so nothing needs to be drawn


def _sampler(probabilities: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[np.ndarray, float], np.ndarray]:
    SAMPLERS[probabilities.__name__] = probabilities
    return probabilities


@_sampler
def instance(counts: np.ndarray, progress: float) -> np.ndarray:
    """The probability of a class is its share of the images."""
    return counts / counts.sum()


@_sampler
def square_root(counts: np.ndarray, progress: float) -> np.ndarray:
    """The probability of a class is proportional to the square root of its number of images."""
    return np.sqrt(counts) / np.sqrt(counts).sum()


@_sampler
def class_balanced(counts: np.ndarray, progress: float) -> np.ndarray:
    """All classes are equally probable."""
    return np.full(len(counts), 1 / len(counts))


@_sampler
def progressively_balanced(counts: np.ndarray, progress: float) -> np.ndarray:
    """From `instance` at the start of the run to `class_balanced` at its end."""
    return (1 - progress) * instance(counts, progress) + progress * class_balanced(counts, progress)


def class_probabilities(class_counts: Sequence[int], strategy: str, progress: float = 0.0) -> np.ndarray:
    """Probability of each class (C,) at each draw. `strategy` is a name of `SAMPLERS`.

    `progress` goes from 0 in the first epoch of the run to 1 in the last. Raises ValueError for another name.
    """
    if strategy not in SAMPLERS:
        raise ValueError(f"no sampler is called {strategy!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[strategy](np.asarray(class_counts, dtype=np.float64), progress)


class LongTailedSampler:
    """Draws a class, then the next image in that class's shuffled list. A used-up list is shuffled again.

    The order depends only on the seed and the epoch. So every process of a distributed run draws the same order, from
    which Accelerate gives each process its own batches, and a resumed run continues it. The loader calls `set_epoch`.
    Pass it to `DataLoader(sampler=...)`, which accepts any iterable of a known length.

    Args:
        labels (N,): class of each training image. Raises ValueError if a class has none.
        num_classes: C.
        strategy: a name of `SAMPLERS`.
        num_samples: draws in an epoch.
        num_epochs: epochs of the run; "progressively_balanced" changes over all of them.
        seed: seed of the order.
    """

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        strategy: str,
        num_samples: int,
        num_epochs: int = 1,
        seed: int = 0,
    ):
        order = np.argsort(labels, kind="stable")
        self.counts = np.bincount(labels, minlength=num_classes)
        empty = np.flatnonzero(self.counts == 0)
        if empty.size:
            raise ValueError(f"classes without images cannot be drawn: {empty[:10].tolist()}")
        self.members = np.split(order, np.cumsum(self.counts)[:-1])
        self.strategy = strategy
        self.num_samples, self.num_epochs, self.seed = num_samples, num_epochs, seed
        self.epoch = 0
        class_probabilities(self.counts, strategy)  # raises for an unknown strategy now, not in the first epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        progress = self.epoch / max(1, self.num_epochs - 1)
        probabilities = class_probabilities(self.counts, self.strategy, progress)
        classes = rng.choice(len(probabilities), size=self.num_samples, p=probabilities)
        drawn = np.empty(self.num_samples, dtype=np.int64)
        times = np.bincount(classes, minlength=len(probabilities))
        places = np.split(np.argsort(classes, kind="stable"), np.cumsum(times)[:-1])  # of each class in the epoch
        for members, own in zip(self.members, places, strict=True):
            rounds = [rng.permutation(members) for _ in range(-(-len(own) // len(members)))]
            if rounds:
                drawn[own] = np.concatenate(rounds)[: len(own)]
        return in_pieces(drawn)
