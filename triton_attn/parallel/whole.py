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
    number, like = len(rows.queries), rows.queries[0]
    found = [torch.zeros_like(x) for x in (*rows.queries, *rows.keys)]
    parameters = [torch.zeros_like(x) for x in problem.attention.parameters]
    for part in _parts(problem.sharding, problem.mask):  # one at most, from the first row on
        of_queries, of_keys, parameters = problem.attention.gradients(part, given, rows)
        missing = like.shape[0] - part.queries.size
        found = [pad(x.to(like.dtype), (0, 0) * (x.ndim - 1) + (0, missing)) for x in (*of_queries, *of_keys)]
    return found[:number], found[number:], [*parameters, *([] if dsinks is None else [dsinks])]


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask) -> tuple[Part, ...]:
    """Whole documents: one call."""
    documents = ((i, chunk) for i, chunk in enumerate(sharding.documents) if chunk.size)
    return parts_of((Pair(i, chunk, chunk, 0, 0) for i, chunk in documents), mask)
