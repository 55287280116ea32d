"""Kernel of attention in the absorbed form, and the launchers of decode and of prefill in that form.

Decode reads latent vectors from pages, prefill from rows of a tensor; all else is the same.
"""

import math

import torch
import triton
import triton.language as tl

from .._host.checks import layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import count_sms, gpu_of
from .._host.latent import SCALE_BLOCK, latent_parts
from .._host.layout import INDICES, LSE, capacity_of, clear_outputs, tiles_each, vector_elements
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._jit.args import Sequences, View
from .._jit.blocks import split_blocks, visible_range
from .._jit.heads import row_offsets, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import mask_scores
from .._jit.paging import decode_float8
from .._jit.softmax import softmax_finish, softmax_init, softmax_step
from .._jit.tiles import load_piece, padded_size, piece_0, piece_1, store_piece
from .._jit.workarounds import fence_copies, in_vectors
from ..merge.kernel import launch_merge
from ..merge.splits import choose_num_splits
from .configs import MlaDecodeCase, MlaDecodeConfig, has_wgmma
from .hopper import launch_mla_decode_hopper, plan_hopper
from .projections import launch_absorb, launch_merge_project

LOG2_E = math.log2(math.e)
# A new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "num_splits", *INDICES, *LSE]


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
    tile = load_piece(ptrs[0] + offsets[0][:, None], None, START, BLOCK, KV_LORA_RANK)
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
    lse_split_stride,
    lse_batch_stride,
    lse_row_stride,
    lse_head_stride,
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
    row, head) of out and lse. Scores are multiplied with SIGN * scale_log2. seqlen_k is the most keys that a sequence
    has, or all rows of packed sequences, as seqlen_q is of queries. Of rows after the last sequence lse is stored and
    out is not: with -inf there nothing reads it.
    """
    q_strides = in_vectors(View(q_ptr, q_strides), VECTOR).strides
    q_pe_strides = in_vectors(View(q_pe_ptr, q_pe_strides), VECTOR).strides
    FIRST: tl.constexpr = latent_piece_0(KV_LORA_RANK, HALVES)
    SECOND: tl.constexpr = latent_piece_1(KV_LORA_RANK, HALVES)
    tile = tl.program_id(0) % num_tiles
    sequence = tl.program_id(0) // num_tiles // num_splits
    split = tl.program_id(0) // num_tiles % num_splits

    num_rows = seqlen_q
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        Sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr), sequence, seqlen_q, seqlen_k
    )
    if cache_seqlens_ptr is not None:
        seqlen_k = tl.minimum(tl.load(cache_seqlens_ptr + sequence), seqlen_k)
    if cu_seqlens_q_ptr is not None:
        num_own = seqlen_q * NUM_HEADS - tile * BLOCK_M
        if num_own < BLOCK_M:
            num_sequences = tl.num_programs(0) // num_tiles // num_splits
            left_over = slots_left_over(sequence * num_tiles + tile, first_q + seqlen_q, BLOCK_M, NUM_HEADS)
            spare = spare_rows(cu_seqlens_q_ptr, num_sequences, num_rows, left_over, num_own, BLOCK_M, NUM_HEADS)
            if spare.any:
                lse_strides = lse_batch_stride, lse_row_stride, lse_head_stride
                lse_ptrs = lse_ptr + tl.cast(split, tl.int64) * lse_split_stride
                lse_ptrs += row_offsets(0, spare.rows // NUM_HEADS, spare.rows % NUM_HEADS, lse_strides)
                tl.store(lse_ptrs, float("-inf"), mask=spare.mask)
        if num_own <= 0:
            return
    first_position = seqlen_k - seqlen_q
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_mask = rows < seqlen_q * NUM_HEADS
    queries = rows // NUM_HEADS
    heads = rows % NUM_HEADS
    positions = queries + first_position
    start_position = tile * BLOCK_M // NUM_HEADS + first_position
    end_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // NUM_HEADS + 1, seqlen_q) + first_position
    blocks = visible_range(start_position, end_position, seqlen_k, window, BLOCK_N, BLOCK_N)
    lo, _, full_hi, hi = split_blocks(blocks, split, num_splits, BLOCK_N)

    if cu_seqlens_q_ptr is not None:  # packed tensors have a batch of one
        sequence *= 0
    sequence = sequence.to(tl.int64)
    q_rows = row_offsets(sequence, first_q + queries, heads, q_strides)
    q_0 = load_piece(q_ptr + q_rows[:, None], rows_mask, 0, FIRST, KV_LORA_RANK)
    if SECOND > 0:
        q_1 = load_piece(q_ptr + q_rows[:, None], rows_mask, FIRST, SECOND, KV_LORA_RANK)
    q_rows = row_offsets(sequence, first_q + queries, heads, q_pe_strides)
    q_pe = load_piece(q_pe_ptr + q_rows[:, None], rows_mask, 0, padded_size(ROPE_HEAD_DIM), ROPE_HEAD_DIM)
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
        k_pe = load_piece(ptrs[2] + offsets[2][:, None], None, 0, padded_size(ROPE_HEAD_DIM), ROPE_HEAD_DIM)
        k_pe = k_pe.to(q_pe.dtype)
        if BLOCK_M >= 64:
            fence_copies()

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
    store_piece(out_ptr + out_rows[:, None], rows_mask, acc_0 * norm[:, None], 0, KV_LORA_RANK)
    if SECOND > 0:
        store_piece(out_ptr + out_rows[:, None], rows_mask, acc_1 * norm[:, None], FIRST, KV_LORA_RANK)
    lse_strides = lse_batch_stride, lse_row_stride, lse_head_stride
    lse_ptr += tl.cast(split, tl.int64) * lse_split_stride
    tl.store(lse_ptr + row_offsets(sequence, first_q + queries, heads, lse_strides), lse, mask=rows_mask)


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
        clear_outputs(out, lse)
        return
    kv_lora_rank = q_nope.shape[3] if w_uk is None else w_uk.shape[2]
    cache = latent_parts(latent_cache, kv_lora_rank, q_pe.shape[3])
    if w_uk is None:
        scale_log2 = softmax_scale * LOG2_E
    else:
        positions = cache_seqlens, capacity_of(latent_cache, block_table), *rope
        q_nope, q_pe = launch_absorb(q_nope, q_pe, w_uk, softmax_scale * LOG2_E, positions)
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
        clear_outputs(out, lse)
        return
    if cu_seqlens_q is not None:
        q_nope, q_pe, kv_latent, k_pe, out, lse = (
            None if x is None else x[None] for x in (q_nope, q_pe, kv_latent, k_pe, out, lse)
        )
    lengths = cu_seqlens_q, cu_seqlens_k, None, None, batch, max_seqlen_q, max_seqlen_k
    for first in range(0, q_pe.shape[2], heads_each):
        heads = slice(first, first + heads_each)
        q, q_rope = launch_absorb(q_nope[:, :, heads], q_pe[:, :, heads], w_uk[heads], softmax_scale * LOG2_E)
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
    hopper = None
    if gpu_of(arch).wgmma and config is None and block_table is not None and scale_log2 > 0:
        hopper = _plan_for_hopper(q, q_pe, latents, rope_keys, block_table, causal, num_splits)
    if hopper is not None:
        _, num_splits, *_ = hopper
        parts, lse_parts = _results(q, out, lse, w_uv, num_splits)
        launch_mla_decode_hopper(
            hopper, q, q_pe, latents, rope_keys, parts, lse_parts, cache_seqlens, block_table, max_seqlen_q, scale_log2
        )
        _finish(parts, lse_parts, w_uv, out, lse)
        return
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
        count_sms(q.device, arch),
        config,
    )
    parts, lse_parts = _results(q, out, lse, w_uv, num_splits)
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
        *lse_parts.stride(),
        None if block_table is None else block_table.stride(0),
        q.shape[1],
        latents.shape[1] if block_table is None else capacity_of(latents, block_table),
        num_programs // batch,
        num_splits,
        abs(scale_log2) or 1.0,
        (None, 0 if causal else None),
    )
    launch_packed(_mla_absorbed_kernel, (num_programs * num_splits,), q.device, args, constants)
    _finish(parts, lse_parts, w_uv, out, lse)


def _results(q, out, lse, w_uv, num_splits):
    """Where the splits' outputs and their log-sum-exp go: (splits, batch, seqlen_q, num_heads, dim), without dim."""
    if num_splits > 1 or w_uv is not None:
        # The sum of one split is rounded before the projection in any case.
        dtype = torch.float32 if num_splits > 1 else out.dtype
        parts = out.new_empty((num_splits, *q.shape), dtype=dtype)
        return parts, out.new_empty(parts.shape[:-1], dtype=torch.float32)
    # Without a place for the log-sum-exp the compiler makes wgmma wait for each other.
    parts = out[None]
    return parts, out.new_empty(parts.shape[:-1], dtype=torch.float32) if lse is None else lse.mT[None]


