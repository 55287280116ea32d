"""Everything that only a GPU can tell, in order of worth, within a budget of minutes.

The GPU test suite (tests/gpu), memory and race checks by compute-sanitizer if it is there, the measured roofs, then
benchmarks against every peer that imports, and sweeps. Each case runs in a process of its own: one that fails, crashes
or hangs is recorded, and the run goes on. A stage has a share of the minutes; what it leaves goes to those after it.

Results are written as they come, at most eight files: a CSV per stage, journal.jsonl with every finished case,
report.json with what is done, failed and left and with the targets, and, named by its architecture, the package's tuned
table with what the sweeps found, for triton_attn.use_tuned or in place of the package's. --resume goes on where a run
ended; what failed is not tried again. Needs torch, triton, numpy and pytest; pictures are left to `python -m perf
report`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from perf import gpu_cases as cases
from perf import results
from perf.device import gpu_arch, gpu_name, has_gpu, versions
from perf.isolation import describe, map_isolated
from perf.journal import Journal
from perf.progress import tqdm
from perf.sweep import Budget
from perf.tables import print_table
from perf.targets import TARGETS, judge

JOURNAL = "journal.jsonl"
REPORT = "report.json"


@dataclass(frozen=True)
class Stage:
    """Cases of one kind and the CSV that their rows go to.

    `run(case, **given(report))` gives rows, in a process of its own, in at most `limit` seconds. `failure(case, why)`
    is the row of a case that gave none, `has_failed(row)` whether a row is one of failure, its column `reason` why. A
    case that gave none and has parts, see `split(case)`, is run in parts.
    """

    name: str
    share: float  # of the budget, in proportion to those of the other stages
    limit: float
    columns: list
    cases: Callable
    run: Callable
    failure: Callable
    has_failed: Callable
    reason: str
    split: Callable = lambda case: []
    workers: int = 1
    given: Callable = lambda report: {}


STAGES = (
    Stage(
        name="tests",
        share=0.4,
        limit=90,
        columns=cases.TEST_COLUMNS,
        cases=cases.test_cases,
        run=cases.run_test,
        failure=lambda case, why: case | {"outcome": "failed", "message": why},
        has_failed=lambda row: row["outcome"] == "failed",
        reason="message",
        workers=max(1, min(4, os.cpu_count() // 2)),  # they compile most of the time
    ),
    Stage(
        name="sanitizer",
        share=0.1,
        limit=60,
        columns=cases.SANITIZER_COLUMNS,
        cases=cases.sanitizer_cases,
        run=cases.run_sanitizer,
        failure=lambda case, why: case | {"outcome": "failed", "message": why},
        has_failed=lambda row: row["outcome"] == "failed",
        reason="message",
        workers=len(cases.SANITIZED),
    ),
    Stage(
        name="machine",
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
        name="bench",
        share=0.3,
        limit=90,
        columns=results.COLUMNS,
        cases=cases.bench_cases,
        run=cases.run_bench,
        failure=cases.failed_bench,
        has_failed=lambda row: cases.is_ours(row) and row["p50_ms"] is None,
        reason="note",
        split=cases.split_bench,
        given=lambda report: {"roofs": report.roofs()},
    ),
    Stage(
        name="sweep",
        share=0.15,
        limit=cases.SWEEP_LIMIT,
        columns=results.COLUMNS,
        cases=cases.sweep_cases,
        run=cases.run_sweep,
        failure=cases.failed_sweep,
        has_failed=lambda row: row["provider"] is None,
        reason="note",
        given=lambda report: {"table": report.out_dir / f"{gpu_arch()}.json"},
    ),
)


def add_arguments(parser):
    parser.add_argument("--minutes", type=float, default=9, help="end after as many, with what is finished; default: 9")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run whose results are in DIR")


def run(out_dir, minutes=9, resume=None):
    """Run all stages; exits with an error if a test, a check or one of our own figures failed."""
    if not has_gpu():
        sys.exit("python -m perf gpu needs a GPU, and torch sees none")
    if minutes <= 0:
        sys.exit(f"--minutes: expected a number above 0, got {minutes:g}")
    out_dir = resume or out_dir
    has_run = (out_dir / JOURNAL).exists()
    if resume and not has_run:
        sys.exit(f"--resume: expected the folder of an earlier run, and {out_dir / JOURNAL} does not exist")
    if has_run and not resume:
        sys.exit(f"{out_dir} holds an earlier run: go on with --resume {out_dir}, or choose another --out")
    report = run_stages(STAGES, out_dir, minutes)
    report.print()
    if report.failures:
        sys.exit(f"{len(report.failures)} failures, see above")
    return sorted(out_dir.iterdir())


def run_stages(stages, out_dir, minutes):
    """Their `Report`. A stage starts no case after its share of the minutes, and what those before it left, is over."""
    end, report = Budget(minutes), Report(out_dir, minutes)
    total, kept_for_later = sum(stage.share for stage in stages), 1.0
    with Journal(out_dir / JOURNAL) as journal:
        for stage in stages:
            share = stage.share / total
            kept_for_later -= share
            unclaimed = end.seconds_left() / 60 - minutes * kept_for_later
            run_stage(stage, journal, report, Budget(max(minutes * share, unclaimed)), end)
    return report


def run_stage(stage, journal, report, budget, end):
    """Write the stage's CSV and the report as its cases finish."""
    report.begin(stage)
    function = partial(stage.run, **stage.given(report))
    with results.Table(report.out_dir / f"{stage.name}.csv", stage.columns) as table:
        waiting = _listed(stage, report)
        while waiting:
            report.leave(len(waiting))
            finished, parts = _finished(stage, function, waiting, journal, budget, end), []
            for case, result in tqdm(finished, total=len(waiting), desc=stage.name, unit="case"):
                report.leave(-1)
                parts_of_case = stage.split(case) if result["failure"] else []
                parts += parts_of_case
                if not parts_of_case:
                    rows = [stage.failure(case, result["failure"])] if result["failure"] else result["rows"]
                    for row in rows:
                        table.append(row.get(column) for column in stage.columns)
                    report.add(stage, case, rows)
            waiting = parts


