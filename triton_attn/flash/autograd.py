"""The flash kernels as torch operators, for autograd, torch.compile and export.

A plain call launches the kernel directly, forward and backward; a torch operator costs 10 to 16 microseconds more.
"""

import torch
from torch import Tensor

from .._host.call import LENGTHS_SCHEMA, Call, call_of, lengths_as_arguments, lengths_of_arguments
from .._host.layout import new_outputs
from .._host.observers import is_observed
from .._host.options import AttentionOptions
from ..dense.backward import launch_flash_bwd
from .forward import launch_flash_fwd

# A Call as arguments of an operator, tensors first.
_NUM_TENSORS = 11
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, Tensor? shard, "
    f"{LENGTHS_SCHEMA}, float softmax_scale, SymInt? window_left, SymInt? window_right, float? softcap, float dropout_p"
)


def attend(call: Call, deterministic: bool, check_values: bool) -> tuple[Tensor, Tensor]:
    """out and lse by the operator."""
    softmax_scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, shard, _ = call.options
    tensors = call.q, call.k, call.v, sinks, alibi_slopes, dropout_seed, shard
    numbers = softmax_scale, *window, softcap, dropout_p
    return flash_attention(*tensors, *lengths_as_arguments(call.lengths), *numbers, deterministic, check_values)


def _call_of_arguments(*args):
    q, k, v, sinks, alibi_slopes, dropout_seed, shard, *lengths, softmax_scale, left, right, softcap, dropout_p = args
    dropout = dropout_p, dropout_seed
    options = AttentionOptions(softmax_scale, (left, right), softcap, alibi_slopes, sinks, *dropout, shard)
    return call_of(q, k, v, options, lengths_of_arguments(*lengths))


def _flash_attention(*args):
    *args, _, check_values = args
    call = _call_of_arguments(*args)
    if check_values:
        call.check_values()
    out, lse = new_outputs(call.q, call.v)
    launch_flash_fwd(call, out, lse)
    return out, lse


flash_attention = torch.library.custom_op(
    "triton_attn::flash_attention",
    _flash_attention,
    mutates_args=(),
    schema=f"({_SCHEMA}, bool deterministic, bool check_values) -> (Tensor, Tensor)",
)


@flash_attention.register_fake
def _(q, k, v, *rest):
    return new_outputs(q, v)


def _flash_attention_backward(dout, dlse, out, lse, *args):
    """Gradients of q, k, v and sinks; an empty tensor for one that is not wanted."""
    *args, deterministic, wanted = args
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    call = _call_of_arguments(*args)
    gradients = launch_flash_bwd(call, dout, dlse, out, lse, tuple(wanted), deterministic)
    return tuple(call.q.new_empty(0) if gradient is None else gradient for gradient in gradients)


flash_attention_backward = torch.library.custom_op(
    "triton_attn::flash_attention_backward",
    _flash_attention_backward,
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}, bool deterministic, bool[] wanted) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
)


@flash_attention_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, sinks, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if is_wanted else q.new_empty(0)
        for x, is_wanted in zip((q, k, v, sinks), rest[-1])
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:_NUM_TENSORS])
    ctx.numbers = inputs[_NUM_TENSORS:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[:4])
    saved = dout, dlse, out, lse, *tensors
    run = flash_attention_backward if is_observed(*saved) else _flash_attention_backward
    gradients = run(*saved, *ctx.numbers, wanted)
    gradients = [gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted)]
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - 4))


flash_attention.register_autograd(_backward, setup_context=_setup_context)


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of flash attention are not supported")


flash_attention_backward.register_autograd(_second_backward)
