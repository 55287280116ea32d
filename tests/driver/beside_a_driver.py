"""Launches over a driver and in the emulator, in one process. LD_LIBRARY_PATH has a libcuda.so.1 that prints launches.

python beside_a_driver.py sm_90
"""

import ctypes
import sys

import torch
import triton
import triton.language as tl
from public_calls import use_stub
from triton.tools.tensor_descriptor import TensorDescriptor

import triton_attn
from triton_attn.toolchain import emulate


@triton.jit
def _double_kernel(x, out_ptr, BLOCK: tl.constexpr):
    values = x.load([0, 0]).reshape(BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), 2 * values)


def double(block):
    x, out = torch.randn(1, block), torch.full([block], float("nan"))
    _double_kernel[(1,)](TensorDescriptor.from_tensor(x, [1, block]), out, BLOCK=block)
    return x[0], out


def over_the_driver(block):
    """Prints that the driver has the launch. It computes nothing."""
    assert double(block)[1].isnan().all()


def in_the_emulator(block):
    with emulate(arch) as launches:
        x, out = double(block)
    assert torch.equal(out, 2 * x)
    assert len(launches) == 1


arch = sys.argv[1]
torch.cuda.is_available = lambda: True
driver = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # before all others, as LD_PRELOAD does it
use_stub(arch)
active = triton.runtime.driver.active
over_the_driver(32)
in_the_emulator(32)
in_the_emulator(64)
assert triton.runtime.driver.active is active
over_the_driver(32)
over_the_driver(128)  # compiled after the emulator was there

q = torch.randn(1, 16, 1, 16)
with emulate(arch):
    out = triton_attn.flash_attention(q, q, q)
torch.testing.assert_close(out, triton_attn.reference.flash_attention(q, q, q), atol=1e-5, rtol=1e-5)
