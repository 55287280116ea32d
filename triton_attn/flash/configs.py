"""Tiles of the forward kernel: those of a call by look-up, the space that a sweep searches, and what cannot run.

Defaults were chosen from compiled code, not from timings: of the tiles that fit and spill nothing on Triton 3.6.0 and
3.9.0, in every variant of the kernel, those with the most `lock` in perf/model. More stages were taken where
they fit and `lock` is the same within its noise, as they hide a latency that the model does not see. At head dim 128 on
sm_90 an H100 says so (Triton 3.6.0, causal, 4,096 tokens): 452 TFLOP/s with three stages, 408 with two.

On sm_90 the descriptor form (TMA) beats the pointer form. fp16, head dim 128, tiles of 128 x 128, 8 warps, 2 stages,
Triton 3.6.0/3.9.0: 190/188 registers, no spill and `lock` 611/618 TFLOP/s against 254/254 registers, 80/188 bytes
spilled and 588/603. At head dim 256, 128 x 64: `lock` 655/652 against 621/626. At 64 both are bound by exp2, 462/464
against 467. On sm_100 the descriptor form of the same tiles spills nothing where the pointer form spills 20/112 bytes.
"""

import functools
import itertools
from dataclasses import dataclass

import torch

from .._host.gpu import gpu_of
from .._host.tuned import remember, tuned_config


