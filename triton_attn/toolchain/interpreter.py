"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), triton 3.6 to 3.9.

numpy has no bf16 and no fp8, so the interpreter keeps their bit patterns in uint16 and uint8, and computes on the
patterns: a bf16 `tl.dot` is off by many orders of magnitude, `x + y` adds bits, casts truncate or round wrongly. Here
every operation on such a handle is computed in fp32, which holds both formats exactly, and rounded back once.
"""

import dataclasses
import functools
import threading

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.core import _unwrap_if_constexpr
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)

_FLOAT8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_FLOAT8_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(torch_dtype).float().numpy()
    for dtype, torch_dtype in _FLOAT8.items()
}
# A launch patches the language and keeps the place of the program it runs in one builder: one launch at a time.
_LAUNCH = threading.RLock()
_NARROW = {tl.bfloat16, *_FLOAT8}  # floats that the interpreter stores as bit patterns


def fix_interpreter() -> None:
    """Make bf16 and fp8 in interpreted kernels behave as on a GPU; calling it again changes nothing.

    - `tl.dot` of bf16 and fp8 operands multiplies their values.
    - Casts to bf16 round to nearest even; casts to fp8 round to nearest even and saturate, as `cvt.rn.satfinite` does.
      NaN stays NaN. Casts from both are exact, NaN and infinity included. A `fp_downcast_rounding="rtz"` cast
      keeps Triton's own code.
    - Elementwise operations, comparisons, reductions and scans work on values, each result rounded once. A reduction
      accumulates in fp32, where a GPU may round at each step of its tree.
    - bf16 constants (triton 3.6) and the NaN padding of bf16 tensor descriptors no longer fail.
    - Tensors as loop bounds work with triton 3.6 and numpy >= 2.4.
    - `desc.atomic_add` of fp32 descriptors works.
    - Launches take a third of the time, and leave nothing of `triton.language` patched.
    - Tensors and types are constructed once per shape, which saves a fifth of a kernel's time.
    - Launches of several Python threads run one after another.

    Not repaired: bf16 atomics, inline assembly and (triton 3.6, 3.7) AMD's own fp8 types, which raise; `tl.dot_scaled`;
    fp8e4b15.

    Example:
        >>> from triton_attn.toolchain import fix_interpreter
        >>> fix_interpreter()  # before the first launch, with TRITON_INTERPRET=1
    """
    with _LAUNCH:
        _fix_once()


@functools.cache
def _fix_once():
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _on_values(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _dot_on_values(InterpreterBuilder.create_dot)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value]), tl.bfloat16)
    InterpreterBuilder.create_descriptor_load = _descriptor_load(InterpreterBuilder.create_descriptor_load)
    if not hasattr(InterpreterBuilder, "create_descriptor_reduce"):
        InterpreterBuilder.create_descriptor_reduce = _descriptor_add
    ReduceScanOpInterface.apply = _apply_on_values(ReduceScanOpInterface.apply)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    # The check for integer overflow asserts only with `debug`; without, it costs a third of the time for nothing.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
    GridExecutor.__call__ = _on_one_stack(GridExecutor.__call__)
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    InterpretedFunction.run = _one_at_a_time(InterpretedFunction.run)
    _remember_types()


def _is_narrow(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar in _NARROW


def _widen(handle):
    """The same values in fp32; anything but a handle of bf16 or fp8 is returned unchanged."""
    if not _is_narrow(handle):
        return handle
    dtype = handle.dtype.scalar
    if dtype == tl.bfloat16:
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    else:
        values = _FLOAT8_VALUES[dtype][handle.data]
    return TensorHandle(values, tl.float32)


def _narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """`values` rounded to nearest even in bf16 or fp8; fp8 saturates at its largest finite value."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == tl.bfloat16:
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        data = np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    else:
        torch_dtype = _FLOAT8[dtype]
        limit = torch.finfo(torch_dtype).max
        data = torch.from_numpy(values).clamp(-limit, limit).to(torch_dtype).view(torch.uint8).numpy()
    return TensorHandle(data, dtype)


def _on_values(method):
    @functools.wraps(method)
    def wrapper(self, *operands):
        dtype = next((operand.dtype.scalar for operand in operands if _is_narrow(operand)), None)
        if dtype is None:
            return method(self, *operands)
        result = method(self, *map(_widen, operands))
        is_comparison = result.data.dtype == np.bool_
        return result if is_comparison else _narrow(result.data, dtype)

    return wrapper


def _dot_on_values(create_dot):
    @functools.wraps(create_dot)
    def wrapper(self, a, b, *args):
        return create_dot(self, _widen(a), _widen(b), *args)

    return wrapper


