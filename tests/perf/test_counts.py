"""The emulator's counts of the default configs against tests/perf/counts.csv, which `python -m perf counts
--update-counts` writes. No figure is over its bar without a reason.

The figures are exact, separately for each Triton version: the emulator counts what a small call executes.
"""

import csv
import shutil

import pytest
import triton

from perf.commands import counts
from perf.commands.counts import ARCHS, BARS, baseline_cases, misses
from perf.results.baseline import COUNTED
from perf.results.compare import name_of
from perf.results.tables import format_table

UPDATE = "python -m perf counts --update-counts"
CASES = [case for arch in ARCHS for case in baseline_cases(arch)]
SAMPLE = (  # one for each kind of figure
    ("sm_90", "flash", "head_dim=64 causal=True"),
    ("sm_90", "flash_backward", "head_dim=64 deterministic=False"),
    ("sm_90", "mla", "num_heads=16 cache_dtype=bfloat16 page_size=64"),
    ("sm_80", "append", "cache_dtype=bfloat16 num_heads_kv=8 head_dim=128 page_size=16 rope=interleaved"),
    ("sm_80", "paged", "num_heads_q=71 num_heads_kv=1 head_dim=64 page_size=16"),
)

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
]


def call_of(case):
    columns = case.columns
    return columns["arch"], columns["dtype"], columns["family"], columns["case"]


def marked(case):
    arch, _, family, shape = call_of(case)
    marks = [] if (arch, family, shape) in SAMPLE else [pytest.mark.full]
    return pytest.param(case, id=f"{arch}-{family}-{shape.replace(' ', '-')}", marks=marks)


@pytest.fixture(scope="module")
def known():
    rows = COUNTED.read()
    if not rows:
        pytest.skip(f"no counts of triton {triton.__version__}: {UPDATE}")
    return rows


@pytest.mark.compiled
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_counts_are_no_worse_than_they_were(case, known, record_property):
    now = [row for row, _ in case.count()]
    costs, gains = COUNTED.judge([row for row in known if name_of(row)[:-1] == call_of(case)], now)
    for change in gains:
        record_property("figure", f"better than the counts, {UPDATE}: {' '.join(change.row().values())}")
    if costs:
        table = format_table([change.row(before="counts") for change in costs])
        pytest.fail(f"worse than the counts; if that is meant, {UPDATE}\n{table}", pytrace=False)


def rows_of_every_triton():
    with COUNTED.path.open(newline="") as file:
        versions = {row["triton"] for row in csv.DictReader(file)}
    return [row for version in versions for row in COUNTED.read(version)]


def test_what_is_over_its_bar_has_a_reason():
    found = [(row, figure, why) for row in rows_of_every_triton() for figure, why in misses(row).items()]
    assert not [(name_of(row), figure) for row, figure, why in found if why is None]


def test_every_reason_is_needed():
    used = {(row["kernel"], figure, why) for row in rows_of_every_triton() for figure, why in misses(row).items()}
    assert {(kernel, figure, why) for kernel, figure, _, why in counts.REASONS} == used


def test_the_counts_hold_all_cases_and_no_other(known):
    assert {name_of(row)[:-1] for row in known} == {call_of(case) for case in CASES}


ROW = {"arch": "sm_90", "dtype": "bfloat16", "family": "flash", "case": "head_dim=64", "kernel": "_flash_fwd_kernel"}
ROW |= {"config": "64x64 w4 s2", "instructions": 1000, **dict.fromkeys(BARS, 1.0), "useful share": 0.8}


@pytest.mark.parametrize("figure", BARS)
def test_what_is_over_a_bar(figure):
    assert misses(ROW) == {}
    assert misses(ROW | {figure: BARS[figure] + 0.001}) == {figure: None}
    assert misses(ROW | {figure: None}) == {}


@pytest.mark.parametrize(
    ("now", "costs"),
    [
        ({}, []),
        ({"instructions": 1029}, []),
        ({"instructions": 1031}, ["instructions"]),
        ({"sectors": 1.0001}, ["sectors"]),
        ({"useful share": 0.77}, ["useful share"]),
        ({"config": "64x64 w8 s2", "instructions": 2000}, []),
        ({"config": "64x64 w8 s2", "issued": 2.0}, ["issued"]),
    ],
)
def test_what_costs(now, costs):
    found, _ = COUNTED.judge([COUNTED.held(ROW)], [ROW | now])
    assert [change.figure for change in found] == costs


@pytest.mark.compiled
def test_the_table_and_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "map_in_processes", lambda function, items: map(function, items))
    table, lines = counts.run(tmp_path, families=["copy"], arch="sm_80", lines=True)
    printed = capsys.readouterr().out
    assert "_copy_kv_pages_kernel" in printed
    assert "copy.py:" in printed
    assert "instructions" in table.read_text()
    assert "st.global" in lines.read_text()
