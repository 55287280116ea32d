"""Tiles of attention over a cache: the default by look-up, the space that a sweep searches; the number of splits.

Defaults were chosen from compiled code, not from timings: tiles that fit and spill nothing on Triton 3.6.0 and 3.9.0.
A decode step reads each key once, so that what counts is bytes in flight: several programs per processor with three
tiles ahead each.
"""

import functools
import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedConfig:
    """One program takes block_m rows, query heads of one KV head, and walks over keys block_n at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Rows of a tile: a whole tile is computed however few rows there are, and tensor cores take 16.
ROWS = (16, 32, 64, 128)


@functools.cache
def default_config(arch, dtype, cache_dtype, head_dim, head_dim_v, num_rows, by_16_bytes):
    """The config of a call, by look-up: equal calls run equal code, and nothing is timed.

    Args:
        arch: "sm_90", "gfx942", ...; "interpreter" gets tiles that it is fast with.
        dtype, cache_dtype: of q and of the cache.
        head_dim, head_dim_v: 1 to 512.
        num_rows: rows of a sequence for one KV head, seqlen_q * group_size at most: a tile has no more than it needs.
        by_16_bytes: whether keys and values can be loaded 16 bytes at a time.
    """
    width = max(head_dim, head_dim_v)
    most_rows = next(rows for limit, rows in _MOST_ROWS if width <= limit)
    if dtype == torch.float32:
        most_rows = min(most_rows, 32)
    block_m = next((rows for rows in ROWS if rows >= min(num_rows, most_rows)), most_rows)
    if arch == "interpreter":
        return PagedConfig(max(block_m, 32), 64, 4, 1)
    stages = 2 if arch.startswith("gfx") else 3
    block_n = next(keys for limit, keys in _KEYS if width <= limit)
    if dtype == torch.float32:
        block_n, stages = max(16, block_n // 4), 2
    if not by_16_bytes:
        block_n, stages = max(16, block_n // 2), 1
    return PagedConfig(block_m, block_n, 8 if block_m > 64 or width > 256 else 4, stages)


_MOST_ROWS = ((128, 128), (256, 64), (512, 32))
_KEYS = ((128, 64), (256, 32), (512, 16))


def choose_num_splits(num_programs, num_key_tiles, num_processors, max_splits=128):
    """Parts to cut the keys in, so that programs fill the processors: the fewest within 85 % of the best efficiency.

    efficiency = waves / ceil(waves),  waves = num_programs * num_splits / num_processors

    Everything is known on the host, the most keys that a cache holds in place of those it does, so that nothing is read
    back and a captured graph stays right as sequences grow.
    """
    counts = range(1, max(1, min(max_splits, num_key_tiles, num_processors)) + 1)
    efficiency = {n: _efficiency(num_programs * n / num_processors) for n in counts}
    best = max(efficiency.values())
    return next(n for n in counts if efficiency[n] >= 0.85 * best)


def _efficiency(waves):
    return waves / -(-waves // 1)


def search_space(arch, dtype, cache_dtype, head_dim, head_dim_v, num_rows):
    """Configs for a sweep to compare, the default first."""
    default = default_config(arch, dtype, cache_dtype, head_dim, head_dim_v, num_rows, True)
    stages = (1, 2) if arch.startswith("gfx") else (1, 2, 3, 4)
    rows = [rows for rows in ROWS if rows <= default.block_m]
    candidates = itertools.starmap(PagedConfig, itertools.product(rows, (16, 32, 64, 128), (2, 4, 8), stages))
    return list(dict.fromkeys([default, *candidates]))
