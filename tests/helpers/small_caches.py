"""Paged caches whose tokens are written as their own ids."""

import os

import torch

from triton_attn import PagedKVCache

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def make(num_pages=16, page_size=4, device=DEVICE, **options):
    shape = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 2}
    return PagedKVCache(num_pages, page_size, **shape, dtype=torch.float32, device=device, **options)


def start(cache, tokens, salt=None):
    """A sequence whose tokens are written as their own ids and can be found by others."""
    seq, cached = cache.create(tokens, salt)
    slots = cache.extend([seq], [tokens[cached:]])
    contents = torch.tensor(tokens[cached:], dtype=torch.float32, device=cache.device).view(1, -1, 1, 1)
    for caches in (cache.k_cache, cache.v_cache):
        caches.flatten(1, 2)[:, slots] = contents
    cache.commit([seq])
    return seq


def make_step(cache, *args, staged=False):
    """A CacheStep that sends to memory of its own, as to a GPU, if it is staged."""
    on_host, cache._on_host = cache._on_host, cache._on_host and not staged
    step = cache.step(*args)
    cache._on_host = on_host
    return step


def contents(step):
    """What a CacheStep's buffers hold."""
    names = "slot_mapping", "positions", "cache_seqlens", "cu_seqlens_q", "block_table"
    return {name: getattr(step, name).tolist() for name in names}
