"""mla_prefill for autograd, and as torch operators for other observers. The backward pass recomputes keys and values.

For a chunk of heads at a time it recomputes them, takes their gradients from the backward kernels of flash attention,
and multiplies these to gradients of latent vectors and weights. What goes through an operator and what does not is as
in flash/autograd.py.
"""

import torch

from .._host.call import LENGTHS_SCHEMA, call_of, lengths_as_arguments, lengths_of_arguments
from .._host.observers import SingleLevelFunction, is_observed, without_autocast
from .._host.options import AttentionOptions
from ..dense.backward import launch_flash_bwd_of_sums, launch_row_sums
from .absorbed import launch_mla_absorbed
from .api import PrefillCall
from .prefill import launch_mla_fused, launch_mla_materialized, project_rows
from .schedule import ProblemSizes, heads_of_backward, schedule_of

# A PrefillCall and the limit of its workspace as arguments of an operator, tensors first.
_NUM_TENSORS = 10
_NUM_ARGUMENTS = 15
_SCHEMA = (
    "Tensor q_nope, Tensor q_pe, Tensor kv_latent, Tensor k_pe, Tensor w_uk, Tensor w_uv, "
    f"{LENGTHS_SCHEMA}, float softmax_scale, bool causal, SymInt max_workspace_bytes"
)


def prefill_by_operator(call, schedule, check_values):
    """(out, lse) of a PrefillCall. schedule is (mode, max_workspace_bytes, whether a gradient is wanted)."""
    mode, max_workspace_bytes, wants_grad = schedule
    return mla_prefill(*_arguments_of(call, max_workspace_bytes), mode, wants_grad, check_values)


def _arguments_of(call, max_workspace_bytes):
    return *call.tensors, *lengths_as_arguments(call.lengths), call.softmax_scale, call.causal, max_workspace_bytes


def _call_of_arguments(*args):
    *tensors, softmax_scale, causal = args
    return PrefillCall(*tensors[:6], lengths_of_arguments(*tensors[6:]), softmax_scale, causal)


def _new_outputs(q_nope, w_uv):
    *batch, rows, num_heads, _ = q_nope.shape
    out = q_nope.new_empty((*batch, rows, num_heads, w_uv.shape[1]))
    return out, q_nope.new_empty((*batch, num_heads, rows), dtype=torch.float32)


@without_autocast
def launch_prefill(out, lse, call, schedule):
    """Fill out and lse (None: not wanted)."""
    mode, heads_each, rows_each = schedule_of(call, schedule)
    if mode == "fused":
        launch_mla_fused(call, out, lse)
    elif mode == "absorbed":
        launch_mla_absorbed(call, out, lse, heads_each)
    else:
        launch_mla_materialized(call, out, lse, (heads_each, rows_each))


def _mla_prefill(*args):
    *args, max_workspace_bytes, mode, wants_grad, check_values = args
    call = _call_of_arguments(*args)
    out, lse = _new_outputs(call.q_nope, call.w_uv)
    if check_values:
        call.check_values()
    launch_prefill(out, lse, call, (mode, max_workspace_bytes, wants_grad))
    return out, lse


mla_prefill = torch.library.custom_op(
    "triton_attn::mla_prefill",
    _mla_prefill,
    mutates_args=(),
    schema=f"({_SCHEMA}, str mode, bool wants_grad, bool check_values) -> (Tensor, Tensor)",
)


@mla_prefill.register_fake
def _(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, *rest):
    return _new_outputs(q_nope, w_uv)


@without_autocast
def gradients_of(dout, dlse, out, lse, *args):
    """Gradients of the six tensors, None for each that is not wanted."""
    *args, max_workspace_bytes, wanted = args
    call = _call_of_arguments(*args)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    minus_delta, _ = launch_row_sums(dout, dlse, out, lse, call.lengths, None)
    gradients = prefill_gradients(call, (dout, lse, minus_delta), max_workspace_bytes, wanted)
    return tuple(
        gradient.to(x.dtype) if is_wanted else None for gradient, x, is_wanted in zip(gradients, call.tensors, wanted)
    )


def _mla_prefill_backward(dout, *args):
    """As `gradients_of`, but an empty tensor for one that is not wanted."""
    return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in gradients_of(dout, *args))


mla_prefill_backward = torch.library.custom_op(
    "triton_attn::mla_prefill_backward",
    _mla_prefill_backward,
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}, bool[] wanted) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


