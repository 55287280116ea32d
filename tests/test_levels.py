"""The tests that make test, CI and make test-full leave out."""

from types import SimpleNamespace

import pytest
from levels import without


def case(number, *marks):
    return SimpleNamespace(nodeid=f"tests/test_x.py::test_it[{number}]", iter_markers=lambda name: iter(marks))


@pytest.mark.parametrize(
    ("marks_of", "kept"),
    [
        (lambda number: [], [0, 1, 2, 3, 4, 5, 6]),
        (lambda number: [pytest.mark.ci], []),
        (lambda number: [pytest.mark.ci(but_each=3)], [0, 3, 6]),
        (lambda number: [pytest.mark.ci(but_each=3), *[pytest.mark.ci] * (number == 0)], [1, 4]),
    ],
)
def test_one_of_each_so_many_cases_is_left(marks_of, kept):
    """The tests without a mark."""
    cases = [case(number, *marks_of(number)) for number in range(7)]
    assert without("ci", cases) == [cases[number] for number in kept]
