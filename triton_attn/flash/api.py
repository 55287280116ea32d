"""Public API of flash attention: argument checks, then the kernel or the reference."""

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from torch import Tensor

from .._host import keywords
from .._host.backend import should_check_values, use_kernel
from .._host.call import Call, Lengths, Problem, check_packed, packed_lengths, problem_of
from .._host.checks import (
    check_bool,
    check_kernel_dtype,
    check_last_contiguous,
    check_qkv_layout,
    check_same_kind,
    check_tensor,
    layout_of,
)
from .._host.dtensors import DENSE, PACKED, attend_shards, has_dtensor
from .._host.known import check_once, sides_of, window_of
from .._host.layout import Outputs, outputs_of
from .._host.observers import autocast, is_observed, refuse_transforms, refuse_vmap, wants_gradients
from .._host.options import (
    AttentionOptions,
    attention_options,
    check_head_tensors,
    check_shard,
    with_dropout,
    with_tensors,
)
from . import reference

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: "Unpack[keywords.Flash]"
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: "Unpack[keywords.Flash]"
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: "Unpack[keywords.Flash]"
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    shard: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, without the matrix of scores in memory.

        out[b, i, h] = sum_j softmax_j(s[b, h, i, j]) v[b, j, h // group_size]
        s[b, h, i, j] = softcap * tanh(x / softcap) - slope[h] * |i + seqlen_k - seqlen_q - j|
        x = softmax_scale * q[b, i, h] . k[b, j, h // group_size],  group_size = num_heads_q // num_heads_kv

    over the keys j that query i sees: i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right.
    group_size query heads share one KV head: group_size 1 is MHA, num_heads_q is MQA, between is GQA.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), fp16, bf16 or fp32; head_dim 1 to 512. Any strides, the last
            dimension contiguous. fp32 matmuls follow torch.get_float32_matmul_precision().
        k: (batch, seqlen_k, num_heads_kv, head_dim), q's dtype and device. num_heads_kv divides num_heads_q.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v); head_dim_v 1 to 512, independent of head_dim.
        causal: query i sees no key after its own position (right = 0), aligned to the bottom right.
        softmax_scale: factor on q . k, above 0. None means head_dim ** -0.5.
        window_size: (left, right) keys around the query's position; -1 is unlimited.
        softcap: bound of the scores, in natural units; 0 means none.
        alibi_slopes: fp32 (num_heads_q,) or (batch, num_heads_q); None means none.
        sinks: (num_heads_q,), fp32 or q's dtype: one more logit per head in the sum of the softmax, without a value.
        dropout_p: each weight is dropped with this probability, 0 <= dropout_p < 1, and the others are divided by
            1 - dropout_p. lse is that of the softmax without dropout.
        dropout_seed: an int, or an int64 tensor of one element on q's device; None draws one from torch's generator.
            `triton_attn.reference.dropout_mask` gives the mask of a seed.
        deterministic: the backward pass repeats bitwise (no atomics), with seven matmuls per tile instead of five.
            torch.use_deterministic_algorithms has the same effect. The forward pass always repeats bitwise.
        shard: int32 (batch, 3) on q's device: the call is a part of a longer self-attention, with some of its queries
            and some of its keys. For each sequence: the position of the first query, the position of the first key, and
            the index of the first head as dropout counts it, which is sequence * num_heads_q + head in the whole call.
            Masks, ALiBi and dropout are then those of the whole. None: whole sequences, aligned to the bottom right.
        out: tensor for the result: any strides, the last dimension contiguous, no memory in common with the inputs. Not
            where a gradient is wanted. Under torch.compile and other observers the result is copied to it.
        return_lse: also return the natural log-sum-exp of the scores, including the sink.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype, and with return_lse also lse
        (batch, num_heads_q, seqlen_q) in fp32. A query that sees no key has out = 0 and lse = -inf, or the sink.

    DTensors: q, k and v are all Shard(0), all Shard(2), or all Replicate() on each dimension of their mesh; beside q
    with Shard(2), k and v may be Replicate(). Each rank attends for its sequences and heads, nothing is moved, and out
    and lse are DTensors placed like q. sinks and alibi_slopes are whole plain tensors, or DTensors with Replicate() or
    with Shard on the heads. The ranks divide the query heads and, if they are sharded, the KV heads. Any other
    placement raises; for sharded sequences see `triton_attn.parallel.context_parallel_attention`.

    First derivatives of out and lse are supported with respect to q, k, v and sinks.
    Under torch.autocast q, k and v are cast as for torch's own attention. torch.compile, export and dispatch modes see
    one operator, and autograd one node.

    Raises:
        TypeError, ValueError: an argument is wrong, or a sequence or packed batch has more than 10**9 rows; nothing was
            launched.
        NotImplementedError: gradients of alibi_slopes, second derivatives, forward mode, torch.func except vmap, which
            loops, and `out` with gradients or vmap.

    Example:
        >>> q = torch.randn(2, 100, 8, 64)
        >>> k = v = torch.randn(2, 100, 2, 64)
        >>> out, lse = triton_attn.flash_attention(q, k, v, causal=True, window_size=(31, 0), return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 100, 8, 64]), torch.Size([2, 8, 100]))

    Source: Dao, FlashAttention-2 (2023), arXiv:2307.08691; online softmax: Milakov and Gimelshein (2018),
    arXiv:1805.02867; ALiBi: arXiv:2108.12409; sinks: arXiv:2309.17453.
    """
    if not (type(q) is type(k) is type(v) is Tensor) and has_dtensor(q, k, v):
        options = dict(
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            deterministic=deterministic,
            shard=shard,
            out=out,
            return_lse=return_lse,
        )
        return attend_shards(flash_attention, DENSE, (q, k, v), (), options)
    q, k, v = autocast(q, k, v)
    numbers = causal, softmax_scale, softcap, deterministic, return_lse, *sides_of(window_size)
    checked = check_call((q, k, v, alibi_slopes, sinks, shard, out), numbers)
    options = with_tensors(checked.options, alibi_slopes, sinks, shard)
    options = with_dropout(options, q, dropout_p, dropout_seed)
    check_values = shard is not None and should_check_values(None)
    return _attend(Call(q, k, v, checked.lengths, options, checked.problem), checked, check_values, out)


@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[keywords.FlashVarlen]",
) -> Tensor: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[keywords.FlashVarlen]",
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[keywords.FlashVarlen]",
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    shard: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` for a batch of sequences that are concatenated without padding.

    Sequence i has the queries [cu_seqlens_q[i], cu_seqlens_q[i + 1]) and the keys [cu_seqlens_k[i],
    cu_seqlens_k[i + 1]); masks are aligned to the bottom right of each sequence.

    Args:
        q: (total_q, num_heads_q, head_dim).
        k, v: (total_k, num_heads_kv, head_dim) and (total_k, num_heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device, from 0, non-decreasing. Lengths may be 0.
        max_seqlen_q, max_seqlen_k: the longest lengths, ints. Results for queries past max_seqlen_q, and gradients of
            keys past max_seqlen_k, are undefined. A tensor of one int costs a device-to-host sync, also under
            torch.compile, where it does not break the graph.
        check_values: check the values of cu_seqlens and shard on the host, which costs a device-to-host sync. None
            follows the environment variable TRITON_ATTN_CHECK=1.
        The rest as in `flash_attention`.

    Returns:
        out (total_q, num_heads_q, head_dim_v) in q's dtype, and with return_lse also lse (num_heads_q, total_q) in
        fp32. Rows after cu_seqlens[-1] belong to no sequence. They influence nothing; their out and gradients are 0 and
        their lse is -inf. Lengths beyond the last row count as ending there.

    Raises: as `flash_attention`; ValueError for bad values in cu_seqlens if they are checked.

    Example:
        >>> q = k = v = torch.randn(60, 2, 64)  # two sequences, of 40 and 20 tokens
        >>> cu_seqlens = torch.tensor([0, 40, 60], dtype=torch.int32)
        >>> out = triton_attn.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 40, 40, causal=True)
        >>> out.shape
        torch.Size([60, 2, 64])
    """
    if not (type(q) is type(k) is type(v) is Tensor) and has_dtensor(q, k, v):
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        options = dict(
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            deterministic=deterministic,
            shard=shard,
            out=out,
            return_lse=return_lse,
            check_values=check_values,
        )
        return attend_shards(flash_attention_varlen, PACKED, (q, k, v), lengths, options)
    q, k, v = autocast(q, k, v)
    numbers = causal, softmax_scale, softcap, deterministic, return_lse, *sides_of(window_size)
    checked = check_call((q, k, v, alibi_slopes, sinks, shard, out, cu_seqlens_q, cu_seqlens_k), numbers)
    lengths = packed_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_values = should_check_values(check_values)
    options = with_tensors(checked.options, alibi_slopes, sinks, shard)
    options = with_dropout(options, q, dropout_p, dropout_seed)
    return _attend(Call(q, k, v, lengths, options, checked.problem), checked, check_values, out)


