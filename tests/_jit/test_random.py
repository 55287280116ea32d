"""Which tiles a kernel visits, and which of them it masks, against the definition of visibility."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_attn._host.definition import visible_keys
from triton_attn._jit.args import ShardWindow
from triton_attn._jit.blocks import visible_range
from triton_attn._jit.masks import mask_scores
from triton_attn._jit.shards import mask_scores_of_rank, visible_range_of_rank


@triton.jit
def _range_kernel(out_ptr, start, end, num_columns, offset, window, first, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    lo, full_lo, full_hi, hi = visible_range(start + offset, end + offset, num_columns, window, BLOCK, ALIGN, first)
    tl.store(out_ptr, lo)
    tl.store(out_ptr + 1, full_lo)
    tl.store(out_ptr + 2, full_hi)
    tl.store(out_ptr + 3, hi)


@triton.jit
def _mask_kernel(out_ptr, start_row, start_column, num_columns, offset, window, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    s = mask_scores(tl.zeros([ROWS, COLS], tl.float32), start_row + rows, start_column, num_columns, offset, window)
    tl.store(out_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :], s)


@triton.jit
def _range_of_rank_kernel(
    out_ptr, start, end, num_columns, offset, window, first, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    start, end = start + offset, end + offset
    lo, full_lo, full_hi, hi = visible_range_of_rank(start, end, num_columns, window, BLOCK, ALIGN, first)
    tl.store(out_ptr, lo)
    tl.store(out_ptr + 1, full_lo)
    tl.store(out_ptr + 2, full_hi)
    tl.store(out_ptr + 3, hi)


@triton.jit
def _mask_of_rank_kernel(
    out_ptr, start_row, start_column, num_columns, offset, window, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    s = tl.zeros([ROWS, COLS], tl.float32)
    s = mask_scores_of_rank(s, start_row + rows + offset, start_column, num_columns, window)
    tl.store(out_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :], s)


pytestmark = pytest.mark.random
lengths = st.integers(1, 70)
sides = st.none() | st.integers(0, 40)


@st.composite
def shards(draw):
    """() for all keys, or (rank, num_ranks, interleave)."""
    if draw(st.booleans()):
        return ()
    num_ranks = draw(st.integers(1, 5))
    return draw(st.integers(0, num_ranks - 1)), num_ranks, draw(st.sampled_from([1, 2, 4, 16]))


def own_columns(visible, shard):
    """The columns of a shard."""
    if not shard:
        return visible
    rank, num_ranks, interleave = shard
    return visible[:, torch.arange(visible.shape[1]) // interleave % num_ranks == rank]


@pytest.mark.oldest
@settings(max_examples=20 * settings.default.max_examples)
@given(lengths, lengths, st.tuples(sides, sides), shards(), st.sampled_from([1, 4, 16]), st.integers(0, 40), st.data())
def test_visible_range(device, seqlen_q, seqlen_k, window, shard, align, first, data):
    first = first // align * align
    start = data.draw(st.integers(0, seqlen_q - 1))
    end = data.draw(st.integers(start + 1, seqlen_q))
    bounds = torch.empty(4, dtype=torch.int32, device=device)
    left, right = (-1 if side is None else side for side in window)
    visible, _ = visible_keys(seqlen_q, seqlen_k, False, (left, right), "cpu")
    visible = own_columns(visible, shard)
    columns, offset = visible.shape[1], seqlen_k - seqlen_q
    kernel, window = (_range_of_rank_kernel, ShardWindow(*window, *shard)) if shard else (_range_kernel, window)
    kernel[(1,)](bounds, start, end, columns, offset, window, first, BLOCK=16, ALIGN=align)
    lo, full_lo, full_hi, hi = bounds.tolist()

    rows = visible[start:end]
    rows[:, :first] = False
    seen = rows.any(0).nonzero().flatten().tolist()
    assert lo % align == 0 if window[0] is not None else lo == first
    assert first <= lo <= full_lo <= full_hi <= max(hi, lo)
    # Full tiles are whole tiles from lo, and every row sees all of their keys.
    assert (full_lo - lo) % 16 == 0 or full_lo == hi
    assert (full_hi - full_lo) % 16 == 0
    assert rows[:, full_lo:full_hi].all()
    if not seen:
        # Between two keys of a rank lo may be rounded down to one that no row sees.
        assert hi == lo or (shard and hi - lo < align)
        return
    # All visible keys are visited, and no more than alignment requires.
    assert lo <= seen[0] < lo + align
    assert hi == seen[-1] + 1
    # No tile that every row sees is masked.
    tiles = range(lo, hi - 15, 16)
    assert all(full_lo <= tile < full_hi for tile in tiles if rows[:, tile : tile + 16].all())


@pytest.mark.oldest
@settings(max_examples=20 * settings.default.max_examples)
@given(lengths, lengths, st.tuples(sides, sides), shards(), st.data())
def test_mask_scores(device, seqlen_q, seqlen_k, window, shard, data):
    start_row = data.draw(st.integers(0, seqlen_q - 1))
    left, right = (-1 if side is None else side for side in window)
    visible, _ = visible_keys(seqlen_q, seqlen_k, False, (left, right), "cpu")
    visible = own_columns(visible, shard)
    start_column = data.draw(st.integers(0, max(visible.shape[1] - 1, 0)))
    out = torch.empty(16, 32, device=device)
    kernel, window = (_mask_of_rank_kernel, ShardWindow(*window, *shard)) if shard else (_mask_kernel, window)
    arguments = start_row, start_column, visible.shape[1], seqlen_k - seqlen_q, window
    kernel[(1,)](out, *arguments, ROWS=16, COLS=32)

    visible = visible[start_row : start_row + 16, start_column : start_column + 32]
    masked = torch.full((16, 32), float("-inf"))
    num_rows, num_columns = visible.shape
    masked[:num_rows, :num_columns][visible] = 0
    assert torch.equal(out.cpu()[:num_rows], masked[:num_rows])
