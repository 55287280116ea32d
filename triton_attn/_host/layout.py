"""How tensors (batch, rows, heads, dim) or (rows, heads, dim) lie in memory, as kernels need to know it."""

from .checks import MAX_ROWS, check_rows

# Names of kernel arguments that must not mean a new compilation. Strides of lse follow from lengths, and are no tuple
# because Triton specialises what is in one. Slices of lse and of index tensors may start at any address.
LSE = ["lse_ptr", "lse_split_stride", "lse_batch_stride", "lse_row_stride", "lse_head_stride"]
INDICES = ["cache_seqlens_ptr", "block_table_ptr", "table_stride", "slot_mapping_ptr", "positions_ptr"]
# Keys and values that are to stay in the L2 cache together; an H100 has 50 MB, an A100 40 MB.
L2_BUDGET_BYTES = 32 << 20


def row_strides(x):
    """Strides in elements of (batch, row, head); a packed varlen batch has batch stride 0."""
    return without_dim(x.stride())


def without_dim(strides):
    return strides[:-1] if len(strides) == 4 else (0, *strides[:-1])


def clear_outputs(out, lse):
    """What rows that belong to no sequence hold, where no program runs."""
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))


def capacity_of(cache, block_table):
    """Keys that a sequence has room for in a cache (pages or batch, slots, ...): there are no others."""
    return min(cache.shape[1] * (1 if block_table is None else block_table.shape[1]), MAX_ROWS)


def tiles_each(longest, num_rows, batch, block):
    """Tiles of each sequence of a batch of num_rows rows (of one sequence, where it is dense): those of the longest, or
    more where the host knows that a packed batch has rows after its last sequence, see `spare_rows`. None is longer
    than all rows, whatever `longest` says."""
    check_rows("q", num_rows)
    return -(-max(min(longest, num_rows), -(-num_rows // batch)) // block) if batch else 0


def batch_head_strides(x):
    """Strides of (batch, head) of a tensor (batch, heads), or (heads,) for every batch."""
    return x.stride() if x.ndim == 2 else (0, x.stride(0))


def scale_stride(scale):
    """Stride from one head to the next of a scale for all heads or one for each; None where it is no tensor."""
    return None if scale is None or not hasattr(scale, "numel") else min(1, scale.numel() - 1)


def lse_strides(lse):
    """Strides of (batch, row, head) of a tensor (batch, heads, rows) or (heads, rows)."""
    return (lse.stride(0), lse.stride(2), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(1), lse.stride(0))


def rows_are_wide(num_rows, *tensors):
    """Whether num_rows rows span more elements than 32-bit offsets reach."""
    return strides_are_wide(num_rows, *(x.stride() for x in tensors))


def strides_are_wide(num_rows, *strides):
    return any(num_rows * s[-3] >= 2**31 for s in strides)


def vector_elements(element_size, *strides):
    """Elements in the 16 bytes that a thread loads at once, if that divides all strides but the last; otherwise 1."""
    vector = 16 // element_size
    return vector if all(stride % vector == 0 for s in strides for stride in s[:-1]) else 1


def l2_section(k, v, seqlen_k, group_size, num_heads):
    """`heads_in_l2` of tensors."""
    return heads_in_l2(seqlen_k * (k.shape[-1] + v.shape[-1]) * k.element_size(), group_size, num_heads)


def heads_in_l2(bytes_per_head_kv, group_size, num_heads):
    """Query heads whose keys and values fit in the L2 cache together: at least one KV head's, at most num_heads, those
    of all sequences, so that tiles times sections stay within the number of programs (32 bits in a kernel)."""
    return max(1, min(max(1, L2_BUDGET_BYTES // max(1, bytes_per_head_kv)) * group_size, num_heads))
