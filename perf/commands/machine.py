"""Device and versions. On a GPU also the measured roofs that other figures are compared with."""

import csv

from perf.harness.machine import describe
from perf.results.tables import print_table


def run(out_dir):
    """Print the table and write `machine.csv`."""
    about = describe()
    print_table([{"what": what, "value": str(value)} for what, value in about.items()])
    path = out_dir / "machine.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("what", "value"), *about.items()])
    return [path]
