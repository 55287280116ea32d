"""Configs of the MLA kernels: the defaults, the search space of a sweep, and which configs cannot run.

Defaults were chosen from compiled code, not from timings: they fit and do not spill at 512 + 64, the widths of
DeepSeek's models, on Triton 3.6.0 and 3.9.0. In decode, a tile of up to 16 rows reads latent vectors as fast as memory
delivers them; the tile for more rows has the highest `lock` in perf/model. On sm_100 the output of 64 rows would fill
the tensor memory, so tiles have 32 rows and mma.sync multiplies them.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._host import tuned
from .._host.config import Config
from .._host.gpu import gpu_of
from ..merge.splits import SplitWork

# Bytes in a nanosecond that one decode program alone on an SM of an H100 loads: measured with 16 and 128 heads.
PROGRAM_RATE = 20.0


class MlaDecodeCase(NamedTuple):
    """What the config of a decode step, or of an absorbed prefill, depends on.

    rows is seqlen_q * num_heads; is_fp8 and has_scales tell of the cache's rows. is_paged: the cache has pages of
    page_size keys, of which a sequence can have seqlen_k. Sweeps time only such calls, of fp8 rows those with scales.
    """

    arch: str
    dtype: torch.dtype  # of the queries
    kv_lora_rank: int
    qk_rope_head_dim: int
    rows: int
    is_fp8: bool = False
    is_paged: bool = True
    seqlen_k: int = 1
    page_size: int = 1
    has_scales: bool = True

    @property
    def gpu(self):
        return gpu_of(self.arch)

    @property
    def is_tuned(self):
        return self.is_paged and not self.is_plain_fp8

    @property
    def is_plain_fp8(self):
        return self.is_fp8 and not self.has_scales

    @property
    def tile_rows(self):
        return tuned.rows_class(self.rows)

    @property
    def cache_dtype(self):
        return torch.float8_e4m3fn if self.is_fp8 else self.dtype


_WIDTHS = {"kv_lora_rank": int, "qk_rope_head_dim": int}


@dataclass(frozen=True)
class MlaDecodeConfig(
    Config,
    family="mla",
    case=_WIDTHS | {"tile_rows": int, "cache_dtype": str},
    buckets=("seqlen_k", "page_size", "rows"),
):
    """One program computes block_m rows, heads of the queries of a sequence, in a loop over tiles of block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, case):
        if case.arch == "interpreter":
            return cls(16 if case.rows <= 16 else 64, 64, 4, 1)
        table = case.gpu.configs
        if case.dtype == torch.float32:
            chunked = not (case.gpu.is_amd or case.is_fp8 or _FLOAT_CHUNKS.obstacle(case))
            return _FLOAT_CHUNKS if chunked else _FLOAT
        configs = _FLOAT8 if case.is_fp8 else _HALF
        if case.qk_rope_head_dim == 0:
            configs = configs | _WITHOUT_ROPE
        return configs[table][case.rows > 16]

    @classmethod
    def search_space(cls, case):
        """Those that have an `obstacle` are left out."""
        rows = (16,) if case.rows <= 16 else (16, 32, 64)
        stages = (1, 2) if case.gpu.is_amd else (1, 2, 3, 4)
        candidates = itertools.starmap(cls, itertools.product(rows, (16, 32, 64), (4, 8), stages))
        return [config for config in dict.fromkeys([cls.default(case), *candidates]) if not config.obstacle(case)]

    def obstacle(self, case):
        return case.gpu.lacks(self.shared_bytes(case))

    def shared_bytes(self, case):
        """Least shared memory for the tiles of queries and keys. With one stage fp8 keys are decoded in registers."""
        width = case.kv_lora_rank + case.qk_rope_head_dim
        q = self.block_m * width * case.dtype.itemsize
        keys = self.block_n * width * case.cache_dtype.itemsize
        if case.gpu.is_amd:
            return max(q, keys)
        if case.is_fp8 and self.num_stages == 1:
            return q
        # mma.sync multiplies fewer than 64 rows on every GPU.
        buffers = case.gpu.buffers(self.num_stages) if self.block_m >= 64 else self.num_stages - 1
        return q + max(buffers, 1) * keys


