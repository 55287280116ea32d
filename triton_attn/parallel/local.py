"""What one rank computes: attention of some of its queries over some keys, its own or received ones."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..flash import row_sums_pass
from .balance import Chunk, Segment, Sharding, on_device


class Rows(NamedTuple):
    """Tensors (rows, ...) of queries, and of keys, which are what travels between ranks."""

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]

    def with_keys(self, joined_keys: Tensor) -> "Rows":
        """With the keys of a tensor of `join`."""
        return self._replace(keys=split(joined_keys, self.keys))


class Results(NamedTuple):
    """Of the queries of documents: the gradient of out, lse over all keys, and what `row_sums_pass` makes of them."""

    dout: Tensor
    lse: Tensor
    minus_delta: Tensor


Gradients = tuple[list[Tensor], list[Tensor], list[Tensor]]  # of queries, keys and parameters: those that are wanted


class Wanted(NamedTuple):
    """Which tensors have gradients. All ranks agree on it, since gradients of keys travel."""

    queries: tuple[bool, ...]
    keys: tuple[bool, ...]
    parameters: tuple[bool, ...]

    def pick(self, *gradients: Iterable[Any]) -> Gradients:
        """Of those of all queries, keys and parameters."""
        of_queries, of_keys, of_parameters = map(list, map(itertools.compress, gradients, self))
        return of_queries, of_keys, of_parameters


class Mask(NamedTuple):
    """What decides which keys a query sees, and whether more than this depends on their positions."""

    left: int  # -1: unlimited
    right: int  # of a causal mask 0
    has_alibi: bool
    has_dropout: bool

    @property
    def window(self) -> tuple[int, int]:
        return self.left, self.right

    @property
    def is_full(self) -> bool:
        """Whether all queries see all keys alike, wherever they are."""
        return self.window == (-1, -1) and not self.has_alibi and not self.has_dropout

    @property
    def is_plainly_causal(self) -> bool:
        return self.window == (-1, 0) and not self.has_alibi and not self.has_dropout

    def keys_of(self, queries: Chunk, document: Chunk) -> Chunk:
        """The keys of the document that some of the queries see."""
        start = document.start if self.left < 0 else max(queries.start - self.left, document.start)
        return Chunk(start, document.end if self.right < 0 else min(queries.end + self.right, document.end))


class Attention(Protocol):
    """What a rank computes of a part of a call, and the parameters with which it does.

    Implemented by `HeadAttention` and `LatentAttention`.
    """

    @property
    def wanted(self) -> Wanted: ...

    @property
    def num_heads(self) -> int:
        """Of the queries of all ranks that exchange them."""
        ...

    @property
    def num_heads_kv(self) -> int: ...

    @property
    def head_dim_v(self) -> int: ...

    @property
    def sinks(self) -> Tensor | None: ...

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The others, to whose gradients every part adds."""
        ...

    @property
    def of_each_head(self) -> tuple[Tensor, ...]:
        """Those that may have gradients, in the order of these; their first dimension is that of the heads."""
        ...

    def of_heads(self, heads: slice) -> "Attention":
        """With some of the query heads."""
        ...

    def forward(self, part: "Part", rows: Rows, out: Tensor | None = None, with_sinks: bool = True) -> Any:
        """(out, lse) of the part's queries over its keys; into `out` if it is given."""
        ...

    def gradients(self, part: "Part", results: Results, rows: Rows) -> Gradients:
        """The part's share of those of its queries, of its keys, and of the parameters, in the order of the tensors."""
        ...


class Problem(NamedTuple):
    """A call as all ranks know it, and which of them this is."""

    sharding: Sharding
    mask: Mask
    attention: Any  # an Attention
    group: dist.ProcessGroup
    rank: int

    @property
    def ranks(self) -> range:
        return range(self.sharding.num_ranks)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Of this rank."""
        return self.sharding.segments[self.rank]

    @property
    def num_queries(self) -> int:
        """This rank's rows without those that belong to no document, which are its last."""
        return self.segments[-1].rows.end if self.segments else 0


class Pair(NamedTuple):
    """Queries of one document, among the rows of a rank, that attend to keys, among the rows of a tensor of keys."""

    document: int
    queries: Chunk
    keys: Chunk
    query: int  # the position in the document of the first query
    key: int

    def with_queries_of(self, other: "Pair") -> "Pair":
        """Of the queries of both, of which the other's follow these."""
        return self._replace(queries=Chunk(self.queries.start, other.queries.end))

    @property
    def is_aligned(self) -> bool:
        """To the bottom right."""
        return self.query + self.queries.size == self.key + self.keys.size

    def sees_all(self, mask: Mask) -> bool:
        """Whether each query sees each key."""
        last_query, last_key = self.query + self.queries.size - 1, self.key + self.keys.size - 1
        return (mask.left < 0 or last_query - self.key <= mask.left) and (
            mask.right < 0 or last_key - self.query <= mask.right
        )


