"""Tensors whose last index is beyond 2^31 elements, in memory that is mostly never touched, or with unaligned
strides."""

import torch
from torch.overrides import TorchFunctionMode

FAR = 2**31 + 64


def far(x, dim):
    """x with its last index of dim beyond 2^31 elements, and strides that are multiples of 16 bytes."""
    strides = list(x.contiguous().stride())
    strides[dim] = -(-FAR // (x.shape[dim] - 1) // 32) * 32
    memory = torch.empty((x.shape[dim] - 1) * strides[dim] + x.numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


def odd(x, dim):
    """x with one more element between the indices of dim."""
    strides, size = [], 1
    for i in reversed(range(x.ndim)):
        strides.insert(0, size + (i == dim))
        size = strides[0] * x.shape[i]
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


class FarAllocation(TorchFunctionMode):
    """The k-th allocated tensor is far in dim. `allocated` has all shapes."""

    def __init__(self, k=None, dim=None):
        super().__init__()
        self.k, self.dim, self.allocated = k, dim, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.empty_like, torch.Tensor.new_empty, torch.zeros_like):
            if len(self.allocated) == self.k:
                made = far(made, self.dim)
            self.allocated.append(tuple(made.shape))
        return made
