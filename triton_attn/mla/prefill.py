"""Prefill kernel over keys and values of every head, and its launchers: up-projected in the kernel, or before it."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._host.device import arch_of, input_precision, launch
from .._host.layout import clear_outputs, heads_in_l2, heads_of_lse, outputs_of, tiles_each, without_dim
from .._host.tuned import choose, remember
from .._jit.args import Sequences, Strides, View, Window
from .._jit.blocks import block_start, num_blocks, visible_range
from .._jit.heads import assign_work, lse_offsets, row_pointer, sequence_bounds, spare_rows_of
from .._jit.masks import mask_scores
from .._jit.softmax import LOG2_E, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import (
    Rows,
    clear_rows,
    dot_add,
    dot_transposed,
    load_tile,
    padded_size,
    piece_0,
    piece_1,
    row_pointers,
    scale_rows,
    store_tile,
    tile_pointers,
    zeros_tile,
)
from .._jit.workarounds import fence_copies
from .api import PREFILL_INPUTS
from .configs import MlaPrefillCase, MlaPrefillConfig
from .projections import weight_strides

# A new length must not cause a compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "section_size", "first_row", "end_row", "lse_ptr", "lse_heads"]


class PrefillTile(NamedTuple):
    """What `_mla_prefill_kernel` is compiled for."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_C: int | None  # elements of a latent vector that are up-projected at a time; None: keys are in memory
    NUM_HEADS: int
    NOPE_HEAD_DIM: int
    ROPE_HEAD_DIM: int
    V_HEAD_DIM: int
    KV_LORA_RANK: int | None  # None: keys are in memory
    WIDE_ROWS: bool
    INPUT_PRECISION: str


