"""Backward kernels of dense and varlen attention; backward.py launches them.

The weights are recomputed tile by tile from q, k and the log-sum-exp that the forward kept:

    P = exp(S - lse)                      dV = P^T dO
    dP = dO V^T                           delta = rowsum(dO * O) - dlse
    dS = P * (dP - delta)                 dQ = scale * dS K        dK = scale * dS^T Q

Split schedule: one kernel owns a tile of keys and gives dK and dV, another owns a tile of queries and gives dQ. Neither
uses atomics, so results repeat bitwise. Fused schedule: the first kernel also adds its share of dQ to an fp32 buffer,
five products a tile in place of seven.
"""

import triton
import triton.language as tl

from .._jit.args import Sequences, Strides, View, Window
from .._jit.blocks import all_partial, block_start, num_blocks, visible_range
from .._jit.dropout import KEYS_PER_CALL, keep_mask
from .._jit.heads import assign_tile, row_pointer, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import add_alibi, cap_scores_and_derivative, mask_scores
from .._jit.softmax import LOG2_E
from .._jit.tiles import (
    Rows,
    add_tile,
    add_tile_tma,
    clear_rows,
    dot_add,
    dot_transposed,
    load_rows,
    load_tile,
    row_dot,
    scale_tile,
    sequence_coords,
    store_tile,
    tile_pointers,
    zeros_tile,
)
from .._jit.workarounds import in_vectors
from .forward import LENGTHS


@triton.jit
def _load_lse_log2(lse_ptr, offs_m, seqlen_q, MASKED: tl.constexpr):
    """Log-sum-exp in log2 units; +inf, so that its weights are 0, for a row that sees nothing or does not exist."""
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < seqlen_q, other=float("-inf"))
        return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
    else:
        return tl.load(lse_ptr + offs_m) * LOG2_E


