"""Arrays of host bookkeeping."""

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray


def grown(x: NDArray[Any], *shape: int) -> NDArray[Any]:
    """A copy of x in the first corner of larger zeros."""
    larger = np.zeros(shape, x.dtype)
    larger[tuple(slice(size) for size in x.shape)] = x
    return larger


def from_list(numbers):
    """int64 from a list of ints, faster than np.array. Raises TypeError for anything but ints."""
    return np.frombuffer(array("q", numbers), np.int64)


def ranges(starts, counts):
    """range(start, start + count) of each pair, one after the other."""
    firsts = starts - counts.cumsum() + counts
    return np.arange(counts.sum()) + firsts.repeat(counts)
