"""Launches like an earlier one, for which the JIT does not look for the compiled kernel again."""

import gc
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


def descriptor(block, dtype=torch.float32, rows=1):
    return TensorDescriptor.from_tensor(torch.empty(4, 32, dtype=dtype), [rows, block])


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


def run(num_warps=4, tile=32, alike=None, **arguments):
    constants = dict(TILE=tile, num_warps=num_warps)
    launch(_copy_kernel, (1,), torch.device("cpu"), tuple(arguments.values()), constants, alike)


ALIKE = pytest.mark.parametrize("alike", [None, object()], ids=["", "alike"])


class Met(dict):
    """As if there had been a launch of each kind."""

    def __contains__(self, key):
        return True


@pytest.fixture(autouse=True)
def no_launch_is_the_first_of_its_kind(monkeypatch):
    monkeypatch.setattr(host_device, "_alignments", Met())


def test_the_first_launch_of_its_kind_does_nothing_for_later_ones(monkeypatch):
    monkeypatch.setattr(host_device, "_alignments", {})
    alike = object()
    with (
        compile_only("sm_90"),
        mock.patch.object(host_device, "_places_of_tensors", wraps=host_device._places_of_tensors) as places,
    ):
        run(**BASE, alike=alike)
        assert not places.called
        for _ in range(3):
            run(**BASE, alike=alike)
    assert [one.args[0] for one in places.call_args_list].count("args") == 1


def kernels_of(launches):
    return [one.kernel.hash for one in launches]


PAIRS = {
    "1 and another that is no multiple": (dict(pair=Pair(tensor(), 1)), dict(pair=Pair(tensor(), 17))),
    "1 and True": (dict(factor=1), dict(factor=True)),
    "0 and False": (dict(factor=0), dict(factor=False)),
    "63 and 64 bits": (dict(size=2**40), dict(size=2**63)),
    "32 bits and more below 0": (dict(size=-(2**31)), dict(size=-(2**31) - 16)),
    "blocks of one size": (dict(desc=descriptor(32)), dict(desc=descriptor(16, rows=2))),
}


@pytest.mark.parametrize("change", [*CHANGES, *PAIRS])
def test_a_launch_takes_the_kernel_that_the_jit_would_take(change):
    base, changed = PAIRS[change] if change in PAIRS else ({}, CHANGES[change])
    here, asked = [], []
    for kernels, key in ((here, host_device._key_of_launch), (asked, lambda *args: None)):
        with compile_only("sm_90") as launches, mock.patch.object(host_device, "_key_of_launch", key):
            for arguments in (changed, base, base, changed, base):
                run(**BASE | arguments)
        kernels += kernels_of(launches)
    assert here == asked
    assert change == "another tuple" or here[0] != here[1]


@pytest.mark.parametrize("desc", [None, descriptor(32)], ids=["", "beside a descriptor"])
@pytest.mark.parametrize("change", ["an address", "an address in a tuple", "an output's address"])
def test_launches_that_are_alike_differ_in_addresses(change, desc):
    base, changed, taken = BASE | dict(desc=desc), CHANGES[change], []
    for alike in (None, object()):
        with compile_only("sm_90") as launches:
            for arguments in (base, base | changed, base | dict(factor=3.0), base | changed):
                run(**arguments, alike=alike)
        taken.append(kernels_of(launches))
    assert taken[0] == taken[1]
    assert taken[0][0] != taken[0][1]


def test_launches_that_are_not_alike_may_take_one_kernel():
    """Without the JIT: a new length is no reason to ask it."""
    first, second = object(), object()
    with compile_only("sm_90") as launches:
        run(**BASE, alike=first)
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("the JIT was asked")):
            run(**BASE | dict(size=7), alike=second)
            run(**BASE, alike=first)
            run(**BASE)
    assert len(set(kernels_of(launches))) == 1


def test_what_launches_share_is_asked_once():
    """Of one that is alike to an earlier one only the addresses are read."""
    alike = object()
    with compile_only("sm_90") as launches:
        run(**BASE, alike=alike)
        with mock.patch.object(host_device, "_add_kinds", side_effect=AssertionError("kinds were asked")):
            run(**BASE | dict(x=tensor()), alike=alike)
    assert len(launches) == 2


