"""The forward and the backward pass of a prefill, for callers that have their own autograd function."""

from typing import Any

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.call import Lengths
from .._host.layout import lse_shape
from .._host.observers import without_autocast
from . import reference
from .api import PrefillCall
from .schedule import ProblemSizes, choose_schedule


def forward_pass(
    tensors: list[Tensor],
    lengths: tuple[Any, ...],
    *,
    causal: bool,
    softmax_scale: float,
    schedule: tuple[str, int, bool],
    out: Tensor,
) -> Tensor:
    """`mla_prefill` of six checked tensors into `out`; returns lse.

    lengths: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k); the first two None for a dense batch. schedule:
    (mode, max_workspace_bytes, whether a gradient is wanted).
    """
    call = PrefillCall(*tensors, Lengths(*lengths), softmax_scale, causal)
    if use_kernel(out):
        from .autograd import launch_prefill  # the package can be imported without triton

        lse = out.new_empty(lse_shape(out), dtype=torch.float32)
        launch_prefill(out, lse, call, schedule)
        return lse
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = call.lengths
    result, lse = reference.mla_prefill(
        *tensors,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softmax_scale=softmax_scale,
        mode=choose_schedule(ProblemSizes.of(call), *schedule).mode,
        return_lse=True,
    )
    out.copy_(result)
    return lse


@without_autocast
def gradients_pass(
    dout: Tensor,
    lse: Tensor,
    minus_delta: Tensor,
    tensors: list[Tensor],
    lengths: tuple[Any, ...],
    *,
    causal: bool,
    softmax_scale: float,
    max_workspace_bytes: int,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the six tensors of `forward_pass`, those of kv_latent and k_pe in fp32 (fp64 for fp64).

    wanted: which of them; kernels do not compute the others, which may be empty. lse and minus_delta, dlse -
    rowsum(dout * out), may be over more keys than kv_latent has.
    """
    call = PrefillCall(*tensors, Lengths(*lengths), softmax_scale, causal)
    if not use_kernel(dout):
        return reference.prefill_gradients(dout, lse, minus_delta, call)
    from .autograd import prefill_gradients

    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return prefill_gradients(call, (dout, lse, minus_delta), max_workspace_bytes, wanted)
