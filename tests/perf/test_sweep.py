"""The logic of a sweep around faked compilations and timings. test_compiled.py has compiled sweeps."""

import csv
import json
import shutil
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from perf import results
from perf.commands import sweep
from perf.harness import measure
from perf.harness.journal import Journal
from perf.harness.timing import Percentiles
from perf.model import candidates
from perf.model.candidates import FAMILIES, MODEL_COLUMNS, WIDEST_HEADS, Candidate
from perf.model.compiled import HOPPER_CONFIGS, config_name
from perf.results import MEASURED, winners
from perf.workloads import providers, records
from perf.workloads.problems import ChunkProblem, DecodeProblem, LatentDecodeProblem, LatentPrefillProblem, Problem
from triton_attn._host import tuned
from triton_attn._host.sources import kernel_digest
from triton_attn.dense.backward_configs import KERNELS, BackwardConfig, dk_apart_from_dv
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig, HopperConfig
from triton_attn.mla.configs import MlaDecodeConfig, MlaHopperConfig, MlaPrefillConfig
from triton_attn.paged.configs import PagedConfig

CONFIGS = [FlashConfig(64, keys, 4, 2) for keys in (32, 64, 128)]
TILE = {
    "flash": FlashConfig,
    "flash_hopper": HopperConfig,
    "flash_backward": FlashConfig,
    "paged": PagedConfig,
    "paged_prefill": PagedConfig,
    "mla": MlaDecodeConfig,
    "mla_hopper": MlaHopperConfig,
    "mla_prefill": MlaPrefillConfig,
}


@pytest.fixture
def compiled(monkeypatch):
    """Candidates that were compiled, or would have been. All have a row, and larger tiles are better."""
    done = []

    def compile_one(candidate):
        done.append(candidate.config)
        row = dict.fromkeys(MODEL_COLUMNS) | {"lock TFLOP/s": float(candidate.config.block_n), "dropped": ""}
        return candidate.columns | row

    monkeypatch.setattr(Candidate, "compile", compile_one)
    monkeypatch.setattr(sweep, "map_in_processes", map)
    monkeypatch.setattr(sweep, "has_gpu", lambda: False)
    monkeypatch.setitem(FAMILIES, "flash", replace(FAMILIES["flash"], search_space=lambda *args, **case: CONFIGS))
    return done


def test_a_sweep_goes_on_where_it_was_interrupted(compiled, tmp_path, monkeypatch, capsys):
    def until_interrupted(function, items):
        yield function(items[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "map_in_processes", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(tmp_path, head_dims=[64])
    assert compiled == CONFIGS[:1]
    journal = tmp_path / "sweep-flash-bfloat16.jsonl"
    with journal.open("a") as file:
        file.write('{"key": {"family": "fl')
    monkeypatch.setattr(sweep, "map_in_processes", map)
    (path,) = sweep.run(tmp_path, head_dims=[64])
    assert compiled == CONFIGS + CONFIGS, "full and causal, each once"
    rows = list(csv.DictReader(path.open()))
    assert [(row["causal"], row["block_n"]) for row in rows] == [
        (causal, keys) for causal in ("False", "True") for keys in ("32", "64", "128")
    ]
    sweep.run(tmp_path, head_dims=[64])
    assert len(compiled) == 6, "nothing is done again"
    assert list(csv.DictReader(path.open())) == rows
    assert "left" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("triton.__version__", "0.0"), ("source_hash", lambda kernels: "other")])
def test_another_triton_or_kernel_is_new_work(compiled, tmp_path, monkeypatch, name, value):
    sweep.run(tmp_path, head_dims=[64])
    monkeypatch.setattr(f"perf.model.candidates.{name}", value)
    sweep.run(tmp_path, head_dims=[64])
    assert len(compiled) == 12


def test_sweeps_may_share_a_journal(compiled, tmp_path):
    journal = tmp_path / "all.jsonl"
    for folder in ("first", "second"):
        sweep.run(tmp_path / folder, head_dims=[64], journal_path=journal)
    assert len(compiled) == len(journal.read_text().splitlines()) == 6