def _finish(parts, lse_parts, w_uv, out, lse):
    """Out and lse of the splits', where those are not yet it."""
    if w_uv is not None:
        launch_merge_project(parts, lse_parts, w_uv, out, lse)
    elif parts.shape[0] > 1:
        launch_merge(parts, lse_parts, out, None if lse is None else lse.mT)


def _plan_for_hopper(q, q_pe, latents, rope_keys, block_table, causal, num_splits):
    """That of hopper.py's kernel where it serves the call and is wanted, else None."""
    wanted = wanted_kernels()
    if wanted == "portable" or any(x.data_ptr() % 16 for x in (q, q_pe, latents, rope_keys)):
        return None
    layout, num_sms = layout_of(q, q_pe, latents), count_sms(q.device, arch_of(q))
    return plan_hopper(layout, q.dtype, latents.dtype, block_table.shape[1], causal, num_splits, num_sms, wanted)


@remember
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
    num_rows = max_seqlen_q * num_heads
    seqlen_k = table_width * page_size if paged else max_seqlen_k
    case = MlaDecodeCase(arch, dtype, kv_lora_rank, shape_pe[3], num_rows, is_fp8, paged, seqlen_k, page_size)
    tiles = config or choose(MlaDecodeConfig, case)
    num_programs = batch * tiles_each(num_rows, shape_q[1] * num_heads, batch, tiles.block_m)
    num_key_tiles = -(-seqlen_k // tiles.block_n)
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
        FLOAT8=(3, 3 in gpu_of(arch).native_fp8) if is_fp8 else None,
        SCALE_BLOCK=SCALE_BLOCK,
        VECTOR=vector_elements(dtype.itemsize, strides_q, strides_pe),
        VECTOR_CACHE=16 // cache_dtype.itemsize if aligned else 1,
        INPUT_PRECISION=precision,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    num_slots = num_sms * tiles.programs_per_sm(is_fp8)
    return num_programs, num_splits or choose_num_splits(num_programs, num_key_tiles, num_slots), constants
