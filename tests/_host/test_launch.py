"""Launches like an earlier one, for which the JIT does not look for the compiled kernel again."""

import weakref
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attn._host import device as host_device
from triton_attn._host.device import launch
from triton_attn.toolchain import compile_only

pytestmark = [pytest.mark.compiled, pytest.mark.oldest]


class Steps(NamedTuple):
    first: int
    second: int | None


class Pair(NamedTuple):
    ptr: object
    stride: object
    steps: Steps = Steps(16, 16)


class Other(NamedTuple):
    ptr: object
    stride: object
    steps: Steps = Steps(16, 16)


@triton.jit(do_not_specialize=["size"])
def _copy_kernel(x, pair, desc, out_ptr, size, factor, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    values = tl.load(x + offsets * pair.stride, mask=offsets < size, other=0.0)
    if pair.ptr is not None:
        values += tl.load(pair.ptr + offsets)
    if pair.steps.second is not None:
        values += tl.load(out_ptr + offsets * pair.steps.first + pair.steps.second)
    if desc is not None:
        values += desc.load([0, 0]).reshape(TILE)
    tl.store(out_ptr + offsets, values * factor)


def tensor(dtype=torch.float32, offset=0):
    return torch.empty(64 + offset, dtype=dtype)[offset:]


def descriptor(block, dtype=torch.float32):
    return TensorDescriptor.from_tensor(torch.empty(4, 32, dtype=dtype), [1, block])


BASE = dict(x=tensor(), pair=Pair(tensor(), 16), desc=None, out_ptr=tensor(), size=5, factor=2.0)
CHANGES = {
    "an address": dict(x=tensor(offset=1)),
    "an address in a tuple": dict(pair=Pair(tensor(offset=1), 16)),
    "an output's address": dict(out_ptr=tensor(offset=2)),
    "a dtype": dict(x=tensor(torch.float16)),
    "a dtype in a tuple": dict(pair=Pair(tensor(torch.float16), 16)),
    "no tensor": dict(pair=Pair(None, 16)),
    "a stride of 1": dict(pair=Pair(tensor(), 1)),
    "a stride that is no multiple": dict(pair=Pair(tensor(), 17)),
    "a stride of 64 bits": dict(pair=Pair(tensor(), 2**40)),
    "a tuple of integers, one of them 1": dict(pair=Pair(tensor(), 16, Steps(1, 16))),
    "a tuple of integers, one of them no multiple": dict(pair=Pair(tensor(), 16, Steps(16, 17))),
    "a tuple of integers, one of them None": dict(pair=Pair(tensor(), 16, Steps(16, None))),
    "a tuple of integers of 64 bits": dict(pair=Pair(tensor(), 16, Steps(2**40, 16))),
    "another tuple": dict(pair=Other(tensor(), 16)),
    "a size of 64 bits": dict(size=2**40),
    "an integer factor": dict(factor=2),
    "a factor of True": dict(factor=True),
    "a descriptor": dict(desc=descriptor(32)),
}


def run(num_warps=4, tile=32, **arguments):
    constants = dict(TILE=tile, num_warps=num_warps)
    launch(_copy_kernel, (1,), torch.device("cpu"), tuple(arguments.values()), constants)


def kernels_of(launches):
    return [one.kernel.hash for one in launches]


@pytest.mark.parametrize("change", CHANGES)
def test_a_launch_takes_the_kernel_that_the_jit_would_take(change):
    changed = BASE | CHANGES[change]
    with compile_only("sm_90") as launches:
        for arguments in (changed, BASE, BASE, changed, BASE):
            run(**arguments)
    here = kernels_of(launches)
    with compile_only("sm_90") as launches, mock.patch.object(host_device, "_key_of_launch", return_value=None):
        for arguments in (changed, BASE, BASE, changed, BASE):
            run(**arguments)
    assert here == kernels_of(launches)
    assert change == "another tuple" or here[0] != here[1]


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (dict(tile=32), dict(tile=64)),
        (dict(num_warps=4), dict(num_warps=8)),
        (dict(desc=descriptor(16), tile=16), dict(desc=descriptor(32), tile=32)),
        (dict(desc=descriptor(16), tile=16), dict(desc=descriptor(16, torch.float16), tile=16)),
    ],
    ids=["constant", "warps", "block of a descriptor", "dtype of a descriptor"],
)
def test_a_launch_with_other_constants_takes_another_kernel(base, other):
    with compile_only("sm_90") as launches:
        for options in (base, other, base, other):
            run(**BASE | options)
    first, second, *again = kernels_of(launches)
    assert first != second
    assert again == [first, second]


def test_the_jit_is_asked_once():
    with compile_only("sm_90") as launches:
        run(**BASE)
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("the JIT was asked")):
            run(**BASE | dict(x=tensor(), size=7, factor=3.0))
            with pytest.raises(AssertionError, match="asked"):
                run(**BASE | dict(x=tensor(offset=1)))
    assert len(launches) == 2


def test_another_target_has_kernels_of_its_own():
    archs = []
    for arch in ("sm_80", "sm_90", "sm_80"):
        with compile_only(arch) as launches:
            run(**BASE)
            run(**BASE)
        archs += [one.arch for one in launches]
    assert archs == ["sm_80", "sm_80", "sm_90", "sm_90", "sm_80", "sm_80"]


def test_amd_kernels_are_found_by_the_jit():
    """It specializes pointers by the size of their memory there."""
    with compile_only("gfx942"):
        run(**BASE)
        with mock.patch.object(JITFunction, "run") as asked:
            run(**BASE)
        assert asked.called


def test_hooks_see_every_launch():
    seen = []
    with compile_only("sm_90"):
        run(**BASE)
        with mock.patch.object(_copy_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append("before")]):
            run(**BASE)
        assert seen == ["before"]
        triton.knobs.runtime.launch_enter_hook = lambda metadata: None
        try:
            with mock.patch.object(triton.compiler.CompiledKernel, "launch_metadata", autospec=True) as metadata:
                run(**BASE)
        finally:
            triton.knobs.runtime.launch_enter_hook = None
        assert metadata.call_count == 1


def test_a_knob_acts_at_once():
    with compile_only("sm_90") as launches:
        run(**BASE)
        with mock.patch.object(triton.knobs.runtime, "debug", True):
            run(**BASE)
        run(**BASE)
    first, debug, last = (one.kernel for one in launches)
    assert first is last
    assert debug is not first


def test_no_tensor_is_held():
    with compile_only("sm_90"):
        x = tensor()
        run(**BASE | dict(x=x))
        held = weakref.ref(x)
        del x
        assert held() is None
