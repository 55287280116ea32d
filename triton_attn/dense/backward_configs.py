"""Tiles of the backward kernels: the default by look-up, the space that a sweep searches, and what cannot run.

Defaults were chosen as those of the forward kernel, see configs.py: from compiled code, not from timings. Of the tiles
that fit and spill nothing on Triton 3.6.0 and 3.9.0 they have the most `lock` in perf/model. Some spill a little for
more of it: tests/flash/test_backward_compiled.py lists them.

TFLOP/s on sm_90, fp16, causal, Triton 3.6.0/3.9.0. The split schedule runs dkdv and dq, which do seven matmuls where
five are counted: 5 / (4 / dkdv + 3 / dq).

    head dim    dkdv       dq         split      fused
    64          580/605    569/569    411/420    565/588
    96          569/580    624/624    423/427    462/466
    128         668/677    658/658    474/478    625/639
    160         597/598    649/653    441/443    576/569
    192, 128    619/624    668/663    456/457    599/599
    192         581/588    677/678    442/445    318/314
    256         372/374    689/713    331/335    374/365

So the fused schedule is the default, with three exceptions:

- Head dim 128 on sm_90. An H100 (Triton 3.6.0, causal, 4 sequences of 4,096 tokens, 16 heads) took 2.22 ms for a fused
  pass, and 0.99 ms for dkdv and 0.74 ms for dq with the tiles that were fastest, those of the table.
- Where its transposed dS does not fit in registers: on sm_90 at 192, and at 256 without TMA.
- With mma.sync. On sm_80 (Triton 3.9.0) the fused schedule has 108 and the split one 111 at head dim 128, 59 and 91 at
  256.

A warp of mma.sync takes 16 rows, four warps of wgmma take 64. Where a tile has more warps than rows for them, as dkdv
has at 256, warps repeat each other's matmuls. The split schedule also runs for deterministic=True, and for calls that
want dq alone, or dk and dv alone. Under head dim 128 the loop of dq is bound by exp2 and conversions, not by matmuls.
"""

import itertools
from dataclasses import dataclass

from .._host.config import Config
from .tiles import Tile, padded_head_dim, tma_obstacle

KERNELS = "dkdv", "dq", "fused"


@dataclass(frozen=True)
class BackwardConfig(Config, family="flash_backward", case={"head_dim": int, "head_dim_v": int, "causal": bool}):
    """dkdv and dq are the split schedule; fused, where it is faster, computes all three in one kernel.

    In dkdv and fused a program takes block_n keys and walks over queries block_m at a time, in dq the other way round.
    """

    dkdv: Tile
    dq: Tile
    fused: Tile | None

    @classmethod
    def default(cls, case):
        """By look-up. The row is the first of the table that reaches the mean of the two head dims, padded as the
        kernels pad them, and nearly the width of dq. causal chooses nothing so far."""
        if case.arch == "interpreter":
            return cls(*3 * (Tile(64, 64, 4, 1),))
        if case.is_half:
            tables = _HALF[case.gpu.configs]
            table = tables.get(case.access, tables["vector"])
        else:
            table = _FLOAT
        head_dim, head_dim_v = padded_head_dim(case.head_dim), padded_head_dim(case.head_dim_v)
        width = max((head_dim + head_dim_v) / 2, head_dim * 5 / 6)
        return next(cls(*tiles) for limit, *tiles in table if width <= limit)

    @classmethod
    def search_space(cls, case, kernel):
        """Tiles of one kernel, the default's, if it has one, first; those with an `objection` are left out."""
        blocks = (32, 64, 128) if case.is_half else (16, 32, 64)
        stages = (1,) if case.gpu.is_amd else (1, 2, 3)
        use_tma = (True, False) if case.gpu.tma and case.is_half else (False,)
        candidates = itertools.starmap(Tile, itertools.product(blocks, blocks, (4, 8), stages, use_tma))
        default = getattr(cls.default(case), kernel)
        tiles = dict.fromkeys([*(() if default is None else (default,)), *candidates])
        return [tile for tile in tiles if not objection(kernel, tile, case)]

    def obstacle(self, case):
        tiles = {kernel: getattr(self, kernel) for kernel in KERNELS}
        reasons = ((kernel, tile and _obstacle(kernel, tile, case)) for kernel, tile in tiles.items())
        return next((f"{kernel}: {reason}" for kernel, reason in reasons if reason), None)


def _obstacle(kernel, tile, case):
    """Of shared memory what no kernel does without: not all that `objection` expects is in it at once."""
    row, stay, pass_by = _rows(kernel, tile, case)
    least = max(stay, (tile.num_stages - 1) * pass_by) * row // (2 if case.gpu.is_amd else 1)
    return tma_obstacle(tile, case) or case.gpu.lacks(least)


def objection(kernel, tile, case):
    """Why a kernel cannot run with a tile, or cannot run well; None if nothing is against it."""
    if reason := tma_obstacle(tile, case) or case.gpu.lacks(_shared_bytes(kernel, tile, case)):
        return reason
    return None if case.gpu.tensor_memory else case.gpu.lacks_registers(_registers(kernel, tile, case))


