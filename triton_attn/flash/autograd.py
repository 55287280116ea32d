"""The flash kernels for autograd, and as torch operators for torch.compile, export and other observers.

A plain call launches the kernel directly, forward and backward. A torch operator costs 10 to 16 microseconds more, and
one that autograd sees 150. So where autograd is the only observer, the call is a torch.autograd.Function, which costs
15. It keeps the same tensors for the same backward pass, since a checkpoint may run one of the two again as the other.
"""

import torch
from torch import Tensor

from .._host.call import LENGTHS_SCHEMA, Call, call_of, lengths_as_arguments, lengths_of_arguments
from .._host.layout import new_outputs
from .._host.observers import SingleLevelFunction, is_observed
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
    return flash_attention(*_arguments_of(call), deterministic, check_values)


def _arguments_of(call):
    softmax_scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, shard, _ = call.options
    tensors = call.q, call.k, call.v, sinks, alibi_slopes, dropout_seed, shard
    return *tensors, *lengths_as_arguments(call.lengths), softmax_scale, *window, softcap, dropout_p


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


def gradients_of(dout, dlse, out, lse, *args):
    """Gradients of q, k, v and sinks, None for one that is not wanted."""
    *args, deterministic, wanted = args
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return launch_flash_bwd(_call_of_arguments(*args), dout, dlse, out, lse, wanted, deterministic)


def _flash_attention_backward(dout, *args):
    """As `gradients_of`, but an empty tensor for one that is not wanted."""
    return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in gradients_of(dout, *args))


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
    _keep(ctx, inputs[:-1], output)


def _keep(ctx, arguments, output):
    ctx.save_for_backward(*output, *arguments[:_NUM_TENSORS])
    ctx.numbers = arguments[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    needs_grad = ctx.needs_input_grad
    wanted, nothing = list(needs_grad[:4]), (None,) * (len(needs_grad) - 4)
    saved = dout, dlse, out, lse, *tensors
    if not is_observed(*saved):
        return *gradients_of(*saved, *ctx.numbers, wanted), *nothing
    gradients = flash_attention_backward(*saved, *ctx.numbers, wanted)
    return *(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted)), *nothing


flash_attention.register_autograd(_backward, setup_context=_setup_context)


class FlashAttention(SingleLevelFunction):
    """A call that autograd alone sees."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, call, checked):
        output = checked.outputs.new(q, True)
        launch_flash_fwd(call, *output)
        _keep(ctx, (*_arguments_of(call), checked.deterministic), output)
        return output

    backward = staticmethod(_backward)


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of flash attention are not supported")


flash_attention_backward.register_autograd(_second_backward)
