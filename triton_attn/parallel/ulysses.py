"""Method "ulysses": ranks exchange rows for heads, and each attends to whole sequences for some of the heads.

A KV head goes to the ranks that have a query head of its group, and to no other.

Source: Jacobs et al., DeepSpeed Ulysses (2023), arXiv:2309.14509.
"""

import torch
from torch import Tensor

from .._host.checks import fail
from ..flash import flash_attention
from .exchange import Exchange
from .local import Problem, Rows, shard_of


def check_heads(num_heads_q: int, num_heads_kv: int, num_ranks: int) -> None:
    if num_heads_q % num_ranks:
        fail("q", f"query heads in multiples of {num_ranks} ranks for 'ulysses'", num_heads_q)
    if num_heads_kv % num_ranks and num_ranks % num_heads_kv:
        fail("k", f"KV heads that divide {num_ranks} ranks or are a multiple of them for 'ulysses'", num_heads_kv)


def attend(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's rows."""
    q, k, v, sinks = rows
    num_ranks, num_heads, num_heads_kv = len(problem.ranks), q.shape[2], k.shape[2]
    check_heads(num_heads, num_heads_kv, num_ranks)
    share, share_kv = num_heads // num_ranks, max(num_heads_kv // num_ranks, 1)
    firsts, firsts_kv = ([r * heads // num_ranks for r in problem.ranks] for heads in (num_heads, num_heads_kv))
    q = _rows_for_heads(problem, q, firsts, share)
    k, v = (_rows_for_heads(problem, x, firsts_kv, share_kv) for x in (k, v))
    own = slice(firsts[problem.rank], firsts[problem.rank] + share)
    options = problem.options | dict(window_size=problem.window, deterministic=problem.deterministic)
    if options["dropout_p"]:
        options["shard"] = shard_of(0, 0, own.start, num_heads, q.shape[0], q.device)
    if options["alibi_slopes"] is not None:
        options["alibi_slopes"] = options["alibi_slopes"][..., own]
    out, lse = flash_attention(q, k, v, sinks=None if sinks is None else sinks[own], return_lse=True, **options)
    lse = _heads_for_rows(problem, lse.transpose(1, 2)[..., None])
    return _heads_for_rows(problem, out), lse[..., 0].transpose(1, 2)


def _rows_for_heads(problem, x, firsts, share):
    """(batch, seqlen, share, dim): whole sequences of this rank's heads. Rank r's are firsts[r] and those after it."""
    sent = [x.narrow(2, first, share) for first in firsts]
    shapes = [(x.shape[0], problem.sharding.num_rows(r), share, x.shape[3]) for r in problem.ranks]
    return problem.sharding.in_order(_exchange(problem, sent, shapes), 1)


def _heads_for_rows(problem, x):
    """(batch, rows of this rank, heads, dim) from whole sequences of this rank's heads."""
    sent = [problem.sharding.own_rows(x, r, 1) for r in problem.ranks]
    return torch.cat(_exchange(problem, sent, [sent[problem.rank].shape] * len(sent)), 2)


def _exchange(problem, sent, shapes):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([part.flatten() for part in sent])
    received = Exchange.apply(flat, [part.numel() for part in sent], sizes, problem.group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]
