"""What torch does on a processor with AMX, told on any: its half-precision products read on past the end of a row."""

import torch
from instruments import Instrument

COLUMNS = 32  # rows are read on to a multiple of them
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


class NoNanIsRead(Instrument):
    """Fails where a half-precision product on the CPU takes a row with NaN, or one that NaN follow in its memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            for x in args:
                if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dtype.itemsize == 2:
                    assert not read_on(x).isnan().any(), f"{function} reads NaN"
        return function(*args, **(kwargs or {}))


def read_on(x):
    """x, rows along the dimension that is contiguous, with what follows them in memory; zeros where that ends."""
    x = x if x.stride(-1) == 1 else x.mT
    size = (*x.shape[:-1], -(-x.shape[-1] // COLUMNS) * COLUMNS)
    end = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(size, x.stride())) + 1
    memory = x.new_empty(0).set_(x.untyped_storage())
    memory = torch.cat([memory, memory.new_zeros(max(end - len(memory), 0))])
    return memory.as_strided(size, x.stride(), x.storage_offset()) if x.numel() else x
