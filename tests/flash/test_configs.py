"""The look-up of configs: defined for every case, consistent with the kernel, and never against its own pruning
rule."""

import itertools

import pytest
import torch

from triton_attn._jit import columns, tiles
from triton_attn._jit.tiles import piece_0, piece_1
from triton_attn.dense.tiles import CHUNK, HALF, FlashCase, padded_head_dim
from triton_attn.flash.configs import HOPPER_HEAD_DIMS, FlashConfig, HopperConfig

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.oldest
def test_padding_is_the_kernel_s():
    for head_dim in range(1, 513):
        assert padded_head_dim(head_dim) == piece_0(head_dim) + piece_1(head_dim)
    assert tiles.HALF == HALF
    assert columns.CHUNK == CHUNK


@pytest.mark.parametrize("arch", [*ARCHS, "interpreter"])
def test_there_is_a_default_for_every_head_dim(arch):
    head_dims = (*range(1, 513, 7), 128, 192, 256, 512)
    for shape in itertools.product(head_dims, repeat=2):
        for access in ("tma", "vector", "scalar"):
            config = FlashConfig.default(FlashCase(arch, torch.float16, *shape, True, access))
            assert not config.use_tma or access == "tma"
        for precision in ("ieee", "tf32", "tf32x3"):
            assert not FlashConfig.default(FlashCase(arch, torch.float32, *shape, True, "tma", precision)).use_tma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_against_a_default(arch, dtype):
    for shape in itertools.product((*range(8, 513, 24), 48, 96, 160, 192), repeat=2):
        for access, extra in itertools.product(("tma", "vector"), ({}, {"softcap": True}, {"dropout": True})):
            case = FlashCase(arch, dtype, *shape, False, access, **extra)
            config = FlashConfig.default(case)
            assert config.objection(case) is None, (config, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_search_space_starts_at_the_default(arch, head_dim, dtype):
    case = FlashCase(arch, dtype, head_dim, head_dim, True)
    configs = FlashConfig.search_space(case)
    assert configs[0] == FlashConfig.default(case)
    assert len(configs) == len(set(configs)) > 4
    assert all(config.objection(case) is None for config in configs)


@pytest.mark.parametrize(
    ("config", "arch", "head_dim", "reason"),
    [
        (FlashConfig(128, 128, 8, 2, True), "sm_80", 128, "sm_80 has no TMA"),
        (FlashConfig(128, 128, 8, 2, True), "sm_90", 71, "TMA needs rows in units of 16 bytes"),
        (FlashConfig(32, 128, 4, 2), "sm_90", 64, "the matrix instructions need 64 rows"),
        (FlashConfig(128, 128, 8, 4), "sm_90", 128, "294912 bytes of shared memory, sm_90 has 232448"),
        (FlashConfig(128, 128, 4, 2), "sm_90", 128, "320 registers a thread for tiles, 224 leave room for the rest"),
        (FlashConfig(128, 64, 8, 1), "sm_100", 512, "576 columns of tensor memory, the GPU has 512"),
        (FlashConfig(128, 128, 8, 2, True), "sm_90", 128, None),
    ],
)
def test_pruning_says_why(config, arch, head_dim, reason):
    assert config.objection(FlashCase(arch, torch.float16, head_dim, head_dim, False)) == reason


@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_space_of_hopper_fits_and_starts_at_the_default(head_dim, causal):
    case = FlashCase("sm_90", torch.bfloat16, head_dim, HOPPER_HEAD_DIMS[head_dim], causal)
    configs = HopperConfig.search_space(case)
    assert configs[0] == HopperConfig.default(case)
    assert len(configs) == len(set(configs)) == {64: 12, 96: 6, 128: 4, 192: 2, 256: 2}[head_dim]
    assert all(config.obstacle(case) is None for config in configs)
    assert HopperConfig(128, 2, 8).obstacle(case).endswith("bytes of shared memory, sm_90 has 232448")
    several = HopperConfig(128, 2, 2, tiles=2).obstacle(case)
    assert (several is None) == (head_dim <= 128)


@pytest.mark.parametrize(
    "other", [{"arch": "sm_100"}, {"dtype": torch.float32}, {"head_dim": 80, "head_dim_v": 80}, {"head_dim": 64}]
)
def test_hopper_supports_no_others(other):
    case = FlashCase("sm_90", torch.bfloat16, 128, 128, True)._replace(**other)
    assert HopperConfig.search_space(case) == []
    assert HopperConfig.choose(case, "hopper") is None
