"""guard: each kind of fault is caught where it happens, and correct kernels pass with their bytes counted."""

import contextlib
import itertools
import operator
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attn.toolchain import MemoryAccessError, guard

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tests the interpreter, on a machine with a GPU too"),
]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, x_stride, y_stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * x_stride, mask=offs < N)
    tl.store(y_ptr + offs * y_stride, x, mask=offs < N)


def copy(x, y, N, x_stride=1, y_stride=1, grid=(2,)):
    _copy_kernel[grid](x, y, N, x_stride, y_stride, BLOCK=8)


def test_a_correct_kernel_passes_and_its_bytes_are_counted():
    x, y = torch.arange(13.0), torch.zeros(13, dtype=torch.float16)
    with guard() as accesses:
        copy(x, y, 13)
        copy(x, y, 5, grid=(1,))
    assert torch.equal(y, x.half())
    assert accesses.launches == 2
    assert accesses.bytes_loaded == {"x_ptr": 18 * 4}
    assert accesses.bytes_stored == {"y_ptr": 18 * 2}


@pytest.mark.parametrize("shared", [False, True], ids=["own storage", "slice of a larger tensor"])
@pytest.mark.parametrize("kind", ["load", "store"])
def test_one_element_past_the_end(kind, shared):
    short = torch.zeros(20)[:13] if shared else torch.zeros(13)
    x, y = (short, torch.zeros(14)) if kind == "load" else (torch.zeros(14), short)
    with guard(), pytest.raises(MemoryAccessError, match=rf"program \(1, 0, 0\): {kind} out of bounds in 1 of 6 ") as e:
        copy(x, y, 14)
    name = "x_ptr" if kind == "load" else "y_ptr"
    assert (e.value.program, e.value.tensor, e.value.shape, e.value.offset) == ((1, 0, 0), name, (13,), 13)


@pytest.mark.parametrize("kind", ["load", "store"])
def test_past_the_end_where_another_argument_lies(kind):
    """A pointer is good for the tensor that it comes from."""
    memory = np.zeros(32, np.float32)
    first, second = torch.frombuffer(memory, dtype=torch.float32, count=13), torch.from_numpy(memory[13:])
    x, y = (first, second) if kind == "load" else (second, first)
    with guard(), pytest.raises(MemoryAccessError, match=f"{kind} out of bounds in 3 of 8 active lanes") as e:
        copy(x, y, 16)
    assert (e.value.tensor, e.value.offset) == (f"{'x' if kind == 'load' else 'y'}_ptr", 13)


def test_before_the_start():
    x = torch.zeros(20)[8:]
    with guard(), pytest.raises(MemoryAccessError, match="load out of bounds in 7 of 8 active lanes") as e:
        copy(x, torch.zeros(8), 8, x_stride=-1, grid=(1,))
    assert e.value.offset == -1


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(8, 4)[:, ::2],
        torch.zeros(8, 4)[:, :2],
        torch.zeros(8, 4)[::2],
        torch.zeros(2, 8, 4).transpose(0, 2)[:, ::2],
        torch.zeros(64).as_strided((3, 4), (5, 3)),  # interleaves: offsets 0 3 5 6 8 9 10 11 ...
        torch.zeros(64).as_strided((3, 2, 4), (2, 0, 1)),  # overlaps and repeats
        torch.zeros(4, 1).expand(4, 5),
        torch.zeros(()),
    ],
    ids=lambda view: f"{tuple(view.shape)} {view.stride()}",
)
def test_a_view_is_its_elements_and_not_the_gaps(view):
    indices = itertools.product(*map(range, view.shape))
    elements = {sum(map(operator.mul, index, view.stride())) for index in indices}
    for offset in range(-2, max(elements) + 3):
        with guard(), contextlib.nullcontext() if offset in elements else pytest.raises(MemoryAccessError) as e:
            _store_one_kernel[(1,)](view, offset)
        assert offset in elements or e.value.offset == offset


