"""Who looks at a call besides its caller: autograd, torch.func, torch.compile, export, fake tensors, autocast.

A call that nobody looks at launches its kernel directly. The others go through a torch operator, which costs 10 to 16
microseconds more, or are refused, since a transform that sees nothing gives wrong derivatives in silence.
"""

import functools

import torch
from torch import _C
from torch.autograd import forward_ad

_functorch = _C._functorch
_DISABLED = torch.Tensor.__torch_dispatch__


def is_observed(*tensors):
    """Whether a call with these tensors, or None, must go through an operator to be seen."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for x in tensors:  # noqa: SIM110 - faster than any(); without memory: meta and fake tensors, and whatever else dispatches by itself
        if x is not None and (x.is_meta or type(x).__torch_dispatch__ is not _DISABLED):
            return True
    return False


def refuse_gradients(**tensors):
    """For a function without derivatives: raised at the call, where torch.autograd would give none in silence."""
    refuse_transforms(**tensors)
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise NotImplementedError(
                f"{name}: no gradient is served, got a tensor that requires one; use torch.no_grad"
            )


def refuse_transforms(**tensors):
    """What torch's operators do not serve: torch.func fails far from the call, forward mode gives no tangent."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is None:
            continue
        if any(map(_functorch.is_gradtrackingtensor, _layers(x))):
            raise NotImplementedError(f"{name}: derivatives by torch.func are not served")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: forward-mode derivatives are not served, got a tensor with a tangent")


def refuse_vmap(**tensors):
    """For a function that writes to its arguments."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is not None and any(map(_functorch.is_batchedtensor, _layers(x))):
            raise NotImplementedError(f"{name}: vmap is not served by a function that writes in place")


def _layers(x):
    """A tensor as each transform around it sees it."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def autocast(*tensors):
    """What torch.autocast does to the inputs of torch's own attention: each but fp64 in its device's dtype.

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
    """Decorator of a function of tensors that computes with torch's operators, in dtypes of its own choice."""

    @functools.wraps(function)
    def in_own_dtypes(x, *args, **kwargs):
        if not _C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return in_own_dtypes


def number_and_tensor(scale):
    """(number or None, tensor or None), as an operator takes what may be either."""
    return (None, scale) if isinstance(scale, torch.Tensor) else (scale, None)
