"""Tiles of the MLA kernels: the default by look-up, the space that a sweep searches.

Defaults were chosen from compiled code, not from timings: tiles that fit and spill nothing at 512 + 64, the widths of
DeepSeek's models, on Triton 3.6.0 and 3.9.0. In decode a tile of up to 16 rows reads latent vectors faster than memory
gives them; of those for more rows the one with the most `lock` in perf/model. On sm_100 the output of 64 rows
alone fills the tensor memory: mma.sync takes 32.
"""

import itertools
from dataclasses import dataclass

import torch

from .._host.gpu import gpu_of
from .._host.tuned import remember, rows_class, tuned_config


@dataclass(frozen=True)
class MlaDecodeConfig:
    """One program takes block_m rows, heads of the queries of a sequence, and walks over keys block_n at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MlaHopperConfig:
    """One program of hopper.py takes 64 rows and walks over keys 64 at a time, num_stages tiles ahead: two, as its two
    groups take turns, and no more fit."""

    num_stages: int


# Of hopper.py by (kv_lora_rank, qk_rope_head_dim).
_HOPPER = {(512, 64): MlaHopperConfig(2)}

# Configs of up to 16 rows and of more, per architecture; 16-bit inputs. sm_120 spills with 32 rows, sm_86 does not.
_HALF = {
    "sm_80": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(32, 64, 8, 3)),
    "sm_86": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(32, 32, 4, 3)),
    "sm_90": (MlaDecodeConfig(16, 64, 4, 3), MlaDecodeConfig(64, 64, 8, 2)),
    "sm_100": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(32, 64, 8, 3)),
    "sm_120": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "gfx942": (MlaDecodeConfig(16, 32, 4, 1), MlaDecodeConfig(32, 32, 4, 1)),
}
# An fp8 cache is decoded in registers, which mma.sync needs itself.
_FLOAT8 = {
    "sm_80": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "sm_86": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "sm_90": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(64, 64, 8, 2)),
    "sm_100": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "sm_120": (MlaDecodeConfig(16, 32, 4, 3), MlaDecodeConfig(16, 32, 4, 3)),
    "gfx942": (MlaDecodeConfig(16, 16, 4, 1), MlaDecodeConfig(16, 16, 4, 1)),
}
# More than 16 rows over keys in no pages, where latent vectors and rotary keys are tiles of their own.
_CONTIGUOUS = {"sm_80": MlaDecodeConfig(32, 64, 8, 2), "sm_86": MlaDecodeConfig(32, 32, 4, 2)}
_FLOAT = MlaDecodeConfig(16, 16, 4, 1)


@remember
def choose_decode_config(arch, dtype, kv_lora_rank, qk_rope_head_dim, num_rows, is_fp8, seqlen_k, page_size):
    """The config of a decode step: of a tuned table where one has it, else the default.

    seqlen_k: keys that a sequence has room for in its pages of page_size. The rest as in `default_decode_config`.
    """
    cache_dtype = "float8_e4m3fn" if is_fp8 else str(dtype).removeprefix("torch.")
    case = kv_lora_rank, qk_rope_head_dim, rows_class(num_rows), cache_dtype
    found = arch != "interpreter" and tuned_config(arch, "mla", dtype, case, (seqlen_k, page_size, num_rows))
    return MlaDecodeConfig(**found) if found else default_decode_config(arch, dtype, num_rows, is_fp8)


def default_decode_config(arch, dtype, num_rows, is_fp8=False, paged=True):
    """The config of a call, by look-up: equal calls run equal code, and nothing is timed.

    num_rows is seqlen_q * num_heads, dtype that of the queries, is_fp8 whether the cache is, paged whether it has
    pages. "interpreter" gets tiles that it is fast with.
    """
    if arch == "interpreter":
        return MlaDecodeConfig(16 if num_rows <= 16 else 64, 64, 4, 1)
    if dtype == torch.float32:
        return _FLOAT
    arch = gpu_of(arch).configs
    config = (_FLOAT8 if is_fp8 else _HALF)[arch][num_rows > 16]
    return config if paged or num_rows <= 16 else _CONTIGUOUS.get(arch, config)


def choose_hopper_config(wanted, dtype, kv_lora_rank, qk_rope_head_dim, seqlen_k, num_rows):
    """The MlaHopperConfig of a decode step that hopper.py can serve, None for the portable kernel.

    wanted: "auto", where a tuned table has one, which says that the kernel was found right and fast on such a GPU with
    this Triton; "hopper", also where none has; "portable", never. The rest as in `choose_decode_config`.
    """
    dims = kv_lora_rank, qk_rope_head_dim
    if wanted == "portable" or dims not in _HOPPER or dtype == torch.float32:
        return None
    found = tuned_config("sm_90", "mla_hopper", dtype, dims, (seqlen_k, num_rows))
    if found is not None:
        return MlaHopperConfig(**found)
    return _HOPPER[dims] if wanted == "hopper" else None


def programs_per_processor(config, is_fp8):
    """Programs of a decode that splits are to give a processor at once. Tiles of 16 rows leave room for two, which an
    fp8 cache needs, whose loop is slower than memory; others wait for memory, and more splits are more to merge."""
    return 2 if is_fp8 and config.block_m == 16 else 1


@dataclass(frozen=True)
class MlaPrefillConfig:
    """One program takes block_m queries of a head and walks over keys block_n at a time; where it makes keys of latent
    vectors, it takes block_c numbers of these at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_c: int = 64