class Own(torch.Tensor):
    pass


def test_alike_launches_of_other_types_are_left_to_the_jit():
    alike, x = object(), tensor().as_subclass(Own)
    with compile_only("sm_90"), mock.patch.object(JITFunction, "run") as asked:
        for _ in range(2):
            run(**BASE | dict(x=x), alike=alike)
    assert asked.call_count == 2


@triton.jit
def _add_tuples_kernel(xs, ys, out_ptr):
    total = 0.0
    for i in tl.static_range(len(xs)):
        total += tl.load(xs[i])
    for i in tl.static_range(len(ys)):
        total *= tl.load(ys[i])
    tl.store(out_ptr, total)


def test_where_a_tuple_ends_counts():
    x = tensor()
    divided = ((x, x), (x,), x), ((x,), (x, x), x)
    with compile_only("sm_90") as launches:
        for args in (*divided, *divided):
            launch(_add_tuples_kernel, (1,), torch.device("cpu"), args, {})
    first, second, *again = kernels_of(launches)
    assert first != second
    assert again == [first, second]


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (dict(tile=32), dict(tile=64)),
        (dict(num_warps=4), dict(num_warps=8)),
        (dict(desc=descriptor(16), tile=16), dict(desc=descriptor(32), tile=32)),
        (dict(desc=descriptor(16), tile=16), dict(desc=descriptor(16, torch.float16), tile=16)),
        (dict(pair=Pair(tensor(), 17)), dict(pair=Pair(tensor(), 1))),
        (dict(pair=Pair(tensor(), 16, Steps(17, 16))), dict(pair=Pair(tensor(), 16, Steps(1, 16)))),
    ],
    ids=["constant", "warps", "block of a descriptor", "dtype of a descriptor", "1", "1 in a tuple of integers"],
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


@ALIKE
def test_another_target_has_kernels_of_its_own(alike):
    archs = []
    for arch in ("sm_80", "sm_90", "sm_80"):
        with compile_only(arch) as launches:
            run(**BASE, alike=alike)
            run(**BASE, alike=alike)
        archs += [one.arch for one in launches]
    assert archs == ["sm_80", "sm_80", "sm_90", "sm_90", "sm_80", "sm_80"]


@ALIKE
def test_amd_kernels_are_found_by_the_jit(alike):
    """It specializes pointers by the size of their memory there."""
    with compile_only("gfx942"):
        run(**BASE, alike=alike)
        with mock.patch.object(JITFunction, "run") as asked:
            run(**BASE, alike=alike)
        assert asked.called


@ALIKE
def test_hooks_see_every_launch(alike):
    seen = []
    with compile_only("sm_90"):
        run(**BASE, alike=alike)
        with mock.patch.object(_copy_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append("before")]):
            run(**BASE, alike=alike)
        assert seen == ["before"]
        triton.knobs.runtime.launch_enter_hook = lambda metadata: None
        try:
            with mock.patch.object(triton.compiler.CompiledKernel, "launch_metadata", autospec=True) as metadata:
                run(**BASE, alike=alike)
        finally:
            triton.knobs.runtime.launch_enter_hook = None
        assert metadata.call_count == 1


KNOBS = {
    "debug": (triton.knobs.runtime, "debug", True),
    "debug of the kernel": (_copy_kernel, "debug", True),
    "instrumentation": (triton.knobs.compilation, "instrumentation_mode", "fpsan"),
    "casts": (triton.knobs.compilation, "fpsan_homomorphic_casts", True),
}
if not hasattr(triton.knobs.compilation, "fpsan_homomorphic_casts"):  # Triton before 3.9
    del KNOBS["casts"]


@ALIKE
@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_acts_at_once(knob, alike):
    """As if the JIT looked each time."""
    with compile_only("sm_90") as launches:
        run(**BASE, alike=alike)
        owner, name, value = KNOBS[knob]
        with owner.scope() if hasattr(owner, "scope") else mock.patch.object(owner, name, owner.debug):
            setattr(owner, name, value)
            run(**BASE, alike=alike)
        run(**BASE, alike=alike)
    first, other, last = (one.kernel for one in launches)
    assert first is last
    assert other is not first