@triton.jit
def _load_minus_delta(minus_delta_ptr, offs_m, seqlen_q, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(minus_delta_ptr + offs_m, mask=offs_m < seqlen_q, other=0.0)
    else:
        return tl.load(minus_delta_ptr + offs_m)


@triton.jit
def _recompute_weights(
    s,
    lse_log2,
    rows,
    rows_mask,
    start_column,
    num_columns,
    offset,
    window,
    scale_log2,
    softcap,
    slope,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """P from the products s = q . k of a tile in either orientation, and the derivative of the softcap at s.

    lse_log2 broadcasts against s. Rows outside rows_mask get no weight: their scores, 0 - lse, may overflow, and
    inf * 0 would reach the sums.
    """
    s *= scale_log2
    derivative = 1.0
    if softcap is not None:
        s, derivative = cap_scores_and_derivative(s, softcap, EXACT)
    if slope is not None:
        s = add_alibi(s, rows, start_column, offset, slope)
    # In fp32 before the mask, so that scale and log-sum-exp are one multiply-add, rounded once, as in the forward
    # kernel. A score of 500 that is rounded by itself is off by 3e-5, which is nothing in half precision; there it
    # costs registers.
    if EXACT:
        s -= lse_log2
    if MASKED:
        s = mask_scores(s, rows, start_column, num_columns, offset, window)
        s = tl.where(rows_mask[:, None], s, float("-inf"))
    if not EXACT:
        s -= lse_log2
    return tl.math.exp2(s), derivative


@triton.jit
def _weight_gradients(a, b, minus_delta, keep, dropout, INPUT_PRECISION: tl.constexpr):
    """dP - delta of a tile in either orientation, dP = a @ b.T; minus_delta broadcasts against it.

    The product starts from -delta, which then holds no registers of its own and needs no subtraction.
    """
    if keep is None:
        return dot_transposed(a, b, INPUT_PRECISION, start=minus_delta)
    else:
        return tl.where(keep, dot_transposed(a, b, INPUT_PRECISION) * dropout.scale, 0.0) + minus_delta


@triton.jit(do_not_specialize=[*LENGTHS, "dlse_ptr", "dlse_batch_stride", "dlse_row_stride", "dlse_head_stride"])
def _flash_bwd_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    minus_delta_ptr,
    sinks_ptr,
    dsinks_ptr,
    cu_seqlens_q_ptr,
    out_strides,
    dout_strides,
    dlse_batch_stride,
    dlse_row_stride,
    dlse_head_stride,
    seqlen_q,
    lse_stride,
    num_tiles,
    num_heads,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
):
    """One program computes -delta = dlse - rowsum(dout * out) for BLOCK_M rows of one head, and their share of dsinks.

    Grid: num_tiles * batch * num_heads. dsinks is (num_tiles * batch, num_heads), to be summed over its first axis.
    """
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads % num_tiles
    batch = tl.program_id(0) // num_heads // num_tiles
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    seqs = Sequences(cu_seqlens_q_ptr, cu_seqlens_q_ptr)
    first_q, _, seqlen_q, _ = sequence_bounds(seqs, batch, seqlen_q, 0)
    start_m = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    offs_m = start_m + rows
    rows_mask = offs_m < seqlen_q

    out_ptrs = tile_pointers(View(out_ptr, out_strides), batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    dout_ptrs = tile_pointers(View(dout_ptr, dout_strides), batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    out = load_tile(out_ptrs, rows_mask, HEAD_DIM_V)
    dout = load_tile(dout_ptrs, rows_mask, HEAD_DIM_V)
    minus_delta = -row_dot(out, dout)
    if dlse_ptr is not None:
        dlse = View(dlse_ptr, Strides(dlse_batch_stride, dlse_row_stride, dlse_head_stride))
        dlse_ptr = row_pointer(dlse, batch, first_q + start_m, head)
        minus_delta += tl.load(dlse_ptr + rows.to(tl.int64) * dlse_row_stride, mask=rows_mask, other=0.0)
    lse_row = tl.cast(head if VARLEN else batch * num_heads + head, tl.int64) * lse_stride + first_q
    tl.store(minus_delta_ptr + lse_row + offs_m, minus_delta, mask=rows_mask)

    if dsinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        lse = tl.load(lse_ptr + lse_row + offs_m, mask=rows_mask, other=float("inf"))
        weights = tl.math.exp2(tl.where(sink == float("-inf"), sink, sink - lse) * LOG2_E)
        tl.store(dsinks_ptr + tl.program_id(0), tl.sum(weights * minus_delta))


@triton.jit(do_not_specialize=LENGTHS)
def _flash_bwd_dkdv_kernel(
    q,
    q_rest,
    k_ptr,
    v_ptr,
    dout,
    dout_rest,
    lse_ptr,
    minus_delta_ptr,
    dq,
    dq_rest,
    dk_ptr,
    dv_ptr,
    alibi_slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    alibi_strides,
    seqlen_q,
    seqlen_k,
    lse_stride,
    num_tiles,
    num_heads_kv,
    group_size,
    section_size,
    softmax_scale,
    softcap,
    window,
    dropout,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    HOIST: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes BLOCK_N rows of dk and dv for one KV head, over all query heads of its group.

    Grid: num_tiles * num_heads_kv * batch. Tiles are transposed, keys by queries, so that P^T and dS^T are left
    operands that stay in registers. q, dout and dq are pointers, or with USE_TMA descriptors of the head dimension's
    first piece, and those of the second are q_rest, dout_rest and dq_rest. dk_ptr or dv_ptr None: not wanted. dq (fp32,
    zeros) None: not wanted here; else this is the fused schedule.
    """
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head_kv = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, False)
    batch = batch_head_kv // num_heads_kv
    head_kv = batch_head_kv % num_heads_kv
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    num_rows = seqlen_k
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        Sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr), batch, seqlen_q, seqlen_k
    )
    start_n = tile * BLOCK_N
    if VARLEN and start_n + BLOCK_N > seqlen_k:
        left_over = slots_left_over(batch * num_tiles + tile, first_k + seqlen_k, BLOCK_N)
        num_sequences = num_batch_heads // num_heads_kv
        spare = spare_rows(cu_seqlens_k_ptr, num_sequences, num_rows, left_over, seqlen_k - start_n, BLOCK_N)
        if spare.any:
            if dk_ptr is not None:
                clear_rows(View(dk_ptr, dk_strides), head_kv, spare, BLOCK_N, HEAD_DIM)
            if dv_ptr is not None:
                clear_rows(View(dv_ptr, dv_strides), head_kv, spare, BLOCK_N, HEAD_DIM_V)
    if start_n >= seqlen_k:
        return

    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows_mask = offs_n < seqlen_k
    k_view = in_vectors(View(k_ptr, k_strides), VECTOR)
    v_view = in_vectors(View(v_ptr, v_strides), VECTOR)
    k = load_tile(tile_pointers(k_view, batch, first_k + start_n, head_kv, BLOCK_N, WIDE_ROWS), rows_mask, HEAD_DIM)
    v = load_tile(tile_pointers(v_view, batch, first_k + start_n, head_kv, BLOCK_N, WIDE_ROWS), rows_mask, HEAD_DIM_V)

    offset = seqlen_q - seqlen_k
    seen_by = Window(window.right, window.left)
    end_n = tl.minimum(start_n + BLOCK_N, seqlen_k)
    blocks = visible_range(start_n + offset, end_n + offset, seqlen_q, seen_by, BLOCK_M)
    blocks = all_partial(blocks, end_n < start_n + BLOCK_N)  # its rows past the last key need the mask

    dk = zeros_tile(BLOCK_N, HEAD_DIM)
    dv = zeros_tile(BLOCK_N, HEAD_DIM_V)
    for member in tl.range(0, group_size):
        head = head_kv * group_size + member
        batch_head = batch * num_heads_kv * group_size + head
        coords = sequence_coords(batch, head, first_q, seqlen_q, VARLEN)
        if USE_TMA:
            q_head = Rows((q, q_rest), None, coords, seqlen_q)
            dout_head = Rows((dout, dout_rest), None, coords, seqlen_q)
        else:
            q_view = in_vectors(View(q, q_strides), VECTOR)
            dout_view = in_vectors(View(dout, dout_strides), VECTOR)
            q_head = Rows(row_pointer(q_view, batch, first_q, head), q_view.strides.row, None, seqlen_q)
            dout_head = Rows(row_pointer(dout_view, batch, first_q, head), dout_view.strides.row, None, seqlen_q)
        lse_row = tl.cast(head if VARLEN else batch_head, tl.int64) * lse_stride + first_q
        slope = None
        if alibi_slopes_ptr is not None:
            alibi = View(alibi_slopes_ptr, Strides(alibi_strides[0], 0, alibi_strides[1]))
            slope = tl.load(row_pointer(alibi, batch, 0, head))

        for FULL in tl.static_range(2):
            for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_M), disable_licm=not HOIST):
                start_m = block_start(blocks, i, FULL, BLOCK_M)
                q_tile = load_rows(q_head, start_m, BLOCK_M, HEAD_DIM, not FULL, WIDE_ROWS)
                dout_tile = load_rows(dout_head, start_m, BLOCK_M, HEAD_DIM_V, not FULL, WIDE_ROWS)
                # The scalar start_m moves the pointers: then all loads of a thread are at constant distances from one.
                columns = tl.arange(0, BLOCK_M)
                columns_left = seqlen_q - start_m
                s = dot_transposed(k, q_tile, INPUT_PRECISION)
                lse_log2 = _load_lse_log2(lse_ptr + lse_row + start_m, columns, columns_left, not FULL)
                p, derivative = _recompute_weights(
                    s,
                    lse_log2[None, :],
                    offs_n,
                    rows_mask,
                    start_m,
                    seqlen_q,
                    offset,
                    seen_by,
                    softmax_scale * LOG2_E,
                    softcap,
                    slope,
                    not FULL,
                    q_tile[0].dtype == tl.float32,
                )
                keep = None
                dropped = p
                if dropout is not None:
                    keep = keep_mask(dropout, batch_head, start_m + columns, start_n, BLOCK_N).T
                    dropped = tl.where(keep, p * dropout.scale, 0.0)
                # Before dP: its operand, P in the inputs' type, is then gone when dP needs its registers.
                if dv_ptr is not None:
                    dv = dot_add(dropped.to(dout_tile[0].dtype), dout_tile, dv, INPUT_PRECISION)
                minus_delta = _load_minus_delta(minus_delta_ptr + lse_row + start_m, columns, columns_left, not FULL)
                dp = _weight_gradients(v, dout_tile, minus_delta[None, :], keep, dropout, INPUT_PRECISION)
                ds = (p * dp * derivative).to(q_tile[0].dtype)
                if dk_ptr is not None:
                    dk = dot_add(ds, q_tile, dk, INPUT_PRECISION)
                if dq is not None:
                    dq_tile = dot_add(ds.T, k, zeros_tile(BLOCK_M, HEAD_DIM), INPUT_PRECISION)
                    if USE_TMA:
                        add_tile_tma((dq, dq_rest), coords, start_m, dq_tile, HEAD_DIM)
                    else:
                        dq_rows_mask = columns < columns_left if not FULL else None
                        dq_ptrs = tile_pointers(
                            View(dq, dq_strides), batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS
                        )
                        add_tile(dq_ptrs, dq_rows_mask, dq_tile, HEAD_DIM)

    if dk_ptr is not None:
        dk_ptrs = tile_pointers(View(dk_ptr, dk_strides), batch, first_k + start_n, head_kv, BLOCK_N, WIDE_ROWS)
        store_tile(dk_ptrs, rows_mask, scale_tile(dk, softmax_scale), HEAD_DIM)
    if dv_ptr is not None:
        dv_ptrs = tile_pointers(View(dv_ptr, dv_strides), batch, first_k + start_n, head_kv, BLOCK_N, WIDE_ROWS)
        store_tile(dv_ptrs, rows_mask, dv, HEAD_DIM_V)


@triton.jit(do_not_specialize=LENGTHS)
def _flash_bwd_dq_kernel(
    q_ptr,
    k,
    k_rest,
    v,
    v_rest,
    dout_ptr,
    lse_ptr,
    minus_delta_ptr,
    dq_ptr,
    alibi_slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    alibi_strides,
    seqlen_q,
    seqlen_k,
    lse_stride,
    num_tiles,
    num_heads,
    group_size,
    section_size,
    softmax_scale,
    softcap,
    window,
    dropout,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    HOIST: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes BLOCK_M rows of dq for one query head. Grid and tiles as in the forward kernel."""
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
            clear_rows(View(dq_ptr, dq_strides), head, spare, BLOCK_M, HEAD_DIM)
    if start_m >= seqlen_q:
        return

    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows_mask = offs_m < seqlen_q
    q_view = in_vectors(View(q_ptr, q_strides), VECTOR)
    dout_view = in_vectors(View(dout_ptr, dout_strides), VECTOR)
    q = load_tile(tile_pointers(q_view, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS), rows_mask, HEAD_DIM)
    dout_ptrs = tile_pointers(dout_view, batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    dout = load_tile(dout_ptrs, rows_mask, HEAD_DIM_V)
    lse_row = tl.cast(head if VARLEN else batch_head, tl.int64) * lse_stride + first_q
    lse_log2 = _load_lse_log2(lse_ptr + lse_row, offs_m, seqlen_q, True)
    minus_delta = _load_minus_delta(minus_delta_ptr + lse_row, offs_m, seqlen_q, True)
    coords = sequence_coords(batch, head_kv, first_k, seqlen_k, VARLEN)
    if USE_TMA:
        k_rows = Rows((k, k_rest), None, coords, seqlen_k)
        v_rows = Rows((v, v_rest), None, coords, seqlen_k)
    else:
        k = in_vectors(View(k, k_strides), VECTOR)
        v = in_vectors(View(v, v_strides), VECTOR)
        k_rows = Rows(row_pointer(k, batch, first_k, head_kv), k.strides.row, None, seqlen_k)
        v_rows = Rows(row_pointer(v, batch, first_k, head_kv), v.strides.row, None, seqlen_k)
    slope = None
    if alibi_slopes_ptr is not None:
        alibi = View(alibi_slopes_ptr, Strides(alibi_strides[0], 0, alibi_strides[1]))
        slope = tl.load(row_pointer(alibi, batch, 0, head))

    offset = seqlen_k - seqlen_q
    end_m = tl.minimum(start_m + BLOCK_M, seqlen_q)
    ALIGN: tl.constexpr = 1 if dropout is None else KEYS_PER_CALL
    blocks = visible_range(start_m + offset, end_m + offset, seqlen_k, window, BLOCK_N, ALIGN)

    dq = zeros_tile(BLOCK_M, HEAD_DIM)
    for FULL in tl.static_range(2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N), disable_licm=not HOIST):
            start_n = block_start(blocks, i, FULL, BLOCK_N)
            k_tile = load_rows(k_rows, start_n, BLOCK_N, HEAD_DIM, not FULL, WIDE_ROWS)
            v_tile = load_rows(v_rows, start_n, BLOCK_N, HEAD_DIM_V, not FULL, WIDE_ROWS)
            keep = None
            if dropout is not None:
                keep = keep_mask(dropout, batch_head, offs_m, start_n, BLOCK_N)
            dp = _weight_gradients(dout, v_tile, minus_delta[:, None], keep, dropout, INPUT_PRECISION)
            s = dot_transposed(q, k_tile, INPUT_PRECISION)
            p, derivative = _recompute_weights(
                s,
                lse_log2[:, None],
                offs_m,
                rows_mask,
                start_n,
                seqlen_k,
                offset,
                window,
                softmax_scale * LOG2_E,
                softcap,
                slope,
                not FULL,
                k_tile[0].dtype == tl.float32,
            )
            ds = p * dp * derivative
            dq = dot_add(ds.to(k_tile[0].dtype), k_tile, dq, INPUT_PRECISION)

    dq_ptrs = tile_pointers(View(dq_ptr, dq_strides), batch, first_q + start_m, head, BLOCK_M, WIDE_ROWS)
    store_tile(dq_ptrs, rows_mask, scale_tile(dq, softmax_scale), HEAD_DIM)
