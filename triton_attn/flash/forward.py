"""Forward kernel of dense and varlen attention, and its launcher."""

import triton
import triton.language as tl

from .._host.device import launch
from .._host.gpu import repeats_chains, repeats_rows
from .._host.layout import clear_outputs
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._jit.args import View
from .._jit.blocks import block_start, num_blocks, visible_range
from .._jit.columns import add_in_chunks, load_fixed, scores_in_chunks, store_pieces, zeros_of
from .._jit.dropout import KEYS_PER_CALL, drop_weights, mask_origin
from .._jit.heads import assign_work, row_pointer, sequence_bounds, spare_rows_of
from .._jit.masks import mask_scores, scale_scores
from .._jit.softmax import softmax_finish, softmax_init, softmax_step
from .._jit.tiles import (
    HALF,
    Halves,
    Rows,
    clear_rows,
    dot_add,
    dot_add_pieces,
    dot_pieces,
    dot_transposed,
    load_rows,
    scale_rows,
    sequence_coords,
    tile_pointers,
)
from .._jit.workarounds import fills_registers, in_vectors, one_trip, tanh_spills
from ..dense.arguments import LENGTHS, alike_of, common_arguments, key_of, plan_kernel
from ..dense.tiles import FlashCase
from .configs import FlashConfig
from .hopper import HopperPlan, launch_flash_fwd_hopper, plan_hopper


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
    # Keys and values in pieces leave the registers that a load of all their columns passes through.
    HALVED: tl.constexpr = TILE.CUT_CHAIN and not TILE.USE_TMA
    WIDEST: tl.constexpr = HALF if HALVED else 512
    WIDE: tl.constexpr = fills_registers(TILE.HEAD_DIM, TILE.HEAD_DIM_V)
    STEP: tl.constexpr = -1 if WIDE else 1  # full tiles come first, or last
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
    EXACT: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    q_tile = load_fixed(q_ptrs, queries_mask, TILE.HEAD_DIM, WIDEST, TILE)  # (BLOCK_M, HEAD_DIM)
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

    offset = bounds.offset
    end = tl.minimum(work.start + BLOCK_M, bounds.seqlen_q)
    WHOLE: tl.constexpr = seqs.shard_ptr is None
    ALIGN: tl.constexpr = 1 if dropout is None else KEYS_PER_CALL
    origin = mask_origin(seqs.shard_ptr, work.batch, work.head, work.batch_head)
    blocks = visible_range(work.start + offset, end + offset, bounds.seqlen_k, scores.window, BLOCK_N, ALIGN)
    m_i, l_i = softmax_init(sinks_ptr, work.head, BLOCK_M)  # (BLOCK_M,)
    acc = zeros_of(BLOCK_M, TILE.HEAD_DIM_V, WIDEST, TILE)  # (BLOCK_M, HEAD_DIM_V)
    for FULL in tl.static_range(WIDE, 1 - WIDE + STEP, STEP):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N), disable_licm=not TILE.HOIST):
            start_n = block_start(blocks, i, FULL, BLOCK_N, scores.window.left is not None)
            one = one_trip(start_n, blocks.hi) if TILE.CUT_CHAIN else None
            end_n = None if FULL else bounds.seqlen_k
            if TILE.CHUNKED:
                s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                s = scores_in_chunks(q_tile, Halves(k_rows, start_n, end_n), s, TILE.HEAD_DIM, TILE)
            elif HALVED:
                s = dot_pieces(q_tile, k_rows, start_n, one, not FULL, TILE.HEAD_DIM, TILE)  # (BLOCK_M, BLOCK_N)
            else:
                k_tile = load_rows(k_rows, start_n, BLOCK_N, TILE.HEAD_DIM, not FULL, TILE.WIDE_ROWS)
                s = dot_transposed(q_tile, k_tile, PRECISION, None, one)
            if not FOLD_SCALE:
                s = scale_scores(s, scores, slope, queries, start_n, offset, EXACT)
            if not FULL:
                s = mask_scores(s, queries, start_n, bounds.seqlen_k, offset, scores.window)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scores.scale_log2 if FOLD_SCALE else 1.0, not FULL)
            if dropout is not None:
                p = drop_weights(p, dropout, origin, queries, start_n, one if HALVED else None, WHOLE)
            acc = scale_rows(acc, alpha)
            if TILE.CHUNKED:
                acc = add_in_chunks(p, Halves(v_rows, start_n, end_n), acc, TILE.HEAD_DIM_V, TILE)
            elif HALVED:
                acc = dot_add_pieces(p.to(q.ptr.dtype.element_ty), v_rows, start_n, acc, not FULL, TILE)
            else:
                v_tile = load_rows(v_rows, start_n, BLOCK_N, TILE.HEAD_DIM_V, not FULL, TILE.WIDE_ROWS)
                acc = dot_add(p.to(v_tile[0].dtype), v_tile, acc, PRECISION)

    norm, lse = softmax_finish(m_i, l_i)  # (BLOCK_M,)
    if dropout is not None:
        norm *= dropout.scale
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_row + bounds.first_q + queries, lse, mask=queries_mask)
    out_ptrs = tile_pointers(out, work.batch, first_row, work.head, BLOCK_M, TILE.WIDE_ROWS)
    store_pieces(out_ptrs, queries_mask, scale_rows(acc, norm), TILE.HEAD_DIM_V)


def launch_flash_fwd(call, out, lse, config=None):
    """Launch the forward kernel of a Call: one launch, no device-to-host sync.

    out is (batch, seqlen_q, num_heads_q, head_dim_v), or (total_q, num_heads_q, head_dim_v) with cu_seqlens; lse as
    `flash_attention` returns it, or None: not wanted. config is a FlashConfig (None: the default).
    """
    q, k, v, _, options, _ = call
    plan = _plan(key_of(call, out), wanted_kernels(), config)
    if plan.num_programs == 0:
        clear_outputs(out, lse)
        return
    if type(plan) is HopperPlan:
        launch_flash_fwd_hopper(plan, call, out, lse)
        return
    of_q, of_k, of_v, of_out = plan.operands
    args = (
        View(q, of_q.strides),
        *of_k.arguments(k),
        *of_v.arguments(v),
        View(out, of_out.strides),
        lse,
        0 if lse is None else lse.shape[-1],
        options.sinks,
        *common_arguments(call, plan),
    )
    alike = alike_of(call, plan, lse)
    launch(_flash_fwd_kernel, (plan.num_programs,), q.device, args, plan.constants, alike)


@remember
def _plan(key, wanted, config):
    """The Plan of a launch, or the HopperPlan where hopper.py's kernel supports the call and is wanted."""
    if config is None and (plan := plan_hopper(key, wanted)) is not None:
        return plan
    suits_tma = key.suits_tma(1, 2)
    head_dim, head_dim_v = key.head_dims
    access = "scalar" if key.vector == 1 or not key.kv_aligned else "tma" if suits_tma else "vector"
    shape = key.problem.dtype, head_dim, head_dim_v, key.causal, access, key.precision
    case = FlashCase(key.arch, *shape, key.problem.softcap is not None, key.has_dropout, key.is_plain, key.max_seqlen_k)
    if config is None:
        config = choose(FlashConfig, case)
    use_tma = config.use_tma and suits_tma and key.kv_aligned
    hoist = not (use_tma and key.problem.softcap is not None and tanh_spills(head_dim))
    # Other loads pass through so many registers that a tile has few rows, for which no warps repeat matmuls.
    repeats = repeats_rows if case.is_half and access != "scalar" else repeats_chains
    return plan_kernel(key, config, use_tma, hoist, repeats=repeats)
