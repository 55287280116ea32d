"""Configs of the forward kernel: the defaults, the search space of a sweep, and which configs cannot run.

Defaults were chosen from compiled code, not from timings: of the tiles that fit and do not spill on Triton 3.6.0 and
3.9.0, in every variant of the kernel, they have the highest `lock` in perf/model. Where more stages fit at the same
`lock`, within its noise, they were taken, because they hide a latency that the model does not include. An H100 confirms
it at head dim 128 (Triton 3.6.0, causal, 4,096 tokens): 452 TFLOP/s with three stages, 408 with two.

On sm_90 the descriptor form (TMA) beats the pointer form. fp16, head dim 128, tiles of 128 x 128, 8 warps, 2 stages,
Triton 3.6.0/3.9.0: 190/188 registers, no spill and `lock` 611/618 TFLOP/s against 254/254 registers, 80/188 bytes
spilled and 588/603. At head dim 256, 128 x 64: `lock` 655/652 against 621/626. At 64 both are bound by exp2, 462/464
against 467. On sm_100 the descriptor form of the same tiles does not spill; the pointer form spills 20/112 bytes.

At head dims above 256 without TMA, keys and values are loaded in pieces of at most 256 columns, in fp32 in chunks of 64
(docs/design.md).
"""

import itertools
from dataclasses import dataclass, replace

from .._host import tuned
from .._host.config import Config
from ..dense.tiles import CHUNK, Tile, padded_head_dim, tma_obstacle


