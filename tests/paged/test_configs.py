"""Tiles of attention over a cache."""

import pytest
import torch

from triton_attn.paged.configs import PagedCase, PagedConfig

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")


def case(arch, dtype, head_dim, rows, **options):
    return PagedCase(arch, dtype, dtype, head_dim, head_dim, rows, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_tile_holds_the_rows_and_no_more_than_it_must(arch, dtype):
    for head_dim in (1, 64, 96, 128, 256, 512):
        configs = [PagedConfig.default(case(arch, dtype, head_dim, rows)) for rows in (1, 16, 17, 33, 10**6)]
        sizes = [config.block_m for config in configs]
        assert sizes == sorted(sizes)
        assert sizes[0] <= 32
        if head_dim <= 64 and dtype == torch.float16:
            assert sizes[1] >= 16
            assert sizes[2] >= 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_default_fits(arch, dtype):
    for head_dim in range(1, 513):
        for rows in (1, 17, 33, 64, 10**6):
            here = case(arch, dtype, head_dim, rows)
            assert PagedConfig.default(here).obstacle(here) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
def test_warps_have_16_rows_each_where_there_are_many(arch, head_dim):
    for rows in (33, 64, 65, 128, 10**6):
        config = PagedConfig.default(case(arch, torch.float16, head_dim, rows))
        assert config.block_m == 16 * config.num_warps


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_120"])
@pytest.mark.parametrize("head_dim", [200, 256])
def test_pieces_of_wide_heads_need_a_tile_of_128_rows(arch, head_dim):
    """With fewer rows warps do not lie along them, or a chunk of few rows would have half a tile without work."""
    many, few = (PagedConfig.default(case(arch, torch.float16, head_dim, rows)) for rows in (65, 64))
    assert many.block_m == 16 * many.num_warps == 128
    assert few.block_m == 64


def test_elements_that_lie_apart_are_not_loaded_ahead():
    assert PagedConfig.default(case("sm_90", torch.float16, 128, 8, loads_vectors=False)).num_stages == 1


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_90", 128), ("sm_86", 512)])
def test_the_space_begins_with_the_default_and_fits(arch, head_dim):
    for rows in (4, 64, 4096):
        here = case(arch, torch.float16, head_dim, rows)
        space = PagedConfig.search_space(here)
        assert space[0] == PagedConfig.default(here)
        assert len(set(space)) == len(space) > 10
        assert all(config.block_m <= space[0].block_m and config.obstacle(here) is None for config in space)


def test_what_does_not_fit_is_named():
    config = PagedConfig(128, 128, 8, 3)
    assert config.obstacle(case("sm_90", torch.float16, 128, 256)) is None
    expected = "393216 bytes of shared memory, sm_86 has 101376"
    assert config.obstacle(case("sm_86", torch.float16, 512, 256)) == expected
