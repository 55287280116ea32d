"""Plain attention as in Triton's tutorial on fused attention, a common yardstick for Triton's speed.

All tensors are (batch, heads, seqlen, head_dim), fp16 or bf16. seqlen is a multiple of 128, head_dim is 64 or 128. The
only option is the causal mask. It differs from our kernel as follows: programs (one per query tile and head) run in
sequence order, a few tiles are tried at the first call of a shape, and one backward kernel recomputes the weights
twice, for dk and dv and again for dq.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

HEAD_DIMS = (64, 128)
ROWS = 128  # seqlen is a multiple of this, and all tiles divide it
STEP = 32  # rows of the tiles over which a backward program loops
FUSE = {"enable_fp_fusion": True}  # of a multiplication and an addition, which newer Tritons do not fuse by default
BACKWARD_LAUNCH = {"num_warps": 4, "num_stages": 5, **FUSE}
LOG2_E = math.log2(math.e)


def _set_blocks(arguments):
    """Set the block shapes of a forward launch's descriptors to those of its config."""
    for name, rows in (("q", "BLOCK_M"), ("k", "BLOCK_N"), ("v", "BLOCK_N"), ("out", "BLOCK_M")):
        arguments[name].block_shape = [1, 1, arguments[rows], arguments["HEAD_DIM"]]


def _config(block_m, block_n, num_warps, num_stages):
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return triton.Config(tiles, num_warps=num_warps, num_stages=num_stages, pre_hook=_set_blocks)


# BLOCK_N divides BLOCK_M, so that the diagonal tiles begin where the tiles left of them end.
CONFIGS = [
    _config(128, 128, 8, 3),
    _config(128, 128, 8, 2),
    _config(128, 64, 8, 3),
    _config(128, 64, 4, 3),
    _config(128, 64, 4, 4),
    _config(128, 32, 4, 4),
    _config(64, 64, 4, 3),
    _config(64, 32, 4, 4),
]


@triton.jit
def _attend_to_tiles(
    acc,
    total,
    highest,
    q,
    k,
    v,
    batch,
    head,
    queries,
    start,
    end,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc, total, highest) after the keys [start, end): weighted values, sum of weights and highest score of each row.

    Weights are 2^(score - highest), scores q k^T scale_log2.
    """
    for start_n in tl.range(start, end, BLOCK_N):
        k_tile = k.load([batch, head, start_n, 0]).reshape(BLOCK_N, HEAD_DIM)
        scores = tl.dot(q, k_tile.T)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            keys = start_n + tl.arange(0, BLOCK_N)
            scores = tl.where(queries[:, None] >= keys[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)  # (BLOCK_M,)
        weights = tl.exp2(scores * scale_log2 - new_highest[:, None])  # (BLOCK_M, BLOCK_N)
        shrink = tl.exp2(highest - new_highest)  # (BLOCK_M,)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = v.load([batch, head, start_n, 0]).reshape(BLOCK_N, HEAD_DIM)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None])  # (BLOCK_M, HEAD_DIM)
        highest = new_highest
    return acc, total, highest


@triton.autotune(CONFIGS, key=["seqlen", "HEAD_DIM", "CAUSAL"])
@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    seqlen,
    num_heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of out = softmax(q k^T / sqrt(head_dim)) v and of its log-sum-exp, in units of log 2.

    Grid: (tiles of queries, batch * heads). q, k, v and out are descriptors.
    """
    start_m = tl.program_id(0) * BLOCK_M
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    queries = start_m + tl.arange(0, BLOCK_M)
    q_tile = q.load([batch, head, start_m, 0]).reshape(BLOCK_M, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    end = start_m if CAUSAL else seqlen  # the keys before it are visible to all rows
    acc, total, highest = _attend_to_tiles(
        acc, total, highest, q_tile, k, v, batch, head, queries, 0, end, scale_log2, HEAD_DIM, BLOCK_N, False
    )
    if CAUSAL:
        end = start_m + BLOCK_M
        acc, total, highest = _attend_to_tiles(
            acc, total, highest, q_tile, k, v, batch, head, queries, start_m, end, scale_log2, HEAD_DIM, BLOCK_N, True
        )
    out_tile = (acc / total[:, None]).to(q_tile.dtype)
    out.store([batch, head, start_m, 0], out_tile.reshape(1, 1, BLOCK_M, HEAD_DIM))
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * seqlen + queries, highest + tl.log2(total))


