"""Every memory access of an interpreted kernel, checked against the tensors that the kernel was given."""

import contextlib
import math
from collections import Counter
from unittest import mock

import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .arguments import tensors_in, unwrapped
from .arithmetic import CHECKS, DeviceArithmeticError


class MemoryAccessError(AssertionError):
    """A kernel accessed memory that it must not access.

    Attributes:
        program: (x, y, z) of the program that made the access.
        tensor: name of the kernel argument; of an address that was loaded from memory, the nearest one.
        shape: shape of that tensor.
        offset: distance of the first bad address from that tensor's first element, in elements.
    """

    def __init__(self, program: tuple, what: str, tensor: str, shape: tuple, stride: tuple, offset: int):
        super().__init__(f"program {program}: {what} at element offset {offset} of {tensor}, {shape=}, {stride=}")
        self.program = program
        self.tensor = tensor
        self.shape = shape
        self.offset = offset


class Accesses:
    """What the launches inside `guard` did.

    Attributes:
        launches: how many kernels were launched.
        bytes_loaded, bytes_stored: bytes by the name of the kernel argument (`descs[0]` and `pair.key` inside tuples),
            summed over active lanes, programs and launches: an element that is loaded twice counts twice. Atomics count
            as stores. If arguments share memory, the bytes go to the one that the pointer comes from.
    """

    def __init__(self):
        self.launches = 0
        self.bytes_loaded = Counter()
        self.bytes_stored = Counter()


