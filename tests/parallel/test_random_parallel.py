"""Random calls over 2 and 4 processes against one process in fp64."""

import random

import pytest
from levels import FULL
from parallel_draws import draw
from parallel_ranks import check_fakes, check_values, run

pytestmark = pytest.mark.random

# New draws at each full run; a Case that fails has its seed.
FIRST = random.randrange(10**9) if FULL else 0


@pytest.mark.parametrize(
    ("num_ranks", "number", "backend"),
    [
        pytest.param(2, 12, "triton", id="2 ranks"),
        pytest.param(2, 200, "reference", id="2 ranks by reference", marks=pytest.mark.ci),
        pytest.param(4, 200, "reference", id="4 ranks by reference", marks=pytest.mark.ci),
        pytest.param(2, 200, "triton", id="2 ranks, more", marks=pytest.mark.full),
        pytest.param(4, 200, "triton", id="4 ranks, more", marks=pytest.mark.full),
    ],
)
def test_draws(num_ranks, number, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    cases = [draw(FIRST + i, num_ranks) for i in range(number)]
    assert run(check_values, cases, num_ranks, tmp_path / "store") == []


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.ci(but_each=2)
def test_draws_have_the_shapes_that_compilers_are_told(num_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [draw(FIRST + i, num_ranks) for i in range(100)]
    assert run(check_fakes, cases, num_ranks, tmp_path / "store") == []
