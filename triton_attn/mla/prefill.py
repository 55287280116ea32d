"""Kernel of prefill over keys and values of every head, and its launchers: up-projected in the kernel, or before it."""

import math

import torch
import triton
import triton.language as tl

from .._host.device import arch_of, input_precision, launch_packed
from .._host.layout import (
    LSE,
    clear_outputs,
    heads_in_l2,
    lse_strides,
    row_strides,
    strides_are_wide,
    tiles_each,
)
from .._host.tuned import choose
from .._jit.args import Sequences, Strides, View
from .._jit.blocks import block_start, num_blocks, visible_range
from .._jit.heads import assign_tile, row_pointer, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import mask_scores
from .._jit.softmax import LOG2_E, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import load_piece, padded_size, row_pointers, store_piece, tile_pointers
from .._jit.workarounds import fence_copies
from .configs import MlaPrefillCase, MlaPrefillConfig

# A new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "section_size", "first_row", "end_row", *LSE]


@triton.jit
def _load_columns(ptrs, columns, END: tl.constexpr, EVEN: tl.constexpr, rows_mask):
    """Columns of the rows at ptrs (rows, 1); zero past END, unless EVEN, and where rows_mask (None: all) ends."""
    mask = tl.full([ptrs.shape[0], columns.shape[0]], True, tl.int1)
    if rows_mask is not None:
        mask &= rows_mask[:, None]
    if not EVEN:
        mask &= (columns < END)[None, :]
    return tl.load(ptrs + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _up_project(
    latent_ptrs,
    rows_mask,
    w_uk_ptr,
    w_uv_ptr,
    w_uk_stride,
    w_uv_stride,
    NOPE_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Keys and values of one head, both (dim, rows): the two weights times a tile of latent vectors, BLOCK_C numbers of
    them at a time, since the weights exceed shared memory."""
    EVEN: tl.constexpr = KV_LORA_RANK % BLOCK_C == 0
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    w_uk_ptrs = w_uk_ptr + (offs_k.to(tl.int64) * w_uk_stride)[:, None]
    w_uv_ptrs = w_uv_ptr + (offs_v.to(tl.int64) * w_uv_stride)[:, None]
    k_mask = None if NOPE_HEAD_DIM == BLOCK_K else offs_k < NOPE_HEAD_DIM
    v_mask = None if V_HEAD_DIM == BLOCK_V else offs_v < V_HEAD_DIM
    k = tl.zeros([BLOCK_K, latent_ptrs.shape[0]], tl.float32)
    v = tl.zeros([BLOCK_V, latent_ptrs.shape[0]], tl.float32)
    for start in tl.range(0, KV_LORA_RANK, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        latents = _load_columns(latent_ptrs, columns, KV_LORA_RANK, EVEN, rows_mask)
        w_uk = _load_columns(w_uk_ptrs, columns, KV_LORA_RANK, EVEN, k_mask)
        w_uv = _load_columns(w_uv_ptrs, columns, KV_LORA_RANK, EVEN, v_mask)
        fence_copies()
        k = tl.dot(w_uk, latents.T, k, input_precision=INPUT_PRECISION)
        v = tl.dot(w_uv, latents.T, v, input_precision=INPUT_PRECISION)
    dtype: tl.constexpr = w_uk_ptr.dtype.element_ty
    return k.to(dtype), v.to(dtype)


@triton.jit(do_not_specialize=LENGTHS)
def _mla_prefill_kernel(
    q_nope_ptr,
    q_pe_ptr,
    k_ptr,
    v_ptr,
    k_pe_ptr,
    w_uk_ptr,
    w_uv_ptr,
    prior_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_nope_strides,
    q_pe_strides,
    k_strides,
    v_strides,
    k_pe_strides,
    w_strides,
    prior_strides,
    out_strides,
    lse_batch_stride,
    lse_row_stride,
    lse_head_stride,
    seqlen_q,
    seqlen_k,
    num_tiles,
    section_size,
    first_row,
    end_row,
    scale_log2,
    window,
    NUM_HEADS: tl.constexpr,
    NOPE_HEAD_DIM: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SIGN: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes BLOCK_M rows of out and lse of one head. Grid: num_tiles * batch * NUM_HEADS.

    Keys count from 0 in a sequence, rows over all sequences; seqlen_q and seqlen_k of packed sequences are all their
    rows. Only keys in [first_row, end_row) are attended. Without
    weights k and v are keys and values of these rows, strides (head, row). With w_uk and w_uv k is the latent vectors,
    strides (batch, row): a tile of keys and values is made of a tile of them. prior (None: none) is the out of earlier
    rows, whose lse lies where lse goes. Other strides are (batch, row, head), (batch, row) of k_pe, the rows of
    (w_uk, w_uv) and their heads.
    """
    FUSED: tl.constexpr = w_uk_ptr is not None
    num_sequences = tl.num_programs(0) // num_tiles // NUM_HEADS
    num_batch_heads = num_sequences * NUM_HEADS
    tile, batch_head = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, window[1] is not None)
    head = batch_head % NUM_HEADS
    batch = batch_head // NUM_HEADS
    num_rows = seqlen_q
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        Sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr), batch, seqlen_q, seqlen_k
    )
    start_m = tile * BLOCK_M
    if cu_seqlens_q_ptr is not None and start_m + BLOCK_M > seqlen_q:
        left_over = slots_left_over(batch * num_tiles + tile, first_q + seqlen_q, BLOCK_M)
        spare = spare_rows(cu_seqlens_q_ptr, num_sequences, num_rows, left_over, seqlen_q - start_m, BLOCK_M)
        if spare.any:
            spare_out = out_ptr + tl.cast(head, tl.int64) * out_strides.head
            spare_out = row_pointers(spare_out, spare.rows, out_strides.row, True)
            store_piece(spare_out, spare.mask, tl.zeros([BLOCK_M, BLOCK_V], tl.float32), 0, V_HEAD_DIM)
            if lse_ptr is not None:
                spare_lse = lse_ptr + tl.cast(head, tl.int64) * lse_head_stride + spare.rows * lse_row_stride
                tl.store(spare_lse, float("-inf"), mask=spare.mask)
    if start_m >= seqlen_q:
        return
    # Row of the sequence's first key, which a dense batch has by the length of a sequence.
    start_row = first_k
    if cu_seqlens_q_ptr is not None:
        batch = 0
    else:
        start_row = batch.to(tl.int64) * seqlen_k
    first_key = tl.minimum(tl.maximum(first_row - start_row, 0), seqlen_k).to(tl.int32)
    end_key = tl.minimum(tl.maximum(end_row - start_row, 0), seqlen_k).to(tl.int32)
    offset = seqlen_k - seqlen_q
    end_m = tl.minimum(start_m + BLOCK_M, seqlen_q)
    blocks = visible_range(start_m + offset, end_m + offset, end_key, window, BLOCK_N, 1, first_key)

    rows = tl.arange(0, BLOCK_M)
    queries = start_m + rows
    rows_mask = queries < seqlen_q
    q_nope = View(q_nope_ptr, q_nope_strides)
    q_pe = View(q_pe_ptr, q_pe_strides)
    q_nope_ptrs = tile_pointers(q_nope, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    q_pe_ptrs = tile_pointers(q_pe, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    q_nope = load_piece(q_nope_ptrs, rows_mask, 0, BLOCK_K, NOPE_HEAD_DIM)
    q_pe = load_piece(q_pe_ptrs, rows_mask, 0, BLOCK_R, ROPE_HEAD_DIM)
    if SIGN < 1:  # the online softmax takes a factor above 0
        q_nope *= SIGN
        q_pe *= SIGN
    k_pe_ptr += tl.cast(batch, tl.int64) * k_pe_strides[0] + tl.cast(first_k, tl.int64) * k_pe_strides[1]
    if FUSED:
        k_ptr += tl.cast(batch, tl.int64) * k_strides[0] + tl.cast(first_k, tl.int64) * k_strides[1]
        w_uk_ptr += tl.cast(head, tl.int64) * w_strides[2]
        w_uv_ptr += tl.cast(head, tl.int64) * w_strides[3]
    else:
        k_ptr += tl.cast(head, tl.int64) * k_strides[0] + tl.cast(start_row - first_row, tl.int64) * k_strides[1]
        v_ptr += tl.cast(head, tl.int64) * v_strides[0] + tl.cast(start_row - first_row, tl.int64) * v_strides[1]

    m_i, l_i = softmax_init(None, head, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lse_ptrs = None
    if lse_ptr is not None:
        lse = View(lse_ptr, Strides(lse_batch_stride, lse_row_stride, lse_head_stride))
        lse_ptrs = row_pointer(lse, batch, first_q + start_m, head) + rows * lse_row_stride
    if prior_ptr is not None:
        prior = View(prior_ptr, prior_strides)
        prior_ptrs = tile_pointers(prior, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
        acc = load_piece(prior_ptrs, rows_mask, 0, BLOCK_V, V_HEAD_DIM)
        m_i = tl.load(lse_ptrs, mask=rows_mask, other=float("-inf")) * LOG2_E
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N)):
            start_n = block_start(blocks, i, FULL, BLOCK_N, False)
            keys = tl.arange(0, BLOCK_N)
            keys_mask = None if FULL else start_n + keys < blocks.hi
            start = tl.cast(start_n, tl.int64)
            k_pe_ptrs = row_pointers(k_pe_ptr + start * k_pe_strides[1], keys, k_pe_strides[1], WIDE_ROWS)
            k_pe = load_piece(k_pe_ptrs, keys_mask, 0, BLOCK_R, ROPE_HEAD_DIM)
            k_start = k_ptr + start * k_strides[1]
            if FUSED:
                latent_ptrs = row_pointers(k_start, keys, k_strides[1], WIDE_ROWS)
                k, v = _up_project(
                    latent_ptrs,
                    keys_mask,
                    w_uk_ptr,
                    w_uv_ptr,
                    w_strides[0],
                    w_strides[1],
                    NOPE_HEAD_DIM,
                    V_HEAD_DIM,
                    KV_LORA_RANK,
                    BLOCK_K,
                    BLOCK_V,
                    BLOCK_C,
                    INPUT_PRECISION,
                )
                v = v.T
            else:
                k_ptrs = row_pointers(k_start, keys, k_strides[1], WIDE_ROWS)
                v_ptrs = row_pointers(v_ptr + start * v_strides[1], keys, v_strides[1], WIDE_ROWS)
                k = load_piece(k_ptrs, keys_mask, 0, BLOCK_K, NOPE_HEAD_DIM).T
                v = load_piece(v_ptrs, keys_mask, 0, BLOCK_V, V_HEAD_DIM)
            fence_copies()
            s = tl.dot(q_nope, k, input_precision=INPUT_PRECISION)
            s = tl.dot(q_pe, k_pe.T, s, input_precision=INPUT_PRECISION)
            if not FULL:
                s = mask_scores(s, queries, start_n, end_key, offset, window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, not FULL)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=INPUT_PRECISION)

    norm, lse = softmax_finish(m_i, l_i)
    out_ptrs = tile_pointers(View(out_ptr, out_strides), batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    store_piece(out_ptrs, rows_mask, acc * norm[:, None], 0, V_HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptrs, lse, mask=rows_mask)


def launch_mla_fused(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse, lengths, softmax_scale, causal, config=None):
    """Launch the kernel that makes keys and values of latent vectors: one launch, no memory but out and lse.

    Tensors are (batch, seqlen, ...) or packed (total, ...), lse (batch, num_heads, seqlen_q) or (num_heads, total_q),
    or None: not wanted; lengths is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), the first two None in a
    dense batch; config an MlaPrefillConfig (None: the default).
    """
    kv = kv_latent, None, k_pe, w_uk, w_uv
    num_rows = math.prod(kv_latent.shape[:-1])
    _launch(q_nope, q_pe, kv, None, out, lse, lengths, (0, num_rows), softmax_scale, causal, w_uv.shape[1], config)


def launch_mla_materialized(
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse, lengths, softmax_scale, causal, chunk, config=None
):
    """Launch the kernel over keys and values in memory, a chunk (heads, rows of the latent vectors) at a time.

    Arguments as `launch_mla_fused`. Where the rows of a head are cut, the sums so far are kept in fp32 and in lse.
    """
    heads_each, rows_each = chunk
    num_heads, nope_dim, _ = w_uk.shape
    v_dim = w_uv.shape[1]
    num_rows = math.prod(kv_latent.shape[:-1])
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
            kv = k[:count], v[:count], k_pe, None, None
            q = heads_of(q_nope, heads), heads_of(q_pe, heads)
            _launch(*q, kv, prior_here, target, lse_here, lengths, (start, end), softmax_scale, causal, v_dim, config)


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
        _product(rows.expand(len(w), -1, -1), w.mT, out[:, first : first + len(rows)])


def _product(a, b, out):
    """out = a @ b. With AMX torch's half-precision products on a CPU read past the end of a row whose width 32 does not
    divide: NaN in rows after the last real one would reach it, so they are made in fp32."""
    if a.device.type == "cpu" and a.dtype.itemsize < 4 and a.shape[-1] % 32:
        out.copy_(a.float() @ b.float())
    else:
        torch.bmm(a, b, out=out)


def _launch(q_nope, q_pe, kv, prior, out, lse, lengths, rows, softmax_scale, causal, v_dim, config):
    k, v, k_pe, w_uk, w_uv = kv
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    *_, num_heads, nope_dim = q_nope.shape
    batch = q_nope.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if q_pe.numel() == 0 or batch == 0:
        clear_outputs(out, lse)
        return
    arch = arch_of(q_nope)
    fused = w_uk is not None
    dims = dict(BLOCK_K=padded_size(nope_dim), BLOCK_R=padded_size(q_pe.shape[-1]), BLOCK_V=padded_size(v_dim))
    widths = nope_dim, q_pe.shape[-1], v_dim, max(dims.values())
    tiles = config or choose(MlaPrefillConfig, MlaPrefillCase(arch, q_nope.dtype, fused, *widths, max_seqlen_k))
    with_rows = q_nope, q_pe, out, k_pe.unsqueeze(-2), *((k.unsqueeze(-2),) if fused else ())
    num_tiles = tiles_each(max_seqlen_q, q_nope.shape[-3], batch, tiles.block_m)
    scale_log2 = softmax_scale * LOG2_E.value
    # (batch, row) of latent vectors and rotary keys; (head, row) of keys and values.
    k_strides = row_strides(k.unsqueeze(-2))[:2] if fused else k.stride()[:2]
    k_pe_strides = row_strides(k_pe.unsqueeze(-2))[:2]
    per_head = max_seqlen_k * (nope_dim + v_dim) if not fused else w_uk.shape[2] * (nope_dim + v_dim)
    args = (
        q_nope,
        q_pe,
        k,
        v,
        k_pe,
        w_uk,
        w_uv,
        prior,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        Strides(*row_strides(q_nope)),
        Strides(*row_strides(q_pe)),
        k_strides,
        None if fused else v.stride()[:2],
        k_pe_strides,
        (w_uk.stride(1), w_uv.stride(1), w_uk.stride(0), w_uv.stride(0)) if fused else None,
        None if prior is None else Strides(*row_strides(prior)),
        Strides(*row_strides(out)),
        *((None, None, None) if lse is None else lse_strides(lse)),
        q_nope.shape[-3],
        k_pe.shape[-2],
        num_tiles,
        heads_in_l2(per_head * q_nope.element_size(), 1, batch * num_heads),
        *rows,
        abs(scale_log2) or 1.0,
        (None, 0 if causal else None),
    )
    constants = dict(
        NUM_HEADS=num_heads,
        NOPE_HEAD_DIM=nope_dim,
        ROPE_HEAD_DIM=q_pe.shape[-1],
        V_HEAD_DIM=v_dim,
        KV_LORA_RANK=k.shape[-1] if fused else None,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_C=min(tiles.block_c, padded_size(k.shape[-1])) if fused else None,
        SIGN=(scale_log2 > 0) - (scale_log2 < 0),
        WIDE_ROWS=strides_are_wide(max(tiles.block_m, tiles.block_n), *(x.stride() for x in with_rows)),
        INPUT_PRECISION=input_precision(q_nope.dtype, arch),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    launch_packed(_mla_prefill_kernel, (num_tiles * batch * num_heads,), out.device, args, constants | dims)