@dataclass(frozen=True)
class MlaHopperConfig(
    Config,
    family="mla_hopper",
    case=_WIDTHS | {"cache_dtype": str},
    buckets=("seqlen_k", "rows"),
    kernel="mla/hopper.py",
):
    """One program of hopper.py computes block_m rows in a loop over tiles of block_n keys, which it loads num_stages
    ahead: two, because its two groups alternate, and no more fit."""

    num_stages: int

    block_m = block_n = 64
    groups = 2

    @classmethod
    def supports(cls, case):
        if not (case.gpu.wgmma and case.is_paged and (case.kv_lora_rank, case.qk_rope_head_dim) in _HOPPER):
            return False
        if case.is_fp8:  # rotary keys of rows with scales are bf16
            return case.has_scales and case.dtype == torch.bfloat16
        return case.dtype != torch.float32

    @classmethod
    def default(cls, case):
        return _HOPPER[case.kv_lora_rank, case.qk_rope_head_dim]

    @classmethod
    def choose(cls, case, wanted):
        """The config of a decode step; None means the portable kernel. wanted as in `HopperConfig.choose` of flash."""
        if wanted == "portable" or not cls.supports(case) or not tuned.may_replace(MlaDecodeConfig, cls):
            return None
        return tuned.choose(cls, case) if wanted == "hopper" or tuned.is_chosen(cls, case) else None

    @classmethod
    def search_space(cls, case):
        return [cls.default(case)] if cls.supports(case) else []

    def obstacle(self, case):
        return None if self.num_stages == self.groups else "the kernel's two groups alternate over two tiles"


# Configs of hopper.py by (kv_lora_rank, qk_rope_head_dim).
_HOPPER = {(512, 64): MlaHopperConfig(2)}

# Configs for up to 16 rows and for more, per architecture, with 16-bit inputs. With three stages two tiles of keys are
# in shared memory: one is loaded while the other is multiplied. If only one program then fits on an SM where two did,
# or tiles have to be smaller, `lock` is lower, and the default has two stages. sm_120 spills with 32 rows, sm_86 does
# not.
_HALF = {
    "sm_80": (MlaDecodeConfig(16, 32, 4, 2), MlaDecodeConfig(32, 64, 8, 2)),
    "sm_86": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(32, 32, 4, 2)),
    "sm_90": (MlaDecodeConfig(16, 64, 4, 2), MlaDecodeConfig(64, 64, 8, 2)),
    "sm_100": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(32, 64, 8, 3)),
    "sm_120": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "gfx942": (MlaDecodeConfig(16, 32, 4, 1), MlaDecodeConfig(32, 32, 4, 1)),
}
# fp8 elements take half the room in shared memory, and are decoded in registers: see latents.py. sm_86 and sm_120 spill
# with 32 rows.
_FLOAT8 = {
    "sm_80": (MlaDecodeConfig(16, 32, 4, 2), MlaDecodeConfig(32, 64, 8, 2)),
    "sm_86": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "sm_90": (MlaDecodeConfig(16, 64, 4, 2), MlaDecodeConfig(64, 64, 8, 2)),
    "sm_100": (MlaDecodeConfig(16, 64, 4, 2), MlaDecodeConfig(32, 64, 8, 2)),
    "sm_120": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "gfx942": (MlaDecodeConfig(16, 16, 4, 1), MlaDecodeConfig(16, 16, 4, 1)),
}
# Without rotary keys a 64x64 tile is compiled to 240 KB of shared memory in place of 216, and sm_90 has 227.
# For more than 16 rows packed queries spill around the loop, not in it: up to 40 bytes on sm_86, 8 on sm_90.
_WITHOUT_ROPE = {"sm_90": (_HALF["sm_90"][0], MlaDecodeConfig(64, 32, 8, 2))}
# In fp32 16 keys leave half of eight warps without work, and tf32x3 spilled 4600 instructions in the loop.
_FLOAT_CHUNKS = MlaDecodeConfig(16, 32, 8, 1)
_FLOAT = MlaDecodeConfig(16, 16, 4, 1)


