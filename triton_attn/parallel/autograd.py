"""Context parallelism as torch operators: autograd, checkpoints and torch.compile see one operator, and no collective.

A call that nothing observes makes do without them.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from . import gather, ring, ulysses
from .agreement import compare, digest_of, kind_of, post, refuse, settle, waits_for_transfers
from .balance import bounds_of, check_num_rows, sharding_of, sharding_of_batch
from .cost import choose, sizes_of
from .local import Mask, Problem, Rows, dtype_of_sums


class Inputs(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # (rows, heads, dim), and so k and v
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens: Tensor | None


class Settings(NamedTuple):
    """The other arguments of a call, checked."""

    seed: int | None  # of dropout, if it was not given as a tensor: for ranks to compare
    batch: int | None  # sequences of one length; None: packed documents
    seqlen: int  # of each of them, or rows of the whole packed batch
    load_balance: str | None
    group: str  # the name of a process group
    method: str
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    deterministic: bool
    check_values: bool


_NUM_TENSORS = len(Inputs._fields)
_SETTINGS = (
    "SymInt? seed, SymInt? batch, SymInt seqlen, str? load_balance, str group, str method, float softmax_scale, "
    "SymInt window_left, SymInt window_right, float softcap, float dropout_p, bool deterministic, bool check_values"
)


def compute(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse, and what the backward pass of Ulysses needs."""
    q, k, v, *_ = inputs
    group = _group_of(settings)
    try:
        sharding = _checked_sharding(inputs, settings, group)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    if sharding.num_ranks > 1:
        _agree(sharding, inputs, settings, group)
    problem = _problem_of(sharding, settings, inputs[3:], (q.shape[1], k.shape[1]), group)
    rows = Rows(q, k, v, inputs.sinks)
    if settings.method == "ulysses":
        return ulysses.forward(problem, rows)
    return *_method(problem, settings, k, v).forward(problem, rows), []


def with_method(inputs: Inputs, settings: Settings) -> Settings:
    """The settings with the method that "auto" takes, which is the same on all ranks."""
    group = _group_of(settings)
    try:
        sharding = _checked_sharding(inputs, settings, group)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    sizes = sizes_of(inputs.k, inputs.v, inputs.q.shape[1], sharding, _mask_of(settings, inputs.alibi_slopes), group)
    return settings._replace(method=choose(sizes))


def _method(problem: Problem, settings: Settings, k: Tensor, v: Tensor) -> Any:
    """The module of "all_gather" or "ring". "auto" comes here from compiled graphs alone, whose tensors had to be known
    before the lengths: without "ulysses"."""
    method = settings.method
    if method == "auto":
        sizes = sizes_of(k, v, problem.num_heads, problem.sharding, problem.mask, problem.group)
        method = choose(sizes, with_ulysses=False)
    return gather if method == "all_gather" else ring


def _group_of(settings: Settings) -> dist.ProcessGroup:
    name: Any = settings.group
    return _resolve_process_group(name)


def _sharding(cu_seqlens, settings, num_ranks):
    if settings.batch is None:
        bounds = bounds_of(cu_seqlens, settings.seqlen)
        return sharding_of(bounds, settings.seqlen, num_ranks, settings.load_balance)
    return sharding_of_batch(settings.batch, settings.seqlen, num_ranks, settings.load_balance)