def test_arch_dtype_and_shape_are_new_work(compiled, tmp_path):
    sweep.run(tmp_path, head_dims=[64])
    for other in ({"arch": "sm_80"}, {"dtype": "float16"}, {"head_dims": [128]}):
        sweep.run(tmp_path, **{"head_dims": [64]} | other)
    assert len(compiled) == 4 * 6
    lines = [json.loads(line) for line in (tmp_path / "sweep-flash-bfloat16.jsonl").read_text().splitlines()]
    assert {line["key"]["arch"] for line in lines} == {"sm_80", "sm_90"}


def test_the_source_hash_is_that_of_the_kernels(monkeypatch, tmp_path):
    package = shutil.copytree(Path(candidates.triton_attn.__file__).parent, tmp_path / "triton_attn")
    monkeypatch.setattr(candidates.triton_attn, "__file__", str(package / "__init__.py"))

    def changed_by(file):
        def hashes():
            return {name: candidates.source_hash.__wrapped__(kind.folder) for name, kind in FAMILIES.items()}

        before = hashes()
        with (package / file).open("a") as source:
            source.write("\n")
        return [name for name, value in hashes().items() if value != before[name]]

    assert changed_by("flash/configs.py") == ["flash", "flash_hopper", "flash_backward"]
    assert changed_by("mla/projections.py") == ["mla", "mla_hopper", "mla_prefill"]
    assert changed_by("paged/forward.py") == ["paged", "paged_prefill"]
    assert changed_by("cache/kernels/append.py") == []
    assert changed_by("merge/splits.py") == list(FAMILIES)
    assert changed_by("dense/backward_configs.py") == list(FAMILIES)
    assert changed_by("_jit/masks.py") == list(FAMILIES)


def test_a_budget_ends_a_sweep_with_what_it_has(compiled, tmp_path, monkeypatch, capsys):
    now = iter([0.0, 10.0, 50.0, *[60.0] * 10])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(now))
    (path,) = sweep.run(tmp_path, head_dims=[64], minutes=1)
    assert len(compiled) == 2
    assert len(list(csv.DictReader(path.open()))) == 2
    said = capsys.readouterr().out
    assert "1 minutes are over and 4 candidates are left" in said
    assert "causal False: the best of 2 survivors" in said
    assert "causal True" not in said
    sweep.run(tmp_path, head_dims=[64])
    assert len(compiled) == 6


def test_a_sweep_keeps_its_winners_in_a_table(compiled, tmp_path, monkeypatch, capsys):
    table = tmp_path / "t.json"
    now = iter([0.0, 10.0, *[60.0] * 10])
    with monkeypatch.context() as patched:
        patched.setattr(sweep.time, "monotonic", lambda: next(now))
        sweep.run(tmp_path, head_dims=[64], minutes=1, table=table)
    assert not table.exists(), "a case has no winner before all its configs are known"
    sweep.run(tmp_path, head_dims=[64], table=table)
    entries = tuned.read_table(table)["entries"]
    assert [(entry["case"]["causal"], entry["config"]["block_n"]) for entry in entries] == [(False, 128), (True, 128)]
    assert "2 winners of flash are in" in capsys.readouterr().out


def test_a_case_without_survivors_is_told(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Candidate, "compile", lambda c: c.columns | dict.fromkeys(MODEL_COLUMNS) | {"dropped": "no wgmma"}
    )
    (path,) = sweep.run(tmp_path, head_dims=[64])
    assert capsys.readouterr().out.count("every candidate was dropped") == 2
    assert {row["dropped"] for row in csv.DictReader(path.open())} == {"no wgmma"}


