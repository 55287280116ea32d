"""Method "all_gather": each rank fetches the keys and values that its queries see, and attends to them at once.

A rank sends a key only to the ranks that have a query that sees it: under a window, to its neighbours. Keys and values
are fetched again in the backward pass, so between the passes a rank holds its own rows alone.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .balance import Chunk, Sharding, keys_seen_by, split_rows
from .exchange import exchange
from .local import Problem, Results, Rows, zeros_in_fp32


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's rows."""
    fetched = _fetch(problem, rows.k, rows.v)
    parts = []
    for queries, q in zip(problem.chunks, split_rows(rows.q, problem.chunks)):
        keys = problem.keys_of(queries)
        parts.append(problem.forward(Rows(q, *fetched.of(keys), rows.sinks), queries, keys))
    outs, lses = zip(*parts)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def backward(problem: Problem, rows: Rows, results: Results) -> tuple[Tensor | None, ...]:
    """Gradients of the rows and, of the sinks, this rank's part."""
    fetched = _fetch(problem, rows.k, rows.v)
    totals = _Fetched(fetched.ranges, *(zeros_in_fp32(x) for x in fetched[1:]))
    dqs, dsinks = [], None if rows.sinks is None else torch.zeros_like(rows.sinks)
    for queries, q, of_queries in zip(
        problem.chunks, split_rows(rows.q, problem.chunks), results.split(problem.chunks)
    ):
        keys = problem.keys_of(queries)
        given = Rows(q, *fetched.of(keys), rows.sinks)
        dq, dk, dv, part = problem.backward(of_queries, given, queries, keys)
        dqs.append(dq)
        for total, gradient in zip(totals.of(keys), (dk, dv)):
            total += gradient
        if dsinks is not None:
            dsinks += part
    dk, dv = _return(problem, totals, rows)
    return torch.cat(dqs, 1), dk, dv, dsinks


class _Fetched(NamedTuple):
    """Keys and values, or their gradients, of disjoint ranges of the sequence, one after the other."""

    ranges: tuple[Chunk, ...]
    k: Tensor
    v: Tensor

    def of(self, keys: Chunk) -> list[Tensor]:
        """Views of those of keys that lie in one of the ranges."""
        first = 0
        for among in self.ranges:
            if among.start <= keys.start and keys.end <= among.end:
                break
            first += among.size
        else:
            return [x[:, :0] for x in self[1:]]  # of no key
        return [x.narrow(1, first + keys.start - among.start, keys.size) for x in self[1:]]


class _Route(NamedTuple):
    """What a rank sends to each rank, and receives from it. A piece is (first among the sender's rows, Chunk)."""

    sent: tuple[tuple[tuple[int, Chunk], ...], ...]
    received: tuple[tuple[tuple[int, Chunk], ...], ...]
    ranges: tuple[Chunk, ...]  # of the keys that this rank's queries see


@functools.lru_cache(maxsize=64)
def _route(sharding: Sharding, window: tuple[int, int], rank: int) -> _Route:
    """The route of a rank."""
    ranks = range(sharding.num_ranks)
    own = ranges_seen(sharding, window, rank)
    sent = tuple(_pieces(sharding.chunks[rank], ranges_seen(sharding, window, to)) for to in ranks)
    return _Route(sent, tuple(_pieces(sharding.chunks[source], own) for source in ranks), own)


@functools.lru_cache(maxsize=64)
def most_keys_seen(sharding: Sharding, window: tuple[int, int]) -> int:
    """Keys that the queries of one rank see: of the rank that sees most."""
    ranges = (ranges_seen(sharding, window, rank) for rank in range(sharding.num_ranks))
    return max(sum(keys.size for keys in of_rank) for of_rank in ranges)


def ranges_seen(sharding: Sharding, window: tuple[int, int], rank: int) -> tuple[Chunk, ...]:
    """The disjoint ranges of keys that the queries of a rank see, in order."""
    ranges: list[Chunk] = []
    for keys in sorted(keys_seen_by(queries, window, sharding.seqlen) for queries in sharding.chunks[rank]):
        if ranges and keys.start <= ranges[-1].end:
            ranges[-1] = Chunk(ranges[-1].start, max(keys.end, ranges[-1].end))
        elif keys.size:
            ranges.append(keys)
    return tuple(ranges)


def _pieces(chunks, ranges):
    """The pieces of a rank's chunks that lie in the ranges."""
    pieces, first = [], 0
    for chunk in chunks:
        found = (chunk.overlap(keys) for keys in ranges)
        pieces += [(first + piece.start - chunk.start, piece) for piece in found if piece.size]
        first += chunk.size
    return tuple(pieces)


def _fetch(problem: Problem, k: Tensor, v: Tensor) -> _Fetched:
    """The keys and values that this rank's queries see."""
    route = _route(problem.sharding, problem.window, problem.rank)
    packed = {pieces: _pack(pieces, k, v) for pieces in set(route.sent)}
    shapes = [(sum(piece.size for _, piece in pieces) * _elements_a_row(k, v),) for pieces in route.received]
    received = exchange([packed[pieces] for pieces in route.sent], shapes, problem.group)
    found = []
    for flat, pieces in zip(received, route.received):
        views = _unpack(flat, [piece.size for _, piece in pieces], k, v)
        found += zip([piece for _, piece in pieces], *views)
    found.sort(key=lambda piece: piece[0])
    gathered = [torch.cat([x[:, :0], *(piece[i] for piece in found)], 1) for i, x in ((1, k), (2, v))]
    return _Fetched(route.ranges, *gathered)


def _return(problem: Problem, totals: _Fetched, rows: Rows) -> list[Tensor]:
    """Gradients of this rank's keys and values: the sums over the ranks, in fp32 and in the order of the ranks."""
    route = _route(problem.sharding, problem.window, problem.rank)
    sent = []
    for pieces in route.received:
        of_pieces = [totals.of(piece) for _, piece in pieces]
        sent.append(torch.cat([totals.k.new_empty(0), *(x.flatten() for views in zip(*of_pieces) for x in views)]))
    shapes = [(sum(piece.size for _, piece in pieces) * _elements_a_row(*totals[1:]),) for pieces in route.sent]
    sums = [zeros_in_fp32(x) for x in (rows.k, rows.v)]
    for flat, pieces in zip(exchange(sent, shapes, problem.group), route.sent):
        for total, views in zip(sums, _unpack(flat, [piece.size for _, piece in pieces], *totals[1:])):
            for (first, piece), gradient in zip(pieces, views):
                total.narrow(1, first, piece.size).add_(gradient)
    return [total.to(x.dtype) for total, x in zip(sums, (rows.k, rows.v))]


def _pack(pieces, k, v):
    """The keys of pieces and, after them, the values, as one flat tensor."""
    rows = [x.narrow(1, first, piece.size) for x in (k, v) for first, piece in pieces]
    return torch.cat([k.new_empty(0), *(x.flatten() for x in rows)])


def _unpack(flat, sizes, k, v):
    """Views (batch, rows, heads, dim) of the keys, and of the values, of pieces with so many rows."""
    shapes = [(x.shape[0], size, *x.shape[2:]) for x in (k, v) for size in sizes]
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    views = [part.view(shape) for part, shape in zip(parts, shapes)]
    return views[: len(sizes)], views[len(sizes) :]


def _elements_a_row(k, v):
    """Elements of the key and the value of one row, of all sequences."""
    return k.shape[0] * (k.shape[2:].numel() + v.shape[2:].numel())
