"""Output of `python -m perf gpu`: CSV files, a report and a log of failures."""

import csv
import json
import sys
import time
import traceback
from types import SimpleNamespace

from perf.harness.device import gpu_name, versions
from perf.results.tables import print_table
from perf.results.targets import TARGETS, judge

REPORT, LOG = "report.json", "log.txt"
LOG_BYTES = 3_000_000  # limit of the log file
LOG_LINES, LINE_LENGTH = 90, 1000  # of a failure: the last lines of its traceback and of stderr


def case_text(case):
    return json.dumps(case, sort_keys=True)


class Report:
    """What was done, what failed, what is left, and the values of the targets. It is written to disk at every change.

    It never ends a run: errors in writing go to stderr. `known` are rows of earlier runs, {(GPU, stage, case as JSON):
    {"csv": file name, "rows": dicts}}. They are kept where this run has no others.
    """

    def __init__(self, out_dir, minutes, known=None):
        self.out_dir = out_dir
        self.stages, self.failures = [], []
        self._found = dict(known or {})
        self._log = _Log(out_dir / LOG)
        self._gpu = gpu_name()
        self._about = {"device": self._gpu, **versions(), "minutes": minutes}

    def begin(self, stage):
        self._start = time.monotonic()
        self.stages.append({"stage": stage.name, "done": 0, "failed": 0, "left": 0, "compiling": 0.0, "seconds": 0.0})
        self._write_csv(stage)

    def compiled(self):
        """The stage compiled for this long before its cases."""
        self.stages[-1]["compiling"] = round(time.monotonic() - self._start, 1)

    def add(self, stage, case, rows, logs):
        """The rows of a case, and for each row its log entry if it is a failure."""
        self.stages[-1]["done"] += 1
        for part in stage.split(case):
            self._found.pop(self._key(stage, part), None)
        self._found[self._key(stage, case)] = {"csv": stage.csv, "rows": rows}
        self._write_csv(stage)
        for row, log in zip(rows, logs):
            if stage.has_failed(row):
                self.fail(stage, case, row[stage.reason], log)
        self._write()

    def fail(self, stage, case, why, log=""):
        self.stages[-1]["failed"] += 1
        self.failures.append({"stage": stage.name, "case": case, "why": why})
        self.note(stage, case, why, log)
        self._write()

    def note(self, stage, case, why, log):
        """Write to the log only."""
        self._log.add(f"{stage.name}: {json.dumps(case)}: {why}", log)

    def leave(self, cases):
        """Change the number of cases that are left."""
        self.stages[-1]["left"] += cases
        self._write()

    def roofs(self):
        """{name: value} that a stage measured on this GPU, in this run or an earlier one."""
        return {row["what"]: row["value"] for row in self._rows("machine")}

    def targets(self):
        rows = [SimpleNamespace(**row, direction=row["pass"]) for row in self._rows("targets", "bench")]
        values = judge(rows).get(self._gpu, [None] * len(TARGETS))
        return [
            {"target": target.what, "at least": target.at_least, "measured": value, "verdict": target.verdict(value)}
            for target, value in zip(TARGETS, values)
        ]

    def _rows(self, *stages):
        return [
            row
            for (gpu, stage, _), found in self._found.items()
            if gpu == self._gpu and stage in stages
            for row in found["rows"]
        ]

    def _key(self, stage, case):
        return self._gpu, stage.name, case_text(case)

    def _write(self):
        try:
            self.stages[-1]["seconds"] = round(time.monotonic() - self._start, 1)
            about = self._about | {"stages": self.stages, "targets": _or_nothing(self.targets)}
            text = json.dumps(about | {"failures": self.failures}, indent=1, default=str)
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / REPORT).write_text(text + "\n")
        except Exception:
            traceback.print_exc()

    def _write_csv(self, stage):
        """Write the whole file, if the stage has one. Rows of another GPU and of stages that share it are kept."""
        if stage.csv is None:
            return
        try:
            columns = list(dict.fromkeys([*stage.columns, "gpu"]))
            self.out_dir.mkdir(parents=True, exist_ok=True)
            with (self.out_dir / stage.csv).open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                for (gpu, _, _), found in self._found.items():
                    if found["csv"] == stage.csv:
                        writer.writerows([({"gpu": gpu} | row).get(x) for x in columns] for row in found["rows"])
        except Exception:
            traceback.print_exc()

    def print(self):
        print()
        print_table(self.stages)
        print()
        print_table(_or_nothing(self.targets))
        for failure in self.failures:
            print(f"{failure['stage']}: {json.dumps(failure['case'])}: {failure['why']}")
        if self.failures:
            print(f"tracebacks: {self.out_dir / LOG}")
        if any(stage["left"] for stage in self.stages):
            print(f"the minutes are over with cases left; continue with --resume {self.out_dir}")
        print("plots: python -m perf report, with pandas and matplotlib installed")


def _or_nothing(rows):
    try:
        return rows()
    except Exception:  # rows of an earlier run may lack columns of this code
        traceback.print_exc()
        return []


class _Log:
    """Failures with the end of their tracebacks, up to the size limit of the file."""

    def __init__(self, path):
        self._path = path

    def add(self, title, text):
        lines = [line[:LINE_LENGTH] for line in text.strip().splitlines()[-LOG_LINES:]]
        entry = "\n".join([f"== {title[:LINE_LENGTH]}", *lines, "", ""])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", errors="replace") as file:
                if file.tell() + len(entry) <= LOG_BYTES:
                    file.write(entry)
                else:
                    print(f"{self._path} is full: {title[:LINE_LENGTH]}", file=sys.stderr)
        except OSError:
            traceback.print_exc()
