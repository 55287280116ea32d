"""What public calls cost the host, beside the bare launches that they make, through Triton's real launcher."""

import shutil

import pytest
from host_cost import ELSEWHERE
from stub_driver import HERE, ROOT, run_python

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.oldest,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launcher does on a GPU"),
]

# The most Python functions that a known call calls, its launches included.
MOST = {"flash": 72, "flash, lse": 72, "flash, window, sinks": 73, "varlen": 81, "varlen, lse": 81}
MOST |= {"flash with gradients": 84, "varlen with gradients": 93, "mla prefill with gradients": 89}
MOST |= {"backward": 180, "backward, gradient of lse": 181, "backward, sinks": 180, "backward, deterministic": 179}
MOST |= {"backward, varlen": 183, "backward, varlen, gradient of lse": 184, "backward by autograd": 212}
MOST |= {"backward by autograd, eight layers": 1535, "mla prefill, backward": 190, "mla prefill, materialized": 92}
MOST |= {"paged, contiguous cache": 61, "paged, memory of the caller's": 101}
MOST |= {"paged": 61, "paged, lse": 61, "paged, splits": 96, "paged, prefix tree": 124, "paged, chunk": 61}
MOST |= {"paged, fp8": 65, "mla decode": 77, "mla decode, splits": 110, "mla decode, fp8": 83}
MOST |= {"mla decode, weights": 144, "mla prefill, fused": 77, "mla prefill, absorbed": 135, "merge": 49}
MOST |= {"mla decode, memory of the caller's": 115, "mla decode, weights, memory of the caller's": 152}
MOST |= {"gather": 66, "gather, memory of the caller's": 69}

# With what torch's autograd takes around a forward pass, that is 1.5 to 1.7 times the launch on Triton 3.9, and 1.7 to
# 1.8 on Triton 3.6.0, whose launches are shorter. Slightly above 1.5, within what ELSEWHERE leaves, is one backward
# pass by torch.autograd.grad (1.7), whose checks eight layers share (1.6).
SLOWER = dict.fromkeys(("flash with gradients", "varlen with gradients", "mla prefill with gradients"), 1.8)


def test_host_cost(stub, record_property):
    """Calls take at most 1.5 times as long as their bare launches, but for `SLOWER`. Kernels are the portable ones. Of
    calls with torch's products, which this CPU computes, only the Python calls are counted."""
    environment = dict(PYTHONPATH=f"{ROOT}:{HERE}:{ROOT}/tests/helpers", TRITON_ATTN_KERNELS="portable")
    done = run_python(stub, "sm_90", HERE / "host_cost_calls.py", "sm_90", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    ratios, python_calls = {}, {}
    for line in done.stdout.splitlines():
        name, *times, count = line.split("\t")
        python_calls[name] = int(count)
        figure = f"{name}: {count} Python calls"
        if times:
            call, launches, ratios[name] = map(float, times)
            figure += f", {call:.1f} us, {launches:.1f} us its bare launches, {ratios[name]:.2f} times"
        record_property("figure", figure)
    assert python_calls.keys() == MOST.keys()
    assert {name: count for name, count in python_calls.items() if count > MOST[name]} == {}
    bars = {name: SLOWER.get(name, 1.5) * ELSEWHERE for name in ratios}
    assert {name: ratio for name, ratio in ratios.items() if ratio > bars[name]} == {}
