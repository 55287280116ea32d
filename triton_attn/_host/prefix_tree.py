"""What calls take of a prefix tree. `merge/tree.py` makes it."""

import itertools
from typing import NamedTuple

from torch import Tensor

from .checks import fail


class TreeSizes(NamedTuple):
    """Sizes that a launch depends on; they are rounded up, so that few trees have sizes of their own."""

    num_nodes: int
    num_slots: int  # results that a query has of nodes, at most
    num_queries: int  # of all nodes together
    longest: int  # queries of a node


class PrefixTree(NamedTuple):
    """The shared pages of a batch as a tree, for `paged_attention` and `mla_decode`; `prefix_tree` makes it, or
    `PrefixGroups` of a cache.

    A node is a range of columns of the block table in which all sequences below it have the same pages. Its keys are
    read once for the queries of all of them, whose results are merged with those of other nodes and of each sequence's
    own keys. Results are those of a call without the tree, up to rounding.

    Attributes:
        memory: int32 on the device:
            (batch, 2): the first page that no node above the sequence has; number of nodes above it
            (num_nodes + 1,): queries of all nodes before this one
            (num_nodes, 4): place in `order` of a node's first query, first page, end page, slot of its results
            order: rows of the queries, so that those below a node stand together
        batch: sequences of the call.
        total_q: queries of the call.
        sizes: see `TreeSizes`.

    Example:
        >>> table = [[0, 1, 2, 5], [0, 1, 2, 6], [7, 8, 0, 0]]  # pages of 16 tokens
        >>> shape = dict(num_heads_q=8, num_heads_kv=2, head_dim_v=64, token_bytes=512)
        >>> tree = triton_attn.prefix_tree(table, [50, 60, 20], 16, **shape, always=True, device="cpu")
        >>> isinstance(tree, triton_attn.PrefixTree), tree.sizes.num_nodes, tree.batch
        (True, 1, 3)
    """

    memory: Tensor
    batch: int
    total_q: int
    sizes: TreeSizes


class Part(NamedTuple):
    """A node as it is on the device."""

    first_page: int
    end_page: int
    slot: int
    queries: list[int]


def read_tree(tree):
    """(first page of each sequence that no node has, [number of nodes above it], [Part]); a device-to-host sync."""
    numbers, batch, num_nodes = tree.memory.tolist(), tree.batch, tree.sizes.num_nodes
    starts = numbers[2 * batch : 2 * batch + num_nodes + 1]
    rest = numbers[2 * batch + num_nodes + 1 :]
    order = rest[4 * num_nodes :]
    parts = []
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        first, *pages, slot = rest[4 * i : 4 * i + 4]
        if a != b:
            parts.append(Part(*pages, slot, order[first : first + b - a]))
    return numbers[0 : 2 * batch : 2], numbers[1 : 2 * batch : 2], parts


def check_prefix_tree(tree, batch, block_table, is_batch_invariant, device):
    """Raise unless a call with so many sequences can take the tree."""
    if not isinstance(tree, PrefixTree):
        fail("prefix_tree", "a PrefixTree or None", type(tree).__name__, TypeError)
    if is_batch_invariant:
        fail("prefix_tree", "None with batch_invariant, which splits keys by their positions", "a PrefixTree")
    if block_table is None:
        fail("prefix_tree", "None without a block_table: nothing is shared in a contiguous cache", "a PrefixTree")
    if tree.batch != batch:
        fail("prefix_tree", f"a tree of {batch} sequences, as cache_seqlens", tree.batch)
    if tree.memory.device != device:
        fail("prefix_tree", f"a tree on q's device {device}", tree.memory.device)


def check_tree_values(tree, block_table, cache_seqlens, page_size, q, cu_seqlens_q, left=None):
    """Raise unless the tree is one of this call, whose lengths and pages are right. A device-to-host sync.

    Pages before all windows of a sequence, which show `left` keys before a query, may be any.
    """
    seqlens = cache_seqlens.tolist()
    tables = [pages[: -(-seqlen // page_size)] for pages, seqlen in zip(block_table.tolist(), seqlens)]
    # Queries of sequence i are [bounds[i], bounds[i + 1]).
    bounds = [i * q.shape[1] for i in range(len(seqlens) + 1)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    if tree.total_q != bounds[-1]:
        fail("prefix_tree", f"a tree of {bounds[-1]} queries", tree.total_q)
    first_pages, counts, parts = read_tree(tree)
    first_seen = [0] * len(seqlens)
    if left is not None:
        first_seen = [
            max(0, seqlen - (b - a) - left) // page_size for seqlen, (a, b) in zip(seqlens, itertools.pairwise(bounds))
        ]
    of_query = [i for i, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(a, b)]
    ranges = [[] for _ in tables]
    for part in parts:
        members = {}
        for query in part.queries:
            members.setdefault(of_query[query], []).append(query)
        pages = None
        for i, queries in members.items():
            if sorted(queries) != list(range(bounds[i], bounds[i + 1])):
                fail("prefix_tree", f"nodes with all queries of sequence {i}, once", queries)
            own = tables[i][part.first_page : part.end_page]
            num_unseen = min(max(first_seen[i] - part.first_page, 0), len(own))
            seen = [None] * num_unseen + own[num_unseen:]
            pages = seen if pages is None else pages
            differ = any(a != b and None not in (a, b) for a, b in zip(seen, pages))
            if differ or not len(pages) == len(own) == part.end_page - part.first_page:
                columns = f"{part.first_page}:{part.end_page}"
                fail(f"block_table[{i}, {columns}]", f"pages {pages}, which a node of prefix_tree shares", own)
            pages = [b if a is None else a for a, b in zip(pages, seen)]
            ranges[i].append((part.first_page, part.end_page, part.slot))
    for i, own in enumerate(ranges):
        ends = [0]
        for first, end, _ in sorted(own):
            ends.append(end if first == ends[-1] or ends[-1] < first <= first_seen[i] else -1)
        has_queries = bounds[i] < bounds[i + 1]
        slots = sorted(slot for *_, slot in own)
        if has_queries and (ends[-1] != first_pages[i] or -1 in ends or slots != list(range(counts[i]))):
            fail("prefix_tree", f"nodes that have the first {first_pages[i]} pages of sequence {i} once", sorted(own))


def operands_of_tree(tree):
    """(memory, numbers) of a tree as an operator takes them."""
    return (None, None) if tree is None else (tree.memory, [tree.batch, tree.total_q, *tree.sizes])


def tree_of_operands(memory, numbers):
    return None if memory is None else PrefixTree(memory, *numbers[:2], TreeSizes(*numbers[2:]))