class Checked(NamedTuple):
    """What follows from the kinds of a call's tensors and from its options."""

    options: AttentionOptions  # without tensors
    problem: Problem
    lengths: Any  # Lengths of a dense batch, otherwise None
    deterministic: bool
    return_lse: bool
    outputs: Outputs
    wants_grad: bool
    by_operator: bool  # what is known of a call is known of calls without other observers than autograd


@check_once
def check_call(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Checked:
    """Check all but dropout and the longest lengths of a packed batch, whose tensors include both cu_seqlens."""
    q, k, v, alibi_slopes, sinks, shard, out, *cu_seqlens = tensors
    causal, softmax_scale, softcap, deterministic, return_lse, *sides = numbers
    check_same_kind(q, k, v)
    layout, lengths, batch = layout_of(q, k, v), None, None
    options = checked_options(3 if cu_seqlens else 4, layout, causal, softmax_scale, window_of(sides), softcap)
    if cu_seqlens:
        check_packed(cu_seqlens[0], cu_seqlens[1], q.device)
        batch = cu_seqlens[0].shape[0] - 1
    else:
        lengths = Lengths(None, None, q.shape[1], k.shape[1])
    check_head_tensors(q, q.shape[0] if batch is None else batch, alibi_slopes, sinks)
    if shard is not None:
        check_shard(shard, q, q.shape[0] if batch is None else batch)
    if out is not None:
        check_tensor("out", out, (*q.shape[:-1], v.shape[-1]), (q.dtype,), q.device)
        check_last_contiguous("out", out)
    deterministic = check_bool("deterministic", deterministic)
    return_lse = check_bool("return_lse", return_lse)
    problem = problem_of((q, k, v), batch, with_tensors(options, alibi_slopes, sinks, shard))
    outputs = outputs_of(q.shape, v.shape[-1], q.dtype)
    differentiable = q, k, v, sinks, alibi_slopes
    observers = wants_gradients(*differentiable, out), is_observed(*differentiable, out, but_autograd=True)
    return Checked(options, problem, lengths, deterministic, return_lse, outputs, *observers)


def checked_options(ndim, layout, causal, softmax_scale, window_size, softcap):
    """The checked options of a call, without its tensors."""
    check_qkv_layout(ndim, *layout)
    return attention_options(layout[0][0][-1], causal, softmax_scale, softcap, window_size)


def _attend(call: Call, checked: Checked, check_values: bool, out: Tensor | None) -> Any:
    """out, or (out, lse). autograd.py has what a call that is traced or differentiated goes through."""
    q, k, v, _, options, _ = call
    *_, return_lse, outputs, wants_grad, by_operator = checked
    if out is not None:
        _check_written(call, checked, out)
    if not use_kernel(q):
        if check_values:
            call.check_values()
        return reference.compute(call, return_lse, out)
    check_kernel_dtype(q)
    if by_operator or wants_grad:
        refuse_transforms(q=q, k=k, v=v, sinks=options.sinks, alibi_slopes=options.alibi_slopes)
        if wants_grad:
            check_differentiable(q, v, options.alibi_slopes)
    if by_operator:
        from .autograd import attend  # not cached, of which tracers warn

        result, lse = attend(call, checked.deterministic, check_values)
        out = result if out is None else out.copy_(result)
        return (out, lse) if return_lse else out
    if check_values:
        call.check_values()
    if wants_grad:
        out, lse = _differentiable_kernel()(q, k, v, options.sinks, call, checked)
    else:
        out, lse = outputs.new(q, return_lse, out)
        _kernel()(call, out, lse)
    return (out, lse) if return_lse else out


def _check_written(call, checked, out):
    """A call that writes to `out` has no derivatives, and vmap cannot see what it writes."""
    q, k, v, _, options, _ = call
    if checked.by_operator:
        tensors = dict(q=q, k=k, v=v, sinks=options.sinks, alibi_slopes=options.alibi_slopes, out=out)
        refuse_transforms(**tensors)
        refuse_vmap(**tensors)
    if checked.wants_grad:
        raise NotImplementedError("out: gradients are not supported with it, got a call that wants some; leave it out")


@functools.cache
def _kernel():
    """Imported at the first call, so that the package can be imported without triton."""
    from .forward import launch_flash_fwd

    return launch_flash_fwd


@functools.cache
def _differentiable_kernel():
    from .autograd import FlashAttention

    return FlashAttention.apply


def check_differentiable(q, v, alibi_slopes):
    """Raise at a call that wants gradients, and not in the backward pass, where the cause would be hard to find."""
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise NotImplementedError(
            "alibi_slopes: gradients are not supported, got a tensor that requires one; detach it"
        )