@triton.jit
def _store_one_kernel(x_ptr, offset):
    tl.store(x_ptr + offset, 1.0)


def test_an_empty_tensor_has_no_elements():
    with guard(), pytest.raises(MemoryAccessError, match="store out of bounds in 1 of 1 active lanes"):
        _store_one_kernel[(1,)](torch.zeros(0, 4), 0)


def test_gaps_cost_no_memory():
    x = torch.empty(2**30, dtype=torch.uint8).view(torch.float32)[:: 2**26]
    tracemalloc.start()
    with guard():
        _store_one_kernel[(1,)](x, 2**27)
    with guard(), pytest.raises(MemoryAccessError):
        _store_one_kernel[(1,)](x, 2**27 + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@triton.jit
def _store_id_kernel(x_ptr, y_ptr, stride):
    pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(x_ptr + pid * stride, pid)
    tl.store(x_ptr + pid * stride, pid)  # again by the same program: no fault
    tl.atomic_add(y_ptr, pid)


def test_two_programs_that_store_to_one_element():
    x, y = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with guard() as accesses:
        _store_id_kernel[(2, 3)](x, y, 1)
    assert torch.equal(x, torch.arange(6, dtype=torch.int32))
    assert accesses.bytes_stored == {"x_ptr": 2 * 6 * 4, "y_ptr": 6 * 4}
    with (
        guard(),
        pytest.raises(MemoryAccessError, match=r"program \(0, 1, 0\): store to what program \(0, 0, 0\)") as e,
    ):
        _store_id_kernel[(2, 3)](x, y, 0)
    assert (e.value.tensor, e.value.offset) == ("x_ptr", 0)


def test_launches_do_not_race_with_each_other():
    x, y = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with guard():
        _store_id_kernel[(2,)](x, y, 1)
        _store_id_kernel[(1, 2)](x, y, 1)


@triton.jit
def _atomic_kernel(x_ptr, offset, CAS: tl.constexpr):
    if CAS:
        tl.atomic_cas(x_ptr + offset, 0, 1)
    else:
        tl.atomic_add(x_ptr + offset, 1)


@pytest.mark.parametrize("cas", [False, True])
def test_atomics_are_checked(cas):
    x = torch.zeros(4, dtype=torch.int32)
    with guard():
        _atomic_kernel[(3,)](x, 3, cas)
    assert x[3] == (1 if cas else 3)
    with guard(), pytest.raises(MemoryAccessError, match="atomic out of bounds"):
        _atomic_kernel[(3,)](x, 4, cas)


@triton.jit
def _atomic_store_kernel(x_ptr, offset):
    tl.atomic_store(x_ptr + offset, 1)


@pytest.mark.skipif(not hasattr(tl, "atomic_store"), reason="this Triton has no atomic store")
def test_atomic_stores_may_meet_but_not_leave_the_tensor():
    x = torch.zeros(4, dtype=torch.int32)
    with guard() as accesses:
        _atomic_store_kernel[(3,)](x, 3)
    assert x[3] == 1
    assert accesses.bytes_stored == {"x_ptr": 12}
    with guard(), pytest.raises(MemoryAccessError, match="atomic store out of bounds"):
        _atomic_store_kernel[(3,)](x, 4)


def test_reinterpreted_tensors_are_arguments():
    x, y = torch.zeros(8, dtype=torch.uint8), torch.zeros(8)
    with guard() as accesses:
        copy(triton.reinterpret(x, tl.float8e5), y, 8, grid=(1,))
    assert accesses.bytes_loaded == {"x_ptr": 8}


class _Pair(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor


@triton.jit
def _nested_kernel(pairs, desc_and_out, offset, N: tl.constexpr):
    offs = tl.arange(0, N)
    total = tl.load(pairs[0].key + offs) + tl.load(pairs[1].value + offs + offset)
    desc, out = desc_and_out
    tl.store(out + offs, total + tl.sum(desc.load([0, 0]), axis=0))


def test_tensors_inside_tuples_and_descriptors_are_arguments():
    x = [torch.ones(16) for _ in range(4)]
    rows, out = torch.ones(3, 16), torch.zeros(16)
    args = ((_Pair(*x[:2]), _Pair(*x[2:])), (TensorDescriptor.from_tensor(rows, [4, 16]), out))
    with guard() as accesses:
        _nested_kernel[(1,)](*args, 0, N=16)
    assert torch.equal(out, torch.full_like(out, 5.0))
    assert accesses.bytes_loaded == {"pairs[0].key": 64, "pairs[1].value": 64, "desc_and_out[0]": 3 * 64}
    assert accesses.bytes_stored == {"desc_and_out[1]": 64}
    with guard(), pytest.raises(MemoryAccessError) as e:
        _nested_kernel[(1,)](*args, 1, N=16)
    assert (e.value.tensor, e.value.offset) == ("pairs[1].value", 16)


def test_a_descriptor_larger_than_its_tensor():
    rows, out = torch.ones(3, 16), torch.zeros(16)
    desc = TensorDescriptor(rows, shape=[4, 16], strides=[16, 1], block_shape=[4, 16])
    pair = _Pair(out, out)
    with guard(), pytest.raises(MemoryAccessError, match="load out of bounds in 16 of 64 active lanes") as e:
        _nested_kernel[(1,)]((pair, pair), (desc, out), 0, N=16)
    assert (e.value.tensor, e.value.offset) == ("desc_and_out[0]", 48)


@triton.jit
def _through_address_kernel(addresses_ptr, out_ptr):
    x_ptr = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(x_ptr))


def test_tensors_reached_through_addresses_have_to_be_named():
    x, out = torch.full((1,), 3.0), torch.zeros(1)
    addresses = torch.tensor([x.data_ptr()])
    with guard(), pytest.raises(MemoryAccessError):
        _through_address_kernel[(1,)](addresses, out)
    with guard(reachable=[x]) as accesses:
        _through_address_kernel[(1,)](addresses, out)
    assert out.item() == 3.0
    assert accesses.bytes_loaded == {"addresses_ptr": 8, "reachable[0]": 4}


@triton.jit
def _wide_kernel(x_ptr, out_ptr, offset):
    tl.store(out_ptr, tl.load((x_ptr + offset).to(tl.pointer_type(tl.int32))))


def test_accesses_wider_than_an_element():
    x, out = torch.zeros(8, dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
    with guard():
        _wide_kernel[(1,)](x[::2].as_strided((2, 2), (4, 1)), out, 4)
        _wide_kernel[(1,)](x, out, 6)
    for view, offset in ((x[::2], 0), (x, 1), (x[:7], 6)):  # a gap, misaligned, half outside
        with guard(), pytest.raises(MemoryAccessError) as e:
            _wide_kernel[(1,)](view, out, offset)
        assert e.value.offset == offset


@triton.jit
def _failing_kernel(x_ptr):
    tl.static_assert(False, "not this way")


def test_nothing_is_left_patched_and_other_errors_pass():
    before = dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))
    with pytest.raises(InterpreterError, match="not this way") as e, guard():
        _failing_kernel[(1,)](torch.zeros(1))
    assert isinstance(e.value.__cause__, AssertionError)
    with pytest.raises(MemoryAccessError), guard():
        _store_one_kernel[(1,)](torch.zeros(1), 1)
    assert (dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))) == before


def test_no_python_object_per_element():
    x, y = torch.zeros(2, 2**20)
    tracemalloc.start()
    with guard() as accesses:
        _copy_kernel[(16,)](x, y, x.numel(), 1, 1, BLOCK=2**16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert accesses.bytes_stored == {"y_ptr": 2**22}
    assert peak < 100 * 2**16 + 8 * 2**20


def test_a_compiling_process_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        guard().__enter__()
