"""Figures of the default configs, checked in by Triton version, and the rule for which changes are regressions.

A figure may be worse by TOLERANCE; an `exact` figure may not be worse. Figures `of_one_config` are compared only if the
config is the same. If it is not, the figure `decides` is compared instead, and a kernel without that figure needs a new
baseline. So does a kernel that is new or gone.
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
    """A CSV file of figures, and how to judge others by them.

    Attributes:
        path: the file.
        worse: {figure: 1 if larger is worse, -1 if smaller is worse}.
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
        """The figures that the baseline keeps of a kernel. On NVIDIA, `lock` and spills stand in for registers."""
        figures = {name: row.get(name) for name in self.worse}
        if "registers" in figures and row["arch"].startswith("sm_"):
            figures["registers"] = None
        if figures.get("lock TFLOP/s") is not None:
            figures["lock TFLOP/s"] = round(figures["lock TFLOP/s"], 1)
        return {name: row[name] for name in (*NAME_COLUMNS, "config")} | figures

    def read(self, version=triton.__version__):
        """The rows of a Triton version, as `held` gives them. Empty if it has no baseline."""
        return [row for row in self._read_all() if row.pop("triton") == version]

    def update(self, rows, version=triton.__version__):
        """Replace the rows of a Triton version by `rows`. Rows of other versions stay."""
        others = [row for row in self._read_all() if row["triton"] != version] if self.path.exists() else []
        rows = others + [self.held(row) | {"triton": version} for row in rows]
        with results.Table(self.path, self.columns) as table:
            for row in sorted(rows, key=lambda row: (*name_of(row), row["triton"])):
                table.append(row[name] for name in self.columns)

    def judge(self, before, now):
        """(regressions, improvements) from rows of the baseline to rows of today."""
        found = changes(before, [self.held(row) for row in now], ("config", *self.worse))
        decided = {name_of(row) for row in before if row[self.decides] is not None}
        moved = {x.kernel for x in found if x.figure == "config"}
        costs = [x for x in found if x.figure == "config" and (x.kernel not in decided or ABSENT in (x.before, x.now))]
        comparable = [x for x in found if x.figure in self.worse]
        comparable = [x for x in comparable if not (x.kernel in moved and x.figure in self.of_one_config)]
        return costs + [x for x in comparable if self._costs(x)], [x for x in comparable if self._gains(x)]

    def _costs(self, change):
        """A figure that is gone counts as a regression."""
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


# Compiled code, see perf/commands/inspect.py.
COMPILED = Baseline(
    path=FOLDER / "baseline.csv",
    worse={"registers": 1, "spills": 1, "spills in loop": 1, "loop instructions": 1, "lock TFLOP/s": -1},
    exact=("spills", "spills in loop"),
    of_one_config=("registers", "loop instructions"),
    decides="lock TFLOP/s",
)
# Counts of the emulator, see perf/commands/counts.py.
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
    """The row of COUNTED for a kernel with a config, in a case that contains `shape`. {} if there is none."""
    words = {f"{name}={value}" for name, value in shape.items()}
    wanted = {"arch": arch, "dtype": dtype, "kernel": kernel, "config": config}
    rows = (row for row in COUNTED.read() if wanted.items() <= row.items() and words <= set(row["case"].split()))
    return next(rows, {})