@triton.jit
def _first_row(batch_head, num_heads, stride_batch, stride_head):
    """Offset of row 0 of a head."""
    batch = (batch_head // num_heads).to(tl.int64)
    return batch * stride_batch + (batch_head % num_heads).to(tl.int64) * stride_head


@triton.jit
def _rows(ptr, start, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to the rows [start, start + ROWS), (ROWS, HEAD_DIM)."""
    return ptr + (start + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    stride_batch,
    stride_head,
    stride_row,
    seqlen,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = rowsum(out * dout), fp32, for BLOCK rows. Grid: (tiles of queries, batch * heads)."""
    start = tl.program_id(0) * BLOCK
    first = _first_row(tl.program_id(1), num_heads, stride_batch, stride_head)
    out = tl.load(_rows(out_ptr + first, start, stride_row, BLOCK, HEAD_DIM)).to(tl.float32)
    dout = tl.load(_rows(dout_ptr + first, start, stride_row, BLOCK, HEAD_DIM)).to(tl.float32)
    rows = tl.program_id(1).to(tl.int64) * seqlen + start + tl.arange(0, BLOCK)
    tl.store(delta_ptr + rows, tl.sum(out * dout, 1))


@triton.jit
def _add_to_dk_dv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    stride_row,
    keys,
    start,
    end,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dv + P^T dout and dk + dS^T q over the queries [start, end), where dS = P (dout v^T - delta)."""
    for start_m in tl.range(start, end, STEP):
        queries = start_m + tl.arange(0, STEP)
        q = tl.load(_rows(q_ptr, start_m, stride_row, STEP, HEAD_DIM))
        lse = tl.load(lse_ptr + queries)
        # Transposed, since the matrix instructions split the long side of a tile among warps.
        weights = tl.exp2(tl.dot(k, q.T) * scale_log2 - lse[None, :])  # (keys, STEP)
        if MASKED:
            weights = tl.where(queries[None, :] >= keys[:, None], weights, 0.0)
        dout = tl.load(_rows(dout_ptr, start_m, stride_row, STEP, HEAD_DIM))
        dv = tl.dot(weights.to(dout.dtype), dout, dv)  # (keys, HEAD_DIM)
        delta = tl.load(delta_ptr + queries)
        dscores = weights * (tl.dot(v, dout.T) - delta[None, :])  # (keys, STEP)
        dk = tl.dot(dscores.to(q.dtype), q, dk)  # (keys, HEAD_DIM)
    return dk, dv


@triton.jit
def _add_to_dq(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    stride_row,
    queries,
    start,
    end,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq + dS k over the keys [start, end)."""
    for start_n in tl.range(start, end, STEP):
        k = tl.load(_rows(k_ptr, start_n, stride_row, STEP, HEAD_DIM))
        v = tl.load(_rows(v_ptr, start_n, stride_row, STEP, HEAD_DIM))
        weights = tl.exp2(tl.dot(q, k.T) * scale_log2 - lse[:, None])  # (queries, STEP)
        if MASKED:
            keys = start_n + tl.arange(0, STEP)
            weights = tl.where(queries[:, None] >= keys[None, :], weights, 0.0)
        dscores = weights * (tl.dot(dout, v.T) - delta[:, None])  # (queries, STEP)
        dq = tl.dot(dscores.to(k.dtype), k, dq)  # (queries, HEAD_DIM)
    return dq


@triton.jit
def backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_batch,
    stride_head,
    stride_row,
    seqlen,
    num_heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """BLOCK rows of dk and dv in a loop over the queries, then the same rows of dq in a loop over the keys: no atomics.

    Grid: (tiles, batch * heads). All tensors of rows have the same strides.
    """
    first = _first_row(tl.program_id(1), num_heads, stride_batch, stride_head)
    q_ptr += first
    k_ptr += first
    v_ptr += first
    dout_ptr += first
    lse_ptr += tl.program_id(1).to(tl.int64) * seqlen
    delta_ptr += tl.program_id(1).to(tl.int64) * seqlen
    start = tl.program_id(0) * BLOCK
    end = start + BLOCK
    rows = start + tl.arange(0, BLOCK)

    k = tl.load(_rows(k_ptr, start, stride_row, BLOCK, HEAD_DIM))
    v = tl.load(_rows(v_ptr, start, stride_row, BLOCK, HEAD_DIM))
    dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    unmasked = 0
    if CAUSAL:
        dk, dv = _add_to_dk_dv(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            lse_ptr,
            delta_ptr,
            stride_row,
            rows,
            start,
            end,
            scale_log2,
            HEAD_DIM,
            STEP,
            True,
        )
        unmasked = end
    dk, dv = _add_to_dk_dv(
        dk,
        dv,
        k,
        v,
        q_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        stride_row,
        rows,
        unmasked,
        seqlen,
        scale_log2,
        HEAD_DIM,
        STEP,
        False,
    )
    tl.store(_rows(dv_ptr + first, start, stride_row, BLOCK, HEAD_DIM), dv.to(v.dtype))
    tl.store(_rows(dk_ptr + first, start, stride_row, BLOCK, HEAD_DIM), (dk * scale).to(k.dtype))

    q = tl.load(_rows(q_ptr, start, stride_row, BLOCK, HEAD_DIM))
    dout = tl.load(_rows(dout_ptr, start, stride_row, BLOCK, HEAD_DIM))
    lse = tl.load(lse_ptr + rows)
    delta = tl.load(delta_ptr + rows)
    dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    unmasked = seqlen
    if CAUSAL:
        dq = _add_to_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_row, rows, start, end, scale_log2, HEAD_DIM, STEP, True
        )
        unmasked = start
    dq = _add_to_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_row, rows, 0, unmasked, scale_log2, HEAD_DIM, STEP, False
    )
    tl.store(_rows(dq_ptr + first, start, stride_row, BLOCK, HEAD_DIM), (dq * scale).to(q.dtype))


