"""Method "ulysses": ranks exchange rows for heads, and each attends to whole sequences for some of the heads.

A KV head goes only to ranks that have a query head of its group. A rank keeps what it receives in the forward pass for
the backward pass, instead of its own rows.

Source: Jacobs et al., DeepSpeed Ulysses (2023), arXiv:2309.14509.
"""

import functools

import torch
from torch import Tensor

from .._host.checks import fail
from .balance import Chunk, Sharding
from .exchange import exchange_rows
from .local import Mask, Pair, Part, Problem, Rows, attend_once, dtype_of_sums, gradients_of, parts_of, results_of


def check_heads(num_heads_q: int, num_heads_kv: int, num_ranks: int) -> None:
    if num_heads_q % num_ranks:
        fail("q", f"query heads in multiples of {num_ranks} ranks for 'ulysses'", num_heads_q)
    if num_heads_kv % num_ranks and num_ranks % num_heads_kv:
        fail("k", f"KV heads that divide {num_ranks} ranks or are a multiple of them for 'ulysses'", num_heads_kv)


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out and lse of this rank's rows, and of its heads what `backward` needs: q, k and v side by side, out and lse."""
    check_heads(problem.num_heads, problem.num_heads_kv, len(problem.ranks))
    joined = _to_heads(problem, rows[:3])
    first_head, sinks, problem = _of_own_heads(problem, rows.sinks)
    q, k, v = _split(problem, joined, rows.v.shape[-1])
    own = Rows(q, k, v, sinks)
    out, lse = attend_once(problem, _parts(problem.sharding, problem.mask), own, first_head)
    of_rows = _to_rows(problem, torch.cat([out.flatten(1), _as(out.dtype, lse.T)], 1))
    num_elements = out.shape[1:].numel()
    own_out = _heads_together(of_rows[..., :num_elements].unflatten(2, out.shape[1:]))
    own_lse = torch.cat(list(_as(lse.dtype, of_rows[..., num_elements:])), 1).T.contiguous()
    return own_out, own_lse, [joined, out, lse]


