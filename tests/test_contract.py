"""What every family keeps, in each of its schedules: each option, lengths at the edge, dtypes, all against fp64.

A new family is an entry of tests/helpers/families.py, a new option a field in tests/helpers/scores.py.
"""

import pytest
from decode_cases import DTYPES
from families import FAMILIES
from scores import ALONE, PAIRS

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def each(names_and_values):
    return [pytest.param(*case, id=", ".join(map(str, case))) for case in names_and_values]


def taken(many):
    return each((name, options) for name, family in FAMILIES.items() for options in many if family.takes(options))


LENGTHS = [
    ((), ()),
    ((0,), (3,)),
    ((3,), (0,)),
    ((0, 0), (0, 0)),
    ((1,), (1,)),
    ((5,), (2,)),
    ((1, 1), (300, 300)),
    ((70, 70), (1, 1)),
]
RAGGED = [((17, 0, 1), (0, 40, 130)), ((1, 64, 33), (1, 63, 65))]


def lengths():
    for name, family in FAMILIES.items():
        for seqlens in LENGTHS if family.dense else LENGTHS + RAGGED:
            yield name, *seqlens


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize(("family", "options"), taken(ALONE))
def test_each_option(family, options):
    family = FAMILIES[family]
    family.check(family.with_options(options))


@pytest.mark.full(but_each=4)
@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize(("family", "options"), taken(PAIRS))
def test_each_pair_of_options(family, options):
    family = FAMILIES[family]
    family.check(family.with_options(options))


@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize(("family", "seqlens_q", "seqlens_k"), each(lengths()))
def test_lengths_at_the_edge(family, seqlens_q, seqlens_k):
    family = FAMILIES[family]
    family.check(family.with_lengths(seqlens_q, seqlens_k))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_dtype(family, dtype):
    family = FAMILIES[family]
    options = {"dtype": dtype, "cache_dtype": dtype}
    family.check(family.with_options({name: dtype for name in options if family.takes({name: dtype})}))
