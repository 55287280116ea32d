"""What a call costs by each method: bytes, seconds and memory, as formulas of its shapes and of a cluster's rates.

"auto" takes the method with the least seconds. All figures are of the rank that has most to do, so all ranks choose
alike. `python -m perf parallel` prints them for real models.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .balance import Chunk, Sharding, in_teams
from .gather import keys_seen
from .local import Mask

GPUS_PER_NODE = 8
SUMS = 4  # bytes of an element of fp32 sums
# Bytes that a GPU's memory reads and writes for each byte that an all-to-all brings: it is packed and unpacked.
COPIED = 4
# Bytes for an element of a ring's fp32 sums, each time that a part is weighted and merged, or added.
MERGED, ADDED = 24, 8


class Cluster(NamedTuple):
    """Rates of one GPU and of its links in one direction; the defaults are H100s with 400 Gb/s each between nodes.

    FLOPs are those of 16-bit attention: forward as measured on an H100 with head_dim 128, backward as predicted. That
    a transfer reaches 0.8 of a link's data sheet, and the times of a launch and of a message, are assumptions.
    """

    forward_flops: float = 650e12
    backward_flops: float = 460e12
    memory_bytes: float = 3.0e12  # a second; a measured copy
    node_bytes: float = 0.8 * 450e9
    network_bytes: float = 0.8 * 50e9
    message: float = 2e-6
    launch: float = 50e-6  # by the host, of attention with the small operations around it, or of a collective
    workspace: float = 8 * 2**30  # bytes that "auto" may allocate on a GPU beside its rows


H100 = Cluster()


class Ranks(NamedTuple):
    """Of one dimension of a mesh."""

    number: int
    per_node: int


class Inner(NamedTuple):
    """Ranks that exchange rows for heads, of which each has so many rows at most."""

    ranks: Ranks
    rows: int


class HeadDims(NamedTuple):
    """Sizes of a row, see Sizes."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    latent: int | None = None
    key_flops: int = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call. pairs, rows and keys_seen are those of the rank that has most; pairs are (query, key) of one
    head that are not masked, and all_pairs those of all ranks. Rows are counted over all sequences, of which there are
    seqlen.

    With `latent`, so many numbers of a token travel in place of its keys and values, which each rank computes from them
    with `key_flops` for a token.

    Of a mesh of two dimensions they are those of the first: each of its ranks is all of the second, `inner`.
    """

    num_ranks: int
    ranks_per_node: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    element_size: int
    all_pairs: int
    pairs: int
    rows: int
    keys_seen: int
    latent: int | None = None
    key_flops: int = 0
    inner: Inner | None = None

    @property
    def others(self) -> int:
        """Keys that a rank sees and other ranks hold."""
        return max(self.keys_seen - self.rows, 0)

    @property
    def outside(self) -> int:
        """Rows of other nodes."""
        return max(self.seqlen - self.rows * self.ranks_per_node, 0)

    def takes_ulysses(self, ranks: int) -> bool:
        """Whether the heads can be divided among the ranks, see `ulysses.check_heads`."""
        fit = self.num_heads_kv % ranks == 0 or ranks % self.num_heads_kv == 0
        return self.num_heads_q % ranks == 0 and fit

    @property
    def queries(self) -> int:
        """Elements of a row's queries."""
        return self.num_heads_q * self.head_dim

    @property
    def outputs(self) -> int:
        return self.num_heads_q * self.head_dim_v

    @property
    def keys(self) -> int:
        """Elements of a row's keys and values, or of what travels in their place."""
        return self.latent or self.num_heads_kv * (self.head_dim + self.head_dim_v)


class Pass(NamedTuple):
    """bytes: received by a rank. workspace: bytes that it allocates beside its rows, their results and gradients."""

    bytes: int
    seconds: float
    workspace: int


class Cost(NamedTuple):
    forward: Pass
    backward: Pass

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


def sizes_of(
    head_dims: HeadDims,
    dtype: torch.dtype,
    sharding: Sharding,
    mask: Mask,
    outer: Ranks,
    inner: Ranks | None = None,
) -> Sizes:
    """Of a call over a mesh of one dimension or two."""
    *heads, latent, key_flops = head_dims
    of_inner = None
    if inner is not None:
        of_inner = Inner(inner, max(sharding.num_rows))
        sharding, _ = in_teams(sharding, outer.number)
    of_call = *outer, sharding.seqlen, *heads, dtype.itemsize
    return Sizes(*of_call, *work_of(sharding, mask), latent, key_flops, of_inner)


