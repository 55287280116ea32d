"""The cases of `python -m perf gpu`, as dicts that JSON can hold, and the functions that run them.

A function returns rows, as dicts for the stage's CSV. It runs in its own process (perf/harness/isolation.py).
"""

import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from itertools import chain, zip_longest
from pathlib import Path

import torch

from perf.harness.device import gpu_name, versions
from perf.harness.isolation import headline
from perf.harness.machine import COPY, MATMUL, describe
from perf.harness.measure import compile_all, throughput
from perf.results import COLUMNS, MEASURED, OURS, Row, winners
from perf.workloads.models import DEEPSEEK_V3, GEMMA_3_12B, GPT_OSS_120B, LLAMA_3_8B
from perf.workloads.problems import DecodeProblem, LatentDecodeProblem, LatentPrefillProblem, Problem, grid
from perf.workloads.providers import (
    COMPILED_PEERS,
    DECODE_PROVIDERS,
    LATENT_DECODE_PROVIDERS,
    LATENT_PREFILL_PROVIDERS,
    LEFT_OUT,
    PROVIDERS,
)

CHECKOUT = Path(__file__).parents[2]
DTYPE = "bfloat16"

SMOKE_COLUMNS = ["function", "model", "deterministic", "output", "outcome", "error", "torch_error", "bound", "message"]
SMOKE_MODELS = {model.name: model for model in (DEEPSEEK_V3, GEMMA_3_12B, GPT_OSS_120B, LLAMA_3_8B)}
SMOKE_SEQLEN = 500


def smoke_cases():
    """Every public function at the shapes of models with different kernels. Those that compile longest come first."""
    from perf.commands.verify import functions_of

    calls = [(function, model, False) for model in SMOKE_MODELS.values() for function in functions_of(model)]
    calls += [("flash_attention", model, True) for model in SMOKE_MODELS.values() if model.attention != "MLA"]
    calls.sort(key=lambda call: call[0] not in ("mla_prefill", "flash_attention", "flash_attention_varlen"))
    calls.sort(key=lambda call: call[0] != "mla_prefill")
    return [
        {"function": function, "model": model.name, "deterministic": deterministic}
        for function, model, deterministic in calls
    ]


def run_smoke(case):
    """A row for each output."""
    from perf.commands.verify import verify

    torch.use_deterministic_algorithms(case["deterministic"], warn_only=True)
    call = SMOKE_MODELS[case["model"]], case["function"], SMOKE_SEQLEN, getattr(torch, DTYPE)
    return [_smoke_row(case, about, "\n".join(wrong)) for about, wrong in verify(call)]


def _smoke_row(case, about, wrong):
    figures = {name: about[name] for name in ("output", "error", "torch_error", "bound")}
    outcome = {"outcome": "failed" if wrong else "passed", "message": headline(wrong), "log": wrong}
    return case | figures | outcome


TEST_COLUMNS = ["test", "outcome", "seconds", "message", "figures"]


def test_cases():
    """Every test of tests/gpu, one test of each file in turn, so that an interrupted run covers all families.

    A file that cannot be imported is a case of its own.
    """
    listing = _pytest("--collect-only", "-q", str(CHECKOUT / "tests/gpu"))
    by_file = {}
    for line in listing.splitlines():
        test = line.removeprefix("ERROR ").split(" - ")[0]
        if "::" in test or test != line:
            by_file.setdefault(test.split("::")[0], []).append({"test": test})
    if not by_file:
        raise RuntimeError(f"pytest found no test in tests/gpu:\n{listing}")
    return [case for case in chain(*zip_longest(*by_file.values())) if case]


def run_test(case):
    reports = _Reports()
    _pytest(str(CHECKOUT / case["test"]), plugins=[reports])
    if not reports.rows:
        raise RuntimeError("pytest did not run it")
    return reports.rows


def _pytest(*arguments, plugins=()):
    """The output of pytest."""
    import pytest

    said = io.StringIO()
    settings = "--rootdir", str(CHECKOUT), "-c", str(CHECKOUT / "pyproject.toml"), "-p", "no:cacheprovider"
    with contextlib.redirect_stdout(said):
        pytest.main([*settings, *arguments], plugins=list(plugins))
    return said.getvalue()


class _Reports:
    """A pytest plugin that records a row per test, and one for a set-up or tear-down that fails or skips."""

    def __init__(self):
        self.rows = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr or "")
            figures = [value for name, value in report.user_properties if name == "figure"]
            self.rows.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 2),
                    "message": headline(message),
                    "figures": "; ".join(figures),
                    "log": f"{report.longreprtext}\n{report.capstderr[-STDERR_LENGTH:]}" if report.failed else "",
                }
            )


