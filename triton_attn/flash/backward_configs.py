"""Tiles of the backward kernels: the default by look-up, the space that a sweep searches, and what cannot run.

Defaults were chosen as the forward's, see configs.py: from compiled code, not from timings. Of the tiles that fit and
spill nothing on Triton 3.6.0 and 3.9.0, those with the most `lock` in perf/model. Some spill a little for more
of it: tests/flash/test_backward_compiled.py lists them.

On sm_90, fp16, causal, in TFLOP/s on Triton 3.6.0/3.9.0; split is both kernels together, which do seven products where
five are counted: 5 / (4 / dkdv + 3 / dq).

    head dim    dkdv       dq         split      fused
    64          580/605    569/569    411/420    565/588
    96          569/580    624/624    423/427    462/466
    128         668/677    658/658    474/478    625/639
    160         597/598    649/653    441/443    576/569
    192, 128    619/624    668/663    456/457    599/599
    192         581/588    677/678    442/445    318/314
    256         372/374    689/713    331/335    374/365

So the fused schedule is the default. Not at 128 on sm_90: an H100 (Triton 3.6.0, causal, 4 sequences of 4,096 tokens,
16 heads) took 2.22 ms for a fused pass, and 0.99 ms for dkdv and 0.74 ms for dq with the tiles that it was fastest
with, those of the table. Not where its transposed dS does not fit in registers: on sm_90 at 192, without TMA at 256,
and with mma.sync (sm_80, Triton 3.9.0: 108 where the split one has 111 at head dim 128, 59 and 91 at 256), the split
one is ahead. A warp of mma.sync takes 16 rows, four of wgmma 64, and more warps than a tile has rows for repeat each
other's products, as those of dkdv at 256 do.
The split one also serves deterministic=True, and calls that want only dq or only dk and dv. Under 128 the loop of dq is
bound by exp2 and conversions, not by products.
"""

import functools
import itertools
from typing import NamedTuple

import torch

from .._host.gpu import gpu_of
from .._host.tuned import remember, tuned_config
from .configs import FlashConfig, loads_best, padded_head_dim


class BackwardConfig(NamedTuple):
    """dkdv and dq are the split schedule; fused, where it is faster, computes all three in one kernel.

    In dkdv and fused a program takes block_n keys and walks over queries block_m at a time, in dq the other way round.
    """

    dkdv: FlashConfig
    dq: FlashConfig
    fused: FlashConfig | None


def _tma(*tile):
    return FlashConfig(*tile, use_tma=True)


