"""Observers of a call: autograd, torch.func, torch.compile, torch.export, fake tensors, autocast.

A call without observers launches its kernel directly. Autograd alone gets a torch.autograd.Function. Any other observed
call goes through a torch operator, which costs 10 to 16 microseconds more and with autograd 150, or it raises: a
transform that does not see the call would silently give wrong derivatives.
"""

import functools
from typing import Any

import torch
from torch import _C
from torch.autograd import forward_ad

_functorch = _C._functorch
_PRE_DISPATCH, _VMAP = map(_C._parse_dispatch_key, ("PreDispatch", "VmapMode"))
_DISABLED = torch.Tensor.__torch_dispatch__
# torch.autograd.Function without what that does for torch.func at each call.
SingleLevelFunction: Any = torch.autograd.function._SingleLevelFunction
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # classes of tensors that see no calls


def is_observed(*tensors, but_autograd=False):
    """Whether a call with these tensors (or None) has an observer, with but_autograd other than autograd, which must
    see an operator."""
    if not but_autograd and torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack() > 0
        or _C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)  # modes above autograd, as of make_fx
        or _C._dispatch_tls_is_dispatch_key_included(_VMAP)  # of torch.autograd.grad(is_grads_batched=True)
        or _C._get_tracing_state() is not None  # torch.jit.trace
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for x in tensors:  # noqa: SIM110 - faster than any()
        if x is not None and (x.is_meta or (type(x) is not torch.Tensor and _dispatches(x))):
            return True
    return False


def wants_gradients(*tensors):
    """Whether autograd sees a call with these tensors (or None)."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _dispatches(x):
    """Whether the tensor's class sees torch's calls, as that of fake tensors."""
    return type(x).__torch_dispatch__ is not _DISABLED


def constant_if_traced(function):
    """Decorator: a tracer of torch calls the function and takes its result for a constant.

    torch.compiler.assume_constant_result is the same, but imports torch's compiler with the package.
    """
    function._dynamo_marked_constant = True
    return function


def refuse_gradients(**tensors):
    """For a function without derivatives: raise at the call, where torch.autograd would silently give none."""
    refuse_transforms(**tensors)
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise NotImplementedError(
                f"{name}: gradients are not supported, got a tensor that requires one; use torch.no_grad"
            )


def refuse_transforms(**tensors):
    """Raise for transforms that our torch operators do not support: torch.func would fail later, and forward-mode AD
    would silently lose the tangent."""
    if not (torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _has_wrapped(tensors.values())):
        return
    name, transform = _first(tensors, _takes_derivatives, _derivative_of)
    if name is not None:
        raise NotImplementedError(
            f"{name}: derivatives by torch.func are not supported"
            if transform == "torch.func"
            else f"{name}: forward-mode derivatives are not supported, got a tensor with a tangent"
        )


def _has_wrapped(tensors):
    for x in tensors:  # noqa: SIM110 - faster than any()
        if x is not None and _functorch.is_functorch_wrapped_tensor(x):
            return True
    return False


def refuse_vmap(**tensors):
    """Raise under vmap, for a function that writes to its arguments."""
    name, _ = _first(tensors, _maps, _vmap_of)
    if name is not None:
        raise NotImplementedError(f"{name}: vmap is not supported by a function that writes in place")


def _first(tensors, is_active, transform_of):
    """(name, transform) of the first tensor under one, or None twice.

    Tracers of torch cannot look into the two functions and call them. They compute a tensor's value for that, which is
    slow, so is_active comes first.
    """
    if torch.compiler.is_compiling() and not is_active():
        return None, None
    for name, x in tensors.items():
        if x is not None and (transform := transform_of(x)):
            return name, transform
    return None, None


@constant_if_traced
def _takes_derivatives():
    return forward_ad._current_level >= 0 or _has_level(_functorch.TransformType.Grad)


@constant_if_traced
def _maps():
    return _has_level(_functorch.TransformType.Vmap)


def _has_level(transform):
    return any(level.key() == transform for level in _functorch.get_interpreter_stack() or ())


@constant_if_traced
def _derivative_of(x):
    if any(map(_functorch.is_gradtrackingtensor, _layers(x))):
        return "torch.func"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode"
    return None


@constant_if_traced
def _vmap_of(x):
    if any(map(_functorch.is_batchedtensor, _layers(x))):
        return "vmap"
    return None


def _layers(x):
    """The tensor, and what each transform around it wraps."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def autocast(*tensors):
    """The tensors, cast as torch.autocast casts those of torch's own attention: to the device's dtype, but not fp64.

    Source: the policy lower_precision_fp, aten/src/ATen/autocast_mode.h.
    """
    if not _C._is_any_autocast_enabled():
        return tensors
    return tuple(_autocast_one(x) for x in tensors)


def _autocast_one(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def without_autocast(function):
    """Decorator: turn autocast off in a function that computes with torch's operators and chooses its own dtypes."""

    @functools.wraps(function)
    def in_own_dtypes(x, *args, **kwargs):
        if not _C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return in_own_dtypes


def number_and_tensor(scale):
    """(number or None, tensor or None): how an operator takes a scale that is either."""
    return (None, scale) if isinstance(scale, torch.Tensor) else (scale, None)
