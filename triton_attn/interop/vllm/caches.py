"""Caches of vLLM as tensors that our kernels take."""

import torch
from torch import Tensor

FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LATENT_FP8_DTYPES = {name: FP8_DTYPES[name] for name in ("fp8", "fp8_e4m3")}  # as vLLM's layer reads its cache
TOKEN_DTYPES = {"int8_per_token_head": torch.int8, "fp8_per_token_head": torch.float8_e4m3fn}
SCALE_BYTES = torch.float32.itemsize
PLAIN_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # "auto" is the model's dtype
SCALE_BLOCK = 128  # elements of a latent vector that share a scale in the fp8_ds_mla layout


def unsupported_cache_dtype(dtype: torch.dtype, kv_cache_dtype: str | None) -> str | None:
    """Why a model of this dtype cannot have this cache, or None. A cache that is not fp8 has the model's dtype."""
    if PLAIN_DTYPES.get(kv_cache_dtype or "auto", dtype) == dtype:
        return None
    return f"kv_cache_dtype: expected the model's dtype {dtype} or fp8, got {kv_cache_dtype}"


def inline_scales(kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views (k_cache, v_cache, k_scale, v_scale) of a cache in int8_per_token_head or fp8_per_token_head.

    A row of the cache is [key, its scale, value, its scale]: head_size elements of a byte, an fp32 number, and the same
    again. Nothing is copied: `append_kv_cache`, `paged_attention` and `gather_kv_cache` take the views.

    Args:
        kv_cache: (num_blocks, num_kv_heads, block_size, 2 * (head_size + 4)), int8, or uint8 for fp8 (e4m3), of any
            strides that are multiples of 4, the last dimension contiguous. head_size is a multiple of 4.

    Returns:
        k_cache, v_cache (num_blocks, block_size, num_kv_heads, head_size) in int8 or float8_e4m3fn; k_scale, v_scale
        (num_blocks, block_size, num_kv_heads) in float32.

    Raises:
        TypeError, ValueError: kv_cache is no such tensor.

    Example:
        >>> from triton_attn.interop.vllm import inline_scales
        >>> k_cache, v_cache, k_scale, v_scale = inline_scales(torch.zeros(8, 2, 16, 2 * (64 + 4), dtype=torch.int8))
        >>> v_cache.shape, v_scale.shape, v_scale.stride()
        (torch.Size([8, 16, 2, 64]), torch.Size([8, 16, 2]), (1088, 34, 544))
    """
    if not isinstance(kv_cache, Tensor) or kv_cache.dtype not in (torch.int8, torch.uint8):
        got = kv_cache.dtype if isinstance(kv_cache, Tensor) else type(kv_cache).__name__
        raise TypeError(f"kv_cache: expected an int8 or uint8 tensor, got {got}")
    if kv_cache.ndim != 4 or kv_cache.shape[3] <= 2 * SCALE_BYTES or kv_cache.shape[3] % (2 * SCALE_BYTES):
        raise ValueError(
            "kv_cache: expected (num_blocks, num_kv_heads, block_size, 2 * (head_size + 4)) with a head_size that 4 "
            f"divides, got shape {tuple(kv_cache.shape)}"
        )
    if kv_cache.stride(3) != 1 or any(n % SCALE_BYTES for n in (kv_cache.data_ptr(), *kv_cache.stride()[:3])):
        raise ValueError(
            f"kv_cache: expected rows at multiples of {SCALE_BYTES} bytes, got address {kv_cache.data_ptr():#x}, "
            f"strides {kv_cache.stride()}"
        )
    width = kv_cache.shape[3] // 2 - SCALE_BYTES
    rows = kv_cache.transpose(1, 2)
    elements = rows if kv_cache.dtype == torch.int8 else rows.view(torch.float8_e4m3fn)
    numbers = rows.view(torch.float32)
    v_start, k_end = width + SCALE_BYTES, width // SCALE_BYTES
    return elements[..., :width], elements[..., v_start : v_start + width], numbers[..., k_end], numbers[..., -1]


def as_fp8(latent_cache, kv_cache_dtype, k_scale):
    """(cache, its scale (1,)) of fp8 with a scale per tensor; other caches as they are, and None."""
    dtype = LATENT_FP8_DTYPES.get(kv_cache_dtype)
    return (latent_cache, None) if dtype is None else (latent_cache.view(dtype), k_scale.view(1))
