"""The functions of flash-attn 2 on our kernels. Names and order of arguments, defaults and return values are the same.

    from triton_attn.interop.flash_attn import flash_attn_func      # was: from flash_attn import flash_attn_func

No argument is ignored: unsupported values raise NotImplementedError. The signatures are those of flash-attn 2.8. The
three functions with separate q, k and v also have a last argument, s_aux: sinks (nheads,), as in vLLM's flash-attn 3.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cache import append_kv_cache
from ..flash import flash_attention, flash_attention_varlen
from ..paged import paged_attention
from .rope import rotate
from .support import Support

SUPPORT = Support(
    functions=(
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_with_kvcache",
    ),
    on_cpu="all, by the references or in the interpreter",
    refused={
        "dropout_p": "above 0 with a block_table",
        "cache_batch_idx": "a tensor with a block_table",
        "cache_leftpad": "a tensor with a cache that has gaps between rows",
    },
)
S_DMASK_MULTIPLE = 128  # flash-attn rounds the lengths of S_dmask up to a multiple of this


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`triton_attn.flash_attention`: q (batch, seqlen_q, nheads, headdim), k, v (batch, seqlen_k, nheads_k, headdim).

    Returns out, or with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (batch, nheads, seqlen_q) fp32;
    S_dmask is empty without dropout, as in flash-attn. With dropout it is for tests: (batch, nheads, seqlen_q,
    seqlen_k) in q's dtype, both lengths rounded up to a multiple of 128, with the normalized softmax before dropout.
    An entry is below 0 where the weight is dropped, and 0 or more where it is kept or masked. torch computes it,
    separately from the kernel.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_func
        >>> q, k, v = torch.randn(3, 1, 16, 2, 64)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([1, 16, 2, 64])
    """
    q, k, v = [_with_contiguous_rows(x) for x in (q, k, v)]
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux)
    seed = _dropout_seed(q, dropout_p) if return_attn_probs else None
    dropout: dict[str, Any] = dict(dropout_p=dropout_p, dropout_seed=seed, deterministic=bool(deterministic))
    if not return_attn_probs:
        return flash_attention(q, k, v, **options, **dropout)
    out, lse = flash_attention(q, k, v, **options, **dropout, return_lse=True)
    sizes = (q.shape[2], q.shape[1], k.shape[1])
    return out, lse, _signed_weights(q, list(zip(q, k)), *sizes, dropout_p, seed, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with kv (batch, seqlen_k, 2, nheads_k, headdim), whose gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_kvpacked_func
        >>> q, kv = torch.randn(1, 16, 8, 64), torch.randn(1, 16, 2, 2, 64)
        >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
        torch.Size([1, 16, 8, 64])
    """
    k, v = kv.unbind(dim=-3)
    return flash_attn_func(
        q,
        k,
        v,
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
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with qkv (batch, seqlen, 3, nheads, headdim), whose gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(1, 16, 3, 2, 64), causal=True).shape
        torch.Size([1, 16, 2, 64])
    """
    q, k, v = qkv.unbind(dim=-3)
    return flash_attn_func(
        q,
        k,
        v,
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`triton_attn.flash_attention_varlen` of q (total_q, nheads, headdim) and k, v (total_k, nheads_k, headdim).

    With block_table, (batch, max_blocks) int32, `triton_attn.paged_attention` of q and the pages k, v (num_blocks,
    page_block_size, nheads_k, headdim), any page_block_size: sequence i has the first cu_seqlens_k[i + 1] -
    cu_seqlens_k[i] keys of its pages. Gradients and dropout then raise NotImplementedError.

    Returns as `flash_attn_func`: softmax_lse (nheads, total_q), S_dmask (batch, nheads, max_seqlen_q, max_seqlen_k)
    with dropout, both lengths rounded up to 128.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_varlen_func
        >>> q, k, v = torch.randn(3, 16, 2, 64)  # two sequences, of 6 and 10 tokens
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 10, 10, causal=True).shape
        torch.Size([16, 2, 64])
    """
    q, k, v = [_with_contiguous_rows(x) for x in (q, k, v)]
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux)
    if block_table is not None:
        if dropout_p != 0:
            raise NotImplementedError(f"dropout_p: expected 0 with a block_table, got {dropout_p}")
        tensors = q, k, v, _lengths("cu_seqlens_k", cu_seqlens_k), _with_contiguous_rows(block_table)
        options |= dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q)
        if not return_attn_probs:
            return paged_attention(*tensors, **options)
        return *paged_attention(*tensors, **options, return_lse=True), q.new_empty(0)
    seed = _dropout_seed(q, dropout_p) if return_attn_probs else None
    dropout: dict[str, Any] = dict(dropout_p=dropout_p, dropout_seed=seed, deterministic=bool(deterministic))
    call = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if not return_attn_probs:
        return flash_attention_varlen(*call, **options, **dropout)
    out, lse = flash_attention_varlen(*call, **options, **dropout, return_lse=True)
    sequences = []
    if seed is not None:
        bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), cu_seqlens_k.tolist(), cu_seqlens_k[1:].tolist())
        sequences = [(q[start_q:end_q], k[start_k:end_k]) for start_q, end_q, start_k, end_k in bounds]
    sizes = (q.shape[1], int(max_seqlen_q), int(max_seqlen_k))
    return out, lse, _signed_weights(q, sequences, *sizes, dropout_p, seed, options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with kv (total_k, 2, nheads_k, headdim), whose gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_varlen_kvpacked_func
        >>> q, kv = torch.randn(16, 8, 64), torch.randn(16, 2, 2, 64)
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 10, 10).shape
        torch.Size([16, 8, 64])
    """
    k, v = kv.unbind(dim=-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
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
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` with qkv (total, 3, nheads, headdim), whose gradient is one tensor.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_varlen_qkvpacked_func
        >>> cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(16, 3, 2, 64), cu_seqlens, 10).shape
        torch.Size([16, 2, 64])
    """
    q, k, v = qkv.unbind(dim=-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
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


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`triton_attn.append_kv_cache` of new keys, in place, then `triton_attn.paged_attention` over all keys.

    There is no device-to-host sync. Positions count from the first slot of a sequence's cache, even if cache_leftpad
    hides it.

    Args:
        q: (batch, seqlen_q, nheads, headdim), the last queries of each sequence: query i is at position
            seqlen_k - seqlen_q + i among the seqlen_k keys, which include the new ones.
        k_cache, v_cache: (num_blocks, page_block_size, nheads_k, headdim) with a block_table, any page_block_size;
            otherwise (batch_cache, seqlen_cache, nheads_k, headdim), whose row i belongs to row i of q.
        k, v: (batch, seqlen_new, nheads_k, headdim) or None, written to positions cache_seqlens + i. Keys beyond the
            capacity are not written.
        rotary_cos, rotary_sin: (num_positions, rotary_dim / 2), fp32 or q's dtype; needs k. Key i is rotated by the
            angles of row cache_seqlens + i. So is query i if causal or windowed; otherwise all queries are rotated by
            row cache_seqlens.
        cache_seqlens: (batch,) int32, or an int for all: keys in the cache before k. None, allowed without k, means
            that the cache is full.
        cache_batch_idx: (batch,) int32, the cache row of each row of q; distinct if k is given.
        cache_leftpad: (batch,) int32, the first key of each sequence. It costs a table with an entry per key.
        block_table: (batch, max_blocks) int32, the pages of each sequence.
        rotary_interleaved: dimensions (2 i, 2 i + 1) are rotated together; False: (i, i + rotary_dim / 2).
        softmax_scale, causal, window_size, softcap, alibi_slopes, num_splits: as in `paged_attention`.
        s_aux: its sinks.

    Returns:
        out (batch, seqlen_q, nheads, headdim), or with return_softmax_lse (out, softmax_lse): (batch, nheads, seqlen_q)
        fp32, -inf where a query sees no key (flash-attn: inf).

    Raises:
        TypeError, ValueError: an argument is wrong. If `paged_attention` reports it, k and v have been written; the
            call may be repeated.
        NotImplementedError: cache_batch_idx is given with block_table, as in flash-attn; cache_leftpad with a cache
            that has gaps between rows; or an argument requires a gradient.

    Example:
        >>> from triton_attn.interop.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.randn(2, 1, 128, 2, 64)  # 40 keys are there
        >>> q, k, v = torch.randn(1, 1, 8, 64), torch.ones(1, 1, 2, 64), torch.ones(1, 1, 2, 64)
        >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=40)
        >>> out.shape, k_cache[0, 40].sum().item()  # the new key is in its place
        (torch.Size([1, 1, 8, 64]), 128.0)
    """
    batch, seqlen_q = q.shape[:2]
    cache_seqlens, table = _check_cache(q, k_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise ValueError("rotary_cos, rotary_sin: expected both together with k, or neither")
    window_size = _window(window_size)

    if k is not None and v is not None:
        positions = cache_seqlens[:, None] + torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
        rotary: dict[str, Any] = {}
        if rotary_cos is not None and rotary_sin is not None:
            rotary = dict(rope_cos=rotary_cos, rope_sin=rotary_sin, rope_interleaved=bool(rotary_interleaved))
            rotary["positions"] = positions.flatten()
        k, v = (_with_contiguous_rows(x).flatten(0, 1) for x in (k, v))
        append_kv_cache(k, v, k_cache, v_cache, _slots(table, positions, k_cache).flatten(), **rotary)
        if rotary_cos is not None and rotary_sin is not None:
            rows = cache_seqlens[:, None]
            if causal or window_size != (-1, -1):
                rows = rows + torch.arange(seqlen_q, device=q.device)
            rows = rows.clamp(max=rotary_cos.shape[0] - 1)  # for queries beyond the table of angles
            q = rotate(q, rotary_cos[rows], rotary_sin[rows], rotary_interleaved)
        cache_seqlens = cache_seqlens + positions.shape[1]

    if cache_leftpad is not None:
        # In a table of pages with one key each, a sequence can begin anywhere.
        capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
        positions = cache_leftpad[:, None] + torch.arange(capacity, dtype=torch.int32, device=q.device)
        table = _slots(table, positions, k_cache).int()
        cache_seqlens = (cache_seqlens.clamp(max=capacity) - cache_leftpad).clamp(min=0)
        k_cache, v_cache = _one_key_pages(k_cache), _one_key_pages(v_cache)
    elif table is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    return paged_attention(
        _with_contiguous_rows(q),
        k_cache,
        v_cache,
        cache_seqlens,
        table,
        causal=bool(causal),
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=_sinks(s_aux),
        num_splits=max(num_splits, 0),
        return_lse=bool(return_softmax_lse),
    )


def _check_cache(q, k_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table):
    """Check the arguments that are used before `paged_attention` checks them. Returns (cache_seqlens, table of pages or
    None).

    A contiguous cache is a paged one with pages as long as its rows.
    """
    batch = q.shape[0]
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.ndim != 4 or x.shape[:2] != (batch, k.shape[1])):
            raise ValueError(f"{name}: expected shape ({batch}, seqlen_new, nheads_k, headdim), got {tuple(x.shape)}")
    if block_table is not None and cache_batch_idx is not None:
        raise NotImplementedError("cache_batch_idx: expected None with a block_table, which names the pages")
    if k_cache.ndim != 4 or k_cache.shape[1] == 0:
        raise ValueError(f"k_cache: expected 4 dimensions and room for keys, got shape {tuple(k_cache.shape)}")
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: expected at least {batch} rows, as q has, got {k_cache.shape[0]}")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[-1])
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: expected the number of keys before k, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, Integral):
        cache_seqlens = torch.full((batch,), int(cache_seqlens), dtype=torch.int32, device=q.device)
    indices = dict(cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    for name, x in (*indices.items(), ("block_table", block_table)):
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected an int32 tensor, got {got}")
        shape = (batch, x.shape[-1]) if name == "block_table" else (batch,)
        if x.shape != shape or x.device != q.device:
            raise ValueError(f"{name}: expected shape {shape} on {q.device}, got {tuple(x.shape)} on {x.device}")
    if cache_batch_idx is not None:
        return cache_seqlens, cache_batch_idx[:, None]
    return cache_seqlens, None if block_table is None else _with_contiguous_rows(block_table)


def _slots(table, positions, cache):
    """Slot of each position (batch, n) in the cache, int64; -1 for a position that the sequence does not have."""
    page_size = cache.shape[1]
    num_pages = 1 if table is None else table.shape[1]
    columns = positions // page_size
    if table is None:
        pages = torch.arange(positions.shape[0], device=positions.device)[:, None]
    else:
        pages = table.gather(1, columns.clamp(0, num_pages - 1).long()).long()
    slots = pages * page_size + positions % page_size
    return torch.where((columns >= 0) & (columns < num_pages), slots, -1)


def _one_key_pages(cache):
    """The cache as pages (num_slots, 1, nheads_k, headdim), without a copy."""
    try:
        return cache.view(-1, 1, *cache.shape[2:])
    except RuntimeError:
        strides = f"strides {cache.stride()} for shape {tuple(cache.shape)}"
        raise NotImplementedError(f"cache_leftpad: expected a cache without gaps between rows, got {strides}") from None


def _with_contiguous_rows(x):
    """Make the last dimension contiguous: flash-attn copies such a tensor, and our functions reject it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _lengths(name, cu_seqlens):
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
        raise TypeError(f"{name}: expected an int32 tensor (batch + 1,), got {got}")
    return cu_seqlens.diff()


def _dropout_seed(q, dropout_p):
    """A seed drawn in the same way as in `flash_attention`, so that S_dmask does not change the result."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0 else None


@torch.no_grad()
def _signed_weights(q, sequences, num_heads, max_seqlen_q, max_seqlen_k, dropout_p, seed, options):
    """S_dmask of sequences with separate queries and keys. A dropped weight of 0 becomes the largest number below 0.

    Attention over one-hot values gives the softmax. With scores of 0 its result is above 0 exactly where a key is
    visible.
    """
    if seed is None:
        return q.new_empty(0)
    keep = reference.dropout_mask(seed, dropout_p, len(sequences), num_heads, max_seqlen_q, max_seqlen_k).to(q.device)
    rounded = (-(-size // S_DMASK_MULTIPLE) * S_DMASK_MULTIPLE for size in (max_seqlen_q, max_seqlen_k))
    s_dmask = q.new_zeros(len(sequences), num_heads, *rounded)
    slopes = options["alibi_slopes"]
    for i, (queries, keys) in enumerate(sequences):
        seqlen_q, seqlen_k = len(queries), len(keys)
        one_hot = torch.eye(seqlen_k, dtype=q.dtype, device=q.device)[:, None].expand(-1, keys.shape[1], -1)
        own = options | {"alibi_slopes": slopes[i] if slopes is not None and slopes.ndim == 2 else slopes}
        weights = reference.flash_attention(queries[None], keys[None], one_hot[None], **own)[0].transpose(0, 1)
        zeros = torch.zeros_like(queries[None]), torch.zeros_like(keys[None])
        mask = {name: options[name] for name in ("causal", "window_size")}
        visible = reference.flash_attention(*zeros, one_hot[None], **mask)[0].transpose(0, 1) > 0
        dropped = -weights.clamp(min=torch.finfo(q.dtype).tiny)
        signed = torch.where(keep[i, :, :seqlen_q, :seqlen_k], weights, dropped)
        s_dmask[i, :, :seqlen_q, :seqlen_k] = signed.where(visible, 0)
    return s_dmask


def _options(softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux) -> dict[str, Any]:
    """flash-attn's options in the form of our functions."""
    return dict(
        softmax_scale=softmax_scale,
        causal=bool(causal),
        window_size=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=_sinks(s_aux),
    )


def _sinks(s_aux):
    return None if s_aux is None else s_aux.float()


def _window(window_size) -> Any:
    """Any negative side is unlimited."""
    return tuple([max(side, -1) for side in window_size])
