"""The look-up of backward configs: total, and never against its own pruning rule."""

import itertools

import pytest
import torch

from triton_attn.flash.backward_configs import (
    BackwardConfig,
    backward_search_space,
    default_backward_config,
    prune_backward,
)
from triton_attn.flash.configs import FlashConfig

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNELS = BackwardConfig._fields


@pytest.mark.parametrize("arch", [*ARCHS, "sm_89", "sm_120", "interpreter"])
def test_there_is_a_default_for_every_head_dim(arch):
    for head_dims in itertools.product((*range(1, 257, 5), 64, 128, 256), repeat=2):
        for access in ("tma", "vector", "scalar"):
            config = default_backward_config(arch, torch.float16, *head_dims, True, access)
            assert not any(tile and tile.use_tma for tile in config) or access == "tma"
        assert default_backward_config(arch, torch.float32, *head_dims, True).dq.use_tma is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_against_a_default(arch, dtype):
    for head_dims in itertools.product(range(8, 257, 24), repeat=2):
        for access in ("tma", "vector"):
            config = default_backward_config(arch, dtype, *head_dims, False, access)
            for kernel, tile in zip(KERNELS, config, strict=True):
                assert tile is None or prune_backward(kernel, tile, arch, dtype, *head_dims) is None, (kernel, tile)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_space_starts_with_the_default_and_holds_others(arch, kernel):
    space = backward_search_space(kernel, arch, torch.bfloat16, 128, 128, True)
    default = getattr(default_backward_config(arch, torch.bfloat16, 128, 128, True), kernel)
    assert default is None or space[0] == default
    assert None not in space
    assert len(set(space)) == len(space) > 1


@pytest.mark.parametrize(
    ("kernel", "tile", "arch", "reason"),
    [
        ("dq", FlashConfig(64, 64, 4, 1, use_tma=True), "sm_80", "no TMA"),
        ("fused", FlashConfig(128, 128, 8, 3), "sm_90", "bytes of shared memory"),
        ("dkdv", FlashConfig(64, 128, 4, 1), "sm_90", "registers"),
    ],
)
def test_prune_says_why(kernel, tile, arch, reason):
    assert reason in prune_backward(kernel, tile, arch, torch.float16, 128, 128)
