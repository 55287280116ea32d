"""Numbers of quantized caches as the kernels decode them: all of them, in each format."""

import pytest
import torch
import triton
import triton.language as tl

from triton_attn._host.gpu import gpu_arch, gpu_of
from triton_attn._jit.decode import decode, decode_float8


@triton.jit
def _decode_kernel(bits_ptr, out_ptr, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, decode(tl.load(bits_ptr + offs), MANTISSA_BITS, NATIVE, dtype=out_ptr.dtype.element_ty))


@pytest.mark.emulated
@pytest.mark.oldest
@pytest.mark.parametrize("size", [256, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_every_number(device, request, format, native, dtype, size):
    """64 are fewer than four elements a thread."""
    arch = request.config.getoption("--emulate", None) or (gpu_arch(0) if device == "cuda" else None)
    mantissa_bits = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2, torch.int8: 7}[format]
    if native and arch is not None and mantissa_bits not in gpu_of(arch).native_fp8:
        pytest.skip("this GPU does not convert them")
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    given = bits.view(torch.int8) if format == torch.int8 else bits
    out = torch.empty(256, dtype=dtype, device=device)
    for start in range(0, 256, size):
        _decode_kernel[(1,)](given[start:], out[start:], mantissa_bits, native, size)
    expected = given.view(format).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() & ~out.isnan(), expected.signbit() & ~expected.isnan())


@triton.jit
def _decode_float8_kernel(bits_ptr, out_ptr, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    offs = tl.arange(0, 256)
    tl.store(out_ptr + offs, decode_float8(tl.load(bits_ptr + offs), MANTISSA_BITS, NATIVE))


@pytest.mark.oldest
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_every_number_of_float8(device, dtype, mantissa_bits, native):
    if native and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert them")
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=torch.float16, device=device)
    _decode_float8_kernel[(1,)](bits, out, mantissa_bits, native)
    torch.testing.assert_close(out, bits.view(dtype).half(), rtol=0, atol=0, equal_nan=True)
