"""Reading a paged cache back: keys and values, or latents, of a batch as packed tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    QUANTIZED_BITS,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_factor,
    check_kv_scale,
    check_last_contiguous,
    check_latent_scales,
    check_length,
    check_packed_pages,
    check_rows_aligned,
    check_tensor,
    fail,
)
from .._host.known import Known
from .._host.latent import latent_storage
from .._host.layout import slots_of_packed
from .._host.observers import is_observed, number_and_tensor, refuse_gradients, refuse_vmap
from . import reference


def gather_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    num_tokens: int | None = None,
    *,
    seq_starts: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The cached keys and values of a batch, packed: what `append_kv_cache` wrote, for `flash_attention_varlen`.

        k[cu_seqlens_k[b] + i, h] = k_cache[page, offset, h] * k_scale[h]
        page, offset = block_table[b, p // page_size], p % page_size,  p = seq_starts[b] + i

    computed in fp32 and rounded once; v likewise. Rows from cu_seqlens_k[-1] on, and those whose page is not in the
    table or the cache, are 0. One launch, which reads each cached byte of a token and writes each of its result once;
    what the cache holds elsewhere is not read.

    Args:
        k_cache: (num_pages, page_size, num_heads_kv, head_dim), fp16, bf16, fp32, float8_e4m3fn, float8_e5m2 or int8;
            the last dimension contiguous. Or vLLM's packed cache, as in `paged_attention`: (num_pages, num_heads_kv,
            head_dim / x, page_size, x), x = 16 bytes.
        v_cache: (num_pages, page_size, num_heads_kv, head_dim_v), k_cache's dtype. Beside a packed k_cache (num_pages,
            num_heads_kv, head_dim_v, page_size).
        block_table: (batch, max_pages) int32.
        cu_seqlens_k: (batch + 1,) int32: tokens of sequence b are the rows from cu_seqlens_k[b] to cu_seqlens_k[b + 1].
        num_tokens: rows of the result, at least cu_seqlens_k[-1]. None is the rows of out; without out it reads
            cu_seqlens_k[-1], with a device-to-host sync.
        seq_starts: (batch,) int32, the first token that is read of each sequence, for chunks of a context. None is 0.
        k_scale, v_scale: factors of cached elements, as in `paged_attention`.
        dtype: of the result: float16, bfloat16 or float32. None is that of out, or the cache's, of fp8 and int8 caches
            bfloat16.
        out: tensors for the result, such as slices of a workspace; the last dimension contiguous.
        check_values: check lengths and pages, which costs a device-to-host sync. None follows TRITON_ATTN_CHECK=1.

    Returns:
        k (num_tokens, num_heads_kv, head_dim) and v (num_tokens, num_heads_kv, head_dim_v).

    Raises:
        TypeError, ValueError: an argument is wrong. With values checked also: a length, start or page that is not in
            the table or the cache.
        NotImplementedError: an argument requires a gradient or has a tangent.

    It is one operator under torch.compile, export and vmap, which loops; with out vmap is not supported. With
    num_tokens or out it can be captured in a CUDA graph.

    Example:
        >>> k_cache = v_cache = torch.randn(8, 16, 2, 64).to(torch.float8_e4m3fn)
        >>> block_table = torch.tensor([[5, 0], [2, 7]], dtype=torch.int32)
        >>> cu_seqlens_k = torch.tensor([0, 9, 39], dtype=torch.int32)
        >>> k, v = triton_attn.gather_kv_cache(k_cache, v_cache, block_table, cu_seqlens_k, 39, k_scale=0.5)
        >>> k.dtype, torch.equal(k[25:], k_cache[7, :14].bfloat16() * 0.5)
        (torch.bfloat16, True)
    """
    outs = out if isinstance(out, (tuple, list)) else (out,)
    given = k_cache, v_cache, cu_seqlens_k, block_table, seq_starts, k_scale, v_scale, dtype, out is None, *outs
    key, known = _kv_plans.find_launch(given, k_cache, check_values)
    if known is not None and known[0].is_for(k_cache):
        scales = check_factor("k_scale", k_scale), check_factor("v_scale", v_scale)
        places = cu_seqlens_k, block_table, seq_starts
        return _gather_known(known, (k_cache, v_cache), places, scales, num_tokens, dtype, out)
    k_cache, v_cache = _check_caches(k_cache, v_cache)
    k_number, k_scale = number_and_tensor(check_kv_scale("k_scale", k_scale, k_cache))
    v_number, v_scale = number_and_tensor(check_kv_scale("v_scale", v_scale, v_cache))
    places = _check_places(k_cache, block_table, cu_seqlens_k, seq_starts)
    num_tokens, dtype = _check_result(out, dtype, num_tokens, _rows_of(k_cache, v_cache), k_cache, cu_seqlens_k)
    tensors = k_cache, v_cache, *places, k_scale, v_scale
    more = k_number, v_number, num_tokens, dtype, should_check_values(check_values)
    if not is_observed(*tensors, *(out or ())):
        arguments: tuple[Any, ...] = (*tensors, *more)
        result, plan = _gather_kv_cache(*arguments, out=out)
        _kv_plans.keep_plan(key, plan)
        return result
    names = "k_cache", "v_cache", *PLACES, "k_scale", "v_scale"
    return _observed(_gather_kv_cache_operator, names, tensors, more, out)


