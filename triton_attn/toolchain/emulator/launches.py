"""Runs ordinary launches on CPU tensors: Triton's own launcher calls a stub driver, which calls the core."""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import mmap
import os

import numpy as np
import torch
import triton
from triton.runtime.autotuner import Autotuner

from .. import compilation
from ..arguments import tensors_in
from . import core, stub
from . import counts as counting
from .decode import Program, mapped_constants

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")

# (when asynchronous work happens, order of the warps), numbered as in the core: Completion and Order.
SCHEDULES = {
    "random": (2, 1),  # warps and asynchronous work by the seed
    "late": (1, 0),  # in turns; asynchronous work when it is waited for
    "early": (0, 0),  # in turns; asynchronous work at once
    "shuffled": (1, 1),  # warps by the seed; asynchronous work when it is waited for
    "first": (1, 2),  # the first warp that can go on goes as far as it can
    "last": (1, 3),  # the last one
}


def first_schedules(n):
    """n pairs (schedule, seed): each schedule, then the random ones with other seeds."""
    others = ((schedule, seed) for seed in itertools.count(1) for schedule in ("random", "shuffled"))
    return list(itertools.islice(itertools.chain(((schedule, 0) for schedule in SCHEDULES), others), n))


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of an instruction of a launch, where it first occurred.

    Attributes:
        kind: one of `core.FAULTS`.
        where: source line, `file.py:12`.
        other: source line of the other access that it conflicts with, or None.
        instruction: its PTX.
        kernel: name of the function.
        program: (x, y, z).
        warp, lane: of the program, of the warp.
        tensor, index: for global memory, the name of the argument and the index of its element, or None if the address
            is in no element.
        detail: the rest of the report.
    """

    kind: str
    where: str
    other: str | None
    instruction: str
    kernel: str
    program: tuple[int, int, int]
    warp: int
    lane: int
    tensor: str | None
    index: tuple[int, ...] | None
    detail: str

    def __str__(self):
        place = f" of {self.tensor}" if self.tensor else ""
        place = f" at {self.tensor}{list(self.index)}" if self.index is not None else place
        other = f", against {self.other}" if self.other else ""
        return (
            f"{self.where}: {self.kind}{place} ({self.detail}{other})\n"
            f"    in {self.kernel}, program {self.program}, warp {self.warp}, lane {self.lane}: {self.instruction}"
        )


class EmulationError(AssertionError):
    """A launch has faults.

    The message has the first fault of each kind and source line. `faults` has all of them, in the order in which they
    were found.
    """

    def __init__(self, faults):
        groups = {}
        for fault in faults:
            groups.setdefault((fault.kind, fault.where, fault.other), []).append(fault)
        super().__init__("\n".join(map(_described, groups.values())))
        self.faults = faults


def _described(faults):
    """The first of faults of one kind at one source line."""
    more = f"\n    and at {len(faults) - 1} more of this line's instructions" if len(faults) > 1 else ""
    return f"{faults[0]}{more}"


@dataclasses.dataclass(frozen=True, eq=False)
class EmulatedLaunch(compilation.Launch):
    """One launch inside `emulate`.

    Attributes:
        program: the decoded kernel.
        executed: how many warps executed each of its instructions, int64.
        instructions: their sum, of what was executed or skipped by a predicate.
        faults: its faults.
        counts: its counts, or None without `emulate(counts=True)`.
    """

    program: Program
    executed: np.ndarray
    instructions: int
    faults: tuple[Fault, ...]
    counts: counting.Counts | None = None


@contextlib.contextmanager
def emulate(arch, *, schedule="random", seed=0, strict=True, limit=100_000_000, read_only=(), edit=None, counts=False):
    """Inside it, `kernel[grid](...)` on CPU tensors compiles for `arch` and runs; needs no GPU and no driver.

    Launches take the ordinary path through Triton's own launcher: a stub of libcuda receives the parameters and tensor
    maps that a GPU's driver would get. The driver of a GPU that is there is not called, and works as before afterwards.
    This package's public functions run their kernels inside it. A program's shared memory is NaN until it is written.
    In global memory kernels may touch only the elements of their tensor arguments, including those in tuples and tensor
    descriptors. The first use needs a C++ compiler.

    Checked:

    - bounds and alignment; use of shared memory that nobody has written
    - the order of accesses to shared memory between warps, by happens-before, and between the lanes of a warp, by
      barriers, mbarriers and bar.warp.sync
    - the order of accesses to global memory between the programs of a launch, by release and acquire, and between the
      warps of a program and the lanes of a warp, each access against the last one before it
    - asynchronous copies and matmuls against their waits; proxy and wgmma fences
    - barriers, mbarriers and transaction bytes; deadlock; divergence

    Not checked: whether the other warps of a program, and the other lanes of a warp, have finished their accesses to
    global memory when one of them releases; everything below PTX.

    Nothing can be timed, so a kernel under `triton.autotune` runs with the first config that fits, after pruning.
    Launch `kernel.fn` with each of `kernel.configs` to have all of them checked.

    Args:
        arch: "sm_80", "sm_86", "sm_89", "sm_90" or "sm_120".
        schedule: a key of SCHEDULES.
        seed: of the random schedules; the same seed gives the same run.
        strict: raise EmulationError at a launch with a fault. Otherwise the fault is only in the log.
        limit: warp instructions after which a launch is stopped, with a fault.
        read_only: tensors that no launch may write.
        edit: a function of the decoded `Program` that is called before each launch and may change its instructions,
            of this launch alone; `Program.remove` takes one out.
        counts: also count sectors, wavefronts and FLOP: `EmulatedLaunch.counts`.

    Yields:
        A list of `EmulatedLaunch`, in the order of the launches; it grows while the context is open.

    Raises:
        NotImplementedError: `arch` is a target of compile_only that is not emulated; at a launch, an instruction is
            not, with its source line.
        ValueError: `schedule` or `arch` is in no list; at a launch, a tensor is not on the CPU.
        RuntimeError: TRITON_INTERPRET is set, there is no C++ compiler, or `emulate` or `compile_only` is open; at a
            launch, a driver would refuse it.

    Example:
        >>> from triton_attn.toolchain import emulate
        >>> q = torch.randn(1, 16, 1, 16)
        >>> with emulate("sm_80") as launches:
        ...     out = triton_attn.flash_attention(q, q, q)
        >>> torch.testing.assert_close(out, triton_attn.reference.flash_attention(q, q, q), atol=1e-5, rtol=1e-5)
    """
    if arch not in TARGETS:
        message = f"arch: expected {', '.join(TARGETS)}, got {arch!r}"
        if arch in compilation._TARGETS:
            raise NotImplementedError(f"{message}: tcgen05 of sm_100 and sm_103, sm_121 and AMD GPUs are not emulated")
        raise ValueError(message)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected {', '.join(SCHEDULES)}, got {schedule!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("emulate needs a process without TRITON_INTERPRET, where kernels are compiled")
    if isinstance(triton.runtime.driver._active, compilation._Driver):
        raise RuntimeError(f"emulate({arch!r}) inside another emulate or compile_only")
    emulator = _Emulator(schedule, seed, strict, limit, list(read_only), edit, counts)
    driver = functools.partial(_Driver, emulator)
    with emulator.stub(arch), _first_configs(), compilation.compile_only(arch, driver=driver) as launches:
        yield launches


@contextlib.contextmanager
def _first_configs():
    """Inside it, the autotuner takes the first config that fits. It times nothing and caches nothing."""
    run = Autotuner.run

    def run_first(tuner, *args, **kwargs):
        configs = tuner.configs
        tuner.nargs = dict(zip(tuner.arg_names, args))
        left = tuner.prune_configs(kwargs) if len(configs) > 1 else configs
        try:
            for config in left:
                tuner.configs = [config]  # of one the autotuner has nothing to choose
                try:
                    return run(tuner, *args, **kwargs)
                except triton.runtime.errors.OutOfResources:
                    if config is left[-1]:
                        raise
        finally:
            tuner.configs = configs

    Autotuner.run = run_first
    try:
        yield
    finally:
        Autotuner.run = run


class _Driver(compilation._Driver):
    """compile_only's driver, with the launcher of a real one."""

    def __init__(self, emulator, arch, every_launch):
        super().__init__(arch, every_launch)
        nvidia = stub.nvidia_driver()
        self.emulator, self.nvidia, self.cuda = emulator, nvidia, nvidia.CudaUtils()
        self.names = []

    def __getattr__(self, name):
        if name == "cuda":  # not there yet
            raise AttributeError(name)
        return getattr(self.cuda, name)

    def load_binary(self, name, binary, shared, device):
        self.names.append(ctypes.create_string_buffer(name.encode()))  # the stub's functions are their names
        module, registers, spills, max_threads = 1, 0, 0, 1024
        return module, ctypes.addressof(self.names[-1]), registers, spills, max_threads

    def launcher_cls(self, src, metadata):
        kernel = self.compiled(src)
        launcher = self.nvidia.CudaLauncher(src, metadata)

        def launch(grid_0, grid_1, grid_2, stream, function, *args):
            __tracebackhide__ = True  # pytest shows the launch
            # The four in between are Triton's own: metadata and hooks.
            values = args[4:]
            if len(values) == 1 and isinstance(values[0], tuple) and len(src.signature) != 1:
                values = values[0]
            self.emulator.expect(kernel, dict(zip(src.fn.arg_names, values)))
            try:
                launcher(grid_0, grid_1, grid_2, stream, function, *args)
            except Exception:
                self.emulator.raise_error()
                raise
            self.launches.append(self.emulator.done)
            if self.emulator.strict and self.emulator.done.faults:
                raise EmulationError(self.emulator.done.faults)

        return launch


