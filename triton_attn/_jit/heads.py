"""Which sequence, head and tile a program takes, and where its rows lie."""

import triton
import triton.language as tl


@triton.jit
def assign_tile(pid, num_tiles, num_heads, section_size, LAST_FIRST: tl.constexpr):
    """Program -> (tile, head), heads counted over the whole batch.

    Heads are taken in sections of section_size whose operands fit in the L2 cache together, inside a section tile by
    tile over all heads. Where the last tiles are the longest, as those of queries under a causal mask, they come
    first, so that short ones fill the gaps at the end.
    """
    section = pid // (section_size * num_tiles)
    first_head = section * section_size
    heads_here = tl.minimum(section_size, num_heads - first_head)
    within = pid - first_head * num_tiles
    tile = within // heads_here
    return num_tiles - 1 - tile if LAST_FIRST else tile, first_head + within % heads_here


@triton.jit
def sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, seqlen_q, seqlen_k):
    """First row and length of a sequence's queries and keys: (first_q, first_k, seqlen_q, seqlen_k)."""
    first_q = 0
    first_k = 0
    if cu_seqlens_q_ptr is not None:
        first_q = tl.load(cu_seqlens_q_ptr + batch)
        seqlen_q = tl.load(cu_seqlens_q_ptr + batch + 1) - first_q
        first_k = tl.load(cu_seqlens_k_ptr + batch)
        seqlen_k = tl.load(cu_seqlens_k_ptr + batch + 1) - first_k
    return first_q, first_k, seqlen_q, seqlen_k


@triton.jit
def row_pointer(ptr, strides, batch, row, head):
    """Pointer to the first element of a row; strides are (batch, row, head), the arithmetic is 64-bit."""
    offset = tl.cast(batch, tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1]
    return ptr + offset + tl.cast(head, tl.int64) * strides[2]


@triton.jit
def row_offsets(batch, rows, heads, strides):
    """64-bit offsets of rows in a tensor with these strides of (batch, row, head)."""
    offsets = tl.cast(batch, tl.int64) * strides[0] + rows.to(tl.int64) * strides[1]
    return offsets + heads.to(tl.int64) * strides[2]


@triton.jit
def in_vectors(strides, VECTOR: tl.constexpr):
    """The strides (batch, row, head), so that the compiler sees that VECTOR divides them; by itself it looks for 16."""
    return strides[0] // VECTOR * VECTOR, strides[1] // VECTOR * VECTOR, strides[2] // VECTOR * VECTOR


@triton.jit
def find_sequence(
    cu_seqlens_ptr, batch, search_steps, target, MULTIPLY: tl.constexpr, DIVIDE: tl.constexpr, ADD: tl.constexpr
):
    """The last sequence i with cu_seqlens[i] * MULTIPLY // DIVIDE + i * ADD <= target, by bisection.

    target is a scalar or a tensor; search_steps is batch.bit_length().
    """
    lo = target * 0
    hi = lo + batch
    for _ in range(search_steps):
        middle = (lo + hi) // 2
        first = tl.load(cu_seqlens_ptr + middle) * MULTIPLY // DIVIDE + middle * ADD
        below = first <= target
        lo = tl.where(below, middle, lo)
        hi = tl.where(below, hi, middle)
    return lo