def _cast(method):
    @functools.wraps(method)
    def wrapper(self, src, dst_type, *rounding_mode):
        dtype = dst_type.scalar
        if ir.ROUNDING_MODE.RTZ in rounding_mode or not (_is_narrow(src) or dtype in _NARROW):
            return method(self, src, dst_type, *rounding_mode)
        values = _widen(src).data
        return _narrow(values, dtype) if dtype in _NARROW else self.cast_impl(TensorHandle(values, tl.float32), dtype)

    return wrapper


def _descriptor_load(method):
    @functools.wraps(method)
    def wrapper(self, desc, indices, *policy):
        dtype = desc.base.get_element_ty()
        if desc.padding != ir.PADDING_OPTION.PAD_NAN or dtype not in _NARROW:
            return method(self, desc, indices, *policy)
        pointers, mask = desc.materialize_pointers(indices)
        padding = _narrow(np.full(pointers.data.shape, np.nan), dtype)
        return self.create_masked_load(pointers, mask, padding, *policy, is_volatile=False)

    return wrapper


def _descriptor_add(self, kind, desc, value, indices):
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or desc.base.get_element_ty() != tl.float32:
        raise NotImplementedError("the interpreter serves only fp32 atomic_add through a descriptor")
    pointers, mask = desc.materialize_pointers(indices)
    relaxed, gpu = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
    return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, relaxed, gpu)


def _apply_on_values(apply):
    @functools.wraps(apply)
    def wrapper(self, inputs):
        if not isinstance(inputs, tuple) or not any(_is_narrow(x.handle) for x in inputs):
            return apply(self, inputs)
        outputs = apply(self, tuple(_tensor(_widen(x.handle), x.type) for x in inputs))
        return tuple(
            _tensor(_narrow(y.handle.data, x.dtype), y.type) if _is_narrow(x.handle) else y
            for x, y in zip(inputs, outputs)
        )

    return wrapper


def _tensor(handle: TensorHandle, like: tl.dtype) -> tl.tensor:
    """`handle` as a tensor of the shape of the type `like`."""
    return tl.tensor(handle, like.with_element_ty(handle.dtype) if like.is_block() else handle.dtype)


def _with_index(patch_lang_tensor):
    @functools.wraps(patch_lang_tensor)
    def wrapper(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return wrapper


def _on_one_stack(call):
    """Python keeps frames in chunks of 16 KB, mapped and unmapped as calls cross from one to the next, which a loop may
    do at each call. A frame that is too large for them gets a chunk of its own, with room for all that it calls."""

    @functools.wraps(call)
    def wrapper(self, *args, **kwargs):
        return call(self, *args, **kwargs)

    wrapper.__code__ = wrapper.__code__.replace(co_stacksize=2**16 + 1)
    return wrapper


def _one_at_a_time(run):
    @functools.wraps(run)
    def wrapper(self, *args, **kwargs):
        with _LAUNCH:
            return run(self, *args, **kwargs)

    return wrapper


def _once_per_launch(patch_lang):
    """Each call of a jit function patches the language of its module, and takes long to find that it is patched."""
    launch = None
    patched = set()

    @functools.wraps(patch_lang)
    def wrapper(fn):
        nonlocal launch
        langs = _langs_of(fn)
        if launch is None or not launch._changes:  # restored: this is the next launch
            patched.clear()
            launch = patch_lang(fn)
        elif not langs <= patched:
            launch._changes += patch_lang(fn)._changes
        patched.update(langs)
        return launch

    return wrapper


def _remember_types():
    """Constructors of tensors and types run thousands of times in an interpreted program; here they run once a type."""
    tl.block_type.__init__ = _made_once(
        tl.block_type.__init__,
        key_of=lambda element_ty, shape: (element_ty.name, *map(_unwrap_if_constexpr, shape)),
        own_of=lambda element_ty, shape: {"element_ty": element_ty},
    )
    tl.tensor.__init__ = _made_once(
        tl.tensor.__init__,
        key_of=lambda handle, type: type.name,
        own_of=lambda handle, type: {"handle": handle, "type": type, "dtype": type.scalar},
    )
    get_np_dtype = interpreter._get_np_dtype
    of_name = {}

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in of_name:
            of_name[name] = get_np_dtype(dtype)
        return of_name[name]

    interpreter._get_np_dtype = remembered


def _made_once(init, key_of, own_of):
    """A constructor that copies the attributes of the first object with the same key, except each object's own."""
    made = {}

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        key = key_of(*args, **kwargs)
        attributes = made.get(key)
        if attributes is None:
            before = set(vars(self))
            init(self, *args, **kwargs)
            made[key] = {name: value for name, value in vars(self).items() if name not in before}
            return
        vars(self).update(attributes)
        vars(self).update(own_of(*args, **kwargs))

    return wrapper


@functools.cache
def _langs_of(fn):
    return {lang.__name__ for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())}
