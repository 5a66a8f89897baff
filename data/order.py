"""The order in which rows come, as the samplers give it."""

from collections.abc import Iterator

import numpy as np

_AT_ONCE = 65_536  # a Python number takes four times the memory of one in an array


def in_pieces(order: np.ndarray) -> Iterator[int]:
    """Yields the numbers of `order` (N,) as Python's own, piece by piece, so that no list holds them all."""
    for start in range(0, len(order), _AT_ONCE):
        yield from order[start : start + _AT_ONCE].tolist()