@contextlib.contextmanager
def guard(reachable=()):
    """Check each load, store and atomic, and integers, of the kernels launched inside; for TRITON_INTERPRET=1.

    Every active lane must be aligned and inside an element of the tensor argument that its pointer comes from, those
    inside tuples and tensor descriptors included, or of another argument in the same storage. A view is its elements
    alone: what lies between them, or before and after in the same storage, is out of bounds. No element may be stored
    to by two programs of a launch, except atomically. It cannot see an access to the wrong element of the right tensor:
    put NaN where nothing may be read.

    A sum, difference, product or left shift of int32 must fit in 32 bits, and no integer is divided by zero, in any
    lane: masked lanes are computed too. Unsigned numbers, which may wrap on purpose, as in Philox, and numbers of 8 and
    16 bits, which are bit patterns, are not checked.

    Args:
        reachable: further tensors that kernels may access, because their addresses are stored in an argument.

    Yields:
        `Accesses`: the bytes that went to and from each argument.

    Raises:
        MemoryAccessError: a launch made such an access.
        DeviceArithmeticError: an integer overflowed or was divided by zero; the message has the line of the kernel.
        RuntimeError: the process does not interpret kernels, so nothing would be checked.

    Example:
        >>> from triton_attn.toolchain import guard  # in a process with TRITON_INTERPRET=1
        >>> q = torch.randn(1, 64, 2, 64)
        >>> with guard() as accesses:
        ...     out = triton_attn.flash_attention(q, q, q)
        >>> accesses.launches
        1
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("guard checks interpreted kernels: start the process with TRITON_INTERPRET=1")
    checker = _Checker(list(reachable))
    wraps = {
        (interpreter, "_implicit_cvt"): checker.wrap_implicit_cvt,
        (GridExecutor, "__call__"): _unwrap_error,
        (GridExecutor, "_init_args_hst"): checker.wrap_init_args,
        (InterpreterBuilder, "create_masked_load"): checker.wrap_load,
        (InterpreterBuilder, "create_masked_store"): checker.wrap_store,
        (InterpreterBuilder, "create_atomic_store"): checker.wrap_atomic_store,
        (InterpreterBuilder, "create_atomic_rmw"): checker.wrap_atomic_rmw,
        (InterpreterBuilder, "create_atomic_cas"): checker.wrap_atomic_cas,
        **{(InterpreterBuilder, name): check for name, check in CHECKS.items()},
    }
    with contextlib.ExitStack() as patches:
        for (owner, name), wrap in wraps.items():
            if method := getattr(owner, name, None):  # Triton 3.6 has no atomic store
                patches.enter_context(mock.patch.object(owner, name, wrap(method)))
        yield checker.accesses


def _unwrap_error(call):
    def wrapper(self, *args, **kwargs):
        try:
            return call(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while cause := cause.__cause__:
                if isinstance(cause, (MemoryAccessError, DeviceArithmeticError)):
                    raise cause from None
            raise

    return wrapper


# Addresses have 47 bits on the hosts that Triton supports. While a kernel computes with a pointer, the bits above hold
# the number of the tensor argument that it comes from, from 1 on. Addresses that were loaded from memory have 0 there.
_ADDRESS_BITS = 48
_ADDRESS = np.uint64(2**_ADDRESS_BITS - 1)


class _Checker:
    def __init__(self, reachable):
        self.reachable = reachable
        self.accesses = Accesses()
        self.tensors = []
        self.number_of = {}  # by the identity of an argument

    def wrap_init_args(self, init_args):
        def wrapper(executor, args, kwargs):
            # The interpreter works on copies in host memory if the arguments are elsewhere.
            args, kwargs = init_args(executor, args, kwargs)
            named = [*zip(executor.arg_names, args), *kwargs.items(), ("reachable", self.reachable)]
            tensors = [item for name, value in named for item in tensors_in(name, value)]
            self.tensors = [_Elements(*item) for item in tensors]
            self.number_of = {id(tensor): number for number, (_, tensor) in enumerate(tensors, start=1)}
            self.accesses.launches += 1
            return args, kwargs

        return wrapper

    def wrap_implicit_cvt(self, implicit_cvt):
        def wrapper(arg):
            value = implicit_cvt(arg)
            if hasattr(arg, "data_ptr"):
                number = self.number_of[id(unwrapped(arg))]
                value.handle.data = value.handle.data | np.uint64(number << _ADDRESS_BITS)
            return value

        return wrapper

    def wrap_load(self, load):
        def wrapper(builder, pointers, mask, *args, **kwargs):
            pointers, _ = self.check("load", pointers, mask, self.accesses.bytes_loaded)
            return load(builder, pointers, mask, *args, **kwargs)

        return wrapper

    def wrap_store(self, store):
        def wrapper(builder, pointers, value, mask, *args, **kwargs):
            pointers, addresses = self.check("store", pointers, mask, self.accesses.bytes_stored)
            found, _ = self.find(addresses, _width(pointers), self.tensors)
            for tensor, elements, covered in found:
                tensor.claim(elements, covered)
            return store(builder, pointers, value, mask, *args, **kwargs)

        return wrapper

    def wrap_atomic_store(self, _):
        def wrapper(builder, pointers, value, mask, *args):
            pointers, _ = self.check("atomic store", pointers, mask, self.accesses.bytes_stored)
            return interpreter._interpreter.store(pointers.data, value.data, mask.data)

        return wrapper

    def wrap_atomic_rmw(self, atomic_rmw):
        def wrapper(builder, op, pointers, value, mask, *args):
            pointers, _ = self.check("atomic", pointers, mask, self.accesses.bytes_stored)
            return atomic_rmw(builder, op, pointers, value, mask, *args)

        return wrapper

    def wrap_atomic_cas(self, atomic_cas):
        def wrapper(builder, pointers, *args):
            pointers, _ = self.check("atomic", pointers, True, self.accesses.bytes_stored)
            return atomic_cas(builder, pointers, *args)

        return wrapper

    def check(self, kind, pointers, mask, bytes_by_name):
        """Count the bytes. Return the pointers without numbers of arguments, and the addresses of active lanes."""
        # Triton 3.6 passes the mask of a tensor descriptor as a bare array.
        active = mask.data if isinstance(mask, TensorHandle) else mask
        pointers = TensorHandle(pointers.data.astype(np.uint64, copy=False), pointers.dtype)
        lanes, active = np.broadcast_arrays(pointers.data, np.asarray(active, dtype=bool))
        lanes = lanes[active]
        numbers, addresses = lanes >> _ADDRESS_BITS, (lanes & _ADDRESS).view(np.int64)
        for number in np.unique(numbers).tolist():
            own = self.tensors[number - 1 : number]
            tensors = own + [x for x in self.tensors if not own or x.storage == own[0].storage]
            self.check_argument(kind, tensors, addresses[numbers == number], _width(pointers), bytes_by_name)
        return TensorHandle(pointers.data & _ADDRESS, pointers.dtype), addresses

    def check_argument(self, kind, tensors, addresses, width, bytes_by_name):
        found, outside = self.find(addresses, width, tensors)
        for tensor, _, covered in found:
            bytes_by_name[tensor.name] += width * covered.size
        if outside.size:
            what = f"{kind} out of bounds in {outside.size} of {addresses.size} active lanes, the first"
            nearest = min(tensors, key=lambda tensor: tensor.distance(outside[0]))
            raise nearest.error(what, outside[0])

    @staticmethod
    def find(addresses, width, tensors):
        """(tensor, elements, addresses) for each tensor that some addresses point into, and the other addresses."""
        found = []
        for tensor in tensors:
            if not addresses.size:
                break
            elements, inside = tensor.locate(addresses, width)
            if inside.any():
                found.append((tensor, elements[:, inside], addresses[inside]))
                addresses = addresses[~inside]
        return found, addresses


def _width(pointers):
    return interpreter._get_np_dtype(pointers.get_element_ty()).itemsize


class _Elements:
    """The elements of one tensor by address, and which program stored to each.

    An element's number is its rank in the order of addresses, so that a view with large gaps costs what its elements
    cost. Most views nest: each stride exceeds the extent of all smaller ones, and the offset of an element is a number
    in mixed radix. Views that overlap or interleave keep a table of their offsets.
    """

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name = name
        self.shape = tuple(tensor.shape)
        self.stride = tensor.stride()
        self.start = tensor.data_ptr()
        self.storage = tensor.untyped_storage().data_ptr()
        self.itemsize = tensor.element_size()
        self.dims = _nested_dims(self.shape, self.stride)
        self.table = None if self.dims is not None else _element_offsets(self.shape, self.stride)
        self.numel = math.prod(size for _, size in self.dims) if self.table is None else self.table.size
        self.writer = None

    def locate(self, addresses, width):
        """Numbers of the elements that `width` bytes at each address cover, and whether all of them are elements."""
        offsets = (addresses - self.start) // self.itemsize
        elements = np.stack([self.number(offsets + i) for i in range(max(1, width // self.itemsize))])
        return elements, (elements >= 0).all(0) & (addresses % width == 0)

    def number(self, offsets):
        """The number of the element at each offset, negative where there is none."""
        if self.table is not None:
            numbers = np.searchsorted(self.table, offsets).clip(max=self.numel - 1)
            return np.where(self.table[numbers] == offsets, numbers, -1)
        numbers, inside = 0, True
        for stride, size in self.dims:
            index, offsets = (offsets, 0) if stride == 1 else np.divmod(offsets, stride)
            inside = inside & (index < size)
            numbers = numbers * size + index
        return np.where(inside & (offsets == 0), numbers, -1)

    def claim(self, elements, addresses):
        """Record that this program stored to `elements`; raise if another program did."""
        grid_x, grid_y, grid_z = interpreter.interpreter_builder.grid_dim
        x, y, z = interpreter.interpreter_builder.grid_idx
        program = 1 + (x * grid_y + y) * grid_z + z
        if self.writer is None:
            self.writer = np.zeros(self.numel, np.int32)  # 0: nobody
        writers = self.writer[elements]
        others = ((writers != 0) & (writers != program)).any(0)
        if others.any():
            lane = np.argmax(others)
            other = np.unravel_index(writers[:, lane].max() - 1, (grid_x, grid_y, grid_z))
            what = f"store to what program {tuple(map(int, other))} has stored"
            raise self.error(what, addresses[lane])
        self.writer[elements] = program

    def distance(self, address):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        return max(self.start - address, address - (self.start + extent * self.itemsize), 0)

    def error(self, what, address):
        offset = int(address - self.start) // self.itemsize
        return MemoryAccessError(
            interpreter.interpreter_builder.grid_idx, what, self.name, self.shape, self.stride, offset
        )


def _nested_dims(shape, stride):
    """(stride, size) from the outermost dimension in, contiguous neighbours merged; None if they do not nest."""
    if 0 in shape:
        return [(1, 0)]
    dims = []
    extent = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride) if size > 1 and step > 0):
        if step < extent:
            return None
        if dims and step == dims[0][0] * dims[0][1]:
            dims[0] = (dims[0][0], dims[0][1] * size)
        else:
            dims.insert(0, (step, size))
        extent += (size - 1) * step
    return dims


def _element_offsets(shape, stride):
    offsets = np.zeros(1, np.int64)
    for size, step in zip(shape, stride):
        offsets = np.unique(offsets[:, None] + step * np.arange(size))
    return offsets
