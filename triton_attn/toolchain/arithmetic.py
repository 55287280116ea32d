"""Checks of the integer arithmetic of interpreted kernels: numpy wraps and divides by zero silently."""

import functools
import linecache
import operator
import sys
from pathlib import Path

import numpy as np
import triton
from triton.runtime import interpreter

_NOT_KERNELS = (str(Path(triton.__file__).parent / "runtime"), str(Path(triton.__file__).parent / "language"), __file__)


class DeviceArithmeticError(ArithmeticError):
    """An int32 result of a kernel that does not fit in 32 bits, or an integer division by zero."""


def check_fit(numpy_op, symbol, exact_op):
    """A wrapper for a builder's method: raise if the int32 result differs from that of 64-bit arithmetic.

    Only signed numbers are checked: unsigned ones wrap on purpose, as in Philox. Numbers of 8 and 16 bits are bit
    patterns, and wrap too. Every lane is checked, because an operation does not know which lanes a later mask leaves
    out.
    """

    def wrap(method):
        @functools.wraps(method)
        def wrapper(builder, lhs, rhs):
            result = method(builder, lhs, rhs)
            if result.data.dtype == np.int32:
                a, b = lhs.data, rhs.data
                if result.data.size == 1:
                    wrong = exact_op(a.item(), b.item()) != result.data.item()
                else:
                    wrong = (numpy_op(a, b, dtype=np.int64) != result.data).any()
                if wrong:
                    raise _overflow(a, b, symbol, numpy_op)
            return result

        return wrapper

    return wrap


def check_divisor(method):
    @functools.wraps(method)
    def wrapper(builder, lhs, rhs):
        if not rhs.data.all():
            raise DeviceArithmeticError(f"integer division by zero in {_place()}")
        return method(builder, lhs, rhs)

    return wrapper


CHECKS = {
    "create_add": check_fit(np.add, "+", operator.add),
    "create_sub": check_fit(np.subtract, "-", operator.sub),
    "create_mul": check_fit(np.multiply, "*", operator.mul),
    "create_shl": check_fit(np.left_shift, "<<", operator.lshift),
    "create_sdiv": check_divisor,
    "create_udiv": check_divisor,
    "create_srem": check_divisor,
    "create_urem": check_divisor,
}


def _overflow(a, b, symbol, op):
    a, b = np.broadcast_arrays(a.astype(np.int64), b.astype(np.int64))
    exact = op(a, b)
    lane = np.argmax(exact != exact.astype(np.int32))
    terms = f"{a.flat[lane]} {symbol} {b.flat[lane]} = {exact.flat[lane]}"
    return DeviceArithmeticError(f"{terms} does not fit in int32, in {_place()}")


def _place():
    """The program, and the line of the kernel or jit function that is being interpreted."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    program = interpreter.interpreter_builder.grid_idx
    return f"program {program}, {Path(name).name}:{line}: {linecache.getline(name, line).strip()}"
