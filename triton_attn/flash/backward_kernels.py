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

from .._jit.dropout import KEYS_PER_CALL, keep_mask
from .._jit.heads import assign_tile, in_vectors, row_pointer, sequence_bounds, spare_rows
from .._jit.masks import add_alibi, cap_scores_and_derivative, mask_scores, visible_range
from .._jit.softmax import LOG2_E
from .._jit.tiles import (
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
    zeros_tile,
)
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
        return tl.where(keep, dot_transposed(a, b, INPUT_PRECISION) * dropout[2], 0.0) + minus_delta


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
    first_q, _, seqlen_q, _ = sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_q_ptr, batch, seqlen_q, 0)
    start_m = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    offs_m = start_m + rows
    rows_mask = offs_m < seqlen_q

    out_ptr = row_pointer(out_ptr, out_strides, batch, first_q + start_m, head)
    dout_ptr = row_pointer(dout_ptr, dout_strides, batch, first_q + start_m, head)
    out = load_tile(out_ptr, rows, out_strides[1], rows_mask, HEAD_DIM_V, WIDE_ROWS)
    dout = load_tile(dout_ptr, rows, dout_strides[1], rows_mask, HEAD_DIM_V, WIDE_ROWS)
    minus_delta = -row_dot(out, dout)
    if dlse_ptr is not None:
        dlse_strides = dlse_batch_stride, dlse_row_stride, dlse_head_stride
        dlse_ptr = row_pointer(dlse_ptr, dlse_strides, batch, first_q + start_m, head)
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
    q_strides = in_vectors(q_strides, VECTOR)
    k_strides = in_vectors(k_strides, VECTOR)
    v_strides = in_vectors(v_strides, VECTOR)
    dout_strides = in_vectors(dout_strides, VECTOR)
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head_kv = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, False)
    batch = batch_head_kv // num_heads_kv
    head_kv = batch_head_kv % num_heads_kv
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    num_rows = seqlen_k
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, seqlen_q, seqlen_k
    )
    start_n = tile * BLOCK_N
    if VARLEN and start_n + BLOCK_N > seqlen_k:
        spare, spare_mask, any_spare = spare_rows(
            cu_seqlens_k_ptr,
            num_batch_heads // num_heads_kv,
            num_rows,
            batch * num_tiles + tile,
            first_k + seqlen_k,
            seqlen_k - start_n,
            BLOCK_N,
        )
        if any_spare:
            if dk_ptr is not None:
                clear_rows(dk_ptr, dk_strides, head_kv, spare, spare_mask, BLOCK_N, HEAD_DIM)
            if dv_ptr is not None:
                clear_rows(dv_ptr, dv_strides, head_kv, spare, spare_mask, BLOCK_N, HEAD_DIM_V)
    if start_n >= seqlen_k:
        return

    rows = tl.arange(0, BLOCK_N)
    offs_n = start_n + rows
    rows_mask = offs_n < seqlen_k
    k_ptr = row_pointer(k_ptr, k_strides, batch, first_k + start_n, head_kv)
    v_ptr = row_pointer(v_ptr, v_strides, batch, first_k + start_n, head_kv)
    k = load_tile(k_ptr, rows, k_strides[1], rows_mask, HEAD_DIM, WIDE_ROWS)
    v = load_tile(v_ptr, rows, v_strides[1], rows_mask, HEAD_DIM_V, WIDE_ROWS)

    offset = seqlen_q - seqlen_k
    seen_by = (window[1], window[0])
    end_n = tl.minimum(start_n + BLOCK_N, seqlen_k)
    lo, full_lo, full_hi, hi = visible_range(start_n, end_n, seqlen_q, offset, seen_by, BLOCK_M, 1)
    # A tile that reaches past the last key has no interior: its rows need the mask.
    full_lo = tl.where(end_n < start_n + BLOCK_N, hi, full_lo)
    full_hi = tl.maximum(full_lo, full_hi)
    left_tiles = tl.cdiv(full_lo - lo, BLOCK_M)
    boundary_tiles = left_tiles + tl.cdiv(hi - full_hi, BLOCK_M)
    interior_tiles = (full_hi - full_lo) // BLOCK_M

    dk = zeros_tile(BLOCK_N, HEAD_DIM)
    dv = zeros_tile(BLOCK_N, HEAD_DIM_V)
    for member in tl.range(0, group_size):
        head = head_kv * group_size + member
        batch_head = batch * num_heads_kv * group_size + head
        coords = sequence_coords(batch, head, first_q, seqlen_q, VARLEN)
        if USE_TMA:
            q_head = q, q_rest
            dout_head = dout, dout_rest
        else:
            q_head = row_pointer(q, q_strides, batch, first_q, head)
            dout_head = row_pointer(dout, dout_strides, batch, first_q, head)
        lse_row = tl.cast(head if VARLEN else batch_head, tl.int64) * lse_stride + first_q
        slope = None
        if alibi_slopes_ptr is not None:
            slope = tl.load(row_pointer(alibi_slopes_ptr, (alibi_strides[0], 0, alibi_strides[1]), batch, 0, head))

        for INTERIOR in tl.static_range(2):
            num_steps = interior_tiles if INTERIOR else boundary_tiles
            for i in tl.range(0, num_steps, disable_licm=not HOIST):
                if INTERIOR:
                    start_m = full_lo + i * BLOCK_M
                else:
                    start_m = tl.where(i < left_tiles, lo + i * BLOCK_M, full_hi + (i - left_tiles) * BLOCK_M)
                q_tile = load_rows(
                    q_head, q_strides[1], coords, start_m, seqlen_q, BLOCK_M, HEAD_DIM, not INTERIOR, USE_TMA, WIDE_ROWS
                )
                dout_tile = load_rows(
                    dout_head,
                    dout_strides[1],
                    coords,
                    start_m,
                    seqlen_q,
                    BLOCK_M,
                    HEAD_DIM_V,
                    not INTERIOR,
                    USE_TMA,
                    WIDE_ROWS,
                )
                # The scalar start_m moves the pointers: then all loads of a thread are at constant distances from one.
                columns = tl.arange(0, BLOCK_M)
                columns_left = seqlen_q - start_m
                s = dot_transposed(k, q_tile, INPUT_PRECISION)
                lse_log2 = _load_lse_log2(lse_ptr + lse_row + start_m, columns, columns_left, not INTERIOR)
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
                    not INTERIOR,
                    q_tile[0].dtype == tl.float32,
                )
                keep = None
                dropped = p
                if dropout is not None:
                    keep = keep_mask(dropout[0], dropout[1], batch_head, start_m + columns, start_n, BLOCK_N).T
                    dropped = tl.where(keep, p * dropout[2], 0.0)
                # Before dP: its operand, P in the inputs' type, is then gone when dP needs its registers.
                if dv_ptr is not None:
                    dv = dot_add(dropped.to(dout_tile[0].dtype), dout_tile, dv, INPUT_PRECISION)
                minus_delta = _load_minus_delta(
                    minus_delta_ptr + lse_row + start_m, columns, columns_left, not INTERIOR
                )
                dp = _weight_gradients(v, dout_tile, minus_delta[None, :], keep, dropout, INPUT_PRECISION)
                ds = (p * dp * derivative).to(q_tile[0].dtype)
                if dk_ptr is not None:
                    dk = dot_add(ds, q_tile, dk, INPUT_PRECISION)
                if dq is not None:
                    dq_tile = dot_add(ds.T, k, zeros_tile(BLOCK_M, HEAD_DIM), INPUT_PRECISION)
                    if USE_TMA:
                        add_tile_tma((dq, dq_rest), coords, start_m, dq_tile, HEAD_DIM)
                    else:
                        dq_rows_mask = columns < columns_left if not INTERIOR else None
                        dq_ptr = row_pointer(dq, dq_strides, batch, first_q + start_m, head)
                        add_tile(dq_ptr, columns, dq_strides[1], dq_rows_mask, dq_tile, HEAD_DIM, WIDE_ROWS)

    if dk_ptr is not None:
        dk_ptr = row_pointer(dk_ptr, dk_strides, batch, first_k + start_n, head_kv)
        store_tile(dk_ptr, rows, dk_strides[1], rows_mask, scale_tile(dk, softmax_scale), HEAD_DIM, WIDE_ROWS)
    if dv_ptr is not None:
        dv_ptr = row_pointer(dv_ptr, dv_strides, batch, first_k + start_n, head_kv)
        store_tile(dv_ptr, rows, dv_strides[1], rows_mask, dv, HEAD_DIM_V, WIDE_ROWS)


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
    q_strides = in_vectors(q_strides, VECTOR)
    k_strides = in_vectors(k_strides, VECTOR)
    v_strides = in_vectors(v_strides, VECTOR)
    dout_strides = in_vectors(dout_strides, VECTOR)
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, window[1] is not None)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    head_kv = head // group_size
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    num_rows = seqlen_q
    first_q, first_k, seqlen_q, seqlen_k = sequence_bounds(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, seqlen_q, seqlen_k
    )
    start_m = tile * BLOCK_M
    if VARLEN and start_m + BLOCK_M > seqlen_q:
        spare, spare_mask, any_spare = spare_rows(
            cu_seqlens_q_ptr,
            num_batch_heads // num_heads,
            num_rows,
            batch * num_tiles + tile,
            first_q + seqlen_q,
            seqlen_q - start_m,
            BLOCK_M,
        )
        if any_spare:
            clear_rows(dq_ptr, dq_strides, head, spare, spare_mask, BLOCK_M, HEAD_DIM)
    if start_m >= seqlen_q:
        return

    rows = tl.arange(0, BLOCK_M)
    offs_m = start_m + rows
    rows_mask = offs_m < seqlen_q
    q_ptr = row_pointer(q_ptr, q_strides, batch, first_q + start_m, head)
    dout_ptr = row_pointer(dout_ptr, dout_strides, batch, first_q + start_m, head)
    q = load_tile(q_ptr, rows, q_strides[1], rows_mask, HEAD_DIM, WIDE_ROWS)
    dout = load_tile(dout_ptr, rows, dout_strides[1], rows_mask, HEAD_DIM_V, WIDE_ROWS)
    lse_row = tl.cast(head if VARLEN else batch_head, tl.int64) * lse_stride + first_q
    lse_log2 = _load_lse_log2(lse_ptr + lse_row, offs_m, seqlen_q, True)
    minus_delta = _load_minus_delta(minus_delta_ptr + lse_row, offs_m, seqlen_q, True)
    coords = sequence_coords(batch, head_kv, first_k, seqlen_k, VARLEN)
    if USE_TMA:
        k = k, k_rest
        v = v, v_rest
    else:
        k = row_pointer(k, k_strides, batch, first_k, head_kv)
        v = row_pointer(v, v_strides, batch, first_k, head_kv)
    slope = None
    if alibi_slopes_ptr is not None:
        slope = tl.load(row_pointer(alibi_slopes_ptr, (alibi_strides[0], 0, alibi_strides[1]), batch, 0, head))

    offset = seqlen_k - seqlen_q
    end_m = tl.minimum(start_m + BLOCK_M, seqlen_q)
    lo, full_lo, full_hi, hi = visible_range(
        start_m, end_m, seqlen_k, offset, window, BLOCK_N, 1 if dropout is None else KEYS_PER_CALL
    )
    left_tiles = tl.cdiv(full_lo - lo, BLOCK_N)
    boundary_tiles = left_tiles + tl.cdiv(hi - full_hi, BLOCK_N)
    interior_tiles = (full_hi - full_lo) // BLOCK_N

    dq = zeros_tile(BLOCK_M, HEAD_DIM)
    for INTERIOR in tl.static_range(2):
        num_steps = interior_tiles if INTERIOR else boundary_tiles
        for i in tl.range(0, num_steps, disable_licm=not HOIST):
            if INTERIOR:
                start_n = full_lo + i * BLOCK_N
            else:
                start_n = tl.where(i < left_tiles, lo + i * BLOCK_N, full_hi + (i - left_tiles) * BLOCK_N)
            k_tile = load_rows(
                k, k_strides[1], coords, start_n, seqlen_k, BLOCK_N, HEAD_DIM, not INTERIOR, USE_TMA, WIDE_ROWS
            )
            v_tile = load_rows(
                v, v_strides[1], coords, start_n, seqlen_k, BLOCK_N, HEAD_DIM_V, not INTERIOR, USE_TMA, WIDE_ROWS
            )
            keep = None
            if dropout is not None:
                keep = keep_mask(dropout[0], dropout[1], batch_head, offs_m, start_n, BLOCK_N)
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
                not INTERIOR,
                k_tile[0].dtype == tl.float32,
            )
            ds = p * dp * derivative
            dq = dot_add(ds.to(k_tile[0].dtype), k_tile, dq, INPUT_PRECISION)

    dq_ptr = row_pointer(dq_ptr, dq_strides, batch, first_q + start_m, head)
    store_tile(dq_ptr, rows, dq_strides[1], rows_mask, scale_tile(dq, softmax_scale), HEAD_DIM, WIDE_ROWS)
