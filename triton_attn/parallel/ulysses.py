"""Method "ulysses": ranks exchange rows for heads, and each attends to whole sequences for some of the heads.

A KV head goes only to ranks that have a query head of its group. Latent vectors, which have no heads, go to all ranks
as a single KV head would, and each computes from them the keys and values of its heads. A rank keeps what it receives
in the forward pass for the backward pass, instead of its own rows.

Source: Jacobs et al., DeepSpeed Ulysses (2023), arXiv:2309.14509.
"""

from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._host.checks import fail
from .balance import Team
from .exchange import exchange_rows
from .local import Gradients, Problem, Rows, dtype_of_sums


class Exchange(NamedTuple):
    """The ranks that exchange rows for heads, and the module of the method by which each attends for its heads then:
    whole sequences, or those of the ranks together, whose other rows other such ranks have."""

    group: dist.ProcessGroup
    rank: int
    team: Team
    method: Any
    shapes: list[tuple[int, ...]]  # of a row of each tensor with rows, of all heads
    num_queries: int  # of these tensors; keys follow

    @property
    def num_ranks(self) -> int:
        return len(self.team.num_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.team.num_rows)


def check_heads(num_heads_q: int, num_heads_kv: int, num_ranks: int, name: str = "q") -> None:
    if num_heads_q % num_ranks:
        fail(name, f"query heads in multiples of {num_ranks} ranks for 'ulysses'", num_heads_q)
    if num_heads_kv % num_ranks and num_ranks % num_heads_kv:
        fail("k", f"KV heads that divide {num_ranks} ranks or are a multiple of them for 'ulysses'", num_heads_kv)


