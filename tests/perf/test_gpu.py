"""The orchestration of `python -m perf gpu`, with cases that need no GPU."""

import csv
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_cases
import pytest
from small_problems import fake_times

from perf import __main__, results
from perf.commands import gpu, verify
from perf.commands.sweep import Budget
from perf.harness import measure
from perf.harness.isolation import headline, map_isolated
from perf.harness.machine import COPY
from perf.model.candidates import FAMILIES
from perf.results import gpu_report, winners
from perf.workloads import gpu_cases
from perf.workloads.providers import FLEX

CHECKOUT = Path(__file__).parents[2]


def stage(*cases, **changes):
    plain = gpu.Stage(
        name="fake",
        csv="fake.csv",
        share=1,
        limit=60,
        columns=["name", "outcome"],
        cases=lambda: list(cases),
        run=fake_cases.run,
        failure=lambda case, why: case | {"outcome": why},
        has_failed=lambda row: row["outcome"] != "passed",
        reason="outcome",
    )
    return replace(plain, **changes)


def named(*names, **more):
    return [{"name": name} | more for name in names]


def rows_of(path):
    with path.open(newline="") as file:
        return {row["name"]: row["outcome"] for row in csv.DictReader(file)}


@pytest.mark.ci
def test_what_fails_crashes_or_hangs_is_recorded_and_the_rest_runs(tmp_path):
    cases = named("first", "raises", "crashes", "hangs", "wrong", "last")
    report = gpu.run_stages([stage(*cases, limit=2)], tmp_path, minutes=5)
    assert rows_of(tmp_path / "fake.csv") == {
        "first": "passed",
        "raises": "ValueError: no such shape",
        "crashes": "the process ended, exit code 7",
        "hangs": "not done after 2 s",
        "wrong": "wrong",
        "last": "passed",
    }
    assert {failure["case"]["name"] for failure in report.failures} == {"raises", "crashes", "hangs", "wrong"}
    (about,) = json.loads((tmp_path / gpu_report.REPORT).read_text())["stages"]
    assert (about["done"], about["failed"], about["left"]) == (6, 4, 0)
    log = (tmp_path / gpu_report.LOG).read_text()
    assert '== fake: {"name": "raises"}: ValueError: no such shape\n' in log
    assert 'raise ValueError("no such shape' in log
    assert "fake_cases.py" in log.split("not done after 2 s")[1].split("==")[0], "where it hangs"
    assert "said by the compiler" in log.split("exit code 7")[1].split("==")[0]


def test_several_processes_share_the_cases(tmp_path):
    names = [f"case {i}" for i in range(5)] + ["crashes"]
    gpu.run_stages([stage(*named(*names), workers=3)], tmp_path, minutes=5)
    assert rows_of(tmp_path / "fake.csv").keys() == set(names)


def test_a_run_that_its_budget_ends_is_resumed(tmp_path, monkeypatch):
    log = tmp_path / "log"
    cases = named("raises", "a", "b", "c", log=str(log))
    log.touch()

    class OverAfterTwoCases(Budget):
        def seconds_left(self):
            return 0 if len(log.read_text().split()) >= 2 else super().seconds_left()

    with monkeypatch.context() as patches:
        patches.setattr(gpu, "Budget", OverAfterTwoCases)
        first = gpu.run_stages([stage(*cases)], tmp_path, minutes=5)
    assert first.stages[0]["left"] == 2
    assert list(rows_of(tmp_path / "fake.csv")) == ["raises", "a"]
    second = gpu.run_stages([stage(*cases)], tmp_path, minutes=5)
    assert second.stages[0]["left"] == 0
    assert list(rows_of(tmp_path / "fake.csv")) == ["raises", "a", "b", "c"]
    assert log.read_text().split() == ["raises", "a", "raises", "b", "c"], "what failed is tried again"
    assert [failure["why"] for failure in second.failures] == ["ValueError: no such shape"]


@pytest.mark.ci
def test_the_end_of_the_run_cuts_a_case_short_and_leaves_it(tmp_path):
    report = gpu.run_stages([stage(*named("hangs"))], tmp_path, minutes=2 / 60)
    assert (report.stages[0]["left"], report.failures) == (1, [])


