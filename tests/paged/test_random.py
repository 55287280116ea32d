"""Random calls of attention over a cache against its definition in fp64."""

import pytest
from hypothesis import given, seed, settings
from paged_cases import DTYPES, check
from paged_draws import cases

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = [pytest.mark.random, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype, varlen, shard):
    @seed(shard + 2 * varlen + 4 * DTYPES.index(dtype))
    @settings(settings(), print_blob=True)
    @given(cases(dtype, varlen))
    def run(case):
        check(case)

    run()
