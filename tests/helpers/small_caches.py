"""Paged caches whose tokens are written as their own ids."""

import contextlib
import functools
import os
import sys
from collections import deque
from unittest import mock

import numpy as np
import torch

from triton_attn import PagedKVCache, append_kv_cache

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


def quantizable(integers):
    """Rows (tokens, 1, 2) of keys or values that say which integer each stands for, also in int8 with a scale for each
    token: the second element sets the scale, the first one differs."""
    x = integers.float().view(-1, 1, 1)
    return torch.cat([x * (x % 64 / 64), x], dim=2)


def integers_of(rows):
    """The integers of such rows as they are read back, (tokens, 2)."""
    part, integers = rows[:, 0], rows[:, 1].round()
    assert ((part * 64 - integers * (integers % 64)).abs() <= integers / 2).all()
    return integers


def read_rows(cache, layer, slots):
    """Keys and values (slots, head_dim) of a layer of a cache of one head, times their scales."""
    for x, scale in ((cache.k_cache, cache.k_scale), (cache.v_cache, cache.v_scale)):
        rows = x[layer].flatten(0, 1)[slots, 0]
        yield rows if scale is None else rows * scale[layer].flatten(0, 1)[slots]


def write_rows(cache, layer, k, v, slots, **options):
    scales = [None if x is None else x[layer] for x in (cache.k_scale, cache.v_scale)]
    caches = cache.k_cache[layer], cache.v_cache[layer]
    append_kv_cache(k, v, *caches, slots, k_scale=scales[0], v_scale=scales[1], **options)


@contextlib.contextmanager
def every_method_is_called(*kinds):
    """Fails at the end if a public method of these classes was not called meanwhile, other than by the package."""
    names = {(kind, name) for kind in kinds for name in dir(kind) if name[0] != "_" and callable(getattr(kind, name))}
    called = set()

    def counted(kind, name):
        method = getattr(kind, name)

        @functools.wraps(method)
        def call(*args, **options):
            if not sys._getframe(1).f_globals["__name__"].startswith("triton_attn"):
                called.add((kind, name))
            return method(*args, **options)

        return mock.patch.object(kind, name, call)

    with contextlib.ExitStack() as patches:
        for kind, name in names:
            patches.enter_context(counted(kind, name))
        yield
    assert called == names, f"never called: {sorted(f'{kind.__name__}.{name}' for kind, name in names - called)}"


def state_of(x, seen=None):
    """Everything that a cache, a pool, a step or prefix groups hold, as values that can be compared.

    Left out are what is no state: `_batch`, which sequences the last call named; `_order`, scratch memory of a pool;
    memoryviews of arrays that are compared themselves.
    """
    seen = {} if seen is None else seen
    if isinstance(x, np.ndarray):
        return x.shape, str(x.dtype), x.tobytes()
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype, x.detach().contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes()
    if isinstance(x, dict):
        return [(state_of(key, seen), state_of(value, seen)) for key, value in x.items()]
    if isinstance(x, (list, tuple, deque)):
        return [state_of(item, seen) for item in x]
    if not type(x).__module__.startswith("triton_attn.cache"):
        return None if isinstance(x, memoryview) else x
    if id(x) in seen:
        return seen[id(x)]
    seen[id(x)] = len(seen)
    names = {*getattr(x, "__slots__", ()), *getattr(x, "__dict__", ())} - {"_batch", "_order"}
    return {name: state_of(getattr(x, name), seen) for name in sorted(names)}