@pytest.mark.parametrize(("taken", "expected"), [(0, [120, 120 + 360]), (200, [120, 360])])
def test_a_stage_has_its_share_and_what_those_before_it_left(tmp_path, monkeypatch, taken, expected):
    now, seconds = [0.0], []

    def run_stage(stage, journal, report, budget, end):
        seconds.append(budget.seconds_left())
        now[0] += taken

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    gpu.run_stages([stage(share=1), stage(share=3)], tmp_path, minutes=8)
    assert seconds == pytest.approx(expected)


def test_a_crashed_case_is_run_in_pieces(tmp_path):
    def split(case):
        return named(*case["crashing"]) if "crashing" in case else []

    whole = {"name": "a", "crashing": ["a", "crashes"]}
    report = gpu.run_stages([stage(whole, split=split)], tmp_path, minutes=5)
    assert rows_of(tmp_path / "fake.csv") == {"a": "passed", "crashes": "the process ended, exit code 7"}
    assert report.stages[0]["failed"] == 1


def test_a_stage_whose_cases_cannot_be_listed_is_a_failure_and_the_next_runs(tmp_path):
    def broken():
        raise RuntimeError("no tests")

    stages = [stage(cases=broken), stage(*named("a"), name="next", csv="next.csv")]
    report = gpu.run_stages(stages, tmp_path, minutes=5)
    assert [failure["why"] for failure in report.failures] == ["RuntimeError: no tests"]
    assert rows_of(tmp_path / "next.csv") == {"a": "passed"}


def test_an_error_of_a_stage_itself_is_a_failure_and_the_next_runs(tmp_path):
    def broken(report):
        raise RuntimeError("no roofs")

    stages = [stage(*named("a"), given=broken), stage(*named("a"), name="next", csv="next.csv")]
    report = gpu.run_stages(stages, tmp_path, minutes=5)
    assert [failure["why"] for failure in report.failures] == ["RuntimeError: no roofs"]
    assert rows_of(tmp_path / "next.csv") == {"a": "passed"}


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def broken(rows):
        raise TypeError("None / None")

    monkeypatch.setattr(gpu_report, "judge", broken)
    (tmp_path / gpu_report.LOG).mkdir()
    report = gpu.run_stages([stage(*named("a", "raises"))], tmp_path, minutes=5)
    about = json.loads((tmp_path / gpu_report.REPORT).read_text())
    assert (about["targets"], len(about["failures"])) == ([], 1)
    report.print()


def test_the_log_has_the_end_of_a_traceback_and_a_limit(tmp_path, monkeypatch):
    report = gpu.Report(tmp_path, minutes=1)
    plain = stage()
    report.begin(plain)
    report.fail(plain, {"name": "a"}, "why", "\n".join(f"line {i}" for i in range(100)))
    log = tmp_path / gpu_report.LOG
    said = log.read_text().splitlines()
    assert said[:2] == ['== fake: {"name": "a"}: why', f"line {100 - gpu_report.LOG_LINES}"]
    assert "line 99" in said
    monkeypatch.setattr(gpu_report, "LOG_BYTES", log.stat().st_size)
    report.fail(plain, {"name": "b"}, "why")
    assert log.read_text().splitlines() == said


def test_what_is_timed_is_compiled_before(tmp_path):
    log = tmp_path / "log"
    kinds = [{"name": name, "log": str(log)} for name in ("a", "b", "raises")]
    compiling = stage(
        *kinds,
        compile=fake_cases.run,
        compilers=2,
        to_compile=lambda case: [case | {"name": f"{case['name']}{i}"} for i in range(2)] + [case],
    )
    report = gpu.run_stages([compiling], tmp_path, minutes=5)
    order = log.read_text().split()
    assert sorted(order[:9]) == sorted(x for name in ("a", "b", "raises") for x in (name, f"{name}0", f"{name}1"))
    assert order[9:] == ["a", "b", "raises"]
    assert [failure["case"]["name"] for failure in report.failures] == ["raises"], "once, where it is timed"
    gpu.run_stages([compiling], tmp_path, minutes=5)
    assert "a0" not in log.read_text().split()[12:], "what is known is not compiled again"


def test_another_gpu_adds_its_rows(tmp_path, monkeypatch):
    def found():
        with (tmp_path / "fake.csv").open(newline="") as file:
            return [(row["gpu"], row["name"]) for row in csv.DictReader(file)]

    def run(name, *cases):
        for module in (gpu, gpu_report):
            monkeypatch.setattr(module, "gpu_name", lambda: name)
        gpu.run_stages([stage(*named(*cases))], tmp_path, minutes=5)

    run("H100", "a", "b")
    run("H200", "a")
    assert found() == [("H100", "a"), ("H100", "b"), ("H200", "a")]
    monkeypatch.setattr(gpu, "code_hash", lambda *patterns: "other")
    run("H100", "a")
    assert found() == [("H200", "a"), ("H100", "a")], "what other code found on this GPU is gone"


