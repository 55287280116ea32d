"""Launches, and what they depend on: the GPU's architecture, the arithmetic for fp32, the current device."""

import functools
import itertools
import operator
import weakref
from typing import NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import fail
from .gpu import gpu_arch, gpu_of
from .observers import PLAIN

DESCRIPTORS = TensorDescriptor, GluonDescriptor
INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from ..toolchain import fix_interpreter

    fix_interpreter()


def arch_of(tensor):
    """ "sm_90", "gfx942", ..., or "interpreter"."""
    if tensor.is_cuda:
        return gpu_arch(tensor.device.index)
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def input_precision(dtype, arch):
    """The input_precision of tl.dot for a dtype; fp32 follows torch.get_float32_matmul_precision()."""
    if dtype != torch.float32:
        return "ieee"
    wanted = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    return "ieee" if gpu_of(arch).is_amd and wanted == "tf32x3" else wanted


def launch(kernel, grid, device, args, constants, alike=None):
    """kernel[grid](*args, **constants) on the given device.

    alike: what launches of this kernel share only if nothing but addresses and floats differs between their args, and
    nothing between their constants; it has a hash that takes no time. None: not known.
    """
    if grid[0] >= 2**31:
        fail("the call's tiles", "fewer than 2**31", grid[0])
    if device.index is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, args, constants, alike)
    else:
        _launch(kernel, grid, args, constants, alike)


MOST_COMPILED = 4096
_compiled = {}  # {key of a launch: Compiled}
_alignments = {}  # {(kernel, alike): the `_alignment_of` its arguments; None after one launch}


class Compiled(NamedTuple):
    """A compiled kernel as later launches need it."""

    kernel: weakref.ref  # the JIT holds it, as long as its driver is there
    rest: tuple  # what the kernel takes after its arguments: constexprs and defaults
    scopes: tuple  # of the globals that the kernel was compiled with
    names: tuple
    values: list

    @classmethod
    def of(cls, compiled, kernel, num_args, constants):
        """None where the JIT has to look each time."""
        # On AMD GPUs it specializes pointers by the size of their memory too.
        if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
            return None
        if any(param.name in constants and not param.is_constexpr for param in kernel.params):
            return None
        rest = tuple(constants.get(param.name, param.default) for param in kernel.params[num_args:])
        names = tuple(name for name, _ in kernel.used_global_vals)
        scopes = tuple(scope for _, scope in kernel.used_global_vals.values())
        # The JIT, which has just compared them, has copies: these are compared by identity, in little time.
        return cls(weakref.ref(compiled), rest, scopes, names, list(map(operator.getitem, scopes, names)))

    def find(self):
        """The kernel; None where it is gone, or a global was changed, which the JIT reports."""
        try:
            unchanged = list(map(operator.getitem, self.scopes, self.names)) == self.values
        except KeyError:
            return None
        return self.kernel() if unchanged else None


def _launch(kernel, grid, args, constants, alike=None):
    """Launch on the current device. Returns the compiled kernel.

    The JIT takes up to three quarters of a launch to find the kernel that it compiled for such arguments. So a launch
    like an earlier one is that of the same compiled kernel. Launch hooks see both. constants are constexprs and
    options of the launch.
    """
    if INTERPRETED:
        return kernel.run(*args, grid=grid, warmup=False, **constants)
    keys = []  # by which the kernel was not found
    for shared in (None,) if alike is None else (alike, None):  # launches that are not alike may take one kernel
        key = _key_of_launch(kernel, args, constants, shared)
        try:
            known = _compiled.get(key)
        except TypeError:  # an option has no hash
            key = known = None
        if known is not None and (compiled := known.find()) is not None:
            compiled[(*grid, 1, 1)](*args, *known.rest)
            break
        keys.append(key)
    else:
        compiled = kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **constants)
        known = Compiled.of(compiled, kernel, len(args), constants)
    for key in keys:
        if key is not None and known is not None:
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            _compiled[key] = known
    return compiled


