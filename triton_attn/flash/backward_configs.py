"""Configs of the backward kernels, by architecture, head dimension and dtype."""

import functools
from typing import NamedTuple

from .configs import FlashConfig


class BackwardConfig(NamedTuple):
    """dkdv and dq are the split schedule; fused, where it is faster, computes all three in one kernel."""

    dkdv: FlashConfig
    dq: FlashConfig
    fused: FlashConfig | None


@functools.cache
def default_backward_config(arch, dtype, head_dim, head_dim_v, causal):
    if arch == "interpreter":
        tile = FlashConfig(64, 64, 4, 1)
        return BackwardConfig(tile, tile, tile)
    return BackwardConfig(
        FlashConfig(64, 128, 8, 2, True), FlashConfig(128, 128, 8, 2, True), FlashConfig(64, 128, 8, 1, True)
    )
