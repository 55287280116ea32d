"""The loop model on our own kernels, and the parts of `python -m perf` that compile."""

import csv
import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch

import triton_attn
from perf import results
from perf.commands import bench, inspect, sweep
from perf.harness.journal import Journal
from perf.harness.revision import package_of
from perf.model import amdgcn, compiled, loop_model
from perf.model.candidates import FAMILIES, Candidate
from perf.results.baseline import COMPILED, Baseline
from perf.workloads.calls import CALLS
from triton_attn import use_tuned
from triton_attn._host import tuned
from triton_attn._host.sources import kernel_digest
from triton_attn.flash.configs import FlashConfig, HopperConfig
from triton_attn.mla.configs import MlaDecodeConfig, MlaHopperConfig, MlaPrefillConfig
from triton_attn.paged.configs import PagedConfig
from triton_attn.toolchain import compile_only

pytestmark = pytest.mark.compiled

CONFIG = FlashConfig(128, 64, 8, 2, False)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("arch", "product"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), pytest.param("sm_89", "HMMA", marks=pytest.mark.full)],
)
def test_the_hot_loop_does_the_matmuls_of_one_tile(arch, product):
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


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(inspect, "map_in_processes", map)


@pytest.mark.ci
@pytest.mark.usefixtures("in_this_process")
def test_inspect_tables_the_default_configs_and_their_opcodes(tmp_path, capsys):
    table, opcodes = inspect.run(tmp_path, families=["flash", "mla_prefill"], head_dims=[64], opcodes=True)
    rows = list(csv.DictReader(table.open()))
    assert [row["case"] for row in rows[:2]] == [f"head_dim=64 causal={causal}" for causal in (False, True)]
    assert [row["case"].split()[-1] for row in rows[2:]] == 2 * ["fused=False", "fused=True"]
    assert all(int(row["loop instructions"]) > 100 for row in rows)
    assert {row["source"] for row in rows} == {results.PREDICTED}
    loop = [row for row in csv.DictReader(opcodes.open()) if row["case"] == rows[0]["case"]]
    assert sum(int(row["instructions"]) for row in loop) == int(rows[0]["loop instructions"])
    printed = capsys.readouterr().out
    assert "HGMMA" in printed
    assert rows[0]["loop instructions"] in printed


@pytest.mark.ci
@pytest.mark.usefixtures("in_this_process")
def test_inspect_goes_on_after_a_case_that_does_not_compile(tmp_path, capsys):
    table, _ = inspect.run(tmp_path, families=["flash"], arch="gfx942", head_dims=[600, 64], opcodes=True)
    assert len(list(csv.DictReader(table.open()))) == 2
    assert "flash head_dim=600 causal=True does not compile: ValueError: q: expected" in capsys.readouterr().out


@pytest.mark.ci
def test_inspect_shows_what_changed_since_a_commit(tmp_path, capsys, monkeypatch):
    """A commit in which a call had a softcap and another function was missing."""
    package = tmp_path / "triton_attn"
    copytree(Path(triton_attn.__file__).parent, package, ignore=ignore_patterns("__pycache__"))
    with (package / "__init__.py").open("a") as file:
        file.write("\nimport functools\nflash_attention = functools.partial(flash_attention, softcap=30.0)\n")
        file.write("del mla_prefill\n")
    who = "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "older"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(inspect, "package_of", partial(package_of, checkout=tmp_path))
    inspect.run(tmp_path / "out", families=["flash", "mla_prefill"], head_dims=[64], diff="HEAD")
    changes = capsys.readouterr().out.split("since HEAD:")[1].splitlines()
    (loop,) = (line for line in changes if "loop instructions" in line and "causal=True" in line)
    *_, before, now, change = loop.split()
    assert int(before) > int(now) > 100
    assert change.startswith("-")
    assert sum("not there" in line for line in changes) == 4
    assert "fused=True does not compile at HEAD: AttributeError" in "\n".join(changes)


