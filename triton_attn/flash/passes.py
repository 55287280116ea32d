"""The forward and the backward pass of flash attention, for callers that have their own autograd function."""

import functools
from typing import Any

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.call import Call, Lengths, packed_lengths
from .._host.checks import check_kernel_dtype, fail
from .._host.known import sides_of
from .._host.layout import new_outputs
from .._host.options import with_dropout, with_tensors
from . import reference
from .api import check_call


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    *,
    out: Tensor,
    **options: Any,
) -> Tensor:
    """`flash_attention` or `flash_attention_varlen` into `out`; returns lse.

    Args:
        q, k, v: as in these functions, without autocast.
        lengths: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k); the first two None for a dense batch.
        out: q's shape but for its last dimension, which is v's; q's dtype; any strides, the last dimension contiguous.
        options: those of these functions from causal to dropout_seed, and shard.

    Returns: lse, (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q), fp32.

    Raises: as `flash_attention_varlen`.
    """
    call = _checked_call(q, k, v, lengths, **options)
    if out.shape != (*q.shape[:-1], v.shape[-1]) or out.dtype != q.dtype:
        fail("out", f"shape {(*q.shape[:-1], v.shape[-1])}, {q.dtype}", f"shape {tuple(out.shape)}, {out.dtype}")
    if not use_kernel(q):
        return reference.compute(call, return_lse=True, out=out)[1]
    check_kernel_dtype(q)
    _, lse = new_outputs(q, v, out=out)
    _launchers()[0](call, out, lse)
    return lse


def backward_pass(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    *,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsinks) of `forward_pass`, given the gradients of out and lse (None: 0).

    k and v may be a part of the keys that out and lse are over. Each gradient has the strides of torch.empty_like of
    its tensor. dsinks is None without sinks.

    Raises: as `flash_attention_varlen`.
    """
    call = _checked_call_backward(q, k, v, lengths, **options)
    minus_delta, dsinks = _row_sums(dout, dlse, out, lse, call.lengths, call.options.sinks)
    dq, dk, dv = _gradients(dout, lse, minus_delta, call, deterministic)
    return dq, dk, dv, dsinks


def row_sums_pass(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(minus_delta, dsinks) of queries: dlse - rowsum(dout * out), and the gradient of the sinks.

    out and dout are (rows, heads, dim), lse, dlse and minus_delta (heads, rows); dlse and sinks may be None. Every row
    of out is a query. `gradients_pass` takes minus_delta.
    """
    lengths = Lengths(None, None, out.shape[0], 0)
    dlse = None if dlse is None else dlse[None]
    minus_delta, dsinks = _row_sums(dout[None], dlse, out[None], lse[None], lengths, sinks)
    return minus_delta[0], dsinks


def gradients_pass(
    dout: Tensor,
    lse: Tensor,
    minus_delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    *,
    deterministic: bool = False,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) of `forward_pass` over a part of the keys that lse and minus_delta of `row_sums_pass` are over.

    wanted: which of them; kernels do not compute the others, which may be None. The rest as in `backward_pass`.
    """
    call = _checked_call_backward(q, k, v, lengths, **options)
    return _gradients(dout, lse, minus_delta, call, deterministic, wanted)


def _row_sums(dout, dlse, out, lse, lengths, sinks):
    if not use_kernel(out):
        return reference.row_sums(dout, dlse, out, lse, sinks)
    return _launchers()[1](_with_rows(dout), dlse, out, lse.contiguous(), lengths, sinks)


def _gradients(dout, lse, minus_delta, call, deterministic, wanted=(True, True, True)):
    if not use_kernel(call.q):
        return reference.gradients(dout, lse, minus_delta, call)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    sums = lse.contiguous(), minus_delta.contiguous()
    return _launchers()[2](call, _with_rows(dout), sums, wanted, deterministic, like_inputs=True)


def _with_rows(dout):
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def _checked_call_backward(q, k, v, lengths: Any, **options: Any) -> Call:
    call = _checked_call(q, k, v, lengths, **options)
    if use_kernel(q):
        check_kernel_dtype(q)
    return call


def _checked_call(
    q,
    k,
    v,
    lengths: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    shard: Tensor | None = None,
) -> Call:
    is_packed = lengths[0] is not None or lengths[1] is not None
    cu_seqlens = lengths[:2] if is_packed else ()
    numbers = causal, softmax_scale, softcap, False, True, *sides_of(window_size)
    checked = check_call((q, k, v, alibi_slopes, sinks, shard, None, *cu_seqlens), numbers)
    lengths = packed_lengths(*lengths) if is_packed else Lengths(*lengths)
    options = with_tensors(checked.options, alibi_slopes, sinks, shard)
    options = with_dropout(options, q, dropout_p, dropout_seed)
    return Call(q, k, v, lengths, options, checked.problem)


@functools.cache
def _launchers() -> tuple[Any, Any, Any]:
    """Imported at the first call, so that the package can be imported without triton."""
    from ..dense.backward import launch_flash_bwd_of_sums, launch_row_sums
    from .forward import launch_flash_fwd

    return launch_flash_fwd, launch_row_sums, launch_flash_bwd_of_sums
