"""A fixed slice of the random draws of every family of attention, small enough for `make test-emulated`."""

import attention_cases
import attention_draws
import backward_cases
import backward_draws
import decode_cases
import decode_draws
import paged_cases
import paged_draws
import prefill_cases
import prefill_draws
import pytest
import torch
from hypothesis import given, seed, settings

pytestmark = [
    pytest.mark.ci(but_each=7),
    pytest.mark.emulated,
    pytest.mark.random,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # inputs contain NaN and infinity on purpose
]
BF16, FP16 = torch.bfloat16, torch.float16
SLICES = {
    "forward": (attention_cases.check, attention_draws.cases(BF16, False)),
    "forward varlen": (attention_cases.check, attention_draws.cases(FP16, True)),
    "backward": (backward_cases.check, backward_draws.cases(BF16, True)),
    "paged": (paged_cases.check, paged_draws.cases(FP16, False)),
    "paged varlen": (paged_cases.check, paged_draws.cases(BF16, True)),
    "mla decode": (decode_cases.check, decode_draws.cases(BF16)),
    "mla prefill fused": (prefill_cases.check, prefill_draws.cases("fused", BF16)),
    "mla prefill absorbed": (prefill_cases.check, prefill_draws.cases("absorbed", FP16)),
}


@pytest.mark.parametrize("name", SLICES)
def test_draws(name):
    check, cases = SLICES[name]

    # The first draw is the simplest call.
    @seed(0)
    @settings(max_examples=4, print_blob=True)
    @given(cases)
    def run(case):
        check(case)

    run()
