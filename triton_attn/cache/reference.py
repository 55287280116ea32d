"""What the cache kernels compute, in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._host.checks import KERNEL_DTYPES, largest_of
from .._host.definition import rotate
from .._host.latent import SCALE_BLOCK, latent_parts, read_latent_parts
from .._host.layout import slots_of_packed


@torch.no_grad()
def append_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    check_values: bool | None = None,
) -> None:
    """See `triton_attn.append_kv_cache`; arguments are not checked."""
    written = (slot_mapping >= 0) & (slot_mapping < k_cache.shape[0] * k_cache.shape[1])
    slots = slot_mapping[written]
    k, v = k[written].float(), v[written].float()
    if rope_cos is not None:
        at = positions[written].clamp(0, len(rope_cos) - 1)
        cos, sin = (table[at].float().unsqueeze(1) for table in (rope_cos, rope_sin))
        k = rotate(k, cos, sin, rope_interleaved)
    places = slots // k_cache.shape[1], slots % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if isinstance(scale, Tensor) and scale.ndim == 3:
            scale[places] = own = _token_scale(x, cache.dtype)
            _bits(cache)[places] = _bits(_round(x / own.unsqueeze(2), cache.dtype))
        else:
            _bits(cache)[places] = _bits(_scaled(x, scale, cache.dtype))


@torch.no_grad()
def append_latent_cache(
    kv_latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    k_pe_scale: float | Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    check_values: bool | None = None,
) -> None:
    """See `triton_attn.append_latent_cache`; arguments are not checked."""
    page_size = latent_cache.shape[1]
    written = (slot_mapping >= 0) & (slot_mapping < latent_cache.shape[0] * page_size)
    slots = slot_mapping[written]
    places = slots // page_size, slots % page_size
    latents, scales, rope_keys = latent_parts(latent_cache, kv_latent.shape[1], k_pe.shape[1])
    kv_latent, k_pe = kv_latent[written], k_pe[written].float()
    if scales is None:
        _bits(latents)[places] = _bits(_scaled(kv_latent, k_scale, latents.dtype))
    else:
        blocks = kv_latent.float().unflatten(1, (-1, SCALE_BLOCK))
        scale = _latent_scale(blocks.abs().nan_to_num(0.0, posinf=torch.inf).amax(dim=2))
        scales[places] = scale
        latents[places] = _bits(_round((blocks / scale.unsqueeze(2)).flatten(1), torch.float8_e4m3fn))
    if rope_cos is not None:
        at = positions[written].clamp(0, len(rope_cos) - 1)
        cos, sin = (table[at].float() for table in (rope_cos, rope_sin))
        k_pe = rotate(k_pe, cos, sin, rope_interleaved)
    k_pe_scale = k_scale if k_pe_scale is None else k_pe_scale
    _bits(rope_keys)[places] = _bits(_scaled(k_pe, k_pe_scale, rope_keys.dtype))


@torch.no_grad()
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
    """See `triton_attn.gather_kv_cache`; arguments are not checked."""
    if k_cache.ndim == 5:
        k_cache, v_cache = slots_of_packed(k_cache, v_cache)
        k_cache = k_cache.flatten(3)
    num_tokens, dtype = _result_of(num_tokens, dtype, out, k_cache, cu_seqlens_k)
    places = _places(k_cache, block_table, cu_seqlens_k, num_tokens, seq_starts)
    results = []
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        x = _rows(cache, places)
        if isinstance(scale, Tensor) and scale.ndim == 3:
            x = x.float() * _rows(scale, places).unsqueeze(2)
        elif scale is not None:
            x = x.float() * (scale.view(-1, 1) if isinstance(scale, Tensor) else scale)
        results.append(x.to(dtype))
    return _results(out, *results)


@torch.no_grad()
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
    """See `triton_attn.gather_latent_cache`; arguments are not checked."""
    num_tokens, dtype = _result_of(num_tokens, dtype, out, latent_cache, cu_seqlens_k)
    places = _places(latent_cache, block_table, cu_seqlens_k, num_tokens, seq_starts)
    parts = latent_parts(_rows(latent_cache, places), kv_lora_rank, qk_rope_head_dim)
    rows = read_latent_parts(parts, torch.float32, k_scale, k_pe_scale).to(dtype)
    return _results(out, *rows.split([kv_lora_rank, qk_rope_head_dim], dim=1))


def _result_of(num_tokens, dtype, out, cache, cu_seqlens_k):
    """(rows of a result, its dtype)."""
    if out is not None:
        return out[0].shape[0], out[0].dtype
    num_tokens = int(cu_seqlens_k[-1]) if num_tokens is None else num_tokens
    default = cache.dtype if cache.dtype in KERNEL_DTYPES else torch.bfloat16
    return num_tokens, default if dtype is None else dtype


def _results(out, first, second):
    if out is None:
        return first.contiguous(), second.contiguous()
    return out[0].copy_(first), out[1].copy_(second)


def _places(cache, block_table, cu_seqlens_k, num_tokens, seq_starts):
    """(page, offset, whether it is a token) of each row of a result; pages and offsets of no token are valid too."""
    (num_pages, page_size), (batch, width) = cache.shape[:2], block_table.shape
    rows = torch.arange(num_tokens, dtype=torch.int32, device=cache.device)
    if batch * width * num_pages * page_size == 0:
        return None, None, rows < 0
    seqs = torch.searchsorted(cu_seqlens_k[1:], rows, right=True)
    is_token, seqs = seqs < batch, seqs.clamp(max=batch - 1)
    positions = rows - cu_seqlens_k[seqs]
    if seq_starts is not None:
        positions = positions + seq_starts[seqs]
    columns = positions // page_size
    pages = block_table[seqs, columns.clamp(0, width - 1)]
    is_there = (columns >= 0) & (columns < width) & (pages >= 0) & (pages < num_pages)
    return pages.clamp(0, num_pages - 1), positions % page_size, is_token & is_there


def _rows(cache, places):
    """What the cache holds at these places, 0 where there is no token."""
    pages, offsets, is_token = places
    bits = _bits(cache)
    if pages is None:
        rows = bits.new_zeros(is_token.shape[0], *cache.shape[2:])
    else:
        rows = bits[pages, offsets].masked_fill(~is_token.view(-1, *[1] * (cache.ndim - 2)), 0)
    return rows.view(cache.dtype)


def _token_scale(x, dtype):
    """Scales (tokens, heads) with which the largest elements of x are those of the dtype; infinity where not all are
    finite."""
    largest = torch.full(x.shape[:2], largest_of(dtype), device=x.device)  # by a number, a GPU multiplies
    return (x.abs().nan_to_num(torch.inf, posinf=torch.inf).amax(dim=2) / largest).clamp(min=1e-6)


def _latent_scale(amax):
    """The power of two at or above max(amax / 448, 1e-4), fp32; infinity stays."""
    limit = torch.full_like(amax, torch.finfo(torch.float8_e4m3fn).max)  # by a number, a GPU multiplies with 1 / 448
    quotient = (amax / limit).clamp(min=1e-4)
    mantissa, exponent = torch.frexp(quotient)  # mantissa from 0.5 to below 1
    power = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    return torch.where(quotient.isinf(), quotient, power)


@torch.no_grad()
def copy_kv_pages(
    caches: Tensor | Sequence[Tensor],
    src_pages: Tensor,
    dst_pages: Tensor,
    *,
    to: Tensor | Sequence[Tensor] | None = None,
    check_values: bool | None = None,
) -> None:
    """See `triton_attn.copy_kv_pages`; arguments are not checked."""
    caches = (caches,) if isinstance(caches, torch.Tensor) else caches
    targets = caches if to is None else (to,) if isinstance(to, torch.Tensor) else to
    for cache, target in zip(caches, targets):
        moved = _pages_first(cache)[src_pages.to(cache.device, torch.int64)]
        _pages_first(target)[dst_pages.to(target.device, torch.int64)] = moved.to(target.device)


def _pages_first(cache):
    return _bits(cache).transpose(0, 1) if cache.ndim == 5 else _bits(cache)


def _scaled(x, scale, dtype):
    """x (..., dim) over a scale, a number or a tensor of one or of one per head, in the dtype of a cache."""
    if scale is not None:
        x = x.float() / torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(-1, 1)
    return _round(x, dtype)


def _round(x, dtype):
    """fp32 to the dtype of a cache; fp8 saturates at its largest finite value, NaN stays NaN, in int8 it is 0."""
    if dtype == torch.int8:
        x = x.nan_to_num(0.0, posinf=127.0, neginf=-128.0).round().clamp(-128, 127)
    elif dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def _bits(x):
    """fp8 as uint8: torch moves fp8 values, but cannot index them on every device."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
