"""Which training images an epoch shows, and how often."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

Strategy = Literal["instance", "square_root", "class_balanced", "progressively_balanced"]


def class_probabilities(class_counts: Sequence[int], strategy: Strategy, progress: float = 0.0) -> np.ndarray:
    """How probable each class (C,) is at each draw.

    "instance": by its images; "square_root": by their square root; "class_balanced": all alike;
    "progressively_balanced": from the first to the third as `progress` goes from 0 to 1. Kang et al.: Decoupling
    Representation and Classifier for Long-Tailed Recognition, 2020, section 3. Raises ValueError for another strategy.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    by_image, alike = counts / counts.sum(), np.full(len(counts), 1 / len(counts))
    if strategy == "instance":
        return by_image
    if strategy == "square_root":
        return np.sqrt(counts) / np.sqrt(counts).sum()
    if strategy == "class_balanced":
        return alike
    if strategy == "progressively_balanced":
        return (1 - progress) * by_image + progress * alike
    raise ValueError(f"no sampling strategy is called {strategy!r}")


class LongTailedSampler(Sampler[int]):
    """Draws a class, then the next image of that class's shuffled list, which is shuffled anew when used up.

    The order is a function of seed and epoch alone: every process of a distributed run draws the same one, of which
    Accelerate gives each its own batches, and a resumed run goes on with it. `set_epoch` is called by the loader.

    Args:
        labels (N,): class of each training image. Raises ValueError if a class has none.
        num_classes: C.
        strategy: see `class_probabilities`.
        num_samples: draws in an epoch.
        num_epochs: epochs over which "progressively_balanced" goes from one end to the other.
        seed: of the order.
    """

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        strategy: Strategy,
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
        self.strategy: Strategy = strategy
        self.num_samples, self.num_epochs, self.seed = num_samples, num_epochs, seed
        self.epoch = 0
        class_probabilities(self.counts, strategy)  # an unknown strategy is refused now, not in the first epoch

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
        for label, times in enumerate(np.bincount(classes, minlength=len(probabilities))):
            members = self.members[label]
            rounds = [rng.permutation(members) for _ in range(-(-times // len(members)))]
            if rounds:
                drawn[classes == label] = np.concatenate(rounds)[:times]
        return iter(drawn.tolist())