def _checked_sharding(inputs, settings, group):
    """The Sharding. Raises where this rank's tensors do not suit it."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    sharding = _sharding(inputs.cu_seqlens, settings, num_ranks)
    batch = 1 if settings.batch is None else settings.batch
    check_num_rows(sharding, rank, inputs.q.shape[0] // max(batch, 1), batch)
    if settings.method == "ulysses":
        ulysses.check_heads(inputs.q.shape[1], inputs.k.shape[1], num_ranks)
    return sharding


def _problem_of(sharding, settings, tensors, heads, group):
    """tensors: sinks, alibi_slopes, dropout_seed and cu_seqlens. heads: how many of queries and of keys."""
    _, slopes, seed, _ = tensors
    options = dict(
        softmax_scale=settings.softmax_scale,
        softcap=settings.softcap,
        alibi_slopes=slopes,
        dropout_p=settings.dropout_p,
        dropout_seed=seed,
    )
    mask = _mask_of(settings, slopes)
    num_heads, num_heads_kv = heads
    rank = dist.get_rank(group)
    return Problem(sharding, mask, options, settings.deterministic, num_heads, num_heads_kv, group, rank)


def _mask_of(settings, slopes):
    return Mask(settings.window_left, settings.window_right, slopes is not None, settings.dropout_p > 0)


def _agree(sharding, inputs, settings, group):
    """Find out whether all ranks make the same call, see agreement.py."""
    kinds = [(tuple(x.shape[1:]), x.dtype) for x in inputs[:3]] + [kind_of(x) for x in inputs[3:6]]
    description, digest = _described(sharding, settings, tuple(kinds))
    if settings.check_values:
        values = zip(Inputs._fields[3:6], inputs[3:6])
        compare(description | {name: x.tolist() for name, x in values if x is not None}, group)
    post(group, description, digest)
    if waits_for_transfers(inputs.q.device):
        settle(group)


@functools.lru_cache(maxsize=256)
def _described(sharding, settings, kinds):
    """(description, digest) of a call."""
    description = settings._asdict() | dict(zip(Inputs._fields, kinds))
    for name in ("group", "check_values", "window_left", "window_right"):
        del description[name]
    description |= dict(window_size=(settings.window_left, settings.window_right), num_ranks=sharding.num_ranks)
    if settings.batch is None:
        description["cu_seqlens"] = sharding.bounds
    description["method"] = description.pop("method")  # last: "auto" follows from the others
    return description, digest_of(description)


def attend(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """out and lse by the operator."""
    return context_parallel_attention(*inputs, *settings)[:2]


context_parallel_attention = torch.library.custom_op(
    "triton_attn::context_parallel_attention",
    lambda *args: compute(Inputs(*args[:_NUM_TENSORS]), Settings(*args[_NUM_TENSORS:])),
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
        f"Tensor? cu_seqlens, {_SETTINGS}) -> (Tensor, Tensor, Tensor[])"
    ),
)


@context_parallel_attention.register_fake
def _(*args):
    q, k, v = args[:3]
    settings = Settings(*args[_NUM_TENSORS:])
    num_rows, num_heads, head_dim = q.shape
    dtype, kept = dtype_of_sums(q), []
    if settings.method == "ulysses":
        num_ranks = dist.get_world_size(_group_of(settings))
        heads, heads_kv = num_heads // num_ranks, max(k.shape[1] // num_ranks, 1)
        seqlen = settings.seqlen * (1 if settings.batch is None else settings.batch)
        num_elements = heads * head_dim + heads_kv * (head_dim + v.shape[2])
        shapes = ((seqlen, num_elements), q.dtype), ((seqlen, heads, v.shape[2]), q.dtype), ((heads, seqlen), dtype)
        kept = [q.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return q.new_empty((num_rows, num_heads, v.shape[2])), q.new_empty((num_heads, num_rows), dtype=dtype), kept


def _compute_gradients(dout, dlse, kept, sinks, alibi_slopes, dropout_seed, cu_seqlens, heads_kv, head_dim, *settings):
    """dq, dk and dv, and dsinks or an empty tensor. kept: q, k, v, out and lse, or what the forward pass of Ulysses
    returned. heads_kv and head_dim are those of k."""
    settings = Settings(*settings)
    group = _group_of(settings)
    if dist.get_world_size(group) > 1:
        settle(group)
    sharding = _sharding(cu_seqlens, settings, dist.get_world_size(group))
    tensors = sinks, alibi_slopes, dropout_seed, cu_seqlens
    problem = _problem_of(sharding, settings, tensors, (dout.shape[1], heads_kv), group)
    if settings.method == "ulysses":
        *gradients, dsinks = ulysses.backward(problem, kept, sinks, dout, dlse)
    else:
        q, k, v, out, lse = kept
        method = _method(problem, settings, k, v)
        *gradients, dsinks = method.backward(problem, Rows(q, k, v, sinks), dout, dlse, out, lse)
    return *gradients, dout.new_empty(0) if dsinks is None else dsinks


gradients = torch.library.custom_op(
    "triton_attn::context_parallel_attention_backward",
    _compute_gradients,
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlse, Tensor[] kept, Tensor? sinks, Tensor? alibi_slopes, Tensor? dropout_seed, "
        f"Tensor? cu_seqlens, SymInt heads_kv, SymInt head_dim, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@gradients.register_fake
def _(dout, dlse, kept, sinks, alibi_slopes, dropout_seed, cu_seqlens, heads_kv, head_dim, *settings):
    num_rows, num_heads, head_dim_v = dout.shape
    shapes = (num_rows, num_heads, head_dim), (num_rows, heads_kv, head_dim), (num_rows, heads_kv, head_dim_v)
    dsinks = dout.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(dout.new_empty(shape) for shape in shapes), dsinks


def _setup_context(ctx, inputs, output):
    (q, k, v, *tensors), settings = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
    out, lse, kept = output
    kept = kept or (q, k, v, out, lse)
    ctx.save_for_backward(*tensors, *kept)
    ctx.numbers = k.shape[1], k.shape[2], *settings
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):
    *tensors, out, lse = ctx.saved_tensors
    tensors, kept = tensors[:4], [*tensors[4:], out, lse]
    if dout is None:  # of this rank; others may have one
        dout = _zeros_of_rows(out, dlse)
    found = gradients(dout, dlse, kept, *tensors, *ctx.numbers)
    wanted = ctx.needs_input_grad
    return *(x if is_wanted else None for x, is_wanted in zip(found, wanted)), *[None] * (len(wanted) - 4)


def _zeros_of_rows(out, dlse):
    """A gradient of out, of this rank's rows and all heads, where only lse has one."""
    return out.new_zeros((dlse.shape[1], dlse.shape[0], out.shape[2]))


context_parallel_attention.register_autograd(_backward, setup_context=_setup_context)


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of context-parallel attention are not supported")


gradients.register_autograd(_second_backward)