@pytest.mark.parametrize(
    ("family", "shapes", "said"),
    [
        ("flash", {"models": ["Llama-3-8B"]}, "has no --model"),
        ("mla", {"head_dims": [64]}, "has no --head-dim"),
        ("paged", {"models": ["DeepSeek-V3"]}, "has no DeepSeek-V3; it has Llama-2-7B"),
        ("flash_hopper", {"head_dims": [512]}, "nothing to do"),
    ],
)
def test_shapes_that_a_family_lacks_are_refused(family, shapes, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        sweep.run(tmp_path, family, **shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_space_for_its_shapes(family):
    kind = FAMILIES[family]
    cases = kind.cases("bfloat16", kind.shapes)
    assert len({sweep.values_of(case) for case in cases}) == len(cases)
    for case in cases:
        space = kind.search_space("sm_90", torch.bfloat16, **case)
        assert len(space) > 5 or kind.config in HOPPER_CONFIGS  # few of which fit
        assert {type(config) for config in space} == {kind.config}
        assert kind.problem(kind.seqlens[-1], **case).figure in ("tflops", "gbps")


SPLIT = ("dkdv", "dq")


@pytest.mark.parametrize(
    ("arch", "head_dim", "swept"),
    [
        ("sm_90", 264, KERNELS),
        ("sm_90", 384, KERNELS),
        ("sm_90", 392, SPLIT),
        ("sm_90", 512, SPLIT),
        ("sm_80", 320, SPLIT),
        ("sm_80", 512, SPLIT),
    ],
)
def test_backward_tiles_of_every_head_dim_are_swept(arch, head_dim, swept):
    """A pass with a launch for dk and one for dv is never fused. The default pass comes first, if it has the kernel."""
    kind, found = FAMILIES["flash_backward"], []
    for case in kind.cases("bfloat16", [head_dim]):
        space = kind.search_space(arch, torch.bfloat16, **case)
        apart = [dk_apart_from_dv(arch, (head_dim, head_dim), tile) for tile in space]
        assert case["kernel"] != "fused" or not any(apart)
        default = getattr(BackwardConfig.default(kind.case_of(arch, torch.bfloat16, **case)), case["kernel"])
        assert not space or default in (None, space[0])
        found += [case["kernel"]] if space and case["causal"] else []
    assert found == [kernel for kernel in KERNELS if kernel in swept]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("family", ["flash", "flash_backward", "paged", "paged_prefill"])
def test_head_dim_512_can_be_tuned(family, arch):
    kind = FAMILIES[family]
    assert kind.option != "models" or WIDEST_HEADS in kind.shapes
    for case in kind.cases("bfloat16", [WIDEST_HEADS if kind.option == "models" else 512]):
        assert case["head_dim"] == 512
        space = kind.search_space(arch, torch.bfloat16, **case)
        assert len(space) > 1 or case.get("kernel") == "fused"


@pytest.mark.parametrize(
    ("shape", "said"),
    [("16/3/512", "has no 16/3/512"), ("16/2/513", "has no 16/2/513"), ("0/2/64", "has no"), ("2/0/64", "has no")],
)
def test_a_shape_in_numbers_is_checked(shape, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        sweep.run(tmp_path, "paged", models=[shape])


def test_a_shape_in_numbers_is_that_of_a_model():
    for family in ("paged", "paged_prefill"):
        of_numbers, of_model = (FAMILIES[family].cases("bfloat16", [name]) for name in ("32/8/128", "Llama-3-8B"))
        assert of_numbers == of_model


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("flash", {"head_dim": 512, "causal": True}),
        pytest.param("flash_backward", {"kernel": "dkdv", "head_dim": 512, "causal": True}, marks=pytest.mark.ci),
        pytest.param("flash_backward", {"kernel": "dq", "head_dim": 512, "causal": True}, marks=pytest.mark.ci),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("kernel", ""),
)
def test_the_default_of_head_dim_512_survives_a_sweep(family, case):
    """On sm_80 it has no pipeline. dkdv is launched for dk and for dv, whose figures are one row."""
    default = FAMILIES[family].search_space("sm_80", torch.bfloat16, **case)[0]
    row = Candidate(family, "sm_80", "bfloat16", case, default).compile()
    assert row["dropped"] == ""
    assert row["lock TFLOP/s"] > 20


DK = {"registers": 200, "shared B": 3, "spills": 1, "spills in loop": 0, "loop instructions": 10, "useful share": 0.5}
DK |= {"lock TFLOP/s": 30.0, "bound TFLOP/s": 60.0, "expected TFLOP/s": None}


def test_figures_of_two_launches():
    """Three matmuls at 30 and two at 20 TFLOP/s take the time of four at 20."""
    both = candidates._of_both(DK, DK | {"registers": 100, "shared B": 4, "spills": 2, "lock TFLOP/s": 20.0})
    assert (both["registers"], both["shared B"], both["spills"], both["loop instructions"]) == (200, 4, 3, 20)
    assert both["lock TFLOP/s"] == pytest.approx(20.0)
    assert both["bound TFLOP/s"] == pytest.approx(48.0)
    assert both["useful share"] == pytest.approx(0.5)
    assert both["expected TFLOP/s"] is None


TIMED = {
    "flash": ({"head_dim": 16, "causal": True}, Problem(1, 64, 2, 16, True)),
    "flash_backward": (
        {"kernel": "fused", "head_dim": 16, "causal": True},
        Problem(1, 64, 2, 16, True, direction="backward"),
    ),
    "paged": (
        {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16, "page_size": 8},
        DecodeProblem(3, 37, 4, 2, 16, page_size=8),
    ),
    "paged_prefill": (
        {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16, "page_size": 8, "seqlen_q": 5},
        ChunkProblem(2, 37, 4, 2, 16, page_size=8, seqlen_q=5),
    ),
    "mla_prefill": (
        {
            "num_heads": 2,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "kv_lora_rank": 32,
            "fused": True,
        },
        LatentPrefillProblem(40, 40, 2, 16, 8, 16, 32),
    ),
    "mla": (
        {"num_heads": 4, "cache_dtype": "float8_e4m3fn", "page_size": 8},
        LatentDecodeProblem(3, 37, 4, "float8_e4m3fn", kv_lora_rank=128, qk_rope_head_dim=16, page_size=8),
    ),
}


@pytest.fixture
def timed(monkeypatch):
    """The number of timing launches of each candidate."""
    launched = []

    def time_interleaved(functions, behind):
        assert behind == sweep.BEHIND
        for name, function in functions.items():
            launched.append(name)
            function()
        return {name: Percentiles(1.0, 2.0, 4.0) for name in functions}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)
    return launched


# Gluon has no interpreter.
INTERPRETED = sorted(family for family, kind in FAMILIES.items() if kind.config not in HOPPER_CONFIGS)


def finalists(family, case, *keys):
    return [Candidate(family, "sm_90", "bfloat16", case, TILE[family](16, n, 4, 1)) for n in keys]


def time_on_cpu(folder, cases, seqlens=(64,), minutes=None):
    """(entries of a tuned table, number of candidates left, rows of the CSV)."""
    path = folder / "measured.csv"
    with Journal(folder / "sweep.jsonl") as journal, results.Table(path, results.COLUMNS) as table:
        found, left = sweep.time_all(table, cases, seqlens, journal, sweep.Budget(minutes), "cpu")
    return found, left, list(csv.DictReader(path.open()))


def test_on_a_gpu_the_best_and_the_default_are_timed_and_the_fastest_kept(compiled, timed, tmp_path, monkeypatch):
    default = FlashConfig(64, 16, 4, 1)
    monkeypatch.setattr(sweep, "FINALISTS", 2)
    space = [default, *(FlashConfig(64, keys, 4, 1) for keys in (32, 64, 128))]
    kind = replace(
        FAMILIES["flash"],
        problem=lambda n, **case: Problem(1, n, 2, 16, case["causal"]),
        roof=lambda: 1.0,
        search_space=lambda *args, **case: space,
    )
    monkeypatch.setitem(FAMILIES, "flash", kind)
    for name, value in (("has_gpu", True), ("gpu_arch", "sm_90")):
        monkeypatch.setattr(sweep, name, lambda value=value: value)
    monkeypatch.setattr(winners, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(sweep, "time_all", partial(sweep.time_all, device="cpu"))
    table = tmp_path / "t.json"
    _, measured = sweep.run(tmp_path, head_dims=[16], seqlens=[33, 64], table=table)
    assert set(timed) == {"64x16 w4 s1", "64x64 w4 s1", "64x128 w4 s1"}
    assert len(list(csv.DictReader(measured.open()))) == 3 * 2 * 2, "configs, lengths, masks"
    entries = tuned.read_table(table)["entries"]
    assert [(x["case"]["causal"], x["buckets"]["seqlen_k"]) for x in entries] == [
        (causal, n) for causal in (False, True) for n in (33, 64)
    ]
    assert all(FlashConfig(**entry["config"]) == default for entry in entries), "all are equally fast"


@pytest.mark.ci
@pytest.mark.parametrize("family", INTERPRETED)
def test_finalists_are_found_right_and_timed_once(family, timed, tmp_path, monkeypatch):
    case, problem = TIMED[family]
    kind = replace(FAMILIES[family], problem=lambda seqlen, **case: problem, roof=lambda: 1.0)
    monkeypatch.setitem(FAMILIES, family, kind)
    monkeypatch.setattr(candidates, "gpu_arch", lambda: "sm_90")
    monkeypatch.setattr(winners, "gpu_name", lambda: "a GPU")
    for _ in range(2):
        found, left, rows = time_on_cpu(tmp_path, [finalists(family, case, 16, 32)])
        beside = {"flash_backward": "fused ", "mla_prefill": "fused "}.get(family, "")
        suffix = " c64" if family == "mla_prefill" else ""
        assert left == 0
        assert [row["note"] for row in rows] == [f"{beside}16x{n} w4 s1{suffix}" for n in (16, 32)]
        assert [(row["p20_ms"], row["p50_ms"], row["p80_ms"]) for row in rows] == [("1.0", "2.0", "4.0")] * 2
        assert all(row["pass"] == problem.columns()["direction"] for row in rows)
        for entry in found:
            assert (entry["source"], entry["device"]) == (MEASURED, "a GPU")
            assert entry["figure"] == pytest.approx(float(rows[0][problem.figure]), rel=1e-3)
    assert len(found) == (0 if family == "flash_backward" else 1), "a backward pass has more than one kernel"
    assert timed == [f"16x{n} w4 s1{suffix}" for n in (16, 32)]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_portable_kernel_is_timed_beside_one_that_may_replace_it(factor, tmp_path, monkeypatch):
    """And so are peers. A record in which it is faster does not make the other one the default."""
    portable = FAMILIES["flash"].provider("bfloat16", head_dim=64, causal=True)
    kind = replace(
        FAMILIES["flash_hopper"],
        problem=lambda seqlen, **case: Problem(1, seqlen, 2, 64, True),
        roof=lambda: 1.0,
        provider=lambda dtype, **case: lambda config: portable(FlashConfig(16, 32, 4, 1)),  # Gluon has no interpreter
        peers={"SDPA math": providers._sdpa(SDPBackend.MATH)},
    )
    monkeypatch.setitem(FAMILIES, "flash_hopper", kind)
    monkeypatch.setattr(candidates, "gpu_arch", lambda: "sm_90")
    monkeypatch.setattr(winners, "gpu_name", lambda: "a GPU")
    milliseconds = {True: 2.0, False: 2.0 * factor}

    def time_interleaved(functions, behind):
        return {name: Percentiles(*3 * [milliseconds["hopper" in name]]) for name in functions}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)
    case = {"head_dim": 64, "causal": True}
    space = kind.search_space("sm_90", torch.bfloat16, **case)
    own = [Candidate("flash_hopper", "sm_90", "bfloat16", case, config) for config in space]
    (entry,), _, rows = time_on_cpu(tmp_path, [own])
    assert len(rows) == len(own) + 2
    assert entry["figure"] == pytest.approx(factor * entry["portable"], rel=1e-3)
    assert entry["peers"] == {"SDPA math": entry["portable"]}
    assert 0 < entry["error"] < entry["bound"]
    assert entry["date"] == date.today().isoformat()
    assert entry["kernel"] == kernel_digest("flash/hopper.py")
    winners.update(tmp_path / "sm_90.json", "sm_90", [entry])
    monkeypatch.setattr(tuned, "_added", [tuned._index_of(tmp_path / "sm_90.json")])
    of_call = kind.case_of("sm_90", torch.bfloat16, **case)
    chosen = HopperConfig.choose(of_call, "auto")
    assert chosen == (HopperConfig.from_dict(entry["config"]) if factor > 1 else None)


def test_a_kernel_with_narrow_values_is_timed_beside_the_portable_one_of_the_same_call(monkeypatch):
    """Queries and keys of 192 and values of 128: the portable config is that of such a call."""
    monkeypatch.setattr(records, "gpu_arch", lambda: "sm_90")
    case = {"family": "flash_hopper", "dtype": "bfloat16", "case": {"head_dim": 192, "causal": True}}
    assert case in records.record_cases()
    *own, portable = records.candidates_of(case, 4096)
    assert {candidate.config.tiles for candidate in own} == {1}, "no room for results beside the queries"
    assert portable.family == "flash"
    call = FlashCase("sm_90", torch.bfloat16, 192, 128, True, seqlen_k=4096)
    assert portable.config == tuned.choose(FlashConfig, call)
    problem = FAMILIES["flash_hopper"].problem(1024, **case["case"])
    assert [shape[-1] for shape in problem.shapes] == [192, 192, 128]
    assert problem.flops == problem.batch * problem.num_heads * 1024**2 * (192 + 128)
    assert problem.bytes(2) == 2 * problem.batch * problem.num_heads * 1024 * 2 * (192 + 128)


def test_a_record_tries_several_tiles_for_a_program(monkeypatch):
    monkeypatch.setattr(records, "gpu_arch", lambda: "sm_90")
    case = {"family": "flash_hopper", "dtype": "bfloat16", "case": {"head_dim": 128, "causal": True}}
    *own, _ = records.candidates_of(case, 1024)
    default = HopperConfig(128, 2, 2)
    assert {default, replace(default, tiles=2)} <= {candidate.config for candidate in own}
    names = {config_name(candidate.config) for candidate in own}
    assert {"128x128 w8 s2 hopper lazy", "128x128 w8 s2 hopper lazy x2"} <= names
    assert len(names) == len(own), "rows are told apart by name"


def test_configs_of_a_decode_step_share_the_cache_and_not_the_output():
    problem = TIMED["paged"][1]
    tensors = [torch.randn(shape) for shape in problem.shapes]
    provider = FAMILIES["paged"].provider("float32")
    first, second = (provider(PagedConfig(16, keys, 4, 1))(problem, *tensors) for keys in (16, 32))
    first()
    assert all(a is b for a, b in zip(first.args, second.args))
    assert second.keywords["out"].isnan().all()
    torch.testing.assert_close(second(), first())


def test_a_finalist_that_fails_is_not_timed(timed, tmp_path, monkeypatch):
    case, problem = TIMED["flash"]
    kind = replace(FAMILIES["flash"], problem=lambda seqlen, **case: problem, roof=lambda: 1.0)
    monkeypatch.setitem(FAMILIES, "flash", kind)
    (entry,), _, (right, wrong) = time_on_cpu(tmp_path, [finalists("flash", case, 16, 24)])
    assert entry["config"]["block_n"] == 16
    assert right["p50_ms"] == "2.0"
    assert wrong["p50_ms"] == ""
    assert wrong["note"].startswith("16x24 w4 s1 ")
    assert timed == ["16x16 w4 s1"]


def test_a_budget_leaves_cases_untimed(timed, tmp_path):
    found, left, _ = time_on_cpu(tmp_path, [finalists("flash", TIMED["flash"][0], 16, 32)], minutes=0)
    assert (found, left) == ([], 2)
    assert timed == []
