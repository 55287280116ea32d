"""Reading a paged cache back: keys and values, or latents, of a batch as packed tensors. Plain torch on any device."""

import torch
from torch import Tensor

from .._host.backend import should_check_values
from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    QUANTIZED_BITS,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_kv_scale,
    check_last_contiguous,
    check_latent_scales,
    check_length,
    check_tensor,
    fail,
)
from .._host.latent import latent_parts, latent_storage, read_latent_parts
from .._host.observers import refuse_gradients


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
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The cached keys and values of a batch, packed: what `append_kv_cache` wrote, for `flash_attention_varlen`.

        k[cu_seqlens_k[b] + i, h] = k_cache[page, offset, h] * k_scale[h]
        page, offset = block_table[b, p // page_size], p % page_size,  p = seq_starts[b] + i

    computed in fp32 and rounded once; v likewise. Rows from cu_seqlens_k[-1] on, and those whose page is not in the
    table or the cache, are 0.

    Args:
        k_cache: (num_pages, page_size, num_heads_kv, head_dim), fp16, bf16, fp32, float8_e4m3fn, float8_e5m2 or int8;
            the last dimension contiguous.
        v_cache: (num_pages, page_size, num_heads_kv, head_dim_v), k_cache's dtype.
        block_table: (batch, max_pages) int32.
        cu_seqlens_k: (batch + 1,) int32: tokens of sequence b are the rows from cu_seqlens_k[b] to cu_seqlens_k[b + 1].
        num_tokens: rows of the result, at least cu_seqlens_k[-1]. None reads that, with a device-to-host sync.
        seq_starts: (batch,) int32, the first token that is read of each sequence, for chunks of a context. None is 0.
        k_scale, v_scale: factors of cached elements, as in `paged_attention`.
        dtype: of the result: float16, bfloat16 or float32. None is the cache's, of fp8 and int8 caches bfloat16.
        check_values: check lengths and pages, which costs a device-to-host sync. None follows TRITON_ATTN_CHECK=1.

    Returns:
        k (num_tokens, num_heads_kv, head_dim) and v (num_tokens, num_heads_kv, head_dim_v).

    Raises:
        TypeError, ValueError: an argument is wrong. With values checked also: a length, start or page that is not in
            the table or the cache.
        NotImplementedError: an argument requires a gradient or has a tangent.

    Its torch operators are seen by torch.compile, export and vmap. With num_tokens it can be captured in a CUDA graph.

    Example:
        >>> k_cache = v_cache = torch.randn(8, 16, 2, 64).to(torch.float8_e4m3fn)
        >>> block_table = torch.tensor([[5, 0], [2, 7]], dtype=torch.int32)
        >>> cu_seqlens_k = torch.tensor([0, 9, 39], dtype=torch.int32)
        >>> k, v = triton_attn.gather_kv_cache(k_cache, v_cache, block_table, cu_seqlens_k, 39, k_scale=0.5)
        >>> k.dtype, torch.equal(k[25:], k_cache[7, :14].bfloat16() * 0.5)
        (torch.bfloat16, True)
    """
    cache_dtypes = (*KERNEL_DTYPES, *QUANTIZED_BITS)
    check_tensor("k_cache", k_cache, ("num_pages", "page_size", "num_heads_kv", "head_dim"), cache_dtypes, None)
    check_tensor("v_cache", v_cache, (*k_cache.shape[:3], "head_dim_v"), (k_cache.dtype,), k_cache.device)
    check_last_contiguous("k_cache", k_cache)
    check_last_contiguous("v_cache", v_cache)
    scales = check_kv_scale("k_scale", k_scale, k_cache), check_kv_scale("v_scale", v_scale, v_cache)
    dtype = _result_dtype(dtype, k_cache)
    refuse_gradients(k_cache=k_cache, v_cache=v_cache, k_scale=_tensor(k_scale), v_scale=_tensor(v_scale))
    places = _places(k_cache, block_table, cu_seqlens_k, num_tokens, seq_starts, check_values)
    k, v = (_read(cache, scale, places, dtype) for cache, scale in zip((k_cache, v_cache), scales))
    return k, v


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
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The cached latents and rotary keys of a batch, packed: what `append_latent_cache` wrote, for `mla_prefill`.

        [kv_latent[cu_seqlens_k[b] + i], k_pe[cu_seqlens_k[b] + i]] = latent_cache[page, offset]

    times the row's scales in the fp8 layout of 656 bytes, or k_scale and k_pe_scale; computed in fp32 and rounded once.
    Pages, offsets and rows without a token are as in `gather_kv_cache`.

    Args:
        latent_cache: (num_pages, page_size, width), as `append_latent_cache` writes it: fp16, bf16, fp32, fp8, or uint8
            rows with scales of their own.
        block_table, cu_seqlens_k, num_tokens, seq_starts, check_values: as in `gather_kv_cache`.
        kv_lora_rank, qk_rope_head_dim: elements of a latent vector and of a rotary key.
        k_scale, k_pe_scale: as in `append_latent_cache`. A uint8 cache takes none.
        dtype: of the result: float16, bfloat16 or float32. None is the cache's, of an fp8 or uint8 cache bfloat16.

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
    kv_lora_rank = check_length("kv_lora_rank", kv_lora_rank)
    qk_rope_head_dim = check_length("qk_rope_head_dim", qk_rope_head_dim)
    dtypes = (*KERNEL_DTYPES, *FLOAT8_MANTISSA_BITS, torch.uint8)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", "width"), dtypes, None)
    layout = torch.float8_e4m3fn if latent_cache.dtype == torch.uint8 else torch.float32
    _, width = latent_storage(kv_lora_rank, qk_rope_head_dim, layout)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", width), dtypes, None)
    check_last_contiguous("latent_cache", latent_cache)
    scales = tuple(check_latent_scales(latent_cache, k_scale, k_pe_scale))
    dtype = _result_dtype(dtype, latent_cache)
    refuse_gradients(latent_cache=latent_cache, k_scale=_tensor(k_scale), k_pe_scale=_tensor(k_pe_scale))
    places = _places(latent_cache, block_table, cu_seqlens_k, num_tokens, seq_starts, check_values)
    parts = latent_parts(_rows(latent_cache, places), kv_lora_rank, qk_rope_head_dim)
    rows = read_latent_parts(parts, torch.float32, *scales).to(dtype)
    kv_latent, k_pe = rows.split([kv_lora_rank, qk_rope_head_dim], dim=1)
    return kv_latent.contiguous(), k_pe.contiguous()


def _result_dtype(dtype, cache):
    if dtype is None:
        return cache.dtype if cache.dtype in KERNEL_DTYPES else torch.bfloat16
    if dtype not in KERNEL_DTYPES:
        fail("dtype", "float16, bfloat16 or float32", dtype, TypeError)
    return dtype


def _tensor(scale):
    return scale if isinstance(scale, Tensor) else None


def _places(cache, block_table, cu_seqlens_k, num_tokens, seq_starts, check_values):
    """(page, offset, whether it is a token) of each row of the result; pages and offsets of no token are valid too."""
    (num_pages, page_size), device = cache.shape[:2], cache.device
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
    batch = cu_seqlens_k.shape[0] - 1
    check_tensor("block_table", block_table, (batch, "max_pages"), (torch.int32,), device)
    if seq_starts is not None:
        check_tensor("seq_starts", seq_starts, (batch,), (torch.int32,), device)
    num_tokens = int(cu_seqlens_k[-1]) if num_tokens is None else check_length("num_tokens", num_tokens)
    width = block_table.shape[1]
    if should_check_values(check_values):
        check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, num_tokens, width * page_size)
    rows = torch.arange(num_tokens, dtype=torch.int32, device=device)
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
    if should_check_values(check_values):
        _check_rows(seqs, positions, is_token & ~is_there)
    return pages.clamp(0, num_pages - 1), positions % page_size, is_token & is_there


def _check_rows(seqs, positions, is_wrong):
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        expected = "a page of the cache for each token"
        fail(f"block_table, sequence {int(seqs[row])}", expected, f"none for token {int(positions[row])}")


def _rows(cache, places):
    """What the cache holds at these places, 0 where there is no token."""
    pages, offsets, is_token = places
    bits = cache.view(torch.uint8) if cache.itemsize == 1 else cache
    if pages is None:
        rows = bits.new_zeros(is_token.shape[0], *cache.shape[2:])
    else:
        rows = bits[pages, offsets].masked_fill(~is_token.view(-1, *[1] * (cache.ndim - 2)), 0)
    return rows.view(cache.dtype)


def _read(cache, scale, places, dtype):
    """Rows (tokens, heads, dim) at these places times their scale."""
    if isinstance(scale, Tensor) and scale.ndim == 3:
        return (_rows(cache, places).float() * _rows(scale, places).unsqueeze(2)).to(dtype)
    return _scaled(_rows(cache, places), scale, dtype)


def _scaled(x, scale, dtype):
    """x (tokens, heads, dim) times a scale, a number or a tensor of one or of one per head, in dtype."""
    if scale is None:
        return x.to(dtype)
    return (x.float() * (scale.view(-1, 1) if isinstance(scale, Tensor) else scale)).to(dtype)
