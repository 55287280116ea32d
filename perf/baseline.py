"""What the default configs compile to, checked in by Triton version, and which changes cost too much.

A figure may be worse by TOLERANCE, spills by nothing. Instructions of a trip and registers compare only where the
config is the same: with another one `lock` decides, and a kernel without `lock` then needs a new baseline. So does one
that appears or goes.
"""

import csv
from pathlib import Path

import triton

from perf import results
from perf.compare import ABSENT, NAME_COLUMNS, changes, name_of

PATH = Path(__file__).parents[1] / "tests/perf/baseline.csv"
TOLERANCE = 0.03
WORSE = {"registers": 1, "spills": 1, "spills in loop": 1, "loop instructions": 1, "lock TFLOP/s": -1}  # which way
SPILLS = ("spills", "spills in loop")
OF_ONE_CONFIG = ("registers", "loop instructions")
COLUMNS = (*NAME_COLUMNS, "triton", "config", *WORSE)


def held(row):
    """What the baseline keeps of a kernel; of registers, on NVIDIA, `lock` and spills say enough."""
    figures = {name: row.get(name) for name in WORSE}
    if row["arch"].startswith("sm_"):
        figures["registers"] = None
    if figures["lock TFLOP/s"] is not None:
        figures["lock TFLOP/s"] = round(figures["lock TFLOP/s"], 1)
    return {name: row[name] for name in (*NAME_COLUMNS, "config")} | figures


def read(version=triton.__version__, path=PATH):
    """The rows of a Triton version, as `held` gives them; none if there is no baseline of it."""
    return [row for row in _read_all(path) if row.pop("triton") == version]


def update(rows, version=triton.__version__, path=PATH):
    """Replace what the file has of a Triton version by `rows`, and keep that of others."""
    others = [row for row in _read_all(path) if row["triton"] != version] if path.exists() else []
    rows = others + [held(row) | {"triton": version} for row in rows]
    with results.Table(path, COLUMNS) as table:
        for row in sorted(rows, key=lambda row: (*name_of(row), row["triton"])):
            table.append(row[name] for name in COLUMNS)


def judge(before, now):
    """(changes that cost too much, changes that gain as much) from rows of the baseline to rows of today."""
    found = changes(before, [held(row) for row in now], ("config", *WORSE))
    modelled = {name_of(row) for row in before if row["lock TFLOP/s"] is not None}
    moved = {x.kernel for x in found if x.figure == "config"}
    costs = [x for x in found if x.figure == "config" and (x.kernel not in modelled or ABSENT in (x.before, x.now))]
    comparable = [x for x in found if x.figure in WORSE and not (x.kernel in moved and x.figure in OF_ONE_CONFIG)]
    return costs + [x for x in comparable if _costs(x)], [x for x in comparable if _gains(x)]


def _costs(change):
    """A figure that is there no more counts as one."""
    if change.growth is None:
        return True
    return WORSE[change.figure] * change.growth > (0 if change.figure in SPILLS else TOLERANCE)


def _gains(change):
    return change.growth is not None and -WORSE[change.figure] * change.growth > TOLERANCE


def _read_all(path):
    with path.open(newline="") as file:
        return [row | {name: _number(row[name]) for name in WORSE} for row in csv.DictReader(file)]


def _number(text):
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)