def gather_latent_cache(
    latent_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    num_tokens: int | None = None,
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    seq_starts: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    k_pe_scale: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The cached latents and rotary keys of a batch, packed: what `append_latent_cache` wrote, for `mla_prefill`.

        [kv_latent[cu_seqlens_k[b] + i], k_pe[cu_seqlens_k[b] + i]] = latent_cache[page, offset]

    times the row's scales in the fp8 layout of 656 bytes, or k_scale and k_pe_scale; computed in fp32 and rounded once.
    Pages, offsets and rows without a token are as in `gather_kv_cache`.

    Args:
        latent_cache: (num_pages, page_size, width), as `append_latent_cache` writes it: fp16, bf16, fp32, fp8, or uint8
            rows with scales of their own.
        block_table, cu_seqlens_k, num_tokens, seq_starts, out, check_values: as in `gather_kv_cache`.
        kv_lora_rank, qk_rope_head_dim: elements of a latent vector and of a rotary key.
        k_scale, k_pe_scale: as in `append_latent_cache`. A uint8 cache takes none.
        dtype: as in `gather_kv_cache`; of an fp8 or uint8 cache None is bfloat16.

    Returns:
        kv_latent (num_tokens, kv_lora_rank) and k_pe (num_tokens, qk_rope_head_dim).

    Raises:
        TypeError, ValueError, NotImplementedError: as `gather_kv_cache`.

    Example:
        >>> latent_cache = torch.ones(8, 16, 512 + 64)
        >>> block_table, cu_seqlens_k = torch.tensor([[5, 0], [2, 7]]).int(), torch.tensor([0, 9, 39]).int()
        >>> sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64)
        >>> [x.shape for x in triton_attn.gather_latent_cache(latent_cache, block_table, cu_seqlens_k, 39, **sizes)]
        [torch.Size([39, 512]), torch.Size([39, 64])]
    """
    sizes = check_length("kv_lora_rank", kv_lora_rank), check_length("qk_rope_head_dim", qk_rope_head_dim)
    outs = out if isinstance(out, (tuple, list)) else (out,)
    given = latent_cache, cu_seqlens_k, block_table, seq_starts, k_scale, k_pe_scale, *sizes, dtype, out is None, *outs
    key, known = _latent_plans.find_launch(given, latent_cache, check_values)
    if known is not None and known[0].is_for(latent_cache):
        k_scale, k_pe_scale = check_factor("k_scale", k_scale), check_factor("k_pe_scale", k_pe_scale)
        if latent_cache.dtype == torch.uint8:
            check_rows_aligned("latent_cache", latent_cache)
        places, scales = (
            (cu_seqlens_k, block_table, seq_starts),
            (k_scale, k_scale if k_pe_scale is None else k_pe_scale),
        )
        return _gather_known(known, (latent_cache, latent_cache), places, scales, num_tokens, dtype, out)
    dtypes = (*KERNEL_DTYPES, *FLOAT8_MANTISSA_BITS, torch.uint8)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", "width"), dtypes, None)
    _, width = latent_storage(*sizes, torch.float8_e4m3fn if latent_cache.dtype == torch.uint8 else torch.float32)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", width), dtypes, None)
    check_last_contiguous("latent_cache", latent_cache)
    scales = map(number_and_tensor, check_latent_scales(latent_cache, k_scale, k_pe_scale))
    (k_number, k_scale), (k_pe_number, k_pe_scale) = scales
    places = _check_places(latent_cache, block_table, cu_seqlens_k, seq_starts)
    rows = (sizes[0],), (sizes[1],)
    num_tokens, dtype = _check_result(out, dtype, num_tokens, rows, latent_cache, cu_seqlens_k)
    tensors = latent_cache, *places, k_scale, k_pe_scale
    more = k_number, k_pe_number, *sizes, num_tokens, dtype, should_check_values(check_values)
    if not is_observed(*tensors, *(out or ())):
        arguments: tuple[Any, ...] = (*tensors, *more)
        result, plan = _gather_latent_cache(*arguments, out=out)
        _latent_plans.keep_plan(key, plan)
        return result
    names = "latent_cache", *PLACES, "k_scale", "k_pe_scale"
    return _observed(_gather_latent_cache_operator, names, tensors, more, out)


_kv_plans, _latent_plans = Known(), Known()
PACK_BYTES = 16  # of a key that lie side by side in a packed cache
PLACES = "cu_seqlens_k", "block_table", "seq_starts"


def _gather_known(known, caches, places, scales, num_tokens, dtype, out) -> tuple[Tensor, Tensor]:
    """The result of a known call, of which only num_tokens may be new."""
    (plan, alike), cache, (cu_seqlens_k, *_) = known, caches[0], places
    if out is None or num_tokens is not None:
        num_tokens, dtype = _check_result(out, dtype, num_tokens, plan.rows, cache, cu_seqlens_k)
    out = _new_result(cache, num_tokens, plan.rows, dtype) if out is None else out
    plan.launch(caches, places, scales, out, alike)
    return out[0], out[1]


def _observed(operator, names, tensors, more, out) -> tuple[Tensor, Tensor]:
    """The result of an operator, in out if it is given."""
    outs = {} if out is None else {f"out[{i}]": x for i, x in enumerate(out)}
    named = dict(zip(names, tensors)) | outs
    refuse_gradients(**named)
    if out is not None:
        refuse_vmap(**{name: x for name, x in named.items() if x is not None})
    first, second = operator(*tensors, *more)
    return (first, second) if out is None else (out[0].copy_(first), out[1].copy_(second))


def _gather_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
    seq_starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_number: float | None,
    v_number: float | None,
    num_tokens: int,
    dtype: torch.dtype,
    check_values: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], Any]:
    """(result, plan of the launch; None of the reference) of `gather_kv_cache` with checked arguments.

    A packed cache is given as views with the order of dimensions of others.
    """
    places = cu_seqlens_k, block_table, seq_starts
    if check_values:
        _check_values(k_cache, places, num_tokens)
    scales = k_number if k_scale is None else k_scale, v_number if v_scale is None else v_scale
    if out is None:
        out = _new_result(k_cache, num_tokens, _rows_of(k_cache, v_cache), dtype)
    plan = None
    if use_kernel(k_cache):
        from .kernels.gather import plan_gather_kv_cache

        plan = plan_gather_kv_cache(k_cache, v_cache, block_table, out)
        plan.launch((k_cache, v_cache), places, scales, out)
    else:
        reference.gather_kv_cache(
            k_cache.flatten(3),
            v_cache,
            block_table,
            cu_seqlens_k,
            seq_starts=seq_starts,
            k_scale=scales[0],
            v_scale=scales[1],
            out=out,
        )
    return (out[0], out[1]), plan


def _gather_latent_cache(
    latent_cache: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
    seq_starts: Tensor | None,
    k_scale: Tensor | None,
    k_pe_scale: Tensor | None,
    k_number: float | None,
    k_pe_number: float | None,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    num_tokens: int,
    dtype: torch.dtype,
    check_values: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], Any]:
    """(result, plan of the launch, None of the reference) of `gather_latent_cache` with checked arguments."""
    if latent_cache.dtype == torch.uint8:
        check_rows_aligned("latent_cache", latent_cache)
    places = cu_seqlens_k, block_table, seq_starts
    if check_values:
        _check_values(latent_cache, places, num_tokens)
    scales = k_number if k_scale is None else k_scale, k_pe_number if k_pe_scale is None else k_pe_scale
    if out is None:
        out = _new_result(latent_cache, num_tokens, ((kv_lora_rank,), (qk_rope_head_dim,)), dtype)
    plan = None
    if use_kernel(latent_cache):
        from .kernels.gather import plan_gather_latent_cache

        plan = plan_gather_latent_cache(latent_cache, block_table, out)
        scales = scales[0], scales[0] if scales[1] is None else scales[1]
        plan.launch((latent_cache, latent_cache), places, scales, out)
    else:
        reference.gather_latent_cache(
            latent_cache,
            block_table,
            cu_seqlens_k,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            seq_starts=seq_starts,
            k_scale=scales[0],
            k_pe_scale=scales[1],
            out=out,
        )
    return (out[0], out[1]), plan


_PLACES_SCHEMA = "Tensor cu_seqlens_k, Tensor block_table, Tensor? seq_starts"
_gather_kv_cache_operator = torch.library.custom_op(
    "triton_attn::gather_kv_cache",
    lambda *args: _gather_kv_cache(*args)[0],
    mutates_args=(),
    schema=f"(Tensor k_cache, Tensor v_cache, {_PLACES_SCHEMA}, Tensor? k_scale, Tensor? v_scale, float? k_number, "
    "float? v_number, SymInt num_tokens, ScalarType dtype, bool check_values) -> (Tensor, Tensor)",
)
_gather_latent_cache_operator = torch.library.custom_op(
    "triton_attn::gather_latent_cache",
    lambda *args: _gather_latent_cache(*args)[0],
    mutates_args=(),
    schema=f"(Tensor latent_cache, {_PLACES_SCHEMA}, Tensor? k_scale, Tensor? k_pe_scale, float? k_number, "
    "float? k_pe_number, SymInt kv_lora_rank, SymInt qk_rope_head_dim, SymInt num_tokens, ScalarType dtype, "
    "bool check_values) -> (Tensor, Tensor)",
)


@_gather_kv_cache_operator.register_fake
def _(k_cache, v_cache, *rest):
    *_, num_tokens, dtype, _ = rest
    return _new_result(k_cache, num_tokens, _rows_of(k_cache, v_cache), dtype)


@_gather_latent_cache_operator.register_fake
def _(latent_cache, *rest):
    *_, kv_lora_rank, qk_rope_head_dim, num_tokens, dtype, _ = rest
    return _new_result(latent_cache, num_tokens, ((kv_lora_rank,), (qk_rope_head_dim,)), dtype)


def _new_result(cache, num_tokens, rows, dtype):
    first, second = rows
    return cache.new_empty((num_tokens, *first), dtype=dtype), cache.new_empty((num_tokens, *second), dtype=dtype)


def _check_caches(k_cache, v_cache):
    """Both caches, of a packed cache the views with the order of dimensions of others."""
    cache_dtypes = (*KERNEL_DTYPES, *QUANTIZED_BITS)
    if isinstance(k_cache, Tensor) and k_cache.ndim == 5:
        x = PACK_BYTES // k_cache.itemsize
        check_tensor(
            "k_cache", k_cache, ("num_pages", "num_heads_kv", f"head_dim / {x}", "page_size", x), cache_dtypes, None
        )
        num_pages, num_heads, _, page_size, _ = k_cache.shape
        check_tensor(
            "v_cache", v_cache, (num_pages, num_heads, "head_dim_v", page_size), (k_cache.dtype,), k_cache.device
        )
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            check_packed_pages(name, cache.shape, cache.stride())
        return slots_of_packed(k_cache, v_cache)
    check_tensor("k_cache", k_cache, ("num_pages", "page_size", "num_heads_kv", "head_dim"), cache_dtypes, None)
    check_tensor("v_cache", v_cache, (*k_cache.shape[:3], "head_dim_v"), (k_cache.dtype,), k_cache.device)
    check_last_contiguous("k_cache", k_cache)
    check_last_contiguous("v_cache", v_cache)
    return k_cache, v_cache


def _rows_of(k_cache, v_cache):
    """The shapes of a token's keys and values."""
    num_heads = k_cache.shape[2]
    return (num_heads, math.prod(k_cache.shape[3:])), (num_heads, v_cache.shape[3])