def _key_of_launch(kernel, args, constants, alike=None):
    """Everything that decides which compiled kernel a launch takes; None where the JIT has to look. From their second
    launch on, alike ones have a key that takes little time: what they do not share.

    A kernel is its JITFunction: others of the same Python function have options of their own. It is there as long as
    what it was compiled to. `enable_fp_fusion` is set, and the JIT reads other knobs only where it compiles.
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    if kernel.pre_run_hooks or getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return None
    casts = getattr(compilation, "fpsan_homomorphic_casts", None)
    device = triton.runtime.driver.active.get_current_device()
    key = [id(kernel), device, kernel.debug or runtime.debug, compilation.instrumentation_mode, casts]
    if alike is None:
        return (*key, *constants.items()) if _add_kinds(key, args) else None
    of_launch = id(kernel), alike
    alignment_of = _alignments.get(of_launch)
    if alignment_of is None:
        if of_launch not in _alignments:  # it may be the only one
            if len(_alignments) >= MOST_COMPILED:
                _alignments.clear()
            _alignments[of_launch] = None
            return None
        places = _places_of_tensors("args", args)
        if places is None:
            return None
        alignment_of = _alignments[of_launch] = _alignment_of(*places)
    return (*key, alike, alignment_of(args))


@functools.lru_cache(maxsize=1024)
def _alignment_of(*places):
    """A function of arguments that have tensors in these places: what remains of each address after multiples of 16.

    It is compiled from an expression: a walk through the arguments takes five times as long.
    """
    remainders = [f"{place}.data_ptr() % 16," for place in places]
    return eval(f"lambda args: ({' '.join(remainders)})")


def _places_of_tensors(place, x):
    """Expressions of the tensors in x, which is at this place; None if there is an argument of another type, of which
    the JIT has to know more. The address of a descriptor's tensor is always a multiple of 16."""
    kind = type(x)
    if isinstance(x, tuple):
        places = [] if _has_integers(kind) else [_places_of_tensors(f"{place}[{i}]", one) for i, one in enumerate(x)]
        return None if None in places else [*itertools.chain(*places)]
    if kind in PLAIN:
        return [place]
    return [] if x is None or kind in (int, bool, float, *DESCRIPTORS) else None


def _add_kinds(key, args):
    """Add what the JIT specializes arguments by: types, dtypes, alignment, and of integers whether they are 1, whether
    multiples of 16, and how many bits they need. False if there is an argument of another type."""
    for x in args:
        kind = type(x)
        if kind in PLAIN:
            key.append((x.dtype, x.data_ptr() % 16))
        elif x is None or kind is float:
            key.append(kind)
        elif kind is int or kind is bool:
            key.append(kind_of_integer(x))
        elif isinstance(x, tuple):
            if _has_integers(kind):
                kinds = _kinds_of_integers(x)
                if kinds is None:
                    return False
                key.append(kinds)
                continue
            key.append((kind, len(x)))
            if not _add_kinds(key, x):
                return False
        elif kind in DESCRIPTORS and type(x.base) in PLAIN:
            layout = getattr(x, "layout", None)
            key.append((kind, x.base.dtype, x.base.data_ptr() % 16, len(x.shape), *x.block_shape, layout))
        else:
            return False
    return True


@functools.lru_cache(maxsize=4096, typed=True)
def kind_of_integer(x):
    """What the JIT specializes an int or a bool by, in one number, whose hash takes no time."""
    properties = type(x) is bool, x == 1, x % 16 == 0, -1 <= x >> 31 <= 0, -1 <= x >> 63 <= 0
    return sum(holds << i for i, holds in enumerate(properties))


@functools.cache
def _has_integers(kind):
    """Whether tuples of this type hold ints and None alone, as the annotations of a NamedTuple say."""
    annotations = getattr(kind, "__annotations__", {}).values()
    return len(annotations) > 0 and all(one in (int, int | None) for one in annotations)


@functools.lru_cache(maxsize=4096, typed=True)
def _kinds_of_integers(x):
    """What `_add_kinds` adds for such a tuple; None if it holds something else after all."""
    key = [type(x)]
    return tuple(key) if _add_kinds(key, [*x]) else None


def hold_pinned(tensors, device):
    """Keep pinned memory from being allocated again before the device's current stream got so far.

    torch's allocator waits for transfers to and from such memory, but does not know of kernels that use it. So this
    transfers one element of each tensor that is not on the device.
    """
    for x in tensors:
        if x.device != device and x.numel():
            x.as_strided((1,), (1,)).to(device, non_blocking=True)
