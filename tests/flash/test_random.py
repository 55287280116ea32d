"""Random calls of flash_attention and flash_attention_varlen against fp64, their gradients against fp64 autograd."""

import attention_cases
import attention_draws
import backward_cases
import backward_draws
import hopper_cases
import pytest
from attention_cases import DTYPES
from hypothesis import given, seed, settings

from triton_attn.flash import forward

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = [pytest.mark.random, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def check_random(check, strategy, seed_of_draws, record_property, what):
    """Check random draws. The summary of the test run has their number and the largest errors."""
    shares = []

    @seed(seed_of_draws)
    @settings(settings(), print_blob=True)
    @given(strategy)
    def run(case):
        shares.append(check(case))

    run()
    record_property("figure", f"{what}: {len(shares)} random calls, errors up to {max(shares):.2f} of their bounds")


@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize("shard", range(3))
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, varlen, shard, record_property):
    seed = shard + 2 * varlen + 4 * DTYPES.index(dtype)
    what = f"forward, {str(dtype).removeprefix('torch.')}, {'varlen' if varlen else 'dense'}"
    check_random(attention_cases.check, attention_draws.cases(dtype, varlen), seed, record_property, what)


@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, varlen, shard, record_property):
    seed = shard + 2 * varlen + 4 * DTYPES.index(dtype)
    what = f"backward, {str(dtype).removeprefix('torch.')}, {'varlen' if varlen else 'dense'}"
    check_random(backward_cases.check, backward_draws.cases(dtype, varlen), seed, record_property, what)


@pytest.mark.emulated
@pytest.mark.full(but_each=25)
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("number", range(200))
def test_forward_by_the_kernel_of_hopper(number, emulated_hopper):
    """Contexts of several rounds over the buffers of a ring."""
    lengths = (0, 1, 64, 129, 200), (0, 1, 128, 129, 330, 700)
    case = hopper_cases.attention(number, *lengths, most=2)
    with hopper_cases.launched(forward, "launch_flash_fwd_hopper"):
        attention_cases.check(case)


@pytest.mark.emulated
@pytest.mark.full(but_each=25)
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("number", range(100))
def test_forward_by_programs_of_several_tiles(number, emulated_hopper):
    with hopper_cases.launched(forward, "launch_flash_fwd_hopper"), hopper_cases.several_tiles():
        attention_cases.check(hopper_cases.series(number))
