import csv
from dataclasses import replace

import pytest

from perf.results.baseline import COMPILED
from perf.results.compare import ABSENT, changes
from perf.results.tables import format_table

ROW = {
    "arch": "sm_90",
    "dtype": "bfloat16",
    "family": "flash",
    "case": "head_dim=64 causal=True",
    "kernel": "_flash_fwd_kernel",
    "config": "128x128 w8 s3 tma",
    "registers": 200,
    "spills": 0,
    "spills in loop": 0,
    "loop instructions": 500,
    "lock TFLOP/s": 460.0,
}
OTHER = ROW | {"case": "head_dim=128 causal=True"}
AMD = ROW | {"arch": "gfx942", "config": "128x64 w4 s1", "lock TFLOP/s": None}
MOVED = {"config": "64x64 w4 s3 tma"}


def figures(found):
    return [(change.figure, change.before, change.now) for change in found]


def test_changes_are_those_of_the_same_kernel():
    now = [OTHER | {"loop instructions": 510, "lock TFLOP/s": 450.12345}, ROW]
    found = changes([ROW, OTHER], now, ("loop instructions", "lock TFLOP/s", "spills"))
    assert figures(found) == [("loop instructions", 500, 510), ("lock TFLOP/s", 460.0, 450.12345)]
    assert found[0].row(before="v1") == {
        "kernel": "flash _flash_fwd_kernel",
        "case": "head_dim=128 causal=True",
        "arch": "sm_90",
        "dtype": "bfloat16",
        "figure": "loop instructions",
        "v1": "500",
        "now": "510",
        "change": "+2.0%",
    }
    assert "450.1 " in format_table([change.row() for change in found])


def test_a_kernel_of_one_side_is_named():
    found = changes([ROW], [OTHER], ("spills",))
    assert figures(found) == [("config", ABSENT, OTHER["config"]), ("config", ROW["config"], ABSENT)]


@pytest.mark.parametrize(
    ("row", "now", "costs", "gains"),
    [
        (ROW, {}, [], []),
        (ROW, {"loop instructions": 515}, [], []),
        (ROW, {"loop instructions": 516}, ["loop instructions"], []),
        (ROW, {"loop instructions": 484}, [], ["loop instructions"]),
        (ROW, {"loop instructions": None}, ["loop instructions"], []),
        (ROW, {"lock TFLOP/s": 446.3}, [], []),
        (ROW, {"lock TFLOP/s": 446.1}, ["lock TFLOP/s"], []),
        (ROW, {"lock TFLOP/s": 480.0}, [], ["lock TFLOP/s"]),
        (ROW, {"spills": 1}, ["spills"], []),
        (ROW | {"spills": 100}, {"spills": 101}, ["spills"], []),
        (ROW | {"spills": 100}, {"spills": 90}, [], ["spills"]),
        (ROW, {"spills in loop": 2}, ["spills in loop"], []),
        (ROW, {"registers": 255}, [], []),
        (AMD, {"registers": 255}, ["registers"], []),
        (ROW, MOVED | {"loop instructions": 900}, [], []),
        (ROW, MOVED | {"lock TFLOP/s": 400.0}, ["lock TFLOP/s"], []),
        (AMD, MOVED, ["config"], []),
    ],
)
def test_what_costs_and_what_gains(row, now, costs, gains):
    found = COMPILED.judge([COMPILED.held(row)], [row | now])
    assert [[change.figure for change in part] for part in found] == [costs, gains]


def test_a_kernel_that_comes_or_goes_needs_a_new_baseline():
    costs, gains = COMPILED.judge([COMPILED.held(ROW)], [OTHER])
    assert len(costs) == 2
    assert not gains


def test_an_update_replaces_one_triton_version_and_keeps_the_other(tmp_path):
    kept = replace(COMPILED, path=tmp_path / "baseline.csv")
    kept.update([ROW, AMD], "3.6.0")
    kept.update([ROW], "3.9.0")
    kept.update([OTHER, ROW | {"lock TFLOP/s": 470.123}], "3.9.0")
    assert kept.read("3.6.0") == [kept.held(AMD), kept.held(ROW)]
    assert kept.read("3.9.0") == [kept.held(OTHER), kept.held(ROW) | {"lock TFLOP/s": 470.1}]
    assert kept.read("4.0.0") == []
    with kept.path.open() as file:
        names = [(row["arch"], row["case"], row["triton"]) for row in csv.DictReader(file)]
    assert names == sorted(names), "a new figure is one changed line"
