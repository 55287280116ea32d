"""Kernels that anyone may write, one for an operation of the language, as they are compiled: right against torch."""

import pytest
import torch
import triton
import triton.language as tl
from emulated_calls import MARKS

from triton_attn.toolchain import emulate

pytestmark = [*MARKS, pytest.mark.ci]


@triton.jit
def _apply_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, FUNCTION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, FUNCTION(tl.load(x_ptr + i), i))


@triton.jit
def _sorted(x, i):
    return tl.sort(x)


@triton.jit
def _cumulative(x, i):
    return tl.cumsum(x, 0)


@triton.jit
def _flipped(x, i):
    return tl.flip(x)


@triton.jit
def _gathered(x, i):
    return tl.gather(x, (i + 3) % x.shape[0], 0)


@triton.jit
def _counted(x, i):
    return tl.histogram((tl.abs(x) * 10).to(tl.int32), x.shape[0]).to(tl.float32)


@triton.jit
def _where_greatest(x, i):
    return tl.argmax(x, 0).to(tl.float32) + x * 0


@triton.jit
def _error_function(x, i):
    return tl.erf(x)


@triton.jit
def _sigmoid(x, i):
    return tl.sigmoid(x)


@triton.jit
def _logarithm(x, i):
    return tl.log(x * x + 1)


@triton.jit
def _floor(x, i):
    return tl.floor(x) + tl.ceil(x)


@triton.jit
def _clamped(x, i):
    return tl.clamp(x, -0.5, 0.5)


@triton.jit
def _greater_or_nan(x, i):
    x = tl.where(i == 5, float("nan"), x)
    return tl.maximum(x, 0.1, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _root_and_quotient(x, i):
    return tl.sqrt_rn(x * x) + tl.div_rn(x, 3.0)


@triton.jit
def _in_double(x, i):
    return (tl.sqrt(tl.abs(x).to(tl.float64)) * 2.0 / 3.0).to(tl.float32)


@triton.jit
def _long_integers(x, i):
    return ((x * 100).to(tl.int64) // 7 % 5).to(tl.float32)


@triton.jit
def _angles(x, i):
    return tl.sin(x * 1000) + tl.cos(x)


@triton.jit
def _eight_bits(x, i):
    return x.to(tl.float8e5).to(tl.float32)


@triton.jit
def _asserted(x, i):
    tl.device_assert(x < 100.0, "large")
    return x


FUNCTIONS = {
    _sorted: lambda x: x.sort()[0], _cumulative: lambda x: x.cumsum(0), _flipped: lambda x: x.flip(0),
    _gathered: lambda x: x.roll(-3), _counted: lambda x: torch.histc((x.abs() * 10).int().float(), 512, 0, 512),
    _where_greatest: lambda x: torch.full_like(x, x.argmax().item()), _error_function: torch.erf,
    _sigmoid: torch.sigmoid, _logarithm: lambda x: (x * x + 1).log(), _floor: lambda x: x.floor() + x.ceil(),
    _clamped: lambda x: x.clamp(-0.5, 0.5),
    _greater_or_nan: lambda x: x.clamp(min=0.1).where(torch.arange(512) != 5, torch.nan),
    _root_and_quotient: lambda x: x.abs() + x / 3, _in_double: lambda x: x.abs().sqrt() * 2 / 3,
    _long_integers: lambda x: torch.fmod((x * 100).long().div(7, rounding_mode="trunc"), 5).float(),
    _angles: lambda x: (x * 1000).double().sin().float() + x.cos(),
    _eight_bits: lambda x: x.to(torch.float8_e5m2).float(), _asserted: lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_functions(arch):
    torch.manual_seed(0)
    x = torch.randn(512)
    for function, right in FUNCTIONS.items():
        out = torch.zeros(512)
        with emulate(arch):
            _apply_kernel[(1,)](x, out, BLOCK=512, FUNCTION=function)
        torch.testing.assert_close(
            out, right(x), rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, f=function: f"{f.__name__}: {text}"
        )


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for k in range(0, K, BLOCK_K):
        of_k = k + tl.arange(0, BLOCK_K)
        a_mask, b_mask = (rows[:, None] < M) & (of_k[None, :] < K), (of_k[:, None] < K) & (columns[None, :] < N)
        a = tl.load(a_ptr + rows[:, None] * K + of_k[None, :], mask=a_mask)
        b = tl.load(b_ptr + of_k[:, None] * N + columns[None, :], mask=b_mask)
        zero_a, zero_b = tl.zeros_like(a), tl.zeros_like(b)
        total = tl.dot(tl.where(a_mask, a, zero_a), tl.where(b_mask, b, zero_b), total, out_dtype=SUM)
    c_ptrs = c_ptr + rows[:, None] * N + columns[None, :]
    tl.store(c_ptrs, total, mask=(rows[:, None] < M) & (columns[None, :] < N))


PRODUCTS = [
    ("sm_80", torch.float16, tl.float32),
    ("sm_80", torch.float32, tl.float32),
    ("sm_80", torch.int8, tl.int32),
    ("sm_80", torch.float16, tl.float16),
    ("sm_90", torch.bfloat16, tl.float32),
    ("sm_90", torch.float32, tl.float32),
    ("sm_90", torch.int8, tl.int32),
    ("sm_90", torch.float8_e5m2, tl.float32),
]


@pytest.mark.parametrize(("arch", "dtype", "sums"), PRODUCTS)
def test_products(arch, dtype, sums):
    torch.manual_seed(0)
    a, b = (torch.randn(shape).mul(2).to(dtype) for shape in ((70, 130), (130, 90)))
    c = torch.zeros(70, 90, dtype={tl.float32: torch.float32, tl.int32: torch.int32, tl.float16: torch.float16}[sums])
    with emulate(arch):
        _matmul_kernel[(2, 2)](a, b, c, 70, 90, 130, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, SUM=sums)
    digits = {tl.int32: 1e-9, tl.float16: 2e-2}.get(sums, 2e-3)  # fp32 is multiplied in tf32
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=digits, atol=50 * digits)


@triton.jit
def _locked_sum_kernel(sum_ptr, lock_ptr, count_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n, other=0.0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    if tl.load(count_ptr) == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        x += tl.load(sum_ptr + i, mask=i < n)
    tl.store(sum_ptr + i, x, mask=i < n)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def test_a_lock_orders_the_programs_of_a_launch():
    x, total = torch.randn(6, 100), torch.zeros(100)
    lock, count = torch.zeros(2, 1, dtype=torch.int32)
    with emulate("sm_90"):
        _locked_sum_kernel[(6,)](total, lock, count, x, 100, BLOCK=128)
    torch.testing.assert_close(total, x.sum(0))
