"""The table of GPUs: every kernel family uses it, and it gives one answer per architecture."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_attn
from perf.model.gpus import CAPACITY, RATES, SHARED_BYTES_RESERVED_PER_CTA
from triton_attn._host.gpu import GPUS, INTERPRETER, count_sms, gpu_of
from triton_attn.dense import backward_configs
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash import configs as flash_configs
from triton_attn.flash.configs import FlashConfig
from triton_attn.mla import configs as mla_configs
from triton_attn.mla.configs import MlaDecodeCase, MlaDecodeConfig, MlaPrefillCase, MlaPrefillConfig
from triton_attn.paged import configs as paged_configs
from triton_attn.paged.configs import PagedCase, PagedConfig
from triton_attn.toolchain import shared_memory_limit

TABLES = {
    "flash": flash_configs._HALF,
    "flash_backward": backward_configs._HALF,
    "paged": paged_configs._HALF,
    "mla": mla_configs._HALF,
    "mla fp8": mla_configs._FLOAT8,
    "mla_prefill": mla_configs._PREFILL,
}

TWICE = False, True
HALF = torch.bfloat16


def cases(config, arch, dim):
    """Calls that a config distinguishes."""
    if config is PagedConfig:
        return [PagedCase(arch, HALF, HALF, dim, dim, rows) for rows in (4, 32, 256)]
    if config is MlaDecodeConfig:
        sizes = itertools.product((16, 128), TWICE, TWICE)
        return [MlaDecodeCase(arch, HALF, 512, 64, rows, is_fp8, is_paged) for rows, is_fp8, is_paged in sizes]
    if config is MlaPrefillConfig:
        return [MlaPrefillCase(arch, HALF, fused, dim, 64, dim, dim) for fused in TWICE]
    return [FlashCase(arch, HALF, dim, dim, True)]


def defaults(config, arch, dim):
    return [config.default(case) for case in cases(config, arch, dim)]


CONFIGS = FlashConfig, BackwardConfig, PagedConfig, MlaDecodeConfig, MlaPrefillConfig


@pytest.mark.parametrize("family", TABLES)
def test_every_family_has_the_tables_that_gpus_take(family):
    assert set(TABLES[family]) == {gpu.configs for gpu in GPUS.values()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("arch", "like"),
    [
        ("sm_87", "sm_86"),
        ("sm_89", "sm_86"),
        ("sm_91", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_130", "sm_120"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1201", "gfx942"),
    ],
)
def test_every_family_takes_an_architecture_for_the_same(arch, like, config):
    assert gpu_of(arch).configs == gpu_of(like).configs
    for head_dim in (16, 64, 96, 128, 256):
        assert defaults(config, arch, head_dim) == defaults(config, like, head_dim)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_gpu_that_triton_does_not_support_is_named(config):
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or more, got sm_75"):
        defaults(config, "sm_75", 64)


def test_what_is_not_listed_keeps_its_name_and_has_the_instructions_of_its_like():
    assert gpu_of("sm_110") == replace(GPUS["sm_103"], arch="sm_110")
    assert gpu_of("gfx1201") == replace(GPUS["gfx942"], arch="gfx1201")
    assert all(gpu_of(arch) is gpu for arch, gpu in GPUS.items())


def test_the_instructions_of_each_generation():
    def having(instruction):
        return {arch for arch, gpu in GPUS.items() if getattr(gpu, instruction)}

    assert having("wgmma") == {"sm_90"}
    assert having("tensor_memory") == {"sm_100", "sm_103"}
    assert having("tma") == {"sm_90", "sm_100", "sm_103", "sm_120", "sm_121"}
    assert having("is_amd") == {"gfx942", "gfx950"}
    assert {arch for arch, gpu in GPUS.items() if 3 in gpu.native_fp8} == having("tma") | {"sm_89"}
    assert {arch for arch, gpu in GPUS.items() if 2 in gpu.native_fp8} == GPUS.keys() - having("is_amd")
    assert not INTERPRETER.native_fp8
    assert not INTERPRETER.multiplies_shared_memory


def test_a_plan_without_a_gpu_is_for_the_sms_of_the_architecture():
    cpu = torch.device("cpu")
    assert count_sms(cpu, "sm_80") == 108
    assert count_sms(cpu, "sm_90") == count_sms(cpu, "interpreter") == 132


def test_what_compiles_and_what_predicts_know_the_same_gpus():
    """The loop model has figures of its own, since it also analyses code of another commit's package."""
    assert {arch: shared_memory_limit(arch) for arch in GPUS} == {arch: gpu.shared_bytes for arch, gpu in GPUS.items()}
    for arch, capacity in CAPACITY.items():
        assert capacity.shared_bytes == GPUS[arch].shared_bytes + SHARED_BYTES_RESERVED_PER_CTA
    assert CAPACITY.keys() == {arch for arch, gpu in GPUS.items() if not gpu.is_amd}
    for arch, rates in RATES.items():
        assert rates.num_sms == GPUS[arch].num_sms


def test_nothing_else_reads_an_architecture_s_name():
    """Code that depends on the architecture asks its Gpu. Device code, which cannot, asks the compiler's target."""
    package = Path(triton_attn.__file__).parent
    reads = re.compile(r"arch(?:\[|\.(?:startswith|removeprefix|split))|arch\w* (?:==|!=|in) \(?[\"']")
    knowing = {
        "gpu.py",
        "compilation.py",
        "launches.py",
    }  # and the targets to compile for or to emulate
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name not in knowing and reads.search(line) and "interpreter" not in line
    ]
    assert found == []