def _check_places(cache, block_table, cu_seqlens_k, seq_starts):
    """Which tokens are read, and where their pages are, in the order of PLACES."""
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, cache.device)
    batch = cu_seqlens_k.shape[0] - 1
    check_tensor("block_table", block_table, (batch, "max_pages"), (torch.int32,), cache.device)
    check_last_contiguous("block_table", block_table)
    if seq_starts is not None:
        check_tensor("seq_starts", seq_starts, (batch,), (torch.int32,), cache.device)
        check_last_contiguous("seq_starts", seq_starts)
    return cu_seqlens_k, block_table, seq_starts


def _check_result(out, dtype, num_tokens, rows, cache, cu_seqlens_k):
    """(rows of the result, its dtype), by out if that is given, which is checked; `rows` are the shapes of a token."""
    num_tokens = num_tokens if num_tokens is None else check_length("num_tokens", num_tokens)
    if out is None:
        num_tokens = int(cu_seqlens_k[-1]) if num_tokens is None else num_tokens
        return num_tokens, _result_dtype(dtype, cache.dtype)
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not isinstance(out[0], Tensor):
        fail("out", "a tuple of two tensors", type(out).__name__, TypeError)
    dtype = _result_dtype(dtype, out[0].dtype)
    for i, (x, row) in enumerate(zip(out, rows)):
        num_rows = "num_tokens" if num_tokens is None else num_tokens
        check_tensor(f"out[{i}]", x, (num_rows, *row), (dtype,), cache.device)
        check_last_contiguous(f"out[{i}]", x)
        num_tokens = x.shape[0]
    return num_tokens, dtype


def _result_dtype(dtype, default):
    if dtype is None:
        return default if default in KERNEL_DTYPES else torch.bfloat16
    if dtype not in KERNEL_DTYPES:
        fail("dtype", "float16, bfloat16 or float32", dtype, TypeError)
    return dtype


def _check_values(cache, places, num_tokens):
    """Each token has a page of the cache. Syncs."""
    cu_seqlens_k, block_table, seq_starts = places
    most = block_table.shape[1] * cache.shape[1]
    check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, num_tokens, most)
    starts = [0] * len(block_table) if seq_starts is None else seq_starts.tolist()
    bounds, table = cu_seqlens_k.tolist(), block_table.tolist()
    num_pages, page_size = cache.shape[:2]
    for i, start in enumerate(starts):
        end = start + bounds[i + 1] - bounds[i]
        for column in range(start // page_size, -(-end // page_size)) if start < end else ():
            if not (0 <= column < len(table[i]) and 0 <= table[i][column] < num_pages):
                token = max(start, column * page_size)
                fail(f"block_table, sequence {i}", "a page of the cache for each token", f"none for token {token}")
