"""Kernel or reference: the environment variables, read at each call."""

import os

from .checks import check_bool


def use_kernel(tensor):
    """Whether the kernel serves this call: TRITON_ATTN_BACKEND = auto (default), triton or reference."""
    backend = os.environ.get("TRITON_ATTN_BACKEND", "auto")
    if backend == "auto":
        return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("triton", "reference"):
        return backend == "triton"
    raise ValueError(f"TRITON_ATTN_BACKEND: expected auto, triton or reference, got {backend!r}")


def should_check_values(check_values):
    """check_values, or TRITON_ATTN_CHECK=1 where it is None."""
    if check_values is None:
        return os.environ.get("TRITON_ATTN_CHECK") == "1"
    return check_bool("check_values", check_values)
