"""Tiles of MLA: defaults fit every GPU, search spaces begin with the default and contain only configs that can run."""

import itertools

import pytest
import torch

from triton_attn._host.gpu import GPUS
from triton_attn._jit.tiles import padded_size
from triton_attn.mla.configs import MlaDecodeCase, MlaDecodeConfig, MlaHopperConfig, MlaPrefillCase, MlaPrefillConfig

DTYPES = (torch.bfloat16, torch.float32)


def decode(arch, dtype=torch.bfloat16, rows=128, **options):
    return MlaDecodeCase(arch, dtype, 512, 64, rows, **options)


def prefill(arch, dtype=torch.bfloat16, fused=True, dim=128):
    return MlaPrefillCase(arch, dtype, fused, dim, 64, dim, padded_size(max(dim, 64)))


@pytest.mark.parametrize("arch", GPUS)
def test_every_default_fits(arch):
    for dtype, rows, is_fp8, is_paged in itertools.product(DTYPES, (1, 16, 17, 128), (False, True), (False, True)):
        case = decode(arch, dtype, rows, is_fp8=is_fp8, is_paged=is_paged)
        assert MlaDecodeConfig.default(case).obstacle(case) is None
    for dtype, fused, dim in itertools.product(DTYPES, (False, True), (16, 96, 128, 256, 512)):
        case = prefill(arch, dtype, fused, dim)
        assert MlaPrefillConfig.default(case).obstacle(case) is None


@pytest.mark.parametrize("arch", GPUS)
def test_spaces_begin_with_the_default_and_fit(arch):
    cases = [decode(arch, rows=16), decode(arch), decode(arch, is_fp8=True), prefill(arch), prefill(arch, fused=False)]
    for case in cases:
        config = MlaPrefillConfig if isinstance(case, MlaPrefillCase) else MlaDecodeConfig
        space = config.search_space(case)
        assert space[0] == config.default(case)
        assert len(set(space)) == len(space) > 4
        assert all(tile.obstacle(case) is None for tile in space)


def test_what_does_not_fit_is_named():
    expected = "147456 bytes of shared memory, sm_86 has 101376"
    assert MlaDecodeConfig(64, 64, 8, 2).obstacle(decode("sm_86")) == expected
    assert MlaDecodeConfig(64, 64, 8, 2).obstacle(decode("sm_90")) is None
    expected = "294912 bytes of shared memory, sm_90 has 232448"
    assert MlaPrefillConfig(128, 128, 8, 3).obstacle(prefill("sm_90", fused=False)) == expected
    assert MlaPrefillConfig(128, 64, 8, 2).obstacle(prefill("sm_90")) is None


def test_hopper_has_two_tiles_in_flight():
    assert MlaHopperConfig.search_space(decode("sm_90")) == [MlaHopperConfig(2)]
    assert MlaHopperConfig(3).obstacle(decode("sm_90")) is not None
    assert MlaHopperConfig.search_space(decode("sm_90", is_fp8=True)) == [MlaHopperConfig(2)]
    others = [decode("sm_100"), decode("sm_90", torch.float32), decode("sm_90", is_fp8=True, has_scales=False)]
    others += [decode("sm_90", torch.float16, is_fp8=True), decode("sm_90", is_fp8=True, is_paged=False)]
    assert not any(MlaHopperConfig.search_space(case) for case in others)
