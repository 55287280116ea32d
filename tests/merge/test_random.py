"""Random calls of merge_attention against its definition in fp64."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import INTERPRETED, in_float64, parts_of

from triton_attn import merge_attention
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = [pytest.mark.random, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.emulated
@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(
    num_parts=st.integers(0, 5) | st.sampled_from([31, 32, 33, 70]),
    batch=st.integers(0, 3),
    seqlen_q=st.integers(0, 5),
    num_heads=st.integers(1, 4),
    head_dim_v=st.sampled_from([1, 16, 71, 128, 512]) | st.integers(1, 512),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    share_empty=st.sampled_from([0.0, 0.5, 1.0]),
    spread=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_random_splits(num_parts, batch, seqlen_q, num_heads, head_dim_v, dtype, share_empty, spread, seed):
    outs, lses = parts_of(seed, num_parts, batch, seqlen_q, num_heads, head_dim_v, dtype, share_empty, spread)
    with guard() if INTERPRETED else contextlib.nullcontext(), poisoned_empty():
        out, lse = merge_attention(outs, lses)
    out64, lse64 = in_float64(outs, lses)
    assert out.dtype == dtype
    largest = outs[outs.isfinite()].abs().amax().item() if outs.isfinite().any() else 0.0
    # A weight has the rounding error of its exponent, and the argument of exp2 is up to 4 * spread.
    eps = max(torch.finfo(dtype).eps, 8 * spread * torch.finfo(torch.float32).eps)
    assert_close_to_reference(out, out64, floor=eps * largest)
    finite = lse64[lse64.isfinite()]
    floor = 1e-6 * max(1.0, finite.abs().amax().item() if finite.numel() else 0.0)
    assert_close_to_reference(lse, lse64, floor=floor, name="lse")
