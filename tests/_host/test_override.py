"""override_config: single fields of a call's config."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

import triton_attn
from triton_attn import override_config
from triton_attn._host import tuned
from triton_attn._host.config import FAMILIES
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig, HopperConfig
from triton_attn.mla.configs import MlaDecodeCase, MlaDecodeConfig, MlaPrefillCase, MlaPrefillConfig
from triton_attn.paged.configs import PagedCase, PagedConfig
from triton_attn.toolchain import compile_only

HALF = torch.bfloat16
CASE = FlashCase("sm_90", HALF, 128, 128, True)
# {family: one of its cases}
CASES = {
    "flash": CASE,
    "flash_hopper": CASE,
    "paged": PagedCase("sm_80", HALF, HALF, 128, 128, 4),
    "mla": MlaDecodeCase("sm_80", HALF, 512, 64, 16),
    "mla_hopper": MlaDecodeCase("sm_90", HALF, 512, 64, 64),
    "mla_prefill": MlaPrefillCase("sm_90", HALF, False, 128, 64, 128, 128),
}


@pytest.mark.parametrize("family", CASES)
def test_one_field_is_overridden_and_the_others_stay(family):
    config, case = FAMILIES[family], CASES[family]
    before = tuned.choose(config, case)
    with override_config(family, num_stages=2):
        assert tuned.choose(config, case) == replace(before, num_stages=2)
    assert tuned.choose(config, case) == before


def test_every_family_can_be_overridden():
    assert CASES.keys() | {"flash_backward"} == FAMILIES.keys()


def test_kernels_of_a_backward_pass_have_fields_of_their_own():
    case = CASE._replace(arch="sm_80")
    before = tuned.choose(BackwardConfig, case)
    with override_config("flash_backward", dq={"num_stages": 1}):
        assert tuned.choose(BackwardConfig, case) == replace(before, dq=replace(before.dq, num_stages=1))
    tile = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1, "use_tma": False}
    assert before.fused is None
    with override_config("flash_backward", fused=tile):
        assert tuned.choose(BackwardConfig, case).fused == FlashConfig(**tile)
    with (
        override_config("flash_backward", fused={"num_stages": 1}),
        pytest.raises(ValueError, match=r"fused: expected an object with block_m, block_n, .*, got num_stages"),
    ):
        tuned.choose(BackwardConfig, case)
    with override_config("flash_backward", fused=None):
        assert tuned.choose(BackwardConfig, CASE._replace(head_dim=64, head_dim_v=64)).fused is None


def test_overrides_nest_and_end_with_an_exception():
    before = tuned.choose(FlashConfig, CASE)

    def fail_inside():
        with override_config("flash", num_stages=2):
            assert tuned.choose(FlashConfig, CASE) == replace(before, num_stages=2, num_warps=4)
            raise RuntimeError

    with override_config("flash", num_stages=1, num_warps=4), pytest.raises(RuntimeError):
        fail_inside()
    assert tuned.choose(FlashConfig, CASE) == before
    with (
        override_config("flash_backward", dq={"num_stages": 1}),
        override_config("flash_backward", dq={"num_warps": 4}),
    ):
        dq = tuned.choose(BackwardConfig, CASE).dq
    assert (dq.num_stages, dq.num_warps) == (1, 4)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("flashy", {}, "family: expected flash or .*, got 'flashy'"),
        ("flash", {"num_stagez": 2}, r"override_config\('flash'\): expected some of block_m, .*, got num_stagez"),
        ("paged", {"use_tma": True}, "expected some of block_m, block_n, num_warps, num_stages, got use_tma"),
        ("flash", {"block_m": 96}, "block_m: expected a power of two from 16 to 256, got 96"),
        ("flash", {"num_stages": True}, "num_stages: expected int, got True"),
        ("flash", {"use_tma": 1}, "use_tma: expected bool, got 1"),
        ("flash_hopper", {"tiles": 0}, "tiles: expected 1 to 64, got 0"),
        ("flash_backward", {"dq": {"num_warps": 3}}, "dq, num_warps: expected 1, 2, 4, 8 or 16, got 3"),
        ("flash_backward", {"dq": None}, "dq: expected dict, got None"),
        ("flash_backward", {"fused": 2}, "fused: expected dict or None, got 2"),
    ],
)
def test_what_is_no_field_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message), override_config(family, **fields):
        pass
    assert tuned.choose(FlashConfig, CASE) == FlashConfig.default(CASE)


def half(*shape):
    return torch.empty(shape, dtype=HALF)


def flash():
    return triton_attn.flash_attention(*(half(1, 128, 2, 128) for _ in range(3)))


def decode():
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
    triton_attn.paged_attention(half(1, 1, 8, 128), half(8, 16, 2, 128), half(8, 16, 2, 128), lengths, table)


def latent_decode():
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
    triton_attn.mla_decode(half(1, 1, 64, 512), half(1, 1, 64, 64), half(8, 64, 576), lengths, table, softmax_scale=1.0)


def latent_prefill():
    queries, latents = (half(1, 128, 2, 128), half(1, 128, 2, 64)), (half(1, 128, 512), half(1, 128, 64))
    triton_attn.mla_prefill(*queries, *latents, half(2, 128, 512), half(2, 128, 512), mode="fused")


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("call", "family", "fields", "arch"),
    [
        (flash, "flash", {"num_stages": 8}, "sm_90"),
        (flash, "flash", {"use_tma": True}, "sm_80"),
        (decode, "paged", {"block_m": 256, "block_n": 256}, "sm_86"),
        (latent_decode, "mla", {"block_m": 64, "block_n": 64}, "sm_86"),
        (latent_prefill, "mla_prefill", {"num_stages": 8}, "sm_90"),
    ],
)
def test_what_cannot_run_is_refused_by_the_call_before_a_launch(call, family, fields, arch):
    message = rf"override_config\('{family}'\): expected a config that can run, got .*: .*{arch} has"
    with compile_only(arch) as launches, override_config(family, **fields), pytest.raises(ValueError, match=message):
        call()
    assert launches == []


@pytest.mark.compiled
def test_a_call_launches_what_was_overridden():
    with compile_only("sm_80") as launches:
        flash()
        with override_config("flash", block_n=16):
            flash()
        flash()
    assert [launch.constexprs["BLOCK_N"] for launch in launches] == [32, 16, 32]


def test_the_portable_kernel_runs_where_its_config_is_overridden():
    assert HopperConfig.choose(CASE, "auto") is None or HopperConfig.choose(CASE, "hopper") is not None
    with override_config("flash", num_stages=2):
        assert HopperConfig.choose(CASE, "hopper") is None
    with override_config("flash_hopper", num_stages=3):
        assert HopperConfig.choose(CASE, "auto").num_stages == 3, "who overrides it wants it"
        assert HopperConfig.choose(CASE, "portable") is None
        with pytest.raises(ValueError, match="2 or 3 groups"), override_config("flash_hopper", groups=4):
            HopperConfig.choose(CASE, "hopper")


def test_another_process_takes_overrides_and_tables():
    with override_config("mla_prefill", block_c=32):
        settings = tuned.settings()
    with mock.patch.dict(tuned._overrides, clear=True):
        tuned.take_settings(*settings)
        assert tuned.choose(MlaPrefillConfig, CASES["mla_prefill"]).block_c == 32
    tuned.take_settings([], {})
    assert tuned.choose(MlaPrefillConfig, CASES["mla_prefill"]).block_c == 64
    assert tuned.choose(PagedConfig, CASES["paged"]) == PagedConfig.default(CASES["paged"])
    assert tuned.choose(MlaDecodeConfig, CASES["mla"]) == MlaDecodeConfig.default(CASES["mla"])