# (largest width, dkdv, dq, fused) per architecture and access, see `default_backward_config`; 16-bit inputs.
_HALF = {
    "sm_80": {
        "vector": (
            (64, FlashConfig(32, 64, 4, 2), FlashConfig(64, 32, 4, 2), None),
            (96, FlashConfig(32, 64, 4, 2), FlashConfig(128, 64, 8, 2), None),
            (128, FlashConfig(32, 64, 4, 2), FlashConfig(64, 64, 4, 2), None),
            (160, FlashConfig(16, 128, 8, 2), FlashConfig(128, 32, 8, 3), None),
            (192, FlashConfig(64, 32, 8, 2), FlashConfig(128, 32, 8, 3), None),
            (256, FlashConfig(64, 32, 8, 2), FlashConfig(64, 64, 8, 2), None),
        ),
        "scalar": (
            (80, FlashConfig(16, 64, 4, 1), FlashConfig(64, 32, 4, 1), None),
            (256, *3 * (FlashConfig(32, 32, 8, 1),)),
        ),
    },
    "sm_86": {
        "vector": (
            (64, FlashConfig(32, 64, 4, 2), FlashConfig(64, 32, 4, 2), None),
            (96, FlashConfig(32, 64, 4, 2), FlashConfig(128, 32, 8, 2), None),
            (128, FlashConfig(64, 64, 8, 2), FlashConfig(64, 64, 8, 2), FlashConfig(64, 64, 8, 2)),
            (160, FlashConfig(16, 128, 8, 2), FlashConfig(64, 32, 4, 2), None),
            (192, FlashConfig(64, 32, 8, 1), FlashConfig(64, 32, 4, 2), None),
            (256, FlashConfig(32, 32, 8, 1), FlashConfig(32, 64, 8, 1), None),
        ),
        "scalar": (
            (80, FlashConfig(16, 64, 4, 1), FlashConfig(64, 32, 4, 1), None),
            (256, *3 * (FlashConfig(32, 32, 8, 1),)),
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
            (64, FlashConfig(64, 128, 8, 2), FlashConfig(128, 64, 8, 2), FlashConfig(64, 128, 8, 2)),
            (128, FlashConfig(64, 64, 8, 2), FlashConfig(128, 64, 8, 2), FlashConfig(64, 64, 8, 2)),
            (256, FlashConfig(64, 64, 8, 1), FlashConfig(64, 64, 8, 1), None),
        ),
        "scalar": (
            (80, FlashConfig(16, 64, 4, 1), FlashConfig(64, 16, 4, 1), None),
            (256, *3 * (FlashConfig(32, 32, 8, 1),)),
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
            (128, FlashConfig(64, 64, 8, 2), FlashConfig(64, 64, 8, 2), FlashConfig(64, 64, 8, 2)),
            (256, FlashConfig(64, 64, 8, 1), FlashConfig(64, 64, 8, 1), FlashConfig(64, 32, 8, 1)),
        ),
        "scalar": (
            (80, FlashConfig(16, 64, 4, 1), FlashConfig(64, 16, 4, 1), None),
            (256, *3 * (FlashConfig(32, 32, 8, 1),)),
        ),
    },
    "gfx942": {
        "vector": (
            (64, *3 * (FlashConfig(64, 64, 4, 1),)),
            (128, FlashConfig(32, 64, 4, 1), FlashConfig(64, 64, 4, 1), FlashConfig(32, 64, 4, 1)),
            (256, *3 * (FlashConfig(32, 32, 4, 1),)),
        ),
        "scalar": ((256, *3 * (FlashConfig(32, 32, 4, 1),)),),
    },
}
_HALF["sm_120"] = _HALF["sm_86"]

_FLOAT = (
    (64, *3 * (FlashConfig(32, 32, 8, 1),)),
    (256, *3 * (FlashConfig(16, 16, 8, 1),)),
)


@remember
def choose_backward_config(arch, dtype, head_dim, head_dim_v, causal, access, plain, seqlen_k):
    """The configs of a call: of a tuned table where one has it, else the default; arguments as in `choose_config`."""
    if plain and loads_best(arch, access):
        found = tuned_config(arch, "flash_backward", dtype, (head_dim, head_dim_v, causal), (seqlen_k,))
        if found is not None:
            return BackwardConfig(**{kernel: tile and FlashConfig(**tile) for kernel, tile in found.items()})
    return default_backward_config(arch, dtype, head_dim, head_dim_v, causal, access)


@functools.cache
def default_backward_config(arch, dtype, head_dim, head_dim_v, causal, access="tma"):
    """The configs of a call, by look-up as in `default_config`; head dims to 256.

    The row is the first of the table that reaches the mean of the two head dims, padded as the kernels pad them, and
    nearly the width of dq.

    access: how q, k, v and dout can all be loaded: "tma", 16 bytes at a time ("vector"), or element by element
    ("scalar"). causal chooses nothing so far.
    """
    if arch == "interpreter":
        return BackwardConfig(*3 * (FlashConfig(64, 64, 4, 1),))
    if dtype == torch.float32:
        table = _FLOAT
    else:
        tables = _HALF[gpu_of(arch).configs]
        table = tables.get(access, tables["vector"])
    head_dim, head_dim_v = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    width = max((head_dim + head_dim_v) / 2, head_dim * 5 / 6)
    return next(BackwardConfig(*tiles) for limit, *tiles in table if width <= limit)


