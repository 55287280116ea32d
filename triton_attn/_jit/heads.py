"""Which sequence, head and tile a program takes, and where its rows lie."""

from typing import NamedTuple

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


class Work(NamedTuple):
    """What a program computes: the rows from `start` on of one head of one sequence.

    batch_head counts heads over the whole batch, and `program` the tiles of this head that lie before.
    """

    start: object
    batch: object
    head: object
    batch_head: object
    program: object
    num_sequences: object


@triton.jit
def assign_work(num_tiles, section_size, num_heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The Work of a program of a grid of num_tiles * num_heads * batch, in the order of `assign_tile`."""
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, LAST_FIRST)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    return Work(tile * BLOCK, batch, head, batch_head, batch * num_tiles + tile, num_batch_heads // num_heads)


class Bounds(NamedTuple):
    """First row and length of one sequence's queries and keys."""

    first_q: object
    first_k: object
    seqlen_q: object
    seqlen_k: object


@triton.jit
def sequence_bounds(seqs, batch, seqlen_q, seqlen_k):
    """Bounds of a sequence.

    seqlen_q and seqlen_k are given as the rows of a dense sequence, or as all those of packed tensors: there are no
    others, whatever cu_seqlens say.
    """
    first_q = 0
    first_k = 0
    if seqs.cu_seqlens_q_ptr is not None:
        first_q, seqlen_q = packed_bounds(seqs.cu_seqlens_q_ptr, batch, seqlen_q)
        first_k, seqlen_k = packed_bounds(seqs.cu_seqlens_k_ptr, batch, seqlen_k)
    return Bounds(first_q, first_k, seqlen_q, seqlen_k)


@triton.jit
def packed_bounds(cu_seqlens_ptr, sequence, num_rows):
    """First row and length of a sequence of a packed tensor of num_rows rows."""
    first = tl.minimum(tl.load(cu_seqlens_ptr + sequence), num_rows)
    return first, tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_rows) - first


class Spare(NamedTuple):
    """Rows after a packed batch's last sequence that a program is to clear, which of them, and whether there is any."""

    rows: object
    mask: object
    any: object


@triton.jit
def spare_rows(cu_seqlens_ptr, num_sequences, num_rows, left_over, num_own, BLOCK: tl.constexpr, ROWS_EACH=1):
    """The Spare rows of a program.

    A program has BLOCK slots, the first num_own of which hold rows of its sequence. The slots that are left over,
    counted over all programs in the order of sequences and tiles, clear the spare rows one by one: idle programs, and
    the empty ends of tiles. left_over, int64, were left over before the program's first slot: see `slots_left_over`.
    The grid has a slot for every row of the tensor (`tiles_each`), so that all are cleared, each by one program, in one
    store, and programs are added only where the host knows that there are such rows. Where a row has ROWS_EACH, as of
    the heads of a query, rows and num_own count those.
    """
    last = tl.minimum(tl.load(cu_seqlens_ptr + num_sequences), num_rows).to(tl.int64) * ROWS_EACH
    end = tl.cast(num_rows, tl.int64) * ROWS_EACH
    slots = tl.arange(0, BLOCK)
    rows = last + left_over + slots
    # Without the second condition a sequence that is longer than it was said to be would be overwritten.
    mask = (slots >= num_own) & (rows >= last) & (rows < end)
    return Spare(rows, mask, last + left_over + tl.maximum(num_own, 0) < end)


@triton.jit
def spare_rows_of(work, cu_seqlens_ptr, num_rows, end_row, num_own, BLOCK: tl.constexpr):
    """The Spare rows of a program with this Work, whose sequence ends before end_row; see `spare_rows`."""
    left_over = slots_left_over(work.program, end_row, BLOCK)
    return spare_rows(cu_seqlens_ptr, work.num_sequences, num_rows, left_over, num_own, BLOCK)


@triton.jit
def slots_left_over(program, end_row, BLOCK: tl.constexpr, ROWS_EACH=1):
    """Of `program` programs, those before a tile of the sequence that ends before end_row; see `spare_rows`."""
    return tl.cast(program, tl.int64) * BLOCK - tl.cast(end_row, tl.int64) * ROWS_EACH


@triton.jit
def row_pointer(view, batch, row, head):
    """Pointer to the first element of a row; the arithmetic is 64-bit."""
    offset = tl.cast(batch, tl.int64) * view.strides.batch + tl.cast(row, tl.int64) * view.strides.row
    return view.ptr + offset + tl.cast(head, tl.int64) * view.strides.head


@triton.jit
def row_offsets(batch, rows, heads, strides):
    """64-bit offsets of rows in a tensor with these strides of (batch, row, head)."""
    batch_stride, row_stride, head_stride = strides
    offsets = tl.cast(batch, tl.int64) * batch_stride + rows.to(tl.int64) * row_stride
    return offsets + heads.to(tl.int64) * head_stride


@triton.jit
def lse_offsets(batch, heads, rows, num_heads, num_rows):
    """64-bit offsets in contiguous log-sum-exps (batch, num_heads, num_rows)."""
    return (tl.cast(batch, tl.int64) * num_heads + heads) * num_rows + rows


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