class FlashConfig(Tile, family="flash", case={"head_dim": int, "head_dim_v": int, "causal": bool}):
    """One program computes block_m queries in a loop over tiles of block_n keys, which it loads num_stages ahead."""

    @classmethod
    def default(cls, case):
        """The first row of the table that fits and whose width is at least max((head_dim + head_dim_v) / 2,
        head_dim_v), with head dims padded as in the kernel: shared memory holds tiles of both, registers only the
        output.

        causal has no effect so far: a mask adds partial tiles, and the loop over full tiles stays the same.
        """
        if case.arch == "interpreter":
            return cls(64, 64, 4, 1)
        tables = _HALF[case.gpu.configs]
        access = case.access if case.access in tables else "vector"
        table = tables[access] if case.is_half else _FLOAT[case.precision]
        wide_enough = [row for row in table if _width(case.head_dim, case.head_dim_v) <= row[0]]
        fitting = [row for row in wide_enough if not case.gpu.lacks(row[1]._shared_bytes(case))]
        width, config = (fitting or wide_enough)[0]
        special = (_SOFTCAP if case.softcap else {}) | (_DROPOUT if case.dropout else {})
        return special.get((case.gpu.configs, access, width), config) if case.is_half else config

    @classmethod
    def search_space(cls, case):
        """All configs without an `objection`."""
        rows, keys = (64, 128), (32, 64, 128)
        if not case.is_half or max(case.head_dim, case.head_dim_v) > 256:
            rows, keys = (16, 32, *rows), (16, *keys)
        stages = (1, 2) if case.gpu.is_amd else (1, 2, 3, 4)
        use_tma = (True, False) if case.is_half else (False,)
        candidates = itertools.starmap(cls, itertools.product(rows, keys, (4, 8), stages, use_tma))
        return [config for config in dict.fromkeys([cls.default(case), *candidates]) if not config.objection(case)]

    def obstacle(self, case):
        return tma_obstacle(self, case) or case.gpu.lacks(self._shared_bytes(case))

    def objection(self, case):
        """Why the config cannot run, or cannot run well; None if it can."""
        gpu = case.gpu
        if gpu.multiplies_shared_memory and case.is_half and self.block_m < 64:
            return "the matrix instructions need 64 rows"
        if reason := self.obstacle(case) or gpu.lacks_registers(self._registers(case)):
            return reason
        columns = (self.block_n + padded_head_dim(case.head_dim_v)) * self.block_m // 128
        if gpu.tensor_memory and columns > 512:
            return f"{columns} columns of tensor memory, the GPU has 512"
        return None

    def _shared_bytes(self, case):
        """Shared memory for the tiles of q, k and v."""
        size = case.dtype.itemsize
        q = self.block_m * padded_head_dim(case.head_dim) * size
        k, v = (self.block_n * padded_head_dim(dim) * size for dim in (case.head_dim, case.head_dim_v))
        if case.gpu.is_amd:
            return max(q, k, v)
        if case.in_chunks:
            q *= 2 if case.precision == "tf32x3" else 1
        if case.in_chunks and self.num_stages == 1:
            return q + self.block_n * CHUNK * size
        if self.num_stages == 1:
            return q + max(k, v)
        return q + case.gpu.buffers(self.num_stages) * (k + v)

    def _registers(self, case):
        """32-bit registers per thread for scores, weights and, without tensor memory, the output."""
        scores = self.block_m * self.block_n
        output = 0 if case.gpu.tensor_memory else self.block_m * padded_head_dim(case.head_dim_v)
        return (scores + scores * case.dtype.itemsize // 4 + output) // (self.num_warps * case.gpu.warp_size)


@dataclass(frozen=True)
class HopperConfig(Config, family="flash_hopper", case={"head_dim": int, "causal": bool}, kernel="flash/hopper.py"):
    """One program of hopper.py computes 64 queries for each of its groups of four warps, in a loop over tiles of
    block_n keys, which it loads num_stages ahead. lazy: outputs are rescaled only where a maximum moved far. tiles: it
    does so for as many tiles of queries of one head, or fewer where programs would not fill the GPU."""

    block_n: int
    groups: int
    num_stages: int
    lazy: bool = True
    tiles: int = 1

    @property
    def block_m(self):
        return 64 * self.groups

    @classmethod
    def supports(cls, case):
        return case.gpu.wgmma and case.is_half and HOPPER_HEAD_DIMS.get(case.head_dim) == case.head_dim_v

    @classmethod
    def default(cls, case):
        """With options, see `choose`, three groups spill in the loop on Triton 3.9.0: a thread has 160 registers."""
        config = _HOPPER[case.head_dim, case.causal]
        return config if case.is_plain else replace(config, groups=2)

    @classmethod
    def choose(cls, case, wanted):
        """The config of a call; None means the portable kernel. case.is_plain: also no window but causal, no sinks and
        whole sequences, since sweeps time no others.

        With wanted "auto" a tuned table must have one: it shows that this kernel was right and fast on such a GPU with
        this Triton. With "hopper" every supported call has one, with "portable" none.
        """
        if wanted == "portable" or not cls.supports(case) or not tuned.may_replace(FlashConfig, cls):
            return None
        is_wanted = wanted == "hopper" or (case.is_tuned and tuned.is_chosen(cls, case))
        return tuned.choose(cls, case) if is_wanted else None

    @classmethod
    def search_space(cls, case):
        """Empty if the kernel does not support the case."""
        if not cls.supports(case):
            return []
        # Three groups have 160 registers a thread, where scores, weights and output fit only at head dim 64. On an H100
        # tiles of 64 keys were up to 20 % slower where 128 fit.
        default, groups = cls.default(case), (2, 3) if case.head_dim == 64 else (2,)
        candidates = itertools.starmap(cls, itertools.product((default.block_n,), groups, (2, 3, 4), (True, False)))
        return list(dict.fromkeys([default, *(config for config in candidates if not config.obstacle(case))]))

    def obstacle(self, case):
        if self.block_n > 128 or self.groups not in (2, 3):
            return "the kernel has 2 or 3 groups and tiles of at most 128 keys"
        if self.tiles > 1 and case.head_dim > 128:
            return "shared memory has no room for queries and results at head dims above 128"
        # Barriers need less than 2 KB.
        queries = self.block_m * (case.head_dim + (case.head_dim_v if self.tiles > 1 else 0))
        keys_and_values = self.block_n * self.num_stages * (case.head_dim + case.head_dim_v)
        return case.gpu.lacks((queries + keys_and_values) * case.dtype.itemsize + 2048)


# (largest width, config) per architecture and access, see `FlashConfig.default`; 16-bit inputs.
_HALF = {
    "sm_80": {
        "vector": (
            (32, FlashConfig(128, 64, 8, 3)),
            (48, FlashConfig(128, 32, 4, 4)),
            (64, FlashConfig(128, 64, 4, 3)),
            (96, FlashConfig(128, 64, 8, 3)),
            (192, FlashConfig(128, 32, 8, 3)),
            (256, FlashConfig(64, 64, 8, 2)),
            (320, FlashConfig(32, 64, 8, 1)),
            (512, FlashConfig(64, 32, 8, 1)),
        ),
        "scalar": (
            (128, FlashConfig(128, 32, 8, 1)),
            (256, FlashConfig(32, 16, 4, 1)),
            (512, FlashConfig(32, 16, 8, 1)),
        ),
    },
    "sm_86": {
        "vector": (
            (64, FlashConfig(128, 64, 8, 2)),
            (128, FlashConfig(128, 32, 8, 2)),
            (192, FlashConfig(128, 16, 8, 2)),
            (256, FlashConfig(64, 32, 8, 2)),
            (320, FlashConfig(32, 64, 8, 1)),
            (512, FlashConfig(64, 32, 8, 1)),
        ),
        "scalar": (
            (128, FlashConfig(128, 32, 8, 1)),
            (256, FlashConfig(32, 16, 4, 1)),
            (512, FlashConfig(32, 16, 8, 1)),
        ),
    },
    "sm_90": {
        "tma": (
            (96, FlashConfig(128, 128, 8, 3, use_tma=True)),
            (128, FlashConfig(128, 128, 8, 3, use_tma=True)),
            (160, FlashConfig(128, 128, 8, 2, use_tma=True)),
            (192, FlashConfig(128, 64, 8, 3, use_tma=True)),
            (256, FlashConfig(128, 64, 8, 2, use_tma=True)),
            (320, FlashConfig(128, 32, 8, 2, use_tma=True)),
            (512, FlashConfig(64, 64, 8, 1, use_tma=True)),
        ),
        "vector": (
            (192, FlashConfig(128, 64, 8, 3)),
            (256, FlashConfig(128, 32, 8, 2)),
            (512, FlashConfig(64, 32, 8, 2)),
        ),
        "scalar": (
            (128, FlashConfig(128, 16, 8, 1)),
            (256, FlashConfig(32, 16, 4, 1)),
            (512, FlashConfig(32, 16, 8, 1)),
        ),
    },
    "sm_100": {
        "tma": (
            (32, FlashConfig(128, 128, 8, 2, use_tma=True)),
            (96, FlashConfig(128, 128, 8, 3, use_tma=True)),
            (128, FlashConfig(128, 64, 8, 3, use_tma=True)),
            (192, FlashConfig(128, 64, 8, 2, use_tma=True)),
            (256, FlashConfig(128, 32, 8, 2, use_tma=True)),
            (512, FlashConfig(64, 32, 8, 2, use_tma=True)),
        ),
        "vector": (
            (192, FlashConfig(128, 64, 8, 2)),
            (256, FlashConfig(128, 32, 8, 2)),
            (512, FlashConfig(64, 32, 8, 2)),
        ),
        "scalar": (
            (128, FlashConfig(128, 32, 8, 1)),
            (512, FlashConfig(64, 16, 8, 1)),
        ),
    },
    "gfx942": {
        "vector": (
            (128, FlashConfig(128, 64, 4, 1)),
            (192, FlashConfig(64, 64, 4, 1)),
            (256, FlashConfig(64, 32, 4, 1)),
            (512, FlashConfig(32, 32, 4, 1)),
        ),
        "scalar": (
            (128, FlashConfig(64, 32, 4, 1)),
            (512, FlashConfig(32, 32, 4, 1)),
        ),
    },
}
_HALF["sm_120"] = _HALF["sm_86"]

# {head dim of queries and keys: that of values} of hopper.py.
HOPPER_HEAD_DIMS = {64: 64, 96: 96, 128: 128, 192: 128, 256: 256}
# Configs of hopper.py by (head dim, causal). Tiles of 64, 128 and 256 are the fastest of those that fit, measured on an
# H100 without `lazy`. Its gain is predicted: a tenth of the instructions of a trip at head dim 128, a quarter at 256.
_HOPPER = {
    (64, False): HopperConfig(128, 3, 2),
    (64, True): HopperConfig(128, 2, 2),
    (96, False): HopperConfig(128, 2, 2),
    (96, True): HopperConfig(128, 2, 2),
    (128, False): HopperConfig(128, 2, 2),
    (128, True): HopperConfig(128, 2, 2),
    (192, False): HopperConfig(128, 2, 2),
    (192, True): HopperConfig(128, 2, 2),
    (256, False): HopperConfig(64, 2, 2),
    (256, True): HopperConfig(64, 2, 2),
}

# Tiles that leave registers for tanh, by (architecture, access, width of the row). exp2 and tanh bound the loop: its
# `lock` is 427; the row's own tile has 429 and spills.
_SOFTCAP = {("sm_90", "tma", 160): FlashConfig(128, 64, 8, 3, use_tma=True)}

# Tiles that leave room for the dropout mask: registers, or the 16 KiB of shared memory that change its layout.
_DROPOUT = {
    ("sm_80", "vector", 64): FlashConfig(128, 64, 8, 3),
    ("sm_90", "tma", 128): FlashConfig(128, 128, 8, 2, use_tma=True),
}

# fp32 inputs, by the precision of their matmuls. NVIDIA GPUs do ieee with fused multiply-adds only.
_FLOAT = {
    "ieee": (
        (64, FlashConfig(64, 32, 8, 1)),
        (128, FlashConfig(32, 32, 8, 1)),
        (384, FlashConfig(32, 16, 8, 1)),
        (512, FlashConfig(16, 16, 8, 1)),  # 32 rows spill 2 to 20 KB
    ),
    "tf32": (
        (64, FlashConfig(64, 32, 4, 2)),
        (128, FlashConfig(64, 32, 8, 2)),
        (256, FlashConfig(64, 16, 8, 1)),
        (512, FlashConfig(32, 32, 8, 1)),
    ),
    "tf32x3": (
        (64, FlashConfig(64, 32, 4, 2)),
        (128, FlashConfig(32, 32, 8, 1)),
        (256, FlashConfig(16, 16, 4, 1)),
        (512, FlashConfig(16, 32, 8, 1)),
    ),
}


def _width(head_dim, head_dim_v):
    """What rows of the tables are found by, see `FlashConfig.default`."""
    head_dim, head_dim_v = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    return max((head_dim + head_dim_v) / 2, head_dim_v)
