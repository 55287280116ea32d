"""Every check and benchmark that needs a GPU, most important first, within a time budget.

records    kernels that replace portable ones: their errors, and their speed beside the portable ones and peers

smoke      every kernel of the package through its public functions, at the shapes of a few models

machine    the measured roofs

targets    the benchmarks of the targets (perf/results/targets.py)

tests      the GPU tests (tests/gpu)

sanitizer  memory and race checks by compute-sanitizer, if it is installed

bench      other benchmarks, against every peer that can be imported

With --sweeps only the sweeps run. They need a run of their own.

Each case runs in its own process. A case that fails, crashes or hangs is recorded, and the run goes on. Each stage has
a share of the minutes; unused time goes to the later stages. Kernels are compiled in parallel before they are timed,
and nothing else runs during a timing.

Results are written as they arrive, in at most eight files: CSVs (targets and bench share one, and so do tests and
sanitizer; records have none), journal.jsonl with every finished case, report.json with the targets and what is done,
failed and left, and log.txt with the tracebacks of failures. Records and sweeps write a tuned table named after the
architecture, the package's table with the new entries: pass it to triton_attn.use_tuned, or replace the package's table
with it. The stages after the records use it, unless TRITON_ATTN_TUNED names another. Sweeps also have a journal of
their own, sweeps.jsonl.

--resume continues an earlier run. Cases that failed, that lacked a tool, or whose results come from other code run
again. Results of another GPU are kept. Needs torch, triton, numpy and pytest. `python -m perf report` draws the plots.
"""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from perf import results
from perf.commands.sweep import Budget
from perf.harness.device import gpu_arch, gpu_name, has_gpu, versions
from perf.harness.isolation import Outcome, describe, map_isolated
from perf.harness.journal import Journal
from perf.harness.progress import tqdm
from perf.results.gpu_report import Report, case_text
from perf.workloads import gpu_cases as cases
from perf.workloads import records

JOURNAL, SWEEPS_JOURNAL = "journal.jsonl", "sweeps.jsonl"
TUNED = "TRITON_ATTN_TUNED"
CODE = "triton_attn/**/*.py", "triton_attn/tuned/*.json", "perf/**/*.py"  # every result depends on these files


@dataclass(frozen=True)
class Stage:
    """Cases of one kind, and the CSV for their rows; None leaves them to the journal.

    `run(case, **given(report))` returns rows. It runs in its own process for at most `limit` seconds. If a row is a
    failure, its "log" goes to the log. `failure(case, why)` is the row of a case that returned none. `has_failed(row)`
    says whether a row is a failure, with the reason in its column `reason`, and `is_open(row)` whether another run may
    decide it. A case that returned nothing and can be divided by `split(case)` is run again in pieces. `compile`, if
    given, is called beforehand on each of `to_compile(case)`, in up to `compilers` processes. Results depend on the
    files of `code`, on the files that all stages depend on, and if it `heeds_table` on the run's tuned table.
    """

    name: str
    csv: str | None
    share: float  # of the budget, relative to the other stages' shares
    limit: float
    columns: list
    cases: Callable
    run: Callable
    failure: Callable
    has_failed: Callable
    reason: str
    is_open: Callable = lambda row: False
    split: Callable = lambda case: []
    workers: int = 1
    given: Callable = lambda report: {}
    compile: Callable | None = None
    to_compile: Callable = lambda case: [case]
    compilers: int = 1
    code: tuple = ()
    heeds_table: bool = True


def table_of(out_dir):
    """The run's tuned table."""
    return out_dir / f"{gpu_arch()}.json"


def _cores(at_most):
    return max(1, min(at_most, os.cpu_count()))