def test_the_journal_knows_the_code_and_not_the_commit(monkeypatch, tmp_path):
    key = gpu._key(stage(), {"name": "a"})
    monkeypatch.setattr(gpu, "versions", lambda: {"driver": None, "torch": "0", "triton": "0", "commit": "other"})
    assert "commit" not in gpu._key(stage(), {"name": "a"})
    monkeypatch.setattr(gpu.cases, "CHECKOUT", tmp_path)
    (tmp_path / "perf").mkdir()
    (tmp_path / "perf/a.py").write_text("1")
    one = gpu.code_hash.__wrapped__(*gpu.CODE)
    (tmp_path / "perf/a.py").write_text("2")
    assert len({key["code"], one, gpu.code_hash.__wrapped__(*gpu.CODE)}) == 3


def test_stages_that_share_a_file_keep_each_others_rows(tmp_path):
    stages = [stage(*named("a"), csv="both.csv"), stage(*named("b"), name="next", csv="both.csv")]
    gpu.run_stages(stages, tmp_path, minutes=5)
    assert list(rows_of(tmp_path / "both.csv")) == ["a", "b"]
    gpu.run_stages(stages[:1], tmp_path, minutes=5)
    assert list(rows_of(tmp_path / "both.csv")) == ["a", "b"]


def test_stages_after_the_records_heed_their_table_and_depend_on_it(tmp_path, monkeypatch):
    """A table that the user names takes precedence."""
    monkeypatch.setattr(gpu, "gpu_arch", lambda: "sm_90")
    table, plain = tmp_path / "sm_90.json", stage(*named("a"), columns=["name", "outcome", "table"])
    run_on = []

    def heeded(stage, users=None):
        monkeypatch.setenv(gpu.TUNED, users or "")
        if users is None:
            monkeypatch.delenv(gpu.TUNED)
        gpu.run_stages([stage], tmp_path, minutes=5)
        run_on.append(len((tmp_path / gpu.JOURNAL).read_text().splitlines()))
        with (tmp_path / "fake.csv").open() as file:
            return next(csv.DictReader(file))["table"]

    assert heeded(plain) == ""
    table.write_text("1")
    assert heeded(replace(plain, heeds_table=False)) == ""
    assert heeded(plain) == heeded(plain) == str(table)
    table.write_text("2")
    assert heeded(plain) == str(table)
    (tmp_path / "users.json").touch()
    assert heeded(plain, users=str(tmp_path / "users.json")) == str(tmp_path / "users.json")
    assert run_on == [1, 1, 2, 2, 3, 4]


def test_stages_are_chosen_by_name():
    assert [x.name for x in gpu.choose("targets, smoke,machine", False)] == ["smoke", "machine", "targets"]
    every = ["records", "smoke", "machine", "targets", "tests", "sanitizer", "bench"]
    assert [x.name for x in gpu.choose(None, False)] == every
    assert gpu.choose(None, True) == gpu.SWEEPS
    with pytest.raises(SystemExit, match=r"--stages: expected some of records,smoke,.*,bench, got sweep, fast"):
        gpu.choose("sweep,smoke,fast", False)
    with pytest.raises(SystemExit, match="--stages"):
        gpu.choose("smoke", True)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ValueError: no such shape\nand more", "ValueError: no such shape"),
        (
            "CompilationError: at 34:20:\n    x = load(error_ptr)\n        ^\nValueError('no such tile')",
            "CompilationError: at 34:20: ... ValueError('no such tile')",
        ),
        (
            "triton.runtime.errors.PTXASError: PTXAS error\nstderr:\nptxas fatal : no register\nRepro: ptxas -v",
            "triton.runtime.errors.PTXASError: PTXAS error ... ptxas fatal : no register",
        ),
        ("CompilationError: at 1:2:\n  f(x)\n  Expected block", "CompilationError: at 1:2: ... Expected block"),
        ("", ""),
    ],
)
def test_the_headline_says_what_is_wrong(message, expected):
    assert headline(message) == expected


