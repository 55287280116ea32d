"""Context parallelism as torch operators: autograd, checkpoints and torch.compile see one operator, and no collective.

A call that nothing observes makes do without them.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.functional import pad

from . import gather, ring, ulysses, whole
from .agreement import agree, compare, digest_of, group_of_mesh, kind_of, refuse, settle
from .balance import bounds_of, check_num_rows, in_teams, rows_at_most, rows_of_rank, sharding_of, sharding_of_batch
from .cost import choose, ranks_of, sizes_of
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
    inner: str | None  # of that of the mesh's second dimension, over which heads are exchanged; None: there is one
    method: str  # over the first dimension
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    deterministic: bool
    check_values: bool


_NUM_TENSORS = len(Inputs._fields)
_SETTINGS = (
    "SymInt? seed, SymInt? batch, SymInt seqlen, str? load_balance, str group, str? inner, str method, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, float dropout_p, bool deterministic, "
    "bool check_values"
)


class _Groups(NamedTuple):
    """Of the dimensions of a mesh, which this rank is in."""

    outer: dist.ProcessGroup
    inner: dist.ProcessGroup | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dist.get_world_size(group) for group in self if group is not None)

    @property
    def rank(self) -> int:
        rank = dist.get_rank(self.outer)
        return rank if self.inner is None else rank * self.shape[1] + dist.get_rank(self.inner)

    @property
    def whole(self) -> dist.ProcessGroup:
        return group_of_mesh(*self)


def _groups_of(settings: Settings) -> _Groups:
    names: Any = settings.group, settings.inner
    return _Groups(*(None if name is None else _resolve_process_group(name) for name in names))


def compute(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse, and what the backward pass of Ulysses needs."""
    q, k, v, *_ = inputs
    groups = _groups_of(settings)
    sharding = _checked_sharding(inputs, settings, groups)
    if sharding.num_ranks > 1:
        _agree(sharding, inputs, settings, groups)
    settings = _with_choice(sharding, settings, _head_dims(inputs), q, inputs.alibi_slopes, with_ulysses=False)
    problem, method, exchange = _problem_of(sharding, settings, inputs[3:], _head_dims(inputs)[:2], groups)
    rows = Rows(q, k, v, inputs.sinks)
    if exchange is None:
        return *method.forward(problem, rows), []
    return ulysses.forward(problem, rows, exchange)


def with_method(inputs: Inputs, settings: Settings) -> Settings:
    """The settings with the method that "auto" takes, which is the same on all ranks."""
    sharding = _checked_sharding(inputs, settings, _groups_of(settings))
    return _with_choice(sharding, settings, _head_dims(inputs), inputs.q, inputs.alibi_slopes)


def with_traced_method(inputs: Inputs, settings: Settings) -> Settings:
    """As `with_method`, for a graph that has the lengths as constants; for others it is chosen as they come."""
    if settings.batch is None or settings.inner is not None:
        return settings
    lengths, mask = (settings.batch, settings.seqlen), tuple(_mask_of(settings, inputs.alibi_slopes))
    if not all(map(has_static_value, (*lengths, *_head_dims(inputs), *mask))):
        return settings
    placing = settings.load_balance, settings.group
    return settings._replace(method=_chosen(_head_dims(inputs), inputs.q.dtype, lengths, mask, placing))


@torch.compiler.assume_constant_result
def _chosen(head_dims, dtype, lengths, mask, placing):
    load_balance, group = placing
    ranks = ranks_of(_resolve_process_group(group))
    sharding = sharding_of_batch(*lengths, ranks.number, load_balance)
    return choose(sizes_of(head_dims, dtype, sharding, Mask(*mask), ranks))


def _head_dims(inputs):
    """(num_heads_q, num_heads_kv, head_dim, head_dim_v)"""
    return inputs.q.shape[1], *inputs.k.shape[1:], inputs.v.shape[2]


