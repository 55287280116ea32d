"""Tiles of attention over a cache: the default by look-up, the space that a sweep searches.

Defaults were chosen from compiled code, not from timings: tiles that fit and spill nothing on Triton 3.6.0 and 3.9.0.
A decode step reads each key once, so that what counts is bytes in flight: several programs per processor with three
tiles ahead each. Of tiles for many rows those with the most `lock` in perf/model: 16 rows for each warp of
mma.sync, 64 for four warps of wgmma, or warps repeat each other's products.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import torch

from .._host.gpu import gpu_of
from .._host.tuned import remember, rows_class, tuned_config


@dataclass(frozen=True)
class PagedConfig:
    """One program takes block_m rows, query heads of one KV head, and walks over keys block_n at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (largest head dim, config of up to 16 rows, of more) per architecture; 16-bit inputs.
_HALF = {
    "sm_80": (
        (16, PagedConfig(16, 64, 1, 3), PagedConfig(128, 64, 8, 3)),
        (64, PagedConfig(16, 64, 4, 3), PagedConfig(128, 64, 8, 3)),
        (96, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 3)),
        (128, PagedConfig(16, 64, 4, 3), PagedConfig(128, 16, 8, 3)),
        (160, PagedConfig(16, 32, 4, 3), PagedConfig(128, 16, 8, 3)),
        (192, PagedConfig(16, 32, 4, 3), PagedConfig(128, 16, 8, 2)),
        (256, PagedConfig(16, 32, 4, 3), PagedConfig(64, 32, 8, 3)),
        (512, PagedConfig(16, 16, 4, 3), PagedConfig(32, 16, 8, 3)),
    ),
    "sm_90": (
        (16, PagedConfig(16, 64, 1, 3), PagedConfig(128, 64, 8, 3)),
        (128, PagedConfig(16, 64, 4, 3), PagedConfig(128, 64, 8, 3)),
        (256, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 2)),
        (512, PagedConfig(16, 16, 4, 3), PagedConfig(32, 16, 8, 3)),
    ),
    "gfx942": (
        (128, PagedConfig(16, 64, 4, 2), PagedConfig(128, 64, 4, 2)),
        (256, PagedConfig(16, 32, 4, 2), PagedConfig(64, 32, 4, 2)),
        (512, PagedConfig(16, 16, 4, 2), PagedConfig(32, 16, 8, 2)),
    ),
}
_HALF |= {"sm_86": _HALF["sm_80"], "sm_100": _HALF["sm_90"], "sm_120": _HALF["sm_80"]}
_FLOAT = (
    (128, PagedConfig(16, 32, 4, 2), PagedConfig(32, 32, 8, 1)),
    (512, PagedConfig(16, 16, 8, 1), PagedConfig(16, 16, 8, 1)),
)


@remember
def choose_config(arch, dtype, cache_dtype, head_dim, head_dim_v, num_rows, by_16_bytes, plain, seqlen_k, page_size):
    """The config of a call: of a tuned table where one has it, else the default.

    cache_dtype: of keys and values. plain: with pages, without softcap and ALiBi, as sweeps time it. seqlen_k: keys
    that a sequence has room for. The rest as in `default_config`.
    """
    if plain and by_16_bytes and arch != "interpreter":
        case = head_dim, head_dim_v, rows_class(num_rows), str(cache_dtype).removeprefix("torch.")
        found = tuned_config(arch, "paged", dtype, case, (seqlen_k, page_size, num_rows))
        if found is not None:
            return PagedConfig(**found)
    return default_config(arch, dtype, head_dim, head_dim_v, num_rows, by_16_bytes)


@functools.cache
def default_config(arch, dtype, head_dim, head_dim_v, num_rows, by_16_bytes):
    """The config of a call, by look-up: equal calls run equal code, and nothing is timed.

    Args:
        arch: "sm_90", "gfx942", ...; "interpreter" gets tiles that it is fast with.
        dtype: of q.
        head_dim, head_dim_v: 1 to 512.
        num_rows: rows of a sequence for one KV head, seqlen_q * group_size at most: a tile has no more than it needs,
            but tensor cores take 16.
        by_16_bytes: whether keys and values can be loaded 16 bytes at a time.
    """
    if arch == "interpreter":
        return PagedConfig(32 if num_rows <= 32 else 64, 64, 4, 1)
    table = _FLOAT if dtype == torch.float32 else _HALF[gpu_of(arch).configs]
    width = max(head_dim, head_dim_v)
    few, many = next(configs for limit, *configs in table if width <= limit)
    config = few
    if num_rows > 32:
        config = many
        if num_rows <= 64 and many.block_m == 128:  # half the rows have work for half the warps
            config = replace(many, block_m=64, num_warps=many.num_warps // 2)
    elif num_rows > 16:
        config = replace(few, block_m=32, num_warps=max(2, few.num_warps)) if many.block_m > 32 else many
    if not by_16_bytes:
        config = replace(config, block_n=max(16, config.block_n // 2), num_stages=1)
    return config


def search_space(arch, dtype, head_dim, head_dim_v, num_rows):
    """Configs for a sweep to compare, the default first."""
    default = default_config(arch, dtype, head_dim, head_dim_v, num_rows, True)
    stages = (1, 2) if gpu_of(arch).is_amd else (1, 2, 3, 4)
    rows = [rows for rows in (16, 32, 64, 128) if rows <= default.block_m]
    candidates = itertools.starmap(PagedConfig, itertools.product(rows, (16, 32, 64, 128), (2, 4, 8), stages))
    return list(dict.fromkeys([default, *candidates]))
