"""guard: integers that do not fit in 32 bits and divisions by zero are found; what wraps on purpose is left alone."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from triton_attn.toolchain import DeviceArithmeticError, guard

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tests the interpreter, on a machine with a GPU too"),
]
SOURCE = Path(__file__).read_text().splitlines()
LARGEST, SMALLEST = 2**31 - 1, -(2**31)


@triton.jit
def _operate(a, b, OP: tl.constexpr):
    if OP == "+":
        c = a + b
    elif OP == "-":
        c = a - b
    elif OP == "*":
        c = a * b
    elif OP == "<<":
        c = a << b
    elif OP == "//":
        c = a // b
    else:
        c = a % b
    return c


@triton.jit
def _kernel(out_ptr, a, b, OP: tl.constexpr, SIZE: tl.constexpr):
    if SIZE > 0:
        lanes = tl.arange(0, SIZE)
        a = tl.where(lanes == 1, a, 0)
        b = tl.where(lanes == 1, b, 1)
        tl.store(out_ptr + lanes, _operate(a, b, OP), mask=lanes == 1)
    else:
        tl.store(out_ptr + 1, _operate(a, b, OP))


def operate(a, op, b, size, dtype=torch.int64):
    out = torch.zeros(max(size, 2), dtype=dtype)
    with guard():
        _kernel[(1,)](out, a, b, OP=op, SIZE=size)
    return out[1].item()


@pytest.mark.parametrize("size", [0, 4], ids=["scalar", "block"])
@pytest.mark.parametrize(
    ("a", "op", "b"),
    [
        (LARGEST, "+", 1),
        (SMALLEST, "-", 1),
        (65536, "*", 65536),
        (-65536, "*", 32769),
        (3, "<<", 30),
        (0, "-", SMALLEST),
    ],
)
def test_a_result_that_needs_more_than_32_bits(a, op, b, size):
    exact = {"+": a + b, "-": a - b, "*": a * b, "<<": a << max(b, 0)}[op]
    with pytest.raises(DeviceArithmeticError) as error:
        operate(a, op, b, size)
    line = 1 + next(i for i, line in enumerate(SOURCE) if line.endswith(f"c = a {op} b"))
    place = f"program (0, 0, 0), {Path(__file__).name}:{line}: c = a {op} b"
    assert str(error.value) == f"{a} {op} {b} = {exact} does not fit in int32, in {place}"


@pytest.mark.parametrize("size", [0, 4], ids=["scalar", "block"])
@pytest.mark.parametrize(
    ("a", "op", "b"), [(LARGEST - 1, "+", 1), (SMALLEST + 1, "-", 1), (46340, "*", 46341), (-1, "<<", 31)]
)
def test_the_largest_results_that_fit(a, op, b, size):
    assert operate(a, op, b, size) == {"+": a + b, "-": a - b, "*": a * b, "<<": a << b}[op]


@pytest.mark.parametrize("size", [0, 4], ids=["scalar", "block"])
@pytest.mark.parametrize("op", ["//", "%"])
@pytest.mark.parametrize("a", [7, 2**40])
def test_division_by_zero(a, op, size):
    with pytest.raises(
        DeviceArithmeticError, match=rf"integer division by zero in program \(0, 0, 0\), .*: c = a {op} b"
    ):
        operate(a, op, 0, size)
    assert operate(7, op, 2, size) == {"//": 3, "%": 1}[op]


@pytest.mark.parametrize("a", [2**31 + 1, -(2**40)])
def test_64_bits_hold_more(a):
    assert operate(a, "*", 2, 4) == 2 * a


@triton.jit
def _wrapping_kernel(out_ptr, seed, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    hashed = lanes.to(tl.uint32) * 0x9E3779B9 + 0xFFFFFFFF
    tl.store(
        out_ptr + lanes, tl.rand(seed, lanes) + (hashed & 1).to(tl.float32) + (hashed.to(tl.int16) << 8).to(tl.float32)
    )


def test_unsigned_numbers_bit_patterns_and_philox_may_wrap():
    out = torch.zeros(64)
    with guard():
        _wrapping_kernel[(1,)](out, 2**40 + 123, SIZE=64)
    assert out.unique().numel() == 64


def test_outside_of_guard_numbers_wrap_as_on_a_gpu():
    out = torch.zeros(2, dtype=torch.int64)
    _kernel[(1,)](out, LARGEST, 1, OP="+", SIZE=0)
    assert out[1] == SMALLEST
