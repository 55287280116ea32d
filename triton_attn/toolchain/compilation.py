"""Compile kernels for a GPU that is not there, and read what the compiler made of them."""

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from .._host.gpu import GPUS

_numbers = itertools.count()  # of drivers: an id() would come again
_TARGETS = {
    arch: GPUTarget("hip", arch, gpu.warp_size) if gpu.is_amd else GPUTarget("cuda", int(arch[3:]), gpu.warp_size)
    for arch, gpu in GPUS.items()
}


def shared_memory_limit(arch: str) -> int:
    """Bytes of shared memory (AMD: LDS) that one program may use on `arch`, a name that `compile_only` takes."""
    _check_arch(arch)
    return GPUS[arch].shared_bytes


def _check_arch(arch):
    if arch not in _TARGETS:
        raise ValueError(f"arch: expected {', '.join(_TARGETS)}, got {arch!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One launch inside `compile_only`: what was launched, and what its compiled code uses.

    Resources are per thread unless stated otherwise. They are read from the compiled code at first use.
    """

    kernel: "triton.compiler.CompiledKernel"
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return self.kernel.metadata.name

    @property
    def arch(self) -> str:
        """The target, as `compile_only` names it."""
        return next(arch for arch, target in _TARGETS.items() if target == self.kernel.metadata.target)

    @property
    def constexprs(self) -> dict:
        """Values of the kernel's `tl.constexpr` arguments, by name; of a NamedTuple also those of its fields."""
        src = self.kernel.src
        values = {
            src.fn.params[i].name: value for (i, *_), value in src.constants.items() if src.fn.params[i].is_constexpr
        }
        for value in [*values.values()]:
            values |= value._asdict() if hasattr(value, "_asdict") else {}
        return values

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @property
    def num_stages(self) -> int:
        return self.kernel.metadata.num_stages

    @property
    def shared_bytes(self) -> int:
        """Shared memory (AMD: LDS) of one program, in bytes."""
        return self.kernel.metadata.shared

    @property
    def registers(self) -> int:
        """Registers (AMD: VGPRs, accumulation registers included)."""
        return self._usage["registers"]

    @property
    def spill_bytes(self) -> int:
        """Bytes of register spill stores: on NVIDIA what `ptxas -v` reports, on AMD 4 bytes per spilled VGPR."""
        return self._usage["spill_bytes"]

    @property
    def stack_bytes(self) -> int:
        """Bytes of stack frame (AMD: private segment)."""
        return self._usage["stack_bytes"]

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's warp-group matrix instructions are in the code."""
        return "wgmma.mma_async" in self._assembly

    @property
    def uses_tcgen05(self) -> bool:
        """Whether data-centre Blackwell's matrix instructions are in the code."""
        return "tcgen05.mma" in self._assembly

    @property
    def uses_mfma(self) -> bool:
        """Whether AMD's matrix instructions are in the code."""
        return "v_mfma_" in self._assembly

    @property
    def uses_tma(self) -> bool:
        """Whether tensor memory accelerator copies (`cp.async.bulk.tensor`) are in the code."""
        return "cp.async.bulk.tensor" in self._assembly

    @property
    def uses_cp_async(self) -> bool:
        """Whether Ampere's asynchronous copies from global to shared memory are in the code."""
        return re.search(r"cp\.async\.c[ag]\.shared", self._assembly) is not None

    @property
    def _is_amd(self):
        return self.kernel.metadata.target.backend == "hip"

    @property
    def _assembly(self):
        return self.kernel.asm["amdgcn" if self._is_amd else "ptx"]

    @property
    def _usage(self):
        if self.kernel.hash not in _usage_of:
            _usage_of[self.kernel.hash] = (
                _amd_usage(self._assembly) if self._is_amd else _nvidia_usage(self.kernel.asm["cubin"])
            )
        return _usage_of[self.kernel.hash]


_usage_of: dict[str, dict[str, int]] = {}  # by the hash of the compiled kernel


def _amd_usage(assembly):
    def field(name):
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE).group(1))

    return {
        "registers": field("vgpr_count"),
        "spill_bytes": 4 * field("vgpr_spill_count"),
        "stack_bytes": field("private_segment_fixed_size"),
    }


