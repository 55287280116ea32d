"""Method "ring": keys and values go round from rank to rank, and each rank attends to those that it has at the moment.

The next block is on its way while this one is attended to, so a rank holds two blocks. The parts of a row's result are
merged by their log-sum-exps in fp32. In the backward pass the gradients of a block follow it, in fp32, and are complete
when they are back at its owner.

Source: Liu et al., Ring Attention with Blockwise Transformers (2023), arXiv:2310.01889.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .balance import Chunk, split_rows
from .exchange import Shift
from .local import Problem, Results, Rows, zeros_in_fp32


def forward(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's rows."""
    q, k, v, _ = rows
    out = zeros_in_fp32(q[..., :1].expand(*q.shape[:-1], v.shape[-1]))
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"))
    outs, lses = split_rows(out, problem.chunks), split_rows(lse, problem.chunks, 2)
    for source, block in _round(problem, k, v):
        for i, queries, keys, given in _pairs(problem, source, block, rows):
            _merge(outs[i], lses[i], *problem.forward(given, queries, keys))
    return out.to(q.dtype), lse


def backward(problem: Problem, rows: Rows, results: Results) -> tuple[Tensor | None, ...]:
    """Gradients of the rows and, of the sinks, this rank's part."""
    q, k, v, sinks = rows
    dq, dsinks = zeros_in_fp32(q), None if sinks is None else torch.zeros_like(sinks)
    dqs, of_chunks = split_rows(dq, problem.chunks), results.split(problem.chunks)
    gradients = None
    for source, block in _round(problem, k, v):
        part = torch.zeros_like(block, dtype=dq.dtype)
        for i, queries, keys, given in _pairs(problem, source, block, rows):
            *found, of_sinks = problem.backward(of_chunks[i], given, queries, keys)
            for total, gradient in zip((dqs[i], *_rows_of(problem, source, keys, part, k, v)), found):
                total += gradient
            if dsinks is not None and of_sinks is not None:
                dsinks += of_sinks
        if gradients is not None:
            part += gradients.wait()
        gradients = Shift(part, problem.group)
    dk, dv = _unpack(gradients.wait(), k.shape[1], k, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def _round(problem: Problem, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of all blocks, this rank's first; the next is on its way while one is in use."""
    block = _pack(problem, k, v)
    for step in problem.ranks:
        shift = Shift(block, problem.group) if step + 1 < len(problem.ranks) else None
        yield (problem.rank - step) % len(problem.ranks), block
        block = shift.wait() if shift else block


def _pairs(problem: Problem, source: int, block: Tensor, rows: Rows) -> Iterator[tuple[int, Chunk, Chunk, Rows]]:
    """(i, queries, keys, their Rows) of chunk i of this rank, and keys of the block that it sees.

    The sinks are with one of the blocks: each chunk's own keys.
    """
    qs = split_rows(rows.q, problem.chunks)
    for i, queries in enumerate(problem.chunks):
        for j, chunk in enumerate(problem.sharding.chunks[source]):
            keys = chunk.overlap(problem.keys_of(queries))
            if queries.size and keys.size:
                k, v = _rows_of(problem, source, keys, block, rows.k, rows.v)
                is_own = source == problem.rank and i == j
                yield i, queries, keys, Rows(qs[i], k, v, rows.sinks if is_own else None)


def _pack(problem, k, v):
    """This rank's keys and values in one flat tensor, which has room for those of any rank."""
    most = max(map(problem.sharding.num_rows, problem.ranks))
    block = k.new_zeros(most * k.shape[0] * (k.shape[2:].numel() + v.shape[2:].numel()))
    for view, x in zip(_unpack(block, k.shape[1], k, v), (k, v)):
        view.copy_(x)
    return block


def _unpack(block, num_rows, k, v):
    """Views (batch, num_rows, heads, dim) of the keys and values in a block."""
    shapes = [(x.shape[0], num_rows, *x.shape[2:]) for x in (k, v)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(block[: sum(sizes)].split(sizes), shapes)]


def _rows_of(problem, source, keys, block, k, v):
    """Views of some keys of a rank's block, and of their values."""
    first = 0
    for chunk in problem.sharding.chunks[source]:
        if chunk.start <= keys.start and keys.end <= chunk.end:
            break
        first += chunk.size
    views = _unpack(block, problem.sharding.num_rows(source), k, v)
    return [x.narrow(1, first + keys.start - chunk.start, keys.size) for x in views]


def _merge(out, lse, part, part_lse):
    """Add a part to out (batch, rows, heads, dim) and lse (batch, heads, rows), in place."""
    total = torch.logaddexp(lse, part_lse)
    shift = torch.where(total == float("-inf"), 0.0, total)
    old, new = (torch.exp(x - shift).transpose(1, 2)[..., None] for x in (lse, part_lse))
    out.mul_(old).addcmul_(part.to(out.dtype), new)
    lse.copy_(total)