def _with_choice(sharding, settings, head_dims, like, slopes, with_ulysses=True):
    """Settings without "auto". An operator chooses without Ulysses: a graph must know the sizes of what that keeps."""
    if settings.method != "auto":
        return settings
    ranks = (ranks_of(group) for group in _groups_of(settings) if group is not None)
    sizes = sizes_of(head_dims, like.dtype, sharding, _mask_of(settings, slopes), *ranks)
    return settings._replace(method=choose(sizes, with_ulysses=with_ulysses))


def _num_kept(settings, cu_seqlens):
    """Rows of the tensors that Ulysses keeps: those that the ranks of the inner dimension have together, or with
    per_document, where these depend on values of cu_seqlens, a bound."""
    outer, inner = _groups_of(settings)
    seqlen, batch = settings.seqlen, 1 if settings.batch is None else settings.batch
    if inner is None:
        return seqlen * batch
    if settings.load_balance == "per_document":
        return rows_at_most(seqlen, dist.get_world_size(outer), cu_seqlens.shape[0])
    place = dist.get_rank(outer), dist.get_world_size(outer)
    return batch * rows_of_rank(seqlen, *place, settings.load_balance is not None)


def _sharding(cu_seqlens, settings, num_ranks):
    if settings.batch is None:
        bounds = bounds_of(cu_seqlens, settings.seqlen)
        return sharding_of(bounds, settings.seqlen, num_ranks, settings.load_balance)
    return sharding_of_batch(settings.batch, settings.seqlen, num_ranks, settings.load_balance)


