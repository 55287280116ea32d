"""Figures of the default configs, checked in by Triton version, and which changes of them cost too much.

A figure may be worse by TOLERANCE, an `exact` one by nothing. Figures `of_one_config` compare only where the config is
the same. With another one `decides` does, and a kernel that has not this figure then needs a new baseline. So does one
that appears or goes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import triton

from perf import results
from perf.results.compare import ABSENT, NAME_COLUMNS, changes, name_of

FOLDER = Path(__file__).parents[2] / "tests/perf"
TOLERANCE = 0.03


@dataclass(frozen=True)
class Baseline:
    """A CSV file of figures and how to judge others by them.

    Attributes:
        path: of the file.
        worse: {figure: 1 if more of it is worse, -1 if less}.
        exact, of_one_config, decides: see the module.
    """

    path: Path
    worse: dict[str, int]
    exact: tuple[str, ...]
    of_one_config: tuple[str, ...]
    decides: str

    @property
    def columns(self):
        return (*NAME_COLUMNS, "triton", "config", *self.worse)

    def held(self, row):
        """What the baseline keeps of a kernel; of registers, on NVIDIA, `lock` and spills say enough."""
        figures = {name: row.get(name) for name in self.worse}
        if "registers" in figures and row["arch"].startswith("sm_"):
            figures["registers"] = None
        if figures.get("lock TFLOP/s") is not None:
            figures["lock TFLOP/s"] = round(figures["lock TFLOP/s"], 1)
        return {name: row[name] for name in (*NAME_COLUMNS, "config")} | figures

    def read(self, version=triton.__version__):
        """The rows of a Triton version, as `held` gives them; none if there is no baseline of it."""
        return [row for row in self._read_all() if row.pop("triton") == version]

    def update(self, rows, version=triton.__version__):
        """Replace what the file has of a Triton version by `rows`, and keep that of others."""
        others = [row for row in self._read_all() if row["triton"] != version] if self.path.exists() else []
        rows = others + [self.held(row) | {"triton": version} for row in rows]
        with results.Table(self.path, self.columns) as table:
            for row in sorted(rows, key=lambda row: (*name_of(row), row["triton"])):
                table.append(row[name] for name in self.columns)

    def judge(self, before, now):
        """(changes that cost too much, changes that gain as much) from rows of the baseline to rows of today."""
        found = changes(before, [self.held(row) for row in now], ("config", *self.worse))
        decided = {name_of(row) for row in before if row[self.decides] is not None}
        moved = {x.kernel for x in found if x.figure == "config"}
        costs = [x for x in found if x.figure == "config" and (x.kernel not in decided or ABSENT in (x.before, x.now))]
        comparable = [x for x in found if x.figure in self.worse]
        comparable = [x for x in comparable if not (x.kernel in moved and x.figure in self.of_one_config)]
        return costs + [x for x in comparable if self._costs(x)], [x for x in comparable if self._gains(x)]

    def _costs(self, change):
        """A figure that is there no more counts as one."""
        if change.growth is None:
            return True
        return self.worse[change.figure] * change.growth > (0 if change.figure in self.exact else TOLERANCE)

    def _gains(self, change):
        return change.growth is not None and -self.worse[change.figure] * change.growth > TOLERANCE

    def _read_all(self):
        with self.path.open(newline="") as file:
            return [row | {name: _number(row[name]) for name in self.worse} for row in csv.DictReader(file)]


def _number(text):
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


# What the machine code is made of, see perf/commands/inspect.py.
COMPILED = Baseline(
    path=FOLDER / "baseline.csv",
    worse={"registers": 1, "spills": 1, "spills in loop": 1, "loop instructions": 1, "lock TFLOP/s": -1},
    exact=("spills", "spills in loop"),
    of_one_config=("registers", "loop instructions"),
    decides="lock TFLOP/s",
)
# What it does when it runs, see perf/commands/counts.py.
COUNTED = Baseline(
    path=FOLDER / "counts.csv",
    worse={
        **dict.fromkeys(("instructions", "read", "written", "sectors", "wavefronts", "issued"), 1),
        "useful share": -1,
    },
    exact=("read", "written", "sectors", "wavefronts", "issued"),
    of_one_config=("instructions",),
    decides="read",
)


def counts_of(arch, dtype, kernel, config, shape):
    """The row of COUNTED of a kernel at a config, in a case that has what `shape` names; {} if there is none."""
    words = {f"{name}={value}" for name, value in shape.items()}
    wanted = {"arch": arch, "dtype": dtype, "kernel": kernel, "config": config}
    rows = (row for row in COUNTED.read() if wanted.items() <= row.items() and words <= set(row["case"].split()))
    return next(rows, {})
