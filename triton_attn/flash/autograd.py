"""The flash kernels as torch operators, for whoever traces or differentiates: autograd, torch.compile, export.

A plain call launches the kernel directly; a torch operator costs 10 to 16 microseconds more.
"""

import torch
from torch import Tensor

from .._host.checks import check_packed_values, read_lengths
from .._host.options import AttentionOptions, dropout_arguments
from ..dense.backward import launch_flash_bwd
from .forward import launch_flash_fwd, new_outputs


@torch.library.custom_op("triton_attn::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    longest_q: Tensor | None,
    longest_k: Tensor | None,
    seqlen_q: int | None,
    seqlen_k: int | None,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    check_values: bool,
) -> tuple[Tensor, Tensor]:
    """A length is a number, or a tensor that tracing could not read."""
    seqlen_q, seqlen_k = read_lengths(longest_q, longest_k, seqlen_q, seqlen_k)
    if check_values:
        check_packed_values((cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k), q.shape[0], k.shape[0])
    out, lse = new_outputs(q, v)
    dropout = dropout_arguments(dropout_p, dropout_seed)
    options = AttentionOptions(softmax_scale, (window_left, window_right), softcap, alibi_slopes, sinks, dropout)
    launch_flash_fwd(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, options)
    return out, lse


@flash_attention.register_fake
def _(q, k, v, *rest):
    return new_outputs(q, v)


@torch.library.custom_op("triton_attn::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    longest_q: Tensor | None,
    longest_k: Tensor | None,
    seqlen_q: int | None,
    seqlen_k: int | None,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks; an empty tensor for one that is not wanted."""
    seqlen_q, seqlen_k = read_lengths(longest_q, longest_k, seqlen_q, seqlen_k)
    dropout = dropout_arguments(dropout_p, dropout_seed)
    options = AttentionOptions(softmax_scale, (window_left, window_right), softcap, alibi_slopes, sinks, dropout)
    gradients = launch_flash_bwd(
        dout if dout.stride(-1) == 1 else dout.contiguous(),
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        seqlen_q,
        seqlen_k,
        options,
        tuple(wanted),
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


@flash_attention_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, sinks, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if is_wanted else q.new_empty(0)
        for x, is_wanted in zip((q, k, v, sinks), rest[-1])
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.scalars = inputs[10:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[:4])
    gradients = flash_attention_backward(dout, dlse, out, lse, *tensors, *ctx.scalars, wanted)
    gradients = [gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted)]
    return (*gradients, *[None] * 15)


flash_attention.register_autograd(_backward, setup_context=_setup_context)


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of flash attention are not supported")


flash_attention_backward.register_autograd(_second_backward)