class _Entry(NamedTuple):
    """A sequence of a packed call: so many queries and keys."""

    num_queries: int
    num_keys: int
    pair: Pair | None  # None: rows between those of two pairs; there are queries or keys alone


@dataclass(frozen=True, eq=False)
class Part:
    """One call of attention; see `parts_of`."""

    queries: Chunk  # the rows of q that it takes
    keys: Chunk
    entries: tuple[_Entry, ...]
    window: tuple[int, int]
    needs_positions: bool

    @property
    def is_dense(self) -> bool:
        return len(self.entries) == 1

    @functools.cached_property
    def _longest(self) -> tuple[int, int]:
        return max(entry.num_queries for entry in self.entries), max(entry.num_keys for entry in self.entries)

    @functools.cached_property
    def _tensors(self) -> dict[Any, Tensor]:
        return {}

    def take(self, rows: Rows) -> list[Tensor]:
        """Its queries and its keys, with a batch of one sequence if it is dense."""
        taken = [x[self.queries.rows] for x in rows.queries] + [x[self.keys.rows] for x in rows.keys]
        return [x[None] for x in taken] if self.is_dense else taken

    def results(self, results: Results) -> list[Tensor]:
        """Those of its queries, in the same form."""
        dout, *of_rows = results
        taken = [dout[self.queries.rows], *(x[:, self.queries.rows] for x in of_rows)]
        return [x[None] for x in taken] if self.is_dense else taken

    def give(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What was computed of them, without the batch."""
        return [x[0] for x in tensors] if self.is_dense else list(tensors)

    def _tensor(self, device, name, values_of, *args):
        """values_of(*args) in int32 on the device, made and copied once."""
        key = device, name, args
        if key not in self._tensors:
            with torch.inference_mode(False):  # a later call may save it for its backward pass
                self._tensors[key] = on_device(torch.tensor(values_of(*args), dtype=torch.int32), device)
        return self._tensors[key]

    def lengths(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Those of `forward_pass`."""
        if self.is_dense:
            return None, None, *self._longest
        queries, keys = (self._tensor(device, "cu_seqlens", self._cu_seqlens, side) for side in (0, 1))
        return queries, keys, *self._longest

    def _cu_seqlens(self, side):
        return list(itertools.accumulate((entry[side] for entry in self.entries), initial=0))

    def documents(self, device: torch.device) -> Tensor:
        """Of each entry."""
        return self._tensor(device, "documents", self._documents)

    def _documents(self):
        return [entry.pair.document if entry.pair else 0 for entry in self.entries]

    def shard(self, device: torch.device, num_heads: int, first_head: int) -> Tensor:
        """That of `flash_attention`; num_heads are those of the whole."""
        return self._tensor(device, "shard", self._shard, num_heads, first_head)

    def _shard(self, num_heads, first_head):
        pairs = (entry.pair for entry in self.entries)
        return [(p.query, p.key, p.document * num_heads + first_head) if p else (0, 0, 0) for p in pairs]


def parts_of(pairs: Iterable[Pair], mask: Mask) -> tuple[Part, ...]:
    """The fewest calls for the pairs, which are in the order of their queries.

    Sequences of a packed call follow each other in q and in k, so pairs with common queries or keys need several calls.
    """
    groups: list[list[Pair]] = []
    for pair in pairs:
        for group in groups:
            if group[-1].queries.end <= pair.queries.start and group[-1].keys.end <= pair.keys.start:
                group.append(pair)
                break
        else:
            groups.append([pair])
    return tuple(_part_of(group, mask) for group in groups)


def _part_of(pairs, mask):
    entries = []
    end_q, end_k = pairs[0].queries.start, pairs[0].keys.start
    for pair in pairs:
        gap_q, gap_k = pair.queries.start - end_q, pair.keys.start - end_k
        entries += [entry for entry in (_Entry(gap_q, 0, None), _Entry(0, gap_k, None)) if any(entry[:2])]
        entries.append(_Entry(pair.queries.size, pair.keys.size, pair))
        end_q, end_k = pair.queries.end, pair.keys.end
    # Without positions Hopper's kernel takes the call.
    window, needs_positions = mask.window, mask.has_dropout
    if not mask.has_dropout and not mask.has_alibi and all(pair.sees_all(mask) for pair in pairs):
        window = -1, -1
    else:
        needs_positions = needs_positions or not all(pair.is_aligned for pair in pairs)
    queries, keys = Chunk(pairs[0].queries.start, end_q), Chunk(pairs[0].keys.start, end_k)
    return Part(queries, keys, tuple(entries), window, needs_positions)


def no_results(problem: Problem, rows: Rows, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """out, in the dtype of the queries or another, and lse of queries that have seen no key."""
    q = rows.queries[0]
    out = q.new_zeros((*q.shape[:-1], problem.attention.head_dim_v), dtype=dtype)
    return out, torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype_of_sums(q), device=q.device)


def attend_once(problem: Problem, parts: Iterable[Part], rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of all queries, whose keys are in one part each."""
    out, lse = no_results(problem, rows)
    end = 0
    for part in parts:
        own_out, own_lse = out[part.queries.rows], lse[:, part.queries.rows]
        if part.queries.start >= end:
            own_lse.copy_(problem.attention.forward(part, rows, own_out)[1])
        else:  # Queries of other parts lie between those of this one. Their out is 0, and their lse no key's.
            of_part = problem.attention.forward(part, rows)
            own_out += of_part[0]
            torch.maximum(own_lse, of_part[1], out=own_lse)
        end = max(end, part.queries.end)
    return out, lse


def results_of(
    problem: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Results, Tensor | None]:
    """(Results, gradient of the sinks if it is wanted), computed once for all keys. Rows that belong to no document are
    left out."""
    queries = slice(problem.num_queries)
    lse = lse[:, queries].contiguous()
    dlse = None if dlse is None else dlse[:, queries]
    sinks = problem.attention.sinks if any(problem.attention.wanted.parameters) else None
    minus_delta, dsinks = row_sums_pass(dout[queries], dlse, out[queries], lse, sinks)
    return Results(dout, lse, minus_delta), dsinks


class Sums:
    """Gradients to which the parts of a backward pass add, those that are wanted: of queries in some dtype, of
    parameters in that of sums; and those of sinks."""

    def __init__(self, problem: Problem, rows: Rows, results: tuple[Any, ...], dtype_of_queries: torch.dtype):
        self._attention = problem.attention
        self._results, dsinks = results_of(problem, *results)
        queries, keys, parameters = problem.attention.wanted.pick(*rows, problem.attention.parameters)
        self._keys, self._dtype = keys, dtype_of_sums(rows.queries[0])
        self.queries, self.parameters = _zeros(queries, dtype_of_queries), _zeros(parameters, self._dtype)
        self.needs_keys = bool(queries or keys or parameters)  # the gradient of sinks alone does not
        self.parameters += [] if dsinks is None else [dsinks]

    @property
    def has_keys(self) -> bool:
        """Whether gradients of keys are wanted."""
        return bool(self._keys)

    def zeros_of_keys(self, num_rows: int) -> Tensor:
        """Gradients of keys to begin with, side by side."""
        num_elements = sum(x.shape[1:].numel() for x in self._keys)
        return self._results.dout.new_zeros((num_rows, num_elements), dtype=self._dtype)

    def gradients_of_keys(self, of_keys: Tensor) -> list[Tensor]:
        """Of this rank's keys, in their dtype."""
        return [_copy(x, like.dtype) for x, like in zip(split(of_keys, self._keys), self._keys)]

    def add(self, part: Part, rows: Rows, of_keys: Tensor) -> None:
        """Those of a part; of_keys are sums of all keys of `rows`."""
        totals = [x[part.queries.rows] for x in self.queries], split(of_keys[part.keys.rows], self._keys)
        found = self._attention.gradients(part, self._results, rows)
        for of_kind, parts in zip((*totals, self.parameters), found):
            for total, gradient in zip(of_kind, parts):
                total += gradient


def _zeros(tensors, dtype):
    return [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in tensors]


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """fp32, and fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def join(tensors: tuple[Tensor, ...]) -> Tensor:
    """(rows, elements of a row of all of them)"""
    return torch.cat([x.flatten(1) for x in tensors], 1)


def split(joined: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of what `join` has joined, with the shapes that rows of other tensors have."""
    shapes = [x.shape[1:] for x in like]
    parts = joined.split([shape.numel() for shape in shapes], 1)
    return tuple(x.unflatten(1, shape) if len(shape) > 1 else x for x, shape in zip(parts, shapes))


def _copy(x, dtype):
    """A contiguous tensor of its own: outputs of an operator share no memory."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
