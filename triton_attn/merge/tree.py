"""Prefix trees: which pages a call reads once for all sequences that share them, planned on the host."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._host.checks import check_bool, check_int, check_length, check_size, fail
from .._host.gpu import count_sms, gpu_arch
from .._host.prefix_tree import PrefixTree, TreeSizes
from .splits import BYTES_PER_NS, FLOP_PER_NS, LAUNCH_NS, MAX_SPLITS, MAX_WORKSPACE_BYTES, PROGRAM_NS, PROGRAM_RATE

TILE_ROWS = 128  # of a tile that reads the keys of a node; 64 for rows of more than 256 elements
MIN_KEYS = 128  # of a part of a node
NUM_SIZES = 16  # of parts that are tried, in each of two series


class TreeWork(NamedTuple):
    """What decides whether a node pays."""

    page_bytes: int  # of a layer's keys and values
    page_size: int
    num_heads_q: int
    num_heads_kv: int
    row_elements: int  # of a row of the results
    num_sms: int

    @property
    def tile_rows(self):
        return TILE_ROWS if self.row_elements <= 256 else TILE_ROWS // 2

    def tiles(self, queries):
        """Tiles of rows of a KV head."""
        return -(-queries * (self.num_heads_q // self.num_heads_kv) // self.tile_rows)

    def result_bytes(self, queries):
        """Bytes of a partial result, written and read."""
        return 8 * (self.row_elements + 1) * self.num_heads_q * queries


class Nodes(NamedTuple):
    """Chosen nodes, an array for each field. Members are places in depth-first order."""

    first: NDArray[np.int64]  # member
    end: NDArray[np.int64]
    first_page: NDArray[np.int64]
    end_page: NDArray[np.int64]
    queries: NDArray[np.int64]
    loads_alone: NDArray[np.int64]  # pages, for each tile of rows of a member, if each reads its own by itself


def prefix_tree(
    block_table: Tensor | NDArray[Any] | Sequence[Sequence[int]],
    cache_seqlens: Tensor | NDArray[Any] | Sequence[int],
    page_size: int,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim_v: int,
    token_bytes: int,
    seqlens_q: int | Tensor | NDArray[Any] | Sequence[int] = 1,
    always: bool = False,
    device: torch.device | str | int | None = None,
) -> PrefixTree | None:
    """The `PrefixTree` of a block table on the host, for engines with tables of their own; None if sharing does not
    pay.

        node: columns [a, b) of the table, and all sequences whose entries [0, b) are the same
        tree: the nodes for which bytes saved > bytes of their partial results, if `tree_cost` < `alone_cost`

    Where nothing is shared, or too little, the call without a tree is faster and None is returned: pass it on.

    Args:
        block_table: (batch, max_pages), integers on the host. Entries past a sequence's last page are not read.
        cache_seqlens: (batch,) number of keys of each sequence, new ones included, on the host.
        page_size: tokens on a page.
        num_heads_q, num_heads_kv, head_dim_v: of the call; for MLA num_heads_kv is 1 and head_dim_v kv_lora_rank.
        token_bytes: bytes of a token in one layer, `kv_cache_bytes_per_token(num_layers=1, ...)`.
        seqlens_q: queries of each sequence: one number, or (batch,) on the host.
        always: make nodes of all groups, whether or not they pay; None only where nothing is shared.
        device: of the call; None is torch's default device.

    Raises:
        TypeError, ValueError: an argument is wrong.

    The tree stays right as long as the pages do: sequences may grow, and one tree serves all layers of a step. It costs
    the host O(pages of the table); a cache's `prefix_groups` finds the same tree from what changed.

    Example:
        >>> table = [[*range(256), 256 + i] for i in range(128)]  # 128 beams on a prompt of 4096 tokens
        >>> shape = dict(num_heads_q=32, num_heads_kv=8, head_dim_v=128, token_bytes=4096)
        >>> tree = triton_attn.prefix_tree(table, [4100] * 128, page_size=16, **shape, device="cpu")
        >>> triton_attn.prefix_tree(table[:2], [4100] * 2, page_size=16, **shape, device="cpu") is None
        True

    Source: Ye et al., ChunkAttention (2024), arXiv:2402.15220; Juravsky et al., Hydragen (2024), arXiv:2402.05099.
    """
    device = torch.empty(0, device=device).device
    work = tree_work(page_size, num_heads_q, num_heads_kv, head_dim_v, token_bytes, device)
    table, seqlens = _on_host("block_table", block_table, 2), _on_host("cache_seqlens", cache_seqlens, 1)
    if len(table) != len(seqlens):
        fail("cache_seqlens", f"one for each of {len(table)} rows of block_table", len(seqlens))
    if seqlens.size and not 0 <= seqlens.min() <= seqlens.max() <= table.shape[1] * page_size:
        fail("cache_seqlens", f"0 to the table's {table.shape[1] * page_size}", seqlens.tolist())
    always, queries = check_bool("always", always), lengths_q(seqlens_q, len(seqlens))
    tree = plan_tree(*sorted_tables(table, -(-seqlens // page_size)), queries, work, always)
    return None if tree is None else tree.on(device)


def tree_work(page_size, num_heads_q, num_heads_kv, head_dim_v, token_bytes, device):
    """A TreeWork of checked sizes."""
    sizes = dict(page_size=page_size, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv)
    sizes |= dict(head_dim_v=head_dim_v, token_bytes=token_bytes)
    page_size, num_heads_q, num_heads_kv, head_dim_v, token_bytes = (check_size(*item) for item in sizes.items())
    if num_heads_q % num_heads_kv:
        fail("num_heads_kv", f"a number that divides num_heads_q = {num_heads_q}", num_heads_kv)
    num_sms = count_sms(device, gpu_arch(device.index) if device.type == "cuda" else "interpreter")
    return TreeWork(token_bytes * page_size, page_size, num_heads_q, num_heads_kv, head_dim_v, num_sms)


def lengths_q(seqlens_q, batch):
    """int64 (batch,) from a number or one for each sequence."""
    if not hasattr(seqlens_q, "__len__"):
        return np.full(batch, check_length("seqlens_q", check_int("seqlens_q", seqlens_q)))
    seqlens = _on_host("seqlens_q", seqlens_q, 1)
    if len(seqlens) != batch or (batch and seqlens.min() < 0):
        fail("seqlens_q", f"{batch} numbers, 0 or more", seqlens.tolist())
    return seqlens


def _on_host(name, numbers, ndim):
    if isinstance(numbers, Tensor):
        if numbers.device.type != "cpu":
            fail(name, "values on the host", numbers.device)
        numbers = numbers.numpy()
    array = np.asarray(numbers)
    if array.size == 0:
        array = array.astype(np.int64).reshape(len(array), *array.shape[1:ndim], *[0] * (ndim - array.ndim))
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        fail(name, f"integers in {ndim} dimension(s)", f"{array.dtype} of shape {array.shape}", TypeError)
    return array.astype(np.int64)


def key_of(pages):
    """Bytes that sort as lists of pages do."""
    return pages.astype(">u4").tobytes()


def num_shared(key, other):
    """Leading pages that two keys have in common."""
    n = min(len(key), len(other)) // 4
    differ = np.frombuffer(key, np.uint32, n) != np.frombuffer(other, np.uint32, n)
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def sorted_tables(table, counts):
    """(order, shared): sequences sorted by their pages, and how many leading pages each shares with the one before."""
    keys = [key_of(pages[:count]) for pages, count in zip(table, counts.tolist())]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0, *(num_shared(keys[a], keys[b]) for a, b in itertools.pairwise(order))]
    return np.array(order, np.int64), shared[: len(order)]


def groups(shared):
    """(pages, first, end) of all groups of sorted sequences that share more pages than larger groups do, the largest
    first."""
    open_groups, found = [], []
    for i, pages in enumerate([*shared[1:], 0], 1):
        first = i - 1
        while open_groups and open_groups[-1][1] > pages:
            first, more = open_groups.pop()
            found.append((more, first, i))
        if pages and not (open_groups and open_groups[-1][1] == pages):
            open_groups.append((first, pages))
    return sorted(found)


def choose_nodes(shared, queries, work, starts=None):
    """The Nodes that save more bytes than their partial results take; all groups if work is None.

    Groups are taken from the root on. The pages of a group that is not chosen count for the groups below it. starts are
    the first pages that members have, 0 if None: a node begins at the first page that any of its members has.
    """
    before = np.concatenate([[0], queries.cumsum()])
    tiles = 0 * queries if work is None else work.tiles(queries)
    before, tiles_before = before.tolist(), np.concatenate([[0], tiles.cumsum()]).tolist()
    covered = np.zeros(len(queries), np.int64)
    chosen = []
    for end_page, first, end in groups(shared):
        num, first_page = before[end] - before[first], covered.item(first)
        loads_alone = (tiles_before[end] - tiles_before[first]) * (end_page - first_page)
        if starts is not None:
            first_page = max(first_page, starts[first:end].min())
            own = end_page - np.maximum(starts[first:end], first_page)
            loads_alone = int((tiles[first:end] * np.maximum(own, 0)).sum())
        if work is None:
            pays = num > 0 and first_page < end_page
        else:
            saved = (loads_alone - work.tiles(num) * (end_page - first_page)) * work.page_bytes
            pays = saved > work.result_bytes(num)
        if pays:
            chosen.append((first, end, first_page, end_page, num, loads_alone))
            covered[first:end] = end_page
    return Nodes._make(np.array(chosen, np.int64).reshape(-1, len(Nodes._fields)).T)


def tree_cost(nodes, part, work):
    """Nanoseconds that a call takes for the keys of nodes, which are cut in parts of at most so many pages; for an
    array of such sizes an array.

        cost     = programs + max(loads, matmuls, loads of a part by one program) + results + 2 * LAUNCH_NS
        programs = PROGRAM_NS * ceil(tiles * parts * KV heads / SMs)
        loads    = bytes of the pages * tiles of the members' rows / bandwidth
        matmuls  = 4 * row elements * rows of the tiles * keys / rate of all SMs
        results  = 8 * (row elements + 1) bytes * rows * parts / bandwidth

    summed over nodes. The rates are those of `split_cost`. The launches are that of the nodes, and the merge.
    """
    pages, tiles, bandwidth = nodes.end_page - nodes.first_page, work.tiles(nodes.queries), BYTES_PER_NS * work.num_sms
    parts = num_parts(pages, np.expand_dims(part, -1))
    loads = (tiles * pages).sum() * work.page_bytes
    head_bytes = work.page_bytes / work.num_heads_kv
    keys = (tiles * pages).sum() * work.page_size * work.num_heads_kv
    matmuls = 4 * work.row_elements * work.tile_rows * keys / (FLOP_PER_NS * work.num_sms)
    alone = np.ceil(pages / parts).max(-1) * head_bytes / PROGRAM_RATE
    programs = PROGRAM_NS * -(-(parts @ tiles) * work.num_heads_kv // work.num_sms)
    results = parts @ work.result_bytes(nodes.queries) / bandwidth
    return programs + np.maximum(max(loads / bandwidth, matmuls), alone) + results + 2 * LAUNCH_NS


def alone_cost(nodes, work):
    """Nanoseconds that a call without a tree takes for the keys of nodes: each sequence loads them for its own rows."""
    return nodes.loads_alone.sum() * work.page_bytes / (BYTES_PER_NS * work.num_sms)


def num_parts(pages, part):
    return -(-pages // part)


def choose_part(nodes, batch, work, limits=None):
    """(pages of a part, cost): the least `tree_cost` of the sizes that are tried. None if no size keeps the results
    within their memory, or the parts within limits, a TreeSizes."""
    pages = nodes.end_page - nodes.first_page
    longest = int(pages.max())
    result_bytes = work.result_bytes(int(nodes.queries.max())) // 2
    max_slots = min(MAX_SPLITS if limits is None else limits.num_slots, MAX_WORKSPACE_BYTES // result_bytes)

    def fits(size):
        parts = num_parts(pages, size)
        few = limits is None or parts.sum() <= limits.num_nodes
        return few and _slots_above(nodes, parts, batch).max() <= max_slots

    sizes = range(min(longest, max(1, MIN_KEYS // work.page_size)), longest + 1)
    sizes = sizes[bisect.bisect_left(sizes, True, key=fits) :]
    if not sizes:
        return None
    sizes = _sizes_to_try(longest, sizes[0])
    costs = tree_cost(nodes, sizes, work)
    best = int(costs.argmin())
    return int(sizes[best]), float(costs[best])


def _sizes_to_try(longest, least):
    """Sizes from least to longest: those that cut the longest node evenly, and at equal ratios for the other nodes."""
    counts, sizes = (np.geomspace(*ends, NUM_SIZES) for ends in ((1, num_parts(longest, least)), (least, longest)))
    even = num_parts(longest, counts.round().astype(np.int64))
    return np.maximum(np.concatenate([even, sizes.round().astype(np.int64)]), least)


def _slots_above(nodes, parts, batch):
    """Parts of nodes above each member."""
    changes = np.zeros(batch + 1, np.int64)
    np.add.at(changes, nodes.first, parts)
    np.subtract.at(changes, nodes.end, parts)
    return changes.cumsum()[:batch]


class HostTree(NamedTuple):
    """A PrefixTree before it is on the device."""

    suffixes: NDArray[np.int64]
    starts: NDArray[np.int64]
    nodes: NDArray[np.int64]
    order: NDArray[np.int64]
    sizes: TreeSizes

    def array(self):
        """The memory of the PrefixTree as its sizes want it; empty nodes come last."""
        spare = self.sizes.num_nodes - len(self.nodes)
        starts = np.concatenate([self.starts, np.full(spare, self.starts[-1])])
        nodes = np.concatenate([self.nodes, np.zeros((spare, 4), np.int64)])
        parts = self.suffixes.ravel(), starts, nodes.ravel(), self.order
        return np.concatenate(parts).astype(np.int32)

    def on(self, device):
        memory = torch.from_numpy(self.array())
        if device.type != "cpu":
            memory = memory.pin_memory().to(device, non_blocking=True)
        return PrefixTree(memory, len(self.suffixes), len(self.order), self.sizes)


def plan_tree(order, shared, queries, work, always=False, sizes=None, starts=None):
    """The HostTree of sequences in an order that puts those together which share pages; None if it does not pay.

    queries (batch,) are those of each sequence, in the order of the batch. sizes are limits that the tree has to keep,
    and has. starts are as in `choose_nodes`, in the order given.
    """
    nodes = choose_nodes(shared, queries[order], None if always else work, starts)
    if nodes.first.size == 0:
        return None
    best = choose_part(nodes, len(order), work, sizes)
    if best is None or (best[1] >= alone_cost(nodes, work) and not always):
        return None
    return tree_of_nodes(order, nodes, best[0], queries, sizes)


def tree_of_nodes(order, nodes, part, queries, sizes=None):
    """The HostTree of nodes that are cut in parts of at most so many pages; None if sizes have no room for it."""
    batch, own = len(order), queries[order]
    parts = num_parts(nodes.end_page - nodes.first_page, part)
    slots, ends = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    first_query = np.concatenate([[0], own.cumsum()])
    rows, counts = [], []
    for first, end, first_page, end_page, num, num_here in zip(*map(np.ndarray.tolist, nodes[:5]), parts.tolist()):
        cuts = np.linspace(first_page, end_page, num_here + 1).astype(np.int64).tolist()
        slot = slots.item(first)
        rows += [(first_query.item(first), *cut, slot + i) for i, cut in enumerate(itertools.pairwise(cuts))]
        counts += [num] * num_here
        slots[first:end] += num_here
        ends[first:end] = end_page
    needed = TreeSizes(len(rows), int(slots.max(initial=0)), sum(counts), max(counts, default=0))
    if sizes is None:
        num_nodes, num_slots, num_queries, longest = needed
        sizes = TreeSizes(_rounded_up(num_nodes), num_slots, _rounded_up(num_queries), _rounded_up(longest))
    elif any(a > b for a, b in zip(needed, sizes)):
        return None
    suffixes = np.empty((batch, 2), np.int64)
    suffixes[order, 0], suffixes[order, 1] = ends, slots
    places = np.arange(first_query[-1]) + ((queries.cumsum() - queries)[order] - first_query[:-1]).repeat(own)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return HostTree(suffixes, starts, np.array(rows, np.int64).reshape(-1, 4), places, sizes)


def empty_tree(batch, total_q, sizes):
    """A HostTree without nodes."""
    nothing = np.zeros((0, 4), np.int64)
    return HostTree(np.zeros((batch, 2), np.int64), np.zeros(1, np.int64), nothing, np.arange(total_q), sizes)


def _rounded_up(n):
    """n with at most three bits that are set."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step
