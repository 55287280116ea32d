"""Kernels at the ends of the absorbed form, and their launchers: queries absorbed, splits merged and projected."""

import triton
import triton.language as tl

from .._host.device import arch_of, input_precision, launch_packed
from .._host.layout import INDICES, LSE, without_dim
from .._jit.heads import row_offsets
from .._jit.rope import load_rotated
from .._jit.softmax import LN_2, softmax_finish
from .._jit.tiles import padded_size
from .._jit.workarounds import fence_copies

# A new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "capacity", "num_positions", "num_tokens", "num_splits", *INDICES, *LSE]


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
    num_positions,
    capacity,
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

    Grid: (heads * tiles of tokens, blocks of columns and one for the rotary part); a token is one query. q is
    (tokens, heads, kv_lora_rank + qk_rope_head_dim), contiguous. Strides are (batch, row, head) of q_nope and q_pe,
    (head, row) of w_uk, a position's of cos and sin.
    """
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tokens = tl.program_id(0) // NUM_HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_mask = tokens < num_tokens
    batch = (tokens // seqlen_q).to(tl.int64)
    query = (tokens % seqlen_q).to(tl.int64)
    q_rows = q_ptr + (tokens.to(tl.int64) * NUM_HEADS + head)[:, None] * (KV_LORA_RANK + ROPE_HEAD_DIM)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        columns_mask = columns < KV_LORA_RANK
        x_ptrs = q_nope_ptr + row_offsets(batch, query, head, q_nope_strides)[:, None]
        w_ptrs = w_uk_ptr + head * w_strides[0] + columns[None, :]
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in tl.range(0, NOPE_HEAD_DIM, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            inside = offs_k < NOPE_HEAD_DIM
            x = tl.load(x_ptrs + offs_k[None, :], mask=tokens_mask[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & columns_mask[None, :]
            w = tl.load(w_ptrs + offs_k[:, None].to(tl.int64) * w_strides[1], mask=mask, other=0.0)
            if BLOCK_T >= 64:
                fence_copies()
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        q = (acc * scale).to(q_ptr.dtype.element_ty)
        tl.store(q_rows + columns[None, :], q, mask=tokens_mask[:, None] & columns_mask[None, :])
    else:
        offs_r = tl.arange(0, padded_size(ROPE_HEAD_DIM))
        rope_mask = tokens_mask[:, None] & (offs_r < ROPE_HEAD_DIM)[None, :]
        positions = None
        if ROTARY_DIM > 0:
            seqlens_k = tl.minimum(tl.load(cache_seqlens_ptr + batch, mask=tokens_mask, other=0), capacity)
            positions = seqlens_k - seqlen_q + query
        rows = q_pe_ptr + row_offsets(batch, query, head, q_pe_strides)
        q_pe = load_rotated(
            rows,
            offs_r,
            rope_mask,
            positions,
            tokens_mask,
            cos_ptr,
            sin_ptr,
            rope_strides,
            num_positions,
            ROTARY_DIM,
            INTERLEAVED,
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
    lse_batch_stride,
    lse_head_stride,
    lse_row_stride,
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

    Grid: (heads * tiles of tokens, blocks of rows). parts (splits, tokens, heads, kv_lora_rank) and lses (splits,
    tokens, heads) are contiguous; strides are (head, row) of w_uv, (token, head) of out, (batch, head, query) of lse.
    """
    ROWS: tl.constexpr = max(16, BLOCK_T)  # of a product; fewer tokens are repeated
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    first_token = (tl.program_id(0) // NUM_HEADS).to(tl.int64) * BLOCK_T
    tokens = first_token + tl.arange(0, BLOCK_T)
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

    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
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
    rows = first_token + repeats
    rows_mask = (repeats < BLOCK_T) & (rows < num_tokens)
    offsets = (rows * out_strides[0] + head * out_strides[1])[:, None] + values[None, :]
    mask = rows_mask[:, None] & (values < V_HEAD_DIM)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None and tl.program_id(1) == 0:
        lse_ptrs = lse_ptr + head * lse_head_stride
        lse_ptrs += tokens // seqlen_q * lse_batch_stride + tokens % seqlen_q * lse_row_stride
        tl.store(lse_ptrs, lse, mask=tokens_mask)


@triton.jit
def _load_lses(lses_ptr, rows, rows_mask, splits, num_splits, split_stride):
    """(log-sum-exp in log2 units (rows, splits), -inf where there is none, offsets of these)."""
    offsets = rows[:, None] + splits[None, :] * split_stride
    mask = rows_mask[:, None] & (splits < num_splits)[None, :]
    return tl.load(lses_ptr + offsets, mask=mask, other=float("-inf")) / LN_2, offsets


def launch_absorb(q_nope, q_pe, w_uk, scale, positions=(None, 0, None, None, False)):
    """scale * q_nope @ w_uk and scale * rope(q_pe): views of one tensor (batch, seqlen_q, num_heads, dim).

    positions is (cache_seqlens, capacity, cos, sin, interleaved), cos None for none.
    """
    batch, seqlen_q, num_heads, nope_dim = q_nope.shape
    kv_lora_rank, rope_dim = w_uk.shape[2], q_pe.shape[3]
    cache_seqlens, capacity, cos, sin, interleaved = positions
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
        0 if cos is None else cos.shape[0],
        capacity,
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
    grid = num_heads * -(-num_tokens // block_t), -(-kv_lora_rank // block_c) + 1
    launch_packed(_absorb_kernel, grid, q.device, args, constants)
    return q[..., :kv_lora_rank], q[..., kv_lora_rank:]


def launch_merge_project(parts, lse_parts, w_uv, out, lse):
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
    block_p = _block_of_parts(num_splits, block_t * block_c)
    args = (
        parts,
        lse_parts,
        w_uv,
        out,
        lse,
        w_uv.stride()[:2],
        out.stride()[1:3],
        *((None, None, None) if lse is None else lse.stride()),
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
    grid = num_heads * -(-num_tokens // block_t), -(-v_head_dim // block_v)
    launch_packed(_merge_project_kernel, grid, out.device, args, constants)


def _block_of_tokens(num_tokens, at_least):
    """One of few sizes, since it is compiled in: a server meets every one."""
    return next((size for size in (1, 4, 16, 64) if at_least <= size and num_tokens <= size), 64)


def _block_of_parts(num_splits, part_size):
    """Likewise: one, a few, or as many as make a tile of 8192 numbers, which are on their way together."""
    most = max(1, 8192 // part_size)
    if num_splits == 1:
        return 1
    return min(8, most) if num_splits <= 8 else most
