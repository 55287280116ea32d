"""Which rows of a sequence a rank holds."""

import functools
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from .._host.checks import check_cu_seqlens, check_int, fail
from .._host.mesh import check_mesh
from .._host.observers import constant_if_traced
from .exchange import exchange

LOAD_BALANCES = ("head_tail", "per_document", None)
# Rows are taken slice by slice if there are no more slices than this, and by an index tensor otherwise.
MOST_SLICES = 16
LONGEST_PRINTED = 100  # characters of an order of rows


class Chunk(NamedTuple):
    """The rows [start, end) of a tensor or of the whole sequence."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    def shifted(self, rows: int) -> "Chunk":
        return Chunk(self.start + rows, self.end + rows)

    def overlap(self, other: "Chunk") -> "Chunk":
        start = max(self.start, other.start)
        return Chunk(start, max(start, min(self.end, other.end)))


def joined(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """The chunks without empty ones, and with one for two that follow each other."""
    found: list[Chunk] = []
    for chunk in chunks:
        if found and chunk.start == found[-1].end:
            found[-1] = Chunk(found[-1].start, chunk.end)
        elif chunk.size:
            found.append(chunk)
    return tuple(found)


def overlaps(chunks: Sequence[Chunk], others: Sequence[Chunk]) -> list[Chunk]:
    """What two lists of chunks, each in order, have in common: in order, cut where either is."""
    found, i, j = [], 0, 0
    while i < len(chunks) and j < len(others):
        common = chunks[i].overlap(others[j])
        if common.size:
            found.append(common)
        if chunks[i].end <= others[j].end:
            i += 1
        else:
            j += 1
    return found


class Pieces:
    """Rows of a tensor in the order in which they are taken from it; no row comes twice."""

    def __init__(self, chunks: Iterable[Chunk]):
        self.chunks = joined(chunks)
        self._indices: dict[torch.device, Tensor] = {}

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """These rows of x; a view if they are one chunk."""
        if len(self.chunks) > MOST_SLICES:
            return x.index_select(dim, self._index(x.device))
        slices = [x.narrow(dim, chunk.start, chunk.size) for chunk in self.chunks or (Chunk(0, 0),)]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim)

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Add to these rows of total what `rows` has in this order."""
        if len(self.chunks) > MOST_SLICES:
            total.index_add_(0, self._index(total.device), rows)
            return
        for chunk, part in zip(self.chunks, rows.split([chunk.size for chunk in self.chunks])):
            total[chunk.rows] += part

    def _index(self, device):
        if device not in self._indices:
            rows = torch.cat([torch.arange(*chunk, dtype=torch.int32) for chunk in self.chunks])
            self._indices[device] = on_device(rows, device)
        return self._indices[device]


