"""Memory layout of a row of a latent KV cache: one token's latent vector, then its rotary key.

A cache of 16-bit, fp32 or fp8 elements holds these alone. A uint8 cache holds bytes of e4m3 elements with scales of
their own, then of bf16 rotary keys.
"""

import torch

from .checks import KERNEL_DTYPES, fail

SCALE_BLOCK = 128  # elements of a latent vector that share an fp8 scale


def latent_row(kv_lora_rank, qk_rope_head_dim):
    """Byte offsets in an fp8 row: of the scales, of the rotary key, and of the end.

    A row has kv_lora_rank e4m3 elements, one fp32 scale for every 128 of them, and qk_rope_head_dim bf16 elements. It
    is the layout of FlashMLA and DeepSeek-V3.2, where the offsets are 512, 528 and 656.
    """
    if kv_lora_rank % SCALE_BLOCK:
        fail("kv_lora_rank", f"a multiple of {SCALE_BLOCK}, the elements that share an fp8 scale", kv_lora_rank)
    if qk_rope_head_dim % 2:
        fail("qk_rope_head_dim", "an even number in the fp8 layout, whose rows are 4-byte aligned", qk_rope_head_dim)
    rope_start = kv_lora_rank + kv_lora_rank // SCALE_BLOCK * torch.float32.itemsize
    return kv_lora_rank, rope_start, rope_start + qk_rope_head_dim * torch.bfloat16.itemsize


def latent_storage(kv_lora_rank, qk_rope_head_dim, dtype):
    """(dtype, elements) of a row of a cache of the given dtype; float8_e4m3fn means rows with scales."""
    if dtype == torch.float8_e4m3fn:
        return torch.uint8, latent_row(kv_lora_rank, qk_rope_head_dim)[2]
    if dtype not in KERNEL_DTYPES:
        fail("dtype", "float16, bfloat16, float32 or float8_e4m3fn for a latent cache", dtype, TypeError)
    return dtype, kv_lora_rank + qk_rope_head_dim


def latent_parts(latent_cache, kv_lora_rank, qk_rope_head_dim):
    """Views of the latent vectors (..., kv_lora_rank), their scales (..., kv_lora_rank / 128) and the rotary keys.

    Those of a uint8 cache are uint8, float32 and bfloat16. Other caches have no scales: None.
    """
    if latent_cache.dtype != torch.uint8:
        latents, rope_keys = latent_cache.split_with_sizes([kv_lora_rank, qk_rope_head_dim], dim=-1)
        return latents, None, rope_keys
    scales_start, rope_start, end = latent_row(kv_lora_rank, qk_rope_head_dim)
    return (
        latent_cache[..., :scales_start],
        latent_cache[..., scales_start:rope_start].view(torch.float32),
        latent_cache[..., rope_start:end].view(torch.bfloat16),
    )


def latent_layouts(shape, strides, dtype, kv_lora_rank, qk_rope_head_dim):
    """(shape, strides) of each of the `latent_parts` of a cache (pages, slots, row), and the bytes of a row before its
    rotary key."""
    slots, (*outer, _) = shape[:-1], strides
    if dtype != torch.uint8:
        parts = [((*slots, width), strides) for width in (kv_lora_rank, qk_rope_head_dim)]
        return parts[0], None, parts[1], kv_lora_rank * dtype.itemsize
    _, rope_start, _ = latent_row(kv_lora_rank, qk_rope_head_dim)
    scales = (*slots, kv_lora_rank // SCALE_BLOCK), (*(stride // 4 for stride in outer), 1)
    rope_keys = (*slots, qk_rope_head_dim), (*(stride // 2 for stride in outer), 1)
    return ((*slots, kv_lora_rank), strides), scales, rope_keys, rope_start


def read_latent_cache(latent_cache, kv_lora_rank, qk_rope_head_dim, dtype=torch.float32):
    """The contents of a cache (..., row) of any layout: (..., kv_lora_rank + qk_rope_head_dim) in dtype."""
    return read_latent_parts(latent_parts(latent_cache, kv_lora_rank, qk_rope_head_dim), dtype)


def read_latent_parts(parts, dtype, k_scale=None, k_pe_scale=None):
    """[latent vectors, rotary keys] of `latent_parts` in dtype, times k_scale and k_pe_scale: a number, a tensor of
    one, or None, which is 1, and for rotary keys k_scale."""
    latents, scales, rope_keys = parts
    if scales is not None:
        latents = latents.view(torch.float8_e4m3fn).to(dtype).unflatten(-1, (-1, SCALE_BLOCK))
        latents = (latents * scales.to(dtype).unsqueeze(-1)).flatten(-2)
    latents, rope_keys = latents.to(dtype), rope_keys.to(dtype)
    if k_scale is not None:
        latents = latents * k_scale
    k_pe_scale = k_scale if k_pe_scale is None else k_pe_scale
    if k_pe_scale is not None:
        rope_keys = rope_keys * k_pe_scale
    return torch.cat([latents, rope_keys], dim=-1)
