"""How tensors (batch, rows, heads, dim) or (rows, heads, dim) lie in memory, as kernels need to know it."""

from triton.tools.tensor_descriptor import TensorDescriptor

from .._jit.tiles import piece_0, piece_1

# Keys and values that are to stay in the L2 cache together; an H100 has 50 MB, an A100 40 MB.
L2_BUDGET_BYTES = 32 << 20


def row_strides(x):
    """Strides in elements of (batch, row, head); a packed varlen batch has batch stride 0."""
    return x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])


def batch_head_strides(x):
    """Strides of (batch, head) of a tensor (batch, heads), or (heads,) for every batch."""
    return x.stride() if x.ndim == 2 else (0, x.stride(0))


def lse_strides(lse):
    """Strides of (batch, row, head) of a tensor (batch, heads, rows) or (heads, rows)."""
    return (lse.stride(0), lse.stride(2), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(1), lse.stride(0))


def rows_are_wide(num_rows, *tensors):
    """Whether num_rows rows span more elements than 32-bit offsets reach."""
    return num_rows * max(x.stride(-3) for x in tensors) >= 2**31


def l2_section(k, v, seqlen_k, group_size):
    """Query heads whose keys and values fit in the L2 cache together, at least one KV head's."""
    bytes_per_head_kv = max(1, seqlen_k * (k.shape[-1] + v.shape[-1]) * k.element_size())
    return max(1, L2_BUDGET_BYTES // bytes_per_head_kv) * group_size


def tma_ready(x):
    """Whether TMA can address x: base and strides in 16-byte units, nothing empty or broadcast."""
    unit = 16 // x.element_size()
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])


def tma_descriptors(x, block_rows):
    """Descriptors over (batch, head, row, dim), one per piece of the head dimension."""
    batch, row, head = row_strides(x)
    rows, heads, dim = x.shape[-3:]
    if x.ndim == 4:
        shape, strides = [x.shape[0], heads, rows, dim], [batch, head, row, 1]
    else:
        shape, strides = [1, heads, rows, dim], [head * heads, head, row, 1]
    pieces = (piece_0(dim), piece_1(dim)) if piece_1(dim) else (piece_0(dim),)
    return tuple(TensorDescriptor(x, shape, strides, [1, 1, block_rows, piece]) for piece in pieces)
