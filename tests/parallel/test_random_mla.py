"""Random calls of MLA over 2, 3 and 4 processes against one process in fp64."""

import random

import pytest
from levels import FULL
from mla_parallel_draws import draw
from parallel_ranks import check_fakes, check_values, run

pytestmark = pytest.mark.random

# New draws at each full run; a Case that fails has its seed.
FIRST = random.randrange(10**9) if FULL else 0


@pytest.mark.parametrize(
    ("num_ranks", "number", "backend"),
    [
        pytest.param(2, 8, "triton", id="2 ranks"),
        pytest.param(3, 100, "reference", id="3 ranks by reference", marks=pytest.mark.ci),
        pytest.param(4, 100, "reference", id="4 ranks by reference", marks=pytest.mark.ci),
        pytest.param(2, 100, "triton", id="2 ranks, more", marks=pytest.mark.full),
        pytest.param(4, 100, "triton", id="4 ranks, more", marks=pytest.mark.full),
    ],
)
def test_draws(num_ranks, number, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    cases = [draw(FIRST + i, num_ranks) for i in range(number)]
    assert run(check_values, cases, num_ranks, tmp_path / "store") == []


@pytest.mark.ci
def test_draws_have_the_shapes_that_compilers_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [draw(FIRST + i, 2) for i in range(60)]
    assert run(check_fakes, cases, 2, tmp_path / "store") == []