def _nvidia_usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        summary = _run_tool(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", file.name)
        registers, stack_bytes = map(int, re.search(r"REG:(\d+) STACK:(\d+)", summary).groups())
        # Nothing but spills is in local memory: a Triton kernel has no arrays that are indexed at run time.
        sass = _run_tool(triton.knobs.nvidia.nvdisasm, "-c", file.name) if stack_bytes else ""
    stores = re.findall(r"\bSTL(?:\.[A-Z]+(?=[.\s]))*(?:\.[US]?(\d+))?\s", sass)
    return {
        "registers": registers,
        "spill_bytes": sum(int(bits or 32) // 8 for bits in stores),
        "stack_bytes": stack_bytes,
    }


def _run_tool(tool, *args):
    return subprocess.run([tool.path, *args], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def compile_only(arch: str, *, every_launch: bool = True, driver=None):
    """Inside it, `kernel[grid](...)` on CPU tensors compiles for `arch` and launches nothing; needs no GPU, no driver.

    The ordinary call path is taken, so arguments are specialised as in a real launch, and this package's public
    functions run their kernels (TRITON_ATTN_BACKEND is `triton` inside). Arguments may be CPU tensors, host
    `TensorDescriptor`s, and tuples of both. Outputs keep what they held. A kernel that does not fit `arch` raises
    `triton.runtime.errors.OutOfResources` at its launch, as on the GPU. The target is what
    `triton.runtime.driver.active.get_current_target()` says. Binaries go to Triton's cache on disk, which tells
    targets apart. One may be open in a process at a time; it affects all threads.

    Args:
        arch: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942" or "gfx950".
        every_launch: False records only the first launch of each compiled kernel, and every later launch of it costs
            no more than the JIT's own call path. Use it to measure the host cost of a call.
        driver: a function of the other two arguments that makes the driver; the emulator's driver runs the launches.

    Yields:
        A list of `Launch`, in the order of the launches; it grows while the context is open.

    Raises:
        ValueError: `arch` is not in the list.
        RuntimeError: TRITON_INTERPRET is set (kernels are interpreted, not compiled), or a `compile_only` is open.

    Example:
        >>> from triton_attn.toolchain import compile_only
        >>> q = torch.empty(1, 64, 2, 64, dtype=torch.float16)
        >>> with compile_only("sm_80") as launches:
        ...     out = triton_attn.flash_attention(q, q, q)  # computes nothing
        >>> launches[0].spill_bytes
        0
    """
    _check_arch(arch)
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_only needs a process without TRITON_INTERPRET, where kernels are compiled")
    config = triton.runtime.driver
    if isinstance(config._active, _Driver):
        raise RuntimeError(f"compile_only({arch!r}) inside compile_only({config._active.arch!r})")
    driver = (driver or _Driver)(arch, every_launch)
    active, backend = config._active, os.environ.get("TRITON_ATTN_BACKEND")
    config.set_active(driver)
    os.environ["TRITON_ATTN_BACKEND"] = "triton"
    try:
        yield driver.launches
    finally:
        config.set_active(active)
        if backend is None:
            os.environ.pop("TRITON_ATTN_BACKEND", None)
        else:
            os.environ["TRITON_ATTN_BACKEND"] = backend
        driver.close()


class Specialization(NamedTuple):
    """A kernel that a kernel function compiles to, for the types, constants and divisibility of its arguments."""

    name: str  # of the function
    data: str  # Triton's own description of it, JSON


@contextlib.contextmanager
def record_specializations(arch: str, *, compiled: Collection[Specialization] = ()):
    """Like `compile_only`, but compiles nothing: it records which kernels the launches would compile.

    Use it to count the compilations that a change of arguments causes. A launch takes a fraction of a millisecond, also
    if its kernel was recorded before.

    Args:
        arch: as in `compile_only`.
        compiled: specializations to compile nevertheless.

    Yields:
        A dict whose keys are the `Specialization`s of the launches, in their order; it grows while the context is open.

    Example:
        >>> from triton_attn.toolchain import record_specializations
        >>> x = [torch.empty(1, n, 2, 64, dtype=torch.float16) for n in (64, 90)]
        >>> with record_specializations("sm_80") as kernels:
        ...     outs = [triton_attn.flash_attention(q, q, q) for q in x]
        >>> len(kernels)  # another length compiles nothing
        1
    """
    met = {}

    def hook(*, fn, compile, **_):
        specialization = Specialization(fn.name, compile["specialization_data"])
        met[specialization] = None
        return specialization not in compiled  # True: do not compile

    config = triton.knobs.runtime
    previous = config.jit_cache_hook
    with compile_only(arch):
        config.jit_cache_hook = hook
        try:
            yield met
        finally:
            config.jit_cache_hook = previous


class _Driver:
    """A Triton driver (see `triton.backends.driver.DriverBase`) that names the target and launches nothing."""

    def __init__(self, arch, every_launch):
        self.arch = arch
        self.every_launch = every_launch
        self.launches = []
        self.kernels = []
        # JITFunctions keep compiled kernels by device; a device of its own keeps these apart from all others.
        self.device = f"{arch} #{next(_numbers)}"
        self.utils = self

    def get_current_target(self):
        return _TARGETS[self.arch]

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("compile_only launches nothing, so nothing can be timed: launch one explicit config")

    def get_device_properties(self, device):
        return {"max_shared_mem": GPUS[self.arch].shared_bytes}

    def load_binary(self, name, binary, shared, device):
        module, function, registers, spills, max_threads = self, None, None, None, 1024
        return module, function, registers, spills, max_threads

    def unload_module(self, module):
        pass

    def launcher_cls(self, src, metadata):
        """Triton asks once for the launcher of a compiled kernel, at its first launch."""
        kernel = self.compiled(src)

        def launch(grid_0, grid_1, grid_2, *args):
            self.launches.append(Launch(kernel, (grid_0, grid_1, grid_2)))
            if not self.every_launch:
                kernel._run = _launch_nothing

        return launch

    def compiled(self, src):
        """The kernel of a source. It is unloaded at the end."""
        kernels = src.fn.device_caches[self.device][0].values()
        self.kernels.append(next(kernel for kernel in kernels if kernel.src is src))
        return self.kernels[-1]

    def close(self):
        """Unload every kernel, and remove it from the caches of its function."""
        for kernel in self.kernels:
            kernel.module = None
            kernel.src.fn.device_caches.pop(self.device, None)


def _launch_nothing(*args):
    pass
