"""Method "ring": keys go round from rank to rank, and each rank attends to those that it has at the moment.

Keys are what travels for them: keys and values, or latent vectors.

A rank receives the next block while it attends to this one, so it holds two blocks. The results of a row over all
blocks are merged by their log-sum-exps in fp32. In the backward pass the fp32 gradients of a block go round with it.
They are complete when they are back at its owner.

Source: Liu et al., Ring Attention with Blockwise Transformers (2023), arXiv:2310.01889.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .balance import Chunk, Segment, Sharding
from .exchange import Shift
from .local import (
    Gradients,
    Mask,
    Pair,
    Part,
    Problem,
    Rows,
    Sums,
    dtype_of_sums,
    join,
    no_results,
    parts_of,
)


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's rows."""
    dtype = rows.queries[0].dtype
    out, lse = no_results(problem, rows, dtype_of_sums(rows.queries[0]))
    for source, block in _round(problem, rows):
        given = rows.with_keys(block)
        for i, part in enumerate(_parts(problem.sharding, problem.mask, problem.rank, source)):
            is_first = source == problem.rank and i == 0  # all queries are in this part
            results = problem.attention.forward(part, given, with_sinks=is_first)
            own = out[part.queries.rows], lse[:, part.queries.rows]
            if is_first:
                for total, result in zip(own, results):
                    total.copy_(result)
            else:
                _merge(*own, *results)
    return out.to(dtype), lse


def backward(problem: Problem, rows: Rows, *results: Any) -> Gradients:
    """Gradients of the rows and, of the parameters, this rank's part; results are dout, dlse, out and lse."""
    sums, arriving = Sums(problem, rows, results, dtype_of_sums(rows.queries[0])), None
    if not sums.needs_keys:
        return [], [], sums.parameters
    for source, block in _round(problem, rows):
        given, of_keys = rows.with_keys(block), sums.zeros_of_keys(block.shape[0])
        for part in _parts(problem.sharding, problem.mask, problem.rank, source):
            sums.add(part, given, of_keys)
        if arriving is not None:
            of_keys += arriving.wait()
        if sums.has_keys:
            arriving = Shift(of_keys, problem.group)
    num_rows, dtype = rows.keys[0].shape[0], rows.queries[0].dtype
    own = arriving.wait()[:num_rows] if arriving else sums.zeros_of_keys(num_rows)
    return [x.to(dtype) for x in sums.queries], sums.gradients_of_keys(own), sums.parameters


def _round(problem: Problem, rows: Rows) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of all blocks, this rank's first; the next is on its way while one is in use.

    A block has the rows that `join` makes, and room for those of any rank.
    """
    block = join(rows.keys)
    most = max(problem.sharding.num_rows)
    if most > block.shape[0]:
        block = torch.cat([block, block.new_zeros((most - block.shape[0], block.shape[1]))])
    for step in problem.ranks:
        shift = Shift(block, problem.group) if step + 1 < len(problem.ranks) else None
        yield (problem.rank - step) % len(problem.ranks), block
        block = shift.wait() if shift else block


@functools.lru_cache(maxsize=512)
def _parts(sharding: Sharding, mask: Mask, rank: int, source: int) -> tuple[Part, ...]:
    """Of a rank's queries over the keys of a source. All queries are in the first part over the rank's own keys."""
    keys = _by_document(sharding.segments[source])
    pairs: list[Pair] = []
    for document, queries in _by_document(sharding.segments[rank]).items():
        start = sharding.bounds[document]
        if document not in keys:
            continue
        elif mask.is_full or (mask.is_plainly_causal and source == rank):  # rows are in the order of positions
            pairs.append(Pair(document, _all(queries), _all(keys[document]), 0, 0))
        elif mask.is_plainly_causal:
            pairs += _pairs_of_earlier_keys(queries, keys[document], start)
        else:
            pairs += _pairs_by_position(queries, keys[document], mask, sharding)
    return parts_of(pairs, mask)


def _by_document(segments):
    """{document: its segments}."""
    found: dict[int, list[Segment]] = {}
    for segment in segments:
        found.setdefault(segment.document, []).append(segment)
    return found


def _all(segments):
    """The rows of one document on one rank, which follow each other."""
    return Chunk(segments[0].row, segments[-1].rows.end)


def _pairs_of_earlier_keys(queries, keys, start):
    """Of another rank, whose segments are wholly before or wholly after those of the queries."""
    pairs: list[Pair] = []
    for segment in queries:
        earlier = [of_keys for of_keys in keys if of_keys.chunk.end <= segment.chunk.start]
        if not earlier:
            continue
        positions = segment.chunk.start - start, earlier[0].chunk.start - start
        pair = Pair(segment.document, segment.rows, _all(earlier), *positions)
        if pairs and pairs[-1].keys == pair.keys:
            pair = pairs.pop().with_queries_of(pair)
        pairs.append(pair)
    return pairs


def _pairs_by_position(queries, keys, mask, sharding):
    """Of each segment of the queries and each of the keys that it sees."""
    for segment in queries:
        document = sharding.documents[segment.document]
        seen = mask.keys_of(segment.chunk, document)
        for of_keys in keys:
            chunk = of_keys.chunk.overlap(seen)
            if chunk.size:
                first = of_keys.row + chunk.start - of_keys.chunk.start
                rows = Chunk(first, first + chunk.size)
                positions = segment.chunk.start - document.start, chunk.start - document.start
                yield Pair(segment.document, segment.rows, rows, *positions)


def _merge(out, lse, part, part_lse):
    """Add a part to out (rows, heads, dim) and lse (heads, rows), in place."""
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)  # NaN: neither has a key
    out.lerp_(part.to(out.dtype), weight.T[..., None])
    torch.logaddexp(lse, part_lse, out=lse)