class _Emulator:
    """Takes launches from the stub and runs them."""

    def __init__(self, schedule, seed, strict, limit, read_only, edit, counts):
        self.completion, self.order = SCHEDULES[schedule]
        self.seed, self.strict, self.limit, self.read_only, self.edit = seed, strict, limit, read_only, edit
        self.counts = counts
        self.error = self.done = None
        self.scratch = []

    @contextlib.contextmanager
    def stub(self, arch):
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p))
        callback = callback_type(self.launched)
        slot = ctypes.c_void_p.in_dll(stub.library(), "stub_launch")
        allocator = triton.runtime._allocation._allocator
        previous = allocator.get()
        with core.environment({"STUB_ARCH": arch.removeprefix("sm_")}, os.environ):
            slot.value = ctypes.cast(callback, ctypes.c_void_p).value
            allocator.set(self.allocate)
            try:
                yield
            finally:
                slot.value = None
                allocator.set(previous)

    def allocate(self, size, alignment, stream):
        self.scratch.append(torch.empty(size + alignment, dtype=torch.uint8))
        start = -self.scratch[-1].data_ptr() % alignment
        return self.scratch[-1][start : start + size]

    def expect(self, kernel, arguments):
        """The launcher is about to launch this kernel."""
        self.kernel, self.arguments, self.error, self.done = kernel, arguments, None, None
        self.scratch.clear()

    def raise_error(self):
        if self.error:
            raise self.error

    def launched(self, x, y, z, parameters):
        try:
            self.done = self.run((x, y, z), parameters)
            return 0
        except Exception as error:  # goes through the launcher as a number
            self.error = error
            return 1

    def run(self, grid, parameters):
        metadata = self.kernel.metadata
        if metadata.num_ctas != 1:
            raise NotImplementedError(f"{metadata.name}: num_ctas: expected 1, got {metadata.num_ctas}")
        program = _decoded(self.kernel.asm["ptx"])
        program.executed[:] = 0
        if self.edit:
            program = program.copy()
            self.edit(program)
        block = _copy_parameters(program, parameters)
        memory = Memory(self.arguments, self.scratch, self.read_only)
        total, faults, counts = self.run_program(program, block, grid, metadata.shared, memory)
        return EmulatedLaunch(self.kernel, grid, program, program.executed.copy(), total, faults, counts)

    def run_program(self, program, block, grid, shared_bytes, memory):
        """(warp instructions, faults, counts)"""
        memory.add_constant(ctypes.addressof(block), program.parameter_bytes)
        for table in program.tables.values():
            memory.add_constant(core.address_of(table), table.nbytes)
        settings = self.completion, self.order, self.seed, self.limit
        reports, total, counts = execute(program, block, grid, shared_bytes, memory, *settings, self.counts)
        return total, tuple(_fault(program, memory, grid, report) for report in reports), counts