class Place:
    """Chunks of the whole sequence, in order, that are the rows of a tensor, one after the other."""

    def __init__(self, chunks: Iterable[Chunk]):
        self.chunks = joined(chunks)
        self.num_rows = 0
        self._starts, self._firsts = [], []
        for chunk in self.chunks:
            self._starts.append(chunk.start)
            self._firsts.append(self.num_rows)
            self.num_rows += chunk.size

    def row_of(self, position: int) -> int:
        i = bisect_right(self._starts, position) - 1
        return self._firsts[i] + position - self._starts[i]

    def rows_of(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """The rows of chunks, each of which lies in one of this place's."""
        firsts = ((self.row_of(chunk.start), chunk.size) for chunk in chunks)
        return [Chunk(first, first + size) for first, size in firsts]


class Segment(NamedTuple):
    """Rows of one document that a rank holds one after the other."""

    document: int
    chunk: Chunk  # of the whole
    row: int  # the first of them among the rank's rows

    @property
    def rows(self) -> Chunk:
        return Chunk(self.row, self.row + self.chunk.size)


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a sequence of seqlen rows lies over the ranks; see `sharding_of`.

    Document i is the rows [bounds[i], bounds[i + 1]); the rows after the last bound belong to none. Either each of them
    is cut (cut_each) or the whole is, into one chunk a rank or (head_tail) two, or as `given`.
    """

    bounds: tuple[int, ...]
    seqlen: int
    num_ranks: int
    cut_each: bool
    head_tail: bool
    given: tuple[tuple[Chunk, ...], ...] | None = None  # chunks of each rank, of all that is cut

    @functools.cached_property
    def rows(self) -> tuple[tuple[Chunk, ...], ...]:
        """Of each rank, in the order in which it has them."""
        ends = (*self.bounds, self.seqlen) if self.cut_each else (0, self.seqlen)
        chunks: list[list[Chunk]] = [[] for _ in range(self.num_ranks)]
        for start, end in itertools.pairwise(ends):
            for of_rank, cut in zip(chunks, self._cut(end - start)):
                of_rank += [chunk.shifted(start) for chunk in cut]
        return tuple(map(joined, chunks))

    def _cut(self, size):
        """Chunks of each rank."""
        if self.given is not None:
            return self.given if size else [()] * self.num_ranks
        number = 2 * self.num_ranks if self.head_tail else self.num_ranks
        chunks = [Chunk(size * i // number, size * (i + 1) // number) for i in range(number)]
        return zip(chunks, reversed(chunks[self.num_ranks :])) if self.head_tail else zip(chunks)

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """The rows of each rank, in the order of the whole."""
        return tuple(Place(sorted(chunks)) for chunks in self.rows)

    @functools.cached_property
    def permutations(self) -> "tuple[Permutation | None, ...]":
        """Of each rank; None: its rows are in the order of the whole."""
        return tuple(map(_permutation, self.rows, self.places))

    @property
    def num_rows(self) -> list[int]:
        """Of each rank."""
        return [place.num_rows for place in self.places]

    @functools.cached_property
    def documents(self) -> tuple[Chunk, ...]:
        return tuple(itertools.starmap(Chunk, itertools.pairwise(self.bounds)))

    @functools.cached_property
    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """Of each rank, in the order of its rows."""
        return tuple(tuple(self._segments_of(place)) for place in self.places)

    def _segments_of(self, place):
        for chunk in overlaps(place.chunks, self.documents):
            # The last of the documents that start here: those before it are empty.
            document = bisect_right(self.bounds, chunk.start) - 1
            yield Segment(document, chunk, place.row_of(chunk.start))


class Permutation(NamedTuple):
    """From the order in which a rank has its rows to that of the whole, and back."""

    in_order: Pieces
    as_given: Pieces


def _permutation(chunks, place):
    if list(chunks) == sorted(chunks):
        return None
    ends = list(itertools.accumulate((chunk.size for chunk in chunks), initial=0))
    rows = sorted(zip(chunks, itertools.starmap(Chunk, itertools.pairwise(ends))))
    return Permutation(Pieces(own for _, own in rows), Pieces(place.rows_of(chunks)))


def in_order(sharding: Sharding, rank: int, x: Tensor, dim: int = 0) -> Tensor:
    """A rank's rows in the order of the whole."""
    permutation = sharding.permutations[rank]
    return x if permutation is None else permutation.in_order.take(x, dim)


def as_given(sharding: Sharding, rank: int, x: Tensor, dim: int = 0) -> Tensor:
    """And in the order in which the rank has them."""
    permutation = sharding.permutations[rank]
    return x if permutation is None else permutation.as_given.take(x, dim)


class Team(NamedTuple):
    """Ranks whose rows together are those of one place."""

    num_rows: list[int]  # of each rank
    order: Pieces  # the rows of the place, from those of the ranks one after the other
    order_of_ranks: Pieces  # and back


@functools.lru_cache(maxsize=64)
def in_teams(sharding: Sharding, number: int) -> tuple[Sharding, tuple[Team, ...]]:
    """The Sharding whose ranks are `number` teams, of as many ranks each that follow each other, and the teams.

    Fewer chunks of a sequence begin where some of more chunks do, so the ranks of a team have together what
    `shard_sequence` gives to one of `number` ranks, in the order of the whole.
    """
    size, given = sharding.num_ranks // number, sharding.given
    if given is not None:
        given = tuple(joined(sorted(itertools.chain(*given[i * size : (i + 1) * size]))) for i in range(number))
    of_teams = replace(sharding, num_ranks=number, given=given)
    teams = (_team(place, sharding.places[i * size : (i + 1) * size]) for i, place in enumerate(of_teams.places))
    return of_teams, tuple(teams)


def _team(whole, places):
    found, first = [], 0
    for place in places:
        rows = (chunk.shifted(first) for chunk in place.rows_of(place.chunks))
        found += zip(place.chunks, rows)
        first += place.num_rows
    order_of_ranks = whole.rows_of(chunk for place in places for chunk in place.chunks)
    return Team([place.num_rows for place in places], Pieces(rows for _, rows in sorted(found)), Pieces(order_of_ranks))


@functools.lru_cache(maxsize=64)
def sharding_of(bounds: tuple[int, ...], seqlen: int, num_ranks: int, load_balance: str | None) -> Sharding:
    """A packed batch, sharded as `shard_sequence` says. The same object for the same arguments: others remember it."""
    given = _given(load_balance, seqlen, num_ranks)
    return Sharding(bounds, seqlen, num_ranks, load_balance == "per_document", load_balance is not None, given)


@functools.lru_cache(maxsize=64)
def sharding_of_batch(batch: int, seqlen: int, num_ranks: int, load_balance: str | None) -> Sharding:
    """Sequences of one length that are sharded alike: each rank's rows are (batch, rows), flattened."""
    bounds = tuple(range(0, (batch + 1) * seqlen, seqlen)) if seqlen else (0,) * (batch + 1)
    given = _given(load_balance, seqlen, num_ranks)
    return Sharding(bounds, batch * seqlen, num_ranks, True, load_balance is not None, given)


def _given(load_balance, seqlen, num_ranks):
    """Chunks of each rank by an order of `_order_of`, of which each has as many rows; None by a name."""
    if load_balance in LOAD_BALANCES:
        return None
    order = [Chunk(*map(int, chunk.split("-"))) for chunk in load_balance.split(" ")[1:]]
    of_order = sum(chunk.size for chunk in order)
    if of_order != seqlen:
        fail("load_balance", f"a load balancer of {seqlen} rows", of_order)
    if seqlen % num_ranks:
        fail("load_balance", f"with a load balancer of torch, a length in multiples of {num_ranks} ranks", seqlen)
    size, first = seqlen // num_ranks, 0
    of_ranks: list[list[Chunk]] = [[] for _ in range(num_ranks)]
    for start, end in order:
        while start < end:
            cut = min(end, start + size - first % size)
            of_ranks[first // size].append(Chunk(start, cut))
            start, first = cut, first + cut - start
    return tuple(map(joined, of_ranks))


def rows_of_rank(seqlen: int, rank: int, num_ranks: int, load_balance: str | None) -> int:
    """Of a sequence that is cut by any but "per_document"."""
    if load_balance not in LOAD_BALANCES:
        return seqlen // num_ranks
    number = 2 * num_ranks if load_balance else num_ranks
    which = (rank, number - 1 - rank) if load_balance else (rank,)
    return sum(seqlen * (i + 1) // number - seqlen * i // number for i in which)


def rows_at_most(seqlen: int, num_ranks: int, num_parts: int) -> int:
    """The most rows of a rank, if so many parts of a sequence are each cut into two chunks a rank."""
    return seqlen if num_ranks == 1 else seqlen // num_ranks + 2 * num_parts


def shard_sequence(
    x: Tensor,
    mesh: DeviceMesh,
    dim: int = 1,
    load_balance: Any = "head_tail",
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The rows of a whole tensor that this rank holds.

    Args:
        x: a tensor that every rank has whole, with the sequence in `dim`. Any length, also less than the ranks.
        mesh: a DeviceMesh of one dimension, or of two, whose ranks are counted row by row.
        load_balance: which rows of seqlen.
            None: rank r of R holds chunk r of R, the rows from r seqlen // R to (r + 1) seqlen // R.
            "head_tail", for causal attention: of 2 R such chunks rank r holds chunk r and, after it, chunk 2 R - 1 - r,
            so that all ranks have the same work.
            "per_document", for packed documents: as "head_tail", but each document is cut, so that all ranks have the
            same work for documents of any length; the rows after the last one are cut too. A rank holds its rows of
            each document after those of the document before. Documents shorter than 2 R rows give some ranks a row
            more than others.
            A load balancer of torch: the rows that torch's context parallelism gives to the rank, in that order; the
            length is the balancer's, in multiples of the ranks. All sequences of a batch have one order. Attention
            makes a call for each chunk of rows that do not follow each other: many for _PTRRLoadBalancer, whose chunks
            are the blocks of a BlockMask, and few for the others. _HeadTailLoadBalancer is "head_tail", with the length
            of x for its own.
        cu_seqlens: (documents + 1,) int32, where the documents of a packed batch begin and end; needed by
            "per_document", and without effect otherwise. On the CPU it costs nothing. On a GPU it is read at its first
            use, a device-to-host sync, and again if an operator of torch has written to it.

    Returns: a new tensor. Its gradient is that of these rows.

    Raises: TypeError, ValueError: an argument is wrong.

    Example:
        >>> from triton_attn.parallel import shard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> shard_sequence(torch.arange(8)[None], mesh)  # of one rank; of two, rank 0 has 0, 1, 6, 7
        tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    """
    rank, num_ranks = check_mesh_dims(mesh)
    sharding = _sharding_of_rows(x.shape[dim], cu_seqlens, num_ranks, load_balance)
    rows = Pieces(sharding.rows[rank]).take(x, dim)
    return rows.clone(memory_format=torch.contiguous_format) if rows._is_view() else rows


def unshard_sequence(
    x: Tensor,
    mesh: DeviceMesh,
    dim: int = 1,
    load_balance: Any = "head_tail",
    seqlen: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The whole tensor, on every rank, of which `shard_sequence` gave this rank the rows x.

    Args:
        x: this rank's rows.
        seqlen: the length of the whole. None: all ranks hold the same number of rows.
        The rest as in `shard_sequence`.

    Returns: a new tensor. A rank's gradient of x is that of its own rows of its own result; nothing is summed over
    ranks.

    Raises: TypeError, ValueError: an argument is wrong, or x has not the rows of a sequence of this length.

    Example:
        >>> from triton_attn.parallel import shard_sequence, unshard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> x = torch.randn(1, 10, 64)
        >>> torch.equal(unshard_sequence(shard_sequence(x, mesh), mesh, seqlen=10), x)
        True
    """
    rank, num_ranks = check_mesh_dims(mesh)
    seqlen = check_seqlen(seqlen, x.shape[dim], num_ranks)
    sharding = _sharding_of_rows(seqlen, cu_seqlens, num_ranks, load_balance)
    check_num_rows(sharding, rank, x.shape[dim])
    return _Unshard.apply(x, mesh.get_all_groups(), rank, dim % x.ndim, sharding)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, rank, dim, sharding):
        ctx.place = rank, dim, sharding
        x = in_order(sharding, rank, x, dim)
        for group in reversed(groups):  # each brings the rows of its ranks together
            size = dist.get_world_size(group)
            sharding, teams = in_teams(sharding, sharding.num_ranks // size)
            rank //= size
            shapes = [(*x.shape[:dim], num_rows, *x.shape[dim + 1 :]) for num_rows in teams[rank].num_rows]
            x = teams[rank].order.take(torch.cat(exchange([x for _ in shapes], shapes, group), dim), dim)
        return x.contiguous()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Any:
        rank, dim, sharding = ctx.place
        return Pieces(sharding.rows[rank]).take(gradient, dim), None, None, None, None


def check_mesh_dims(mesh: Any) -> tuple[int, int]:
    """(rank, number of ranks) of a mesh of one dimension, or of two, whose ranks are counted row by row."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim == 1:
        return check_mesh(mesh)
    if mesh.ndim > 2:
        fail("mesh", "one or two dimensions", mesh.ndim)
    if not _is_regular(mesh):
        fail("mesh", "ranks in ascending order, row by row, as far apart in each row", mesh.mesh.tolist())
    return mesh.get_local_rank(0) * mesh.size(1) + mesh.get_local_rank(1), mesh.size()


@torch.compiler.assume_constant_result
def _is_regular(mesh):
    return _has_regular_ranks(mesh)


@functools.lru_cache(maxsize=64)
def _has_regular_ranks(mesh):
    return are_regular(mesh.mesh.tolist())


def are_regular(rows: list[list[int]]) -> bool:
    """Whether ranks ascend, row by row, and are as far apart in each row."""
    ranks = [rank for row in rows for rank in row]
    steps = {tuple(rank - row[0] for rank in row) for row in rows}
    return len(steps) == 1 and ranks == sorted(ranks)


def check_load_balance(load_balance: Any, is_packed: bool) -> str | None:
    """The name of a load balance; of a balancer of torch, whose classes are private and may move, an order of rows.

    torch's head-and-tail balancer is "head_tail", so that lengths need not suit it.
    """
    names = LOAD_BALANCES if is_packed else ("head_tail", None)
    if type(load_balance).__name__ == "_HeadTailLoadBalancer":
        return "head_tail"
    if hasattr(load_balance, "_generate_indices"):
        return _order_of(load_balance)
    if load_balance not in names:
        expected = f"{', '.join(map(repr, names[:-1]))}, None or a load balancer of torch"
        fail("load_balance", expected, repr(load_balance))
    return load_balance


_ORDERS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@constant_if_traced
def _order_of(balancer):
    """Its name and the rows of a sequence in its order, chunk by chunk, such as "_PTRRLoadBalancer 0-4 12-16 4-12". A
    device-to-host sync at its first use, where it is on a GPU."""
    if balancer not in _ORDERS:
        rows = balancer._generate_indices().cpu()
        if rows.ndim != 2 or rows.shape[0] != 1:
            expected = "a load balancer with one order for all sequences, indices (1, seqlen)"
            fail("load_balance", expected, tuple(rows.shape))
        order = rows[0].long()
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            fail("load_balance", "a load balancer whose order has each row once", order.tolist()[:10])
        ends = [0, *(order.diff() != 1).nonzero()[:, 0].add(1).tolist(), len(order)]
        chunks = (f"{order[i]}-{order[i] + end - i}" for i, end in itertools.pairwise(ends) if i < end)
        _ORDERS[balancer] = " ".join([type(balancer).__name__, *chunks])
    return _ORDERS[balancer]


def described(load_balance: str | None) -> str | None:
    """What ranks compare, and errors print: of a long order its beginning and a digest."""
    if load_balance is None or len(load_balance) <= LONGEST_PRINTED:
        return load_balance
    digest = hashlib.blake2b(load_balance.encode(), digest_size=8).hexdigest()
    return f"{load_balance[:LONGEST_PRINTED]}... (digest {digest})"


def check_seqlen(seqlen: Any, num_rows: int, num_ranks: int) -> int:
    """The length of the whole sequence; None: all ranks hold num_rows rows."""
    if seqlen is None:
        return num_rows * num_ranks
    seqlen = check_int("seqlen", seqlen, "an int or None")
    if seqlen < 0:
        fail("seqlen", "0 or more", seqlen)
    return seqlen


def check_num_rows(sharding: Sharding, rank: int, num_rows: int, batch: int = 1) -> None:
    """Raise unless a rank has num_rows rows of each of `batch` sequences."""
    expected = sharding.num_rows[rank] // max(batch, 1)
    if num_rows != expected:
        seqlen, which = sharding.seqlen // batch, f"rank {rank} of {sharding.num_ranks}"
        fail(
            "seqlen",
            f"the length of a sequence of which {which} has {num_rows} rows",
            f"{seqlen}, of which it has {expected}",
        )


def _sharding_of_rows(seqlen, cu_seqlens, num_ranks, load_balance):
    """The Sharding of one dimension."""
    load_balance = check_load_balance(load_balance, cu_seqlens is not None)
    bounds = (0, seqlen) if cu_seqlens is None else bounds_of(cu_seqlens, seqlen)
    return sharding_of(bounds, seqlen, num_ranks, load_balance)


_READ: Any = WeakTensorKeyDictionary()


def bounds_of(cu_seqlens: Any, seqlen: int) -> tuple[int, ...]:
    """cu_seqlens as ints, checked. A device-to-host sync where a GPU tensor is new or has changed."""
    check_cu_seqlens("cu_seqlens", cu_seqlens, getattr(cu_seqlens, "device", None))
    bounds = _read(cu_seqlens)
    if bounds[0] != 0:
        fail("cu_seqlens[0]", "0", bounds[0])
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start > end:
            fail(f"cu_seqlens[{i + 1}]", f"{start} or more", end)
    if bounds[-1] > seqlen:
        fail("cu_seqlens[-1]", f"at most the {seqlen} rows of the whole", bounds[-1])
    return bounds


def _read(cu_seqlens):
    if _is_on_host(cu_seqlens) or cu_seqlens.is_inference():  # an inference tensor does not count its writes
        return tuple(cu_seqlens.tolist())
    known = _READ.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        _READ[cu_seqlens] = known = cu_seqlens._version, tuple(cu_seqlens.tolist())
    return known[1]


def _is_on_host(x):
    return x.is_cpu


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without a wait for the device."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