def prefill_gradients(call, results, max_workspace_bytes, wanted):
    """Gradients of the six tensors of a PrefillCall, of kv_latent and k_pe in fp32; empty where they are not wanted.

    results are (dout, lse, -delta of `launch_row_sums`); the last two may be over more keys than kv_latent has.
    """
    dout, *sums = results
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv = inputs = call.tensors
    cu_seqlens_k = call.lengths.cu_seqlens_k
    num_heads, nope, _ = w_uk.shape
    options = AttentionOptions(call.softmax_scale, (None, 0 if call.causal else None), None, None, None)
    wants_q, wants_k, wants_v = wanted[0] or wanted[1], wanted[2] or wanted[3] or wanted[4], wanted[2] or wanted[5]
    # Contributions of heads are added in fp32.
    dtypes = [torch.float32 if x is kv_latent or x is k_pe else x.dtype for x in inputs]
    dq_nope, dq_pe, dlatent, dk_pe, dw_uk, dw_uv = gradients = [
        torch.zeros(x.shape if is_wanted else 0, dtype=dtype, device=x.device)
        for x, dtype, is_wanted in zip(inputs, dtypes, wanted)
    ]
    heads_each = heads_of_backward(ProblemSizes.of(call), max_workspace_bytes)
    if cu_seqlens_k is not None:
        # Matmuls include the rows after the last sequence. Their gradients are 0, but 0 times NaN would be NaN.
        rows = torch.arange(kv_latent.shape[0], device=kv_latent.device)
        kv_latent = kv_latent.masked_fill((rows >= cu_seqlens_k[-1]).unsqueeze(1), 0.0)
    latents = kv_latent.flatten(0, -2)
    for first in range(0, num_heads, heads_each):
        heads = slice(first, first + heads_each)
        q = torch.cat([q_nope[..., heads, :], q_pe[..., heads, :]], dim=-1)
        k, v = _keys_and_values(kv_latent, k_pe, w_uk[heads], w_uv[heads])
        dq, dk, dv = launch_flash_bwd_of_sums(
            call_of(q, k, v, options, call.lengths),
            dout[..., heads, :],
            [_of_heads(x, heads) for x in sums],
            (wants_q, wants_k, wants_v),
            torch.are_deterministic_algorithms_enabled(),
        )
        if wanted[0]:
            dq_nope[..., heads, :] = dq[..., :nope]
        if wanted[1]:
            dq_pe[..., heads, :] = dq[..., nope:]
        if wanted[3]:
            dk_pe += dk[..., nope:].sum(-2, dtype=torch.float32)
        for x, w, dw, wants_w in ((dk, w_uk, dw_uk, wanted[4]), (dv, w_uv, dw_uv, wanted[5])):
            if not (wanted[2] or wants_w):
                continue
            x = x[..., : w.shape[1]].flatten(0, -3)  # (rows, heads, dim)
            if wanted[2]:
                dlatent += torch.einsum("rhd,hdc->rc", x, w[heads]).view_as(kv_latent)
            if wants_w:
                dw[heads] = torch.einsum("rhd,rc->hdc", x, latents)
    return gradients


@mla_prefill_backward.register_fake
def _(dout, dlse, out, lse, q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip((q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv), rest[-1])
    )


def _of_heads(x, heads):
    """These heads of x (..., heads, rows), contiguous, from a multiple of 16 bytes on: a kernel is compiled again for
    an address that is none."""
    x = x[..., heads, :].contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _keys_and_values(kv_latent, k_pe, w_uk, w_uv):
    """Keys (..., heads, nope + rope) and values (..., heads, v) of these heads; heads outermost in memory."""
    *rows, _ = kv_latent.shape
    num_rows, nope = kv_latent[..., 0].numel(), w_uk.shape[1]
    k = kv_latent.new_empty((len(w_uk), num_rows, nope + k_pe.shape[-1]))
    v = kv_latent.new_empty((len(w_uv), num_rows, w_uv.shape[1]))
    project_rows(kv_latent, 0, num_rows, w_uk, k[..., :nope])
    project_rows(kv_latent, 0, num_rows, w_uv, v)
    k[..., nope:] = k_pe.flatten(0, -2)
    return tuple(x.unflatten(1, rows).movedim(0, -2) for x in (k, v))


def _setup_context(ctx, inputs, output):
    _keep(ctx, inputs[:_NUM_ARGUMENTS], output)


def _keep(ctx, arguments, output):
    ctx.save_for_backward(*output, *arguments[:_NUM_TENSORS])
    ctx.numbers = arguments[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    needs_grad = ctx.needs_input_grad
    wanted, nothing = list(needs_grad[:6]), (None,) * (len(needs_grad) - 6)
    saved = dout, dlse, out, lse, *tensors
    if not is_observed(*saved):
        return *gradients_of(*saved, *ctx.numbers, wanted), *nothing
    gradients = mla_prefill_backward(*saved, *ctx.numbers, wanted)
    return *(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted)), *nothing


mla_prefill.register_autograd(_backward, setup_context=_setup_context)


class LatentPrefill(SingleLevelFunction):
    """A call that autograd alone sees."""

    @staticmethod
    def forward(ctx, q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, call, schedule, outputs):
        output = outputs.new(q_nope, True)
        launch_prefill(*output, call, schedule)
        _keep(ctx, _arguments_of(call, schedule[1]), output)
        return output

    backward = staticmethod(_backward)


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of mla_prefill are not supported")


mla_prefill_backward.register_autograd(_second_backward)
