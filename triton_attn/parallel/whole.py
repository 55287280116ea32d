"""Attention of a rank that has all rows: no keys travel."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from .balance import Sharding
from .local import Mask, Pair, Part, Problem, Rows, attend_once, gradients_of, parts_of, results_of


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return attend_once(problem, _parts(problem.sharding, problem.mask), rows)


def backward(problem: Problem, rows: Rows, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple:
    """Gradients of the rows and of the sinks."""
    results, dsinks = results_of(problem.num_queries, dout, dlse, out, lse, rows.sinks)
    found = [torch.zeros_like(x) for x in rows[:3]]
    for part in _parts(problem.sharding, problem.mask):  # one at most, from the first row on
        gradients = gradients_of(problem, part, results, rows)
        found = [pad(x, (0, 0, 0, 0, 0, rows.q.shape[0] - x.shape[0])) for x in gradients]
    return *found, dsinks


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask) -> tuple[Part, ...]:
    """Whole documents: one call."""
    documents = ((i, chunk) for i, chunk in enumerate(sharding.documents) if chunk.size)
    return parts_of((Pair(i, chunk, chunk, 0, 0) for i, chunk in documents), mask)