def run_ptx(ptx, arguments, *, grid=(1, 1, 1), shared_bytes=0, schedule="late", seed=0, limit=1_000_000, read_only=()):
    """Run PTX written by hand; the result is a tuple of its faults.

    Args:
        ptx: one entry point with .reqntid, and with as many parameters as there are arguments.
        arguments: {name: CPU tensor or integer}, in the order of the parameters.
        grid, shared_bytes: of the launch; the address of shared memory is `global_smem`.
        schedule, seed, limit, read_only: as in `emulate`.

    Raises:
        NotImplementedError: an instruction is not emulated.
    """
    options = {"schedule": schedule, "seed": seed, "limit": limit, "read_only": read_only}
    return _run_ptx(ptx, arguments, grid, shared_bytes, counts=False, **options)[1]


def count_ptx(ptx, arguments, *, grid=(1, 1, 1), shared_bytes=0):
    """Run PTX written by hand; the result is its `Counts`. The arguments are those of `run_ptx`.

    Raises:
        EmulationError: it has a fault.
        NotImplementedError: an instruction is not emulated.
    """
    options = {"schedule": "late", "seed": 0, "limit": 1_000_000, "read_only": ()}
    _, faults, counts = _run_ptx(ptx, arguments, grid, shared_bytes, counts=True, **options)
    if faults:
        raise EmulationError(faults)
    return counts


