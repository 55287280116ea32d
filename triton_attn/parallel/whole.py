"""Attention of a rank that has all rows: no keys travel."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .balance import Sharding
from .local import Gradients, Mask, Pair, Part, Problem, Rows, attend_once, parts_of, results_of


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return attend_once(problem, _parts(problem.sharding, problem.mask), rows)


def backward(problem: Problem, rows: Rows, *results: Any) -> Gradients:
    """Gradients of the rows and of the parameters; results are dout, dlse, out and lse."""
    given, dsinks = results_of(problem, *results)
    attention = problem.attention
    found = attention.wanted.pick(*(map(torch.zeros_like, x) for x in (*rows, attention.parameters)))
    parts = _parts(problem.sharding, problem.mask) if any(map(len, found)) else ()
    for part in parts:  # one at most, from the first row on
        found = attention.gradients(part, given, rows)
    of_queries, of_keys, parameters = found
    of_queries, of_keys = ([_with_all_rows(x, rows.queries[0]) for x in each] for each in (of_queries, of_keys))
    return of_queries, of_keys, [*parameters, *([] if dsinks is None else [dsinks])]


def _with_all_rows(x, like):
    """x with zeros for the rows that belong to no document, in the dtype of `like`."""
    return pad(x.to(like.dtype), (0, 0) * (x.ndim - 1) + (0, like.shape[0] - x.shape[0]))


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask) -> tuple[Part, ...]:
    """Whole documents: one call."""
    documents = ((i, chunk) for i, chunk in enumerate(sharding.documents) if chunk.size)
    return parts_of((Pair(i, chunk, chunk, 0, 0) for i, chunk in documents), mask)
