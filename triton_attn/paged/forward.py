"""Kernel of attention over a cache, paged or contiguous, and its launcher: decode, prefill chunks, mixed batches."""

import math

import torch
import triton
import triton.language as tl

from .._host.checks import FLOAT8_MANTISSA_BITS, check_rows, layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import count_sms, gpu_of
from .._host.layout import (
    INDICES,
    LSE,
    batch_head_strides,
    capacity_of,
    clear_outputs,
    lse_strides,
    scale_stride,
    tiles_each,
    vector_elements,
    without_dim,
)
from .._host.tuned import choose, remember
from .._jit.args import View
from .._jit.blocks import Blocks, block_start, num_blocks, split_blocks, visible_range
from .._jit.heads import find_sequence, packed_bounds, row_offsets, slots_left_over, spare_rows
from .._jit.masks import add_alibi, cap_scores, mask_scores
from .._jit.paging import cache_rows, decode_float8
from .._jit.softmax import softmax_finish, softmax_init, softmax_step
from .._jit.tiles import dot_add, dot_transposed, load_tile, scale_rows, store_tile, zeros_tile
from .._jit.workarounds import fence_copies, in_vectors
from ..merge.kernel import launch_merge
from ..merge.splits import choose_num_splits
from .configs import PagedCase, PagedConfig

LOG2_E = math.log2(math.e)


# Lengths and what follows from them: a new length must not mean a new compilation.
LENGTHS = [
    "seqlen_q",
    "capacity",
    "batch",
    "num_tiles",
    "num_splits",
    "search_steps",
    "shared_prefix_len",
    *INDICES,
    *LSE,
]


@triton.jit
def _load_cached(ptr, strides, rows, mask, dtype, HEAD_DIM: tl.constexpr, FLOAT8: tl.constexpr):
    """A tile of keys or values in the dtype of q; fp8, kept as uint8, is decoded."""
    tile = load_tile(ptr + (rows[0] * strides[0] + rows[1] * strides[1])[:, None], mask, HEAD_DIM)
    if FLOAT8 is None:
        return tile
    elif len(tile) > 1:
        first = decode_float8(tile[0], FLOAT8[0], FLOAT8[1]).to(dtype)
        return first, decode_float8(tile[1], FLOAT8[0], FLOAT8[1]).to(dtype)
    else:
        return (decode_float8(tile[0], FLOAT8[0], FLOAT8[1]).to(dtype),)


