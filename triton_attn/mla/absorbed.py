"""Kernels of the absorbed form, and their launchers: absorb the queries, attend, merge and project.

Decode reads latent vectors from pages, prefill from rows of a tensor; all else is the same.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .._host.checks import layout_of
from .._host.device import arch_of, input_precision, launch_packed, num_processors
from .._host.latent import SCALE_BLOCK, latent_parts
from .._host.layout import vector_elements, without_dim
from .._jit.heads import in_vectors, row_offsets, sequence_bounds
from .._jit.masks import mask_scores, visible_range
from .._jit.paging import decode_float8
from .._jit.rope import load_rotated
from .._jit.softmax import LN_2, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import load_piece, padded_size, piece_0, piece_1, store_piece
from ..combine.merge import launch_merge
from ..combine.splits import choose_num_splits
from .configs import default_decode_config, has_wgmma, programs_per_processor

LOG2_E = math.log2(math.e)
# A new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "num_splits", "num_tokens"]


@triton.constexpr_function
def latent_piece_0(kv_lora_rank, halves):
    """First piece of a latent vector, of which one of 512 numbers has one or, for fewer registers at once, two."""
    return min(piece_0(kv_lora_rank), 256) if halves else piece_0(kv_lora_rank)


@triton.constexpr_function
def latent_piece_1(kv_lora_rank, halves):
    """Second piece, or 0."""
    return 256 if halves and piece_0(kv_lora_rank) > 256 else piece_1(kv_lora_rank)


@triton.jit
def _load_latents(
    ptrs,
    offsets,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    dtype,
    KV_LORA_RANK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """A piece of the latent vectors at offsets; those of an fp8 row times their scales, in the given dtype."""
    tile = load_piece(ptrs[0], offsets[0], 1, None, START, BLOCK, KV_LORA_RANK, True)
    if FLOAT8 is None:
        return tile
    else:
        BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        scales = tl.load(ptrs[1] + offsets[1][:, None] + (START // SCALE_BLOCK + tl.arange(0, BLOCKS))[None, :])
        values = decode_float8(tile, FLOAT8[0], FLOAT8[1]).to(tl.float32)
        values = tl.reshape(values, (tile.shape[0], BLOCKS, SCALE_BLOCK)) * scales[:, :, None]
        return tl.reshape(values, tile.shape).to(dtype)


@triton.jit(do_not_specialize=LENGTHS)
def _mla_absorbed_kernel(
    q_ptr,
    q_pe_ptr,
    cache_ptrs,
    out_ptr,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    q_pe_strides,
    page_strides,
    out_strides,
    lse_strides,
    table_stride,
    seqlen_q,
    seqlen_k,
    num_tiles,
    num_splits,
    scale_log2,
    window,
    NUM_HEADS: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    HALVES: tl.constexpr,
    CUT_CHAIN: tl.constexpr,
    SIGN: tl.constexpr,
    JOINED: tl.constexpr,
    FLOAT8: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_CACHE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes a tile of rows of out and lse, over one split of the keys of a sequence.

    A row is one head of one query. All heads share the latent vectors: a tile of them is loaded once, multiplied with
    the queries as keys and with the weights of the softmax as values. Grid: num_tiles * num_splits * batch, so that
    the tiles of a sequence, which read the same keys, run side by side.

    cache_ptrs are latent vectors, their scales (None but in an fp8 cache) and rotary keys, page_strides and ROW_STRIDES
    the strides of each; where latent vectors and rotary keys are JOINED the latter follow the former. Without a
    block_table a page is the tensor's row of a sequence. Strides are (batch, row, head) of q and q_pe, (split, batch,
    row, head) of out and lse. Scores are multiplied with SIGN * scale_log2.
    """
    q_strides = in_vectors(q_strides, VECTOR)
    q_pe_strides = in_vectors(q_pe_strides, VECTOR)
    FIRST: tl.constexpr = latent_piece_0(KV_LORA_RANK, HALVES)
    SECOND: tl.constexpr = latent_piece_1(KV_LORA_RANK, HALVES)
    tile = tl.program_id(0) % num_tiles
    sequence = tl.program_id(0) // num_tiles // num_splits
    split = tl.program_id(0) // num_tiles % num_splits

    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence, seqlen_q, seqlen_k
    )
    if cache_seqlens_ptr is not None:
        seqlen_k = tl.load(cache_seqlens_ptr + sequence)
    if cu_seqlens_q_ptr is not None and tile * BLOCK_M >= seqlen_q * NUM_HEADS:
        return
    first_position = seqlen_k - seqlen_q
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_mask = rows < seqlen_q * NUM_HEADS
    queries = rows // NUM_HEADS
    heads = rows % NUM_HEADS
    positions = queries + first_position
    start_position = tile * BLOCK_M // NUM_HEADS + first_position
    end_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // NUM_HEADS + 1, seqlen_q) + first_position
    lo, _, full_hi, hi = visible_range(start_position, end_position, seqlen_k, 0, window, BLOCK_N, BLOCK_N)
    share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), num_splits) * BLOCK_N
    lo = tl.minimum(lo + split * share, hi)
    hi = tl.minimum(lo + share, hi)

    if cu_seqlens_q_ptr is not None:  # packed tensors have a batch of one
        sequence *= 0
    sequence = sequence.to(tl.int64)
    q_rows = row_offsets(sequence, first_q + queries, heads, q_strides)
    q_0 = load_piece(q_ptr, q_rows, 1, rows_mask, 0, FIRST, KV_LORA_RANK, True)
    if SECOND > 0:
        q_1 = load_piece(q_ptr, q_rows, 1, rows_mask, FIRST, SECOND, KV_LORA_RANK, True)
    q_rows = row_offsets(sequence, first_q + queries, heads, q_pe_strides)
    q_pe = load_piece(q_pe_ptr, q_rows, 1, rows_mask, 0, padded_size(ROPE_HEAD_DIM), ROPE_HEAD_DIM, True)
    if SIGN < 1:  # the online softmax takes a factor above 0
        q_0 *= SIGN
        q_pe *= SIGN
        if SECOND > 0:
            q_1 *= SIGN
    latents_page, scales_page, rope_page = page_strides
    latents_page = latents_page // VECTOR_CACHE * VECTOR_CACHE
    if JOINED:  # one tensor, seen twice
        cache_ptrs = cache_ptrs[0], None, cache_ptrs[0] + KV_LORA_RANK
        rope_page = latents_page
    elif FLOAT8 is None:
        rope_page = rope_page // VECTOR_CACHE * VECTOR_CACHE
    elif VECTOR_CACHE > 1:  # bytes, and bf16
        rope_page = rope_page // 8 * 8
    if block_table_ptr is None:
        latents_row = sequence * latents_page + tl.cast(first_k, tl.int64) * ROW_STRIDES[0]
        rope_row = sequence * rope_page + tl.cast(first_k, tl.int64) * ROW_STRIDES[2]
        cache_ptrs = cache_ptrs[0] + latents_row, None, cache_ptrs[2] + rope_row
    else:
        block_table_ptr += sequence * table_stride

    m_i, l_i = softmax_init(None, heads, BLOCK_M)
    acc_0 = tl.zeros([BLOCK_M, FIRST], tl.float32)
    if SECOND > 0:
        acc_1 = tl.zeros([BLOCK_M, SECOND], tl.float32)
    for start_n in tl.range(lo, hi, BLOCK_N):
        # Past the last key it is repeated: loads need no mask, scores have one.
        ptrs = cache_ptrs
        if ONE_PAGE:
            slots = tl.minimum(tl.arange(0, BLOCK_N), hi - 1 - start_n).to(tl.int64)
            page = tl.load(block_table_ptr + start_n // PAGE_SIZE).to(tl.int64)
            slot = tl.cast(start_n % PAGE_SIZE, tl.int64)
            ptrs = (
                ptrs[0] + (page * latents_page + slot * ROW_STRIDES[0]),
                ptrs[1],
                ptrs[2] + (page * rope_page + slot * ROW_STRIDES[2]),
            )
            if FLOAT8 is not None:
                ptrs = ptrs[0], ptrs[1] + (page * scales_page + slot * ROW_STRIDES[1]), ptrs[2]
            offsets = slots * ROW_STRIDES[0], slots * ROW_STRIDES[1], slots * ROW_STRIDES[2]
        else:
            keys = tl.minimum(start_n + tl.arange(0, BLOCK_N), hi - 1)
            slots = (keys % PAGE_SIZE if block_table_ptr is not None else keys).to(tl.int64)
            offsets = slots * ROW_STRIDES[0], slots * ROW_STRIDES[1], slots * ROW_STRIDES[2]
            if block_table_ptr is not None:
                pages = tl.load(block_table_ptr + keys // PAGE_SIZE).to(tl.int64)
                offsets = pages * latents_page + offsets[0], offsets[1], pages * rope_page + offsets[2]
                if FLOAT8 is not None:
                    offsets = offsets[0], pages * scales_page + offsets[1], offsets[2]
        k_0 = _load_latents(ptrs, offsets, 0, FIRST, q_0.dtype, KV_LORA_RANK, SCALE_BLOCK, FLOAT8)
        if SECOND > 0:
            k_1 = _load_latents(ptrs, offsets, FIRST, SECOND, q_0.dtype, KV_LORA_RANK, SCALE_BLOCK, FLOAT8)
        k_pe = load_piece(ptrs[2], offsets[2], 1, None, 0, padded_size(ROPE_HEAD_DIM), ROPE_HEAD_DIM, True)
        k_pe = k_pe.to(q_pe.dtype)

        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if CUT_CHAIN:
            # Where wgmma's results feed each other the compiler lays all warps along rows: here both warpgroups would
            # compute the same scores. An `if` that always runs, each in other words, hides one product from the next.
            if start_n < hi:
                s = tl.dot(q_0, k_0.T, s, input_precision=INPUT_PRECISION)
            if SECOND > 0 and start_n >= lo:
                s = tl.dot(q_1, k_1.T, s, input_precision=INPUT_PRECISION)
            if start_n < full_hi:
                s = tl.dot(q_pe, k_pe.T, s, input_precision=INPUT_PRECISION)
            else:
                s = tl.dot(q_pe, k_pe.T, s, input_precision=INPUT_PRECISION)
                s = mask_scores(s, positions, start_n, seqlen_k, 0, window)
        else:
            s = tl.dot(q_0, k_0.T, s, input_precision=INPUT_PRECISION)
            if SECOND > 0:
                s = tl.dot(q_1, k_1.T, s, input_precision=INPUT_PRECISION)
            s = tl.dot(q_pe, k_pe.T, s, input_precision=INPUT_PRECISION)
            if start_n >= full_hi:
                s = mask_scores(s, positions, start_n, seqlen_k, 0, window)
        p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, True)
        p = p.to(k_0.dtype)
        acc_0 = tl.dot(p, k_0, acc_0 * alpha[:, None], input_precision=INPUT_PRECISION)
        if SECOND > 0:
            acc_1 = tl.dot(p, k_1, acc_1 * alpha[:, None], input_precision=INPUT_PRECISION)

    norm, lse = softmax_finish(m_i, l_i)
    out_ptr += tl.cast(split, tl.int64) * out_strides[0]
    out_rows = row_offsets(sequence, first_q + queries, heads, out_strides[1:])
    store_piece(out_ptr, out_rows, 1, rows_mask, acc_0 * norm[:, None], 0, KV_LORA_RANK, True)
    if SECOND > 0:
        store_piece(out_ptr, out_rows, 1, rows_mask, acc_1 * norm[:, None], FIRST, KV_LORA_RANK, True)
    lse_ptr += tl.cast(split, tl.int64) * lse_strides[0]
    tl.store(lse_ptr + row_offsets(sequence, first_q + queries, heads, lse_strides[1:]), lse, mask=rows_mask)


@triton.jit(do_not_specialize=LENGTHS)
def _absorb_kernel(
    q_nope_ptr,
    q_pe_ptr,
    w_uk_ptr,
    q_ptr,
    cos_ptr,
    sin_ptr,
    cache_seqlens_ptr,
    q_nope_strides,
    q_pe_strides,
    w_strides,
    rope_strides,
    seqlen_q,
    num_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    NOPE_HEAD_DIM: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes BLOCK_C columns of scale * [q_nope @ w_uk, rope(q_pe)] for BLOCK_T tokens and one head.

    Grid: (heads, tiles of tokens, blocks of columns and one for the rotary part); a token is one query. q is
    (tokens, heads, kv_lora_rank + qk_rope_head_dim), contiguous. Strides are (batch, row, head) of q_nope and q_pe,
    (head, row) of w_uk, a position's of cos and sin.
    """
    head = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_mask = tokens < num_tokens
    batch = (tokens // seqlen_q).to(tl.int64)
    query = (tokens % seqlen_q).to(tl.int64)
    q_rows = q_ptr + (tokens.to(tl.int64) * NUM_HEADS + head)[:, None] * (KV_LORA_RANK + ROPE_HEAD_DIM)
    if tl.program_id(2) < tl.num_programs(2) - 1:
        columns = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        columns_mask = columns < KV_LORA_RANK
        x_ptrs = q_nope_ptr + row_offsets(batch, query, head, q_nope_strides)[:, None]
        w_ptrs = w_uk_ptr + head * w_strides[0] + columns[None, :]
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in tl.range(0, NOPE_HEAD_DIM, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            inside = offs_k < NOPE_HEAD_DIM
            x = tl.load(x_ptrs + offs_k[None, :], mask=tokens_mask[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & columns_mask[None, :]
            w = tl.load(w_ptrs + offs_k[:, None] * w_strides[1], mask=mask, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        q = (acc * scale).to(q_ptr.dtype.element_ty)
        tl.store(q_rows + columns[None, :], q, mask=tokens_mask[:, None] & columns_mask[None, :])
    else:
        offs_r = tl.arange(0, padded_size(ROPE_HEAD_DIM))
        rope_mask = tokens_mask[:, None] & (offs_r < ROPE_HEAD_DIM)[None, :]
        positions = None
        if ROTARY_DIM > 0:
            seqlens_k = tl.load(cache_seqlens_ptr + batch, mask=tokens_mask, other=0)
            positions = tl.maximum(seqlens_k - seqlen_q + query, 0)
        rows = q_pe_ptr + row_offsets(batch, query, head, q_pe_strides)
        q_pe = load_rotated(
            rows, offs_r, rope_mask, positions, tokens_mask, cos_ptr, sin_ptr, rope_strides, ROTARY_DIM, INTERLEAVED
        )
        tl.store(q_rows + KV_LORA_RANK + offs_r[None, :], (q_pe * scale).to(q_ptr.dtype.element_ty), mask=rope_mask)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_project_kernel(
    parts_ptr,
    lses_ptr,
    w_uv_ptr,
    out_ptr,
    lse_ptr,
    w_strides,
    out_strides,
    lse_strides,
    seqlen_q,
    num_tokens,
    num_splits,
    NUM_HEADS: tl.constexpr,
    KV_LORA_RANK: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program merges the splits of BLOCK_T tokens of one head and multiplies them with BLOCK_V rows of w_uv.

    Grid: (heads, tiles of tokens, blocks of rows). parts (splits, tokens, heads, kv_lora_rank) and lses (splits,
    tokens, heads) are contiguous; strides are (head, row) of w_uv, (token, head) of out, (batch, head, query) of lse.
    """
    ROWS: tl.constexpr = max(16, BLOCK_T)  # of a product; fewer tokens are repeated
    head = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    tokens_mask = tokens < num_tokens
    splits = tl.arange(0, BLOCK_P).to(tl.int64)
    split_stride = tl.cast(num_tokens, tl.int64) * NUM_HEADS
    rows = tokens * NUM_HEADS + head

    m_i = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, num_splits, BLOCK_P):
        lses, _ = _load_lses(lses_ptr, rows, tokens_mask, first + splits, num_splits, split_stride)
        m_new = tl.maximum(m_i, tl.max(lses, 1))
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.math.exp2(m_i - m_sub) + tl.sum(tl.math.exp2(lses - m_sub[:, None]), 1)
        m_i = m_new
    norm, lse = softmax_finish(m_i, l_i)
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)

    values = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    w_ptrs = w_uv_ptr + head * w_strides[0] + values[:, None].to(tl.int64) * w_strides[1]
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in tl.range(0, KV_LORA_RANK, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = columns < KV_LORA_RANK
        latents = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for first in range(0, num_splits, BLOCK_P):
            lses, offsets = _load_lses(lses_ptr, rows, tokens_mask, first + splits, num_splits, split_stride)
            weights = tl.math.exp2(lses - m_i[:, None])
            # A split in which a query sees no key is not read.
            mask = (lses > float("-inf"))[:, :, None] & inside[None, None, :]
            parts = tl.load(
                parts_ptr + offsets[:, :, None] * KV_LORA_RANK + columns[None, None, :], mask=mask, other=0.0
            )
            latents += tl.sum(parts.to(tl.float32) * weights[:, :, None], 1)
        latents = (latents * norm[:, None]).to(w_uv_ptr.dtype.element_ty)
        if ROWS > BLOCK_T:
            latents = tl.reshape(tl.broadcast_to(latents[None], (ROWS // BLOCK_T, BLOCK_T, BLOCK_C)), (ROWS, BLOCK_C))
        mask = (values < V_HEAD_DIM)[:, None] & inside[None, :]
        w = tl.load(w_ptrs + columns[None, :], mask=mask, other=0.0)
        acc = tl.dot(latents, w.T, acc, input_precision=INPUT_PRECISION)

    # Rows that only repeat a token are not stored.
    repeats = tl.arange(0, ROWS)
    rows = tl.program_id(1) * BLOCK_T + repeats.to(tl.int64)
    rows_mask = (repeats < BLOCK_T) & (rows < num_tokens)
    offsets = (rows * out_strides[0] + head * out_strides[1])[:, None] + values[None, :]
    mask = rows_mask[:, None] & (values < V_HEAD_DIM)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None and tl.program_id(2) == 0:
        offsets = tokens // seqlen_q * lse_strides[0] + head * lse_strides[1] + tokens % seqlen_q * lse_strides[2]
        tl.store(lse_ptr + offsets, lse, mask=tokens_mask)


@triton.jit
def _load_lses(lses_ptr, rows, rows_mask, splits, num_splits, split_stride):
    """(log-sum-exp in log2 units (rows, splits), -inf where there is none, offsets of these)."""
    offsets = rows[:, None] + splits[None, :] * split_stride
    mask = rows_mask[:, None] & (splits < num_splits)[None, :]
    return tl.load(lses_ptr + offsets, mask=mask, other=float("-inf")) / LN_2, offsets


def launch_mla_decode(
    q_nope,
    q_pe,
    latent_cache,
    out,
    lse,
    cache_seqlens,
    block_table,
    w_uk,
    w_uv,
    rope,
    softmax_scale,
    causal,
    num_splits=0,
    config=None,
):
    """Launch the kernels of one call: absorption with w_uk, attention, and with w_uv or several splits the merge.

    lse is (batch, num_heads, seqlen_q) or None: not wanted. rope is (cos, sin, interleaved), cos None for none; config
    an MlaDecodeConfig (None: the default). Nothing is read back.
    """
    if q_pe.numel() == 0:
        return
    kv_lora_rank = q_nope.shape[3] if w_uk is None else w_uk.shape[2]
    cache = latent_parts(latent_cache, kv_lora_rank, q_pe.shape[3])
    if w_uk is None:
        scale_log2 = softmax_scale * LOG2_E
    else:
        q_nope, q_pe = _absorb(q_nope, q_pe, w_uk, softmax_scale * LOG2_E, cache_seqlens, rope)
        scale_log2 = 1.0
    lengths = None, None, cache_seqlens, block_table, q_pe.shape[0], q_pe.shape[1], 0
    _attend(q_nope, q_pe, cache, lengths, scale_log2, causal, w_uv, out, lse, num_splits, config)


def launch_mla_absorbed(
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse, lengths, softmax_scale, causal, heads_each
):
    """Launch the kernels of a prefill, heads_each heads at a time: what is absorbed takes memory for those alone.

    Tensors are (batch, seqlen, ...) or packed (total, ...), lse (batch, num_heads, seqlen_q) or (num_heads, total_q);
    lengths is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), the first two None in a dense batch.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    batch = q_pe.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if q_pe.numel() == 0 or batch == 0:
        return
    if cu_seqlens_q is not None:
        q_nope, q_pe, kv_latent, k_pe, out, lse = (
            None if x is None else x[None] for x in (q_nope, q_pe, kv_latent, k_pe, out, lse)
        )
    lengths = cu_seqlens_q, cu_seqlens_k, None, None, batch, max_seqlen_q, max_seqlen_k
    for first in range(0, q_pe.shape[2], heads_each):
        heads = slice(first, first + heads_each)
        q, q_rope = _absorb(q_nope[:, :, heads], q_pe[:, :, heads], w_uk[heads], softmax_scale * LOG2_E)
        cache, lse_here = (kv_latent, None, k_pe), None if lse is None else lse[:, heads]
        _attend(q, q_rope, cache, lengths, 1.0, causal, w_uv[heads], out[:, :, heads], lse_here, num_splits=1)


def _attend(q, q_pe, cache, lengths, scale_log2, causal, w_uv, out, lse, num_splits=0, config=None):
    """Attention of absorbed queries (batch, seqlen_q, num_heads, dim), and what follows it.

    cache is (latent vectors, scales, rotary keys); lengths is (cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table,
    batch, max_seqlen_q, max_seqlen_k), None for what there is not.
    """
    cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, batch, max_seqlen_q, max_seqlen_k = lengths
    latents, _, rope_keys = cache
    arch = arch_of(q)
    num_programs, num_splits, constants = _plan(
        layout_of(q, q_pe, *(x for x in cache if x is not None)),
        q.dtype,
        latents.dtype,
        latents.data_ptr() % 16 == 0 and rope_keys.data_ptr() % 16 == 0,
        None if block_table is None else block_table.shape[1],
        batch,
        max_seqlen_q,
        max_seqlen_k,
        num_splits,
        (scale_log2 > 0) - (scale_log2 < 0),
        arch,
        input_precision(q.dtype, arch),
        num_processors(q.device),
        config,
    )
    merges = num_splits > 1 or w_uv is not None
    if merges:
        # The sum of one split is rounded before the projection in any case.
        dtype = torch.float32 if num_splits > 1 else out.dtype
        parts = out.new_empty((num_splits, *q.shape), dtype=dtype)
        lse_parts = out.new_empty(parts.shape[:-1], dtype=torch.float32)
    else:
        # Without a place for the log-sum-exp the compiler makes wgmma wait for each other.
        parts = out[None]
        lse_parts = out.new_empty(parts.shape[:-1], dtype=torch.float32) if lse is None else lse.mT[None]
    args = (
        q,
        q_pe,
        cache,
        parts,
        lse_parts,
        cache_seqlens,
        block_table,
        cu_seqlens_q,
        cu_seqlens_k,
        q.stride()[:3],
        q_pe.stride()[:3],
        tuple(None if x is None else x.stride(0) for x in cache),
        parts.stride()[:4],
        lse_parts.stride(),
        None if block_table is None else block_table.stride(0),
        max_seqlen_q,
        max_seqlen_k,
        num_programs // batch,
        num_splits,
        abs(scale_log2) or 1.0,
        (None, 0 if causal else None),
    )
    launch_packed(_mla_absorbed_kernel, (num_programs * num_splits,), q.device, args, constants)
    if w_uv is not None:
        _merge_project(parts, lse_parts, w_uv, out, lse)
    elif num_splits > 1:
        launch_merge(parts, lse_parts, out, None if lse is None else lse.mT)


@functools.lru_cache(maxsize=1024)
def _plan(
    layout,
    dtype,
    cache_dtype,
    bases_aligned,
    table_width,
    batch,
    max_seqlen_q,
    max_seqlen_k,
    num_splits,
    sign,
    arch,
    precision,
    num_sms,
    config,
):
    """(programs of a split, splits, constants of the kernel): what follows from layouts and options alone."""
    (shape_q, strides_q), (shape_pe, strides_pe), *cache = layout
    num_heads, kv_lora_rank = shape_q[2:]
    is_fp8 = cache_dtype == torch.uint8
    paged = table_width is not None
    page_size = cache[0][0][1]
    rows = [strides[1] for _, strides in cache]
    row_strides = tuple(rows) if is_fp8 else (rows[0], 0, rows[1])
    # Latent vectors and rotary keys in vectors of 16 bytes: rows and pages of both are multiples of it.
    sizes = (cache_dtype.itemsize, torch.float32.itemsize, torch.bfloat16.itemsize) if is_fp8 else (dtype.itemsize,) * 2
    aligned = bases_aligned and all(
        stride * size % 16 == 0 for (_, strides), size in zip(cache, sizes) for stride in strides[:2]
    )
    tiles = config or default_decode_config(arch, dtype, max_seqlen_q * num_heads, is_fp8)
    num_programs = batch * -(-max_seqlen_q * num_heads // tiles.block_m)
    num_key_tiles = -(-(table_width * page_size if paged else max_seqlen_k) // tiles.block_n)
    native = arch.startswith("sm_") and int(arch[3:]) >= 89
    one_page = paged and page_size % tiles.block_n == 0
    cut_chain = has_wgmma(arch) and tiles.block_m >= 64 and tiles.num_warps > 4
    constants = dict(
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        ROPE_HEAD_DIM=shape_pe[3],
        PAGE_SIZE=page_size if paged else 1,
        ROW_STRIDES=row_strides,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        ONE_PAGE=one_page,
        HALVES=not (cut_chain and one_page),
        CUT_CHAIN=cut_chain,
        SIGN=sign,
        JOINED=paged and not is_fp8,
        FLOAT8=(3, native) if is_fp8 else None,
        SCALE_BLOCK=SCALE_BLOCK,
        VECTOR=vector_elements(dtype.itemsize, strides_q, strides_pe),
        VECTOR_CACHE=16 // cache_dtype.itemsize if aligned else 1,
        INPUT_PRECISION=precision,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    num_slots = num_sms * programs_per_processor(tiles, is_fp8)
    return num_programs, num_splits or choose_num_splits(num_programs, num_key_tiles, num_slots), constants


def _absorb(q_nope, q_pe, w_uk, scale, cache_seqlens=None, rope=(None, None, False)):
    """scale * q_nope @ w_uk and scale * rope(q_pe): views of one tensor (batch, seqlen_q, num_heads, dim)."""
    batch, seqlen_q, num_heads, nope_dim = q_nope.shape
    kv_lora_rank, rope_dim = w_uk.shape[2], q_pe.shape[3]
    cos, sin, interleaved = rope
    num_tokens = batch * seqlen_q
    q = q_nope.new_empty((batch, seqlen_q, num_heads, kv_lora_rank + rope_dim))
    block_t = _block_of_tokens(num_tokens, at_least=16)
    block_c = min(128, padded_size(kv_lora_rank))
    args = (
        q_nope,
        q_pe,
        w_uk,
        q,
        cos,
        sin,
        cache_seqlens,
        without_dim(q_nope.stride()),
        without_dim(q_pe.stride()),
        w_uk.stride()[:2],
        None if cos is None else (cos.stride(0), sin.stride(0)),
        seqlen_q,
        num_tokens,
        scale,
    )
    constants = dict(
        NUM_HEADS=num_heads,
        NOPE_HEAD_DIM=nope_dim,
        ROPE_HEAD_DIM=rope_dim,
        KV_LORA_RANK=kv_lora_rank,
        ROTARY_DIM=0 if cos is None else 2 * cos.shape[1],
        INTERLEAVED=interleaved,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        BLOCK_K=min(64, padded_size(nope_dim)),
        INPUT_PRECISION=input_precision(q.dtype, arch_of(q)),
        num_warps=4,
        num_stages=2,
    )
    grid = num_heads, -(-num_tokens // block_t), -(-kv_lora_rank // block_c) + 1
    launch_packed(_absorb_kernel, grid, q.device, args, constants)
    return q[..., :kv_lora_rank], q[..., kv_lora_rank:]


def _merge_project(parts, lse_parts, w_uv, out, lse):
    """out[t, h] = w_uv[h] @ (sum of the splits of token t and head h)."""
    num_splits, batch, seqlen_q, num_heads, kv_lora_rank = parts.shape
    v_head_dim = w_uv.shape[1]
    num_tokens = batch * seqlen_q
    block_t = _block_of_tokens(num_tokens, at_least=1)
    half = w_uv.element_size() == 2  # products of fp32 take their operands to registers
    block_v, block_c = (
        min(128 if half else 64, padded_size(v_head_dim)),
        min(64 if half else 32, padded_size(kv_lora_rank)),
    )
    # A tile of 8192 numbers that are on their way together.
    block_p = min(1 << (num_splits - 1).bit_length(), max(1, 8192 // (block_t * block_c)))
    args = (
        parts,
        lse_parts,
        w_uv,
        out,
        lse,
        w_uv.stride()[:2],
        out.stride()[1:3],
        None if lse is None else lse.stride(),
        seqlen_q,
        num_tokens,
        num_splits,
    )
    constants = dict(
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        V_HEAD_DIM=v_head_dim,
        BLOCK_T=block_t,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        BLOCK_V=block_v,
        INPUT_PRECISION=input_precision(out.dtype, arch_of(out)),
        num_warps=4,
        num_stages=2,
    )
    grid = num_heads, -(-num_tokens // block_t), -(-v_head_dim // block_v)
    launch_packed(_merge_project_kernel, grid, out.device, args, constants)


def _block_of_tokens(num_tokens, at_least):
    return min(64, max(at_least, 1 << (num_tokens - 1).bit_length()))
