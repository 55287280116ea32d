"""Tensors that make mistakes visible, and the rule for judging errors. For CPU and GPU tensors."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch


@contextlib.contextmanager
def poisoned_empty(package: str = "triton_attn"):
    """Fill uninitialized tensors that `package` allocates with poison, so that unwritten outputs are visible.

    `torch.empty`, `torch.empty_like`, `torch.empty_strided` and `Tensor.new_empty`, called by these names from a module
    of `package`, fill floats with NaN, integers with the largest value of their type, booleans with True. Callers
    outside `package` and code that `torch.compile` traces are not affected.

    Example:
        >>> from triton_attn.testing import poisoned_empty
        >>> with poisoned_empty(package="__main__"):
        ...     x = torch.empty(2)
        >>> x
        tensor([nan, nan])
    """

    def poisoned(make, make_traced):
        def wrapper(*args, **kwargs):
            if torch.compiler.is_compiling():
                return make_traced(*args, **kwargs)
            out = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(out) if f"{caller}.".startswith(f"{package}.") else out

        return wrapper

    with contextlib.ExitStack() as patches:
        for name in ("empty", "empty_like", "empty_strided"):
            make = getattr(torch, name)
            patches.enter_context(mock.patch.object(torch, name, poisoned(make, make)))
        # torch.compile can trace a method of Tensor only by its name, and that name is taken. Zeros work as well.
        new_empty = poisoned(torch.Tensor.new_empty, lambda tensor, *args, **kwargs: tensor.new_zeros(*args, **kwargs))
        patches.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty))
        yield


@torch.no_grad()
def _poison(tensor):
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def padded(shape, dtype=torch.float32, device="cpu", *, padding: int = 256) -> tuple[torch.Tensor, Callable[[], None]]:
    """A contiguous tensor inside a larger poisoned buffer, and a function that raises if the padding was written.

    Every byte of the buffer is 0xFF, which is NaN in fp16, bf16, fp32, fp64, e4m3fn and e5m2, and -1 in signed
    integers. A kernel that reads beside the tensor spreads NaN, the check catches one that writes there, and unwritten
    elements of the tensor itself are visible.

    Args:
        shape: of the tensor.
        padding: elements before and after it; a multiple of 16 keeps the tensor's alignment to 16 bytes.

    Returns:
        (tensor, check): `check()` raises AssertionError with the distance of the first changed byte.

    Example:
        >>> from triton_attn.testing import padded
        >>> x, check = padded((4, 3))
        >>> x.as_strided((1,), (1,), x.storage_offset() + 12).fill_(1.0)  # behind the last element
        tensor([1.])
        >>> check()
        Traceback (most recent call last):
        AssertionError: 4 bytes written after the tensor, the nearest 0 bytes from it
    """
    sizes = [n * dtype.itemsize for n in (padding, math.prod(shape), padding)]
    before, inside, after = torch.full((sum(sizes),), 0xFF, dtype=torch.uint8, device=device).split(sizes)

    def check():
        for side, bytes_there in (("before", before.flip(0)), ("after", after)):
            if changed := (bytes_there != 0xFF).nonzero().flatten().tolist():
                raise AssertionError(
                    f"{len(changed)} bytes written {side} the tensor, the nearest {changed[0]} bytes from it"
                )

    return inside.view(dtype).view(shape), check


class Closeness(NamedTuple):
    """Largest absolute error of an output against fp64, the error of torch's own output, and the bound on the first.

    Example:
        >>> from triton_attn.testing import assert_close_to_reference
        >>> assert_close_to_reference(torch.ones(2), torch.ones(2).double())
        Closeness(error=0.0, torch_error=0.0, bound=4.76837158203125e-07)
    """

    error: float
    torch_error: float
    bound: float


def assert_close_to_reference(out, ref64, *, torch_out=None, torch_error=None, factor=2.0, floor=None, name="out"):
    """Assert max |out - ref64| <= factor * torch_error + floor, the rule by which FlashAttention judges a kernel.

    A fixed tolerance is too loose for some inputs and too tight for others. The error of torch itself in the same dtype
    shows which accuracy the inputs allow. Where ref64 is infinite, `out` must be the same infinity; elsewhere it must
    be finite.

    Args:
        out: the tensor to judge, any floating dtype.
        ref64: the result in fp64 from the same inputs, same shape; without NaN.
        torch_out: torch's result in the dtype of `out`. Its error is taken over its finite entries (torch gives NaN for
            a row that sees no key).
        torch_error: this error, if it is already known. With neither it is 0.
        factor: allowed multiple of torch's error.
        floor: an additional allowance, since torch may be exact by luck. The default is max |ref64| times one eps of
            the dtype of `out` (twice the error of rounding the exact result), four eps for fp32 and fp64.
        name: the output's name in messages.

    Returns:
        `Closeness` (error, torch_error, bound).

    Raises:
        AssertionError: the rule is broken, or shapes or dtypes differ. The message has the worst index and both errors.
        TypeError, ValueError: ref64 is not fp64 or has NaN, or both torch_out and torch_error are given.

    Example:
        >>> from triton_attn.testing import assert_close_to_reference
        >>> x = torch.randn(64, 64)
        >>> closeness = assert_close_to_reference(x @ x, x.double() @ x.double(), torch_out=x @ x)
        >>> closeness.error <= closeness.bound
        True
    """
    if ref64.dtype != torch.float64:
        raise TypeError(f"ref64: expected torch.float64, got {ref64.dtype}")
    if ref64.isnan().any():
        raise ValueError("ref64: expected no NaN")
    if torch_out is not None and torch_error is not None:
        raise ValueError("torch_out, torch_error: expected at most one of them, got both")
    if out.shape != ref64.shape:
        raise AssertionError(f"{name} has shape {tuple(out.shape)}, the reference {tuple(ref64.shape)}")
    if torch_out is not None and torch_out.shape != out.shape:
        raise AssertionError(f"{name} has shape {tuple(out.shape)}, torch's output {tuple(torch_out.shape)}")
    if torch_out is not None and torch_out.dtype != out.dtype:
        raise AssertionError(f"{name} has dtype {out.dtype}, torch's output {torch_out.dtype}")

    ref64 = ref64.detach().to(out.device)
    if torch_error is None:
        torch_errors = ref64.new_zeros(0) if torch_out is None else _errors(torch_out, ref64)
        torch_error = _largest(torch_errors[torch_errors.isfinite()])
    if floor is None:
        eps = torch.finfo(out.dtype).eps
        floor = _FLOOR_IN_EPS.get(out.dtype, 1) * eps * _largest(ref64[ref64.isfinite()].abs())
    bound = factor * torch_error + floor
    errors = _errors(out, ref64)
    error = _largest(errors)
    if not error <= bound:
        index = tuple(map(int, torch.unravel_index(errors.argmax(), errors.shape)))
        raise AssertionError(
            f"{name}: error {error:.3e} at {index} is above {bound:.3e} = {factor:g} * {torch_error:.3e} (torch) "
            f"+ {floor:.3e} (floor); got {out[index].item()}, expected {ref64[index].item()}"
        )
    return Closeness(error, torch_error, bound)


# Default floor. Half-precision results are computed in fp32 and rounded once; wider dtypes accumulate their own
# roundings.
_FLOOR_IN_EPS = {torch.float32: 4, torch.float64: 4}


def _errors(out, ref64):
    """|out - ref64|: 0 where both are the same infinity, infinite where only `out` is not finite."""
    out = out.detach().double()
    return torch.where(out == ref64, 0.0, (out - ref64).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(values):
    return values.max().item() if values.numel() else 0.0
