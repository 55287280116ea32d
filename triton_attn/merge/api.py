"""Merging of partial attention as users call it: argument checks, then the kernel or the reference."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.checks import KERNEL_DTYPES, MAX_HEAD_DIM, check_last_contiguous, check_tensor, fail
from .._host.known import check_once
from .._host.layout import known_outputs
from .._host.observers import is_observed, refuse_gradients
from . import reference


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a set of keys, merged from attention over splits of the set.

        lse[b, h, i] = log sum_s exp(lses[s, b, h, i])
        out[b, i, h] = sum_s exp(lses[s, b, h, i] - lse[b, h, i]) outs[s, b, i, h]

    computed in fp32. A query that sees no key of a split has lse = -inf there, and its out is not read. flash-attn,
    FlashMLA and vLLM give such a query an lse of +inf: it counts as -inf.

    Args:
        outs: (num_splits, batch, seqlen_q, num_heads_q, head_dim_v), fp16, bf16 or fp32; the last dimension contiguous.
        lses: (num_splits, batch, num_heads_q, seqlen_q) fp32, natural log, as `return_lse` gives them.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in outs' dtype, lse (batch, num_heads_q, seqlen_q) in fp32.
        A query that sees no key of any split has out = 0 and lse = -inf; without splits, all do.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
        NotImplementedError: an argument requires a gradient or has a tangent.

    One operator under torch.compile, export and vmap, which loops.

    Example:
        >>> q, (k, v) = torch.randn(1, 8, 2, 64), torch.randn(2, 1, 40, 2, 64)
        >>> halves = zip(k.chunk(2, dim=1), v.chunk(2, dim=1))
        >>> parts = [triton_attn.flash_attention(q, *half, return_lse=True) for half in halves]
        >>> out, lse = triton_attn.merge_attention(*(torch.stack(part) for part in zip(*parts)))
        >>> torch.testing.assert_close(out, triton_attn.flash_attention(q, k, v))

    Source: Ye et al., Cascade Inference (2024); Juravsky et al., Hydragen (2024), arXiv:2402.05099.
    """
    alike = _check((outs, lses), (isinstance(outs, Tensor) and use_kernel(outs),))
    if not is_observed(outs, lses):
        return _merge(outs, lses, alike)
    refuse_gradients(outs=outs, lses=lses)
    return _operator(outs, lses)


def _merge(outs: Tensor, lses: Tensor, alike: object) -> tuple[Tensor, Tensor]:
    """The merge. alike: what calls share only if they differ in addresses alone, or None."""
    if not use_kernel(outs):
        return reference.merge_attention(outs, lses)
    shape = outs.shape[1:]
    out, lse = known_outputs(shape, shape[-1], outs.dtype).new(outs, True)
    _planner()(outs.shape, outs.stride(), out.stride()).launch(outs, lses.contiguous(), out, lse, alike)
    return out, lse


@functools.cache
def _planner() -> Callable[..., Any]:
    """Imported at the first call, so that the package can be imported without triton."""
    from .kernel import plan_merge

    return plan_merge


def _new_outputs(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


_operator = torch.library.custom_op(
    "triton_attn::merge_attention",
    lambda outs, lses: _merge(outs, lses, None),
    mutates_args=(),
    schema="(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
)
_operator.register_fake(_new_outputs)


@check_once
def _check(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> object:
    """Check the tensors. The result is that of calls with such tensors alone; None where a tracer calls."""
    outs, lses = tensors
    (runs_kernel,) = options
    dtypes = KERNEL_DTYPES if runs_kernel or not isinstance(outs, Tensor) else (*KERNEL_DTYPES, torch.float64)
    check_tensor("outs", outs, ("num_splits", "batch", "seqlen_q", "num_heads_q", "head_dim_v"), dtypes, None)
    check_last_contiguous("outs", outs)
    num_splits, batch, seqlen_q, num_heads_q, head_dim_v = outs.shape
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        fail("outs", f"a head dimension of 1 to {MAX_HEAD_DIM}", head_dim_v)
    lse_dtype = torch.promote_types(outs.dtype, torch.float32)
    check_tensor("lses", lses, (num_splits, batch, num_heads_q, seqlen_q), (lse_dtype,), outs.device)
    return None if torch.compiler.is_compiling() else object()
