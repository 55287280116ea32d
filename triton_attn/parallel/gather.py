"""Method "all_gather": each rank fetches the keys that its queries see, and attends to them at once.

Keys are what travels for them: keys and values, or latent vectors.

A rank sends a key only to ranks whose queries see it; under a window these are its neighbours. They are fetched again
in the backward pass. Between the passes a rank holds only its own rows.
"""

import functools
from typing import Any, NamedTuple

from torch import Tensor

from .balance import Chunk, Pieces, Place, Sharding, overlaps
from .exchange import exchange_rows
from .local import (
    Gradients,
    Mask,
    Pair,
    Part,
    Problem,
    Rows,
    Sums,
    attend_once,
    join,
    parts_of,
)


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's rows."""
    given = rows.with_keys(_fetch(problem, rows))
    return attend_once(problem, _parts(problem.sharding, problem.mask, problem.rank), given)


def backward(problem: Problem, rows: Rows, *results: Any) -> Gradients:
    """Gradients of the rows and, of the parameters, this rank's part; results are dout, dlse, out and lse."""
    sums = Sums(problem, rows, results, rows.queries[0].dtype)
    if not sums.needs_keys:
        return [], [], sums.parameters
    fetched = _fetch(problem, rows)
    of_keys, given = sums.zeros_of_keys(fetched.shape[0]), rows.with_keys(fetched)
    for part in _parts(problem.sharding, problem.mask, problem.rank):
        sums.add(part, given, of_keys)
    own = _return(problem, of_keys, rows.keys[0].shape[0]) if sums.has_keys else of_keys
    return sums.queries, sums.gradients_of_keys(own), sums.parameters


class Route(NamedTuple):
    """What a rank sends to each rank, and receives from it."""

    sent: Pieces  # of its rows; those for each rank follow each other
    num_sent: list[int]
    num_received: list[int]
    in_order: Pieces  # of the received rows
    as_received: Pieces  # of the rows in order
    sent_to: list[Pieces]  # of its rows, for each rank


@functools.lru_cache(maxsize=64)
def keys_seen(sharding: Sharding, mask: Mask) -> tuple[Place, ...]:
    """The keys that the queries of each rank see."""
    found = []
    for segments in sharding.segments:
        keys = [mask.keys_of(segment.chunk, sharding.documents[segment.document]) for segment in segments]
        found.append(Place(_united(keys)))
    return tuple(found)


def _united(chunks):
    """Disjoint chunks, from chunks in the order of their starts."""
    end = 0
    for chunk in chunks:
        yield Chunk(max(chunk.start, end), max(chunk.end, end))
        end = max(chunk.end, end)


@functools.lru_cache(maxsize=64)
def _route(sharding: Sharding, mask: Mask, rank: int) -> Route:
    seen, own = keys_seen(sharding, mask), sharding.places[rank]
    sent_to = [own.rows_of(overlaps(own.chunks, place.chunks)) for place in seen]
    received = [overlaps(place.chunks, seen[rank].chunks) for place in sharding.places]
    arrived, first = [], 0
    for chunk in (chunk for chunks in received for chunk in chunks):
        arrived.append((chunk, Chunk(first, first + chunk.size)))
        first += chunk.size
    return Route(
        Pieces(chunk for chunks in sent_to for chunk in chunks),
        [sum(chunk.size for chunk in chunks) for chunks in sent_to],
        [sum(chunk.size for chunk in chunks) for chunks in received],
        Pieces(rows for _, rows in sorted(arrived)),
        Pieces(seen[rank].rows_of(chunk for chunk, _ in arrived)),
        [Pieces(chunks) for chunks in sent_to],
    )


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask, rank: int) -> tuple[Part, ...]:
    seen = keys_seen(sharding, mask)[rank]
    pairs: list[Pair] = []
    for segment in sharding.segments[rank]:
        document = sharding.documents[segment.document]
        chunk = mask.keys_of(segment.chunk, document)
        (keys,) = seen.rows_of([chunk])
        pair = Pair(
            segment.document, segment.rows, keys, segment.chunk.start - document.start, chunk.start - document.start
        )
        if mask.is_full and pairs and pairs[-1].document == pair.document:  # all its queries see all its keys
            pair = pairs.pop().with_queries_of(pair)
        pairs.append(pair)
    return parts_of(pairs, mask)


def _fetch(problem: Problem, rows: Rows) -> Tensor:
    """The keys that this rank's queries see, in order and as `join` joins them."""
    route = _route(problem.sharding, problem.mask, problem.rank)
    sent = route.sent.take(join(rows.keys))
    return route.in_order.take(exchange_rows(sent, route.num_sent, route.num_received, problem.group))


def _return(problem: Problem, totals: Tensor, num_rows: int) -> Tensor:
    """Gradients of this rank's keys: the sums over the ranks, in fp32 and in the order of the ranks."""
    route = _route(problem.sharding, problem.mask, problem.rank)
    gradients = exchange_rows(route.as_received.take(totals), route.num_received, route.num_sent, problem.group)
    sums = totals.new_zeros((num_rows, totals.shape[1]))
    for pieces, part in zip(route.sent_to, gradients.split(route.num_sent)):
        pieces.add_to(sums, part)
    return sums
