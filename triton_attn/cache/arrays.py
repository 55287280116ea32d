"""Arrays of host bookkeeping."""

import math
import mmap
import sys
from array import array
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_LIMIT = 2**62  # above any number of tokens
INT64 = np.dtype(np.int64)  # numpy takes a dtype faster than the type
# Python has the name from 3.13 on; the number is that of x86-64 and Arm.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def written_zeros(shape, dtype):
    """Zeros in memory that has been written: its first write takes milliseconds where pages of memory are huge."""
    return np.full(shape, 0, dtype)


def reserved_zeros(shape, dtype):
    """Zeros that take addresses at once, and memory only where they are written. Raises OSError where there are none.

    Not numpy's: it asks for huge pages, and the first write in each would zero 2 MB. Linux counts its zeros as memory
    in use besides, and refuses more than the machine has.
    """
    dtype = np.dtype(dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.ndarray(shape, dtype, memory)


def grown(x: NDArray[Any], *shape: int) -> NDArray[Any]:
    """A copy of x in the first corner of larger zeros."""
    larger = np.zeros(shape, x.dtype)
    larger[tuple(slice(size) for size in x.shape)] = x
    return larger


def from_list(numbers):
    """int64 from a list of ints, faster than np.array. Raises TypeError for anything but ints."""
    return np.ndarray(len(numbers), INT64, array("q", numbers))


def largest(x):
    """The largest of an int array of numbers of 0 or more, 0 if there is none. Of few, Python is the faster one."""
    return max([0, *x.tolist()]) if x.size < 48 else int(x.max())


def ranges(starts, counts):
    """range(start, start + count) of each pair, one after the other."""
    firsts = starts - counts.cumsum() + counts
    return np.arange(counts.sum()) + firsts.repeat(counts)


def index_of(rows):
    """What picks rows of a table: numpy takes a slice several times faster than a list of one."""
    return slice(rows.item(), rows.item() + 1) if rows.size == 1 else rows
