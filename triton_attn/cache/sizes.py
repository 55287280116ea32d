"""Bytes of KV cache per token."""

import torch

from .._host.checks import check_bool, check_length, fail
from .._host.latent import latent_storage


def kv_cache_bytes_per_token(
    *,
    num_layers: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    token_scales: bool = False,
) -> int:
    """Bytes that one token keeps in the KV cache, all layers together.

        MHA, GQA, MQA:  num_layers * num_kv_heads * ((head_dim + head_dim_v) * bytes of dtype + 8 with token_scales)
        MLA:            num_layers * (kv_lora_rank + qk_rope_head_dim) * bytes of dtype
        MLA in fp8:     num_layers * (kv_lora_rank + kv_lora_rank / 128 * 4 + qk_rope_head_dim * 2)

    MHA has as many KV heads as query heads, MQA has one, GQA a number between. MLA caches one latent vector and one
    rotary key for all heads. In fp8 the vector has a scale for every 128 elements, and the key is bf16. Scales of
    other caches are counted if there is one per token. A sequence holds whole pages of
    page_size tokens.

    Args:
        num_layers: layers that keep all tokens.
        num_kv_heads, head_dim: of keys and values.
        head_dim_v: of values; None is head_dim.
        kv_lora_rank, qk_rope_head_dim: of MLA, in place of num_kv_heads and head_dim.
        dtype, token_scales: of the cache, as `PagedKVCache` and `LatentKVCache` take them.

    Raises:
        TypeError: neither form is given, or both; a dtype that no latent cache has.
        ValueError: token_scales with a latent cache; one in fp8 whose kv_lora_rank is no multiple of 128, or whose
            qk_rope_head_dim is odd.

    Example:
        >>> triton_attn.kv_cache_bytes_per_token(num_layers=32, num_kv_heads=8, head_dim=128)  # Llama-3-8B
        131072
        >>> triton_attn.kv_cache_bytes_per_token(num_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)  # DeepSeek-V3
        70272

    Source: DeepSeek-V2 (2024), arXiv:2405.04434, table 1.
    """
    heads = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
    latent = {"kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim}
    is_mla = any(size is not None for size in latent.values())
    if is_mla and any(size is not None for size in heads.values()):
        raise TypeError("expected num_kv_heads and head_dim, or kv_lora_rank and qk_rope_head_dim, got some of both")
    if head_dim_v is None:
        heads["head_dim_v"] = head_dim
    num_layers = check_length("num_layers", num_layers)
    token_scales = check_bool("token_scales", token_scales)
    if is_mla:
        if token_scales:
            fail("token_scales", "False with kv_lora_rank", True)
        kv_lora_rank, qk_rope_head_dim = (check_length(*item) for item in latent.items())
        dtype, elements = latent_storage(kv_lora_rank, qk_rope_head_dim, dtype)
        return num_layers * elements * dtype.itemsize
    num_kv_heads, head_dim, head_dim_v = (check_length(*item) for item in heads.items())
    scale_bytes = 2 * torch.float32.itemsize if token_scales else 0
    return num_layers * num_kv_heads * ((head_dim + head_dim_v) * dtype.itemsize + scale_bytes)
