"""Backward kernels of dense and varlen attention; backward.py launches them.

The weights are recomputed tile by tile from q, k and the log-sum-exp that the forward kernel stored:

    P = exp(S - lse)                      dV = P^T dO
    dP = dO V^T                           delta = rowsum(dO * O) - dlse
    dS = P * (dP - delta)                 dQ = scale * dS K        dK = scale * dS^T Q

Split schedule: one kernel computes dK and dV of a tile of keys, another computes dQ of a tile of queries. Neither uses
atomics, so results are bitwise reproducible. Fused schedule: the first kernel also adds its share of dQ to an fp32
buffer, with five matmuls a tile instead of seven.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .._jit.args import Scores, Sequences, Strides, View, Window
from .._jit.blocks import all_partial, block_start, num_blocks, visible_range
from .._jit.columns import add_in_chunks, load_fixed, scale_pieces, scores_in_chunks, store_pieces, zeros_of
from .._jit.dropout import KEYS_PER_CALL, keep_mask, mask_origin
from .._jit.heads import assign_work, row_pointer, sequence_bounds, spare_rows_of
from .._jit.masks import add_alibi, cap_scores, mask_scores
from .._jit.softmax import LN_2, LOG2_E
from .._jit.tiles import (
    HALF,
    Halves,
    Rows,
    add_tile,
    add_tile_tma,
    clear_rows,
    dot_add,
    dot_add_computed,
    dot_add_halves,
    dot_halves,
    dot_transposed,
    load_rows,
    load_tile,
    row_dot,
    sequence_coords,
    tile_pointers,
    zeros_tile,
)
from .._jit.workarounds import apart, computed_again, fills_registers, in_vectors, one_trip
from .arguments import LENGTHS


class RowSums(NamedTuple):
    """Pointers to the log-sum-exp and to -delta of each query, in fp32 with the same layout."""

    lse_ptr: object
    minus_delta_ptr: object


class FixedRows(NamedTuple):
    """What the loop over columns does not change: the rows of a tile and their masks."""

    index: object  # (rows,)
    mask: object  # (rows,)
    num_columns: object
    offset: object  # position of a row minus its index
    slope: object  # of ALiBi, or None


@triton.jit
def _load_lse_log2(lse_ptr, offs_m, seqlen_q, MASKED: tl.constexpr):
    """Log-sum-exp in log2 units. A row that sees no key, or does not exist, gets +inf: its weights are then 0."""
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < seqlen_q, other=float("-inf"))
        return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
    else:
        return tl.load(lse_ptr + offs_m) * LOG2_E


@triton.jit
def _sums_from(ptr, row, start, WIDE: tl.constexpr):
    """Pointer to lse or -delta of the queries from start on; a thread's loads are at constant offsets from this scalar.

    The order of the sum decides what LLVM keeps throughout the loop: nothing that depends on ptr, or one address for
    each ptr, which narrow heads have registers for.
    """
    return ptr + (row + start) if WIDE else ptr + row + start


@triton.jit
def _load_minus_delta(minus_delta_ptr, offs_m, seqlen_q, MASKED: tl.constexpr):
    """-delta of a tile of queries, (BLOCK_M,); 0 for a row that does not exist."""
    if MASKED:
        return tl.load(minus_delta_ptr + offs_m, mask=offs_m < seqlen_q, other=0.0)
    else:
        return tl.load(minus_delta_ptr + offs_m)


@triton.jit
def _recompute_weights(s, lse_log2, rows, start_column, scores, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """P from s = q . k, and P times the derivative of the softcap at s, for a tile in either orientation.

    rows are FixedRows; lse_log2 broadcasts against s. Rows outside the mask get weight 0: their scores, 0 - lse, may
    overflow, and the sums would contain inf * 0. The matmul of dP leaves registers for one factor of dS, not for two.
    """
    derivative = None
    if scores.softcap is not None:
        s, derivative = cap_scores(s, scores, EXACT)
    else:
        s *= scores.scale_log2
    if rows.slope is not None:
        s = add_alibi(s, rows.index, start_column, rows.offset, rows.slope)
    # In fp32 lse is subtracted before the mask: scale and lse are then one multiply-add, rounded once, as in the
    # forward kernel. A score of 500 rounded by itself has an error of 3e-5. That does not matter in 16 bits, where
    # this order costs registers.
    if EXACT:
        s -= lse_log2
    if MASKED:
        s = mask_scores(s, rows.index, start_column, rows.num_columns, rows.offset, scores.window)
        s = tl.where(rows.mask[:, None], s, float("-inf"))
    if not EXACT:
        s -= lse_log2
    p = tl.math.exp2(s)
    return p, p if derivative is None else p * derivative


@triton.jit
def _first_dp(minus_delta, dropout, one, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVED: tl.constexpr):
    """What the matmul of dP starts at, for a tile in either orientation; minus_delta broadcasts against it.

    Without dropout it is -delta, which then needs neither registers of its own nor a subtraction.
    """
    if dropout is None:
        return tl.broadcast_to(minus_delta, [ROWS, COLUMNS])
    else:
        return _zero_scores(one, ROWS, COLUMNS, HALVED)


@triton.jit
def _zero_scores(one, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVED: tl.constexpr):
    """Zeros that the first of `_scores` is added to."""
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    return apart(zeros, one) if HALVED else zeros  # `dot_transposed` does so itself


@triton.jit
def _mark(factor, keep):
    """The factor of dS, at least 0, with a sign that says whether the weight was kept.

    The mask then needs no registers during the matmul of dP.
    """
    return tl.where(keep, factor, -factor)


@triton.jit
def _score_gradients(factor, dp, minus_delta, keep, dropout):
    """dS = factor * (dP - delta), from the matmul of dP that started at `_first_dp`. keep None: see `_mark`."""
    if dropout is not None:
        kept = factor > 0.0 if keep is None else keep
        dp = tl.where(kept, dp * dropout.scale, 0.0) + minus_delta
        if keep is None:
            factor = tl.abs(factor)
    return factor * dp


@triton.jit
def _rows_to_store(first_row, start, seqlen, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The row of a tile that begins at start in its sequence, and the mask (ROWS,) of its rows."""
    if WIDE:
        start = computed_again(start)
    return first_row + start, start + tl.arange(0, ROWS) < seqlen


