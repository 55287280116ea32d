"""Forward kernel of dense and varlen attention, and its launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._host.checks import layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import gpu_of
from .._host.layout import clear_outputs, heads_in_l2, strides_are_wide, tiles_each, vector_elements, without_dim
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._jit.args import Dropout, Heads, Sequences, Strides, View, Window
from .._jit.blocks import block_start, num_blocks, visible_range
from .._jit.dropout import KEYS_PER_CALL, keep_mask
from .._jit.heads import assign_work, row_pointer, sequence_bounds, spare_rows_of
from .._jit.masks import mask_scores, scale_scores
from .._jit.softmax import softmax_finish, softmax_init, softmax_step
from .._jit.tiles import (
    Rows,
    clear_rows,
    dot_add,
    dot_transposed,
    load_rows,
    load_tile,
    scale_rows,
    sequence_coords,
    store_tile,
    tile_pointers,
    zeros_tile,
)
from .._jit.workarounds import in_vectors, tanh_spills
from ..dense.arguments import LENGTHS, FlashTile, operand, scores_of
from ..dense.tiles import FlashCase
from ..dense.tma import strides_suit_tma, tma_geometry
from .configs import FlashConfig
from .hopper import launch_flash_fwd_hopper, plan_hopper


@triton.jit(do_not_specialize=LENGTHS)
def _flash_fwd_kernel(
    q,
    k,
    k_desc,
    k_desc_rest,
    v,
    v_desc,
    v_desc_rest,
    out,
    lse_ptr,
    lse_stride,
    sinks_ptr,
    seqs,
    seqlen_q,
    seqlen_k,
    num_tiles,
    section_size,
    heads,
    scores,
    dropout,
    TILE: tl.constexpr,
):
    """One program computes BLOCK_M rows of out and lse for one query head of one sequence.

    Grid: num_tiles * num_heads * batch. q, k, v and out are Views, seqs Sequences, heads Heads, scores Scores, dropout
    Dropout, TILE a FlashTile. seqlen_q and seqlen_k of a packed batch are all its rows. With USE_TMA keys and values
    are loaded through descriptors, one for each piece of the head dimension, and k and v are None. lse_ptr, sinks_ptr
    and dropout are None for none.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    # The exponential takes the scale along where nothing else comes between.
    FOLD_SCALE: tl.constexpr = scores.softcap is None and scores.alibi is None
    q = in_vectors(q, TILE.VECTOR)
    out = in_vectors(out, TILE.VECTOR)
    work = assign_work(num_tiles, section_size, heads.num, BLOCK_M, scores.window.right is not None)
    bounds = sequence_bounds(seqs, work.batch, seqlen_q, seqlen_k)
    first_row = bounds.first_q + work.start
    num_own = bounds.seqlen_q - work.start
    lse_row = tl.cast(work.head if PACKED else work.batch_head, tl.int64) * lse_stride
    if PACKED and num_own < BLOCK_M:
        end_row = bounds.first_q + bounds.seqlen_q
        spare = spare_rows_of(work, seqs.cu_seqlens_q_ptr, seqlen_q, end_row, num_own, BLOCK_M)
        if spare.any:
            clear_rows(out, work.head, spare, BLOCK_M, TILE.HEAD_DIM_V)
            if lse_ptr is not None:
                tl.store(lse_ptr + lse_row + spare.rows, float("-inf"), mask=spare.mask)
    if num_own <= 0:
        return

    queries = work.start + tl.arange(0, BLOCK_M)
    queries_mask = queries < bounds.seqlen_q
    q_ptrs = tile_pointers(q, work.batch, first_row, work.head, BLOCK_M, TILE.WIDE_ROWS)
    q_tile = load_tile(q_ptrs, queries_mask, TILE.HEAD_DIM)  # (BLOCK_M, HEAD_DIM)
    head_kv = work.head // heads.group_size
    if TILE.USE_TMA:
        coords = sequence_coords(work.batch, head_kv, bounds.first_k, bounds.seqlen_k, PACKED)
        k_rows = Rows((k_desc, k_desc_rest), None, coords, bounds.seqlen_k)
        v_rows = Rows((v_desc, v_desc_rest), None, coords, bounds.seqlen_k)
    else:
        k = in_vectors(k, TILE.VECTOR)
        v = in_vectors(v, TILE.VECTOR)
        k_rows = Rows(row_pointer(k, work.batch, bounds.first_k, head_kv), k.strides.row, None, bounds.seqlen_k)
        v_rows = Rows(row_pointer(v, work.batch, bounds.first_k, head_kv), v.strides.row, None, bounds.seqlen_k)
    slope = None
    if scores.alibi is not None:
        slope = tl.load(row_pointer(scores.alibi, work.batch, 0, work.head))

    offset = bounds.seqlen_k - bounds.seqlen_q
    end = tl.minimum(work.start + BLOCK_M, bounds.seqlen_q)
    ALIGN: tl.constexpr = 1 if dropout is None else KEYS_PER_CALL
    blocks = visible_range(work.start + offset, end + offset, bounds.seqlen_k, scores.window, BLOCK_N, ALIGN)
    m_i, l_i = softmax_init(sinks_ptr, work.head, BLOCK_M)  # (BLOCK_M,)
    acc = zeros_tile(BLOCK_M, TILE.HEAD_DIM_V)  # (BLOCK_M, HEAD_DIM_V)
    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N), disable_licm=not TILE.HOIST):
            start_n = block_start(blocks, i, FULL, BLOCK_N, scores.window.left is not None)
            k_tile = load_rows(k_rows, start_n, BLOCK_N, TILE.HEAD_DIM, not FULL, TILE.WIDE_ROWS)  # (BLOCK_N, HEAD_DIM)
            s = dot_transposed(q_tile, k_tile, PRECISION)  # (BLOCK_M, BLOCK_N)
            if not FOLD_SCALE:
                s = scale_scores(s, scores, slope, queries, start_n, offset, q_tile[0].dtype == tl.float32)
            if not FULL:
                s = mask_scores(s, queries, start_n, bounds.seqlen_k, offset, scores.window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scores.scale_log2 if FOLD_SCALE else 1.0, not FULL)
            v_tile = load_rows(v_rows, start_n, BLOCK_N, TILE.HEAD_DIM_V, not FULL, TILE.WIDE_ROWS)
            if dropout is not None:
                p = tl.where(keep_mask(dropout, work.batch_head, queries, start_n, BLOCK_N), p, 0.0)
            acc = dot_add(p.to(v_tile[0].dtype), v_tile, scale_rows(acc, alpha), PRECISION)

    norm, lse = softmax_finish(m_i, l_i)  # (BLOCK_M,)
    if dropout is not None:
        norm *= dropout.scale
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_row + bounds.first_q + queries, lse, mask=queries_mask)
    out_ptrs = tile_pointers(out, work.batch, first_row, work.head, BLOCK_M, TILE.WIDE_ROWS)
    store_tile(out_ptrs, queries_mask, scale_rows(acc, norm), TILE.HEAD_DIM_V)