def supports(seqlen, head_dim):
    return head_dim in HEAD_DIMS and seqlen % ROWS == 0


def attention(q, k, v, causal=False, config=None):
    """out = softmax(q k^T / sqrt(head_dim)) v, with gradients. Tensors whose strides differ from q's are copied.

    config: a forward config of CONFIGS; None tries all at the first call of a shape.
    """
    return _Attention.apply(q, k, v, causal, config)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, config):
        like = torch.empty_like(q)  # if q has gaps, this has other strides
        q, k, v = (_in_layout_of(like, x) for x in (q, k, v))
        out, lse = forward(q, k, v, causal, config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        return *backward(_in_layout_of(out, dout), q, k, v, out, lse, ctx.causal), None, None


def _in_layout_of(like, x):
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def forward(q, k, v, causal, config=None):
    """(out, lse): log-sum-exp in units of log 2, fp32 (batch, heads, seqlen)."""
    batch, num_heads, seqlen, head_dim = q.shape
    if not supports(seqlen, head_dim):
        raise NotImplementedError(f"seqlen {seqlen}, head_dim {head_dim}")
    out, lse = torch.empty_like(q), q.new_empty((batch, num_heads, seqlen), dtype=torch.float32)
    unset = [1, 1, ROWS, head_dim]
    arguments = {
        name: TensorDescriptor(x, list(x.shape), list(x.stride()), unset)
        for name, x in {"q": q, "k": k, "v": v, "out": out}.items()
    }
    arguments |= {"lse_ptr": lse, "seqlen": seqlen, "num_heads": num_heads, "scale_log2": head_dim**-0.5 * LOG2_E}
    arguments |= {"HEAD_DIM": head_dim, "CAUSAL": causal, **FUSE}
    kernel = forward_kernel
    if config is not None:
        kernel = forward_kernel.fn
        arguments |= config.all_kwargs()
        _set_blocks(arguments)
    kernel[lambda constants: (seqlen // constants["BLOCK_M"], batch * num_heads)](**arguments)
    return out, lse


def backward(dout, q, k, v, out, lse, causal):
    """(dq, dk, dv). All tensors have the same strides."""
    batch, num_heads, seqlen, head_dim = q.shape
    grid = seqlen // ROWS, batch * num_heads
    layout = *q.stride()[:3], seqlen, num_heads
    delta = torch.empty_like(lse)
    delta_kernel[grid](out, dout, delta, *layout, HEAD_DIM=head_dim, BLOCK=ROWS, **FUSE)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    scale = head_dim**-0.5
    constants = {"HEAD_DIM": head_dim, "CAUSAL": causal, "BLOCK": ROWS, "STEP": STEP}
    args = q, k, v, dout, lse, delta, *gradients, *layout, scale, scale * LOG2_E
    backward_kernel[grid](*args, **constants, **BACKWARD_LAUNCH)
    return gradients