@triton.jit
def _store_gradient(gradient, work, first_row, mask, tile, HEAD_DIM: tl.constexpr, WIDE_ROWS: tl.constexpr):
    """Store a tile to the rows from first_row on of a gradient, a View; None: not wanted."""
    if gradient is not None:
        ptrs = tile_pointers(gradient, work.batch, first_row, work.head, tile[0].shape[0], WIDE_ROWS)
        store_pieces(ptrs, mask, tile, HEAD_DIM)


@triton.jit(do_not_specialize=[*LENGTHS, "dlse_ptr", "dlse_batch_stride", "dlse_row_stride", "dlse_head_stride"])
def _flash_bwd_delta_kernel(
    out,
    dout,
    sums,
    lse_stride,
    dlse_ptr,
    dlse_batch_stride,
    dlse_row_stride,
    dlse_head_stride,
    sinks_ptr,
    dsinks_ptr,
    cu_seqlens_q_ptr,
    seqlen_q,
    num_tiles,
    num_heads,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
):
    """One program computes -delta = dlse - rowsum(dout * out) of BLOCK_M rows of one head, and their share of dsinks.

    Grid: num_tiles * batch * num_heads. out and dout are Views, sums RowSums. dsinks is (num_tiles * batch, num_heads),
    to be summed over its first axis.
    """
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads % num_tiles
    batch = tl.program_id(0) // num_heads // num_tiles
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    bounds = sequence_bounds(Sequences(cu_seqlens_q_ptr, None, None), batch, seqlen_q, 0)
    start_m = tile * BLOCK_M
    queries = start_m + tl.arange(0, BLOCK_M)
    queries_mask = queries < bounds.seqlen_q

    first_row = bounds.first_q + start_m
    out_ptrs = tile_pointers(in_vectors(out, VECTOR), batch, first_row, head, BLOCK_M, WIDE_ROWS)
    dout_ptrs = tile_pointers(in_vectors(dout, VECTOR), batch, first_row, head, BLOCK_M, WIDE_ROWS)
    out_tile = load_tile(out_ptrs, queries_mask, HEAD_DIM_V)  # (BLOCK_M, HEAD_DIM_V)
    dout_tile = load_tile(dout_ptrs, queries_mask, HEAD_DIM_V)  # (BLOCK_M, HEAD_DIM_V)
    minus_delta = -row_dot(out_tile, dout_tile)  # (BLOCK_M,)
    if dlse_ptr is not None:
        dlse = View(dlse_ptr, Strides(dlse_batch_stride, dlse_row_stride, dlse_head_stride))
        dlse_ptrs = row_pointer(dlse, batch, first_row, head) + tl.arange(0, BLOCK_M).to(tl.int64) * dlse_row_stride
        minus_delta += tl.load(dlse_ptrs, mask=queries_mask, other=0.0)
    sums_row = tl.cast(head if PACKED else batch * num_heads + head, tl.int64) * lse_stride + bounds.first_q
    tl.store(sums.minus_delta_ptr + sums_row + queries, minus_delta, mask=queries_mask)

    if dsinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        lse = tl.load(sums.lse_ptr + sums_row + queries, mask=queries_mask, other=float("inf"))
        weights = tl.math.exp2(tl.where(sink == float("-inf"), sink, sink - lse) * LOG2_E)
        tl.store(dsinks_ptr + tl.program_id(0), tl.sum(weights * minus_delta))


