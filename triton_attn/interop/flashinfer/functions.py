"""FlashInfer's functions for one sequence, and for merging attention over parts of the keys."""

import torch
from torch import Tensor

from ...flash import flash_attention
from ...merge import merge_attention
from ...paged import paged_attention
from .arguments import (
    LOG2_E,
    as_nhd,
    attention_options,
    base_2,
    check_ndim,
    refuse,
    refuse_custom_masks,
    scales_of,
    softmax_scale_of,
)


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One query (num_qo_heads, head_dim) over a contiguous cache k, v (kv_len, num_kv_heads, head_dim), or "HND".

    Options as those of `BatchDecodeWithPagedKVCacheWrapper`; k and v of q's dtype or fp8. Returns out, q's shape, and
    with return_lse lse (num_qo_heads,) fp32, base 2.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> q, k, v = torch.randn(8, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
        >>> flashinfer.single_decode_with_kv_cache(q, k, v).shape
        torch.Size([8, 64])
    """
    check_ndim("q", q, 2)
    options = attention_options(pos_encoding_mode, window_left, logits_soft_cap, True, q.shape[0], q.device)
    scales = q_scale, k_scale, v_scale
    result = _attend_to_one(q[None], k, v, kv_layout, scales, sm_scale, options, return_lse)
    return (result[0][0], result[1][0]) if return_lse else result[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: None = None,
    scale_k: None = None,
    scale_v: None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: None = None,
    packed_custom_mask: None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Queries (qo_len, num_qo_heads, head_dim_qk) over k, v (kv_len, num_kv_heads, head_dim), or "HND".

    Options as those of `BatchPrefillWithPagedKVCacheWrapper`; k and v of q's dtype or fp8, o_dtype q's. scale_q,
    scale_k and scale_v, which belong to fp8 queries, are None.

    Returns out (qo_len, num_qo_heads, head_dim_vo), and with return_lse lse (qo_len, num_qo_heads) fp32, base 2; 0 and
    -inf where a query sees no key.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> q, k, v = torch.randn(10, 8, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
        >>> flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True).shape
        torch.Size([10, 8, 64])
    """
    check_ndim("q", q, 3)
    refuse_custom_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
    refuse(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, kv_cache_sf=kv_cache_sf)
    refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None, o_dtype=None if o_dtype == q.dtype else o_dtype)
    options = attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, q.shape[1], q.device)
    if k.dtype.itemsize > 1 and k_scale is None and v_scale is None:
        k, v = as_nhd("k", k, kv_layout), as_nhd("v", v, kv_layout)
        scale = softmax_scale_of(sm_scale, q.shape[2])
        result = flash_attention(q[None], k[None], v[None], softmax_scale=scale, **options, return_lse=return_lse)
        return (result[0][0], base_2(result[1][0].T, None)) if return_lse else result[0]
    return _attend_to_one(q, k, v, kv_layout, (None, k_scale, v_scale), sm_scale, options, return_lse)


def _attend_to_one(q, k, v, kv_layout, scales, sm_scale, options, return_lse):
    """`paged_attention` of queries (seqlen_q, heads, dim) of one sequence over its contiguous cache."""
    k, v = as_nhd("k", k, kv_layout), as_nhd("v", v, kv_layout)
    seqlens = torch.full((1,), k.shape[0], dtype=torch.int32, device=q.device)
    options = dict(options, softmax_scale=softmax_scale_of(sm_scale, q.shape[2]))
    options |= scales_of(options["softmax_scale"], *scales)
    result = paged_attention(q[None], k[None], v[None], seqlens, **options, return_lse=return_lse)
    return (result[0][0], base_2(result[1][0].T, None)) if return_lse else result[0]


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two parts of the keys, by `triton_attn.merge_attention`.

    Args:
        v_a, v_b: (tokens, num_heads, head_dim), attention over a part.
        s_a, s_b: (tokens, num_heads) fp32, its log-sum-exp, base 2; -inf where a query sees no key of the part.

    Returns: v and s over both parts, of these shapes.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> v, s = torch.randn(2, 10, 8, 64), torch.randn(2, 10, 8)  # outputs and lse of two parts of the keys
        >>> out, lse = flashinfer.merge_state(v[0], s[0], v[1], s[1])
        >>> out.shape, lse.shape
        (torch.Size([10, 8, 64]), torch.Size([10, 8]))
    """
    return merge_states(torch.stack((v_a, v_b), dim=1), torch.stack((s_a, s_b), dim=1))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of any number of parts: v (tokens, num_parts, num_heads, head_dim), s (tokens, num_parts,
    num_heads).

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> v, s = torch.randn(10, 3, 8, 64), torch.randn(10, 3, 8)  # outputs and lse of three parts of the keys
        >>> out, lse = flashinfer.merge_states(v, s)
        >>> out.shape
        torch.Size([10, 8, 64])
    """
    check_ndim("v", v, 4)
    check_ndim("s", s, 3)
    natural = (s.float() / LOG2_E).permute(1, 2, 0)
    out, lse = merge_attention(v.transpose(0, 1)[:, None], natural[:, None])
    return out[0], base_2(lse[0].T, None)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """`merge_state` into v and s, of the tokens where mask (tokens,) is True; None is all.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> v, s, v_other, s_other = torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.ones(1, 2, 4), torch.zeros(1, 2)
        >>> flashinfer.merge_state_in_place(v, s, v_other, s_other)
        >>> v.mean().item()  # both have the same weight
        0.5
    """
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    if mask is not None:
        merged_v = torch.where(mask[:, None, None].bool(), merged_v, v)
        merged_s = torch.where(mask[:, None].bool(), merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)