CHECKS = dict(
    failure=lambda case, why: case | {"outcome": "failed", "message": why},
    has_failed=lambda row: row["outcome"] == "failed",
    reason="message",
)
BENCHMARKS = dict(
    csv="bench.csv",
    columns=results.COLUMNS,
    run=cases.run_bench,
    failure=cases.failed_bench,
    has_failed=lambda row: cases.is_ours(row) and row["p50_ms"] is None,
    reason="note",
    split=cases.split_bench,
    given=lambda report: {"roofs": report.roofs()},
    compile=cases.compile_bench,
    to_compile=cases.what_bench_compiles,
)
WRITES_TABLE = dict(columns=results.COLUMNS, reason="note", heeds_table=False)
STAGES = (
    Stage(
        name="records",
        csv=None,
        share=0.15,
        limit=90,
        cases=records.record_cases,
        run=records.run_record,
        failure=records.failed_record,
        has_failed=BENCHMARKS["has_failed"],
        given=lambda report: {"table": table_of(report.out_dir)},
        compile=records.compile_record,
        compilers=_cores(14),
        **WRITES_TABLE,
    ),
    Stage(
        name="smoke",
        csv="smoke.csv",
        share=0.15,
        limit=90,
        columns=cases.SMOKE_COLUMNS,
        cases=cases.smoke_cases,
        run=cases.run_smoke,
        workers=_cores(16),  # mostly compilation
        **CHECKS,
    ),
    Stage(
        name="machine",
        csv="machine.csv",
        share=0.05,
        limit=60,
        columns=cases.ROOF_COLUMNS,
        cases=cases.roof_cases,
        run=cases.run_roofs,
        failure=lambda case, why: {"what": "failed", "value": why},
        has_failed=lambda row: row["what"] == "failed",
        reason="value",
    ),
    Stage(
        name="targets",
        share=0.3,
        limit=90,
        cases=cases.target_cases,
        compilers=_cores(14),
        **BENCHMARKS,
    ),
    Stage(
        name="tests",
        csv="tests.csv",
        share=0.25,
        limit=90,
        columns=cases.TEST_COLUMNS,
        cases=cases.test_cases,
        run=cases.run_test,
        workers=max(1, min(8, os.cpu_count() // 2)),
        code=("tests/**/*.py",),
        **CHECKS,
    ),
    Stage(
        name="sanitizer",
        csv="tests.csv",
        share=0.1,
        limit=100,
        columns=cases.TEST_COLUMNS,
        cases=cases.sanitizer_cases,
        run=cases.run_sanitizer,
        is_open=lambda row: row["outcome"] == cases.NOT_AVAILABLE,
        workers=len(cases.SANITIZED),
        **CHECKS | {"failure": lambda case, why: cases.sanitizer_row(case, "failed", why)},
    ),
    Stage(
        name="bench",
        share=0.15,
        limit=90,
        cases=cases.bench_cases,
        compilers=_cores(6),  # each has a cache of several GB
        **BENCHMARKS,
    ),
)
SWEEPS = (
    Stage(
        name="sweep",
        csv="sweep.csv",
        share=1,
        limit=cases.SWEEP_LIMIT,
        cases=cases.sweep_cases,
        run=cases.run_sweep,
        failure=cases.failed_sweep,
        has_failed=lambda row: row["provider"] is None,
        given=lambda report: {"table": table_of(report.out_dir), "journal": report.out_dir / SWEEPS_JOURNAL},
        **WRITES_TABLE,
    ),
)


def add_arguments(parser):
    names = ",".join(stage.name for stage in STAGES)
    parser.add_argument("--minutes", type=float, default=9, help="time budget in minutes; default: 9")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run whose results are in DIR")
    parser.add_argument("--stages", metavar="NAMES", help=f"stages to run, separated by commas; default: {names}")
    parser.add_argument("--sweeps", action="store_true", help="run the sweeps instead of the stages")


def run(out_dir, minutes=9, resume=None, stages=None, sweeps=False):
    """Run the stages. Exits with an error if a check, a test or one of our own benchmarks failed."""
    if not has_gpu():
        sys.exit("python -m perf gpu needs a GPU, and torch sees none")
    if minutes <= 0:
        sys.exit(f"--minutes: expected a number above 0, got {minutes:g}")
    chosen = choose(stages, sweeps)
    out_dir = resume or out_dir
    has_run = (out_dir / JOURNAL).exists()
    if resume and not has_run:
        sys.exit(f"--resume: expected the folder of an earlier run, and {out_dir / JOURNAL} does not exist")
    if has_run and not resume:
        sys.exit(f"{out_dir} holds an earlier run: continue it with --resume {out_dir}, or choose another --out")
    if resume and sweeps != (out_dir / "sweep.csv").exists():
        sys.exit(f"--resume: sweeps and stages need separate folders, and {out_dir} holds the other kind")
    report = run_stages(chosen, out_dir, minutes)
    report.print()
    if report.failures:
        sys.exit(f"{len(report.failures)} failures, see above")
    return sorted(out_dir.iterdir())


def choose(names, sweeps):
    """The stages with these names (separated by commas) in the order in which they run. None is all stages."""
    if names is None:
        return SWEEPS if sweeps else STAGES
    if sweeps:
        sys.exit("--stages: cannot be used with --sweeps")
    known, wanted = [stage.name for stage in STAGES], [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or set(wanted) - set(known):
        unknown = ", ".join(name for name in wanted if name not in known)
        sys.exit(f"--stages: expected some of {','.join(known)}, got {unknown or 'none'}")
    return tuple(stage for stage in STAGES if stage.name in wanted)


def run_stages(stages, out_dir, minutes):
    """The `Report` of the stages. A stage starts no case after its share of the minutes and the time left over by
    earlier stages are used up.
    """
    end = Budget(minutes)
    total, kept_for_later = sum(stage.share for stage in stages), 1.0
    with Journal(out_dir / JOURNAL) as journal:
        report = Report(out_dir, minutes, _known(journal))
        for stage in stages:
            share = stage.share / total
            kept_for_later -= share
            unclaimed = end.seconds_left() / 60 - minutes * kept_for_later
            report.begin(stage)
            if stage.heeds_table and table_of(out_dir).exists():
                os.environ.setdefault(TUNED, str(table_of(out_dir).resolve()))
            try:
                run_stage(stage, journal, report, Budget(max(minutes * share, unclaimed)), end)
            except Exception as error:  # an error of our own; the next stage may still work
                report.fail(stage, "the stage itself", describe(error), traceback.format_exc())
    return report


def _known(journal):
    """Rows of earlier runs in the form that `Report` takes: of this GPU the rows of this code, of other GPUs the
    latest.
    """
    about, known = _about(), {}
    for key, result in journal.items():
        is_current = {name: key.get(name) for name in about} == about
        if "csv" in result and (is_current or key["gpu"] != gpu_name()):
            known[key["gpu"], key["stage"], case_text(key["case"])] = {"csv": result["csv"], "rows": result["rows"]}
    return known


def run_stage(stage, journal, report, budget, end):
    """Write the stage's CSV and the report as its cases finish."""
    function = partial(stage.run, **stage.given(report))
    waiting = _listed(stage, report)
    _compile(stage, waiting, journal, report, budget)
    while waiting:
        report.leave(len(waiting))
        finished, parts = _finished(stage, function, waiting, journal, budget, end), []
        for case, outcome in tqdm(finished, total=len(waiting), desc=stage.name, unit="case"):
            report.leave(-1)
            parts_of_case = stage.split(case) if outcome.failure else []
            parts += parts_of_case
            if parts_of_case:
                report.note(stage, case, f"{outcome.failure}; running it in pieces", outcome.log)
            else:
                _keep(stage, case, outcome, journal, report)
        waiting = parts


def _listed(stage, report):
    try:
        return stage.cases()
    except Exception as error:  # the code it lists may be broken; the next stage may still work
        report.fail(stage, "listing its cases", describe(error), traceback.format_exc())
        return []


def _compile(stage, waiting, journal, report, budget):
    """Compile in at most half of the stage's time. A failure repeats when the case is timed, and is recorded then."""
    if stage.compile is None:
        return
    missing = [case for case in waiting if _result(stage, case, journal) is None]
    half = Budget(budget.seconds_left() / 2 / 60)
    items = [item for case in missing for item in stage.to_compile(case)]
    compiled = map_isolated(stage.compile, items, limit=stage.limit, budget=half, end=half, workers=stage.compilers)
    for _ in tqdm(compiled, total=len(items), desc=f"compiling for {stage.name}", unit="call"):
        pass
    report.compiled()


def _finished(stage, function, waiting, journal, budget, end):
    """(case, Outcome) of each case, known cases first."""
    missing = []
    for case in waiting:
        result = _result(stage, case, journal)
        if result is None:
            missing.append(case)
        else:
            yield case, Outcome(result["rows"], "", result["seconds"])
    yield from map_isolated(function, missing, limit=stage.limit, budget=budget, end=end, workers=stage.workers)


def _keep(stage, case, outcome, journal, report):
    """Record the outcome in the journal, the CSV and the report."""
    rows = [stage.failure(case, outcome.failure)] if outcome.failure else outcome.result
    logs = [row.get("log") or outcome.log for row in rows]
    rows = [{name: value for name, value in row.items() if name != "log"} for row in rows]
    result = {"csv": stage.csv, "rows": rows, "seconds": round(outcome.seconds, 2)}
    if _result(stage, case, journal) is None:
        journal.add(_key(stage, case), result)
    report.add(stage, case, rows, logs)


def _result(stage, case, journal):
    """The outcome of an earlier run, or None. Failed and open cases give None, so that they run again."""
    result = journal.get(_key(stage, case))
    if result is None or any(stage.has_failed(row) or stage.is_open(row) for row in result["rows"]):
        return None
    return result


def _key(stage, case):
    own = {"own code": code_hash(*stage.code), "table": _table_hash() if stage.heeds_table else ""}
    return _about() | {"stage": stage.name, "gpu": gpu_name(), "case": case} | own


def _table_hash():
    table = os.environ.get(TUNED)
    return hashlib.sha256(Path(table).read_bytes()).hexdigest()[:16] if table else ""


def _about():
    """A hash of the code that every result depends on. The commit is not used, since it changes without the code."""
    return {name: value for name, value in versions().items() if name != "commit"} | {"code": code_hash(*CODE)}


@cache
def code_hash(*patterns):
    """A hash of the names and contents of the matching files."""
    files = sorted({file for pattern in patterns for file in cases.CHECKOUT.glob(pattern)})
    said = [part for file in files for part in (str(file.relative_to(cases.CHECKOUT)).encode(), file.read_bytes())]
    return hashlib.sha256(b"\0".join(said)).hexdigest()[:16]