def test_a_commit_that_is_none_ends_inspect_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "map_in_processes", None)
    with pytest.raises(SystemExit, match=r"--diff: expected a commit.*got 'no-such'"):
        inspect.run(tmp_path, families=["flash"], diff="no-such")


@pytest.mark.ci
@pytest.mark.usefixtures("in_this_process")
def test_update_baseline_writes_all_or_nothing(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(inspect, "BASELINE_ARCHS", ("sm_80", "sm_90"))
    monkeypatch.setattr(Baseline, "update", lambda self, rows: written.extend(rows))
    monkeypatch.setattr(inspect, "baseline_cases", lambda arch: inspect.cases_of("flash", arch, "bfloat16", [64]))
    assert inspect.run(tmp_path, update_baseline=True) == [COMPILED.path]
    assert [row["arch"] for row in written] == ["sm_80", "sm_80", "sm_90", "sm_90"]
    written.clear()
    monkeypatch.setattr(inspect, "baseline_cases", lambda arch: inspect.cases_of("flash", arch, "bfloat16", [64, 600]))
    with pytest.raises(SystemExit, match="the baseline is as it was"):
        inspect.run(tmp_path, update_baseline=True)
    assert not written


FLASH = {"head_dim": 128, "causal": False}
DECODE = {"num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128, "page_size": 16}
MANY_ROWS = {"num_heads_q": 71, "num_heads_kv": 1, "head_dim": 64, "page_size": 16}
LATENT = {"num_heads": 128, "cache_dtype": "bfloat16", "page_size": 64}
PREFILL = {"num_heads": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
PREFILL |= {"fused": False}
# Per case: configs in the order of the search space, the reasons for dropping them, the order of the survivors.
SWEPT = {
    "flash": (
        FLASH,
        [FlashConfig(64, 64, 4, 2), FlashConfig(128, 256, 8, 4), FlashConfig(128, 128, 4, 2), CONFIG],
        ["", "out of resource: shared memory", "spills in the hot loop", ""],
        [0, 3],  # CTAs that share an SM fill each other's waits; by `lock` the order is reversed
    ),
    "flash_hopper": (
        FLASH,
        [HopperConfig(128, 2, 2), HopperConfig(128, 2, 8)],
        ["", "out of resource: shared memory"],
        [0],
    ),
    "flash_backward": (
        {"kernel": "fused", "head_dim": 64, "causal": True},
        [FlashConfig(32, 32, 4, 2), FlashConfig(64, 128, 8, 2, True), FlashConfig(64, 64, 8, 1)],
        ["", "", "no asynchronous copies"],
        [1, 0],
    ),
    "paged": (
        MANY_ROWS,
        [PagedConfig(64, 64, 2, 3), PagedConfig(16, 64, 4, 3), PagedConfig(64, 64, 4, 3)],
        ["no wgmma", "", ""],
        [2, 1],
    ),
    "mla": (
        LATENT,
        [MlaDecodeConfig(16, 64, 4, 3), MlaDecodeConfig(16, 24, 4, 3), MlaDecodeConfig(64, 64, 8, 2)],
        ["", "CompilationError", ""],
        [2, 0],
    ),
    "mla_hopper": (LATENT, [MlaHopperConfig(2)], [""], [0]),
    "paged_prefill": (
        DECODE | {"seqlen_q": 512},
        [PagedConfig(64, 64, 4, 3), PagedConfig(128, 64, 8, 1), PagedConfig(128, 64, 8, 3)],
        ["", "no asynchronous copies", ""],
        [0, 2],
    ),
    "mla_prefill": (
        PREFILL,
        [MlaPrefillConfig(64, 32, 4, 2), MlaPrefillConfig(64, 32, 4, 1), MlaPrefillConfig(128, 64, 8, 2)],
        ["", "no asynchronous copies", ""],
        [2, 0],
    ),
}


@pytest.mark.full(but_each=2)
@pytest.mark.ci
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_ranks_what_fits_and_says_why_the_rest_is_dropped(family, tmp_path, monkeypatch):
    case, configs, reasons, order = SWEPT[family]
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], search_space=lambda *args, **case: configs))
    monkeypatch.setattr(sweep, "map_in_processes", map)
    with Journal(tmp_path / "sweep.jsonl") as journal:
        arguments = "sm_90", "bfloat16", [case], journal, sweep.Budget(None)
        survivors, left = sweep.compile_all(tmp_path / "sweep.csv", family, *arguments)
    best_first = [sweep._candidate(row, case).config for row in survivors[sweep.values_of(case)]]
    assert left == 0
    assert best_first == [configs[i] for i in order]
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    for row, reason in zip(rows, reasons):
        assert reason in row["dropped"]
        assert bool(reason) == bool(row["dropped"])
    assert [float(row["useful share"]) for row, reason in zip(rows, reasons) if not reason] == [1.0] * len(order)
    assert all(rows[0][name] == str(value) for name, value in case.items())


