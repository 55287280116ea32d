"""The tiles of columns that a tile of rows walks over: full ones, which every row sees whole, and partial ones, which
need a mask.

Rows may be queries and columns keys, or rows keys and columns queries, as in masks.py. A kernel has one loop body,
which is compiled twice:

    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK)):
            start = block_start(blocks, i, FULL, BLOCK)
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Blocks(NamedTuple):
    """Columns [lo, hi), of which tiles of [full_lo, full_hi) are full; those of the rest, counted from lo and from
    full_hi, are partial."""

    lo: object
    full_lo: object
    full_hi: object
    hi: object


@triton.jit
def visible_range(start, end, num_columns, window, BLOCK: tl.constexpr, ALIGN: tl.constexpr = 1, first_column=0):
    """Blocks of the columns from first_column to num_columns that rows at the positions [start, end) see.

    [lo, hi) is seen by at least one row; lo is rounded down to a multiple of ALIGN, as first_column is one. [full_lo,
    full_hi), a whole number of tiles of BLOCK columns counted from lo, is seen by every row.
    """
    left, right = window
    lo = first_column
    hi = num_columns
    full_lo = first_column
    full_hi = num_columns
    if left is not None:
        lo = tl.maximum(start - left, first_column) // ALIGN * ALIGN
        full_lo = tl.maximum(end - 1 - left, first_column)
    if right is not None:
        hi = tl.minimum(end + right, num_columns)
        full_hi = tl.minimum(start + right + 1, num_columns)
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(lo + tl.cdiv(full_lo - lo, BLOCK) * BLOCK, hi)
    full_hi = full_lo + tl.maximum(full_hi - full_lo, 0) // BLOCK * BLOCK
    return Blocks(lo, full_lo, full_hi, hi)


@triton.jit
def split_blocks(blocks, split, num_splits, BLOCK: tl.constexpr):
    """The share of one split: as many tiles as the others have, but for the last ones."""
    share = tl.cdiv(tl.cdiv(blocks.hi - blocks.lo, BLOCK), num_splits) * BLOCK
    lo = tl.minimum(blocks.lo + split * share, blocks.hi)
    hi = tl.minimum(lo + share, blocks.hi)
    full_lo = tl.minimum(tl.maximum(blocks.full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(blocks.full_hi, full_lo), hi)
    return Blocks(lo, full_lo, full_hi, hi)


@triton.jit
def all_partial(blocks, condition):
    """The same Blocks, without a full tile where the condition holds."""
    full_hi = tl.where(condition, blocks.full_lo, blocks.full_hi)
    return Blocks(blocks.lo, blocks.full_lo, full_hi, blocks.hi)


@triton.jit
def num_blocks(blocks, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of the loop over full ones, or of that over partial ones."""
    if FULL:
        return (blocks.full_hi - blocks.full_lo) // BLOCK
    else:
        return tl.cdiv(blocks.full_lo - blocks.lo, BLOCK) + tl.cdiv(blocks.hi - blocks.full_hi, BLOCK)


@triton.jit
def block_start(blocks, i, FULL: tl.constexpr, BLOCK: tl.constexpr, LEFT: tl.constexpr = True):
    """First column of tile i of that loop. Not LEFT: no partial tile lies before the full ones."""
    if FULL:
        return blocks.full_lo + i * BLOCK
    elif not LEFT:
        return blocks.full_hi + i * BLOCK
    else:
        # full_lo is a whole number of tiles from lo unless it is hi, and then no partial tile follows it.
        start = blocks.lo + i * BLOCK
        return tl.where(start < blocks.full_lo, start, start + (blocks.full_hi - blocks.full_lo))
