"""The look-up of configs: total, consistent with what the kernel does, and never against its own pruning rule."""

import itertools

import pytest
import torch

from triton_attn._jit.tiles import piece_0, piece_1
from triton_attn.flash.configs import (
    FlashConfig,
    default_config,
    padded_head_dim,
    prune,
    search_space,
)

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.oldest
def test_padding_is_the_kernel_s():
    for head_dim in range(1, 513):
        assert padded_head_dim(head_dim) == piece_0(head_dim) + piece_1(head_dim)


@pytest.mark.parametrize("arch", [*ARCHS, "sm_89", "sm_120", "interpreter"])
def test_there_is_a_default_for_every_head_dim(arch):
    head_dims = (*range(1, 513, 7), 128, 192, 256, 512)
    for head_dim, head_dim_v in itertools.product(head_dims, repeat=2):
        for access in ("tma", "vector", "scalar"):
            config = default_config(arch, torch.float16, head_dim, head_dim_v, True, access)
            assert not config.use_tma or access == "tma"
        for precision in ("ieee", "tf32", "tf32x3"):
            assert not default_config(arch, torch.float32, head_dim, head_dim_v, True, "tma", precision).use_tma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_against_a_default(arch, dtype):
    for head_dim, head_dim_v in itertools.product(range(8, 513, 24), repeat=2):
        for access, extra in itertools.product(("tma", "vector"), ({}, {"softcap": True}, {"dropout": True})):
            config = default_config(arch, dtype, head_dim, head_dim_v, False, access, **extra)
            assert prune(config, arch, dtype, head_dim, head_dim_v) is None, (config, head_dim, head_dim_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_search_space_starts_at_the_default(arch, head_dim, dtype):
    configs = search_space(arch, dtype, head_dim, head_dim, True)
    assert configs[0] == default_config(arch, dtype, head_dim, head_dim, True)
    assert len(configs) == len(set(configs)) > 4
    assert all(prune(config, arch, dtype, head_dim, head_dim) is None for config in configs)


@pytest.mark.parametrize(
    ("config", "arch", "head_dim", "reason"),
    [
        (FlashConfig(128, 128, 8, 2, True), "sm_80", 128, "sm_80 has no TMA"),
        (FlashConfig(128, 128, 8, 2, True), "sm_90", 71, "TMA needs rows in units of 16 bytes"),
        (FlashConfig(32, 128, 4, 2), "sm_90", 64, "the matrix instructions take 64 rows"),
        (FlashConfig(128, 128, 8, 4), "sm_90", 128, "294912 bytes of shared memory, sm_90 has 232448"),
        (FlashConfig(128, 128, 4, 2), "sm_90", 128, "320 registers a thread for scores and output, 224 leave"),
        (FlashConfig(128, 64, 8, 1), "sm_100", 512, "576 columns of tensor memory, there are 512"),
        (FlashConfig(128, 128, 8, 2, True), "sm_90", 128, None),
    ],
)
def test_pruning_says_why(config, arch, head_dim, reason):
    given = prune(config, arch, torch.float16, head_dim, head_dim)
    assert given == reason if reason is None else given.startswith(reason)