@pytest.mark.ci
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_compile_the_kernel_of_a_default_call(family, monkeypatch):
    """The first config of the search space is the default, and its code is the code of public calls."""
    case = SWEPT[family][0]
    kind = FAMILIES[family]
    default = kind.search_space("sm_90", torch.bfloat16, **case)[0]
    ours = kind.compile("sm_90", torch.bfloat16, config=default, **case)
    if family in HOPPER:
        monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
        (users,) = launched(family, case)
    elif family == "flash_backward":
        users = compiled.flash_backward("sm_90", torch.bfloat16, case["head_dim"], case["causal"])[-1]
    else:
        users = kind.compile("sm_90", torch.bfloat16, **case)
    if family == "flash_backward":  # a list, with a launch for dk and one for dv past some head dim
        (ours,) = ours
    assert ours.kernel.asm["cubin"] == users.kernel.asm["cubin"]


# Shapes, and the kernel.
HOPPER = {
    "flash_hopper": ({"head_dims": [128]}, "_flash_fwd_hopper_kernel"),
    "mla_hopper": ({"models": ["DeepSeek-V3"]}, "_mla_decode_hopper_kernel"),
}


def launched(family, case):
    """Launches of this kernel of hopper.py by a public call."""
    with compile_only("sm_90") as launches:
        CALLS[family.removesuffix("_hopper")].make(triton_attn, torch.bfloat16, **case)
    return [launch for launch in launches if launch.name == HOPPER[family][1]]


@pytest.mark.ci
@pytest.mark.parametrize("family", HOPPER)
def test_calls_take_a_kernel_of_hopper_that_a_sweep_found(family, tmp_path, monkeypatch):
    """In each case, by the table that the sweep writes, once its figures are measured and recorded."""
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "auto")
    monkeypatch.setattr(tuned, "_shipped", lambda arch: {})
    monkeypatch.setattr(sweep, "map_in_processes", map)
    shapes, _ = HOPPER[family]
    cases = FAMILIES[family].cases("bfloat16", *shapes.values())
    assert len(cases) == 2
    assert not any(launched(family, case) for case in cases)
    path = tmp_path / "t.json"
    sweep.run(tmp_path, family, table=path, **shapes)
    try:
        use_tuned(path)
        assert not any(launched(family, case) for case in cases)
        table = json.loads(path.read_text())
        for entry in table["entries"]:
            digest = kernel_digest(tuned.FAMILIES[entry["family"]].kernel)
            entry |= {"source": tuned.MEASURED, "portable": entry["figure"], "kernel": digest}
        path.write_text(json.dumps(table))
        use_tuned(path)
        assert all(launched(family, case) for case in cases)
    finally:
        use_tuned(None)


@pytest.mark.ci
def test_matmuls_that_warps_repeat_rank_below():
    """The scores of 16 rows and 16 keys are work for two warps."""
    few, many = (
        Candidate("paged", "sm_80", "bfloat16", DECODE | {"head_dim": 64}, PagedConfig(16, 16, warps, 3)).compile()
        for warps in (2, 8)
    )
    assert few["useful share"] == 1.0
    assert many["useful share"] < 1.0
    assert sweep._rank(few) < sweep._rank(many)