@dataclass(frozen=True)
class FlashConfig:
    """One program takes block_m queries and walks over keys block_n at a time, num_stages tiles ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """One program of hopper.py takes 64 queries for each of its groups of four warps and walks over keys block_n at a
    time, num_stages tiles ahead."""

    block_n: int
    groups: int
    num_stages: int

    @property
    def block_m(self):
        return 64 * self.groups


# (largest width, config) per architecture and access, see `default_config`; 16-bit inputs.
_HALF = {
    "sm_80": {
        "vector": (
            (32, FlashConfig(128, 64, 8, 3)),
            (48, FlashConfig(128, 32, 4, 4)),
            (64, FlashConfig(128, 64, 4, 3)),
            (96, FlashConfig(128, 64, 8, 3)),
            (192, FlashConfig(128, 32, 8, 3)),
            (256, FlashConfig(64, 64, 8, 2)),
            (512, FlashConfig(64, 32, 8, 2)),
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
            (512, FlashConfig(64, 16, 8, 2)),
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
            (512, FlashConfig(64, 32, 8, 2, use_tma=True)),
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

HOPPER_HEAD_DIMS = (64, 128, 256)
# Of hopper.py by (head dim, causal): the fastest on an H100 of those that fit.
_HOPPER = {
    (64, False): HopperConfig(128, 3, 2),
    (64, True): HopperConfig(128, 2, 2),
    (128, False): HopperConfig(128, 2, 2),
    (128, True): HopperConfig(128, 2, 2),
    (256, False): HopperConfig(64, 2, 2),
    (256, True): HopperConfig(64, 2, 2),
}

# Tiles that leave registers to tanh, by (architecture, access, largest width of the row). exp2 and tanh bound the loop:
# `lock` is 427 where the row's own has 429 and spills.
_SOFTCAP = {("sm_90", "tma", 160): FlashConfig(128, 64, 8, 3, use_tma=True)}

# Tiles that leave room to the dropout mask: registers, or the 16 KiB of shared memory in which its layout is changed.
_DROPOUT = {
    ("sm_80", "vector", 64): FlashConfig(128, 64, 8, 3),
    ("sm_90", "tma", 128): FlashConfig(128, 128, 8, 2, use_tma=True),
}

# fp32 inputs, by the precision of their products. NVIDIA has fused multiply-adds alone for ieee.
_FLOAT = {
    "ieee": (
        (64, FlashConfig(64, 32, 8, 1)),
        (128, FlashConfig(32, 32, 8, 1)),
        (512, FlashConfig(32, 16, 8, 1)),
    ),
    "tf32": (
        (64, FlashConfig(64, 32, 4, 2)),
        (128, FlashConfig(64, 32, 8, 2)),
        (256, FlashConfig(64, 16, 8, 1)),
        (512, FlashConfig(32, 16, 8, 1)),
    ),
    "tf32x3": (
        (64, FlashConfig(64, 32, 4, 2)),
        (128, FlashConfig(32, 32, 8, 1)),
        (256, FlashConfig(16, 16, 4, 1)),
        (512, FlashConfig(16, 16, 8, 1)),
    ),
}


@remember
def choose_config(arch, dtype, head_dim, head_dim_v, causal, access, precision, softcap, dropout, plain, seqlen_k):
    """The config of a call: of a tuned table where one has it, else the default.

    plain: without softcap, ALiBi and dropout, as sweeps time it. seqlen_k: of the longest sequence. The rest as in
    `default_config`.
    """
    if plain and loads_best(arch, access):
        found = tuned_config(arch, "flash", dtype, (head_dim, head_dim_v, causal), (seqlen_k,))
        if found is not None:
            return FlashConfig(**found)
    return default_config(arch, dtype, head_dim, head_dim_v, causal, access, precision, softcap, dropout)


def choose_hopper_config(wanted, dtype, head_dim, causal, seqlen_k):
    """The HopperConfig of a call that hopper.py can serve, None for the portable kernel.

    wanted: "auto", where a tuned table has one, which says that the kernel was found right and fast on such a GPU with
    this Triton; "hopper", also where none has; "portable", never.
    """
    if wanted == "portable" or (head_dim, causal) not in _HOPPER or dtype == torch.float32:
        return None
    found = tuned_config("sm_90", "flash_hopper", dtype, (head_dim, causal), (seqlen_k,))
    if found is not None:
        return HopperConfig(**found)
    return _HOPPER[head_dim, causal] if wanted == "hopper" else None


def loads_best(arch, access):
    """Whether tensors can be loaded in the way that is fastest on arch, which sweeps give them."""
    return arch != "interpreter" and (access == "tma" or (access == "vector" and not gpu_of(arch).tma))


@functools.cache
def default_config(
    arch, dtype, head_dim, head_dim_v, causal, access="tma", precision="ieee", softcap=False, dropout=False
):
    """The config of a call, by look-up: equal calls run equal code, and nothing is timed.

    The row is the first of the table that reaches the width max((head_dim + head_dim_v) / 2, head_dim_v), both padded
    as the kernel pads them: shared memory holds tiles of both, registers the output alone.

    Args:
        arch: "sm_90", "gfx942", ...; "interpreter" gets tiles that it is fast with.
        dtype: of q, k and v.
        head_dim, head_dim_v: 1 to 512.
        causal: chooses nothing so far. A mask adds boundary tiles and leaves the interior loop as it is.
        access: how k and v can be loaded: "tma", 16 bytes at a time ("vector"), or element by element ("scalar").
            Architectures without TMA take "tma" as "vector".
        precision: of fp32 products: "ieee", "tf32" or "tf32x3".
        softcap, dropout: whether there is one.
    """
    if arch == "interpreter":
        return FlashConfig(64, 64, 4, 1)
    arch = gpu_of(arch).configs
    half = dtype != torch.float32
    access = access if access in _HALF[arch] else "vector"
    table = _HALF[arch][access] if half else _FLOAT[precision]
    width, config = next(row for row in table if _width(head_dim, head_dim_v) <= row[0])
    if half and softcap:
        return _SOFTCAP.get((arch, access, width), config)
    if half and dropout:
        return _DROPOUT.get((arch, access, width), config)
    return config


def padded_head_dim(head_dim):
    """Columns that the kernel computes: a multiple of 16 that is a power of two or, in two pieces, the sum of two."""
    padded = -(-head_dim // 16) * 16
    rest = padded - (1 << (padded.bit_length() - 1))
    return padded if rest & (rest - 1) == 0 else 1 << padded.bit_length()


def _width(head_dim, head_dim_v):
    head_dim, head_dim_v = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    return max((head_dim + head_dim_v) / 2, head_dim_v)


def search_space(arch, dtype, head_dim, head_dim_v, causal):
    """Configs for a sweep to compare, the default first; those that `prune` has a reason against are left out."""
    rows, keys = (64, 128), (32, 64, 128)
    if dtype == torch.float32 or max(head_dim, head_dim_v) > 256:
        rows, keys = (16, 32, *rows), (16, *keys)
    stages = (1, 2) if gpu_of(arch).is_amd else (1, 2, 3, 4)
    use_tma = (True, False) if dtype != torch.float32 else (False,)
    default = default_config(arch, dtype, head_dim, head_dim_v, causal)
    candidates = itertools.starmap(FlashConfig, itertools.product(rows, keys, (4, 8), stages, use_tma))
    configs = dict.fromkeys([default, *candidates])
    return [config for config in configs if prune(config, arch, dtype, head_dim, head_dim_v) is None]


def hopper_search_space(arch, dtype, head_dim, causal):
    """Configs of hopper.py's kernel for a sweep to compare, the default first; none where it serves nothing."""
    if not gpu_of(arch).wgmma or dtype == torch.float32 or (head_dim, causal) not in _HOPPER:
        return []
    default = _HOPPER[head_dim, causal]
    # Scores, weights and output of three groups fit in their registers, 160 a thread, at head dim 64 alone. Tiles of 64
    # keys were up to a fifth slower on an H100 where 128 fit.
    groups = (2, 3) if head_dim == 64 else (2,)
    candidates = itertools.starmap(HopperConfig, itertools.product((default.block_n,), groups, (2, 3, 4)))
    row_bytes = head_dim * dtype.itemsize
    # Barriers take less than 2 KB.
    limit = gpu_of(arch).shared_bytes - 2048
    configs = [c for c in candidates if (c.block_m + 2 * c.block_n * c.num_stages) * row_bytes <= limit]
    return list(dict.fromkeys([default, *configs]))


