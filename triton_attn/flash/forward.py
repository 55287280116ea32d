"""Forward kernel of dense and varlen attention, and its launcher."""

import math

import torch
import triton
import triton.language as tl

from .._host.checks import layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import gpu_of
from .._host.layout import (
    batch_head_strides,
    clear_outputs,
    describe,
    heads_in_l2,
    strides_are_wide,
    strides_suit_tma,
    tiles_each,
    tma_geometry,
    vector_elements,
    without_dim,
)
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._jit.args import Dropout, Sequences, Strides, View
from .._jit.blocks import block_start, num_blocks, visible_range
from .._jit.dropout import KEYS_PER_CALL, keep_mask
from .._jit.heads import assign_tile, row_pointer, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import add_alibi, cap_scores, mask_scores
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
from .._jit.workarounds import in_vectors
from .configs import FlashCase, FlashConfig
from .hopper import launch_flash_fwd_hopper, plan_hopper

LOG2_E = math.log2(math.e)


# Lengths and what follows from them: a new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "lse_stride", "num_tiles", "section_size"]


@triton.jit(do_not_specialize=LENGTHS)
def _flash_fwd_kernel(
    q_ptr,
    k,
    k_rest,
    v,
    v_rest,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    alibi_strides,
    seqlen_q,
    seqlen_k,
    lse_stride,
    num_tiles,
    num_heads,
    group_size,
    section_size,
    scale_log2,
    softcap,
    window,
    dropout,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    USE_TMA: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes BLOCK_M rows of out and lse for one query head of one sequence.

    Grid: num_tiles * num_heads * batch. Strides are (batch, row, head) in elements; a varlen batch has batch stride 0,
    its rows start at cu_seqlens, and seqlen_q and seqlen_k are all its rows. k and v are pointers, or with USE_TMA
    descriptors of the head dimension's first piece, and those of the second are k_rest and v_rest. window is (left,
    right); dropout is (pointer to the seed, threshold, factor of kept weights). None is none.
    """
    q = in_vectors(View(q_ptr, q_strides), VECTOR)
    out = in_vectors(View(out_ptr, out_strides), VECTOR)
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, window[1] is not None)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    head_kv = head // group_size
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    num_rows = seqlen_q
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        Sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr), batch, seqlen_q, seqlen_k
    )
    start_m = tile * BLOCK_M
    if VARLEN and start_m + BLOCK_M > seqlen_q:
        left_over = slots_left_over(batch * num_tiles + tile, first_q + seqlen_q, BLOCK_M)
        num_sequences = num_batch_heads // num_heads
        spare = spare_rows(cu_seqlens_q_ptr, num_sequences, num_rows, left_over, seqlen_q - start_m, BLOCK_M)
        if spare.any:
            clear_rows(out, head, spare, BLOCK_M, HEAD_DIM_V)
            if lse_ptr is not None:
                tl.store(lse_ptr + tl.cast(head, tl.int64) * lse_stride + spare.rows, float("-inf"), mask=spare.mask)
    if start_m >= seqlen_q:
        return

    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows_mask = offs_m < seqlen_q
    q = load_tile(tile_pointers(q, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS), rows_mask, HEAD_DIM)
    if USE_TMA:
        coords = sequence_coords(batch, head_kv, first_k, seqlen_k, VARLEN)
        k_rows = Rows((k, k_rest), None, coords, seqlen_k)
        v_rows = Rows((v, v_rest), None, coords, seqlen_k)
    else:
        k = in_vectors(View(k, k_strides), VECTOR)
        v = in_vectors(View(v, v_strides), VECTOR)
        k_rows = Rows(row_pointer(k, batch, first_k, head_kv), k.strides.row, None, seqlen_k)
        v_rows = Rows(row_pointer(v, batch, first_k, head_kv), v.strides.row, None, seqlen_k)

    if alibi_slopes_ptr is not None:
        alibi = View(alibi_slopes_ptr, Strides(alibi_strides[0], 0, alibi_strides[1]))
        slope = tl.load(row_pointer(alibi, batch, 0, head))

    offset = seqlen_k - seqlen_q
    end_m = tl.minimum(start_m + BLOCK_M, seqlen_q)
    ALIGN: tl.constexpr = 1 if dropout is None else KEYS_PER_CALL
    blocks = visible_range(start_m + offset, end_m + offset, seqlen_k, window, BLOCK_N, ALIGN)

    m_i, l_i = softmax_init(sinks_ptr, head, BLOCK_M)
    acc = zeros_tile(BLOCK_M, HEAD_DIM_V)
    for FULL in tl.static_range(2):
        num_steps = num_blocks(blocks, FULL, BLOCK_N)
        # What tanh needs of the loop's constants would be kept in registers that a wide head has not.
        for i in tl.range(0, num_steps, disable_licm=USE_TMA and softcap is not None and HEAD_DIM > 192):
            start_n = block_start(blocks, i, FULL, BLOCK_N)
            k_tile = load_rows(k_rows, start_n, BLOCK_N, HEAD_DIM, not FULL, WIDE_ROWS)
            s = dot_transposed(q, k_tile, INPUT_PRECISION)
            if not FOLD_SCALE:
                s *= scale_log2
                if softcap is not None:
                    s = cap_scores(s, softcap, q[0].dtype == tl.float32)
                if alibi_slopes_ptr is not None:
                    s = add_alibi(s, offs_m, start_n, offset, slope)
            if not FULL:
                s = mask_scores(s, offs_m, start_n, seqlen_k, offset, window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2 if FOLD_SCALE else 1.0, not FULL)
            v_tile = load_rows(v_rows, start_n, BLOCK_N, HEAD_DIM_V, not FULL, WIDE_ROWS)
            if dropout is not None:
                p = tl.where(keep_mask(dropout, batch_head, offs_m, start_n, BLOCK_N), p, 0.0)
            acc = dot_add(p.to(v_tile[0].dtype), v_tile, scale_rows(acc, alpha), INPUT_PRECISION)

    norm, lse = softmax_finish(m_i, l_i)
    if dropout is not None:
        norm *= dropout.scale
    if lse_ptr is not None:
        lse_row = head if VARLEN else batch_head
        lse_ptr += tl.cast(lse_row, tl.int64) * lse_stride + first_q
        tl.store(lse_ptr + offs_m, lse, mask=rows_mask)
    out_ptrs = tile_pointers(out, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    store_tile(out_ptrs, rows_mask, scale_rows(acc, norm), HEAD_DIM_V)


def new_outputs(q, v, wants_lse=True):
    """Uninitialised out, and lse (batch, heads, rows) or (heads, rows) or None."""
    *batch, rows, heads, head_dim = q.shape
    like_q = v.shape[-1] == head_dim and q.is_contiguous()
    out = torch.empty_like(q) if like_q else q.new_empty((*batch, rows, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=torch.float32) if wants_lse else None


def launch_flash_fwd(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, options, config=None):
    """Launch the forward kernel: one launch, nothing read back.

    q, k, v and out are (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; seqlen_q and
    seqlen_k are then the largest lengths. lse may be None: not wanted. options is an AttentionOptions, config a
    FlashConfig (None: the default).
    """
    softmax_scale, window, softcap, alibi_slopes, sinks, dropout = options
    arch = arch_of(q)
    layout, varlen_batch = layout_of(q, k, v, out), None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if gpu_of(arch).wgmma and config is None:
        plan = _plan_for_hopper(q, k, v, out, layout, varlen_batch, seqlen_q, seqlen_k, options)
        if plan is not None:
            tensors = q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k
            launch_flash_fwd_hopper(plan, *tensors, softmax_scale)
            return
    num_programs, strides, counts, geometry_k, geometry_v, constants = _plan(
        layout,
        q.dtype,
        varlen_batch,
        seqlen_q,
        seqlen_k,
        window[1] is not None,
        softcap is not None,
        softcap is None and alibi_slopes is None and softmax_scale > 0,
        dropout is not None,
        (k.data_ptr() | v.data_ptr()) % 16 == 0,
        arch,
        input_precision(q.dtype, arch),
        config,
    )
    if num_programs == 0:
        clear_outputs(out, lse)
        return
    args = (
        q,
        *describe(k, geometry_k),
        *describe(v, geometry_v),
        out,
        lse,
        sinks,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        *strides,
        None if alibi_slopes is None else batch_head_strides(alibi_slopes),
        q.shape[-3],
        k.shape[-3],
        0 if lse is None else lse.shape[-1],
        *counts,
        softmax_scale * LOG2_E,
        softcap,
        window,
        None if dropout is None else Dropout(*dropout),
    )
    launch_packed(_flash_fwd_kernel, (num_programs,), q.device, args, constants)


def _plan_for_hopper(q, k, v, out, layout, varlen_batch, seqlen_q, seqlen_k, options):
    """That of hopper.py's kernel where it serves the call and is wanted, else None."""
    softmax_scale, window, softcap, alibi_slopes, sinks, dropout = options
    wanted = wanted_kernels()
    plain = softcap is None and alibi_slopes is None and sinks is None and dropout is None and window[0] is None
    if wanted == "portable" or not plain or window[1] not in (None, 0) or softmax_scale <= 0:
        return None
    if any(x.data_ptr() % 16 for x in (q, k, v, out)):
        return None
    return plan_hopper(layout, q.dtype, varlen_batch, seqlen_q, seqlen_k, window[1] is not None, wanted)


@remember
def _plan(
    layout,
    dtype,
    varlen_batch,
    seqlen_q,
    seqlen_k,
    causal,
    capped,
    fold_scale,
    drops,
    bases_aligned,
    arch,
    precision,
    config,
):
    """What of a launch follows from layouts and options alone, remembered since most launches are like the last.

    Returns (programs, strides, counts, TMA geometry of k and of v or None, constants).
    """
    (shape_q, _), (shape_k, strides_k), (shape_v, strides_v), _ = layout
    *_, num_heads, head_dim = shape_q
    *_, num_heads_kv, head_dim_v = shape_v
    batch = shape_q[0] if varlen_batch is None else varlen_batch
    group_size = num_heads // num_heads_kv
    size = dtype.itemsize
    all_strides = [strides for _, strides in layout]
    vector = vector_elements(size, *all_strides)
    suits_tma = strides_suit_tma(shape_k, strides_k, size) and strides_suit_tma(shape_v, strides_v, size)
    if config is None:
        access = "scalar" if vector == 1 or not bases_aligned else "tma" if suits_tma else "vector"
        plain = fold_scale and not drops
        shape = head_dim, head_dim_v, causal
        case = FlashCase(arch, dtype, *shape, access, precision, capped, drops, plain, seqlen_k)
        config = choose(FlashConfig, case)
    use_tma = config.use_tma and suits_tma and bases_aligned
    num_tiles = tiles_each(seqlen_q, shape_q[-3], batch, config.block_m)
    section_size = 1
    if causal:
        section_size = heads_in_l2(seqlen_k * (head_dim + head_dim_v) * size, group_size, num_heads * batch)
    constants = dict(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        FOLD_SCALE=fold_scale,
        USE_TMA=use_tma,
        WIDE_ROWS=strides_are_wide(max(config.block_m, config.block_n), *all_strides),
        VECTOR=vector,
        INPUT_PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    counts = num_tiles, num_heads, group_size, section_size
    geometry_k = tma_geometry(shape_k, strides_k, config.block_n) if use_tma else None
    geometry_v = tma_geometry(shape_v, strides_v, config.block_n) if use_tma else None
    strides = [Strides(*without_dim(of_tensor)) for of_tensor in all_strides]
    return num_tiles * num_heads * batch, strides, counts, geometry_k, geometry_v, constants
