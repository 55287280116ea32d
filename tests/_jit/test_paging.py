"""fp8 values of a cache as the kernels decode them: all of them, in both formats."""

import pytest
import torch
import triton
import triton.language as tl

from triton_attn._jit.paging import decode_float8


@triton.jit
def _decode_kernel(bits_ptr, out_ptr, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    offs = tl.arange(0, 256)
    tl.store(out_ptr + offs, decode_float8(tl.load(bits_ptr + offs), MANTISSA_BITS, NATIVE))


@pytest.mark.oldest
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_every_number(device, dtype, mantissa_bits, native):
    if native and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert them")
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=torch.float16, device=device)
    _decode_kernel[(1,)](bits, out, mantissa_bits, native)
    torch.testing.assert_close(out, bits.view(dtype).half(), rtol=0, atol=0, equal_nan=True)
