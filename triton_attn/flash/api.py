"""Flash attention as users call it: argument checks, then the kernel or the reference."""

import torch

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_kernel_dtype,
    check_length,
    check_number,
    check_per_head,
    check_qkv,
    check_window,
    fail,
)
from . import reference
from .options import AttentionOptions


def flash_attention(
    q,
    k,
    v,
    *,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    return_lse=False,
):
    """Exact attention of queries over keys and values, without the matrix of scores in memory.

        out[b, i, h] = sum_j softmax_j(s[b, h, i, j]) v[b, j, h // group_size]
        s[b, h, i, j] = softcap * tanh(x / softcap) - slope[h] * |i + seqlen_k - seqlen_q - j|
        x = softmax_scale * q[b, i, h] . k[b, j, h // group_size],  group_size = num_heads_q // num_heads_kv

    over the keys j that query i sees: i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right. One head
    of keys and values serves group_size heads of queries: 1 is MHA, num_heads_q is MQA, between is GQA.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), fp16, bf16 or fp32; head_dim 1 to 512. Any strides, the last
            dimension contiguous. fp32 products follow torch.get_float32_matmul_precision().
        k: (batch, seqlen_k, num_heads_kv, head_dim), q's dtype and device. num_heads_kv divides num_heads_q.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v); head_dim_v 1 to 512, its own.
        causal: query i sees no key after its own position: right = 0. Aligned to the bottom right.
        softmax_scale: factor on q . k; None is head_dim ** -0.5.
        window_size: (left, right) keys around the query's position; -1 is unlimited.
        softcap: bound of the scores, natural units; 0 is none.
        alibi_slopes: fp32 (num_heads_q,) or (batch, num_heads_q); None is none.
        sinks: (num_heads_q,), fp32 or q's dtype: one more logit per head in the softmax's sum, with no value.
        return_lse: also return the log-sum-exp of the scores, natural log, the sink included.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype, and with return_lse also lse
        (batch, num_heads_q, seqlen_q) in fp32. A query that sees no key has out = 0 and lse = -inf, or the sink.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
        NotImplementedError: an input of the kernel requires a gradient.

    Source: Dao, FlashAttention-2 (2023), arXiv:2307.08691; online softmax: Milakov and Gimelshein (2018),
    arXiv:1805.02867; ALiBi: arXiv:2108.12409; sinks: arXiv:2309.17453.
    """
    check_qkv(q, k, v, ndim=4)
    options = _check_options(q, q.shape[0], causal, softmax_scale, window_size, softcap, alibi_slopes, sinks)
    if not use_kernel(q):
        return reference.flash_attention(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
        )
    batch, seqlen_q, num_heads_q, _ = q.shape
    lse = q.new_empty((batch, num_heads_q, seqlen_q), dtype=torch.float32)
    out = _forward(q, k, v, lse, None, None, seqlen_q, k.shape[1], options)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    return_lse=False,
    check_values=None,
):
    """`flash_attention` of a batch of sequences packed one after the other, without padding.

    Sequence i has the queries [cu_seqlens_q[i], cu_seqlens_q[i + 1]) and the keys [cu_seqlens_k[i],
    cu_seqlens_k[i + 1]); masks are aligned to the bottom right of each sequence.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k, v: (total_k, num_heads_kv, head_dim) and (total_k, num_heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device, from 0, never falling. Lengths may be 0.
        max_seqlen_q, max_seqlen_k: the longest lengths, ints. Queries past max_seqlen_q are not computed.
        check_values: read cu_seqlens back and check them; None follows the environment variable TRITON_ATTN_CHECK=1.
        The rest as in `flash_attention`.

    Returns:
        out (total_q, num_heads_q, head_dim_v) in q's dtype, and with return_lse also lse (num_heads_q, total_q) in
        fp32. Rows after cu_seqlens_q[-1] belong to no sequence and hold no defined value.

    Raises: as `flash_attention`; ValueError for bad values in cu_seqlens where they are checked.
    """
    check_qkv(q, k, v, ndim=3)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        fail("cu_seqlens_k", f"cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape))
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    if should_check_values(check_values):
        check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    options = _check_options(q, batch, causal, softmax_scale, window_size, softcap, alibi_slopes, sinks)
    if not use_kernel(q):
        return reference.flash_attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
        )
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    out = _forward(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)
    return (out, lse) if return_lse else out


def _check_options(q, batch, causal, softmax_scale, window_size, softcap, alibi_slopes, sinks):
    if not isinstance(causal, bool):
        fail("causal", "a bool", type(causal).__name__, TypeError)
    check_window(window_size)
    check_number("softcap", softcap)
    if softcap < 0:
        fail("softcap", "0 (none) or more", softcap)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    else:
        check_number("softmax_scale", softmax_scale)
    num_heads_q = q.shape[-2]
    if alibi_slopes is not None:
        shapes = ((num_heads_q,), (batch, num_heads_q))
        check_per_head("alibi_slopes", alibi_slopes, shapes, q.device, (torch.float32,))
    if sinks is not None:
        check_per_head("sinks", sinks, ((num_heads_q,),), q.device, (torch.float32, q.dtype))
    left, right = window_size
    window = (left if left >= 0 else None, 0 if causal else right if right >= 0 else None)
    return AttentionOptions(float(softmax_scale), window, float(softcap) or None, alibi_slopes, sinks)


def _forward(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, options):
    check_kernel_dtype(q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, options.sinks)):
        raise NotImplementedError("gradients of the kernel: served by TRITON_ATTN_BACKEND=reference only")
    # Kernels are loaded with the first call, so that the package imports where triton is not installed.
    from .forward import launch_flash_fwd

    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    launch_flash_fwd(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, options)
    return out
