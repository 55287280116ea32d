"""FlashMLA's functions of dense decode on our kernels: the same signatures, defaults and return values.

    from triton_attn.interop.flash_mla import flash_mla_with_kvcache, get_mla_metadata      # was: from flash_mla import

Calls written for its older signatures, where the metadata are tensors, are served as well. Nothing is ignored: what is
not served raises NotImplementedError. Signatures: FlashMLA of January 2026.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch

from triton_attn import mla_decode


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns: nothing. Our kernels are scheduled by the shapes of each call.

    One object serves any calls, whatever their shapes and lengths; FlashMLA's serves those of one shape and length.

    Attributes:
        tile_scheduler_metadata, num_splits: None, and not read.
    """

    tile_scheduler_metadata: None = None
    num_splits: None = None


def get_mla_metadata(*args, **kwargs):
    """(FlashMLASchedMeta, None): the two arguments of `flash_mla_with_kvcache` of these names. Both say nothing.

    Arguments of older signatures (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache,
    topk) are taken and not read, but for topk: it announces sparse attention, which raises NotImplementedError.
    """
    _refuse(topk=kwargs.get("topk", args[5] if len(args) > 5 else None))
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
):
    """`triton_attn.mla_decode` of queries that are absorbed already; latent vectors come out.

        s[b, h, i, j] = softmax_scale * q[b, i, h] . k[b, j]
        out[b, i, h] = sum_j softmax_j(s[b, h, i, j]) k[b, j, :head_dim_v]
        k[b, j] = k_cache[block_table[b, j // page_block_size], j % page_block_size, 0]

    over the keys j < cache_seqlens[b], and j <= cache_seqlens[b] - seqlen_q + i if causal.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), fp16, bf16 or fp32; the last dimension contiguous. DeepSeek's
            head_dim is 576, its head_dim_v 512; others are served, 1 to 512 the one and 1 to 512 more the other.
        k_cache: (num_blocks, page_block_size, 1, head_dim) of q's dtype, any page_block_size. With is_fp8_kvcache uint8
            or float8_e4m3fn (num_blocks, page_block_size, 1, 656), the bytes of a row: 512 e4m3 numbers, 4 fp32 scales,
            64 bf16 numbers; what `append_latent_cache` writes. FlashMLA has it for sparse attention only.
        block_table: (batch, max_blocks) int32, the pages of each sequence. Entries past its last are never read.
        cache_seqlens: (batch,) int32, keys of each sequence, new ones included.
        head_dim_v: elements of a key that are its value, the first ones.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned, tensors as in older signatures, or None.
            The result does not depend on them.
        softmax_scale: None is head_dim ** -0.5, as in FlashMLA: 576 ** -0.5, which is no model's scale. Everywhere else
            in this package it is the width of queries and keys before absorption; see `mla_softmax_scale`.
        causal: new tokens do not see later ones.
        indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: None.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype and softmax_lse (batch, num_heads_q, seqlen_q) fp32,
        natural log. A query that sees no key has out = 0 and lse = +inf, as in FlashMLA (`mla_decode`: -inf).

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
        NotImplementedError: sparse attention or a sink, more than one KV head, keys without a part that is no value; an
            argument requires a gradient.
    """
    _refuse(
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    _check_metadata(tile_scheduler_metadata, num_splits)
    q_nope, q_pe = _split_queries(q, head_dim_v)
    out, lse = mla_decode(
        q_nope,
        q_pe,
        _latent_cache(k_cache, q, q_nope.shape[3], is_fp8_kvcache),
        cache_seqlens,
        block_table,
        causal=bool(causal),
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        return_lse=True,
    )
    return out, lse.masked_fill_(lse == -math.inf, math.inf)


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: dense attention over the pages of block_table is served, without sinks")


def _check_metadata(tile_scheduler_metadata, num_splits):
    """A scale or a flag in their place is a call whose positions are wrong."""
    if not isinstance(tile_scheduler_metadata, (FlashMLASchedMeta, torch.Tensor, type(None))):
        _fail("tile_scheduler_metadata", "what get_mla_metadata returned", type(tile_scheduler_metadata), TypeError)
    if not isinstance(num_splits, (torch.Tensor, type(None))):
        _fail("num_splits", "what get_mla_metadata returned", type(num_splits), TypeError)


def _split_queries(q, head_dim_v):
    """Views of the parts of q that meet the values and that do not."""
    if not isinstance(q, torch.Tensor):
        _fail("q", "a tensor", type(q), TypeError)
    if q.ndim != 4:
        _fail("q", "shape (batch, seqlen_q, num_heads_q, head_dim)", f"shape {tuple(q.shape)}")
    if q.stride(-1) != 1:
        _fail("q", "a contiguous last dimension (stride 1)", f"stride {q.stride(-1)}")
    if isinstance(head_dim_v, bool) or not isinstance(head_dim_v, Integral):
        _fail("head_dim_v", "an int", type(head_dim_v), TypeError)
    head_dim_v = int(head_dim_v)
    head_dim = q.shape[3]
    if head_dim_v == head_dim:
        raise NotImplementedError(f"head_dim_v: fewer than q's head dimension {head_dim} are served, got {head_dim_v}")
    if not 1 <= head_dim_v < head_dim:
        _fail("head_dim_v", f"1 to {head_dim - 1}, below q's head dimension", head_dim_v)
    return q.split([head_dim_v, head_dim - head_dim_v], dim=-1)


def _latent_cache(k_cache, q, head_dim_v, is_fp8_kvcache):
    """k_cache without the dimension of its one head, an fp8 cache as bytes."""
    if not isinstance(k_cache, torch.Tensor):
        _fail("k_cache", "a tensor", type(k_cache), TypeError)
    if is_fp8_kvcache and k_cache.dtype not in (torch.uint8, torch.float8_e4m3fn):
        _fail("k_cache", "uint8 or float8_e4m3fn with is_fp8_kvcache=True", k_cache.dtype, TypeError)
    if not is_fp8_kvcache and k_cache.dtype != q.dtype:
        _fail("k_cache", f"q's dtype {q.dtype} with is_fp8_kvcache=False", k_cache.dtype, TypeError)
    width = q.shape[3]
    if is_fp8_kvcache:  # an fp32 scale for every 128 numbers of one byte, then bf16 numbers
        width = head_dim_v + head_dim_v // 128 * 4 + 2 * (width - head_dim_v)
    if k_cache.ndim != 4 or k_cache.shape[3] != width:
        _fail("k_cache", f"shape (num_blocks, page_block_size, 1, {width})", f"shape {tuple(k_cache.shape)}")
    if k_cache.shape[2] != 1:
        raise NotImplementedError(f"k_cache: one KV head for all query heads is served, got {k_cache.shape[2]}")
    latent_cache = k_cache.squeeze(2)
    return latent_cache.view(torch.uint8) if is_fp8_kvcache else latent_cache


def _fail(name, expected, got, error=ValueError):
    got = got.__name__ if isinstance(got, type) else got
    raise error(f"{name}: expected {expected}, got {got}")
