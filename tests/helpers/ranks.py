"""Ranks of a process group in one process, with the methods of vLLM's groups that our doors call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Ranks:
    """A thread per rank. One runs at a time, since Triton's interpreter is not safe with threads; the others wait for
    their turn or in an exchange.
    """

    def __init__(self, world_size):
        self.parts, self.num_exchanges = [None] * world_size, 0
        self.turn, self.barrier = threading.Lock(), threading.Barrier(world_size)

    def run(self, function):
        """[function(group of a rank) for all ranks]."""
        groups = [Group(self, rank) for rank in range(len(self.parts))]
        with ThreadPoolExecutor(len(groups)) as pool:
            return list(pool.map(lambda group: self._run_one(function, group), groups))

    def _run_one(self, function, group):
        with self.turn:
            try:
                return function(group)
            except BaseException:
                self.barrier.abort()
                raise

    def exchange(self, rank, part):
        """What all ranks give, in their order."""
        self.parts[rank] = part
        self.num_exchanges += rank == 0
        self.turn.release()
        try:
            self.barrier.wait()
            parts = list(self.parts)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return parts


class Group:
    """vLLM's GroupCoordinator, as one rank has it."""

    def __init__(self, ranks, rank):
        self.ranks, self.rank_in_group, self.world_size = ranks, rank, len(ranks.parts)

    def exchange(self, part):
        return self.ranks.exchange(self.rank_in_group, part)

    def all_gather(self, x, dim):
        return torch.cat(self.exchange(x.clone()), dim=dim)

    def reduce_scatter(self, x, dim):
        return sum(self.exchange(x.clone())).chunk(self.world_size, dim=dim)[self.rank_in_group].contiguous()


def combine(out, lse, group, return_lse):
    """vLLM's exchange over ranks in fp64: (out (tokens, heads of all, dim), lse (tokens, heads of all)) of a rank's
    keys to that of all keys for the rank's heads."""
    assert return_lse
    outs, lses = (torch.stack(group.exchange(x)).double() for x in (out, lse))
    total = lses.logsumexp(0)
    weights = (lses - total).exp().nan_to_num(0)
    results = (outs * weights.unsqueeze(-1)).sum(0).to(out.dtype), total.to(lse.dtype)
    return tuple(x.chunk(group.world_size, dim=1)[group.rank_in_group] for x in results)
