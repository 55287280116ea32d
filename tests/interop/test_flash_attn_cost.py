"""What the functions of interop.flash_attn cost the host beside those that they call."""

import pytest
import torch
from host_cost import ELSEWHERE, compare, python_calls

from triton_attn import flash_attention, flash_attention_varlen
from triton_attn.interop.flash_attn import flash_attn_func, flash_attn_varlen_func
from triton_attn.toolchain import compile_only

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_host_cost(varlen, record_property):
    """Python calls repeat exactly. The ratio of times is 1.14; the goal is 1.1."""
    q, k, v = (torch.empty(4, 512, heads, 128, dtype=torch.float16) for heads in (32, 8, 8))
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens = torch.arange(5, dtype=torch.int32) * 512
    arguments = (q, k, v, cu_seqlens, cu_seqlens, 512, 512) if varlen else (q, k, v)
    door, direct = (flash_attn_varlen_func, flash_attention_varlen) if varlen else (flash_attn_func, flash_attention)
    calls = {"door": lambda: door(*arguments, causal=True), "direct": lambda: direct(*arguments, causal=True)}
    with compile_only("sm_90", every_launch=False), torch.no_grad():
        for call in 2 * (*calls.values(),):  # launches of a kind are known from the second on
            call()
        extra_calls = python_calls(calls["door"]) - python_calls(calls["direct"])
        *_, ratio = compare(calls["door"], calls["direct"], batches=100)
    record_property("figure", f"{door.__name__}: {ratio:.2f} of the direct call, {extra_calls} more Python calls")
    assert extra_calls <= 9
    assert ratio <= 1.1 * ELSEWHERE