# (keys and values loaded, made of latent vectors) of heads to 128 wide, as of DeepSeek's models; 16-bit inputs. The
# loop over latent numbers spills nothing; around it, once for a tile of keys, sm_90 spills up to 140 bytes.
_PREFILL = {
    "sm_80": (MlaPrefillConfig(128, 32, 8, 3), MlaPrefillConfig(128, 32, 8, 3)),
    "sm_86": (MlaPrefillConfig(128, 32, 8, 2), MlaPrefillConfig(64, 32, 8, 2, 32)),
    "sm_90": (MlaPrefillConfig(128, 64, 8, 2), MlaPrefillConfig(128, 64, 8, 2)),
    "sm_100": (MlaPrefillConfig(128, 64, 8, 2), MlaPrefillConfig(128, 32, 8, 2)),
    "sm_120": (MlaPrefillConfig(128, 32, 8, 2), MlaPrefillConfig(64, 32, 8, 2, 32)),
    "gfx942": (MlaPrefillConfig(128, 64, 4, 1), MlaPrefillConfig(128, 32, 4, 1, 32)),
}
# Of wider heads, by (largest padded dimension, ...) on every architecture: they fit.
_PREFILL_WIDE = ((256, MlaPrefillConfig(64, 32, 8, 1, 32)), (512, MlaPrefillConfig(32, 16, 8, 1, 32)))


@remember
def choose_prefill_config(arch, dtype, fused, dims, padded_head_dim, seqlen_k):
    """The config of a prefill: of a tuned table where one has it, else the default.

    dims: (qk_nope_head_dim, qk_rope_head_dim, v_head_dim). The rest as in `default_prefill_config`.
    """
    found = arch != "interpreter" and tuned_config(arch, "mla_prefill", dtype, (fused, *dims), (seqlen_k,))
    return MlaPrefillConfig(**found) if found else default_prefill_config(arch, dtype, fused, padded_head_dim)


def default_prefill_config(arch, dtype, fused, head_dim):
    """The config of a prefill over keys and values, by look-up; head_dim is the largest of a head's three, padded."""
    if arch == "interpreter":
        return MlaPrefillConfig(64, 64, 4, 1)
    if dtype == torch.float32:
        return MlaPrefillConfig(32 if head_dim <= 256 else 16, 16, 8, 1, 16)
    if head_dim <= 128:
        return _PREFILL[gpu_of(arch).configs][fused]
    return next(config for width, config in _PREFILL_WIDE if head_dim <= width)


def has_wgmma(arch):
    return gpu_of(arch).wgmma


def prefill_search_space(arch, dtype, fused, head_dim):
    """Configs of `default_prefill_config`'s kernel for a sweep to compare, the default first."""
    default = default_prefill_config(arch, dtype, fused, head_dim)
    stages = (1, 2) if gpu_of(arch).is_amd else (1, 2, 3)
    latent_tiles = (32, 64, 128) if fused else (default.block_c,)
    candidates = itertools.product((64, 128), (32, 64, 128), (4, 8), stages, latent_tiles)
    return list(dict.fromkeys([default, *itertools.starmap(MlaPrefillConfig, candidates)]))


def search_space(arch, dtype, num_rows, is_fp8=False):
    """Configs of a decode step for a sweep to compare, the default first."""
    default = default_decode_config(arch, dtype, num_rows, is_fp8)
    rows = (16,) if num_rows <= 16 else (16, 32, 64)
    stages = (1, 2) if gpu_of(arch).is_amd else (1, 2, 3, 4)
    candidates = itertools.starmap(MlaDecodeConfig, itertools.product(rows, (16, 32, 64), (4, 8), stages))
    return list(dict.fromkeys([default, *candidates]))