_RANKS: WeakKeyDictionary[dist.ProcessGroup, Ranks] = WeakKeyDictionary()


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    """The same on all ranks of a mesh."""
    if group not in _RANKS:
        nodes = [rank // GPUS_PER_NODE for rank in dist.get_process_group_ranks(group)]
        _RANKS[group] = Ranks(len(nodes), min(map(nodes.count, set(nodes))))
    return _RANKS[group]


@functools.lru_cache(maxsize=256)
def work_of(sharding: Sharding, mask: Mask) -> tuple[int, int, int, int]:
    """(all pairs, pairs, rows, keys seen) of Sizes."""
    pairs = []
    for segments in sharding.segments:
        documents = [sharding.documents[segment.document] for segment in segments]
        queries = [s.chunk.shifted(-document.start) for s, document in zip(segments, documents)]
        pairs.append(sum(pairs_of(q, mask.window, document.size) for q, document in zip(queries, documents)))
    seen = max(place.num_rows for place in keys_seen(sharding, mask))
    return sum(pairs), max(pairs), max(sharding.num_rows), seen


def pairs_of(queries: Chunk, window: tuple[int, int], seqlen: int) -> int:
    """Number of (query, key) pairs that are not masked; window is (left, right), and -1 is unlimited."""
    return _pairs_before(queries.end, window, seqlen) - _pairs_before(queries.start, window, seqlen)


def _pairs_before(n, window, seqlen):
    """Those of the first n queries: their last keys minus their first keys plus one, summed."""
    left, right = (seqlen if side < 0 else side for side in window)
    below_end = min(n, max(seqlen - 1 - right, 0))  # queries whose window ends before the sequence
    last = below_end * (below_end - 1) // 2 + below_end * right + (n - below_end) * (seqlen - 1)
    past_left = max(n - left, 0)
    return last - past_left * (past_left - 1) // 2 + n


@functools.lru_cache(maxsize=1024)
def choose(sizes: Sizes, cluster: Cluster = H100, with_ulysses: bool = True) -> str:
    """The method with the least seconds of both passes whose workspace fits; with the least workspace if none fits."""
    found = costs(sizes, cluster)
    if not with_ulysses:
        found.pop("ulysses", None)
    workspace = {method: max(each.workspace for each in cost) for method, cost in found.items()}
    fitting = [method for method in found if workspace[method] <= cluster.workspace]
    if fitting:
        return min(fitting, key=lambda method: found[method].seconds)
    return min(found, key=workspace.__getitem__)


def costs(sizes: Sizes, cluster: Cluster = H100) -> dict[str, Cost]:
    """Of each method that can take a call of these sizes; over the first dimension of a mesh of two."""
    if sizes.inner is not None:
        number = sizes.inner.ranks.number
        if not sizes.takes_ulysses(number):
            return {}
        inside = costs(_of_own_heads(sizes, number), cluster)
        inside.pop("ulysses", None)
        return {method: _exchanged(sizes, cluster, sizes.inner, sizes.rows, cost) for method, cost in inside.items()}
    found = {"all_gather": _all_gather(sizes, cluster), "ring": _ring(sizes, cluster)}
    if sizes.takes_ulysses(sizes.num_ranks):
        found["ulysses"] = _ulysses(sizes, cluster)
    return found


def _of_own_heads(s, num_ranks):
    """Of a rank's share of the heads."""
    heads = s.num_heads_q // num_ranks, max(s.num_heads_kv // num_ranks, 1)
    return replace(s, num_heads_q=heads[0], num_heads_kv=heads[1], key_flops=s.key_flops // num_ranks, inner=None)


def _all_gather(s, cluster):
    """The keys arrive, then attention; backward they arrive again, and their gradients leave at the end."""
    keys, sums = s.keys * s.element_size, s.keys * SUMS
    keys_arrive, sums_leave = (
        _all_to_all(s.num_ranks, cluster, s.others * size, s.outside * size) for size in (keys, sums)
    )
    forward = max(keys_arrive + _forward(s, cluster, s.pairs), 3 * cluster.launch)
    backward = max(keys_arrive + _backward(s, cluster, s.pairs) + sums_leave, 4 * cluster.launch)
    return Cost(
        Pass(s.others * keys, forward, 2 * s.keys_seen * keys),
        Pass(s.others * (keys + sums), backward, 2 * s.keys_seen * (keys + sums)),
    )


def _ring(s, cluster):
    """A block arrives while another one is attended to. The gradients of a block follow it, and arrive a step later."""
    ranks, keys, sums = s.num_ranks, s.rows * s.keys * s.element_size, s.rows * s.keys * SUMS
    link = cluster.node_bytes if s.outside == 0 else cluster.network_bytes
    keys_arrive, sums_arrive = (cluster.message + size / link for size in (keys, sums))
    merged = s.rows * s.outputs * (MERGED + s.element_size)
    added = s.rows * (s.queries * (ADDED + s.element_size) + s.keys * (MERGED + s.element_size))
    step = max(_forward(s, cluster, s.pairs) / ranks + merged / cluster.memory_bytes, 3 * cluster.launch)
    back = max(_backward(s, cluster, s.pairs) / ranks + added / cluster.memory_bytes, 3 * cluster.launch)
    if ranks == 1:
        forward, backward, received = step, back, (0, 0)
    else:
        forward = (ranks - 1) * max(step, keys_arrive) + step
        backward = max(back, keys_arrive) + (ranks - 2) * max(back, keys_arrive + sums_arrive)
        backward += max(back, sums_arrive) + sums_arrive
        received = (ranks - 1) * keys, (ranks - 1) * keys + ranks * sums
    workspace = 2 * keys + s.rows * s.outputs * (2 * SUMS + s.element_size)
    of_backward = 2 * keys + 3 * sums + s.rows * s.queries * SUMS
    return Cost(Pass(received[0], forward, workspace), Pass(received[1], backward, of_backward))


def _ulysses(s, cluster):
    """Whole sequences of a rank's heads."""
    own, whole = _of_own_heads(s, s.num_ranks), Inner(Ranks(s.num_ranks, s.ranks_per_node), s.rows)
    inside = Cost(*(Pass(0, attend(own, cluster, s.all_pairs), 0) for attend in (_forward, _backward)))
    return _exchanged(s, cluster, whole, s.seqlen, inside)


def _exchanged(s, cluster, inner, rows, inside):
    """Rows of all heads leave, so many rows of some arrive; attention as `inside`; and back. Backward the same."""
    number, per_node = inner.ranks
    own = _of_own_heads(s, number)
    row = (own.queries + own.outputs + own.keys) * s.element_size
    of_lse = s.num_heads_q * SUMS // number
    size = max(rows - inner.rows, 0) * (row + of_lse)
    outside = max(rows - inner.rows * per_node, 0) * (row + of_lse)
    moved = _all_to_all(number, cluster, size, outside) + _all_to_all(number, cluster, 0, 0)  # there and back
    return Cost(*(_with_exchange(each, cluster, size, moved, 2 * rows * row) for each in inside))


def _with_exchange(inside, cluster, size, moved, workspace):
    seconds = max(moved + inside.seconds, 3 * cluster.launch)
    return Pass(size + inside.bytes, seconds, workspace + inside.workspace)


def _all_to_all(num_ranks, cluster, size, outside):
    """Seconds until so many bytes, of which other nodes send so many, have arrived and are unpacked."""
    outside = min(outside, size)
    links = max(outside / cluster.network_bytes, (size - outside) / cluster.node_bytes)
    return links + (num_ranks - 1) * cluster.message + COPIED * size / cluster.memory_bytes


def _forward(s, cluster, pairs):
    """Seconds of attention: two matmuls for each pair."""
    flops = 2 * s.num_heads_q * (s.head_dim + s.head_dim_v) * pairs + s.key_flops * s.keys_seen
    return flops / (cluster.forward_flops * 2 / s.element_size)


def _backward(s, cluster, pairs):
    """Five matmuls for each pair; keys and values of latent vectors are computed again, with two gradients."""
    flops = 2 * s.num_heads_q * (3 * s.head_dim + 2 * s.head_dim_v) * pairs
    return (flops + 3 * s.key_flops * s.keys_seen) / (cluster.backward_flops * 2 / s.element_size)
