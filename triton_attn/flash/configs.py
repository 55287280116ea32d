"""Configs of the flash attention kernels."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class FlashConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


@functools.cache
def default_config(arch, dtype, head_dim, head_dim_v, causal):
    if arch == "interpreter":
        return FlashConfig(64, 64, 4, 1)
    return FlashConfig(128, 128, 8, 2, arch == "sm_90")