def _rows(kernel, tile, case):
    """(bytes of a row of two inputs, rows of those that stay, of those that pass by)."""
    row = (padded_head_dim(case.head_dim) + padded_head_dim(case.head_dim_v)) * case.dtype.itemsize
    return row, *((tile.block_m, tile.block_n) if kernel == "dq" else (tile.block_n, tile.block_m))


def _shared_bytes(kernel, tile, case):
    """What the tiles of two inputs that stay and of two that pass by take, and dS where it is transposed."""
    row, stay, pass_by = _rows(kernel, tile, case)
    if case.gpu.is_amd:
        return max(stay, pass_by) * row // 2
    scores = tile.block_m * tile.block_n * case.dtype.itemsize if kernel == "fused" else 0
    return (stay + max(1, case.gpu.buffers(tile.num_stages)) * pass_by) * row + scores


def _registers(kernel, tile, case):
    """32-bit registers per thread that hold S and dP, or then the tile of dq, and what is summed over the loop."""
    head_dim, head_dim_v = padded_head_dim(case.head_dim), padded_head_dim(case.head_dim_v)
    threads = tile.num_warps * case.gpu.warp_size
    scores = 2 * tile.block_m * tile.block_n
    if kernel == "dq":
        return (scores + tile.block_m * head_dim) // threads
    if kernel == "fused":
        scores = max(scores, tile.block_m * head_dim)
    return (scores + tile.block_n * (head_dim + head_dim_v)) // threads


def _tma(*tile):
    return Tile(*tile, use_tma=True)


# (largest width, dkdv, dq, fused) per architecture and access, see `BackwardConfig.default`; 16-bit inputs.
_HALF = {
    "sm_80": {
        "vector": (
            (64, Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), None),
            (96, Tile(32, 64, 4, 2), Tile(128, 64, 8, 2), None),
            (128, Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), None),
            (160, Tile(16, 128, 8, 2), Tile(128, 32, 8, 3), None),
            (192, Tile(64, 32, 8, 2), Tile(128, 32, 8, 3), None),
            (256, Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
        ),
    },
    "sm_86": {
        "vector": (
            (64, Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), None),
            (96, Tile(32, 64, 4, 2), Tile(128, 32, 8, 2), None),
            (128, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            (160, Tile(16, 128, 8, 2), Tile(64, 32, 4, 2), None),
            (192, Tile(64, 32, 8, 1), Tile(64, 32, 4, 2), None),
            (256, Tile(32, 32, 8, 1), Tile(32, 64, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
        ),
    },
    "sm_90": {
        "tma": (
            (32, _tma(128, 128, 8, 2), _tma(128, 128, 8, 2), _tma(128, 128, 8, 2)),
            (48, _tma(64, 64, 4, 2), _tma(128, 128, 8, 2), _tma(128, 128, 8, 2)),
            (64, _tma(128, 128, 8, 2), _tma(128, 128, 8, 2), _tma(128, 128, 8, 2)),
            (96, _tma(64, 128, 8, 2), _tma(128, 128, 8, 2), _tma(64, 128, 8, 2)),
            (128, _tma(64, 64, 4, 2), _tma(128, 64, 8, 3), None),
            (160, _tma(64, 128, 8, 1), _tma(128, 64, 8, 2), _tma(64, 128, 8, 1)),
            (192, _tma(32, 128, 8, 2), _tma(128, 64, 8, 2), None),
            (256, _tma(64, 64, 8, 1), _tma(128, 64, 8, 1), _tma(64, 64, 8, 1)),
        ),
        "vector": (
            (64, Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
            (128, Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            (256, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
        ),
    },
    "sm_100": {
        "tma": (
            # dq: of a head dim in two pieces (48, 96), 128 x 128 overflows tensor memory on Triton 3.6.0.
            (64, _tma(64, 128, 4, 2), _tma(128, 64, 4, 2), _tma(64, 128, 4, 2)),
            (96, _tma(64, 128, 4, 2), _tma(128, 64, 4, 2), _tma(64, 64, 4, 2)),
            (128, _tma(64, 128, 8, 2), _tma(128, 64, 4, 2), _tma(64, 64, 4, 2)),
            (160, _tma(32, 128, 8, 1), _tma(128, 64, 8, 1), None),  # fused: 8 KB spilled in the loop
            (256, _tma(64, 64, 4, 1), _tma(128, 64, 8, 1), _tma(64, 32, 8, 1)),
        ),
        "vector": (
            (128, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            (256, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
        ),
    },
    "gfx942": {
        "vector": (
            (64, *3 * (Tile(64, 64, 4, 1),)),
            (128, Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
            (256, *3 * (Tile(32, 32, 4, 1),)),
        ),
        "scalar": ((256, *3 * (Tile(32, 32, 4, 1),)),),
    },
}
_HALF["sm_120"] = _HALF["sm_86"]

_FLOAT = (
    (64, *3 * (Tile(32, 32, 8, 1),)),
    (256, *3 * (Tile(16, 16, 8, 1),)),
)