@triton.jit
def _scores(a, b, start, one, HEAD_DIM: tl.constexpr, HALVED: tl.constexpr, TILE: tl.constexpr):
    """start + a @ b.T; b are Halves if HALVED or CHUNKED."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    if TILE.CHUNKED:
        return scores_in_chunks(a, b, start, HEAD_DIM, TILE)
    elif HALVED:
        return dot_halves(a, b, start, one, TILE)
    else:
        return dot_transposed(a, b, PRECISION, start, one)


@triton.jit
def _add_product(a, b, acc, one, HEAD_DIM: tl.constexpr, HALVED: tl.constexpr, TILE: tl.constexpr):
    """acc + a @ b, see `dot_add_computed`; b are Halves if HALVED or CHUNKED."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    if TILE.CHUNKED:
        return add_in_chunks(a, b, acc, HEAD_DIM, TILE)
    elif HALVED:
        return dot_add_halves(a, b, acc, TILE)
    else:
        return dot_add_computed(a, b, acc, one, PRECISION)


@triton.jit
def _add_rows(dq, dq_tile, batch, first_row, head, num_rows, TILE: tl.constexpr):
    """Add a tile to num_rows rows of the View dq, or to all of its rows if that is None."""
    mask = None if num_rows is None else tl.arange(0, TILE.BLOCK_M) < num_rows
    dq_ptrs = tile_pointers(dq, batch, first_row, head, TILE.BLOCK_M, TILE.WIDE_ROWS)
    add_tile(dq_ptrs, mask, dq_tile, TILE.HEAD_DIM)


@triton.jit
def _clear_spare_keys(dk, dv, work, bounds, cu_seqlens_k_ptr, seqlen_k, TILE: tl.constexpr):
    """Zero the gradients of rows that belong to no sequence, if this program is to clear some."""
    end_row = bounds.first_k + bounds.seqlen_k
    num_own = bounds.seqlen_k - work.start
    spare = spare_rows_of(work, cu_seqlens_k_ptr, seqlen_k, end_row, num_own, TILE.BLOCK_N)
    if spare.any:
        clear_rows(dk, work.head, spare, TILE.BLOCK_N, TILE.HEAD_DIM)
        clear_rows(dv, work.head, spare, TILE.BLOCK_N, TILE.HEAD_DIM_V)


