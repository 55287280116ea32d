"""Which rows of a sequence a rank holds."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.checks import check_int, fail
from .._host.mesh import check_mesh
from .exchange import exchange


class Chunk(NamedTuple):
    """The rows [start, end) of a sequence."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def overlap(self, other: "Chunk") -> "Chunk":
        start = max(self.start, other.start)
        return Chunk(start, max(start, min(self.end, other.end)))


class Sharding(NamedTuple):
    """How a sequence lies over the ranks."""

    seqlen: int
    num_ranks: int
    load_balance: str | None

    @property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of each rank, in the order of its rows."""
        return _chunks(self)

    def num_rows(self, rank: int) -> int:
        return sum(chunk.size for chunk in self.chunks[rank])

    def in_order(self, parts: list[Tensor], dim: int) -> Tensor:
        """The whole sequence from the rows of each rank."""
        found = []
        for part, chunks in zip(parts, self.chunks):
            found += zip(chunks, split_rows(part, chunks, dim))
        return torch.cat([rows for _, rows in sorted(found, key=lambda pair: pair[0])], dim)

    def own_rows(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The rows of a rank from the whole sequence."""
        return torch.cat([x.narrow(dim, chunk.start, chunk.size) for chunk in self.chunks[rank]], dim)


@functools.lru_cache(maxsize=256)
def _chunks(sharding):
    seqlen, num_ranks, load_balance = sharding
    number = num_ranks if load_balance is None else 2 * num_ranks
    size = -(-seqlen // number)
    chunks = [Chunk(min(i * size, seqlen), min((i + 1) * size, seqlen)) for i in range(number)]
    if load_balance is None:
        return tuple((chunk,) for chunk in chunks)
    return tuple((chunks[r], chunks[-1 - r]) for r in range(num_ranks))


def keys_seen_by(queries: Chunk, window: tuple[int, int], seqlen: int) -> Chunk:
    """The keys that some of the queries see; window is (left, right), and -1 is unlimited."""
    left, right = window
    if queries.size == 0:
        return Chunk(queries.start, queries.start)
    start = 0 if left < 0 else max(queries.start - left, 0)
    return Chunk(start, seqlen if right < 0 else min(queries.end + right, seqlen))


def split_rows(x: Tensor, chunks: tuple[Chunk, ...], dim: int = 1) -> tuple[Tensor, ...]:
    """The rows of each chunk, of a rank's rows."""
    return x.split([chunk.size for chunk in chunks], dim)


def shard_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1, load_balance: str | None = "head_tail") -> Tensor:
    """The rows of a whole tensor that this rank holds.

    Args:
        x: a tensor that every rank has whole, with the sequence in `dim`. Any length, also less than the ranks.
        mesh: a DeviceMesh of one dimension.
        load_balance: "head_tail", for causal attention: the sequence has 2 * ranks chunks of ceil(seqlen / (2 * ranks))
            rows, of which the last may be short or empty. Rank r holds chunk r and, after it, chunk 2 * ranks - 1 - r,
            so that all ranks have the same work. None: rank r holds chunk r of as many chunks as ranks.

    Returns: a new tensor. Its gradient is that of these rows.

    Raises: TypeError, ValueError: an argument is wrong.
    """
    rank, num_ranks = check_mesh(mesh)
    return Sharding(x.shape[dim], num_ranks, check_load_balance(load_balance)).own_rows(x, rank, dim)


def unshard_sequence(
    x: Tensor, mesh: DeviceMesh, dim: int = 1, load_balance: str | None = "head_tail", seqlen: int | None = None
) -> Tensor:
    """The whole tensor, on every rank, of which `shard_sequence` gave this rank the rows x.

    Args:
        x: this rank's rows.
        seqlen: the length of the whole. None: all ranks hold the same number of rows.
        The rest as in `shard_sequence`.

    Returns: a new tensor. A rank's gradient of x is that of its own rows of its own result; nothing is summed over
    ranks.

    Raises: TypeError, ValueError: an argument is wrong, or x has not the rows of a sequence of this length.
    """
    rank, num_ranks = check_mesh(mesh)
    sharding = check_sharding(seqlen, x.shape[dim], rank, num_ranks, load_balance)
    return _Unshard.apply(x, mesh.get_group(), rank, dim % x.ndim, sharding)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, rank, dim, sharding):
        ctx.place = rank, dim, sharding
        ranks = range(sharding.num_ranks)
        shapes = [(*x.shape[:dim], sharding.num_rows(r), *x.shape[dim + 1 :]) for r in ranks]
        return sharding.in_order(exchange([x for _ in ranks], shapes, group), dim)

    @staticmethod
    def backward(ctx, gradient):
        rank, dim, sharding = ctx.place
        return sharding.own_rows(gradient, rank, dim), None, None, None, None


def check_load_balance(load_balance: Any) -> str | None:
    if load_balance not in ("head_tail", None):
        fail("load_balance", "'head_tail' or None", repr(load_balance))
    return load_balance


def check_sharding(seqlen: Any, num_rows: int, rank: int, num_ranks: int, load_balance: Any) -> Sharding:
    """The Sharding of a sequence, of which this rank has num_rows rows."""
    seqlen = num_rows * num_ranks if seqlen is None else check_int("seqlen", seqlen, "an int or None")
    sharding = Sharding(seqlen, num_ranks, check_load_balance(load_balance))
    if seqlen < 0 or sharding.num_rows(rank) != num_rows:
        expected = f"the length of a sequence of which rank {rank} of {num_ranks} has {num_rows} rows"
        fail("seqlen", expected, seqlen if seqlen < 0 else f"{seqlen}, of which it has {sharding.num_rows(rank)}")
    return sharding