def shapes_of_share(shapes: list[tuple[int, ...]], num_ranks: int) -> list[tuple[int, int]]:
    """(heads, dim) of a row of each tensor, of the heads that a rank receives."""
    return [(max(shape[0] // num_ranks, 1) if len(shape) > 1 else 1, shape[-1]) for shape in shapes]


def forward(problem: Problem, rows: Rows, over: Exchange) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out and lse of this rank's rows, and of its heads what `backward` needs: q, k and v side by side, out and lse."""
    check_heads(problem.attention.num_heads, problem.attention.num_heads_kv, over.num_ranks)
    tensors = *rows.queries, *rows.keys
    joined = _exchange_for_heads(over, [_heads_by_rank(x, over.num_ranks).flatten(2) for x in tensors])
    out, lse = over.method.forward(_of_own_heads(problem, over), _split_rows(over, joined))
    of_rows = _to_rows(over, torch.cat([out.flatten(1), _as(out.dtype, lse.T)], 1))
    num_elements = out.shape[1:].numel()
    own_out = _heads_together(of_rows[..., :num_elements].unflatten(2, out.shape[1:]))
    own_lse = torch.cat(list(_as(lse.dtype, of_rows[..., num_elements:])), 1).T.contiguous()
    return own_out, own_lse, [joined, out, lse]


def backward(problem: Problem, kept: list[Tensor], dout: Tensor, dlse: Tensor | None, over: Exchange) -> Gradients:
    """Gradients of the rows and, of the parameters, this rank's part."""
    joined, out, lse = kept
    if dlse is None:  # of this rank; others may have one
        dlse = lse.new_zeros((dout.shape[1], dout.shape[0]))
    dlse_by_rank = _as(dout.dtype, dlse.unflatten(0, (over.num_ranks, -1)).transpose(1, 2))
    douts = _exchange_for_heads(over, [_heads_by_rank(dout, over.num_ranks).flatten(2), dlse_by_rank])
    num_elements = out.shape[1:].numel()
    # A copy: beside dlse, rows of dout begin at addresses that suit neither TMA nor wide loads.
    dout = douts[:, :num_elements].contiguous().unflatten(1, out.shape[1:])
    dlse = _as(lse.dtype, douts[:, num_elements:]).T

    rows = _split_rows(over, joined)
    of_queries, of_keys, of_own = over.method.backward(_of_own_heads(problem, over), rows, dout, dlse, out, lse)
    wanted = problem.attention.wanted
    shapes = list(compress(over.shapes, wanted.queries + wanted.keys))
    found = _gradients_of_rows(over, (*of_queries, *of_keys), shapes) if shapes else []
    parameters = []
    for x, of_x in zip(compress(problem.attention.of_each_head, wanted.parameters), of_own):
        parameters.append(of_x.new_zeros(x.shape))
        parameters[-1][_own_heads(problem, over)] = of_x
    number = len(of_queries)
    return found[:number], found[number:], parameters


def _gradients_of_rows(over, of_heads, shapes):
    """Of this rank's rows and all heads, from those of all rows and its heads; shapes as in Exchange."""
    by_rank = _to_rows(over, torch.cat([x.flatten(1) for x in of_heads], 1))
    return [_of_all_heads(x, shape) for x, shape in zip(_split(over, by_rank, 2, shapes), shapes)]


def _own_heads(problem, over):
    share = problem.attention.num_heads // over.num_ranks
    return slice(over.rank * share, (over.rank + 1) * share)


def _of_own_heads(problem, over):
    return problem._replace(attention=problem.attention.of_heads(_own_heads(problem, over)))


def _exchange_for_heads(over, by_rank):
    """All rows of what other ranks have for this one; by_rank are (ranks, rows, elements)."""
    sent, num_rows = torch.cat(by_rank, 2).flatten(0, 1), over.team.num_rows
    received = exchange_rows(sent, [num_rows[over.rank]] * len(num_rows), num_rows, over.group)
    return over.team.order.take(received)


def _to_rows(over, x):
    """(ranks, rows of this rank, elements) from all rows (rows, elements) of each rank's heads."""
    num_rows = over.team.num_rows
    own = num_rows[over.rank]
    sent = over.team.order_of_ranks.take(x)
    return exchange_rows(sent, num_rows, [own] * len(num_rows), over.group).unflatten(0, (len(num_rows), own))


def _heads_by_rank(x, num_ranks):
    """(ranks, rows, heads of the rank, dim); a head for each of the ranks that share it."""
    x = x.unsqueeze(1) if x.ndim == 2 else x
    x = x.repeat_interleave(num_ranks // x.shape[1], 1) if x.shape[1] < num_ranks else x
    return x.unflatten(1, (num_ranks, -1)).transpose(0, 1)


def _heads_together(by_rank):
    """(rows, heads of all ranks, dim), a copy"""
    return torch.cat(list(by_rank), 1)


def _of_all_heads(by_rank, shape):
    """Gradients (rows, *shape) of all heads, from those of each rank's; of a head that several have, the sum."""
    x, num_heads = _heads_together(by_rank), shape[0] if len(shape) > 1 else 1
    if x.shape[1] != num_heads:
        x = x.unflatten(1, (num_heads, -1)).sum(2, dtype=dtype_of_sums(x)).to(x.dtype)
    return x if len(shape) > 1 else x[:, 0]


def _split_rows(over, joined):
    """The Rows of a rank's heads, whose queries and keys are side by side."""
    found = _split(over, joined, 1, over.shapes)
    tensors = [x if len(shape) > 1 else x[:, 0] for x, shape in zip(found, over.shapes)]
    return Rows(tuple(tensors[: over.num_queries]), tuple(tensors[over.num_queries :]))


def _split(over, joined, dim, shapes):
    """Views (..., heads, dim) of the tensors of a rank's heads, which are side by side in `dim`; shapes as in Exchange,
    of these tensors."""
    shapes = shapes_of_share(shapes, over.num_ranks)
    return [x.unflatten(dim, shape) for x, shape in zip(joined.split([a * b for a, b in shapes], dim), shapes)]


def _as(dtype, x):
    """The bits of x in elements of another dtype, more or fewer of them in the last dimension."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)  # a contiguous x may have a last stride above 1