def test_environment_variables_of_knobs_act_at_once(monkeypatch):
    if not hasattr(triton.knobs.compilation, "fpsan_homomorphic_casts"):
        pytest.skip("Triton reads none at a launch")
    with compile_only("sm_90") as launches:
        run(**BASE)
        monkeypatch.setenv("TRITON_FPSAN_HOMOMORPHIC_CASTS", "1")
        run(**BASE)
    assert launches[0].kernel is not launches[1].kernel


@pytest.mark.parametrize(
    "variable", ["TRITON_DEFAULT_FP_FUSION", "TRITON_INSTRUMENTATION_MODE", "TRITON_ALWAYS_COMPILE"]
)
def test_other_environment_variables_act_where_the_jit_compiles(monkeypatch, variable):
    """The JIT reads them at import, or where it compiles, and would take the kernel that it has."""
    kernels = []
    for asks in (False, True):
        with compile_only("sm_90") as launches, monkeypatch.context() as patch:
            if asks:
                patch.setattr(host_device, "_key_of_launch", lambda *args: None)
            run(**BASE)
            patch.setenv(variable, "0")
            run(**BASE)
        assert launches[0].kernel is launches[1].kernel
        kernels += kernels_of(launches)
    assert len(set(kernels)) == 1


def test_with_a_hook_that_inspects_stages_the_jit_looks():
    """It asks the hook for a part of its key at every launch, from some Triton on."""
    with compile_only("sm_90"), triton.knobs.runtime.scope():
        run(**BASE)
        triton.knobs.runtime.add_stages_inspection_hook = lambda *args: None if args else ("key", "hash")
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as asked:
            run(**BASE)
            run(**BASE)
        assert asked.call_count == 2


OFFSET = tl.constexpr(1)
STEPS = tl.constexpr(3)


@triton.jit
def _add_kernel(x, step=16, TILE: tl.constexpr = 32, OPTION: tl.constexpr = 4):
    offsets = tl.arange(0, TILE) * step
    tl.store(x + offsets, tl.load(x + offsets) + OFFSET + STEPS + OPTION)


def add(*more, alike=None, **constants):
    launch(_add_kernel, (1,), torch.device("cpu"), (tensor(), *more), constants, alike)


@pytest.mark.parametrize(
    "arguments",
    [((), {}), ((17,), {}), ((), dict(TILE=16)), ((), dict(OPTION=5)), ((1,), dict(OPTION=5, TILE=64))],
    ids=str,
)
def test_defaults_are_those_of_the_kernel(arguments):
    """The launcher of Triton takes all parameters, also those that no caller passed."""
    more, constants = arguments
    taken = []
    for key in (host_device._key_of_launch, lambda *args: None):
        with compile_only("sm_90") as launches, mock.patch.object(host_device, "_key_of_launch", key):
            add(*more, **constants)
            with mock.patch.object(launches[0].kernel, "_run") as run_kernel:
                add(*more, **constants)
            taken.append(run_kernel.call_args.args[10:])  # after grid, stream, function, metadata, hooks, x
    assert taken[0] == taken[1]
    assert len(taken[0]) == 3


def test_an_argument_by_name_is_left_to_the_jit():
    """It says by what it specializes it: 1 and True would be one key, and a tensor would be held."""
    with compile_only("sm_90"):
        add(step=16)
        with mock.patch.object(JITFunction, "run") as asked:
            add(step=16)
        assert asked.called


@ALIKE
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_global_that_was_changed_is_reported(monkeypatch, change, alike):
    with compile_only("sm_90") as launches:
        add(alike=alike)
        with monkeypatch.context() as patch:
            if change == "gone":
                patch.delitem(globals(), "STEPS")
            else:
                patch.setitem(globals(), "STEPS", tl.constexpr(5))
            with pytest.raises(RuntimeError, match="STEPS has changed"):
                add(alike=alike)
        add(alike=alike)
    assert len(launches) == 2


