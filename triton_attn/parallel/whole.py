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
    found = [torch.zeros_like(x) for x in (*rows.queries, *rows.keys)]
    for part in _parts(problem.sharding, problem.mask):  # one at most, from the first row on
        of_queries, of_keys, _ = problem.attention.gradients(part, given, rows)
        found = [pad(x, (0, 0, 0, 0, 0, rows.queries[0].shape[0] - x.shape[0])) for x in (*of_queries, *of_keys)]
    number = len(rows.queries)
    return found[:number], found[number:], [] if dsinks is None else [dsinks]


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask) -> tuple[Part, ...]:
    """Whole documents: one call."""
    documents = ((i, chunk) for i, chunk in enumerate(sharding.documents) if chunk.size)
    return parts_of((Pair(i, chunk, chunk, 0, 0) for i, chunk in documents), mask)
