"""Launches of a call, recorded and not made, so that those of two calls can be compared."""

import contextlib
from unittest import mock

import torch

from triton_attn._host.tuned import forget_plans
from triton_attn.toolchain import compile_only


def described(x):
    """An argument of a kernel, so that those of two calls can be compared."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride(), x.data_ptr() % 16
    if hasattr(x, "block_shape"):  # a TMA descriptor of Triton or Gluon
        return type(x).__name__, {name: described(value) for name, value in vars(x).items()}
    if isinstance(x, dict):
        return {name: described(value) for name, value in x.items()}
    return tuple(map(described, x)) if isinstance(x, (tuple, list)) else x


def unaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def padded(x):
    """Strides that are no multiples of 16 bytes."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + 2, dtype=x.dtype)[..., :-2]


@contextlib.contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kernels(wanted):
    return mock.patch.dict("os.environ", TRITON_ATTN_KERNELS=wanted)


def launches_of(call, modules, arch="sm_90", inside=contextlib.nullcontext, **arguments):
    """(kernel, grid, arguments, constants) of each launch of call(**arguments) from modules.

    The call is made in the context that inside makes.
    """
    launches = []

    def record(kernel, grid, device, args, constants, alike=None):
        launches.append((kernel.__name__, grid, described(args), described(constants)))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", record))
        stack.enter_context(compile_only(arch))
        stack.enter_context(inside())
        call(**arguments)
    return launches


def check_neighbour(launches, base, more):
    """A call with base launches what it would as the first, and so does its neighbour base | more, which differs."""
    forget_plans()
    first = launches(**base | more)
    forget_plans()
    before = launches(**base)
    assert launches(**base | more) == first
    assert before != first
    assert launches(**base) == before
