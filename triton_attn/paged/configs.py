"""Configs of paged attention: the defaults, the search space of a sweep, and which configs cannot run.

Defaults were chosen from compiled code, not from timings: they fit, and spill nothing in the loop, on Triton 3.6.0 and
3.9.0. A decode step reads each key once, so bytes in flight matter: several programs per SM, each with three stages.
Tiles for many rows have the highest `lock` in perf/model. They have 16 rows for each warp of mma.sync, 64 for four
warps of wgmma: with fewer rows, warps repeat each other's matmuls.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .._host.config import Config
from .._host.gpu import gpu_of
from .._host.tuned import rows_class


class PagedCase(NamedTuple):
    """What the config of a call depends on.

    rows: of a sequence and KV head, at most seqlen_q * group_size. A tile has no more rows than that, but at least 16,
    for tensor cores. loads_vectors: whether keys and values can be loaded 4 bytes or more at a time. is_plain: with
    pages, without softcap and ALiBi, as sweeps time it. seqlen_k: capacity of the cache for a sequence.
    """

    arch: str
    dtype: torch.dtype  # of q
    cache_dtype: torch.dtype
    head_dim: int  # 1 to 512
    head_dim_v: int
    rows: int
    loads_vectors: bool = True
    is_plain: bool = True
    seqlen_k: int = 1
    page_size: int = 1

    @property
    def gpu(self):
        return gpu_of(self.arch)

    @property
    def is_tuned(self):
        return self.is_plain and self.loads_vectors

    @property
    def tile_rows(self):
        return rows_class(self.rows)


_TABLE_CASE = {"head_dim": int, "head_dim_v": int, "tile_rows": int, "cache_dtype": str}


@dataclass(frozen=True)
class PagedConfig(Config, family="paged", case=_TABLE_CASE, buckets=("seqlen_k", "page_size", "rows")):
    """One program computes block_m rows, query heads of one KV head, in a loop over tiles of block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, case):
        """From a table, by the larger head dimension."""
        if case.arch == "interpreter":
            return cls(32 if case.rows <= 32 else 64, 64, 4, 1)
        table = _FLOAT if case.dtype == torch.float32 else _HALF[case.gpu.configs]
        width = max(case.head_dim, case.head_dim_v)
        few, many, *of_64 = next(configs for limit, *configs in table if width <= limit)
        config = few
        if case.rows > 64 or (case.rows > 32 and many.block_m < 128):
            config = many
        elif case.rows > 32:  # half the rows have work for half the warps
            config = of_64[0] if of_64 else replace(many, block_m=64, num_warps=many.num_warps // 2)
        elif case.rows > 16:
            # Rows of more than 256 elements leave no registers for 32 of them.
            fit = many.block_m > 32 and width <= 256
            config = replace(few, block_m=32, num_warps=max(2, few.num_warps)) if fit else many
        if case.cache_dtype.itemsize == 1:
            config = _of_quantized(config, few, width, case)
        if not case.loads_vectors:
            config = replace(config, block_n=max(16, config.block_n // 2), num_stages=1)
        return config

    @classmethod
    def search_space(cls, case):
        """Configs with an `obstacle` are left out."""
        default = cls.default(case)
        stages = (1, 2) if case.gpu.is_amd else (1, 2, 3, 4)
        rows = [rows for rows in (16, 32, 64, 128) if rows <= default.block_m]
        candidates = itertools.starmap(cls, itertools.product(rows, (16, 32, 64, 128), (2, 4, 8), stages))
        return [config for config in dict.fromkeys([default, *candidates]) if not config.obstacle(case)]

    def obstacle(self, case):
        return case.gpu.lacks(self.shared_bytes(case))

    def shared_bytes(self, case):
        """Least shared memory for tiles of q, k and v. With any number of stages, one tile each of keys and values is
        in flight, because the loads of keys wait for page numbers."""
        q = self.block_m * case.head_dim * case.dtype.itemsize
        k, v = (self.block_n * dim * case.cache_dtype.itemsize for dim in (case.head_dim, case.head_dim_v))
        if case.gpu.is_amd:
            return max(q, k, v)
        return q + (max(k, v) if self.num_stages == 1 else k + v)


def fixed_rows(width):
    """Rows of the tile for which a batch-invariant call takes its config, whatever it has itself. A program keeps two
    outputs, of a split and of all, in registers."""
    return 64 if width <= 128 else 32 if width <= 256 else 16


def _of_quantized(config, few, width, case):
    """The config of a quantized cache. Decoding larger tiles takes more registers than there are; two warps have more
    of them than four, and copy as much."""
    if width > 256:
        return replace(config, block_n=16) if config.block_m == 16 else config
    if case.gpu.wgmma and config.block_m == 16 and 16 < width <= 64:
        return replace(config, num_warps=2)
    if not case.gpu.uses_mma_sync or config.block_m <= 32 or width <= 96:
        return config
    if width <= 192:
        return replace(config, block_n=16)
    return config if case.rows > 64 else replace(few, block_m=32)


# (largest head dim, config for up to 16 rows, config for more) per architecture, for 16-bit inputs. A fourth entry is
# for 33 to 64 rows, if half of a tile of 128 would need pieces that are too wide: see `_widest_piece` in forward.py.
_HALF = {
    "sm_80": (
        (16, PagedConfig(16, 64, 1, 3), PagedConfig(128, 64, 8, 3)),
        (64, PagedConfig(16, 64, 4, 3), PagedConfig(128, 64, 8, 3)),
        (96, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 3)),
        (128, PagedConfig(16, 64, 4, 3), PagedConfig(128, 32, 8, 3)),
        (160, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 2)),
        (192, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 2)),
        (256, PagedConfig(16, 32, 4, 3), PagedConfig(128, 16, 8, 3), PagedConfig(64, 64, 8, 2)),
        (512, PagedConfig(16, 32, 4, 2), PagedConfig(16, 32, 4, 2)),
    ),
    "sm_90": (
        (16, PagedConfig(16, 64, 1, 3), PagedConfig(128, 64, 8, 3)),
        (128, PagedConfig(16, 64, 4, 3), PagedConfig(128, 64, 8, 3)),
        (256, PagedConfig(16, 32, 4, 3), PagedConfig(128, 32, 8, 2)),
        (512, PagedConfig(16, 32, 4, 3), PagedConfig(64, 32, 8, 3)),
    ),
    "gfx942": (
        (128, PagedConfig(16, 64, 4, 2), PagedConfig(128, 64, 4, 2)),
        (256, PagedConfig(16, 32, 4, 2), PagedConfig(64, 32, 4, 2)),
        (512, PagedConfig(16, 16, 4, 2), PagedConfig(32, 16, 8, 2)),
    ),
}
# On sm_100 the output of 64 rows of 512 would fill the tensor memory.
_SM_100 = (*_HALF["sm_90"][:-1], (512, PagedConfig(16, 32, 4, 3), PagedConfig(16, 32, 4, 3)))
# On sm_86 and sm_120 tiles of 64 keys of 256 do not fit in shared memory.
_WIDE = (*_HALF["sm_80"][-2][:-1], PagedConfig(64, 32, 8, 3))
_SM_86 = (*_HALF["sm_80"][:-2], _WIDE, _HALF["sm_80"][-1])
_HALF |= {"sm_86": _SM_86, "sm_100": _SM_100, "sm_120": _SM_86}
_FLOAT = (
    (128, PagedConfig(16, 32, 4, 2), PagedConfig(32, 32, 8, 1)),
    (512, PagedConfig(16, 16, 8, 1), PagedConfig(16, 16, 8, 1)),
)
