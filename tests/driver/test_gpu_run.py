"""`python -m perf gpu` from its command line to its files, over the stub driver. No stage needs more than
documented."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from stub_driver import HERE, ROOT, launches_of, stub_environment

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launcher does on a GPU"),
]
STAGES = ["records", "smoke", "machine", "targets", "tests", "sanitizer", "bench"]
H100, H200 = "NVIDIA H100 of the stub", "NVIDIA H200 of the stub"


@pytest.fixture(scope="module")
def run(stub, tmp_path_factory):
    """A function of the arguments of `python -m perf` that returns its exit code and its output."""
    command = [sys.executable, HERE / "gpu_run.py"]
    env = {name: value for name, value in stub_environment(stub, "sm_90").items() if not name.startswith("PYTEST")}
    env |= {"TRITON_ATTN_KERNELS": "portable", "STUB_GPU": H100, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    with subprocess.Popen(command, env=env, text=True, **pipes) as process:

        def run(*arguments, **environment):
            said = tmp_path_factory.mktemp("run") / "said"
            line = {"arguments": [*map(str, arguments)], "said": str(said), "environment": environment}
            print(json.dumps(line), file=process.stdin, flush=True)
            return int(process.stdout.readline()), said.read_text()

        yield run
        process.stdin.close()


def make_gpu(out):
    """The command of `make gpu OUT=...`, without the python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "gpu", f"OUT={out}", "PYTHON=python"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    python, dash_m, perf, *arguments = shlex.split(done.stdout)
    assert (python, dash_m, perf) == ("python", "-m", "perf")
    return arguments


@pytest.mark.ci
@pytest.mark.oldest
def test_every_stage_is_run_told_and_resumed(run, tmp_path):
    out = tmp_path / "out"
    code, said = run(*make_gpu(out), "--minutes", "60", STUB_WRONG="lse")
    report = report_of(out)
    assert [stage["stage"] for stage in report["stages"]] == STAGES, said
    assert all(stage["done"] and not stage["left"] for stage in report["stages"]), report
    ((stage, function, why),) = ((x["stage"], x["case"]["function"], x["why"]) for x in report["failures"])
    assert (code, stage, function) == (1, "smoke", "merge_attention"), said
    assert why.endswith("lse is wrong")
    assert "lse is wrong" in (out / "log.txt").read_text()
    assert "tracebacks: " in said
    outcomes = {row["test"]: row["outcome"] for row in rows_of(out / "tests.csv")}
    assert outcomes.pop("memcheck: flash") == "not available"
    assert len(outcomes) == 1
    speeds = {(row["family"], row["provider"]): row["p50_ms"] for row in rows_of(out / "bench.csv")}
    theirs = {("flash", "SDPA flash"): "1.0", ("flash", "SDPA cuDNN"): ""}  # a peer's failure does not count as ours
    assert speeds == {("mla", "triton_attn"): "1.0", ("flash", "triton_attn"): "1.0"} | theirs
    verdicts = [target["verdict"] for target in report["targets"]]
    assert verdicts == ["not measured yet"] * 4 + ["missed"], "a step of 1 ms beside the roof that was measured before"
    (record,) = (entry for entry in table_of(out) if "portable" in entry)
    assert (record["figure"], record["error"], record["peers"].keys()) == (record["portable"], 0, {"SDPA flash"})
    kernels = {
        "_flash_fwd_hopper_kernel",
        "_copy_kv_pages_kernel",
        "_empty_kernel",
        "_mla_absorbed_kernel",
        "_flash_fwd_kernel",
    }
    assert set(re.findall(r"launch (\w+)", said)) >= kernels
    assert len(list(out.iterdir())) == 8

    before = journal_of(out)
    code, said = run("gpu", "--resume", out, "--minutes", "60")
    assert (code, report_of(out)["failures"]) == (0, []), said
    done = [entry["key"]["case"].get("function", "no sanitizer") for entry in journal_of(out)[len(before) :]]
    assert done == ["merge_attention", "no sanitizer"]
    assert {row["outcome"] for row in rows_of(out / "smoke.csv")} == {"passed"}


