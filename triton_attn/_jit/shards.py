"""Masks and biases over the keys of one rank, where ranks take turns: see `KeyShard`.

Columns are the rank's keys, in their order; rows have the positions of queries among the keys of all ranks. The
functions are those of blocks.py and masks.py with a ShardWindow.
"""

import triton
import triton.language as tl

from .blocks import whole_tiles
from .masks import mask_scores, scale_scores, subtract_distance


@triton.jit
def columns_of_rank(position, rank, num_ranks, interleave):
    """How many of the keys before a position a rank has."""
    position = tl.maximum(position, 0)
    turns = position // (num_ranks * interleave)
    rest = position - turns * (num_ranks * interleave) - rank * interleave
    return turns * interleave + tl.minimum(tl.maximum(rest, 0), interleave)


@triton.jit
def columns_before(position, window):
    """Columns before a position."""
    return columns_of_rank(position, window.rank, window.num_ranks, window.interleave)


@triton.jit
def positions_of_rank(columns, window):
    """The positions of columns among the keys of all ranks."""
    turns = columns // window.interleave
    return (turns * window.num_ranks + window.rank) * window.interleave + columns % window.interleave


@triton.jit
def num_cached(seqlen_k, window, SHARDED: tl.constexpr):
    """How many of the first keys of a sequence are in the cache."""
    if SHARDED:
        return columns_before(seqlen_k, window)
    else:
        return seqlen_k


@triton.jit
def visible_range_of_rank(start, end, num_columns, window, BLOCK: tl.constexpr, ALIGN: tl.constexpr, first_column):
    """`visible_range` of a rank's columns."""
    lo = first_column
    hi = num_columns
    full_lo = first_column
    full_hi = num_columns
    if window.right is not None:
        hi = tl.minimum(columns_before(end + window.right, window), num_columns)
        full_hi = tl.minimum(columns_before(start + window.right + 1, window), num_columns)
    if window.left is not None:
        lo = tl.maximum(columns_before(start - window.left, window), first_column)
        lo = tl.where(lo < hi, lo // ALIGN * ALIGN, lo)  # a rank may have nothing that the rows see
        full_lo = tl.maximum(columns_before(end - 1 - window.left, window), first_column)
    return whole_tiles(lo, full_lo, full_hi, hi, BLOCK)


@triton.jit
def mask_scores_of_rank(s, rows, start_column, num_columns, window):
    """`mask_scores` of a rank's columns: a row's limits are the last and the first column that it sees."""
    last = tl.zeros_like(rows) + num_columns
    if window.right is not None:
        last = columns_before(rows + (window.right + 1), window) - 1
    s = mask_scores(s, last, start_column, num_columns, 0, (None, 0))
    if window.left is not None:
        s = mask_scores(s, columns_before(rows - window.left, window), start_column, num_columns, 0, (0, None))
    return s


@triton.jit
def scale_scores_of_rank(s, scores, slope, rows, start_column, EXACT: tl.constexpr):
    """`scale_scores` of a rank's columns."""
    s = scale_scores(s, scores, None, rows, start_column, 0, EXACT)
    if slope is not None:
        positions = positions_of_rank(start_column + tl.arange(0, s.shape[1]), scores.window)
        s = subtract_distance(s, positions[None, :] - rows[:, None], slope)
    return s
