"""The loop model on our own kernels, and the parts of `python -m perf` that compile."""

import csv

import pytest
import torch

from perf import amdgcn, bench, compiled, inspect, loop_model, results, sweep
from triton_attn.flash.configs import FlashConfig

pytestmark = pytest.mark.compiled

CONFIG = FlashConfig(128, 64, 8, 2, False)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("arch", "product"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), pytest.param("sm_89", "HMMA", marks=pytest.mark.full)],
)
def test_the_hot_loop_does_the_products_of_one_tile(arch, product):
    launch = compiled.flash_forward(arch, torch.bfloat16, 64, causal=True, config=CONFIG)
    report = loop_model.analyze(launch.kernel)
    assert compiled.config_of(launch) == CONFIG
    assert report.arch == arch
    assert report.threads == 256
    assert report.registers == launch.registers
    assert report.shared_bytes == launch.shared_bytes
    assert {name.split(".")[0] for name in report.hot.mma_shapes} == {product}
    assert 2 * report.hot.flops == 4 * 128 * 64 * 64, "two warpgroups"
    assert report.hot.async_copies > 0
    masked = [loop for loop in report.loops if loop is not report.hot]
    assert all(loop.instructions > report.hot.instructions for loop in masked)


@pytest.mark.oldest
def test_a_tcgen05_kernel_is_counted():
    launch = compiled.flash_forward("sm_100", torch.bfloat16, 64, config=CONFIG)
    report = loop_model.analyze(launch.kernel)
    assert report.arch == "sm_100"
    assert report.hot.mma_instructions > 0
    assert report.lock is None


@pytest.mark.oldest
def test_an_amd_kernel_is_counted():
    launch = compiled.flash_forward("gfx942", torch.bfloat16, 64, config=FlashConfig(64, 32, 4, 1))
    report = loop_model.analyze(launch.kernel)
    assert isinstance(report, amdgcn.Report)
    assert report.arch == "gfx942"
    assert report.vgprs == launch.registers
    assert report.mfma.total() > 0


def test_a_cubin_alone_leaves_shared_memory_out_of_the_occupancy():
    kernel = compiled.flash_forward("sm_90", torch.bfloat16, 64, config=CONFIG).kernel
    whole, bare = loop_model.analyze(kernel), loop_model.analyze(kernel.asm["cubin"])
    assert bare.lock <= whole.lock * bare.ctas_per_sm / whole.ctas_per_sm
    assert bare.ctas_per_sm_by["shared memory"] > whole.ctas_per_sm_by["shared memory"]
    assert bare.hot.cycles == whole.hot.cycles


def test_bench_without_a_gpu_predicts_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    table, picture = bench.run(tmp_path, head_dims=[64], seqlens=[512, 1024])
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 * 2 * 2
    assert {row["source"] for row in rows} == {results.PREDICTED}
    assert {row["p50_ms"] for row in rows} == {""}
    bound, lock = (float(row["tflops"]) for row in rows[:2])
    assert 0 < lock < bound < 950
    assert picture.exists()


def test_inspect_tables_the_default_configs(tmp_path):
    (path,) = inspect.run(tmp_path, arch="sm_90", head_dims=[64])
    rows = list(csv.DictReader(path.open()))
    assert [row["causal"] for row in rows] == ["False", "True"]
    assert all(int(row["loop instructions"]) > 100 for row in rows)


def test_sweep_ranks_what_fits_and_says_why_the_rest_is_dropped(tmp_path, monkeypatch):
    slow, fast, too_large = (FlashConfig(64, 64, 4, 2), FlashConfig(128, 128, 8, 2), FlashConfig(128, 256, 8, 4))
    monkeypatch.setattr(sweep.configs, "search_space", lambda *shape: [slow, too_large, fast], raising=False)
    monkeypatch.setattr(sweep, "map_in_processes", map)
    survivors = sweep._compile_all(tmp_path / "sweep.csv", "sm_90", "bfloat16", [(128, False)])
    assert [sweep._config(row) for row in survivors[128, False]] == [fast, slow]
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["dropped"].split(",")[0] for row in rows] == ["", "out of resource: shared memory", ""]
    assert float(rows[2]["lock TFLOP/s"]) > float(rows[0]["lock TFLOP/s"])
