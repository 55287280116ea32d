"""Kernel that merges partial results of attention, and its launcher."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._host.device import launch
from .._host.layout import without_dim
from .._host.tuned import remember
from .._jit.args import Splits, Strides, View
from .._jit.heads import lse_offsets, row_offsets
from .._jit.softmax import LOG2_E, merge_weights, softmax_finish
from .._jit.tiles import merge_rows

# Splits that are loaded at once, and elements of the tile that they make.
MAX_SPLITS = 32
TILE_ELEMENTS = 4096
# A new length must not cause a compilation.
LENGTHS = ["lses_ptr", "num_splits", "num_rows", "seqlen_q", "lse_ptr"]


class Tile(NamedTuple):
    """What the kernel is compiled for: how many elements of (rows, splits, head dim) are loaded at once."""

    BLOCK_ROWS: int
    BLOCK_SPLITS: int
    BLOCK_D: int
    HEAD_DIM_V: int
    IN_ORDER: bool  # splits are merged one after the other, so that those without keys change no bit


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    outs,
    lses_ptr,
    out,
    lse_ptr,
    num_splits,
    num_rows,
    seqlen_q,
    num_heads,
    TILE: tl.constexpr,
):
    """One program merges the splits of BLOCK_ROWS rows; a row is one head of one query.

    Grid: num_rows / BLOCK_ROWS, rounded up. Log-sum-exps are contiguous, (split,) batch, head, query.
    """
    BLOCK_ROWS: tl.constexpr = TILE.BLOCK_ROWS
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_mask = rows < num_rows
    head = rows % num_heads
    query = rows // num_heads % seqlen_q
    batch = rows // num_heads // seqlen_q
    outs_rows = row_offsets(batch, query, head, outs.view.strides)
    lse_rows = lse_offsets(batch, head, query, num_heads, seqlen_q)
    offs_d = tl.arange(0, TILE.BLOCK_D)

    results = Results(outs.view.ptr, outs.split_stride, lses_ptr, outs_rows, lse_rows, rows_mask, num_rows, num_splits)
    if TILE.IN_ORDER:
        merged, lse = _merge_in_order(results, offs_d, TILE)
        tl.debug_barrier()  # out and lse may be those of the first split: all threads have read them
    else:
        merged, lse = _merge_at_once(results, offs_d, TILE)
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_rows, lse, mask=rows_mask)
    offsets = row_offsets(batch, query, head, out.strides)
    mask = rows_mask[:, None] & (offs_d < TILE.HEAD_DIM_V)[None, :]
    tl.store(out.ptr + offsets[:, None] + offs_d[None, :], merged.to(out.ptr.dtype.element_ty), mask=mask)


class Results(NamedTuple):
    """Results of the splits: where those of the first are, and what leads from one to the next."""

    outs_ptr: object
    split_stride: object
    lses_ptr: object
    outs_rows: object  # offsets (BLOCK_ROWS,)
    lse_rows: object
    rows_mask: object
    num_rows: object  # from a split's log-sum-exps to the next
    num_splits: object


@triton.jit
def _load_lses(results, splits):
    """Log-sum-exps (BLOCK_ROWS, splits), -inf past the last row and split."""
    mask = results.rows_mask[:, None] & (splits < results.num_splits)[None, :]
    lses_ptrs = results.lses_ptr + results.lse_rows[:, None] + splits[None, :] * results.num_rows
    return tl.load(lses_ptrs, mask=mask, other=float("-inf"))


@triton.jit
def _merge_at_once(results, offs_d, TILE: tl.constexpr):
    """(out, lse) of the rows, BLOCK_SPLITS splits at a time."""
    BLOCK_ROWS: tl.constexpr = TILE.BLOCK_ROWS
    BLOCK_SPLITS: tl.constexpr = TILE.BLOCK_SPLITS
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    splits = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    m_i = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in range(0, results.num_splits, BLOCK_SPLITS):
        lse = _load_lses(results, first + splits) * LOG2_E  # (BLOCK_ROWS, BLOCK_SPLITS)
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # how others write that there is no key
        m_new = tl.maximum(m_i, tl.max(lse, 1))
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.math.exp2(lse - m_sub[:, None])
        alpha = tl.math.exp2(m_i - m_sub)
        offsets = results.outs_rows[:, None] + (first + splits)[None, :] * results.split_stride
        seen = (lse > float("-inf"))[:, :, None] & (offs_d < TILE.HEAD_DIM_V)[None, None, :]
        tile_ptrs = results.outs_ptr + (offsets[:, :, None] + offs_d[None, None, :])
        tile = tl.load(tile_ptrs, mask=seen, other=0.0).to(tl.float32)  # (BLOCK_ROWS, BLOCK_SPLITS, BLOCK_D)
        acc = acc * alpha[:, None] + tl.sum(tile * weights[:, :, None], 1)
        l_i = l_i * alpha + tl.sum(weights, 1)
        m_i = m_new
    norm, lse = softmax_finish(m_i, l_i)
    return acc * norm[:, None], lse


@triton.jit
def _merge_in_order(results, offs_d, TILE: tl.constexpr):
    """(out, lse) of the rows, one split after the other up to the last that has keys."""
    BLOCK_ROWS: tl.constexpr = TILE.BLOCK_ROWS
    BLOCK_SPLITS: tl.constexpr = TILE.BLOCK_SPLITS
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    splits = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    end = results.num_splits * 0
    for first in range(0, results.num_splits, BLOCK_SPLITS):
        lses = _load_lses(results, first + splits)
        ends = tl.where(lses > float("-inf"), (first + splits + 1)[None, :], 0)
        end = tl.maximum(end, tl.max(tl.max(ends, 1), 0).to(tl.int32))
    merged = (tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32),)
    lse = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for split in range(0, end):
        split = tl.cast(split, tl.int64)
        lse_ptrs = results.lses_ptr + results.lse_rows + split * results.num_rows
        lse_here = tl.load(lse_ptrs, mask=results.rows_mask, other=float("-inf"))
        offsets = results.outs_rows + split * results.split_stride
        seen = (lse_here > float("-inf"))[:, None] & (offs_d < TILE.HEAD_DIM_V)[None, :]
        tile = tl.load(results.outs_ptr + (offsets[:, None] + offs_d[None, :]), mask=seen, other=0.0)
        kept, added, lse = merge_weights(lse, lse_here)
        merged = merge_rows(merged, kept, (tile.to(tl.float32),), added)
    return merged[0], lse


def launch_merge(outs, lses, out, lse, in_order=False):
    """`Plan.launch` of the plan for these tensors."""
    plan_merge(outs.shape, outs.stride(), out.stride(), in_order).launch(outs, lses, out, lse)


class Plan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int
    strides: tuple  # Strides of a split, the stride between splits, Strides of out
    counts: tuple  # num_splits, num_rows, seqlen_q, num_heads
    constants: dict

    def launch(self, outs, lses, out, lse, alike=None):
        """One launch, no device-to-host sync. alike: as in `launch`.

        outs is (num_splits, batch, seqlen_q, num_heads_q, head_dim_v), lses (num_splits, batch, num_heads_q, seqlen_q),
        out and lse as one of them; lse may be None: not wanted. lses and lse are contiguous.
        """
        if self.num_programs == 0:
            return
        of_outs, split_stride, of_out = self.strides
        args = (Splits(View(outs, of_outs), split_stride), lses, View(out, of_out), lse, *self.counts)
        launch(_merge_kernel, (self.num_programs,), outs.device, args, self.constants, alike)


@remember
def plan_merge(shape, strides_outs, strides_out, in_order=False):
    """The Plan for the shape and strides of outs and the strides of out, (rows, heads, dim) if the batch is packed.

    in_order: see `merge_weights`; out and lse may then be those of the first split.
    """
    num_splits, batch, seqlen_q, num_heads, head_dim_v = shape
    num_rows = batch * seqlen_q * num_heads
    block_d = triton.next_power_of_2(head_dim_v)
    block_splits = min(MAX_SPLITS, triton.next_power_of_2(max(1, num_splits)))
    block_rows = max(1, TILE_ELEMENTS // (block_d * block_splits))
    if in_order:  # nothing may depend on the number of splits
        block_rows, block_splits = max(1, 1024 // block_d), MAX_SPLITS
    split_stride, *of_split, _ = strides_outs
    strides = Strides(*of_split), split_stride, Strides(*without_dim(strides_out))
    tile = Tile(
        BLOCK_ROWS=block_rows, BLOCK_SPLITS=block_splits, BLOCK_D=block_d, HEAD_DIM_V=head_dim_v, IN_ORDER=in_order
    )
    counts = num_splits, num_rows, seqlen_q, num_heads
    return Plan(triton.cdiv(num_rows, block_rows), strides, counts, dict(TILE=tile, num_warps=4))
