"""Tensors that make mistakes visible, and the rule by which an error is judged. For CPU and GPU tensors alike."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch


@contextlib.contextmanager
def poisoned_empty(package: str = "triton_attn"):
    """Uninitialised tensors that `package` makes come back poisoned, so that an output nobody wrote shows.

    `torch.empty`, `torch.empty_like`, `torch.empty_strided` and `Tensor.new_empty`, called as such from a module of
    `package`, fill floats with NaN, integers with the largest value of their type, booleans with True. Callers outside
    `package` get what they always get, and so does code that `torch.compile` traces.
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
        # torch.compile can trace a method of Tensor by its name only, and this name is taken: zeros do as well.
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
    integers: a kernel that reads beside the tensor spreads NaN, one that writes there is caught by the check, and
    elements of the tensor itself that nobody writes show.

    Args:
        shape: of the tensor.
        padding: elements before and after it; a multiple of 16 keeps the tensor's alignment to 16 bytes.

    Returns:
        (tensor, check): `check()` raises AssertionError with the distance of the first changed byte.
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
    """Largest absolute error of an output against fp64, of torch's own output, and the bound that the first met."""

    error: float
    torch_error: float
    bound: float


def assert_close_to_reference(out, ref64, *, torch_out=None, torch_error=None, factor=2.0, floor=None, name="out"):
    """Assert max |out - ref64| <= factor * torch_error + floor, the rule by which FlashAttention judges a kernel.

    A fixed tolerance is too loose for some inputs and too tight for others; what torch itself loses in the same dtype
    says what the inputs allow. Entries of ref64 that are infinite must be the same infinity in `out`, all others must
    be finite there.

    Args:
        out: the tensor to judge, any floating dtype.
        ref64: the result in fp64 from the same inputs, same shape; without NaN.
        torch_out: what torch computes in the dtype of `out`. Its error is taken over the entries where it is finite
            (torch gives NaN where a row sees no key).
        torch_error: that error, if it is known already; neither means 0.
        factor: how many times torch's error is allowed.
        floor: allowed besides, for where torch is exact by luck; by default max |ref64| times one eps of the dtype of
            `out` (twice what rounding the exact result may cost), four eps for fp32 and fp64.
        name: of the output, for the message.

    Returns:
        `Closeness` (error, torch_error, bound).

    Raises:
        AssertionError: the rule is broken, or shapes or dtypes differ; names the worst index and both errors.
        TypeError, ValueError: the arguments cannot be judged by: ref64 is not fp64 or has NaN, both torch_out and
            torch_error are given.
    """
    if ref64.dtype != torch.float64:
        raise TypeError(f"ref64 must be float64; got {ref64.dtype}")
    if ref64.isnan().any():
        raise ValueError("ref64 must have no NaN")
    if torch_out is not None and torch_error is not None:
        raise ValueError("expected torch_out or torch_error; got both")
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


# Default floor. Half-precision results are computed in fp32 and rounded once; wider ones gather roundings of their own.
_FLOOR_IN_EPS = {torch.float32: 4, torch.float64: 4}


def _errors(out, ref64):
    """|out - ref64|: 0 where both are the same infinity, infinite where `out` alone is not finite."""
    out = out.detach().double()
    return torch.where(out == ref64, 0.0, (out - ref64).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(values):
    return values.max().item() if values.numel() else 0.0