STDERR_LENGTH = 4000  # the last characters of a test's stderr that are kept
SANITIZED = {  # public functions at the shapes of a model; each kernel of the package is in one of them
    "flash": (GPT_OSS_120B, ("flash_attention", "flash_attention_varlen", "merge_attention")),
    "flash, deterministic": (GPT_OSS_120B, ("flash_attention",)),
    "paged": (LLAMA_3_8B, ("paged_attention", "append_kv_cache", "copy_kv_pages")),
    "mla": (DEEPSEEK_V3, ("append_latent_cache", "mla_decode", "mla_prefill")),
}
SANITIZED_SEQLEN = 200
NOT_AVAILABLE, KNOWN = "not available", "known"
ERRORS_FOUND = 99  # exit code of the sanitizer if the program itself succeeded
# racecheck does not model the barriers of TMA copies, and reports the waiting accesses as races.
RACE = re.compile(r"Race reported between .*? access at (\w+)")
TMA_KERNELS = "_flash_fwd_", "_flash_bwd_", "_mla_decode_hopper_"


def sanitizer_cases():
    """One case is enough to report that there is no sanitizer."""
    cases = [{"calls": calls, "tool": tool} for tool in ("memcheck", "racecheck") for calls in SANITIZED]
    return cases if find_sanitizer() else cases[:1]


def run_sanitizer(case):
    """Whether `compute-sanitizer` finds an error in small calls. It may be missing, or not support this device."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return [sanitizer_row(case, NOT_AVAILABLE, "no compute-sanitizer on PATH or in CUDA_HOME/bin")]
    call = f"from perf.workloads.gpu_cases import small_calls; small_calls({case['calls']!r})"
    code = str(ERRORS_FOUND)
    command = [sanitizer, "--tool", case["tool"], "--error-exitcode", code, sys.executable, "-c", call]
    # Each tensor is then an allocation of its own, and memcheck sees accesses beside it.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    lines = [line.strip("= ") for line in said.splitlines() if line.strip("= ")]
    if unsupported := [line for line in lines if "not supported" in line]:
        return [sanitizer_row(case, NOT_AVAILABLE, unsupported[0])]
    if done.returncode == 0:
        return [sanitizer_row(case, "passed")]
    wrong = [line for line in lines if "error" in line.lower() or "hazard" in line.lower()] or lines[-1:]
    is_known = case["tool"] == "racecheck" and done.returncode == ERRORS_FOUND and _only_tma_races(lines)
    message = f"exit code {done.returncode}: {' '.join(wrong[:1])}"
    return [sanitizer_row(case, KNOWN if is_known else "failed", message, said)]


def sanitizer_row(case, outcome, message="", log=""):
    """A row of TEST_COLUMNS."""
    return {"test": f"{case['tool']}: {case['calls']}", "outcome": outcome, "message": message, "log": log}


def _only_tma_races(lines):
    """Whether all reported errors are in kernels that load by TMA."""
    errors = [line for line in lines if line.startswith(("Error:", "Warning:"))]
    races = [RACE.search(line) for line in errors]
    return bool(races) and all(race and race[1].startswith(TMA_KERNELS) for race in races)


def find_sanitizer():
    """The sanitizer's path, or None."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def small_calls(name):
    """Each function of a group of SANITIZED, checked against its reference."""
    from perf.commands.verify import verify

    torch.use_deterministic_algorithms("deterministic" in name, warn_only=True)
    model, functions = SANITIZED[name]
    for function in functions:
        for _, wrong in verify((model, function, SANITIZED_SEQLEN, getattr(torch, DTYPE))):
            if wrong:
                sys.exit(wrong[0])


ROOF_COLUMNS = ["what", "value"]


def roof_cases():
    return [{"roofs": "all"}]


def run_roofs(case):
    return [{"what": what, "value": value} for what, value in describe().items()]


FAMILIES = {  # kind of problem: its providers, and the roof of its figure
    Problem: (PROVIDERS, MATMUL),
    DecodeProblem: (DECODE_PROVIDERS, COPY),
    LatentDecodeProblem: (LATENT_DECODE_PROVIDERS, COPY),
    LatentPrefillProblem: (LATENT_PREFILL_PROVIDERS, MATMUL),
}
PROBLEMS = {kind.__name__: kind for kind in FAMILIES}
TARGET_LENGTHS = (4096, 8192, 16384)
FORWARD, BACKWARD = (
    grid(head_dims=(128,), seqlens=TARGET_LENGTHS, causal=(True,), direction=direction)
    for direction in ("forward", "backward")
)
DECODE = DecodeProblem(batch=32, seqlen_k=8192)
LATENT_DECODE = LatentDecodeProblem(batch=32, seqlen_k=8192, num_heads_q=128)


def target_cases():
    """The benchmarks that the targets name."""
    with_flex, others = [*FORWARD, DECODE], [*BACKWARD, LATENT_DECODE]
    return [_bench_case(problem, {"naive torch"}) for problem in with_flex] + [
        _bench_case(problem, LEFT_OUT) for problem in others
    ]