def split_work(key, block_m, block_n, num_programs, seqlen_k, resident=1):
    """The SplitWork of a decode step with this AbsorbedKey and tiles of block_m rows and block_n keys."""
    (shape_q, _), (shape_pe, _), _ = key.layout
    batch, seqlen_q, num_heads, kv_lora_rank = shape_q
    width = kv_lora_rank + shape_pe[3]
    return SplitWork(
        num_programs,
        num_key_tiles=-(-seqlen_k // block_n),
        tile_elements=block_n * width,
        element_size=key.cache_dtype.itemsize,
        program_rate=PROGRAM_RATE,
        tile_flops=2 * block_m * block_n * (width + kv_lora_rank),
        num_rows=batch * seqlen_q * num_heads,
        row_elements=kv_lora_rank,
        num_sms=key.num_sms,
        resident=resident,
        has_merge=key.is_projected,
    )


class MlaPrefillCase(NamedTuple):
    """What of a prefill the config depends on.

    fused: the kernel computes keys and values from latent vectors. widest: the largest of a head's three
    dimensions, padded. seqlen_k: of the longest sequence.
    """

    arch: str
    dtype: torch.dtype
    fused: bool
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    widest: int
    seqlen_k: int = 1

    @property
    def gpu(self):
        return gpu_of(self.arch)

    @property
    def is_tuned(self):
        return True


_HEAD = {"qk_nope_head_dim": int, "qk_rope_head_dim": int, "v_head_dim": int}


@dataclass(frozen=True)
class MlaPrefillConfig(Config, family="mla_prefill", case={"fused": bool} | _HEAD):
    """One program computes block_m queries of a head in a loop over tiles of block_n keys. If it computes keys from
    latent vectors, it does so with block_c elements of these at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_c: int = 64

    @classmethod
    def default(cls, case):
        if case.arch == "interpreter":
            return cls(64, 64, 4, 1)
        table = case.gpu.configs
        if case.dtype == torch.float32:
            return cls(32 if case.widest <= 256 else 16, 16, 8, 1, 16)
        if case.widest <= 128:
            return _PREFILL[table][case.fused]
        return next(config for width, config in _PREFILL_WIDE if case.widest <= width)

    @classmethod
    def search_space(cls, case):
        """Those that have an `obstacle` are left out."""
        default = cls.default(case)
        stages = (1, 2) if case.gpu.is_amd else (1, 2, 3)
        latent_tiles = (32, 64, 128) if case.fused else (default.block_c,)
        candidates = itertools.starmap(cls, itertools.product((64, 128), (32, 64, 128), (4, 8), stages, latent_tiles))
        return [config for config in dict.fromkeys([default, *candidates]) if not config.obstacle(case)]

    def obstacle(self, case):
        return case.gpu.lacks(self._shared_bytes(case))

    def _shared_bytes(self, case):
        """Least shared memory for the tiles of queries, and of keys and values, or of latent vectors and weights."""
        size = case.dtype.itemsize
        q = self.block_m * (case.qk_nope_head_dim + case.qk_rope_head_dim) * size
        k = self.block_n * (case.qk_nope_head_dim + case.qk_rope_head_dim) * size
        v = self.block_n * case.v_head_dim * size
        if case.fused:
            k, v = self.block_n * self.block_c * size, self.block_c * (case.qk_nope_head_dim + case.v_head_dim) * size
        if case.gpu.is_amd:
            return max(q, k) if case.fused else max(q, k, v)
        if self.num_stages == 1:
            return q + k if case.fused else q + max(k, v)
        buffers = self.num_stages - 1 if case.fused else case.gpu.buffers(self.num_stages)
        return q + buffers * (k + v)


# Configs for keys and values that are loaded, and for those that are computed from latent vectors, at head dims up to
# 128, as in DeepSeek's models, with 16-bit inputs. The loop over latent elements does not spill. Around it, once per
# tile of keys, sm_90 spills up to 140 bytes.
_PREFILL = {
    "sm_80": (MlaPrefillConfig(128, 32, 8, 3), MlaPrefillConfig(128, 32, 8, 3)),
    "sm_86": (MlaPrefillConfig(128, 32, 8, 2), MlaPrefillConfig(64, 32, 8, 2, 32)),
    "sm_90": (MlaPrefillConfig(128, 64, 8, 2), MlaPrefillConfig(128, 64, 8, 2)),
    "sm_100": (MlaPrefillConfig(128, 64, 8, 2), MlaPrefillConfig(128, 32, 8, 2)),
    "sm_120": (MlaPrefillConfig(128, 32, 8, 2), MlaPrefillConfig(64, 32, 8, 2, 32)),
    "gfx942": (MlaPrefillConfig(128, 64, 4, 1), MlaPrefillConfig(128, 32, 4, 1, 32)),
}
# Configs for wider heads, by the largest padded dimension, on every architecture: they fit.
_PREFILL_WIDE = ((256, MlaPrefillConfig(64, 32, 8, 1, 32)), (512, MlaPrefillConfig(32, 16, 8, 1, 32)))
