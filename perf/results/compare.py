"""Compiled kernels compared with earlier ones: from another commit, or from the checked-in baseline."""

from collections import Counter
from dataclasses import dataclass

NAME_COLUMNS = ("arch", "dtype", "family", "case", "kernel")
ABSENT = "not there"


@dataclass(frozen=True)
class Change:
    """A changed figure of a kernel. `kernel` has the values of NAME_COLUMNS."""

    kernel: tuple
    figure: str
    before: object
    now: object

    @property
    def growth(self):
        """Relative change, infinite from zero. None if one of the values is not a number."""
        if not all(isinstance(value, int | float) for value in (self.before, self.now)):
            return None
        return (self.now - self.before) / self.before if self.before else float("inf")

    def row(self, before="before", now="now"):
        """One row of a table."""
        arch, dtype, family, case, kernel = self.kernel
        change = "" if self.growth is None else f"{self.growth:+.1%}"
        values = {"kernel": f"{family} {kernel}", "case": case, "arch": arch, "dtype": dtype, "figure": self.figure}
        return values | {before: _text(self.before), now: _text(self.now), "change": change}


def changes(before, now, figures):
    """The differences between two lists of rows in the given columns, in the order of `now`, then the rows that are
    gone.
    """
    before, now = ({name_of(row): row for row in rows} for rows in (before, now))
    found = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            found.append(Change(name, "config", *(ABSENT if row is None else row["config"] for row in (old, new))))
            continue
        found += [Change(name, x, old[x], new[x]) for x in figures if old.get(x) != new.get(x)]
    return found


def _text(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def number_kernels(rows):
    """Name the kernels of a call apart: the second launch of dkdv, for dv after the one for dk, has a 2 behind it."""
    seen = Counter()
    for row in rows:
        seen[row["kernel"]] += 1
        if (number := seen[row["kernel"]]) > 1:
            row["kernel"] += f", {number}"


def name_of(row):
    return tuple(row[column] for column in NAME_COLUMNS)