def may_hoist(kernel, arch, head_dim, head_dim_v):
    """Whether what is the same in every trip may be computed once, before the loop.

    Five products leave no registers to hold it, nor do wide ones where it is held in registers: on sm_90 at head dim
    256 dkdv would spill a kilobyte. With mma.sync it stays in shared memory.
    """
    if kernel == "fused":
        return False
    narrow = head_dim + head_dim_v <= (255 if kernel == "dq" else 256)
    return narrow or not gpu_of(arch).multiplies_shared_memory


def backward_search_space(kernel, arch, dtype, head_dim, head_dim_v, causal):
    """Configs of one kernel ("dkdv", "dq" or "fused") for a sweep to compare, the default, where there is one, first;
    without those that `prune_backward` has a reason against."""
    half = dtype != torch.float32
    candidates = itertools.product(
        (32, 64, 128) if half else (16, 32, 64),
        (32, 64, 128) if half else (16, 32, 64),
        (4, 8),
        (1,) if gpu_of(arch).is_amd else (1, 2, 3),
        (True, False) if gpu_of(arch).tma and half else (False,),
    )
    default = getattr(default_backward_config(arch, dtype, head_dim, head_dim_v, causal), kernel)
    defaults = [] if default is None else [default]
    configs = dict.fromkeys([*defaults, *(FlashConfig(*candidate) for candidate in candidates)])
    return [config for config in configs if prune_backward(kernel, config, arch, dtype, head_dim, head_dim_v) is None]


def prune_backward(kernel, config, arch, dtype, head_dim, head_dim_v):
    """Why a config cannot run, or cannot run well; None if nothing is against it. By estimate: the compiler decides."""
    gpu = gpu_of(arch)
    if config.use_tma and not gpu.tma:
        return f"{arch} has no TMA"
    if config.use_tma and (head_dim * dtype.itemsize % 16 or head_dim_v * dtype.itemsize % 16):
        return "TMA needs rows in units of 16 bytes"
    shared = _shared_bytes(kernel, config, gpu, dtype, head_dim, head_dim_v)
    if shared > gpu.shared_bytes:
        return f"{shared} bytes of shared memory, {arch} has {gpu.shared_bytes}"
    registers, limit = _registers(kernel, config, gpu, head_dim, head_dim_v), 448 if gpu.is_amd else 224
    if not gpu.tensor_memory and registers > limit:
        return f"{registers} registers a thread for products, {limit} leave room for the rest"
    return None


def _shared_bytes(kernel, config, gpu, dtype, head_dim, head_dim_v):
    """What the tiles of two inputs that stay and of two that pass by take, and dS where it is transposed."""
    row = (padded_head_dim(head_dim) + padded_head_dim(head_dim_v)) * dtype.itemsize
    stay, pass_by = (config.block_m, config.block_n) if kernel == "dq" else (config.block_n, config.block_m)
    if gpu.is_amd:
        return max(stay, pass_by) * row // 2
    # mma.sync reads its operands into registers, which frees a buffer.
    buffers = config.num_stages if gpu.multiplies_shared_memory else max(1, config.num_stages - 1)
    scores = config.block_m * config.block_n * dtype.itemsize if kernel == "fused" else 0
    return (stay + buffers * pass_by) * row + scores


def _registers(kernel, config, gpu, head_dim, head_dim_v):
    """32-bit registers per thread that hold S and dP, or then the tile of dq, and what is summed over the loop."""
    head_dim, head_dim_v = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    threads = config.num_warps * gpu.warp_size
    tile = 2 * config.block_m * config.block_n
    if kernel == "dq":
        return (tile + config.block_m * head_dim) // threads
    if kernel == "fused":
        tile = max(tile, config.block_m * head_dim)
    return (tile + config.block_n * (head_dim + head_dim_v)) // threads
