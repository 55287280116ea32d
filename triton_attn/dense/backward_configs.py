"""Configs of the backward kernels: the defaults, the search space of a sweep, and which configs cannot run.

Defaults were chosen like those of the forward kernel (flash/configs.py), from compiled code, not from timings. They
have the highest `lock` in perf/model among the tiles that fit and do not spill on Triton 3.6.0 and 3.9.0. A few do
spill, where their `lock` is higher all the same: tests/flash/test_backward_compiled.py lists them.

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
    320         514/517    644/656    402/406    -
    384         541/545    666/681    420/426    -
    512         567/580    701/727    441/454    -

Wider than 384, or 256 without TMA, dkdv is launched twice, for dk (697/720 at 512) and for dv (726/734), which do five
matmuls where four are counted. Columns past the head dim (see `padded_head_dim`) are counted too: of head dim 385 the
work is 385 / 512 of the last figures, 331/341.

Where dk is apart from dv, and in dq, TMA loads wide tensors in halves that take the same shared memory, one of them
twice, for two matmuls. So tiles of 128 rows fit, whose scores wgmma computes at its full rate: 64 x 64 scores of eight
warps wait for shared memory. Tiles of 64 rows have 352/357 at 512.

The fused schedule is therefore the default, with three exceptions:

- Head dim 128 on sm_90. On an H100 (Triton 3.6.0, causal, 4 sequences of 4,096 tokens, 16 heads) a fused pass took
  2.22 ms. With the fastest tiles, those of the table, dkdv took 0.99 ms and dq 0.74 ms.
- Head dim 192 on sm_90, and 256 without TMA: the transposed dS does not fit in registers.
- GPUs with mma.sync. On sm_80 (Triton 3.9.0) the fused schedule has 108 and the split one 111 at head dim 128, and 59
  and 91 at 256.

A warp needs 16 rows for mma.sync, and four warps need 64 rows for wgmma. If a tile has fewer rows for its warps, as in
dkdv at 256, warps repeat each other's matmuls. The split schedule also runs for deterministic=True, and for calls that
need only dq, or only dk and dv. Below head dim 128 the loop of dq is bound by exp2 and conversions, not by matmuls.
"""

import itertools
from dataclasses import dataclass

from .._host.config import Config
from .._host.gpu import gpu_of, repeats_rows
from .tiles import CHUNK, HALF, Tile, padded_head_dim, tma_obstacle

KERNELS = "dkdv", "dq", "fused"
WIDEST_IN_ONE_LAUNCH = 384  # head dim, of dk and dv together on any GPU
WIDEST_WITH_FACTOR = 320


def dk_apart_from_dv(arch, head_dims, tile, has_factor=False):
    """Whether dkdv is launched twice, for dk and for dv, and never fused: registers hold 64 rows of 512 columns.

    With TMA, which needs no registers for addresses, wgmma has room for the sums of both up to WIDEST_IN_ONE_LAUNCH;
    with has_factor (softcap or dropout, which need registers of their own) up to WIDEST_WITH_FACTOR.
    """
    padded = [padded_head_dim(head_dim) for head_dim in head_dims]
    widest = WIDEST_WITH_FACTOR if has_factor else WIDEST_IN_ONE_LAUNCH
    fits = gpu_of(arch).wgmma and tile.use_tma and max(padded) <= widest
    return sum(padded) > 512 and not fits


@dataclass(frozen=True)
class BackwardConfig(Config, family="flash_backward", case={"head_dim": int, "head_dim_v": int, "causal": bool}):
    """dkdv and dq form the split schedule. fused computes all three gradients in one kernel; None where it is slower.

    In dkdv and fused a program computes block_n keys in a loop over tiles of block_m queries; in dq it is the other way
    round.
    """

    dkdv: Tile
    dq: Tile
    fused: Tile | None

    @classmethod
    def default(cls, case):
        """The first row of the table whose width is at least the mean of the two head dims and 5/6 of head_dim, the
        width of dq; the last row where softcap or dropout part dk from dv. Head dims are padded as in the kernels.
        causal has no effect so far."""
        if case.arch == "interpreter":
            return cls(*3 * (Tile(64, 64, 4, 1),))
        if case.is_half:
            tables = _HALF[case.gpu.configs]
            table = tables.get(case.access, tables["vector"])
        else:
            table = _FLOAT
        head_dim, head_dim_v = padded_head_dim(case.head_dim), padded_head_dim(case.head_dim_v)
        width = max((head_dim + head_dim_v) / 2, head_dim * 5 / 6)
        if (case.softcap or case.dropout) and WIDEST_WITH_FACTOR < width <= WIDEST_IN_ONE_LAUNCH:
            width = 512  # dk is apart from dv
        return next(cls(*tiles) for limit, *tiles in table if width <= limit)

    @classmethod
    def search_space(cls, case, kernel):
        """All tiles of one kernel without an `objection`. The default, if there is one, comes first."""
        wide = max(case.head_dim, case.head_dim_v) > HALF
        blocks = (16, 32, 64, 128) if wide and case.is_half else (32, 64, 128) if case.is_half else (16, 32, 64)
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


def _is_apart(tile, case):
    return dk_apart_from_dv(case.arch, (case.head_dim, case.head_dim_v), tile, case.softcap or case.dropout)


def _obstacle(kernel, tile, case):
    """Why a kernel cannot run with a tile. This counts the least shared memory: not all tiles that `objection` counts
    are live at once, unless dk and dv are apart."""
    row, stay, pass_by = _rows(kernel, tile, case)
    least = max(stay, (tile.num_stages - 1) * pass_by) * row // (2 if case.gpu.is_amd else 1)
    if kernel != "fused" and _is_apart(tile, case):
        least = shared_bytes(kernel, tile, case)
    return tma_obstacle(tile, case) or case.gpu.lacks(least)


def objection(kernel, tile, case):
    """Why a kernel cannot run with a tile, or cannot run well; None if it can."""
    if reason := tma_obstacle(tile, case) or case.gpu.lacks(shared_bytes(kernel, tile, case)):
        return reason
    return None if case.gpu.tensor_memory else case.gpu.lacks_registers(_registers(kernel, tile, case))


def _rows(kernel, tile, case):
    """(bytes of a row of two inputs, rows that stay throughout the loop, rows that a trip of the loop loads)."""
    row = (padded_head_dim(case.head_dim) + padded_head_dim(case.head_dim_v)) * case.dtype.itemsize
    return row, *((tile.block_m, tile.block_n) if kernel == "dq" else (tile.block_n, tile.block_m))


def shared_bytes(kernel, tile, case):
    """Shared memory for the two inputs that stay, the two that the loop loads, and the transposed dS."""
    row, stay, pass_by = _rows(kernel, tile, case)
    if case.gpu.is_amd:
        return max(stay, pass_by) * row // 2
    if case.in_chunks:  # the compiler keeps what it loads for scores and for a sum
        chunks = (stay + pass_by) * CHUNK
        return (pass_by * padded_head_dim(case.head_dim) + chunks) * case.dtype.itemsize
    scores = tile.block_m * tile.block_n * case.dtype.itemsize
    halved = _is_halved(kernel, stay, tile, case)
    if halved and tile.use_tma and tile.num_stages == 1:  # every half takes the same shared memory
        return stay * row + pass_by * HALF * case.dtype.itemsize + scores
    if halved and tile.use_tma:  # the tensor that is loaded twice
        passing = pass_by * (row + padded_head_dim(case.head_dim) * case.dtype.itemsize)
    else:
        passing = pass_by * (row - halved * max(0, padded_head_dim(case.head_dim_v) - HALF) * case.dtype.itemsize)
    buffers = max(1, case.gpu.buffers(tile.num_stages))
    return stay * row + buffers * passing + (scores if kernel == "fused" else 0)


def _is_halved(kernel, rows, tile, case):
    """Whether the loop loads dO or V in halves, one after the other, see `dot_halves`; with TMA q or k too."""
    if kernel == "fused" or max(case.head_dim, case.head_dim_v) <= HALF:
        return False
    return repeats_rows(case.arch, rows, tile.num_warps) and (kernel == "dq" or _is_apart(tile, case))


def _registers(kernel, tile, case):
    """32-bit registers per thread that hold S and dP, or then the tile of dq, and what is summed over the loop."""
    head_dim, head_dim_v = padded_head_dim(case.head_dim), padded_head_dim(case.head_dim_v)
    threads = tile.num_warps * case.gpu.warp_size
    scores = 2 * tile.block_m * tile.block_n
    if kernel == "dq":
        return (scores + tile.block_m * head_dim) // threads
    if kernel == "fused":
        scores = max(scores, tile.block_m * head_dim)
    columns = max(head_dim, head_dim_v) if _is_apart(tile, case) else head_dim + head_dim_v
    return (scores + tile.block_n * columns) // threads


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
            (512, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
            (512, Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), None),
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
            (512, Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
            (512, Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), None),
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
            (384, _tma(64, 64, 8, 1), _tma(64, 128, 8, 1), None),
            (512, _tma(128, 64, 8, 1), _tma(64, 128, 8, 1), None),
        ),
        "vector": (
            (64, Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
            (128, Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            (256, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), None),
            (512, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
            (512, Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), None),
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
            (512, _tma(32, 64, 8, 1), _tma(64, 32, 8, 1), None),
        ),
        "vector": (
            (128, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            (256, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
            (512, Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), None),
        ),
        "scalar": (
            (80, Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), None),
            (256, *3 * (Tile(32, 32, 8, 1),)),
            (512, Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), None),
        ),
    },
    "gfx942": {
        "vector": (
            (64, *3 * (Tile(64, 64, 4, 1),)),
            (128, Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
            (256, *3 * (Tile(32, 32, 4, 1),)),
            (512, *2 * (Tile(16, 16, 4, 1),), None),
        ),
        "scalar": (
            (256, *3 * (Tile(32, 32, 4, 1),)),
            (512, *2 * (Tile(16, 16, 4, 1),), None),
        ),
    },
}
_HALF["sm_120"] = _HALF["sm_86"]

_FLOAT = (
    (64, *3 * (Tile(32, 32, 8, 1),)),
    (256, *3 * (Tile(16, 16, 8, 1),)),
    (512, *2 * (Tile(16, 16, 8, 1),), None),
)
