"""Full and partial tiles of columns: every row of a program sees every column of a full tile; a partial tile is masked.

Rows are queries and columns keys, or the other way round, as in masks.py. A kernel has one loop body, which is compiled
twice:

    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK)):
            start = block_start(blocks, i, FULL, BLOCK)

Either loop may come first.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Blocks(NamedTuple):
    """The columns [lo, hi) of a program. Tiles in [full_lo, full_hi) are full; tiles in [lo, full_lo) and in
    [full_hi, hi) are partial."""

    lo: object
    full_lo: object
    full_hi: object
    hi: object


@triton.jit
def visible_range(start, end, num_columns, window, BLOCK: tl.constexpr, ALIGN: tl.constexpr = 1, first_column=0):
    """Blocks of the columns in [first_column, num_columns) that rows at the positions [start, end) see.

    Every column of [lo, hi) is seen by at least one row, but for lo being rounded down to a multiple of ALIGN, which
    first_column is too. Every column of [full_lo, full_hi) is seen by every row; both are whole tiles away from lo.
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
    return whole_tiles(lo, full_lo, full_hi, hi, BLOCK)


@triton.jit
def whole_tiles(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """The Blocks of [lo, hi), of which every row sees [full_lo, full_hi): full tiles are whole tiles from lo."""
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(lo + tl.cdiv(full_lo - lo, BLOCK) * BLOCK, hi)
    full_hi = full_lo + tl.maximum(full_hi - full_lo, 0) // BLOCK * BLOCK
    return Blocks(lo, full_lo, full_hi, hi)


@triton.jit
def split_blocks(blocks, split, num_splits, BLOCK: tl.constexpr, KEYS: tl.constexpr = 0):
    """The Blocks of one split. All splits have the same number of tiles; the last may have fewer, or none.

    With KEYS, a multiple of BLOCK, a split has so many columns, counted from column 0. All its tiles are partial and
    begin at multiples of BLOCK: neither where they lie nor how they are computed depends on the rows.
    """
    if KEYS > 0:
        lo = tl.maximum(blocks.lo // BLOCK * BLOCK, split * KEYS)
        hi = tl.maximum(tl.minimum(blocks.hi, (split + 1) * KEYS), lo)
        return Blocks(lo, lo, lo, hi)
    else:
        share = tl.cdiv(tl.cdiv(blocks.hi - blocks.lo, BLOCK), num_splits) * BLOCK
        lo = tl.minimum(blocks.lo + split * share, blocks.hi)
        hi = tl.minimum(lo + share, blocks.hi)
        full_lo = tl.minimum(tl.maximum(blocks.full_lo, lo), hi)
        full_hi = tl.minimum(tl.maximum(blocks.full_hi, full_lo), hi)
        return Blocks(lo, full_lo, full_hi, hi)


@triton.jit
def all_partial(blocks, condition):
    """The same Blocks; where the condition holds, all tiles are partial."""
    full_hi = tl.where(condition, blocks.full_lo, blocks.full_hi)
    return Blocks(blocks.lo, blocks.full_lo, full_hi, blocks.hi)


@triton.jit
def end_full(blocks, end_column, BLOCK: tl.constexpr):
    """The same Blocks for rows that end at columns of their own, end_column (rows,): full tiles end before all."""
    full = tl.maximum(tl.minimum(blocks.full_hi, tl.min(end_column, 0)) - blocks.full_lo, 0)
    return Blocks(blocks.lo, blocks.full_lo, blocks.full_lo + full // BLOCK * BLOCK, blocks.hi)


@triton.jit
def num_blocks(blocks, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Number of full tiles, or of partial tiles."""
    if FULL:
        return (blocks.full_hi - blocks.full_lo) // BLOCK
    else:
        return tl.cdiv(blocks.full_lo - blocks.lo, BLOCK) + tl.cdiv(blocks.hi - blocks.full_hi, BLOCK)


@triton.jit
def block_start(blocks, i, FULL: tl.constexpr, BLOCK: tl.constexpr, LEFT: tl.constexpr = True):
    """First column of full tile i, or of partial tile i. Not LEFT: no partial tile comes before the full tiles."""
    if FULL:
        return blocks.full_lo + i * BLOCK
    elif not LEFT:
        return blocks.full_hi + i * BLOCK
    else:
        # full_lo is a whole number of tiles away from lo unless it equals hi; then no partial tile follows.
        start = blocks.lo + i * BLOCK
        return tl.where(start < blocks.full_lo, start, start + (blocks.full_hi - blocks.full_lo))
