"""flash-attn 2's functions on our kernels: the same signatures, defaults and return values, positional calls too.

    from triton_attn.interop.flash_attn import flash_attn_func      # was: from flash_attn import flash_attn_func

Nothing is ignored: what is not served raises NotImplementedError. Signatures: flash-attn 2.8.
"""

from triton_attn import flash_attention, flash_attention_varlen


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`triton_attn.flash_attention`: q (batch, seqlen_q, nheads, headdim), k, v (batch, seqlen_k, nheads_k, headdim).

    Returns out, or with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (batch, nheads, seqlen_q) fp32 and
    S_dmask empty, as flash-attn leaves it without dropout. With dropout return_attn_probs raises NotImplementedError.
    """
    q, k, v = (_with_contiguous_rows(x) for x in (q, k, v))
    result = flash_attention(
        q,
        k,
        v,
        **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_lse=_wants_lse(return_attn_probs, dropout_p),
    )
    return (*result, q.new_empty(0)) if return_attn_probs else result


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with kv (batch, seqlen_k, 2, nheads_k, headdim), whose gradient comes as one tensor."""
    return flash_attn_func(
        q,
        *kv.unbind(dim=-3),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with qkv (batch, seqlen, 3, nheads, headdim), whose gradient comes as one tensor."""
    return flash_attn_func(
        *qkv.unbind(dim=-3),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """`triton_attn.flash_attention_varlen` of q (total_q, nheads, headdim) and k, v (total_k, nheads_k, headdim).

    Returns as `flash_attn_func`, softmax_lse (nheads, total_q). block_table raises NotImplementedError.
    """
    if block_table is not None:
        raise NotImplementedError("block_table: keys and values in pages are not served here, got a table")
    q, k, v = (_with_contiguous_rows(x) for x in (q, k, v))
    result = flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_k),
        **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_lse=_wants_lse(return_attn_probs, dropout_p),
    )
    return (*result, q.new_empty(0)) if return_attn_probs else result


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with kv (total_k, 2, nheads_k, headdim), whose gradient comes as one tensor."""
    return flash_attn_varlen_func(
        q,
        *kv.unbind(dim=-3),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with qkv (total, 3, nheads, headdim), whose gradient comes as one tensor."""
    return flash_attn_varlen_func(
        *qkv.unbind(dim=-3),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _with_contiguous_rows(x):
    """flash-attn copies a tensor whose last dimension is not contiguous; ours asks the caller to."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wants_lse(return_attn_probs, dropout_p):
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError("return_attn_probs: the weights are nowhere in memory, so not with dropout_p > 0")
    return bool(return_attn_probs)


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic):
    """Their options in our terms: any negative side of the window is unlimited."""
    return dict(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=bool(causal),
        window_size=tuple(max(int(side), -1) for side in window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )
