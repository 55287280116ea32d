"""Context parallelism for autograd, and as torch operators: torch.compile and others see one operator, no collective.

A call that nothing observes, or autograd alone, makes do without them, as in flash/autograd.py.
"""

import abc
import functools
import math
from itertools import chain, compress
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.functional import pad

from .._host.observers import SingleLevelFunction, is_observed, refuse_transforms
from . import gather, ring, ulysses, whole
from .agreement import agree, compare, digest_of, group_of_mesh, kind_of, refuse, settle, values_of
from .balance import (
    Sharding,
    as_given,
    bounds_of,
    check_num_rows,
    described,
    in_order,
    in_teams,
    rows_at_most,
    rows_of_rank,
    sharding_of,
    sharding_of_batch,
)
from .cost import HeadDims, choose, ranks_of, sizes_of
from .local import Attention, Mask, Problem, Rows, Wanted, dtype_of_sums


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, checked."""

    batch: int | None  # sequences of one length; None: packed documents
    seqlen: int  # of each of them, or rows of the whole packed batch
    load_balance: str | None
    group: str  # the name of a process group
    inner: str | None  # of that of the mesh's second dimension, over which heads are exchanged; None: there is one
    method: str  # over the first dimension
    check_values: bool
    part: tuple[int, ...] | None  # of DTensors: this rank's first sequence, their number, its first head, their number
    wanted: tuple[bool, ...]  # which tensors with rows and which parameters have gradients
    options: Any  # those of a kind of attention


class Kind(abc.ABC):
    """A kind of attention, as operators see it.

    Inputs are a NamedTuple of tensors: with rows, of num_queries of queries and then of keys; then parameters, which
    have gradients and no rows; then others, of which cu_seqlens is the last. Options are a NamedTuple of numbers and
    strings. head_dims are ints, of which the first is the number of heads and the last that of elements of a head of
    out.
    """

    name: str
    inputs: Any
    options: Any
    num_queries: int
    num_rows: int
    num_parameters: int
    operator: Any = None  # after `register`
    gradients: Any = None  # another operator

    @abc.abstractmethod
    def head_dims(self, inputs: Any) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def shapes_of_rows(self, head_dims: Any) -> list[tuple[int, ...]]:
        """Of one row of each tensor that has rows."""

    @abc.abstractmethod
    def costs_of(self, head_dims: Any) -> HeadDims:
        """What the cost model has to know."""

    @abc.abstractmethod
    def mask(self, others: Any, options: Any) -> Mask:
        """others are the tensors without rows."""

    @abc.abstractmethod
    def attention(self, wanted: Wanted, others: Any, options: Any, head_dims: Any) -> Attention: ...

    @abc.abstractmethod
    def check(self, sharding: Sharding, inputs: Any, settings: Settings, mesh_shape: tuple[int, ...]) -> None:
        """Raise for what this kind cannot do over these ranks."""

    @abc.abstractmethod
    def described(self, options: Any) -> dict[str, Any]:
        """The options by their names for users, as far as ranks must agree on them."""

    def arguments(self, inputs: Any, settings: Settings) -> tuple[Any, ...]:
        """Of the operator."""
        return *inputs, *settings[:-1], *settings.options

    def inputs_of(self, arguments: Any) -> Any:
        return self.inputs(*arguments[: len(self.inputs._fields)])

    def settings_of(self, arguments: Any) -> Settings:
        """From the last of an operator's arguments."""
        number = len(self.options._fields)
        *placing, part, wanted = arguments[-number - len(Settings._fields) + 1 : -number]
        part = None if part is None else tuple(part)
        return Settings(*placing, part, tuple(wanted), self.options(*arguments[-number:]))

    def wanted(self, settings: Settings) -> Wanted:
        of_rows, number = settings.wanted[: self.num_rows], self.num_queries
        return Wanted(of_rows[:number], of_rows[number:], settings.wanted[self.num_rows :])


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


def attend(kind: Kind, inputs: Any, settings: Settings) -> tuple[Tensor, Tensor]:
    """out and lse. A call that more than autograd sees goes through an operator."""
    if settings.method == "auto":
        with_choice = _with_traced_method if torch.compiler.is_compiling() else _with_method
        settings = with_choice(kind, inputs, settings)
    tensors = dict(zip(kind.inputs._fields[:-1], inputs))
    if not is_observed(*tensors.values()):
        return _compute(kind, inputs, settings)[:2]
    refuse_transforms(**tensors)
    arguments = kind.arguments(inputs, settings)
    if is_observed(*tensors.values(), but_autograd=True):
        return kind.operator(*arguments)[:2]
    return _ContextParallel.apply(*arguments, kind)


def _compute(kind, inputs, settings):
    """out, lse, and what the backward pass of Ulysses needs."""
    groups, head_dims, others = _groups_of(settings), kind.head_dims(inputs), inputs[kind.num_rows :]
    sharding = _checked_sharding(kind, inputs, settings, groups)
    if sharding.num_ranks > 1:
        _agree(kind, sharding, inputs, settings, groups)
    settings = _with_choice(kind, sharding, settings, head_dims, inputs[0].dtype, others, with_ulysses=False)
    problem, method, exchange = _problem_of(kind, sharding, settings, head_dims, others, groups)
    rows = _rows_of(kind, inputs, sharding, groups.rank)
    if exchange is None:
        out, lse, kept = *method.forward(problem, rows), []
    else:
        out, lse, kept = ulysses.forward(problem, rows, exchange)
    return as_given(sharding, groups.rank, out), as_given(sharding, groups.rank, lse, 1), kept


def _rows_of(kind, tensors, sharding, rank):
    """In the order of the whole."""
    rows = tuple(in_order(sharding, rank, x) for x in tensors[: kind.num_rows])
    return Rows(rows[: kind.num_queries], rows[kind.num_queries :])


def _with_method(kind, inputs, settings):
    """The settings with the method that "auto" takes, which is the same on all ranks."""
    sharding, others = _checked_sharding(kind, inputs, settings, _groups_of(settings)), inputs[kind.num_rows :]
    return _with_choice(kind, sharding, settings, kind.head_dims(inputs), inputs[0].dtype, others)


def _with_traced_method(kind, inputs, settings):
    """As `_with_method`, for a graph that has the lengths as constants; for others it is chosen as they come."""
    if settings.batch is None or settings.inner is not None:
        return settings
    lengths, sizes = (settings.batch, settings.seqlen), tuple(kind.costs_of(kind.head_dims(inputs)))
    mask = tuple(kind.mask(inputs[kind.num_rows :], settings.options))
    if not all(has_static_value(x) for x in (*lengths, *sizes, *mask) if x is not None):
        return settings
    placing = settings.load_balance, settings.group
    return settings._replace(method=_chosen(sizes, inputs[0].dtype, lengths, mask, placing))


@torch.compiler.assume_constant_result
def _chosen(sizes, dtype, lengths, mask, placing):
    load_balance, group = placing
    ranks = ranks_of(_resolve_process_group(group))
    sharding = sharding_of_batch(*lengths, ranks.number, load_balance)
    return choose(sizes_of(HeadDims(*sizes), dtype, sharding, Mask(*mask), ranks))


def _with_choice(kind, sharding, settings, head_dims, dtype, others, with_ulysses=True):
    """Settings without "auto". An operator chooses without Ulysses: a graph must know the sizes of what that keeps."""
    if settings.method != "auto":
        return settings
    mask = kind.mask(others, settings.options)
    ranks = (ranks_of(group) for group in _groups_of(settings) if group is not None)
    sizes = sizes_of(kind.costs_of(head_dims), dtype, sharding, mask, *ranks)
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
    return batch * rows_of_rank(seqlen, *place, settings.load_balance)


def _sharding(cu_seqlens, settings, num_ranks):
    if settings.batch is None:
        bounds = bounds_of(cu_seqlens, settings.seqlen)
        return sharding_of(bounds, settings.seqlen, num_ranks, settings.load_balance)
    return sharding_of_batch(settings.batch, settings.seqlen, num_ranks, settings.load_balance)


def _checked_sharding(kind, inputs, settings, groups):
    """The Sharding. Raises where this rank's tensors do not suit it, and tells the other ranks."""
    num_ranks = math.prod(groups.shape)
    try:
        sharding = _sharding(inputs.cu_seqlens, settings, num_ranks)
        batch = 1 if settings.batch is None else settings.batch
        check_num_rows(sharding, groups.rank, inputs[0].shape[0] // max(batch, 1), batch)
        kind.check(sharding, inputs, settings, groups.shape)
    except (TypeError, ValueError) as error:
        refuse(groups.whole, error)
        raise
    return sharding


def _problem_of(kind, sharding, settings, head_dims, others, groups):
    """(Problem, module of the method, ulysses.Exchange or None). The Problem is that of the method, so with an Exchange
    of a mesh's first dimension, whose ranks are all of the second together."""
    outer, inner, exchange = *groups, None
    method, rank = {"all_gather": gather, "ring": ring, "ulysses": whole}[settings.method], dist.get_rank(outer)
    if inner is not None or method is whole:
        number, rank = (1, 0) if inner is None else (groups.shape[0], rank)
        sharding, teams = in_teams(sharding, number)
        of_heads = outer if inner is None else inner
        of_rows = kind.shapes_of_rows(head_dims), kind.num_queries
        exchange = ulysses.Exchange(of_heads, dist.get_rank(of_heads), teams[rank], method, *of_rows)
    options = settings.options
    attention = kind.attention(kind.wanted(settings), others, options, head_dims)
    return Problem(sharding, kind.mask(others, options), attention, outer, rank), method, exchange


def _agree(kind, sharding, inputs, settings, groups):
    """Find out whether all ranks make the same call, see agreement.py."""
    names, number = kind.inputs._fields, kind.num_rows
    kinds = [(tuple(x.shape[1:]), x.dtype) for x in inputs[:number]] + [kind_of(x) for x in inputs[number:-1]]
    description, digest = _described(kind, sharding, settings, tuple(kinds), groups.shape)
    if settings.check_values:
        values = ((name, x) for name, x in zip(names[number:-1], inputs[number:-1]) if x is not None)
        compare(description | {name: values_of(x) for name, x in values}, groups.whole)
    agree(groups.whole, description, digest, inputs[0].device)


@functools.lru_cache(maxsize=256)
def _described(kind, sharding, settings, kinds, mesh_shape):
    """(description, digest) of a call."""
    description = dict(attention=kind.name, batch=settings.batch, seqlen=settings.seqlen)
    description |= dict(load_balance=described(settings.load_balance), **dict(zip(kind.inputs._fields, kinds)))
    description |= kind.described(settings.options) | dict(mesh=mesh_shape)
    description["requires_grad"] = ", ".join(compress(kind.inputs._fields, settings.wanted)) or "none"
    part = settings.part or ()
    for what, first, size in zip(("sequences", "heads"), part[::2], part[1::2]):
        description[f"{kind.inputs._fields[0]}'s {what}"] = f"[{first}, {first + size})"
    if settings.batch is None:
        description["cu_seqlens"] = sharding.bounds
    description["method"] = settings.method  # last: "auto" follows from the others
    return description, digest_of(description)


_SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str"}
_SCHEMA_TYPES |= {x | None: f"{name}?" for x, name in _SCHEMA_TYPES.items()} | {
    tuple[bool, ...]: "bool[]",
    tuple[int, ...] | None: "SymInt[]?",
}


def _schema_of(fields):
    """The fields of a NamedTuple as arguments of a torch operator, without `options`."""
    types = get_type_hints(fields)
    return [f"{_SCHEMA_TYPES[types[name]]} {name}" for name in fields._fields if name != "options"]


def register(kind: Kind) -> Kind:
    """Make the operators of a kind of attention."""
    tensors, settings = _schema_of(kind.inputs), _schema_of(Settings) + _schema_of(kind.options)
    of_gradients = ["Tensor dout", "Tensor? dlse", "Tensor[] kept", *tensors[kind.num_rows :], "SymInt[] head_dims"]
    gradients = ["Tensor"] * (kind.num_rows + kind.num_parameters)
    forward = torch.library.custom_op(
        f"triton_attn::{kind.name}",
        functools.partial(_compute_as_told, kind),
        mutates_args=(),
        schema=f"({', '.join(tensors + settings)}) -> (Tensor, Tensor, Tensor[])",
    )
    backward = torch.library.custom_op(
        f"triton_attn::{kind.name}_backward",
        functools.partial(_compute_gradients, kind),
        mutates_args=(),
        schema=f"({', '.join(of_gradients + settings)}) -> ({', '.join(gradients)})",
    )
    forward.register_fake(functools.partial(_fake, kind))
    backward.register_fake(functools.partial(_fake_gradients, kind))
    forward.register_autograd(functools.partial(_backward, kind), setup_context=functools.partial(_setup_context, kind))
    backward.register_autograd(_second_backward)
    kind.operator, kind.gradients = forward, backward
    return kind


def _compute_as_told(kind, *args):
    """What Ulysses keeps has the rows that the fake kernel says."""
    inputs, settings = kind.inputs_of(args), kind.settings_of(args)
    out, lse, kept = _compute(kind, inputs, settings)
    if kept:
        joined, out_of_heads, lse_of_heads = kept
        missing = _num_kept(settings, inputs.cu_seqlens) - joined.shape[0]
        if missing:
            kept = [pad(joined, (0, 0, 0, missing)), pad(out_of_heads, (0, 0, 0, 0, 0, missing))]
            kept.append(pad(lse_of_heads, (0, missing)))
    return out, lse, kept


def _fake(kind, *args):
    inputs, settings = kind.inputs_of(args), kind.settings_of(args)
    like, head_dims = inputs[0], kind.head_dims(inputs)
    num_rows, num_heads, head_dim_v = like.shape[0], head_dims[0], head_dims[-1]
    dtype, kept = dtype_of_sums(like), []
    if settings.method == "ulysses" or settings.inner is not None:
        num_ranks = _groups_of(settings).shape[-1]
        heads, seqlen = num_heads // num_ranks, _num_kept(settings, inputs.cu_seqlens)
        shares = ulysses.shapes_of_share(kind.shapes_of_rows(head_dims), num_ranks)
        num_elements = sum(number * dim for number, dim in shares)
        shapes = (seqlen, num_elements), (seqlen, heads, head_dim_v), (heads, seqlen)
        dtypes = like.dtype, like.dtype, dtype
        kept = [like.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    out = like.new_empty((num_rows, num_heads, head_dim_v))
    return out, like.new_empty((num_heads, num_rows), dtype=dtype), kept


def _compute_gradients(kind, dout, dlse, kept, *args):
    """Gradients of the tensors with rows and of the parameters, an empty tensor for each that is not wanted.

    kept are the tensors with rows, out and lse, or what the forward pass of Ulysses returned; args the tensors without
    rows, head_dims and the settings.
    """
    settings, number = kind.settings_of(args), len(kind.inputs._fields) - kind.num_rows
    others, head_dims = args[:number], tuple(args[number])
    groups = _groups_of(settings)
    if math.prod(groups.shape) > 1:
        settle(groups.whole)
    sharding = _sharding(others[-1], settings, math.prod(groups.shape))
    settings = _with_choice(kind, sharding, settings, head_dims, dout.dtype, others, with_ulysses=False)
    problem, method, exchange = _problem_of(kind, sharding, settings, head_dims, others, groups)
    rank = groups.rank
    dout, dlse = in_order(sharding, rank, dout), None if dlse is None else in_order(sharding, rank, dlse, 1)
    if exchange is None:
        out, lse = in_order(sharding, rank, kept[-2]), in_order(sharding, rank, kept[-1], 1)
        found = method.backward(problem, _rows_of(kind, kept, sharding, rank), dout, dlse, out, lse)
    else:
        joined, out, lse = (x.narrow(dim, 0, exchange.num_rows) for x, dim in zip(kept, (0, 0, 1)))
        found = ulysses.backward(problem, [joined, out, lse], dout, dlse, exchange)
    of_queries, of_keys, of_parameters = found
    gradients = chain((as_given(sharding, rank, x) for x in (*of_queries, *of_keys)), of_parameters)
    dtypes = _dtypes_of_gradients(kind, others, dout.dtype)
    return tuple(
        next(gradients).to(dtype) if is_wanted else dout.new_empty(0)
        for is_wanted, dtype in zip(settings.wanted, dtypes)
    )


def _fake_gradients(kind, dout, dlse, kept, *args):
    number = len(kind.inputs._fields) - kind.num_rows
    shapes = [(dout.shape[0], *shape) for shape in kind.shapes_of_rows(args[number])]
    shapes += [None if x is None else x.shape for x in args[: kind.num_parameters]]
    wanted, dtypes = kind.settings_of(args).wanted, _dtypes_of_gradients(kind, args, dout.dtype)
    return tuple(
        dout.new_empty(shape, dtype=dtype) if is_wanted else dout.new_empty(0)
        for shape, dtype, is_wanted in zip(shapes, dtypes, wanted)
    )


def _dtypes_of_gradients(kind, others, of_rows):
    return [of_rows] * kind.num_rows + [of_rows if x is None else x.dtype for x in others[: kind.num_parameters]]


def _setup_context(kind, ctx, inputs, output):
    tensors = kind.inputs_of(inputs)
    out, lse, kept = output
    kept = kept or (*tensors[: kind.num_rows], out, lse)
    ctx.save_for_backward(*tensors[kind.num_rows :], *kept)
    ctx.numbers = [*kind.head_dims(tensors)], *inputs[len(tensors) :]
    ctx.set_materialize_grads(False)


def _backward(kind, ctx, dout, dlse, *_):
    *tensors, out, lse = ctx.saved_tensors
    number = len(kind.inputs._fields) - kind.num_rows
    others, kept = tensors[:number], [*tensors[number:], out, lse]
    if dout is None:  # of this rank; others may have one
        dout = _zeros_of_rows(out, dlse)
    is_seen = is_observed(dout, dlse, *kept, *others)
    run = kind.gradients if is_seen else functools.partial(_compute_gradients, kind)
    found = run(dout, dlse, kept, *others, *ctx.numbers)
    wanted = ctx.needs_input_grad
    return *(x if is_wanted else None for x, is_wanted in zip(found, wanted)), *[None] * (len(wanted) - len(found))


class _ContextParallel(SingleLevelFunction):
    """A call that autograd alone sees."""

    @staticmethod
    def forward(ctx, *arguments):
        *arguments, ctx.kind = arguments
        output = _compute_as_told(ctx.kind, *arguments)
        _setup_context(ctx.kind, ctx, arguments, output)
        return output[:2]

    @staticmethod
    def backward(ctx, dout, dlse):
        return _backward(ctx.kind, ctx, dout, dlse)


def _zeros_of_rows(out, dlse):
    """A gradient of out, of this rank's rows and all heads, where only lse has one."""
    return out.new_zeros((dlse.shape[1], dlse.shape[0], out.shape[2]))


def _second_backward(ctx, *gradients):
    raise NotImplementedError("second derivatives of context-parallel attention are not supported")
