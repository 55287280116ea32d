"""The two passes of flash attention one by one, for a caller that records gradients itself. Autograd sees neither."""

import functools

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.checks import MAX_HEAD_DIM_BACKWARD, check_cu_seqlens, check_kernel_dtype, check_same_kind, fail, layout_of
from .._host.options import dropout_arguments, with_tensors
from . import reference
from .api import check_dropout, layout_options


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
    options = _checked_options(q, k, v, lengths, causal, softmax_scale, window_size, alibi_slopes)
    dropout_p, dropout_seed = check_dropout(q, dropout_p, dropout_seed)
    if out.shape != (*q.shape[:-1], v.shape[-1]) or out.dtype != q.dtype:
        fail("out", f"shape {(*q.shape[:-1], v.shape[-1])}, {q.dtype}", f"shape {tuple(out.shape)}, {out.dtype}")
    if not use_kernel(q):
        dropout = dict(dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True)
        if lengths[0] is None:
            result, lse = reference.flash_attention(q, k, v, **options.as_arguments(), **dropout)
        else:
            result, lse = reference.flash_attention_varlen(q, k, v, *lengths, **options.as_arguments(), **dropout)
        out.copy_(result)
        return lse
    check_kernel_dtype(q)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    options = options._replace(dropout=dropout_arguments(dropout_p, dropout_seed))
    _launchers()[0](q, k, v, out, lse, *lengths, options)
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
    options = _checked_options(q, k, v, lengths, causal, softmax_scale, window_size, None)
    dropout_p, dropout_seed = check_dropout(q, dropout_p, dropout_seed)
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
    options = options._replace(dropout=dropout_arguments(dropout_p, dropout_seed))
    wanted = True, True, True, False
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    tensors = dout, None, q, k, v, out, lse
    *gradients, _ = _launchers()[1](*tensors, *lengths, options, wanted, deterministic, like_inputs=True)
    return tuple(gradients)


def _checked_options(q, k, v, lengths, causal, softmax_scale, window_size, alibi_slopes):
    check_same_kind(q, k, v)
    cu_seqlens_q, cu_seqlens_k, *_ = lengths
    batch, ndim = q.shape[0], 4
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            fail("cu_seqlens_k", f"cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape))
        batch, ndim = cu_seqlens_q.shape[0] - 1, 3
    layout = layout_of(q, k, v)
    options = layout_options(ndim, layout, causal, softmax_scale, window_size, 0.0)
    return with_tensors(options, q, batch, alibi_slopes, None)


@functools.cache
def _launchers():
    """Loaded with the first call, so that the package imports where triton is not installed."""
    from ..dense.backward import launch_flash_bwd
    from .forward import launch_flash_fwd

    return launch_flash_fwd, launch_flash_bwd