@triton.jit
def _load_columns(ptrs, start, BLOCK: tl.constexpr, END: tl.constexpr, rows_mask):
    """Columns [start, start + BLOCK) of the rows at ptrs (rows, 1); zero past END and outside rows_mask (None: all)."""
    columns = start + tl.arange(0, BLOCK)
    mask = tl.full([ptrs.shape[0], BLOCK], True, tl.int1)
    if rows_mask is not None:
        mask &= rows_mask[:, None]
    if END % BLOCK != 0:
        mask &= (columns < END)[None, :]
    return tl.load(ptrs + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weight_piece(w, start, FIRST_ROW: tl.constexpr, ROWS: tl.constexpr, END: tl.constexpr, TILE: tl.constexpr):
    """Columns [start, start + BLOCK_C) of the rows [FIRST_ROW, FIRST_ROW + ROWS) of a head's weight; zero past END."""
    rows = FIRST_ROW + tl.arange(0, ROWS)
    rows_mask = None if FIRST_ROW + ROWS <= END else rows < END
    return _load_columns(
        row_pointers(w.source, rows, w.stride, True), start, TILE.BLOCK_C, TILE.KV_LORA_RANK, rows_mask
    )


@triton.jit
def _load_weight(w, start, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Columns [start, start + BLOCK_C) of a head's weight, in pieces of its HEAD_DIM rows."""
    FIRST: tl.constexpr = piece_0(HEAD_DIM)
    SECOND: tl.constexpr = piece_1(HEAD_DIM)
    first = _load_weight_piece(w, start, 0, FIRST, HEAD_DIM, TILE)
    if SECOND > 0:
        return first, _load_weight_piece(w, start, FIRST, SECOND, HEAD_DIM, TILE)
    else:
        return (first,)


@triton.jit
def _project(w, x, acc, INPUT_PRECISION: tl.constexpr):
    """acc + w @ x, in pieces of the rows of w."""
    first = tl.dot(w[0], x, acc[0], input_precision=INPUT_PRECISION)
    if len(w) > 1:
        return first, tl.dot(w[1], x, acc[1], input_precision=INPUT_PRECISION)
    else:
        return (first,)


@triton.jit
def _transposed(tile, dtype: tl.constexpr):
    """Each piece transposed, in the given dtype."""
    first = tile[0].to(dtype).T
    if len(tile) > 1:
        return first, tile[1].to(dtype).T
    else:
        return (first,)


@triton.jit
def _up_project(latents, start_n, rows_mask, w_uk, w_uv, TILE: tl.constexpr):
    """Keys and values (BLOCK_N, dim) of one head: the latent vectors from start_n on times the weights.

    BLOCK_C elements of a latent vector at a time, because the weights do not fit in shared memory.
    """
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    ptr = latents.source + tl.cast(start_n, tl.int64) * latents.stride
    ptrs = row_pointers(ptr, tl.arange(0, TILE.BLOCK_N), latents.stride, TILE.WIDE_ROWS)
    k = _transposed(zeros_tile(TILE.BLOCK_N, TILE.NOPE_HEAD_DIM), tl.float32)  # (NOPE_HEAD_DIM, BLOCK_N)
    v = _transposed(zeros_tile(TILE.BLOCK_N, TILE.V_HEAD_DIM), tl.float32)  # (V_HEAD_DIM, BLOCK_N)
    for start in tl.range(0, TILE.KV_LORA_RANK, TILE.BLOCK_C):
        x = _load_columns(ptrs, start, TILE.BLOCK_C, TILE.KV_LORA_RANK, rows_mask)  # (BLOCK_N, BLOCK_C)
        uk = _load_weight(w_uk, start, TILE.NOPE_HEAD_DIM, TILE)  # (NOPE_HEAD_DIM, BLOCK_C)
        uv = _load_weight(w_uv, start, TILE.V_HEAD_DIM, TILE)  # (V_HEAD_DIM, BLOCK_C)
        fence_copies()
        k = _project(uk, x.T, k, PRECISION)
        v = _project(uv, x.T, v, PRECISION)
    dtype: tl.constexpr = w_uk.source.dtype.element_ty
    return _transposed(k, dtype), _transposed(v, dtype)


@triton.jit
def _load_rows(x, start_n, rows_mask, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Rows of x from start_n on, (BLOCK_N, HEAD_DIM)."""
    ptr = x.source + tl.cast(start_n, tl.int64) * x.stride
    return load_tile(row_pointers(ptr, tl.arange(0, TILE.BLOCK_N), x.stride, TILE.WIDE_ROWS), rows_mask, HEAD_DIM)


@triton.jit
def _chunk_of_sequence(start_row, seqlen_k, first_row, end_row):
    """(first, end) of a sequence's keys in [first_row, end_row); its first key is row start_row of all sequences."""
    first_key = tl.minimum(tl.maximum(first_row - start_row, 0), seqlen_k).to(tl.int32)
    end_key = tl.minimum(tl.maximum(end_row - start_row, 0), seqlen_k).to(tl.int32)
    return first_key, end_key


@triton.jit(do_not_specialize=LENGTHS)
def _mla_prefill_kernel(
    q_nope,
    q_pe,
    k,
    v,
    k_pe,
    w_uk,
    w_uv,
    prior,
    out,
    lse_ptr,
    lse_heads,
    seqs,
    seqlen_q,
    seqlen_k,
    num_tiles,
    section_size,
    first_row,
    end_row,
    scale_log2,
    window,
    TILE: tl.constexpr,
):
    """One program computes BLOCK_M rows of out and lse of one head. Grid: num_tiles * batch * NUM_HEADS.

    Keys are counted in a sequence, rows over all sequences. seqlen_q and seqlen_k of a packed batch are all its rows.
    Only keys in the rows [first_row, end_row) are attended. Without weights k and v hold the keys and values of these
    rows. With w_uk and w_uv (no batch dimension) k holds the latent vectors, from which each tile of keys and values is
    computed. Latent vectors and k_pe have one head, of stride 0. prior is the out of the rows before, or None; lse then
    holds their log-sum-exp, and is overwritten.
    """
    FUSED: tl.constexpr = w_uk is not None
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    work = assign_work(num_tiles, section_size, TILE.NUM_HEADS, BLOCK_M, window.right is not None)
    batch, head, start_m = work.batch, work.head, work.start
    bounds = sequence_bounds(seqs, batch, seqlen_q, seqlen_k)
    num_own = bounds.seqlen_q - start_m
    if seqs.cu_seqlens_q_ptr is not None and num_own < BLOCK_M:
        end_q = bounds.first_q + bounds.seqlen_q
        spare = spare_rows_of(work, seqs.cu_seqlens_q_ptr, seqlen_q, end_q, num_own, BLOCK_M)
        if spare.any:
            clear_rows(out, head, spare, BLOCK_M, TILE.V_HEAD_DIM)
            if lse_ptr is not None:
                lse_ptrs = lse_ptr + lse_offsets(0, head, spare.rows, lse_heads, seqlen_q)
                tl.store(lse_ptrs, float("-inf"), mask=spare.mask)
    if num_own <= 0:
        return
    # Row of the sequence's first key, counted over all sequences.
    start_row = bounds.first_k
    if seqs.cu_seqlens_q_ptr is None:
        start_row = batch.to(tl.int64) * seqlen_k
    first_key, end_key = _chunk_of_sequence(start_row, bounds.seqlen_k, first_row, end_row)
    offset = bounds.offset
    end_m = tl.minimum(start_m + BLOCK_M, bounds.seqlen_q)
    blocks = visible_range(start_m + offset, end_m + offset, end_key, window, BLOCK_N, 1, first_key)

    queries = start_m + tl.arange(0, BLOCK_M)
    rows_mask = queries < bounds.seqlen_q
    first = bounds.first_q + start_m
    ptrs = tile_pointers(q_nope, batch, first, head, BLOCK_M, TILE.WIDE_ROWS)
    q_nope_tile = load_tile(ptrs, rows_mask, TILE.NOPE_HEAD_DIM)  # (BLOCK_M, NOPE_HEAD_DIM)
    ptrs = tile_pointers(q_pe, batch, first, head, BLOCK_M, TILE.WIDE_ROWS)
    q_pe_tile = load_tile(ptrs, rows_mask, TILE.ROPE_HEAD_DIM)  # (BLOCK_M, ROPE_HEAD_DIM)
    k_pe_rows = Rows(row_pointer(k_pe, batch, bounds.first_k, 0), k_pe.strides.row, None, None)
    if FUSED:
        k_rows = Rows(row_pointer(k, batch, bounds.first_k, 0), k.strides.row, None, None)
        w_uk_rows = Rows(row_pointer(w_uk, 0, 0, head), w_uk.strides.row, None, None)
        w_uv_rows = Rows(row_pointer(w_uv, 0, 0, head), w_uv.strides.row, None, None)
    else:
        k_rows = Rows(row_pointer(k, 0, start_row - first_row, head), k.strides.row, None, None)
        v_rows = Rows(row_pointer(v, 0, start_row - first_row, head), v.strides.row, None, None)

    m_i, l_i = softmax_init(None, head, BLOCK_M)
    acc = zeros_tile(BLOCK_M, TILE.V_HEAD_DIM)
    if lse_ptr is not None:
        lse_batch = 0 if seqs.cu_seqlens_q_ptr is not None else batch
        lse_ptrs = lse_ptr + lse_offsets(lse_batch, head, bounds.first_q + queries, lse_heads, seqlen_q)
    if prior is not None:
        ptrs = tile_pointers(prior, batch, first, head, BLOCK_M, TILE.WIDE_ROWS)
        acc = load_tile(ptrs, rows_mask, TILE.V_HEAD_DIM)
        m_i = tl.load(lse_ptrs, mask=rows_mask, other=float("-inf")) * LOG2_E
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N)):
            start_n = block_start(blocks, i, FULL, BLOCK_N, window.left is not None)
            keys_mask = None if FULL else start_n + tl.arange(0, BLOCK_N) < blocks.hi
            k_pe_tile = _load_rows(k_pe_rows, start_n, keys_mask, TILE.ROPE_HEAD_DIM, TILE)
            if FUSED:
                k_tile, v_tile = _up_project(k_rows, start_n, keys_mask, w_uk_rows, w_uv_rows, TILE)
            else:
                k_tile = _load_rows(k_rows, start_n, keys_mask, TILE.NOPE_HEAD_DIM, TILE)
                v_tile = _load_rows(v_rows, start_n, keys_mask, TILE.V_HEAD_DIM, TILE)
            fence_copies()
            s = dot_transposed(q_nope_tile, k_tile, PRECISION)  # (BLOCK_M, BLOCK_N)
            s = dot_transposed(q_pe_tile, k_pe_tile, PRECISION, s)
            if not FULL:
                s = mask_scores(s, queries, start_n, end_key, offset, window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, not FULL)
            acc = dot_add(p.to(v_tile[0].dtype), v_tile, scale_rows(acc, alpha), PRECISION)  # (BLOCK_M, V_HEAD_DIM)

    norm, lse = softmax_finish(m_i, l_i)
    ptrs = tile_pointers(out, batch, first, head, BLOCK_M, TILE.WIDE_ROWS)
    store_tile(ptrs, rows_mask, scale_rows(acc, norm), TILE.V_HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptrs, lse, mask=rows_mask)


def launch_mla_fused(call, out, lse, config=None):
    """Launch the kernel that computes keys and values from latent vectors: one launch, no memory but out and lse.

    call is a PrefillCall, out and lse are those that `mla_prefill` returns; lse may be None: not wanted. config is an
    MlaPrefillConfig (None: the default).
    """
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, *_ = call
    plan, rows = _plan_fused(call.find_layouts(), _parameters(call), config)
    plan.launch(Operands(q_nope, q_pe, kv_latent, None, k_pe, w_uk, w_uv, None, out), lse, call.lengths, rows)


def _parameters(call):
    """What plans depend on besides tensors: max_seqlen_q, max_seqlen_k, softmax_scale, causal, arch and precision."""
    arch = arch_of(call.q_nope)
    numbers = *call.lengths[2:], call.softmax_scale, call.causal
    return *numbers, arch, input_precision(call.q_nope.dtype, arch)


@remember
def _plan_fused(layouts, parameters, config):
    """(Plan, (first, end) of the rows of keys) of a PrefillCall with these Layouts."""
    q_nope, q_pe, latents, k_pe, w_uk, w_uv = layouts.of(PREFILL_INPUTS[:6])
    out = outputs_of(q_nope.shape, w_uv.shape[1], q_nope.dtype).out
    of = Operands(*(x and x[:2] for x in (q_nope, q_pe, latents, None, k_pe, w_uk, w_uv, None)), out)
    plan = _plan(PrefillKey(of, q_nope.dtype, batch_of(layouts.cu_seqlens_q), *parameters), config)
    return plan, (0, math.prod(latents.shape[:-1]))


def batch_of(cu_seqlens):
    """The number of sequences of a packed batch, None of a dense one."""
    return None if cu_seqlens is None else cu_seqlens.shape[0] - 1


def launch_mla_materialized(call, out, lse, chunk, config=None):
    """Launch the kernel over keys and values in memory, a chunk (heads, rows of the latent vectors) at a time.

    Arguments as `launch_mla_fused`. If the rows of a head do not fit in one chunk, the running output is kept in fp32.
    """
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, *_ = call
    heads_each, rows_each = chunk
    num_heads, nope_dim, _ = w_uk.shape
    v_dim = w_uv.shape[1]
    num_rows, parameters = math.prod(kv_latent.shape[:-1]), _parameters(call)
    heads_of = (lambda x, heads: x[:, :, heads]) if q_nope.ndim == 4 else (lambda x, heads: x[:, heads])
    is_cut = rows_each < num_rows
    if is_cut and lse is None:
        lse = out.new_empty((*out.shape[:-3], num_heads, out.shape[-3]), dtype=torch.float32)
    k, v = (kv_latent.new_empty((heads_each, min(rows_each, num_rows), dim)) for dim in (nope_dim, v_dim))
    prior = out.new_empty((*out.shape[:-2], heads_each, v_dim), dtype=torch.float32) if is_cut else None
    for first_head in range(0, num_heads, heads_each):
        heads = slice(first_head, min(first_head + heads_each, num_heads))
        count = heads.stop - heads.start
        out_here, lse_here = heads_of(out, heads), None if lse is None else lse[..., heads, :]
        for start in range(0, max(num_rows, 1), rows_each):
            end = min(start + rows_each, num_rows)
            for x, w in ((k, w_uk), (v, w_uv)):
                project_rows(kv_latent, start, end, w[heads], x[:count])
            prior_here = heads_of(prior, slice(count)) if start else None
            target = out_here if end == num_rows else heads_of(prior, slice(count))
            q = heads_of(q_nope, heads), heads_of(q_pe, heads)
            operands = Operands(*q, k[:count], v[:count], k_pe, None, None, prior_here, target)
            layouts = Operands._make([None if x is None else (x.shape, x.stride()) for x in operands])
            key = PrefillKey(layouts, q_nope.dtype, batch_of(call.lengths.cu_seqlens_q), *parameters)
            _plan(key, config).launch(operands, lse_here, call.lengths, (start, end))


def project_rows(kv_latent, start, end, w, out):
    """out[h, :end - start] = x @ w[h].T for the rows start to end of kv_latent, counted over its outer dimensions."""
    if start == end:
        return
    rank = kv_latent.shape[-1]
    if kv_latent.ndim == 2 or kv_latent.stride(0) == kv_latent.shape[1] * kv_latent.stride(1):
        pieces = [(kv_latent.view(-1, rank)[start:end], 0)]
    else:  # sequence by sequence: rows of all would be a copy
        seqlen = kv_latent.shape[1]
        pieces = [
            (kv_latent[i, max(start - i * seqlen, 0) : end - i * seqlen], max(i * seqlen - start, 0))
            for i in range(start // seqlen, -(-end // seqlen))
        ]
    for rows, first in pieces:
        _matmul(rows.expand(len(w), -1, -1), w.mT, out[:, first : first + len(rows)])


def _matmul(a, b, out):
    """out = a @ b. On CPUs with AMX torch's 16-bit matmuls read past the end of a row whose width is no multiple of 32.
    NaN in rows after the last real one would reach it, so these matmuls run in fp32."""
    if a.device.type == "cpu" and a.dtype.itemsize < 4 and a.shape[-1] % 32:
        out.copy_(a.float() @ b.float())
    else:
        torch.bmm(a, b, out=out)


class Operands(NamedTuple):
    """One value for each tensor that the kernel takes as a View, in its order; None for one that is not there.

    With w_uk and w_uv k is the latent vectors (batch, rows, dim) or (rows, dim) and v is None. Without them k and v are
    the keys and values (heads, rows, dim) of the rows that are attended.
    """

    q_nope: Any
    q_pe: Any
    k: Any
    v: Any
    k_pe: Any
    w_uk: Any
    w_uv: Any
    prior: Any
    out: Any


class PrefillKey(NamedTuple):
    """Everything of a launch that its plan depends on; plans are cached by it."""

    layouts: Operands  # (shape, strides)
    dtype: torch.dtype
    packed_batch: int | None  # None: dense
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    arch: str
    precision: str  # of fp32 matmuls


class Plan(NamedTuple):
    """A launch but for its tensors and the rows of the keys that it attends."""

    num_programs: int
    strides: Operands
    counts: tuple  # seqlen_q, seqlen_k, num_tiles, section_size
    scores: tuple  # scale_log2, window
    constants: dict
    alike: object  # of this plan alone

    def launch(self, operands, lse, lengths, rows):
        """Attend the rows (first, end) of the keys. lse is that of the heads of operands.out, or None: not wanted."""
        out = operands.out
        if self.num_programs == 0:
            clear_outputs(out, lse)
            return
        num_heads = 0 if lse is None else heads_of_lse(lse)
        args = (
            *[x if x is None else View(x, strides) for x, strides in zip(operands, self.strides)],
            lse,
            num_heads,
            Sequences(lengths.cu_seqlens_q, lengths.cu_seqlens_k, None),
            *self.counts,
            *rows,
            *self.scores,
        )
        alike = self.alike, num_heads, rows
        launch(_mla_prefill_kernel, (self.num_programs,), out.device, args, self.constants, alike)


@remember
def _plan(key, config):
    """The Plan of a launch; config as `launch_mla_fused` takes it."""
    layouts = key.layouts
    (*_, num_rows, num_heads, nope_dim), _ = layouts.q_nope
    batch = layouts.q_nope[0][0] if key.packed_batch is None else key.packed_batch
    fused = layouts.w_uk is not None
    rank = layouts.k[0][-1] if fused else None
    dims = nope_dim, layouts.q_pe[0][-1], layouts.out[0][-1]
    case = MlaPrefillCase(key.arch, key.dtype, fused, *dims, max(map(padded_size, dims)), key.max_seqlen_k)
    tiles = config or choose(MlaPrefillConfig, case)
    num_tiles = tiles_each(key.max_seqlen_q, num_rows, batch, tiles.block_m)
    # Keys and values of as many heads as fit in the L2 cache together, or their weights.
    bytes_per_head = (rank if fused else key.max_seqlen_k) * (nope_dim + dims[2]) * key.dtype.itemsize
    section_size = heads_in_l2(bytes_per_head, 1, batch * num_heads)
    strides = _strides(layouts)
    widest_row = max(one.row for one in strides if one is not None)
    tile = PrefillTile(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_C=min(tiles.block_c, padded_size(rank)) if fused else None,
        NUM_HEADS=num_heads,
        NOPE_HEAD_DIM=nope_dim,
        ROPE_HEAD_DIM=dims[1],
        V_HEAD_DIM=dims[2],
        KV_LORA_RANK=rank,
        WIDE_ROWS=max(tiles.block_m, tiles.block_n) * widest_row >= 2**31,
        INPUT_PRECISION=key.precision,
    )
    return Plan(
        num_tiles * batch * num_heads,
        strides,
        (num_rows, layouts.k_pe[0][-2], num_tiles, section_size),
        (key.softmax_scale * LOG2_E.value, Window(None, 0 if key.causal else None)),
        dict(TILE=tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        object(),
    )


def _strides(layouts):
    """The Strides of each of the Operands."""
    of_k = weight_strides if layouts.w_uk is None else _latent_strides
    by_operand = Operands(
        q_nope=_head_strides,
        q_pe=_head_strides,
        k=of_k,
        v=weight_strides,
        k_pe=_latent_strides,
        w_uk=weight_strides,
        w_uv=weight_strides,
        prior=_head_strides,
        out=_head_strides,
    )
    return Operands._make([layout and of(layout[1]) for of, layout in zip(by_operand, layouts)])


def _head_strides(strides):
    return Strides(*without_dim(strides))


def _latent_strides(strides):
    """Those of latent vectors and of k_pe, (batch, rows, dim) or (rows, dim): of one head."""
    return Strides(0 if len(strides) == 2 else strides[0], strides[-2], 0)
