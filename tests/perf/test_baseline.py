"""The default configs against tests/perf/baseline.csv, which `python -m perf inspect --update-baseline` writes.

The figures are those of compiled code, separately for each Triton version. No kernel has run.
"""

import pytest
import triton

from perf.commands.inspect import BASELINE_ARCHS, baseline_cases
from perf.results.baseline import COMPILED
from perf.results.compare import name_of
from perf.results.tables import format_table

UPDATE = "python -m perf inspect --update-baseline"
CASES = [case for arch in BASELINE_ARCHS for case in baseline_cases(arch)]
SAMPLE = (
    ("flash", "head_dim=128 causal=True"),
    ("paged", "num_heads_q=32 num_heads_kv=8 head_dim=128 page_size=16"),
    ("mla", "num_heads=128 cache_dtype=bfloat16 page_size=64"),
)


def marked(case):
    """Everything on sm_90 and a sample elsewhere; on the oldest Triton a sample of two vendors."""
    family, shape = case.columns["family"], case.columns["case"]
    in_sample = (family, shape) in SAMPLE
    marks = [] if case.arch == "sm_90" or in_sample else [pytest.mark.full]
    marks += [pytest.mark.oldest] if in_sample and case.arch in ("sm_90", "gfx942") else []
    return pytest.param(case, id=f"{case.arch}-{family}-{shape.replace(' ', '-')}", marks=marks)


def call_of(row):
    *call, _ = name_of(row)
    return call


@pytest.fixture(scope="module")
def known():
    rows = COMPILED.read()
    if not rows:
        pytest.skip(f"no baseline of triton {triton.__version__}: {UPDATE}")
    return rows


@pytest.mark.ci(but_each=11)
@pytest.mark.compiled
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_default_configs_are_no_worse_than_the_baseline(case, known, record_property):
    kernels = case.compile()
    assert not [kernel.error for kernel in kernels if kernel.error]
    now = [kernel.row for kernel in kernels]
    costs, gains = COMPILED.judge([row for row in known if call_of(row) == call_of(now[0])], now)
    for change in gains:
        record_property("figure", f"better than the baseline, {UPDATE}: {' '.join(change.row().values())}")
    if costs:
        table = format_table([change.row(before="baseline") for change in costs])
        pytest.fail(f"worse than the baseline; if that is meant, {UPDATE}\n{table}", pytrace=False)


def test_the_baseline_holds_all_cases_and_no_other(known):
    assert {tuple(call_of(row)) for row in known} == {
        (case.arch, case.dtype, case.family, case.columns["case"]) for case in CASES
    }