def new_outputs(q, v, wants_lse=True):
    """Uninitialised out, and lse (batch, heads, rows) or (heads, rows) or None."""
    *batch, rows, heads, head_dim = q.shape
    like_q = v.shape[-1] == head_dim and q.is_contiguous()
    out = torch.empty_like(q) if like_q else q.new_empty((*batch, rows, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=torch.float32) if wants_lse else None


def launch_flash_fwd(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, options, config=None):
    """Launch the forward kernel: one launch, no device-to-host sync.

    q, k, v and out are (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; seqlen_q and
    seqlen_k are then the largest lengths. lse may be None: not wanted. options is an AttentionOptions, config a
    FlashConfig (None: the default).
    """
    arch = arch_of(q)
    layout, packed_batch = layout_of(q, k, v, out), None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if gpu_of(arch).wgmma and config is None:
        plan = _plan_for_hopper(q, k, v, out, layout, packed_batch, seqlen_q, seqlen_k, options)
        if plan is not None:
            tensors = q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k
            launch_flash_fwd_hopper(plan, *tensors, options.softmax_scale)
            return
    plan = _plan(
        layout,
        q.dtype,
        packed_batch,
        seqlen_q,
        seqlen_k,
        options.window,
        options.softcap is not None,
        options.alibi_slopes is not None,
        options.dropout is not None,
        (k.data_ptr() | v.data_ptr()) % 16 == 0,
        arch,
        input_precision(q.dtype, arch),
        config,
    )
    if plan.num_programs == 0:
        clear_outputs(out, lse)
        return
    args = (
        View(q, plan.strides_q),
        *operand(k, plan.strides_k, plan.geometry_k),
        *operand(v, plan.strides_v, plan.geometry_v),
        View(out, plan.strides_out),
        lse,
        0 if lse is None else lse.shape[-1],
        options.sinks,
        Sequences(cu_seqlens_q, cu_seqlens_k),
        q.shape[-3],
        k.shape[-3],
        plan.num_tiles,
        plan.section_size,
        plan.heads,
        scores_of(options, plan.window),
        None if options.dropout is None else Dropout(*options.dropout),
    )
    launch_packed(_flash_fwd_kernel, (plan.num_programs,), q.device, args, plan.constants)


def _plan_for_hopper(q, k, v, out, layout, packed_batch, seqlen_q, seqlen_k, options):
    """That of hopper.py's kernel where it supports the call and is wanted, else None."""
    _, window, softcap, alibi_slopes, sinks, dropout = options
    wanted = wanted_kernels()
    plain = softcap is None and alibi_slopes is None and sinks is None and dropout is None and window[0] is None
    if wanted == "portable" or not plain or window[1] not in (None, 0):
        return None
    if any(x.data_ptr() % 16 for x in (q, k, v, out)):
        return None
    return plan_hopper(layout, q.dtype, packed_batch, seqlen_q, seqlen_k, window[1] is not None, wanted)


class _Plan(NamedTuple):
    """What of a launch follows from layouts and options alone."""

    num_programs: int
    strides_q: Strides
    strides_k: Strides
    strides_v: Strides
    strides_out: Strides
    geometry_k: list | None  # of descriptors; None without TMA
    geometry_v: list | None
    num_tiles: int
    section_size: int
    heads: Heads
    window: Window
    constants: dict


@remember
def _plan(
    layout,
    dtype,
    packed_batch,
    seqlen_q,
    seqlen_k,
    window,
    has_softcap,
    has_alibi,
    has_dropout,
    bases_aligned,
    arch,
    precision,
    config,
):
    """The _Plan of a launch, remembered since most launches are like the last."""
    (shape_q, _), (shape_k, strides_k), (shape_v, strides_v), _ = layout
    *_, num_heads, head_dim = shape_q
    *_, num_heads_kv, head_dim_v = shape_v
    batch = shape_q[0] if packed_batch is None else packed_batch
    group_size = num_heads // num_heads_kv
    causal = window[1] is not None
    size = dtype.itemsize
    all_strides = [strides for _, strides in layout]
    vector = vector_elements(size, *all_strides)
    suits_tma = strides_suit_tma(shape_k, strides_k, size) and strides_suit_tma(shape_v, strides_v, size)
    if config is None:
        access = "scalar" if vector == 1 or not bases_aligned else "tma" if suits_tma else "vector"
        plain = not (has_softcap or has_alibi or has_dropout)
        shape = head_dim, head_dim_v, causal
        case = FlashCase(arch, dtype, *shape, access, precision, has_softcap, has_dropout, plain, seqlen_k)
        config = choose(FlashConfig, case)
    use_tma = config.use_tma and suits_tma and bases_aligned
    num_tiles = tiles_each(seqlen_q, shape_q[-3], batch, config.block_m)
    section_size = 1
    if causal:
        section_size = heads_in_l2(seqlen_k * (head_dim + head_dim_v) * size, group_size, num_heads * batch)
    tile = FlashTile(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        INPUT_PRECISION=precision,
        USE_TMA=use_tma,
        VECTOR=vector,
        WIDE_ROWS=strides_are_wide(max(config.block_m, config.block_n), *all_strides),
        HOIST=not (use_tma and has_softcap and tanh_spills(head_dim)),
    )
    return _Plan(
        num_tiles * num_heads * batch,
        *(Strides(*without_dim(strides)) for strides in all_strides),
        tma_geometry(shape_k, strides_k, config.block_n) if use_tma else None,
        tma_geometry(shape_v, strides_v, config.block_n) if use_tma else None,
        num_tiles,
        section_size,
        Heads(num_heads, group_size),
        Window(*window),
        dict(TILE=tile, num_warps=config.num_warps, num_stages=config.num_stages),
    )
