"""Which tiles attention over a cache runs with."""

import pytest
import torch

from triton_attn.paged.configs import default_config, search_space

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_tile_holds_the_rows_and_no_more_than_it_must(arch, dtype):
    for head_dim in (1, 64, 96, 128, 256, 512):
        sizes = [default_config(arch, dtype, head_dim, head_dim, rows, True).block_m for rows in (1, 16, 17, 33, 10**6)]
        assert sizes == sorted(sizes)
        assert sizes[0] <= 32
        if head_dim <= 64 and dtype == torch.float16:
            assert sizes[1] >= 16
            assert sizes[2] >= 17


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
def test_warps_have_16_rows_each_where_there_are_many(arch, head_dim):
    for rows in (33, 64, 65, 128, 10**6):
        config = default_config(arch, torch.float16, head_dim, head_dim, rows, True)
        assert config.block_m == 16 * config.num_warps


def test_elements_that_lie_apart_are_not_loaded_ahead():
    assert default_config("sm_90", torch.float16, 128, 128, 8, by_16_bytes=False).num_stages == 1


def test_the_space_begins_with_the_default():
    for rows in (4, 64, 4096):
        space = search_space("sm_90", torch.float16, 128, 128, rows)
        assert space[0] == default_config("sm_90", torch.float16, 128, 128, rows, True)
        assert len(set(space)) == len(space) > 10
        assert all(config.block_m <= space[0].block_m for config in space)
