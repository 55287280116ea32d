"""The look-up of backward configs: defined for every case, and never against its own pruning rule."""

import itertools

import pytest
import torch

from triton_attn.dense.backward_configs import KERNELS, BackwardConfig, objection
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tiles(config):
    return {kernel: getattr(config, kernel) for kernel in KERNELS}


@pytest.mark.parametrize("arch", [*ARCHS, "interpreter"])
def test_there_is_a_default_for_every_head_dim(arch):
    for head_dims in itertools.product((*range(1, 513, 9), 64, 128, 256, 512), repeat=2):
        for access in ("tma", "vector", "scalar"):
            config = BackwardConfig.default(FlashCase(arch, torch.float16, *head_dims, True, access))
            assert not any(tile and tile.use_tma for tile in tiles(config).values()) or access == "tma"
        assert BackwardConfig.default(FlashCase(arch, torch.float32, *head_dims, True)).dq.use_tma is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_against_a_default(arch, dtype):
    for head_dims in itertools.product(range(8, 513, 40), repeat=2):
        for access in ("tma", "vector"):
            case = FlashCase(arch, dtype, *head_dims, False, access)
            config = BackwardConfig.default(case)
            assert config.obstacle(case) is None
            for kernel, tile in tiles(config).items():
                assert tile is None or objection(kernel, tile, case) is None, (kernel, tile)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_space_starts_with_the_default_and_holds_others(arch, kernel):
    case = FlashCase(arch, torch.bfloat16, 128, 128, True)
    space = BackwardConfig.search_space(case, kernel)
    default = getattr(BackwardConfig.default(case), kernel)
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
def test_pruning_says_why(kernel, tile, arch, reason):
    assert reason in objection(kernel, tile, FlashCase(arch, torch.float16, 128, 128, False))


def test_an_obstacle_names_its_kernel():
    case = FlashCase("sm_90", torch.float16, 128, 128, False)
    small, large = FlashConfig(64, 64, 4, 1), FlashConfig(128, 128, 8, 5)
    assert BackwardConfig(small, small, None).obstacle(case) is None
    assert BackwardConfig(small, small, large).obstacle(case).startswith("fused: ")