def test_leaving_early_ends_the_processes():
    outcomes = map_isolated(
        fake_cases.run, named("a", "hangs"), limit=600, budget=Budget(None), end=Budget(None), workers=2
    )
    next(outcomes)
    outcomes.close()  # does not wait for the other


def test_eight_files_at_most():
    always = {gpu.JOURNAL, gpu_report.REPORT, gpu_report.LOG}
    assert len({stage.csv for stage in gpu.STAGES} - {None} | always | {"sm_90.json"}) == 8
    assert len({stage.csv for stage in gpu.SWEEPS} | always | {gpu.SWEEPS_JOURNAL, "sm_90.json"}) <= 8


@pytest.mark.parametrize(
    ("has_gpu", "options", "said"),
    [
        (False, {}, "needs a GPU"),
        (True, {"minutes": 0}, "--minutes: expected a number above 0, got 0"),
        (True, {"stages": "fast"}, "--stages: expected some of records,smoke,.*, got fast"),
        (True, {"resume": Path("nowhere")}, "--resume: expected the folder of an earlier run"),
    ],
)
def test_mistakes_end_it_before_anything_is_made(tmp_path, monkeypatch, has_gpu, options, said):
    monkeypatch.setattr(gpu, "has_gpu", lambda: has_gpu)
    with pytest.raises(SystemExit, match=said):
        gpu.run(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    (tmp_path / gpu.JOURNAL).touch()
    with pytest.raises(SystemExit, match="holds an earlier run: continue it with --resume"):
        gpu.run(tmp_path)


@pytest.mark.ci
def test_torch_triton_numpy_and_pytest_are_enough():
    """Collect the suite and run a test of it, in a process without the other packages."""
    code = """
        import sys

        missing = "hypothesis", "matplotlib", "pandas", "tabulate", "tqdm", "xdist"
        sys.modules.update(dict.fromkeys(missing))  # an import of None fails as of what is not there
        from perf.commands import gpu

        assert "torch._dynamo" not in sys.modules, "each of a run's processes would import it, for seconds"
        from perf.harness.progress import tqdm
        from perf.results.tables import print_table

        cases = gpu.cases.test_cases()
        case = next(case for case in cases if "test_paged.py::test_repeats_bitwise" in case["test"])
        print_table([{"tests": len(cases), "half": 0.5, "none": None}])
        print_table(list(tqdm(gpu.cases.run_test(case), desc="tests")))
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=CHECKOUT,
        env=env | {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tests  half  none" in done.stdout
    assert "tests/gpu/test_paged.py::test_repeats_bitwise" in done.stdout
    assert "passed" in done.stdout
    assert "tests: 1/1 it" in done.stderr


def test_stages_and_sweeps_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    (tmp_path / gpu.JOURNAL).touch()
    with pytest.raises(SystemExit, match="need separate folders"):
        gpu.run(tmp_path, resume=tmp_path, sweeps=True)


def sanitizer(tmp_path, monkeypatch, says, code, tool="memcheck"):
    script = tmp_path / "compute-sanitizer"
    check = '[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3'
    script.write_text(f"#!/bin/sh\n{check}\necho '========= {says}'\nexit {code}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (row,) = gpu_cases.run_sanitizer({"calls": "flash", "tool": tool})
    return row["outcome"], row["message"]


@pytest.mark.parametrize(
    ("says", "code", "outcome"),
    [
        ("ERROR SUMMARY: 0 errors", 0, ("passed", "")),
        ("ERROR SUMMARY: 3 errors", 99, ("failed", "exit code 99: ERROR SUMMARY: 3 errors")),
        ("Error: Device not supported", 1, (gpu_cases.NOT_AVAILABLE, "Error: Device not supported")),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, says, code, outcome):
    assert sanitizer(tmp_path, monkeypatch, says, code) == outcome


RACE = "Error: Race reported between Write access at {}+0x90 in forward.py:1"


@pytest.mark.parametrize(
    ("kernel", "tool", "code", "outcome"),
    [
        ("_flash_fwd_kernel", "racecheck", 99, gpu_cases.KNOWN),
        ("_flash_bwd_dkdv_kernel", "racecheck", 99, gpu_cases.KNOWN),
        ("_flash_fwd_hopper_kernel", "racecheck", 99, gpu_cases.KNOWN),
        ("_mla_decode_hopper_kernel", "racecheck", 99, gpu_cases.KNOWN),
        ("_mla_absorbed_kernel", "racecheck", 99, "failed"),
        ("_merge_kernel", "racecheck", 99, "failed"),
        ("_flash_fwd_kernel", "memcheck", 99, "failed"),
        ("_flash_fwd_kernel", "racecheck", 1, "failed"),
    ],
)
def test_races_that_tma_only_seems_to_have_are_known(tmp_path, monkeypatch, kernel, tool, code, outcome):
    says = RACE.format("_flash_fwd_kernel") + "\n========= " + RACE.format(kernel)
    found, message = sanitizer(tmp_path, monkeypatch, says, code, tool)
    assert found == outcome
    assert "Race reported" in message


def test_without_a_sanitizer(monkeypatch):
    monkeypatch.setattr(gpu_cases, "find_sanitizer", lambda: None)
    (row,) = gpu_cases.run_sanitizer({"calls": "flash", "tool": "memcheck"})
    assert row["outcome"] == gpu_cases.NOT_AVAILABLE


def test_every_benchmark_is_in_the_journal_and_back():
    cases = [*gpu_cases.target_cases(), *gpu_cases.bench_cases()]
    for case in cases:
        again = json.loads(json.dumps(case))
        assert gpu_cases.problem_of(again) == gpu_cases.problem_of(case)
        assert again["providers"][0].startswith(results.OURS)
    with_flex = [case for case in cases if FLEX in case["providers"]]
    assert len(with_flex) == len(gpu_cases.FORWARD) + 1
    assert len({json.dumps(case) for case in cases}) == len(cases)


def test_what_compiles_is_compiled_by_itself():
    case = gpu_cases.target_cases()[0]
    names = [part["providers"] for part in gpu_cases.what_bench_compiles(case)]
    assert [results.OURS] in names
    assert [FLEX] in names
    assert ["SDPA cuDNN"] not in names
    for case in [*gpu_cases.target_cases(), *gpu_cases.bench_cases()]:
        assert gpu_cases.what_bench_compiles(case)


def test_a_case_compiles_as_it_is_timed(monkeypatch):
    monkeypatch.setattr(gpu_cases, "compile_all", partial(measure.compile_all, device="cpu"))
    called = []
    provider = gpu_cases.LATENT_DECODE_PROVIDERS[results.OURS]
    monkeypatch.setitem(
        gpu_cases.LATENT_DECODE_PROVIDERS, results.OURS, lambda *args: called.append(args) or provider(*args)
    )
    gpu_cases.compile_bench(SMALL)
    assert len(called) == 1


def test_the_smoke_test_calls_every_function_at_every_model():
    cases = gpu_cases.smoke_cases()
    assert {case["function"] for case in cases} == set(verify.CALLS)
    assert {case["model"] for case in cases} == set(gpu_cases.SMOKE_MODELS)
    assert any(case["deterministic"] for case in cases)
    assert cases[0]["function"] == "mla_prefill"


def test_a_smoke_test_names_what_is_wrong(monkeypatch):
    monkeypatch.setattr(gpu_cases, "SMOKE_SEQLEN", 20)
    case = next(case for case in gpu_cases.smoke_cases() if case["function"] == "copy_kv_pages")
    rows = gpu_cases.run_smoke(case)
    assert [row["outcome"] for row in rows] == ["passed"] * 2
    assert set(gpu_cases.SMOKE_COLUMNS) <= set(rows[0])
    about = dict.fromkeys(gpu_cases.SMOKE_COLUMNS) | {"output": "k_cache"}
    row = gpu_cases._smoke_row(case, about, "Gemma, copy_kv_pages: k_cache is wrong\nand more")
    assert (row["outcome"], row["message"]) == ("failed", "Gemma, copy_kv_pages: k_cache is wrong")


SMALL = {
    "kind": "LatentDecodeProblem",
    "problem": {"batch": 2, "seqlen_k": 20, "num_heads_q": 2, "cache_dtype": "bfloat16"},
    "providers": [results.OURS],
}


def test_a_benchmark_gives_the_columns_of_a_results_file(monkeypatch):
    monkeypatch.setattr(measure, "time_interleaved", fake_times)
    monkeypatch.setattr(gpu_cases, "throughput", partial(measure.throughput, device="cpu"))
    (row,) = gpu_cases.run_bench(SMALL, {COPY: 1e3})
    assert [*results.COLUMNS, "log"] == list(row)
    assert row["cache_dtype"] == "bfloat16"
    assert row["roof_share"] == pytest.approx(row["gbps"] / 1e3)
    (row,) = gpu_cases.run_bench(SMALL, {})
    assert row["roof_share"] is None
    lost = gpu_cases.failed_bench(SMALL, "exit code 7")
    assert list(lost) == results.COLUMNS
    assert (lost["provider"], lost["pass"], lost["note"]) == (results.OURS, "decode", "exit code 7")
    assert lost["p50_ms"] is None


def test_a_provider_of_ours_that_fails_has_its_traceback(monkeypatch):
    def broken(*args):
        raise ValueError("no such tile\nand more")

    monkeypatch.setattr(measure, "time_interleaved", fake_times)
    monkeypatch.setattr(gpu_cases, "throughput", partial(measure.throughput, device="cpu"))
    monkeypatch.setitem(gpu_cases.LATENT_DECODE_PROVIDERS, results.OURS, broken)
    (row,) = gpu_cases.run_bench(SMALL, {})
    assert row["note"] == "ValueError: no such tile"
    assert "in broken" in row["log"]


def test_the_report_judges_the_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "gpu_name", lambda: "NVIDIA H100")
    case = gpu_cases.target_cases()[3]
    row = gpu_cases.failed_bench(case, "") | {"gpu": "NVIDIA H100", "roof_share": 0.9, "tflops": 8.0}
    report = gpu.Report(tmp_path, minutes=1)
    bench = stage(name="targets", has_failed=lambda row: False)
    report.begin(bench)
    report.add(bench, case, [row], [""])
    verdicts = {target["verdict"]: target["measured"] for target in report.targets()}
    assert verdicts == {"not measured yet": None, "met": 0.9}
    report.print()


@pytest.mark.parametrize("case", gpu_cases.sweep_cases(), ids=lambda case: " ".join([case["family"], *case["shapes"]]))
def test_a_sweep_is_a_command(case, tmp_path, monkeypatch):
    table = tmp_path / "sm_90.json"
    said = []

    def sweep(command, **_):
        options = __main__._parser("sweep").parse_args(command[3:])
        said.append(options)
        row = dict.fromkeys(results.COLUMNS) | {"provider": results.OURS, "note": "64x64 w4 s2"}
        with results.Table(options.out / f"sweep-{options.family}-bfloat16-measured.csv", row) as measured:
            measured.append(row.values())
        return subprocess.CompletedProcess(command, 0)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / table.name).write_text("the package's")
    monkeypatch.setattr(winners.tuned, "SHIPPED", tmp_path / "package")
    monkeypatch.setattr(gpu_cases.subprocess, "run", sweep)
    journal = tmp_path / "sweeps.jsonl"
    (row,) = gpu_cases.run_sweep(json.loads(json.dumps(case)), table, journal)
    assert row["note"] == "64x64 w4 s2"
    assert table.read_text() == "the package's"
    (options,) = said
    assert (options.table, options.dtype, options.family) == (table, "bfloat16", case["family"])
    assert options.journal_path == journal
    assert 60 * options.minutes < gpu_cases.SWEEP_LIMIT
    shapes = {"head_dims": options.head_dims, "models": options.models}
    kind = FAMILIES[options.family]
    assert kind.cases("bfloat16", shapes[kind.option])


def test_a_sweep_that_fails_says_why(tmp_path, monkeypatch):
    case = {"family": "flash", "shapes": ["--head-dim", "128"]}

    def gives(code, stderr=""):
        done = subprocess.CompletedProcess([], code, stderr=stderr)
        monkeypatch.setattr(gpu_cases.subprocess, "run", lambda *_, **__: done)

    gives(1, "Traceback\nValueError: no such tile\n")
    with pytest.raises(RuntimeError, match="ValueError: no such tile"):
        gpu_cases.run_sweep(case, tmp_path / "sm_90.json", tmp_path / "sweeps.jsonl")
    gives(0)
    with pytest.raises(RuntimeError, match="the minutes were over"):
        gpu_cases.run_sweep(case, tmp_path / "sm_90.json", tmp_path / "sweeps.jsonl")
    row = gpu_cases.failed_sweep(case, "why")
    assert list(row) == results.COLUMNS
    assert gpu.SWEEPS[-1].has_failed(row)
    assert row["note"] == "--head-dim 128: why"
