"""The forward and the backward pass of flash attention, for callers that have their own autograd function."""

import functools
from typing import Any

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.call import Call, Lengths, packed_lengths
from .._host.checks import MAX_HEAD_DIM_BACKWARD, check_kernel_dtype, check_same_kind, fail, layout_of
from .._host.options import with_dropout, with_tensors
from . import reference
from .api import layout_options


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """`flash_attention` or `flash_attention_varlen` into `out`; returns lse.

    Args:
        q, k, v, the options: as in these functions, without autocast.
        lengths: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k); the first two None for a dense batch.
        out: q's shape but for its last dimension, which is v's; q's dtype; any strides, the last dimension contiguous.

    Returns: lse, (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q), fp32.

    Raises: as `flash_attention_varlen`.
    """
    call = _checked_call(q, k, v, lengths, causal, softmax_scale, window_size, alibi_slopes, dropout_p, dropout_seed)
    if out.shape != (*q.shape[:-1], v.shape[-1]) or out.dtype != q.dtype:
        fail("out", f"shape {(*q.shape[:-1], v.shape[-1])}, {q.dtype}", f"shape {tuple(out.shape)}, {out.dtype}")
    if not use_kernel(q):
        result, lse = reference.compute(call, return_lse=True)
        out.copy_(result)
        return lse
    check_kernel_dtype(q)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    _launchers()[0](call, out, lse)
    return lse


def backward_pass(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `forward_pass`, given the gradient of out. k and v may be a part of the keys that lse is over.

    Each gradient has the strides of torch.empty_like of its tensor.

    Raises:
        NotImplementedError: a head dimension above 256, or tensors on the CPU that no interpreter runs kernels on.
    """
    call = _checked_call(q, k, v, lengths, causal, softmax_scale, window_size, None, dropout_p, dropout_seed)
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > MAX_HEAD_DIM_BACKWARD:
        raise NotImplementedError(
            f"q: expected a head dimension to {MAX_HEAD_DIM_BACKWARD} for gradients, got {head_dim}"
        )
    if not use_kernel(q):
        raise NotImplementedError(
            f"q: expected a GPU's tensor, or TRITON_INTERPRET=1, for gradients by the kernels, got {q.device}"
        )
    check_kernel_dtype(q)
    dout, lse = dout if dout.stride(-1) == 1 else dout.contiguous(), lse.contiguous()
    wanted = True, True, True, False
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, _ = _launchers()[1](call, dout, None, out, lse, wanted, deterministic, like_inputs=True)
    return dq, dk, dv


def _checked_call(
    q, k, v, lengths: Any, causal, softmax_scale, window_size, alibi_slopes, dropout_p, dropout_seed
) -> Call:
    check_same_kind(q, k, v)
    is_packed = lengths[0] is not None or lengths[1] is not None
    lengths = packed_lengths(*lengths, device=q.device) if is_packed else Lengths(*lengths)
    layout = layout_of(q, k, v)
    options = layout_options(3 if is_packed else 4, layout, causal, softmax_scale, window_size, 0.0)
    options = with_tensors(options, q, lengths.batch(q), alibi_slopes, None)
    return Call(q, k, v, lengths, with_dropout(options, q, dropout_p, dropout_seed), layout)


@functools.cache
def _launchers() -> tuple[Any, Any]:
    """Imported at the first call, so that the package can be imported without triton."""
    from ..dense.backward import launch_flash_bwd
    from .forward import launch_flash_fwd

    return launch_flash_fwd, launch_flash_bwd
