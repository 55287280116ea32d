"""Random calls of mla_decode, and of mla_prefill in each schedule, against their definition in fp64."""

import decode_cases
import decode_draws
import hopper_cases
import prefill_cases
import prefill_draws
import pytest
import torch
from decode_cases import DTYPES
from hypothesis import given, seed, settings

from triton_attn.mla import absorbed
from triton_attn.mla.schedule import MODES

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = [pytest.mark.random, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize("shard", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype, shard):
    @seed(shard + 3 * DTYPES.index(dtype))
    @settings(settings(), print_blob=True)
    @given(decode_draws.cases(dtype))
    def run(case):
        decode_cases.check(case)

    run()


@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize("shard", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_prefill(mode, dtype, shard):
    @seed(shard + 3 * DTYPES.index(dtype) + 9 * MODES.index(mode))
    @settings(settings(), print_blob=True)
    @given(prefill_draws.cases(mode, dtype))
    def run(case):
        prefill_cases.check(case)

    run()


@pytest.mark.emulated
@pytest.mark.full(but_each=25)
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("number", range(100))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_decode_by_the_kernel_of_hopper(dtype, number, emulated_hopper):
    with hopper_cases.launched(absorbed, "launch_mla_decode_hopper"):
        decode_cases.check(hopper_cases.decode(number, (0, 1, 63, 64, 65, 129, 330), dtype, most=2))