@triton.jit(do_not_specialize=LENGTHS)
def _flash_bwd_dkdv_kernel(
    q,
    q_desc,
    q_desc_rest,
    k,
    v,
    dout,
    dout_desc,
    dout_desc_rest,
    sums,
    lse_stride,
    dq,
    dq_desc,
    dq_desc_rest,
    dk,
    dv,
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
    """One program computes BLOCK_N rows of dk and dv of one KV head, over all query heads of its group.

    Grid: num_tiles * num_heads_kv * batch; heads.num is num_heads_kv. Arguments as in the forward kernel; sums are
    RowSums. Tiles are transposed, (keys, queries), so that P^T and dS^T are left operands, which stay in registers. dk
    or dv is None if not wanted. In the fused schedule dq, fp32 zeros, is given as a View or as descriptors.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    HEAD_DIM: tl.constexpr = TILE.HEAD_DIM
    HEAD_DIM_V: tl.constexpr = TILE.HEAD_DIM_V
    WIDE_ROWS: tl.constexpr = TILE.WIDE_ROWS
    WIDE: tl.constexpr = fills_registers(HEAD_DIM, HEAD_DIM_V)
    STEP: tl.constexpr = -1 if WIDE else 1  # full tiles come first, or last
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    work = assign_work(num_tiles, section_size, heads.num, BLOCK_N, False)
    bounds = sequence_bounds(seqs, work.batch, seqlen_q, seqlen_k)
    first_row = bounds.first_k + work.start
    num_own = bounds.seqlen_k - work.start
    if PACKED and num_own < BLOCK_N:
        _clear_spare_keys(dk, dv, work, bounds, seqs.cu_seqlens_k_ptr, seqlen_k, TILE)
    if num_own <= 0:
        return

    keys = work.start + tl.arange(0, BLOCK_N)
    keys_mask = keys < bounds.seqlen_k
    k_ptrs = tile_pointers(in_vectors(k, TILE.VECTOR), work.batch, first_row, work.head, BLOCK_N, WIDE_ROWS)
    v_ptrs = tile_pointers(in_vectors(v, TILE.VECTOR), work.batch, first_row, work.head, BLOCK_N, WIDE_ROWS)
    HALVED: tl.constexpr = TILE.CUT_CHAIN and dv is None
    TWICE: tl.constexpr = HALVED and TILE.USE_TMA  # q is loaded for S and again for dK; a load takes no registers
    LATE: tl.constexpr = TILE.CUT_CHAIN and TILE.USE_TMA and dk is None  # dO takes the shared memory of q
    k_tile = load_fixed(k_ptrs, keys_mask, HEAD_DIM, HALF if TWICE else 512, TILE)  # (BLOCK_N, HEAD_DIM)
    v_tile = load_fixed(v_ptrs, keys_mask, HEAD_DIM_V, HALF if HALVED else 512, TILE)  # (BLOCK_N, HEAD_DIM_V)
    EXACT: tl.constexpr = k.ptr.dtype.element_ty == tl.float32
    FROM_SHARED: tl.constexpr = WIDE and TILE.CUT_CHAIN and dk is not None and dv is not None and scores.softcap is None
    if not TILE.USE_TMA:
        q, dout = in_vectors(q, TILE.VECTOR), in_vectors(dout, TILE.VECTOR)

    offset = -bounds.offset
    seen_by = Window(scores.window.right, scores.window.left)
    scores = Scores(scores.scale_log2, scores.softcap, scores.alibi, seen_by)
    end = tl.minimum(work.start + BLOCK_N, bounds.seqlen_k)
    blocks = visible_range(work.start + offset, end + offset, bounds.seqlen_q, seen_by, BLOCK_M)
    blocks = all_partial(blocks, num_own < BLOCK_N)  # rows past the last key need a mask
    WHOLE: tl.constexpr = seqs.shard_ptr is None
    dk_tile = zeros_of(BLOCK_N, HEAD_DIM, HALF if TWICE else 512, TILE)  # (BLOCK_N, HEAD_DIM)
    dv_tile = zeros_of(BLOCK_N, HEAD_DIM_V, 512, TILE)  # (BLOCK_N, HEAD_DIM_V)
    for member in tl.range(0, heads.group_size):
        head = work.head * heads.group_size + member
        batch_head = work.batch * heads.num * heads.group_size + head
        coords = sequence_coords(work.batch, head, bounds.first_q, bounds.seqlen_q, PACKED)
        if TILE.USE_TMA:
            q_rows = Rows((q_desc, q_desc_rest), None, coords, bounds.seqlen_q)
            dout_rows = Rows((dout_desc, dout_desc_rest), None, coords, bounds.seqlen_q)
        else:
            dout_ptr = row_pointer(dout, work.batch, bounds.first_q, head)
            q_rows = Rows(row_pointer(q, work.batch, bounds.first_q, head), q.strides.row, None, bounds.seqlen_q)
            dout_rows = Rows(dout_ptr, dout.strides.row, None, bounds.seqlen_q)
        sums_row = tl.cast(head if PACKED else batch_head, tl.int64) * lse_stride + bounds.first_q
        slope = None if scores.alibi is None else tl.load(row_pointer(scores.alibi, work.batch, 0, head))
        rows = FixedRows(keys, keys_mask, bounds.seqlen_q, offset, slope)
        origin = mask_origin(seqs.shard_ptr, work.batch, head, batch_head)

        for FULL in tl.static_range(WIDE, 1 - WIDE + STEP, STEP):
            for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_M), disable_licm=not TILE.HOIST):
                start_m = block_start(blocks, i, FULL, BLOCK_M, seen_by.left is not None)
                end_m = None if FULL else bounds.seqlen_q
                q_tile, dout_tile = Halves(q_rows, start_m, end_m), Halves(dout_rows, start_m, end_m)
                if not TWICE and not TILE.CHUNKED:
                    q_tile = load_rows(q_rows, start_m, BLOCK_M, HEAD_DIM, not FULL, WIDE_ROWS)  # (BLOCK_M, HEAD_DIM)
                if not (HALVED or LATE or TILE.CHUNKED):
                    dout_tile = load_rows(dout_rows, start_m, BLOCK_M, HEAD_DIM_V, not FULL, WIDE_ROWS)
                queries, queries_left = tl.arange(0, BLOCK_M), bounds.seqlen_q - start_m
                one = one_trip(start_m, bounds.seqlen_q) if TILE.CUT_CHAIN else None
                s = _scores(k_tile, q_tile, _zero_scores(one, BLOCK_N, BLOCK_M, TWICE), one, HEAD_DIM, TWICE, TILE)
                lse_ptr = _sums_from(sums.lse_ptr, sums_row, start_m, WIDE)
                lse_log2 = _load_lse_log2(lse_ptr, queries, queries_left, not FULL)
                p, factor = _recompute_weights(s, lse_log2[None, :], rows, start_m, scores, not FULL, EXACT)
                if dropout is not None and TWICE:
                    for _ in tl.range(0, one, num_stages=1):  # see `drop_weights`
                        first = computed_again(work.start)
                        factor = _mark(factor, keep_mask(dropout, origin, start_m + queries, first, BLOCK_N, WHOLE).T)
                elif dropout is not None:
                    keep = keep_mask(dropout, origin, start_m + queries, work.start, BLOCK_N, WHOLE).T
                    p, factor = tl.where(keep, p * dropout.scale, 0.0), _mark(factor, keep)
                # dV comes before dP: P in the inputs' dtype is then dead when dP needs registers.
                if LATE:
                    dout_tile = load_rows(dout_rows, start_m, BLOCK_M, HEAD_DIM_V, not FULL, WIDE_ROWS)
                if dv is not None:
                    dv_tile = _add_product(p, dout_tile, dv_tile, one if FROM_SHARED else None, HEAD_DIM_V, False, TILE)
                minus_delta_ptr = _sums_from(sums.minus_delta_ptr, sums_row, start_m, WIDE)
                minus_delta = _load_minus_delta(minus_delta_ptr, queries, queries_left, not FULL)
                dp = _first_dp(minus_delta[None, :], dropout, one, BLOCK_N, BLOCK_M, HALVED)
                dp = _scores(v_tile, dout_tile, dp, one, HEAD_DIM_V, HALVED, TILE)
                ds = _score_gradients(factor, dp, minus_delta[None, :], None, dropout)
                ds = ds.to(k.ptr.dtype.element_ty)  # (BLOCK_N, BLOCK_M)
                if dk is not None:
                    dk_tile = _add_product(ds, q_tile, dk_tile, one if FROM_SHARED else None, HEAD_DIM, TWICE, TILE)
                if dq is not None or dq_desc is not None:
                    dq_tile = dot_add(ds.T, k_tile, zeros_tile(BLOCK_M, HEAD_DIM), PRECISION)  # (BLOCK_M, HEAD_DIM)
                    if dq_desc is not None:
                        add_tile_tma((dq_desc, dq_desc_rest), coords, start_m, dq_tile, HEAD_DIM)
                    else:
                        num_left = None if FULL else queries_left
                        _add_rows(dq, dq_tile, work.batch, bounds.first_q + start_m, head, num_left, TILE)

    first_row, keys_mask = _rows_to_store(bounds.first_k, work.start, bounds.seqlen_k, BLOCK_N, WIDE)
    dk_tile = scale_pieces(dk_tile, scores.scale_log2 * LN_2)
    _store_gradient(dk, work, first_row, keys_mask, dk_tile, HEAD_DIM, WIDE_ROWS)
    _store_gradient(dv, work, first_row, keys_mask, dv_tile, HEAD_DIM_V, WIDE_ROWS)


@triton.jit(do_not_specialize=LENGTHS)
def _flash_bwd_dq_kernel(
    q,
    k,
    k_desc,
    k_desc_rest,
    v,
    v_desc,
    v_desc_rest,
    dout,
    sums,
    lse_stride,
    dq,
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
    """One program computes BLOCK_M rows of dq of one query head. Grid and arguments are those of the forward kernel;
    sums are RowSums."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    WIDE_ROWS: tl.constexpr = TILE.WIDE_ROWS
    WIDE: tl.constexpr = fills_registers(TILE.HEAD_DIM, TILE.HEAD_DIM_V)
    STEP: tl.constexpr = -1 if WIDE else 1  # full tiles come first, or last
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    work = assign_work(num_tiles, section_size, heads.num, BLOCK_M, scores.window.right is not None)
    bounds = sequence_bounds(seqs, work.batch, seqlen_q, seqlen_k)
    first_row = bounds.first_q + work.start
    num_own = bounds.seqlen_q - work.start
    if PACKED and num_own < BLOCK_M:
        end_row = bounds.first_q + bounds.seqlen_q
        spare = spare_rows_of(work, seqs.cu_seqlens_q_ptr, seqlen_q, end_row, num_own, BLOCK_M)
        if spare.any:
            clear_rows(dq, work.head, spare, BLOCK_M, TILE.HEAD_DIM)
    if num_own <= 0:
        return

    queries = work.start + tl.arange(0, BLOCK_M)
    queries_mask = queries < bounds.seqlen_q
    q_ptrs = tile_pointers(in_vectors(q, TILE.VECTOR), work.batch, first_row, work.head, BLOCK_M, WIDE_ROWS)
    dout_ptrs = tile_pointers(in_vectors(dout, TILE.VECTOR), work.batch, first_row, work.head, BLOCK_M, WIDE_ROWS)
    TWICE: tl.constexpr = TILE.CUT_CHAIN and TILE.USE_TMA
    WIDEST: tl.constexpr = HALF if TILE.CUT_CHAIN else 512
    q_tile = load_fixed(q_ptrs, queries_mask, TILE.HEAD_DIM, HALF if TWICE else 512, TILE)  # (BLOCK_M, HEAD_DIM)
    dout_tile = load_fixed(dout_ptrs, queries_mask, TILE.HEAD_DIM_V, WIDEST, TILE)  # (BLOCK_M, HEAD_DIM_V)
    EXACT: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    sums_row = tl.cast(work.head if PACKED else work.batch_head, tl.int64) * lse_stride + bounds.first_q
    lse_log2 = _load_lse_log2(sums.lse_ptr + sums_row, queries, bounds.seqlen_q, True)  # (BLOCK_M,)
    minus_delta = _load_minus_delta(sums.minus_delta_ptr + sums_row, queries, bounds.seqlen_q, True)  # (BLOCK_M,)
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
    slope = None if scores.alibi is None else tl.load(row_pointer(scores.alibi, work.batch, 0, work.head))

    offset = bounds.offset
    rows = FixedRows(queries, queries_mask, bounds.seqlen_k, offset, slope)
    end = tl.minimum(work.start + BLOCK_M, bounds.seqlen_q)
    WHOLE: tl.constexpr = seqs.shard_ptr is None
    ALIGN: tl.constexpr = 1 if dropout is None else KEYS_PER_CALL
    origin = mask_origin(seqs.shard_ptr, work.batch, work.head, work.batch_head)
    blocks = visible_range(work.start + offset, end + offset, bounds.seqlen_k, scores.window, BLOCK_N, ALIGN)
    dq_tile = zeros_of(BLOCK_M, TILE.HEAD_DIM, HALF if TWICE else 512, TILE)  # (BLOCK_M, HEAD_DIM)
    for FULL in tl.static_range(WIDE, 1 - WIDE + STEP, STEP):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N), disable_licm=not TILE.HOIST):
            start_n = block_start(blocks, i, FULL, BLOCK_N, scores.window.left is not None)
            end_n = None if FULL else bounds.seqlen_k
            k_tile, v_tile = Halves(k_rows, start_n, end_n), Halves(v_rows, start_n, end_n)
            if not TWICE and not TILE.CHUNKED:
                k_tile = load_rows(k_rows, start_n, BLOCK_N, TILE.HEAD_DIM, not FULL, WIDE_ROWS)  # (BLOCK_N, HEAD_DIM)
            if not TILE.CUT_CHAIN and not TILE.CHUNKED:
                v_tile = load_rows(v_rows, start_n, BLOCK_N, TILE.HEAD_DIM_V, not FULL, WIDE_ROWS)
            keep = None
            if dropout is not None and not TWICE:
                first_query = computed_again(work.start) if WIDE else work.start
                keep = keep_mask(dropout, origin, first_query + tl.arange(0, BLOCK_M), start_n, BLOCK_N, WHOLE)
            one = one_trip(start_n, bounds.seqlen_k) if TILE.CUT_CHAIN else None
            dp = _first_dp(minus_delta[:, None], dropout, one, BLOCK_M, BLOCK_N, TILE.CUT_CHAIN)
            dp = _scores(dout_tile, v_tile, dp, one, TILE.HEAD_DIM_V, TILE.CUT_CHAIN, TILE)
            s = _scores(q_tile, k_tile, _zero_scores(one, BLOCK_M, BLOCK_N, TWICE), one, TILE.HEAD_DIM, TWICE, TILE)
            _, factor = _recompute_weights(s, lse_log2[:, None], rows, start_n, scores, not FULL, EXACT)
            if dropout is not None and TWICE:
                for _ in tl.range(0, one, num_stages=1):  # see `drop_weights`
                    own = computed_again(work.start) + tl.arange(0, BLOCK_M)
                    factor = _mark(factor, keep_mask(dropout, origin, own, start_n, BLOCK_N, WHOLE))
            ds = _score_gradients(factor, dp, minus_delta[:, None], keep, dropout)  # (BLOCK_M, BLOCK_N)
            ds = ds.to(q.ptr.dtype.element_ty)
            dq_tile = _add_product(ds, k_tile, dq_tile, None, TILE.HEAD_DIM, TWICE, TILE)

    first_row, queries_mask = _rows_to_store(bounds.first_q, work.start, bounds.seqlen_q, BLOCK_M, WIDE)
    dq_tile = scale_pieces(dq_tile, scores.scale_log2 * LN_2)
    _store_gradient(dq, work, first_row, queries_mask, dq_tile, TILE.HEAD_DIM, WIDE_ROWS)
