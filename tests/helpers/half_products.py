"""torch's behaviour on CPUs with AMX, reproduced on any CPU: half-precision matmuls read past the end of a row."""

import torch
from instruments import Instrument

COLUMNS = 32  # reads extend to a multiple of this many columns
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


class NoNanIsRead(Instrument):
    """Fail if a half-precision matmul on the CPU takes a row with NaN in it or after it in memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            for x in args:
                if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dtype.itemsize == 2:
                    assert not read_on(x).isnan().any(), f"{function} reads NaN"
        return function(*args, **(kwargs or {}))


def read_on(x):
    """x with rows along its contiguous dimension, extended by the following memory, or zeros at its end."""
    x = x if x.stride(-1) == 1 else x.mT
    size = (*x.shape[:-1], -(-x.shape[-1] // COLUMNS) * COLUMNS)
    end = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(size, x.stride())) + 1
    memory = x.new_empty(0).set_(x.untyped_storage())
    memory = torch.cat([memory, memory.new_zeros(max(end - len(memory), 0))])
    return memory.as_strided(size, x.stride(), x.storage_offset()) if x.numel() else x
