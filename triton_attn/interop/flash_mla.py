"""FlashMLA's functions for dense decode and prefill on our kernels, with the same signatures, defaults and return
values.

    from triton_attn.interop.flash_mla import flash_mla_with_kvcache, get_mla_metadata      # was: from flash_mla import

Its older signatures, in which the metadata are tensors, are supported as well. No argument is ignored: unsupported
values raise NotImplementedError. The signatures are those of FlashMLA in January 2026.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..flash import flash_attention_varlen
from ..mla import mla_decode
from .support import Support

SUPPORT = Support(
    functions=(
        "get_mla_metadata",
        "flash_mla_with_kvcache",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
    ),
    on_cpu="all, by the references or in the interpreter",
    refused={
        "topk": "a number, for sparse attention",
        "indices": "a tensor, for sparse attention",
        "attn_sink": "a tensor",
        "head_dim_v": "q's head dimension or more",
    },
)


@dataclass
class FlashMLASchedMeta:
    """The result of `get_mla_metadata`. It is empty: our kernels choose their schedule by the shapes of each call.

    One object can be used for calls of any shape and length. FlashMLA's object holds a single schedule.

    Attributes:
        tile_scheduler_metadata, num_splits: None, and not read.
    """

    tile_scheduler_metadata: None = None
    num_splits: None = None


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """(FlashMLASchedMeta, None): the two arguments of `flash_mla_with_kvcache` with these names. Both are empty.

    Arguments of older signatures (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache,
    topk) are accepted and ignored, except topk: it requests sparse attention, which raises NotImplementedError.

    Example:
        >>> from triton_attn.interop.flash_mla import get_mla_metadata
        >>> get_mla_metadata()[1] is None
        True
    """
    _refuse(topk=kwargs.get("topk", args[5] if len(args) > 5 else None))
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor | None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: None = None,
    attn_sink: None = None,
    extra_k_cache: None = None,
    extra_indices_in_kvcache: None = None,
    topk_length: None = None,
    extra_topk_length: None = None,
) -> tuple[Tensor, Tensor]:
    """`triton_attn.mla_decode` from absorbed queries to latent outputs.

        s[b, h, i, j] = softmax_scale * q[b, i, h] . k[b, j]
        out[b, i, h] = sum_j softmax_j(s[b, h, i, j]) k[b, j, :head_dim_v]
        k[b, j] = k_cache[block_table[b, j // page_block_size], j % page_block_size, h // group_size]

    over the keys j < cache_seqlens[b], and j <= cache_seqlens[b] - seqlen_q + i if causal; group_size is num_heads_q //
    num_heads_k.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), fp16, bf16 or fp32; the last dimension contiguous. DeepSeek's
            head_dim is 576 and head_dim_v 512; head_dim_v may be 1 to 512, and head_dim 1 to 512 more.
        k_cache: (num_blocks, page_block_size, num_heads_k, head_dim) of q's dtype, any page_block_size. num_heads_k
            divides num_heads_q; more than 1 costs a copy of q and of out. With is_fp8_kvcache uint8 or float8_e4m3fn
            (num_blocks, page_block_size, num_heads_k, 656), the bytes of a row: 512 e4m3 elements, 4 fp32 scales, 64
            bf16 elements, as `append_latent_cache` writes them. FlashMLA has it for sparse attention only.
        block_table: (batch, max_blocks) int32, the pages of each sequence. Entries past its last are never read.
        cache_seqlens: (batch,) int32, number of keys of each sequence, including new ones.
        head_dim_v: the first head_dim_v elements of a key are its value.
        tile_scheduler_metadata, num_splits: the results of `get_mla_metadata`, tensors as in older signatures, or None.
            The result of the call does not depend on them.
        softmax_scale: None means head_dim ** -0.5, as in FlashMLA: 576 ** -0.5, which no model uses. Elsewhere in this
            package the default is based on the width of queries and keys before absorption; see `mla_softmax_scale`.
        causal: new tokens do not see later ones.
        indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: None.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype and softmax_lse (batch, num_heads_q, seqlen_q) fp32,
        natural log. A query that sees no key has out = 0 and lse = +inf, as in FlashMLA (`mla_decode`: -inf).

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
        NotImplementedError: sparse attention, a sink, head_dim_v not below head_dim, or an argument that requires a
            gradient.

    Example:
        >>> from triton_attn.interop.flash_mla import flash_mla_with_kvcache, get_mla_metadata
        >>> q, k_cache = torch.randn(1, 1, 16, 576), torch.randn(4, 64, 1, 576)
        >>> block_table, cache_seqlens = torch.tensor([[3, 1]]).int(), torch.tensor([70]).int()
        >>> out, lse = flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *get_mla_metadata())
        >>> out.shape
        torch.Size([1, 1, 16, 512])
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
    head_dim_v = _check_queries(q, head_dim_v)
    k_cache = _check_cache(k_cache, q, head_dim_v, is_fp8_kvcache)
    num_heads_k = k_cache.shape[2]
    if num_heads_k == 1:
        latent_cache = k_cache.squeeze(2)
    else:
        _check_indices("cache_seqlens", cache_seqlens, q, 1)
        _check_indices("block_table", block_table, q, 2)
        q = q.unflatten(2, (num_heads_k, -1)).transpose(1, 2).flatten(0, 1)
        latent_cache, block_table = _one_head_pages(k_cache, block_table)
        cache_seqlens = cache_seqlens.repeat_interleave(num_heads_k, output_size=q.shape[0])
    q_nope, q_pe = q.split([head_dim_v, q.shape[3] - head_dim_v], dim=-1)
    out, lse = mla_decode(
        q_nope,
        q_pe,
        latent_cache,
        cache_seqlens,
        block_table,
        causal=bool(causal),
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        return_lse=True,
    )
    lse.masked_fill_(lse == -math.inf, math.inf)
    if num_heads_k > 1:
        out = out.unflatten(0, (-1, num_heads_k)).transpose(1, 2).flatten(2, 3)
        lse = lse.unflatten(0, (-1, num_heads_k)).flatten(1, 2)
    return out, lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`triton_attn.flash_attention_varlen` for q (total_q, num_heads_q, head_dim), k and v: MLA prefill, up-projected.

    DeepSeek's head_dim is 192 and its head_dim_v 128. All values up to 512 are supported. So are fewer KV heads than
    query heads, dropout and deterministic, which FlashMLA refuses in whole or in part.

    Args:
        is_varlen: ignored. False says that all sequences have the lengths max_seqlen_qo and max_seqlen_kv.
        The rest as in `flash_attention_varlen`.

    Returns:
        out (total_q, num_heads_q, head_dim_v) and lse (total_q, num_heads_q) fp32 with strides (1, total_q), natural
        log. Both are always returned. A query that sees no key has out = 0 and lse = -inf.

    Example:
        >>> from triton_attn.interop.flash_mla import flash_attn_varlen_func
        >>> q, k, v = torch.randn(16, 4, 192), torch.randn(16, 4, 192), torch.randn(16, 4, 128)
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 10, 10, causal=True)
        >>> out.shape
        torch.Size([16, 4, 128])
    """
    out, lse = flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        causal=bool(causal),
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        deterministic=bool(deterministic),
        return_lse=True,
    )
    return out, lse.T


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` with qkv (total, num_heads, 2 head_dim_qk + head_dim_v). Its gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_mla import flash_attn_varlen_qkvpacked_func
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> qkv = torch.randn(16, 4, 192 + 192 + 128)
        >>> out, lse = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 10, 192, causal=True)
        >>> out.shape
        torch.Size([16, 4, 128])
    """
    q, k, v = _split_packed("qkv", qkv, head_dim_qk, 2)
    options = (dropout_p, softmax_scale, causal, deterministic, is_varlen)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` with kv (total_k, num_heads_k, head_dim_qk + head_dim_v). Its gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_mla import flash_attn_varlen_kvpacked_func
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> q, kv = torch.randn(16, 4, 192), torch.randn(16, 4, 192 + 128)
        >>> out, lse = flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 10, 10, 192, causal=True)
        >>> out.shape
        torch.Size([16, 4, 128])
    """
    k, v = _split_packed("kv", kv, head_dim_qk, 1)
    lengths = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, deterministic, is_varlen)


def _split_packed(name, packed, head_dim_qk, count):
    """`count` tensors of head_dim_qk and the values, concatenated in the last dimension."""
    if not isinstance(packed, torch.Tensor):
        _fail(name, "a tensor", type(packed), TypeError)
    if packed.ndim != 3:
        _fail(name, "shape (total, num_heads, the sum of the widths)", f"shape {tuple(packed.shape)}")
    if isinstance(head_dim_qk, bool) or not isinstance(head_dim_qk, Integral):
        _fail("head_dim_qk", "an int", type(head_dim_qk), TypeError)
    head_dim_qk = int(head_dim_qk)
    head_dim_v = packed.shape[2] - count * head_dim_qk
    if head_dim_qk < 1 or head_dim_v < 1:
        _fail("head_dim_qk", f"1 or more that leave room for values in {name}'s {packed.shape[2]}", head_dim_qk)
    return packed.split([head_dim_qk] * count + [head_dim_v], dim=-1)


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: expected None, since sparse attention and sinks are not supported")


def _check_metadata(tile_scheduler_metadata, num_splits):
    """Reject a scale or a flag in the place of the metadata, which means that positional arguments are shifted."""
    if not isinstance(tile_scheduler_metadata, (FlashMLASchedMeta, torch.Tensor, type(None))):
        _fail("tile_scheduler_metadata", "what get_mla_metadata returned", type(tile_scheduler_metadata), TypeError)
    if not isinstance(num_splits, (torch.Tensor, type(None))):
        _fail("num_splits", "what get_mla_metadata returned", type(num_splits), TypeError)


def _check_queries(q, head_dim_v):
    """head_dim_v as an int."""
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
        raise NotImplementedError(f"head_dim_v: expected less than q's head dimension {head_dim}, got {head_dim_v}")
    if not 1 <= head_dim_v < head_dim:
        _fail("head_dim_v", f"1 to {head_dim - 1}, below q's head dimension", head_dim_v)
    return head_dim_v


def _check_cache(k_cache, q, head_dim_v, is_fp8_kvcache):
    """k_cache, with an fp8 cache as bytes."""
    if not isinstance(k_cache, torch.Tensor):
        _fail("k_cache", "a tensor", type(k_cache), TypeError)
    if is_fp8_kvcache and k_cache.dtype not in (torch.uint8, torch.float8_e4m3fn):
        _fail("k_cache", "uint8 or float8_e4m3fn with is_fp8_kvcache=True", k_cache.dtype, TypeError)
    if not is_fp8_kvcache and k_cache.dtype != q.dtype:
        _fail("k_cache", f"q's dtype {q.dtype} with is_fp8_kvcache=False", k_cache.dtype, TypeError)
    width = q.shape[3]
    if is_fp8_kvcache:  # per 128 bytes of e4m3 one fp32 scale, then the bf16 elements
        width = head_dim_v + head_dim_v // 128 * 4 + 2 * (width - head_dim_v)
    if k_cache.ndim != 4 or k_cache.shape[3] != width:
        _fail("k_cache", f"shape (num_blocks, page_block_size, num_heads_k, {width})", f"shape {tuple(k_cache.shape)}")
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        _fail("k_cache", f"a number of heads that divides q's {q.shape[2]}", k_cache.shape[2])
    return k_cache.view(torch.uint8) if is_fp8_kvcache else k_cache


def _check_indices(name, x, q, ndim):
    """Check an int32 tensor of q's sequences. `mla_decode` sees it only expanded to sequences with one head."""
    if not isinstance(x, torch.Tensor):
        _fail(name, "a tensor", type(x), TypeError)
    if x.dtype != torch.int32:
        _fail(name, "dtype torch.int32", x.dtype, TypeError)
    if x.ndim != ndim or x.shape[0] != q.shape[0]:
        expected = f"({q.shape[0]},)" if ndim == 1 else f"({q.shape[0]}, max_blocks)"
        _fail(name, f"shape {expected}", tuple(x.shape))
    if x.device != q.device:
        _fail(name, f"q's device {q.device}", x.device)


def _one_head_pages(k_cache, block_table):
    """A cache whose pages hold one head each (a view of k_cache), and its table (batch * num_heads_k, max_blocks).

    Page (block, head) begins at stride(0) * block + stride(2) * head. The page stride is the common divisor of both.
    """
    num_blocks, page_size, num_heads_k, width = k_cache.shape
    step = math.gcd(k_cache.stride(0), k_cache.stride(2)) or 1
    block_step, head_step = k_cache.stride(0) // step, k_cache.stride(2) // step
    num_pages = (num_blocks - 1) * block_step + (num_heads_k - 1) * head_step + 1 if num_blocks else 0
    if num_pages > 2**31:
        raise NotImplementedError(f"k_cache: expected at most 2^31 pages of one head, got strides {k_cache.stride()}")
    pages = k_cache.as_strided((num_pages, page_size, width), (step, k_cache.stride(1), k_cache.stride(3)))
    heads = torch.arange(num_heads_k, dtype=torch.int32, device=block_table.device) * head_step
    return pages, (block_table[:, None] * block_step + heads[:, None]).flatten(0, 1)


def _fail(name: str, expected: object, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    got = got.__name__ if isinstance(got, type) else got
    raise error(f"{name}: expected {expected}, got {got}")
