"""Kernel or reference: environment variables that are read at each call."""

import os

from .checks import check_bool


class Variable:
    """An environment variable that is read at each call.

    os.environ.get raises and catches a KeyError for a variable that is not set, and takes ten times as long. The last
    value stays decoded."""

    def __init__(self, name):
        self._key = os.environ.encodekey(name)
        self._last = None, None

    def get(self, default=None):
        encoded = os.environ._data.get(self._key)
        if encoded is None:
            return default
        known, value = self._last
        if encoded != known:
            value = os.environ.decodevalue(encoded)
            self._last = encoded, value
        return value


_BACKEND, _INTERPRET, _CHECK = map(Variable, ("TRITON_ATTN_BACKEND", "TRITON_INTERPRET", "TRITON_ATTN_CHECK"))
_INVARIANT = Variable("TRITON_ATTN_BATCH_INVARIANT")


def use_kernel(tensor):
    """Whether this call runs the kernel: TRITON_ATTN_BACKEND = auto (default), triton or reference."""
    backend = _BACKEND.get("auto")
    if backend == "auto":
        return tensor.is_cuda or _INTERPRET.get() == "1"
    if backend in ("triton", "reference"):
        return backend == "triton"
    raise ValueError(f"TRITON_ATTN_BACKEND: expected auto, triton or reference, got {backend!r}")


def should_check_values(check_values):
    """check_values, or TRITON_ATTN_CHECK=1 where it is None."""
    if check_values is None:
        return _CHECK.get() == "1"
    return check_bool("check_values", check_values)


def is_batch_invariant(batch_invariant=None):
    """batch_invariant, or TRITON_ATTN_BATCH_INVARIANT=1 where it is None."""
    if batch_invariant is None:
        return _INVARIANT.get() == "1"
    return check_bool("batch_invariant", batch_invariant)