@pytest.mark.ci
def test_what_other_code_found_is_done_again_and_another_gpu_adds_rows(run, tmp_path):
    out, stages = tmp_path / "out", ("--minutes", "60", "--stages", "machine,targets,sanitizer")
    code, said = run("gpu", "--out", out, *stages)
    assert code == 0, said
    found_by_other_code(out, "targets")
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
    sanitizer.chmod(0o755)
    before = journal_of(out)
    code, said = run("gpu", "--resume", out, *stages, STUB_SANITIZER=str(sanitizer))
    assert code == 0, said
    done = [entry["key"]["stage"] for entry in journal_of(out)[len(before) :]]
    assert done == ["targets", *["sanitizer"] * 8], "and what lacked its tool"
    assert {row["outcome"] for row in rows_of(out / "tests.csv")} == {"passed"}
    assert [row["gpu"] for row in rows_of(out / "bench.csv")] == [H100]
    code, said = run("gpu", "--resume", out, "--stages", "machine,targets", STUB_GPU=H200)
    assert code == 0, said
    assert {row["gpu"] for row in rows_of(out / "machine.csv")} == {H100, H200}
    assert [row["gpu"] for row in rows_of(out / "bench.csv")] == [H100, H200]


@pytest.mark.ci
@pytest.mark.oldest
def test_a_record_makes_its_kernel_the_default_of_calls_and_of_later_stages(run, stub, tmp_path):
    """Until the kernel's code is other than that of the record."""
    out, auto = tmp_path / "out", {"TRITON_ATTN_KERNELS": "auto"}
    code, said = run(*make_gpu(out), "--minutes", "60", "--stages", "records,bench", **auto)
    assert code == 0, said
    table = out / "sm_90.json"
    assert launched(stub, table) == "_flash_fwd_hopper_kernel"
    at_bench = said[said.index("compiling for bench") :]
    assert "_flash_fwd_hopper_kernel" in at_bench
    assert "_flash_fwd_kernel" not in at_bench
    code, said = run("gpu", "--resume", out, "--minutes", "60", "--stages", "bench", STUB_GPU=H200, **auto)
    assert code == 0, said
    assert "_flash_fwd_kernel" in said
    assert "_flash_fwd_hopper_kernel" not in said, "the record is of another GPU"
    before = journal_of(out)
    code, said = run("gpu", "--resume", out, "--minutes", "60", "--stages", "records,bench", **auto)
    assert (code, journal_of(out)) == (0, before), said
    (record,) = (entry for entry in table_of(out) if "portable" in entry)
    table.write_text(table.read_text().replace(record["kernel"], "0123456789abcdef"))
    assert launched(stub, table) == "_flash_fwd_kernel"
    code, said = run("gpu", "--resume", out, "--minutes", "60", "--stages", "bench", **auto)
    assert [entry["key"]["stage"] for entry in journal_of(out)[len(before) :]] == ["bench"], "it depends on the table"


def launched(stub, table):
    """The kernel of a call at the head dim of the record."""
    (kernels,) = launches_of(stub, "sm_90", "64, packed", TRITON_ATTN_TUNED=str(table)).values()
    return kernels[0]


def test_sweeps_are_a_run_of_their_own(run, tmp_path):
    out = tmp_path / "out"
    code, said = run("gpu", "--sweeps", "--out", out)
    assert code == 0, said
    files = {"journal.jsonl", "report.json", "sm_90.json", "sweep.csv", "sweeps.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    (row,) = rows_of(out / "sweep.csv")
    assert (row["provider"], row["p50_ms"], row["gpu"]) == ("triton_attn", "1.0", H100)
    journal = (out / "journal.jsonl").read_text()
    code, said = run("gpu", "--sweeps", "--resume", out)
    assert (code, (out / "journal.jsonl").read_text()) == (0, journal), said


def found_by_other_code(out, stage):
    entries = journal_of(out)
    for entry in entries:
        if entry["key"]["stage"] == stage:
            entry["key"]["code"] = "other"
    (out / "journal.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def journal_of(out):
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def table_of(out):
    return json.loads((out / "sm_90.json").read_text())["entries"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