def prune(config, arch, dtype, head_dim, head_dim_v):
    """Why a config cannot run, or cannot run well; None if nothing is against it. By estimate: the compiler decides."""
    gpu = gpu_of(arch)
    if config.use_tma and not gpu.tma:
        return f"{arch} has no TMA"
    if config.use_tma and (head_dim * dtype.itemsize % 16 or head_dim_v * dtype.itemsize % 16):
        return "TMA needs rows in units of 16 bytes"
    if gpu.multiplies_shared_memory and dtype != torch.float32 and config.block_m < 64:
        return "the matrix instructions take 64 rows"
    shared = _shared_bytes(config, gpu, dtype, head_dim, head_dim_v)
    if shared > gpu.shared_bytes:
        return f"{shared} bytes of shared memory, {arch} has {gpu.shared_bytes}"
    registers, limit = _registers(config, gpu, dtype, head_dim_v), 448 if gpu.is_amd else 224
    if registers > limit:
        return f"{registers} registers a thread for scores and output, {limit} leave room for the rest"
    columns = (config.block_n + padded_head_dim(head_dim_v)) * config.block_m // 128
    if gpu.tensor_memory and columns > 512:
        return f"{columns} columns of tensor memory, there are 512"
    return None


def _shared_bytes(config, gpu, dtype, head_dim, head_dim_v):
    """What the tiles of q, k and v take."""
    size = dtype.itemsize
    q = config.block_m * padded_head_dim(head_dim) * size
    k, v = (config.block_n * padded_head_dim(dim) * size for dim in (head_dim, head_dim_v))
    if gpu.is_amd:
        return max(q, k, v)
    if config.num_stages == 1:
        return q + max(k, v)
    # mma.sync reads its operands into registers, which frees a buffer.
    buffers = config.num_stages if gpu.multiplies_shared_memory else config.num_stages - 1
    return q + buffers * (k + v)


def _registers(config, gpu, dtype, head_dim_v):
    """32-bit registers per thread that hold scores, weights and, where there is no tensor memory, the output."""
    threads = config.num_warps * gpu.warp_size
    scores = config.block_m * config.block_n
    output = 0 if gpu.tensor_memory else config.block_m * padded_head_dim(head_dim_v)
    return (scores + scores * dtype.itemsize // 4 + output) // threads