def _listed(stage, report):
    try:
        return stage.cases()
    except Exception as error:  # it may run code that is broken, and the next stage may not
        report.fail(stage, "listing its cases", describe(error))
        return []


def _finished(stage, function, waiting, journal, budget, end):
    """(case, {"rows": ..., "failure": ...}) of each case, known ones first."""
    about = {"stage": stage.name, "gpu": gpu_name(), **versions()}
    missing = []
    for case in waiting:
        result = journal.get(about | {"case": case})
        if result is None:
            missing.append(case)
        else:
            yield case, result
    outcomes = map_isolated(function, missing, limit=stage.limit, budget=budget, end=end, workers=stage.workers)
    for case, outcome in outcomes:
        result = {"rows": outcome.result, "failure": outcome.failure, "seconds": round(outcome.seconds, 2)}
        journal.add(about | {"case": case}, result)
        yield case, result


class Report:
    """What was done, what failed, what is left, and what came of the targets; on the disk at every change."""

    def __init__(self, out_dir, minutes):
        self.out_dir = out_dir
        self.stages, self.failures, self._rows = [], [], {}
        self._about = {"device": gpu_name(), **versions(), "minutes": minutes}

    def begin(self, stage):
        self._start = time.monotonic()
        self._rows[stage.name] = []
        self.stages.append({"stage": stage.name, "done": 0, "failed": 0, "left": 0, "seconds": 0.0})

    def add(self, stage, case, rows):
        self.stages[-1]["done"] += 1
        self._rows[stage.name] += rows
        for row in filter(stage.has_failed, rows):
            self.fail(stage, case, row[stage.reason])
        self._write()

    def fail(self, stage, case, why):
        self.stages[-1]["failed"] += 1
        self.failures.append({"stage": stage.name, "case": case, "why": why})
        self._write()

    def leave(self, cases):
        """So many more are left to do, or fewer."""
        self.stages[-1]["left"] += cases
        self._write()

    def roofs(self):
        """{what: value} that the stage of that name measured."""
        return {row["what"]: row["value"] for row in self._rows.get("machine", ())}

    def targets(self):
        rows = [SimpleNamespace(**row, direction=row["pass"]) for row in self._rows.get("bench", ())]
        values = judge(rows).get(self._about["device"], [None] * len(TARGETS))
        return [
            {"target": target.what, "at least": target.at_least, "measured": value, "verdict": target.verdict(value)}
            for target, value in zip(TARGETS, values)
        ]

    def _write(self):
        self.stages[-1]["seconds"] = round(time.monotonic() - self._start, 1)
        about = self._about | {"stages": self.stages, "targets": self.targets(), "failures": self.failures}
        self.out_dir.mkdir(parents=True, exist_ok=True)
        (self.out_dir / REPORT).write_text(json.dumps(about, indent=1) + "\n")

    def print(self):
        print()
        print_table(self.stages)
        print()
        print_table(self.targets())
        for failure in self.failures:
            print(f"{failure['stage']}: {json.dumps(failure['case'])}: {failure['why']}")
        if any(stage["left"] for stage in self.stages):
            print(f"the minutes are over with cases left: --resume {self.out_dir} goes on")
        print("pictures: python -m perf report, where pandas and matplotlib are")
