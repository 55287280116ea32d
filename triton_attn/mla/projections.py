"""Kernels before and after absorbed attention, and their launchers: queries times w_uk, merged splits times w_uv."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .._host.device import launch
from .._host.layout import INDICES, heads_of_lse, without_dim
from .._host.tuned import remember
from .._jit.args import Strides, View
from .._jit.heads import lse_offsets, row_offsets, row_pointer
from .._jit.rope import Rotation, load_rotated
from .._jit.softmax import LN_2, softmax_finish
from .._jit.tiles import padded_size, row_pointers
from .._jit.workarounds import fence_copies

# A new length must not cause a compilation.
LENGTHS = ["seqlen_q", "capacity", "num_positions", "num_tokens", "num_splits", *INDICES, "lse_ptr", "lse_heads"]
FIXED_TOKENS = 16  # of a tile in a batch-invariant call


class AbsorbTile(NamedTuple):
    """What `_absorb_kernel` is compiled for."""

    BLOCK_T: int  # tokens
    BLOCK_C: int  # columns of the result
    BLOCK_K: int  # columns of q_nope at a time
    NUM_HEADS: int
    NOPE_HEAD_DIM: int
    ROPE_HEAD_DIM: int
    KV_LORA_RANK: int
    ROTARY_DIM: int  # 0: nothing is rotated
    INTERLEAVED: bool
    INPUT_PRECISION: str


@triton.jit(do_not_specialize=LENGTHS)
def _absorb_kernel(
    q_nope,
    q_pe,
    w_uk,
    q_ptr,
    rope,
    cache_seqlens_ptr,
    num_positions,
    capacity,
    seqlen_q,
    num_tokens,
    scale,
    TILE: tl.constexpr,
):
    """One program computes BLOCK_C columns of scale * [q_nope @ w_uk, rope(q_pe)] for BLOCK_T tokens and one head.

    Grid: (heads * tiles of tokens, blocks of columns and one for the rotary part); a token is one query. q is
    (tokens, heads, kv_lora_rank + qk_rope_head_dim), contiguous.
    """
    BLOCK_T: tl.constexpr = TILE.BLOCK_T
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    ROPE_HEAD_DIM: tl.constexpr = TILE.ROPE_HEAD_DIM
    KV_LORA_RANK: tl.constexpr = TILE.KV_LORA_RANK
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tokens = tl.program_id(0) // NUM_HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_mask = tokens < num_tokens
    batch = (tokens // seqlen_q).to(tl.int64)
    query = (tokens % seqlen_q).to(tl.int64)
    q_rows = q_ptr + (tokens.to(tl.int64) * NUM_HEADS + head)[:, None] * (KV_LORA_RANK + ROPE_HEAD_DIM)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        columns_mask = columns < KV_LORA_RANK
        x_ptrs = q_nope.ptr + row_offsets(batch, query, head, q_nope.strides)[:, None]
        w_ptrs = w_uk.ptr + head * w_uk.strides.head + columns[None, :]
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in tl.range(0, TILE.NOPE_HEAD_DIM, TILE.BLOCK_K):
            offs_k = start + tl.arange(0, TILE.BLOCK_K)
            inside = offs_k < TILE.NOPE_HEAD_DIM
            mask = tokens_mask[:, None] & inside[None, :]
            x = tl.load(x_ptrs + offs_k[None, :], mask=mask, other=0.0)  # (BLOCK_T, BLOCK_K)
            mask = inside[:, None] & columns_mask[None, :]
            w_rows = offs_k[:, None].to(tl.int64) * w_uk.strides.row
            w = tl.load(w_ptrs + w_rows, mask=mask, other=0.0)  # (BLOCK_K, BLOCK_C)
            if BLOCK_T >= 64:
                fence_copies()
            acc = tl.dot(x, w, acc, input_precision=TILE.INPUT_PRECISION)
        absorbed = (acc * scale).to(q_ptr.dtype.element_ty)
        tl.store(q_rows + columns[None, :], absorbed, mask=tokens_mask[:, None] & columns_mask[None, :])
    else:
        offs_r = tl.arange(0, padded_size(ROPE_HEAD_DIM))
        positions = None
        if TILE.ROTARY_DIM > 0:
            seqlens_k = tl.minimum(tl.load(cache_seqlens_ptr + batch, mask=tokens_mask, other=0), capacity)
            positions = seqlens_k - seqlen_q + query
        rotation = Rotation(rope, positions, num_positions)
        rows = q_pe.ptr + row_offsets(batch, query, head, q_pe.strides)
        rotated = load_rotated(rows, tokens_mask, offs_r, rotation, ROPE_HEAD_DIM, TILE.ROTARY_DIM, TILE.INTERLEAVED)
        rotated = (rotated * scale).to(q_ptr.dtype.element_ty)
        rope_mask = tokens_mask[:, None] & (offs_r < ROPE_HEAD_DIM)[None, :]
        tl.store(q_rows + KV_LORA_RANK + offs_r[None, :], rotated, mask=rope_mask)


class MergeProjectTile(NamedTuple):
    """What `_merge_project_kernel` is compiled for."""

    BLOCK_T: int  # tokens
    BLOCK_S: int  # splits at a time
    BLOCK_C: int  # columns of the splits at a time
    BLOCK_V: int  # columns of the result
    NUM_HEADS: int
    KV_LORA_RANK: int
    V_HEAD_DIM: int
    INPUT_PRECISION: str


@triton.jit(do_not_specialize=LENGTHS)
def _merge_project_kernel(
    splits_ptr,
    lses_ptr,
    w_uv,
    out,
    lse_ptr,
    lse_heads,
    seqlen_q,
    num_tokens,
    num_splits,
    TILE: tl.constexpr,
):
    """One program merges the splits of BLOCK_T tokens of one head and multiplies the result with BLOCK_V rows of w_uv.

    Grid: (heads * tiles of tokens, blocks of rows); a token is one query, a row of out. The splits (splits, tokens,
    heads, kv_lora_rank) and lses (splits, batch, heads, seqlen_q) are contiguous.
    """
    BLOCK_T: tl.constexpr = TILE.BLOCK_T
    BLOCK_S: tl.constexpr = TILE.BLOCK_S
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    KV_LORA_RANK: tl.constexpr = TILE.KV_LORA_RANK
    ROWS: tl.constexpr = max(16, BLOCK_T)  # a matmul needs 16; fewer tokens are repeated
    head = tl.program_id(0) % NUM_HEADS
    first_token = tl.program_id(0) // NUM_HEADS * BLOCK_T
    tokens = first_token + tl.arange(0, BLOCK_T)
    tokens_mask = tokens < num_tokens
    batch = tokens // seqlen_q
    query = tokens % seqlen_q
    splits = tl.arange(0, BLOCK_S)
    split_stride = tl.cast(num_tokens, tl.int64) * NUM_HEADS
    # 32 bits are enough: 2^31 rows of one split would not fit in memory. 64 bits would take twice the registers.
    rows = tokens * NUM_HEADS + head
    lse_rows = (batch * NUM_HEADS + head) * seqlen_q + query

    m_i = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        lses = _load_lses(lses_ptr, lse_rows, tokens_mask, first + splits, num_splits, split_stride)
        m_new = tl.maximum(m_i, tl.max(lses, 1))
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.math.exp2(m_i - m_sub) + tl.sum(tl.math.exp2(lses - m_sub[:, None]), 1)
        m_i = m_new
    norm, lse = softmax_finish(m_i, l_i)
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)

    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    values_mask = values < TILE.V_HEAD_DIM
    w_ptrs = row_pointers(row_pointer(w_uv, 0, 0, head), values, w_uv.strides.row, True)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in tl.range(0, KV_LORA_RANK, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = columns < KV_LORA_RANK
        latents = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for first in range(0, num_splits, BLOCK_S):
            lses = _load_lses(lses_ptr, lse_rows, tokens_mask, first + splits, num_splits, split_stride)
            weights = tl.math.exp2(lses - m_i[:, None])  # (BLOCK_T, BLOCK_S)
            # The output of a split in which a query sees no key is not loaded.
            mask = (lses > float("-inf"))[:, :, None] & inside[None, None, :]
            offsets = rows[:, None] + (first + splits)[None, :].to(tl.int64) * split_stride
            ptrs = splits_ptr + offsets[:, :, None] * KV_LORA_RANK + columns[None, None, :]
            outputs = tl.load(ptrs, mask=mask, other=0.0)  # (BLOCK_T, BLOCK_S, BLOCK_C)
            latents += tl.sum(outputs.to(tl.float32) * weights[:, :, None], 1)
        latents = (latents * norm[:, None]).to(w_uv.ptr.dtype.element_ty)
        if ROWS > BLOCK_T:
            latents = tl.reshape(tl.broadcast_to(latents[None], (ROWS // BLOCK_T, BLOCK_T, BLOCK_C)), (ROWS, BLOCK_C))
        w = tl.load(w_ptrs + columns[None, :], mask=values_mask[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(latents, w.T, acc, input_precision=TILE.INPUT_PRECISION)  # (ROWS, BLOCK_V)

    # Repeated rows are not stored.
    repeats = tl.arange(0, ROWS)
    rows = first_token + repeats
    rows_mask = (repeats < BLOCK_T) & (rows < num_tokens)
    out_ptrs = row_pointers(row_pointer(out, 0, 0, head), rows, out.strides.row, True) + values[None, :]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=rows_mask[:, None] & values_mask[None, :])
    if lse_ptr is not None and tl.program_id(1) == 0:
        lse_ptrs = lse_ptr + lse_offsets(batch, head, query, lse_heads, seqlen_q)
        tl.store(lse_ptrs, lse, mask=tokens_mask)


@triton.jit
def _load_lses(lses_ptr, rows, rows_mask, splits, num_splits, split_stride):
    """Log-sum-exps (rows, splits) in log2 units; -inf outside rows_mask and past the last split."""
    mask = rows_mask[:, None] & (splits < num_splits)[None, :]
    ptrs = lses_ptr + (rows[:, None] + splits[None, :].to(tl.int64) * split_stride)
    return tl.load(ptrs, mask=mask, other=float("-inf")) / LN_2


class AbsorbPlan(NamedTuple):
    """A launch of `_absorb_kernel` but for its tensors, and the memory that it fills."""

    grid: tuple
    strides: tuple  # Strides of q_nope, q_pe and w_uk
    counts: tuple  # num_positions, capacity, seqlen_q, num_tokens
    shape: tuple  # of [q_nope @ w_uk, q_pe]
    kv_lora_rank: int
    constants: dict

    def parts(self, q):
        """Of the memory of the result, that of q_nope @ w_uk and of q_pe, (batch, seqlen_q, num_heads, dim)."""
        return q, q[..., self.kv_lora_rank :]

    def launch(self, q_nope, q_pe, w_uk, q, scale, cache_seqlens=None, rope=None, alike=None):
        """Store scale * [q_nope @ w_uk, q_pe] in q. rope is the Rope that rotates q_pe, or None. alike: as in
        `launch`."""
        of_q, of_q_pe, of_w = self.strides
        operands = View(q_nope, of_q), View(q_pe, of_q_pe), View(w_uk, of_w)
        args = (*operands, q, rope, cache_seqlens, *self.counts, scale)
        launch(_absorb_kernel, self.grid, q.device, args, self.constants, alike)


class Positions(NamedTuple):
    """What the positions of queries and the rotation by them depend on, besides lengths."""

    capacity: int
    num_positions: int  # of the tables
    rotary_dim: int
    interleaved: bool


@remember
def plan_absorb(layout, positions, dtype, precision, batch_invariant=False):
    """The AbsorbPlan for the (shape, strides) of q_nope, q_pe and w_uk. Queries (total_q, heads, dim) are one batch."""
    (shape_q, strides_q), (shape_pe, strides_pe), (shape_w, strides_w) = layout
    *batch, seqlen_q, num_heads, nope_dim = shape_q
    capacity, num_positions, rotary_dim, interleaved = positions
    kv_lora_rank, rope_dim, num_tokens = shape_w[2], shape_pe[-1], math.prod(batch) * seqlen_q
    block_t = FIXED_TOKENS if batch_invariant else _block_of_tokens(num_tokens, at_least=16)
    # 64 columns of 64 tokens in fp32 spill up to 11 KB, half of the loop's instructions.
    block_k = 32 if dtype.itemsize == 4 and block_t >= 64 else 64
    tile = AbsorbTile(
        BLOCK_T=block_t,
        BLOCK_C=min(128, padded_size(kv_lora_rank)),
        BLOCK_K=min(block_k, padded_size(nope_dim)),
        NUM_HEADS=num_heads,
        NOPE_HEAD_DIM=nope_dim,
        ROPE_HEAD_DIM=rope_dim,
        KV_LORA_RANK=kv_lora_rank,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=interleaved,
        INPUT_PRECISION=precision,
    )
    return AbsorbPlan(
        grid=(num_heads * -(-num_tokens // tile.BLOCK_T), -(-kv_lora_rank // tile.BLOCK_C) + 1),
        strides=(*(Strides(*without_dim(one)) for one in (strides_q, strides_pe)), weight_strides(strides_w)),
        counts=(num_positions, capacity, seqlen_q, num_tokens),
        shape=(*shape_q[:-1], kv_lora_rank + rope_dim),
        kv_lora_rank=kv_lora_rank,
        constants=dict(TILE=tile, num_warps=4, num_stages=2),
    )


class ProjectPlan(NamedTuple):
    """A launch of `_merge_project_kernel` but for its tensors."""

    grid: tuple
    strides: tuple  # Strides of w_uv and out
    counts: tuple  # seqlen_q, num_tokens, num_splits
    constants: dict

    def launch(self, splits, lse_splits, w_uv, out, lse, alike=None):
        """out[t, h] = w_uv[h] @ (sum of the splits of token t and head h).

        splits is (num_splits, batch, seqlen_q, num_heads, kv_lora_rank), lse_splits (num_splits, batch, num_heads,
        seqlen_q). lse is one of these, a slice of the heads of a larger one, or None: not wanted. alike: as in
        `launch`.
        """
        of_w, of_out = self.strides
        of_lse = lse, 0 if lse is None else heads_of_lse(lse)
        args = (splits, lse_splits, View(w_uv, of_w), View(out, of_out), *of_lse, *self.counts)
        launch(_merge_project_kernel, self.grid, out.device, args, self.constants, alike)


@remember
def plan_merge_project(shape, layout_w, strides_out, dtype, precision, batch_invariant=False):
    """The ProjectPlan; shape is that of the splits, layout_w and dtype those of w_uv."""
    num_splits, batch, seqlen_q, num_heads, kv_lora_rank = shape
    shape_w, strides_w = layout_w
    v_head_dim, num_tokens = shape_w[1], batch * seqlen_q
    half = dtype.itemsize == 2  # matmuls of fp32 take their operands to registers
    block_t = FIXED_TOKENS if batch_invariant else _block_of_tokens(num_tokens, at_least=1)
    block_c = min(64 if half else 32, padded_size(kv_lora_rank))
    tile = MergeProjectTile(
        BLOCK_T=block_t,
        BLOCK_S=_block_of_splits(num_splits, block_t * block_c),
        BLOCK_C=block_c,
        BLOCK_V=min(128 if half else 64, padded_size(v_head_dim)),
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        V_HEAD_DIM=v_head_dim,
        INPUT_PRECISION=precision,
    )
    grid = num_heads * -(-num_tokens // block_t), -(-v_head_dim // tile.BLOCK_V)
    strides = weight_strides(strides_w), Strides(0, *strides_out[-3:-1])
    return ProjectPlan(grid, strides, (seqlen_q, num_tokens, num_splits), dict(TILE=tile, num_warps=4, num_stages=2))


def weight_strides(strides):
    """The Strides of a weight (heads, rows, columns), or of the keys of heads, without a batch."""
    return Strides(0, strides[1], strides[0])


def _block_of_tokens(num_tokens, at_least):
    """One of a few sizes, because each is a compilation."""
    return next((size for size in (1, 4, 16, 64) if at_least <= size and num_tokens <= size), 64)


def _block_of_splits(num_splits, tile_size):
    """One of a few sizes: 1, 4, or as many as fill a tile of 4096 elements, which is loaded at once. A larger tile
    would take the registers of another program on the SM."""
    most = max(1, min(32, 4096 // tile_size))
    if num_splits == 1:
        return 1
    return min(4, most) if num_splits <= 8 else most