def _checked_sharding(inputs, settings, groups):
    """The Sharding. Raises where this rank's tensors do not suit it, and tells the other ranks."""
    num_ranks = math.prod(groups.shape)
    try:
        sharding = _sharding(inputs.cu_seqlens, settings, num_ranks)
        batch = 1 if settings.batch is None else settings.batch
        check_num_rows(sharding, groups.rank, inputs.q.shape[0] // max(batch, 1), batch)
        if settings.method == "ulysses" or settings.inner is not None:
            ulysses.check_heads(inputs.q.shape[1], inputs.k.shape[1], groups.shape[-1])
    except (TypeError, ValueError) as error:
        refuse(groups.whole, error)
        raise
    return sharding


def _problem_of(sharding, settings, tensors, heads, groups):
    """(Problem, module of the method, ulysses.Exchange or None). The Problem is that of the method, so with an Exchange
    of a mesh's first dimension, whose ranks are all of the second together.

    tensors: sinks, alibi_slopes, dropout_seed and cu_seqlens. heads: how many of queries and of keys.
    """
    _, slopes, seed, _ = tensors
    options = dict(
        softmax_scale=settings.softmax_scale,
        softcap=settings.softcap,
        alibi_slopes=slopes,
        dropout_p=settings.dropout_p,
        dropout_seed=seed,
    )
    mask, deterministic = _mask_of(settings, slopes), settings.deterministic
    outer, inner, exchange = *groups, None
    method, rank = {"all_gather": gather, "ring": ring, "ulysses": whole}[settings.method], dist.get_rank(outer)
    if inner is not None or method is whole:
        number, rank = (1, 0) if inner is None else (groups.shape[0], rank)
        sharding, teams = in_teams(sharding, number)
        of_heads = outer if inner is None else inner
        exchange = ulysses.Exchange(of_heads, dist.get_rank(of_heads), teams[rank], method)
    return Problem(sharding, mask, options, deterministic, *heads, outer, rank), method, exchange


def _mask_of(settings, slopes):
    return Mask(settings.window_left, settings.window_right, slopes is not None, settings.dropout_p > 0)


def _agree(sharding, inputs, settings, groups):
    """Find out whether all ranks make the same call, see agreement.py."""
    kinds = [(tuple(x.shape[1:]), x.dtype) for x in inputs[:3]] + [kind_of(x) for x in inputs[3:6]]
    description, digest = _described(sharding, settings, tuple(kinds), groups.shape)
    if settings.check_values:
        values = zip(Inputs._fields[3:6], inputs[3:6])
        compare(description | {name: x.tolist() for name, x in values if x is not None}, groups.whole)
    agree(groups.whole, description, digest, inputs.q.device)


@functools.lru_cache(maxsize=256)
def _described(sharding, settings, kinds, mesh_shape):
    """(description, digest) of a call."""
    description = settings._asdict() | dict(zip(Inputs._fields, kinds))
    for name in ("group", "inner", "check_values", "window_left", "window_right"):
        del description[name]
    description |= dict(window_size=(settings.window_left, settings.window_right), mesh=mesh_shape)
    if settings.batch is None:
        description["cu_seqlens"] = sharding.bounds
    description["method"] = description.pop("method")  # last: "auto" follows from the others
    return description, digest_of(description)


def attend(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """out and lse by the operator."""
    return context_parallel_attention(*inputs, *settings)[:2]


def _compute(*args):
    """What Ulysses keeps has the rows that the fake kernel says."""
    inputs, settings = Inputs(*args[:_NUM_TENSORS]), Settings(*args[_NUM_TENSORS:])
    out, lse, kept = compute(inputs, settings)
    if kept:
        joined, out_of_heads, lse_of_heads = kept
        missing = _num_kept(settings, inputs.cu_seqlens) - joined.shape[0]
        if missing:
            kept = [pad(joined, (0, 0, 0, missing)), pad(out_of_heads, (0, 0, 0, 0, 0, missing))]
            kept.append(pad(lse_of_heads, (0, missing)))
    return out, lse, kept


context_parallel_attention = torch.library.custom_op(
    "triton_attn::context_parallel_attention",
    _compute,
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
    if settings.method == "ulysses" or settings.inner is not None:
        num_ranks = _groups_of(settings).shape[-1]
        heads, heads_kv = num_heads // num_ranks, max(k.shape[1] // num_ranks, 1)
        seqlen = _num_kept(settings, args[_NUM_TENSORS - 1])
        num_elements = heads * head_dim + heads_kv * (head_dim + v.shape[2])
        shapes = ((seqlen, num_elements), q.dtype), ((seqlen, heads, v.shape[2]), q.dtype), ((heads, seqlen), dtype)
        kept = [q.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return q.new_empty((num_rows, num_heads, v.shape[2])), q.new_empty((num_heads, num_rows), dtype=dtype), kept


def _compute_gradients(dout, dlse, kept, sinks, alibi_slopes, dropout_seed, cu_seqlens, heads_kv, head_dim, *settings):
    """dq, dk and dv, and dsinks or an empty tensor. kept: q, k, v, out and lse, or what the forward pass of Ulysses
    returned. heads_kv and head_dim are those of k."""
    settings = Settings(*settings)
    groups = _groups_of(settings)
    if math.prod(groups.shape) > 1:
        settle(groups.whole)
    sharding = _sharding(cu_seqlens, settings, math.prod(groups.shape))
    head_dims = dout.shape[1], heads_kv, head_dim, dout.shape[2]
    settings = _with_choice(sharding, settings, head_dims, dout, alibi_slopes, with_ulysses=False)
    tensors = sinks, alibi_slopes, dropout_seed, cu_seqlens
    problem, method, exchange = _problem_of(sharding, settings, tensors, head_dims[:2], groups)
    if exchange is None:
        q, k, v, out, lse = kept
        *gradients, dsinks = method.backward(problem, Rows(q, k, v, sinks), dout, dlse, out, lse)
    else:
        joined, out, lse = (x.narrow(dim, 0, exchange.num_rows) for x, dim in zip(kept, (0, 0, 1)))
        *gradients, dsinks = ulysses.backward(problem, [joined, out, lse], sinks, dout, dlse, exchange)
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