def backward(
    problem: Problem, kept: list[Tensor], sinks: Tensor | None, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows and, of the sinks, this rank's part."""
    joined, out, lse = kept
    num_ranks = len(problem.ranks)
    if dlse is None:  # of this rank; others may have one
        dlse = lse.new_zeros((dout.shape[1], dout.shape[0]))
    dlse_by_rank = _as(dout.dtype, dlse.unflatten(0, (num_ranks, -1)).transpose(1, 2))
    douts = _exchange_for_heads(problem, [_heads_by_rank(dout, num_ranks).flatten(2), dlse_by_rank])
    num_elements = out.shape[1:].numel()
    # A copy: beside dlse, rows of dout begin at addresses that suit neither TMA nor wide loads.
    dout = douts[:, :num_elements].contiguous().unflatten(1, out.shape[1:])
    dlse = _as(lse.dtype, douts[:, num_elements:]).T

    first_head, own_sinks, problem = _of_own_heads(problem, sinks)
    q, k, v = _split(problem, joined, out.shape[-1])
    rows = Rows(q, k, v, own_sinks)
    results, of_own_sinks = results_of(problem.sharding.bounds[-1], dout, dlse, out, lse, own_sinks)
    totals = torch.zeros_like(joined)
    for part in _parts(problem.sharding, problem.mask):  # one at most
        dq, dk, dv = _split(problem, totals, out.shape[-1])
        places = dq[part.queries.rows], dk[part.keys.rows], dv[part.keys.rows]
        for place, gradient in zip(places, gradients_of(problem, part, results, rows, first_head)):
            place.copy_(gradient)
    by_rank = _split(problem, _to_rows(problem, totals), out.shape[-1], 2)
    dsinks = None
    if sinks is not None and of_own_sinks is not None:
        dsinks = torch.zeros_like(sinks)
        dsinks[_own_heads(problem)] = of_own_sinks
    dq, dk, dv = map(_heads_together, by_rank)
    return dq, _sum_of_copies(dk, problem.num_heads_kv), _sum_of_copies(dv, problem.num_heads_kv), dsinks


@functools.lru_cache(maxsize=64)
def _parts(sharding: Sharding, mask: Mask) -> tuple[Part, ...]:
    """Whole documents: one call."""
    documents = [(i, Chunk(*chunk)) for i, chunk in enumerate(sharding.documents) if chunk.size]
    return parts_of((Pair(i, chunk, chunk, 0, 0) for i, chunk in documents), mask)


def _own_heads(problem):
    share = problem.num_heads // len(problem.ranks)
    return slice(problem.rank * share, (problem.rank + 1) * share)


def _of_own_heads(problem, sinks):
    """(first head, sinks, Problem) of this rank's heads. Copies are aligned as whole tensors are."""
    own, slopes = _own_heads(problem), problem.options["alibi_slopes"]
    if slopes is not None:
        problem = problem._replace(
            options=problem.options | dict(alibi_slopes=slopes[..., own].clone(memory_format=torch.contiguous_format))
        )
    return own.start, None if sinks is None else sinks[own].clone(), problem


def _to_heads(problem, tensors):
    """(seqlen, elements): whole sequences of this rank's heads of the tensors, side by side."""
    return _exchange_for_heads(problem, [_heads_by_rank(x, len(problem.ranks)).flatten(2) for x in tensors])


def _exchange_for_heads(problem, by_rank):
    """Whole sequences of what other ranks have for this one; by_rank are (ranks, rows, elements)."""
    sent = torch.cat(by_rank, 2).flatten(0, 1)
    num_rows = problem.sharding.num_rows
    received = exchange_rows(sent, [num_rows[problem.rank]] * len(num_rows), num_rows, problem.group)
    return problem.sharding.order.take(received)


def _to_rows(problem, x):
    """(ranks, rows of this rank, elements) from whole sequences (seqlen, elements) of each rank's heads."""
    num_rows = problem.sharding.num_rows
    own = num_rows[problem.rank]
    sent = problem.sharding.order_of_ranks.take(x)
    return exchange_rows(sent, num_rows, [own] * len(num_rows), problem.group).unflatten(0, (len(num_rows), own))


def _heads_by_rank(x, num_ranks):
    """(ranks, rows, heads of the rank, dim); a head for each of the ranks that share it."""
    x = x.repeat_interleave(num_ranks // x.shape[1], 1) if x.shape[1] < num_ranks else x
    return x.unflatten(1, (num_ranks, -1)).transpose(0, 1)


def _heads_together(by_rank):
    """(rows, heads of all ranks, dim), a copy"""
    return torch.cat(list(by_rank), 1)


def _sum_of_copies(x, num_heads):
    """Gradients of num_heads heads, of which x has as many copies each."""
    if x.shape[1] == num_heads:
        return x
    return x.unflatten(1, (num_heads, -1)).sum(2, dtype=dtype_of_sums(x)).to(x.dtype)


def _split(problem, joined, head_dim_v, dim=1):
    """Views of q, k and v of a rank's heads, which are side by side in `dim`."""
    num_ranks = len(problem.ranks)
    heads, heads_kv = problem.num_heads // num_ranks, max(problem.num_heads_kv // num_ranks, 1)
    head_dim = (joined.shape[dim] - heads_kv * head_dim_v) // (heads + heads_kv)
    shapes = (heads, head_dim), (heads_kv, head_dim), (heads_kv, head_dim_v)
    return [x.unflatten(dim, shape) for x, shape in zip(joined.split([a * b for a, b in shapes], dim), shapes)]


def _as(dtype, x):
    """The bits of x in elements of another dtype, more or fewer of them in the last dimension."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)  # a contiguous x may have a last stride above 1
