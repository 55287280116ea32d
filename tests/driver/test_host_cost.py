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
MOST = {"flash": 75, "flash, lse": 75, "flash, window, sinks": 76, "varlen": 84, "varlen, lse": 84}
MOST |= {"backward": 185, "backward, gradient of lse": 186, "backward, sinks": 185, "backward, deterministic": 184}
MOST |= {"backward, varlen": 188, "backward, varlen, gradient of lse": 189, "backward by autograd": 219}
MOST |= {"flash with gradients": 152, "paged, contiguous cache": 61, "paged, memory of the caller's": 101}
MOST |= {"paged": 61, "paged, lse": 61, "paged, splits": 96, "paged, prefix tree": 124, "paged, chunk": 61}
MOST |= {"paged, fp8": 65, "mla decode": 77, "mla decode, splits": 110, "mla decode, fp8": 83}
MOST |= {"mla decode, weights": 144, "mla prefill, fused": 82, "mla prefill, absorbed": 140, "merge": 49}
MOST |= {"mla decode, memory of the caller's": 115, "mla decode, weights, memory of the caller's": 152}
MOST |= {"gather": 66, "gather, memory of the caller's": 69}

# The call that is far above the bar of 1.5: the operator of tensors that require gradients, and torch's autograd around
# it, take four times as long as the launch. Slightly above it, within what ELSEWHERE leaves, is a backward pass by
# torch's engine (1.7).
SLOWER = {"flash with gradients": 5.2}


def test_host_cost(stub, record_property):
    """Calls take at most 1.5 times as long as their bare launches, but for `SLOWER`. Kernels are the portable ones; a
    materialized prefill is left out, since its products are torch's, on this CPU."""
    environment = dict(PYTHONPATH=f"{ROOT}:{HERE}:{ROOT}/tests/helpers", TRITON_ATTN_KERNELS="portable")
    done = run_python(stub, "sm_90", HERE / "host_cost_calls.py", "sm_90", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    ratios, python_calls = {}, {}
    for line in done.stdout.splitlines():
        name, call, launches, ratio, count = line.split("\t")
        ratios[name], python_calls[name] = float(ratio), int(count)
        figure = f"{name}: {float(call):.1f} us, {float(launches):.1f} us its bare launches, {ratios[name]:.2f} times"
        record_property("figure", f"{figure}, {count} Python calls")
    assert python_calls.keys() == MOST.keys()
    assert {name: count for name, count in python_calls.items() if count > MOST[name]} == {}
    bars = {name: SLOWER.get(name, 1.5) * ELSEWHERE for name in ratios}
    assert {name: ratio for name, ratio in ratios.items() if ratio > bars[name]} == {}