def bench_cases():
    """Shapes near the targets' first, then the rest of the grid."""
    problems = [
        LatentPrefillProblem(4096, 4096),
        LatentDecodeProblem(32, 8192, 128, "float8_e4m3fn"),
        *grid(head_dims=(64,), seqlens=TARGET_LENGTHS, causal=(True,)),
        *grid(head_dims=(128,), seqlens=TARGET_LENGTHS, causal=(False,)),
        *(DecodeProblem(batch, seqlen) for batch, seqlen in ((1, 8192), (1, 65536), (128, 2048), (32, 32768))),
        *(LatentDecodeProblem(batch, seqlen, 16) for batch, seqlen in ((32, 8192), (1, 65536))),
        LatentPrefillProblem(1024, 16384),
        *grid(head_dims=(64,), seqlens=TARGET_LENGTHS, causal=(True,), direction="backward"),
        *grid(head_dims=(256,), seqlens=TARGET_LENGTHS, causal=(True,)),
        *grid(head_dims=(128,), seqlens=(512, 1024, 2048), causal=(True,)),
        *grid(head_dims=(128,), seqlens=(512, 1024, 2048), causal=(True,), direction="backward"),
    ]
    return [_bench_case(problem, LEFT_OUT) for problem in problems]


def _bench_case(problem, left_out):
    providers, _ = FAMILIES[type(problem)]
    names = [name for name in providers if name not in left_out]
    return {"kind": type(problem).__name__, "problem": asdict(problem), "providers": names}


def problem_of(case):
    return PROBLEMS[case["kind"]](**case["problem"])


def split_bench(case):
    """After a crash, run each provider alone, so that only the failing one has no figure."""
    return [case | {"providers": [name]} for name in case["providers"]] if len(case["providers"]) > 1 else []


def what_bench_compiles(case):
    """A case for each of its providers that compiles kernels when it is called."""
    names = [name for name in case["providers"] if name.startswith(OURS) or name in COMPILED_PEERS]
    return [case | {"providers": [name]} for name in names]


def compile_bench(case):
    """Compile the kernels of a case, so that its timing finds them on disk."""
    _compile_in_this_process()
    compile_all(problem_of(case), DTYPE, _providers(case))


def run_bench(case, roofs):
    """Rows of perf/results/__init__.py. `roofs` are the roofs that `describe` measured, or {} if it failed."""
    _compile_in_this_process()
    _, roof = FAMILIES[PROBLEMS[case["kind"]]]
    tracebacks = {}
    rows = throughput(problem_of(case), DTYPE, _providers(case), roofs.get(roof), tracebacks=tracebacks)
    return [_columns(asdict(row)) | {"log": tracebacks.get(row.provider, "")} for row in rows]


def _providers(case):
    providers, _ = FAMILIES[PROBLEMS[case["kind"]]]
    return {name: providers[name] for name in case["providers"]}


def _compile_in_this_process():
    """Limit torch.compile to one process. It would start one per core beside a timing or beside other compilations."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def failed_bench(case, failure):
    """The row of a provider that crashed its process."""
    empty = {field.name: None for field in fields(Row)}
    about = {"provider": case["providers"][0], "dtype": DTYPE, "gpu": gpu_name(), "source": MEASURED, "note": failure}
    return _columns(empty | problem_of(case).columns() | versions() | about)


def _columns(row):
    """The names of the problem's columns in the CSV."""
    return {column: row["direction" if column == "pass" else column] for column in COLUMNS}


SWEEP_LIMIT = 150  # seconds
SWEPT = (  # families and shapes, the targets' first
    ("flash_hopper", "--head-dim", "64", "128", "192", "256"),
    ("mla_hopper", "--model", DEEPSEEK_V3.name),
    ("flash", "--head-dim", "128"),
    ("mla", "--model", DEEPSEEK_V3.name),
    ("paged", "--model", LLAMA_3_8B.name),
    ("flash_backward", "--head-dim", "128"),
    ("paged_prefill", "--model", LLAMA_3_8B.name),
    ("mla_prefill", "--model", DEEPSEEK_V3.name),
    ("flash", "--head-dim", "64"),
)


def sweep_cases():
    return [{"family": family, "shapes": shapes} for family, *shapes in SWEPT]


def run_sweep(case, table, journal):
    """Timings of the finalists. The winners go to a table, which begins as a copy of the package's. Finished work goes
    to the journal, from which the next run of the case continues.

    The sweep runs as a command, since a case's own process may not start others, and a sweep compiles in parallel.
    """
    winners.begin(table)
    family = case["family"]
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--table",
            table,
            "--journal",
            journal,
            "--out",
            folder,
            "--minutes",
            0.8 * SWEEP_LIMIT / 60,
            "--dtype",
            DTYPE,
        ]
        command = [sys.executable, "-m", "perf", "sweep", "--family", family, *case["shapes"], *map(str, options)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        measured = Path(folder) / f"sweep-{family}-{DTYPE}-measured.csv"
        if not measured.exists():
            raise RuntimeError("the minutes were over before all configs were compiled")
        with measured.open(newline="") as file:
            return list(csv.DictReader(file))


def failed_sweep(case, failure):
    """The row of a sweep without a result."""
    empty = dict.fromkeys(COLUMNS) | versions() | {"family": case["family"], "dtype": DTYPE, "gpu": gpu_name()}
    return empty | {"source": MEASURED, "note": f"{' '.join(case['shapes'])}: {failure}"}


def is_ours(row):
    return row["provider"].startswith(OURS)