def test_kernels_of_one_function_have_options_of_their_own():
    others = triton.jit(_add_kernel.fn, debug=True), triton.jit(_add_kernel.fn, do_not_specialize=["step"])
    kernels = _add_kernel, *others
    with compile_only("sm_90") as launches:
        for kernel in (*kernels, *kernels):
            launch(kernel, (1,), torch.device("cpu"), (tensor(), 32), {})
    compiled = [one.kernel for one in launches]
    assert len(set(compiled)) == 3
    assert compiled[:3] == compiled[3:]


@triton.jit
def _subtract_kernel(x, step=16, TILE: tl.constexpr = 32, OPTION: tl.constexpr = 4):
    offsets = tl.arange(0, TILE) * step
    tl.store(x + offsets, tl.load(x + offsets) - OFFSET - STEPS - OPTION)


@ALIKE
def test_kernels_with_equal_arguments_are_apart(alike):
    """Each has launches of its own that are alike."""
    with compile_only("sm_90") as launches:
        for kernel in (_add_kernel, _subtract_kernel, _add_kernel, _subtract_kernel):
            launch(kernel, (1,), torch.device("cpu"), (tensor(),), {}, alike)
    assert [one.kernel.name for one in launches] == ["_add_kernel", "_subtract_kernel"] * 2


def test_an_option_without_a_hash_is_left_to_the_jit():
    with compile_only("sm_90") as launches:
        for _ in range(2):
            add(extern_libs={})
    assert launches[0].kernel is launches[1].kernel


@pytest.mark.parametrize("place", ["argument", "tuple", "descriptor"])
def test_parameters_are_tensors(place):
    x = torch.nn.Parameter(torch.empty(4, 32))
    arguments = {
        "argument": dict(x=x),
        "tuple": dict(pair=Pair(x, 16)),
        "descriptor": dict(desc=TensorDescriptor.from_tensor(x, [1, 32])),
    }
    with compile_only("sm_90"), torch.no_grad():
        run(**BASE | arguments[place])
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("the JIT was asked")):
            run(**BASE | arguments[place])


@ALIKE
def test_no_tensor_is_held(alike):
    with compile_only("sm_90"):
        x = tensor()
        run(**BASE | dict(x=x), alike=alike)
        held = weakref.ref(x)
        del x
        assert held() is None


def test_what_is_no_integer_after_all_is_left_to_the_jit():
    """A tuple is taken as its annotations say; one that holds something else has no key."""
    arguments = BASE | dict(pair=Pair(tensor(), 16, Steps(16, "text")))
    with compile_only("sm_90"), mock.patch.object(JITFunction, "run") as asked:
        run(**arguments)
        run(**arguments)
    assert asked.call_count == 2


def test_no_driver_is_held():
    """Nor are its kernels: tests switch drivers all the time."""
    with compile_only("sm_90") as launches:
        driver = weakref.ref(triton.runtime.driver.active)
        run(**BASE)
        run(**BASE)
        kernel = weakref.ref(launches[0].kernel)
    del launches
    gc.collect()
    assert kernel() is None
    assert driver() is None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(host_device, "MOST_COMPILED", 3)
    monkeypatch.setattr(host_device, "_alignments", {})
    with compile_only("sm_90") as launches:
        for num_warps in (1, 2, 4, 8, 1, 2, 4, 8):
            run(num_warps=num_warps, **BASE, alike=object())
            assert len(host_device._compiled) <= 3
            assert len(host_device._alignments) <= 3
    assert len({one.kernel for one in launches}) == 4


@ALIKE
def test_what_the_jit_forgot_is_compiled_again(alike):
    with compile_only("sm_90") as launches:
        run(**BASE, alike=alike)
        first = launches.pop().kernel.hash
        triton.runtime.driver.active.kernels.clear()
        _copy_kernel.device_caches.pop(triton.runtime.driver.active.device)
        gc.collect()
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as asked:
            run(**BASE, alike=alike)
        assert asked.called
    assert launches[0].kernel.hash == first
