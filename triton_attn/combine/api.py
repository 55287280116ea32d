"""Merging of partial attention as users call it: argument checks, then the kernel or the reference."""

import torch

from .._host.backend import use_kernel
from .._host.checks import KERNEL_DTYPES, MAX_HEAD_DIM, fail
from . import reference


def merge_attention(outs, lses):
    """Attention over a set of keys from attention over its parts.

        lse[b, h, i] = log sum_p exp(lses[p, b, h, i])
        out[b, i, h] = sum_p exp(lses[p, b, h, i] - lse[b, h, i]) outs[p, b, i, h]

    computed in fp32. A part in which a query sees no key has lse = -inf, the identity: its out is not read.

    Args:
        outs: (num_parts, batch, seqlen_q, num_heads_q, head_dim_v), fp16, bf16 or fp32; the last dimension contiguous.
        lses: (num_parts, batch, num_heads_q, seqlen_q) fp32, natural log, as `return_lse` gives them.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in outs' dtype, lse (batch, num_heads_q, seqlen_q) in fp32.
        Without parts, or where all are empty, out = 0 and lse = -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
        NotImplementedError: an argument requires a gradient.

    Source: Ye et al., Cascade Inference (2024); Juravsky et al., Hydragen (2024), arXiv:2402.05099.
    """
    _check(outs, lses)
    if not use_kernel(outs):
        return reference.merge_attention(outs, lses)
    from .merge import launch_merge  # the package imports where triton is not installed

    out = outs.new_empty(outs.shape[1:])
    lse = lses.new_empty(lses.shape[1:])
    launch_merge(outs, lses.transpose(2, 3), out, lse.transpose(1, 2))
    return out, lse


def _check(outs, lses):
    for name, x, ndim, layout in (
        ("outs", outs, 5, "(num_parts, batch, seqlen_q, num_heads_q, head_dim_v)"),
        ("lses", lses, 4, "(num_parts, batch, num_heads_q, seqlen_q)"),
    ):
        if not isinstance(x, torch.Tensor):
            fail(name, "a tensor", type(x).__name__, TypeError)
        if x.ndim != ndim:
            fail(name, layout, f"shape {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(f"{name}: no gradient is served, got a tensor that requires one; detach it")
    num_parts, batch, seqlen_q, num_heads_q, head_dim_v = outs.shape
    if outs.dtype not in (*KERNEL_DTYPES, torch.float64) or (outs.dtype == torch.float64 and use_kernel(outs)):
        fail("outs", "float16, bfloat16 or float32", outs.dtype, TypeError)
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        fail("outs", f"a head dimension of 1 to {MAX_HEAD_DIM}", head_dim_v)
    if outs.stride(-1) != 1 and head_dim_v != 1:
        fail("outs", "a contiguous last dimension (stride 1)", f"stride {outs.stride(-1)}")
    expected = (num_parts, batch, num_heads_q, seqlen_q)
    if tuple(lses.shape) != expected:
        fail("lses", f"outs' parts, batch, heads and rows {expected}", f"shape {tuple(lses.shape)}")
    if lses.dtype != (torch.float64 if outs.dtype == torch.float64 else torch.float32):
        fail("lses", "dtype torch.float32", lses.dtype, TypeError)
    if lses.device != outs.device:
        fail("lses", f"outs' device {outs.device}", lses.device)
