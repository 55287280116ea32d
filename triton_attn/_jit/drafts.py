"""Trees of draft tokens: masks and biases where bits say which of the last keys of a sequence a row sees.

The keys from first_draft on are the drafts of a sequence. Bit j of a row says whether it sees draft j. A row sees the
keys before them, and then those drafts, as if nothing else were in the cache: the position of a draft follows from how
many drafts the row sees before it, and the position of the row is that of the last one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import Blocks
from .masks import mask_scores, scale_scores, subtract_distance
from .shards import columns_before, mask_scores_of_rank, positions_of_rank

MAX_DRAFTS: tl.constexpr = tl.constexpr(64)  # bits of an int64


class TreeMask(NamedTuple):
    """The bits of all queries: (batch, rows), or (rows,) with a stride of 0."""

    ptr: object
    batch_stride: object


class Drafts(NamedTuple):
    """The first draft, of a tile of rows or of each row, and the bits of each row. Not read without a tree."""

    first: object
    bits: object


@triton.jit
def load_bits(tree_mask, batch, query, mask, num_drafts):
    """The bits of rows, of which only the first num_drafts count; -1 where a row is not in the mask."""
    offsets = tl.cast(batch, tl.int64) * tree_mask.batch_stride + query
    bits = tl.load(tree_mask.ptr + offsets, mask=mask, other=-1)
    # A shift of -1, whose sign fills up from the left, by 64 would be undefined.
    num_drafts = tl.minimum(num_drafts, MAX_DRAFTS)
    beyond = tl.full([1], -1, tl.int64) << tl.minimum(num_drafts, MAX_DRAFTS - 1).to(tl.int64)
    return tl.where(num_drafts < MAX_DRAFTS, bits & ~beyond, bits)


@triton.jit
def _count_in_nibbles(x):
    """How many bits of each four of a uint32 are set."""
    x -= (x >> 1) & 0x55555555
    return (x & 0x33333333) + ((x >> 2) & 0x33333333)


@triton.jit
def count_bits(x):
    """How many bits of an int64 are set. In halves: a GPU has no 64-bit integer operations."""
    x = _count_in_nibbles(x.to(tl.uint32)) + _count_in_nibbles((x >> 32).to(tl.uint32))
    x = (x & 0x0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F)
    x += x >> 8
    x += x >> 16
    return (x & 127).to(tl.int32)


@triton.jit
def bits_in_window(bits, left):
    """The bits without those of drafts that are more than `left` before the last one. Most windows hold all drafts."""
    too_many = count_bits(bits) - 1 - left
    for i in range(0, tl.max(too_many, 0)):
        bits = tl.where(i < too_many, bits & (bits - 1), bits)
    return bits


@triton.jit
def _columns_before_drafts(first_draft, window, TILE: tl.constexpr):
    """Keys of the cache before the first draft; negative if the first drafts are not in the cache."""
    if TILE.SHARDED:
        return columns_before(first_draft, window)
    else:
        return first_draft


@triton.jit
def keys_before_drafts(first_draft, window, TILE: tl.constexpr):
    """Keys on the pages before that of the first draft. A prefix tree's nodes have no others: each row sees all of
    them that are in its window, and needs no bits."""
    columns = _columns_before_drafts(first_draft, window, TILE)
    return tl.maximum(columns, 0) // TILE.PAGE_SIZE * TILE.PAGE_SIZE


@triton.jit
def without_drafts(blocks, first_draft, window, TILE: tl.constexpr):
    """The same Blocks with no full tile that has a key from first_draft on."""
    end = tl.minimum(blocks.full_hi, _columns_before_drafts(first_draft, window, TILE))
    full = tl.maximum(end - blocks.full_lo, 0)
    return Blocks(blocks.lo, blocks.full_lo, blocks.full_lo + full // TILE.BLOCK_N * TILE.BLOCK_N, blocks.hi)


@triton.jit
def _drafts_of(s, rows, start_column, first_draft, window, SHARDED: tl.constexpr):
    """Which draft a column is, negative before them: (rows, columns)."""
    columns = tl.arange(0, s.shape[1])[None, :]
    if SHARDED:
        return positions_of_rank(start_column + columns, window) - (tl.zeros_like(rows) + first_draft)[:, None]
    else:
        return columns + (tl.zeros_like(rows) + (start_column - first_draft))[:, None]


@triton.jit
def _drafts_after(bits, draft):
    """How many drafts a row sees from this one on, less one: its distance from the last one."""
    from_here = tl.full([1, 1], -1, tl.int64) << tl.minimum(tl.maximum(draft, 0), MAX_DRAFTS - 1).to(tl.int64)
    return count_bits(bits[:, None] & from_here) - 1


@triton.jit
def mask_scores_of_tree(s, rows, drafts, start_column, num_columns, window, SHARDED: tl.constexpr):
    """`mask_scores` of rows at these positions: of the drafts they see those whose bits are set, if they are in the
    window."""
    draft = _drafts_of(s, rows, start_column, drafts.first, window, SHARDED)
    is_set = (drafts.bits[:, None] >> tl.minimum(tl.maximum(draft, 0), MAX_DRAFTS - 1).to(tl.int64)) & 1
    in_context = draft < 0
    if window.left is not None:
        in_context &= draft >= (rows - window.left - drafts.first)[:, None]
    visible = in_context | ((draft >= 0) & (is_set != 0))
    s = tl.where(visible, s, float("-inf"))
    return mask_scores(s, rows, start_column, num_columns, 0, (None, None))


@triton.jit
def scale_scores_of_tree(s, scores, slope, rows, start_column, EXACT: tl.constexpr, TILE: tl.constexpr):
    """`scale_scores` of a kernel's Rows."""
    s = scale_scores(s, scores, None, rows.position, start_column, 0, EXACT)
    if slope is not None:
        first, bits = rows.drafts
        draft = _drafts_of(s, rows.position, start_column, first, scores.window, TILE.SHARDED)
        before = (rows.position - first)[:, None] - draft
        s = subtract_distance(s, tl.where(draft < 0, before, _drafts_after(bits, draft)), slope)
    return s


@triton.jit
def mask_scores_of_rows(s, rows, start_column, window, TILE: tl.constexpr):
    """Scores of a kernel's Rows over a cache, -inf where a row does not see a key."""
    if TILE.TREE:
        return mask_scores_of_tree(s, rows.position, rows.drafts, start_column, rows.end_key, window, TILE.SHARDED)
    elif TILE.SHARDED:
        return mask_scores_of_rank(s, rows.position, start_column, rows.end_key, window)
    else:
        return mask_scores(s, rows.position, start_column, rows.end_key, 0, window)
