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
MOST = {"flash": 69, "flash, lse": 69, "flash, window, sinks": 70, "varlen": 78, "varlen, lse": 78}
MOST |= {"flash with gradients": 81, "varlen with gradients": 90, "mla prefill with gradients": 81}
MOST |= {"backward": 158, "backward, gradient of lse": 159, "backward, sinks": 158, "backward, deterministic": 157}
MOST |= {"backward, varlen": 161, "backward, varlen, gradient of lse": 162, "backward by autograd": 190}
MOST |= {"backward by autograd, eight layers": 1359, "mla prefill, backward": 173, "mla prefill, materialized": 85}
MOST |= {"paged": 61, "paged, lse": 61, "paged, splits": 96, "paged, prefix tree": 124, "paged, chunk": 61}
MOST |= {"paged, fp8": 65, "paged, contiguous cache": 61, "paged, memory of the caller's": 101}
MOST |= {"mla decode": 77, "mla decode, splits": 110, "mla decode, fp8": 83, "mla decode, weights": 144}
MOST |= {"mla decode, memory of the caller's": 115, "mla decode, weights, memory of the caller's": 152}
MOST |= {"mla prefill, fused": 69, "mla prefill, absorbed": 135, "merge": 49}
MOST |= {"gather": 66, "gather, memory of the caller's": 69}


def test_host_cost(stub, record_property):
    """Calls take at most 1.5 times as long as their bare launches. On Triton 3.6.0, whose launches are shorter, a
    packed call with gradients and a backward pass by torch.autograd.grad are just there, with what torch's autograd
    takes. Kernels are the portable ones. Of calls with torch's products, which this CPU computes, only the Python calls
    are counted."""
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
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1.5 * ELSEWHERE} == {}
