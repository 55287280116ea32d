"""Arrays of host bookkeeping: torch tensors on the CPU, whatever default device or mode the caller has set."""

from array import array

import torch


def empty(*shape, dtype=torch.int64):
    """A tensor that may be changed in and out of torch.inference_mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")


def zeros(*shape, dtype=torch.int64):
    return empty(*shape, dtype=dtype).zero_()


def grown(x, *shape):
    """A copy of x in the first corner of larger zeros."""
    larger = zeros(*shape, dtype=x.dtype)
    larger[tuple(slice(size) for size in x.shape)] = x
    return larger


def from_list(numbers):
    """int64 from a list of ints, several times faster than torch.tensor. Raises TypeError for anything but ints."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64) if numbers else zeros(0)


def ranges(starts, counts):
    """range(start, start + count) of each pair, one after the other."""
    total = int(counts.sum())
    firsts = starts - counts.cumsum(0) + counts
    return torch.arange(total, device="cpu") + firsts.repeat_interleave(counts, output_size=total)