def _run_ptx(ptx, arguments, grid, shared_bytes, schedule, seed, limit, read_only, counts):
    program = _decoded(ptx)
    program.executed[:] = 0
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments.values()]
    numbers = (ctypes.c_uint64 * len(values))(*(value % (1 << 64) for value in values))
    parameters = [ctypes.addressof(numbers) + 8 * i for i in range(len(values))]
    emulator = _Emulator(schedule, seed, False, limit, list(read_only), None, counts)
    memory = Memory(arguments, (), read_only)
    return emulator.run_program(program, _copy_parameters(program, parameters), grid, shared_bytes, memory)


def _fault(program, memory, grid, report):
    kind = core.FAULTS[report.kind]
    is_global = "global" in kind or report.address > 1 << 32
    tensor, index, beside = memory.locate(report.address) if is_global else (None, None, "")
    return Fault(
        kind=kind,
        where=program.where(report.pc),
        other=program.where(report.other_pc) if report.other_pc >= 0 else None,
        instruction=program.text[report.pc],
        kernel=program.name,
        program=(report.cta % grid[0], report.cta // grid[0] % grid[1], report.cta // grid[0] // grid[1]),
        warp=report.warp,
        lane=report.lane,
        tensor=tensor,
        index=index,
        detail=report.detail.decode() + beside,
    )


@functools.lru_cache(maxsize=256)
def _decoded(ptx):
    return Program(ptx)


def _copy_parameters(program, parameters):
    """The launch's parameters, aligned to 64 bytes as tensor maps must be."""
    backing = ctypes.create_string_buffer(program.parameter_bytes + 128)
    block = (ctypes.c_char * (program.parameter_bytes + 1)).from_buffer(backing, -ctypes.addressof(backing) % 64)
    for i, (offset, size) in enumerate(program.parameters):
        ctypes.memmove(ctypes.addressof(block) + offset, parameters[i], size)
    return block


def execute(program, block, grid, shared_bytes, memory, completion, order, seed, limit, counts=False, ctas=None):
    """Run a program on the core; (reports, warp instructions, counts or None)."""
    regions = memory.regions()
    reports = (core.Report * 64)()
    constants = np.ascontiguousarray(mapped_constants(program, block))
    special, instructions = np.ascontiguousarray(program.special), np.ascontiguousarray(program.instructions)
    by_instruction, traffic = counting.buffers(program, len(regions))
    first, last = ctas or (0, grid[0] * grid[1] * grid[2])
    launch = core.Launch(
        program=core.address_of(instructions),
        length=len(instructions),
        rows=program.num_rows,
        predicates=program.num_predicates,
        pool=core.address_of(program.pool),
        constants=core.address_of(constants),
        num_constants=len(constants),
        num_special=len(special),
        special=core.address_of(special),
        params=ctypes.addressof(block),
        param_bytes=program.parameter_bytes,
        shared_bytes=shared_bytes,
        threads=program.threads,
        local_bytes=program.local_bytes,
        grid=tuple(grid),
        num_regions=len(regions),
        regions=ctypes.addressof(regions),
        completion=completion,
        order=order,
        seed=seed,
        limit=limit,
        reports=ctypes.addressof(reports),
        max_reports=len(reports),
        first_cta=first,
        last_cta=last,
        executed=core.address_of(program.executed),
        counts=core.address_of(by_instruction) if counts else None,
        traffic=core.address_of(traffic) if counts else None,
    )
    total = ctypes.c_int64()
    count = core.library().emulator_run(ctypes.byref(launch), ctypes.byref(total))
    if not counts:
        return reports[:count], total.value, None
    of_launch = counting.counted(program, program.executed, by_instruction, traffic, memory.names(regions))
    return reports[:count], total.value, of_launch


class Memory:
    """The global memory of a launch: the elements of its tensors, by address."""

    def __init__(self, arguments, scratch=(), read_only=()):
        self.tensors = [item for name, value in arguments.items() for item in tensors_in(name, value)]
        for name, tensor in self.tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{name}: expected a CPU tensor, which the emulator can read, got {tensor.device}")
        self.tensors += [("scratch memory", tensor) for tensor in scratch]
        self.fixed = {tensor.untyped_storage().data_ptr() for tensor in read_only}
        self.constants = []

    def add_constant(self, address, size):
        if size:
            self.constants.append((address, size))

    def regions(self):
        """One region for each storage, with a map of the bytes that its tensors have."""
        by_storage = {}
        for _, tensor in self.tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        regions = [core.Region(address, size, 0) for address, size in self.constants]
        self.maps = []
        for base, tensors in by_storage.items():
            size = tensors[0].untyped_storage().nbytes()
            reachable = None
            if not any(map(_fills_its_storage, tensors)):
                self.maps.append(torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8))  # zeros, none touched
                for tensor in tensors:
                    _bytes_of(self.maps[-1], tensor, tensor.data_ptr() - base).fill_(1)
                reachable = self.maps[-1].data_ptr()
            regions.append(core.Region(base, size, base not in self.fixed, 0, reachable))
        return (core.Region * len(regions))(*sorted(regions, key=lambda region: region.base))

    def names(self, regions):
        """Of each region the tensors in it, None of a constant."""
        of_storage = {}
        for name, tensor in self.tensors:
            of_storage.setdefault(tensor.untyped_storage().data_ptr(), dict())[name] = None
        return [", ".join(of_storage[region.base]) if region.base in of_storage else None for region in regions]

    def locate(self, address):
        """(name of the tensor at an address or nearest to it, index of the element or None, then where in words)."""
        best = None
        for name, tensor in self.tensors:
            if not tensor.numel():
                continue
            distance = max(tensor.data_ptr() - address, address - _end(tensor) + 1, 0)
            if best is None or distance < best[0]:
                best = distance, name, tensor
        if best is None:
            return None, None, ""
        _, name, tensor = best
        index, offset = _index(tensor, address), (address - tensor.data_ptr()) // tensor.element_size()
        shape, stride = tuple(tensor.shape), tensor.stride()
        return name, index, "" if index is not None else f" at element offset {offset}, {shape=}, {stride=}"


def _fills_its_storage(tensor):
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.nbytes == tensor.untyped_storage().nbytes() and tensor.permute(order).is_contiguous()


def _bytes_of(storage, tensor, offset):
    """The bytes of a tensor's elements, as a view of its storage's bytes."""
    size = tensor.element_size()
    return storage.as_strided((*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1), offset)


def _end(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _index(tensor, address):
    """The index of the element at an address, None if there is none."""
    offset = (address - tensor.data_ptr()) // tensor.element_size()
    index = {}
    for dim in sorted(range(tensor.dim()), key=tensor.stride, reverse=True):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        index[dim] = min(offset // stride, size - 1) if stride and size > 1 else 0
        offset -= index[dim] * stride
    return tuple(index[dim] for dim in range(tensor.dim())) if offset == 0 else None