@triton.jit(do_not_specialize=LENGTHS)
def _paged_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    cu_seqlens_q_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    scale_ptrs,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_split_stride,
    lse_batch_stride,
    lse_row_stride,
    lse_head_stride,
    table_stride,
    alibi_strides,
    scale_strides,
    seqlen_q,
    capacity,
    batch,
    num_tiles,
    search_steps,
    shared_prefix_len,
    num_heads_kv,
    num_splits,
    scale_log2,
    out_factor,
    softcap,
    window,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    SHARED: tl.constexpr,
    SEARCH: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    FLOAT8: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_CACHE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes a tile of rows of out and lse for one KV head, over one split of the keys.

    A row is one query head of one query: those of a KV head lie together, query by query, so that its keys and values
    are loaded once for the group. Grid: num_tiles * num_splits * num_heads_kv; num_tiles counts those of all sequences,
    an upper bound in a varlen batch, whose tiles are found by bisection unless there is one per sequence.

    A SHARED program takes rows of any sequence, over the first shared_prefix_len keys, which all sequences begin with;
    the others leave these out. A sequence has no more than capacity keys, whatever cache_seqlens say. seqlen_q is the
    queries of each sequence, or all rows of a varlen batch. Strides are (split, batch, row, head) of out and lse,
    (batch, row, head) of q, (page or batch, slot, head) of the caches. These hold fp8 as uint8 where FLOAT8 is (bits of
    mantissa, whether the GPU converts it). None is none.
    """
    q_strides = in_vectors(View(q_ptr, q_strides), VECTOR).strides
    k_strides = in_vectors(View(k_ptr, k_strides), VECTOR_CACHE).strides
    v_strides = in_vectors(View(v_ptr, v_strides), VECTOR_CACHE).strides
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    num_rows = seqlen_q
    program = tl.program_id(0) % num_tiles
    tile = program
    split = tl.program_id(0) // num_tiles % num_splits
    head_kv = tl.program_id(0) // num_tiles // num_splits

    # What the tile's queries are: rows in the tensor (batch and row), and positions among the keys.
    sequence = 0
    first_q = 0
    if not SHARED:
        if SEARCH:
            sequence = find_sequence(cu_seqlens_q_ptr, batch, search_steps, tile, GROUP_SIZE, BLOCK_M, 1)
        else:
            tiles_each = num_tiles // batch
            sequence = tile // tiles_each
            tile = tile % tiles_each
        if VARLEN:
            first_q, seqlen_q = packed_bounds(cu_seqlens_q_ptr, sequence, num_rows)
        if SEARCH:
            tile -= first_q * GROUP_SIZE // BLOCK_M + sequence
        seqlen_k = tl.minimum(tl.load(cache_seqlens_ptr + sequence), capacity)
    num_queries = seqlen_q
    if SHARED:
        num_queries = tl.minimum(tl.load(cu_seqlens_q_ptr + batch), num_rows) if VARLEN else batch * seqlen_q
    num_own = num_queries * GROUP_SIZE - tile * BLOCK_M
    if VARLEN and num_own < BLOCK_M:
        left_over = slots_left_over(program, first_q + num_queries, BLOCK_M, GROUP_SIZE)
        spare = spare_rows(cu_seqlens_q_ptr, batch, num_rows, left_over, num_own, BLOCK_M, GROUP_SIZE)
        if spare.any:
            spare_queries = spare.rows // GROUP_SIZE
            spare_heads = head_kv * GROUP_SIZE + spare.rows % GROUP_SIZE
            offsets = split.to(tl.int64) * out_strides[0] + row_offsets(0, spare_queries, spare_heads, out_strides[1:])
            store_tile(out_ptr + offsets[:, None], spare.mask, zeros_tile(BLOCK_M, HEAD_DIM_V), HEAD_DIM_V)
            if lse_ptr is not None:
                lse_strides = lse_batch_stride, lse_row_stride, lse_head_stride
                lse_ptrs = lse_ptr + split.to(tl.int64) * lse_split_stride
                lse_ptrs += row_offsets(0, spare_queries, spare_heads, lse_strides)
                tl.store(lse_ptrs, float("-inf"), mask=spare.mask)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if num_own <= 0:
        return
    rows_mask = rows < num_queries * GROUP_SIZE
    queries = rows // GROUP_SIZE
    heads = head_kv * GROUP_SIZE + rows % GROUP_SIZE
    if SHARED:
        # Of another sequence each; rows past the last query repeat it.
        queries = tl.minimum(queries, num_queries - 1)
        if VARLEN:
            sequences = find_sequence(cu_seqlens_q_ptr, batch, search_steps, queries, 1, 1, 0)
            first_queries, seqlens_q = packed_bounds(cu_seqlens_q_ptr, sequences, num_rows)
        else:
            sequences = queries // seqlen_q
            first_queries = sequences * seqlen_q
            seqlens_q = seqlen_q
        seqlens_k = tl.minimum(tl.load(cache_seqlens_ptr + sequences), capacity)
        positions = queries - first_queries + seqlens_k - seqlens_q
        end_keys = tl.minimum(seqlens_k, shared_prefix_len)
        # The pages are those of the tile's longest sequence: others may end before the prefix does.
        seqlen_k = tl.max(end_keys, 0)
        table_sequence = tl.max(tl.where(end_keys == seqlen_k, sequences, 0), 0)
        first_key = 0
        start_position = tl.min(positions, 0)
        end_position = tl.max(positions, 0) + 1
        num_full_keys = tl.min(end_keys, 0)
    else:
        table_sequence = sequence
        first_key = shared_prefix_len
        positions = queries + (seqlen_k - seqlen_q)
        end_keys = seqlen_k
        start_position = tile * BLOCK_M // GROUP_SIZE + (seqlen_k - seqlen_q)
        end_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP_SIZE + 1, seqlen_q) + (seqlen_k - seqlen_q)
        num_full_keys = seqlen_k

    # The keys of this split: of those that the tile sees, an equal share of tiles, cut into the kinds of loop.
    ALIGN: tl.constexpr = BLOCK_N if ONE_PAGE else 1
    blocks = visible_range(start_position, end_position, seqlen_k, window, BLOCK_N, ALIGN, first_key)
    if SHARED:
        full_keys = tl.maximum(tl.minimum(blocks.full_hi, num_full_keys) - blocks.full_lo, 0)
        full_hi = blocks.full_lo + full_keys // BLOCK_N * BLOCK_N
        blocks = Blocks(blocks.lo, blocks.full_lo, full_hi, blocks.hi)
    blocks = split_blocks(blocks, split, num_splits, BLOCK_N)

    if SHARED and not VARLEN:
        batch_index, row_index = sequences, queries - first_queries
    else:
        batch_index, row_index = sequence, queries + first_q
    q_rows = row_offsets(batch_index, row_index, heads, q_strides)
    q = load_tile(q_ptr + q_rows[:, None], rows_mask, HEAD_DIM)
    k_ptr += tl.cast(head_kv, tl.int64) * k_strides[2]
    v_ptr += tl.cast(head_kv, tl.int64) * v_strides[2]
    if block_table_ptr is not None:
        block_table_ptr += tl.cast(table_sequence, tl.int64) * table_stride
    if scale_ptrs[0] is not None:
        scale_log2 *= tl.load(scale_ptrs[0] + head_kv * scale_strides[0])
    if alibi_slopes_ptr is not None:
        slope_rows = sequences if SHARED else sequence
        slope_offsets = tl.cast(slope_rows, tl.int64) * alibi_strides[0] + heads.to(tl.int64) * alibi_strides[1]
        slopes = tl.load(alibi_slopes_ptr + slope_offsets)[:, None]

    m_i, l_i = softmax_init(sinks_ptr, heads, BLOCK_M)
    if sinks_ptr is not None:
        # One split of the first keys counts the sink.
        counts = (split == 0) & (SHARED | (shared_prefix_len == 0))
        m_i = tl.where(counts, m_i, float("-inf"))
        l_i = tl.where(counts, l_i, 0.0)
    acc = zeros_tile(BLOCK_M, HEAD_DIM_V)
    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N)):
            start_n = block_start(blocks, i, FULL, BLOCK_N)
            keys_mask = None if FULL else start_n + tl.arange(0, BLOCK_N) < blocks.hi
            cached = cache_rows(block_table_ptr, sequence, start_n, blocks.hi, BLOCK_N, PAGE_SIZE, ONE_PAGE, not FULL)
            k_tile = _load_cached(k_ptr, k_strides, cached, keys_mask, q[0].dtype, HEAD_DIM, FLOAT8)
            if BLOCK_M >= 64:
                fence_copies()
            s = dot_transposed(q, k_tile, INPUT_PRECISION)
            if not FOLD_SCALE:
                s *= scale_log2
                if softcap is not None:
                    s = cap_scores(s, softcap, q[0].dtype == tl.float32)
                if alibi_slopes_ptr is not None:
                    s = add_alibi(s, positions, start_n, 0, slopes)
            if not FULL:
                s = mask_scores(s, positions, start_n, end_keys, 0, window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2 if FOLD_SCALE else 1.0, not FULL)
            v_tile = _load_cached(v_ptr, v_strides, cached, keys_mask, q[0].dtype, HEAD_DIM_V, FLOAT8)
            if BLOCK_M >= 64:
                fence_copies()
            acc = dot_add(p.to(v_tile[0].dtype), v_tile, scale_rows(acc, alpha), INPUT_PRECISION)

    norm, lse = softmax_finish(m_i, l_i)
    norm *= out_factor
    if scale_ptrs[1] is not None:
        norm *= tl.load(scale_ptrs[1] + head_kv * scale_strides[1])
    out_ptr += tl.cast(split, tl.int64) * out_strides[0]
    offsets = row_offsets(batch_index, row_index, heads, out_strides[1:])
    store_tile(out_ptr + offsets[:, None], rows_mask, scale_rows(acc, norm), HEAD_DIM_V)
    if lse_ptr is not None:
        lse_strides = lse_batch_stride, lse_row_stride, lse_head_stride
        lse_ptr += tl.cast(split, tl.int64) * lse_split_stride
        tl.store(lse_ptr + row_offsets(batch_index, row_index, heads, lse_strides), lse, mask=rows_mask)


def launch_paged_fwd(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    cache_seqlens,
    block_table,
    cu_seqlens_q,
    max_seqlen_q,
    options,
    scales=(None, None),
    num_splits=0,
    shared_prefix_len=0,
    config=None,
):
    """Launch the kernels of one call: attention over the shared prefix if there is one, over the rest, and the merge if
    there is more than one part. Nothing is read back.

    q and out are (batch, seqlen_q, num_heads_q, dim), or (total_q, num_heads_q, dim) with cu_seqlens_q; lse as
    `flash_attention` returns it, or None: not wanted. options is an AttentionOptions, scales those of keys and values,
    config a PagedConfig (None: the default).
    """
    softmax_scale, window, softcap, alibi_slopes, sinks, _ = options
    arch = arch_of(q)
    batch = cache_seqlens.shape[0]
    passes, num_parts, constants = _plan(
        layout_of(q, k_cache, v_cache),
        q.dtype,
        k_cache.dtype,
        batch,
        max_seqlen_q,
        None if block_table is None else block_table.shape[1],
        cu_seqlens_q is not None,
        num_splits,
        shared_prefix_len,
        softcap is None and alibi_slopes is None and softmax_scale > 0,
        (k_cache.data_ptr() | v_cache.data_ptr()) % 16 == 0,
        arch,
        input_precision(q.dtype, arch),
        count_sms(q.device, arch),
        config,
    )
    if not passes:
        clear_outputs(out, lse)
        return
    if k_cache.dtype in FLOAT8_MANTISSA_BITS:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    parts, part_strides = out, (0, *without_dim(out.stride()))
    lse_parts, lse_part_strides = lse, (None,) * 4 if lse is None else (0, *lse_strides(lse))
    if num_parts > 1:
        parts = out.new_empty((num_parts, *out.shape), dtype=torch.float32)
        lse_parts = out.new_empty((num_parts, *out.shape[:-1]), dtype=torch.float32)
        part_strides, lse_part_strides = (
            (part, *without_dim((*rows, 1))) for part, *rows in (parts.stride()[:-1], lse_parts.stride())
        )
    scale_log2, out_factor, scale_ptrs, scale_strides = _scales(softmax_scale * LOG2_E, *scales)
    first_part = 0
    capacity = capacity_of(k_cache, block_table)
    for counts, splits, own in passes:
        args = (
            q,
            k_cache,
            v_cache,
            parts[first_part:] if first_part else parts,
            lse_parts[first_part:] if first_part else lse_parts,
            cache_seqlens,
            block_table,
            cu_seqlens_q,
            sinks,
            alibi_slopes,
            scale_ptrs,
            without_dim(q.stride()),
            k_cache.stride()[:3],
            v_cache.stride()[:3],
            part_strides,
            *lse_part_strides,
            None if block_table is None else block_table.stride(0),
            None if alibi_slopes is None else batch_head_strides(alibi_slopes),
            scale_strides,
            q.shape[-3],
            capacity,
            batch,
            *counts,
            shared_prefix_len,
            k_cache.shape[2],
            splits,
            scale_log2,
            out_factor,
            softcap,
            window,
        )
        num_programs = counts[0] * splits * k_cache.shape[2]
        launch_packed(_paged_fwd_kernel, (num_programs,), q.device, args, constants | own)
        first_part += splits
    if num_parts > 1:
        dense = out.ndim == 4
        lse = None if lse is None else lse.mT
        launch_merge(
            parts if dense else parts[:, None],
            lse_parts if dense else lse_parts[:, None],
            out if dense else out[None],
            lse if dense or lse is None else lse[None],
        )


def _scales(scale_log2, k_scale, v_scale):
    """(factor on scores, factor on outputs, tensors of both, their strides): a number is a factor, a tensor is none."""
    tensors = tuple(scale if isinstance(scale, torch.Tensor) else None for scale in (k_scale, v_scale))
    k_factor, v_factor = (1.0 if x is None or isinstance(x, torch.Tensor) else float(x) for x in (k_scale, v_scale))
    return scale_log2 * k_factor, v_factor, tensors, tuple(map(scale_stride, tensors))


def _float8(dtype, arch):
    """How to decode a cache of this dtype: (bits of mantissa, whether by the GPU's own conversion), or None."""
    if dtype not in FLOAT8_MANTISSA_BITS:
        return None
    bits = FLOAT8_MANTISSA_BITS[dtype]
    return bits, bits in gpu_of(arch).native_fp8


@remember
def _plan(
    layout,
    dtype,
    cache_dtype,
    batch,
    max_seqlen_q,
    table_width,
    varlen,
    num_splits,
    shared_prefix_len,
    fold_scale,
    bases_aligned,
    arch,
    precision,
    num_sms,
    config,
):
    """What of a call follows from layouts and options alone, remembered since most calls are like the last.

    Returns (passes, number of parts, constants); a pass is ((num_tiles, search_steps), num_splits, its own constants).
    """
    (shape_q, strides_q), (_, strides_k), (shape_v, strides_v) = layout
    *rows_q, num_heads_q, head_dim = shape_q
    _, slots, num_heads_kv, head_dim_v = shape_v
    group_size = num_heads_q // num_heads_kv
    num_queries = math.prod(rows_q)
    if num_queries == 0 or num_heads_q == 0 or max_seqlen_q == 0 or batch == 0:
        return (), 0, {}
    check_rows("q", num_queries * group_size)
    page_size = 0 if table_width is None else slots
    capacity = slots if table_width is None else table_width * slots
    vector_cache = vector_elements(cache_dtype.itemsize, strides_k, strides_v) if bases_aligned else 1
    common = dict(
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        PAGE_SIZE=page_size,
        FOLD_SCALE=fold_scale,
        FLOAT8=_float8(cache_dtype, arch),
        VECTOR=vector_elements(dtype.itemsize, strides_q),
        VECTOR_CACHE=vector_cache,
        INPUT_PRECISION=precision,
    )
    passes = []
    rows = max_seqlen_q * group_size
    for shared in (True, False) if shared_prefix_len else (False,):
        rows_here = num_queries * group_size if shared else rows
        how = vector_cache > 1, fold_scale and page_size > 0
        case = PagedCase(arch, dtype, cache_dtype, head_dim, head_dim_v, rows_here, *how, capacity, slots)
        tiles = config or choose(PagedConfig, case)
        search = varlen and not shared and rows > tiles.block_m
        if search:
            num_tiles = num_queries * group_size // tiles.block_m + batch
        else:
            num_sequences = 1 if shared else batch
            num_tiles = tiles_each(rows_here, num_queries * group_size, num_sequences, tiles.block_m) * num_sequences
        first_key = 0 if shared else shared_prefix_len
        num_keys = shared_prefix_len if shared else max(capacity - shared_prefix_len, 0)
        splits = num_splits or choose_num_splits(num_tiles * num_heads_kv, -(-num_keys // tiles.block_n), num_sms)
        own = dict(
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            ONE_PAGE=page_size > 0 and page_size % tiles.block_n == 0 and first_key % tiles.block_n == 0,
            SHARED=shared,
            SEARCH=search,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        counts = num_tiles, batch.bit_length()
        passes.append((counts, splits, own))
    return tuple(passes), sum(splits for _, splits, _ in passes), common
