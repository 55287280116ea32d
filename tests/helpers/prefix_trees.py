"""Prefix trees that have a node for every group of sequences, whether or not it pays."""

import numpy as np
import torch

from triton_attn._host.prefix_tree import read_tree
from triton_attn.merge.tree import choose_nodes, sorted_tables, tree_of_nodes

WHOLE = 2**31 - 1


def tree_of(tables, seqlens_q, device="cpu", part=WHOLE):
    """The PrefixTree of lists of pages, whose nodes are cut in parts of so many pages."""
    counts = np.array([len(table) for table in tables], np.int64)
    order, shared = sorted_tables([np.array(table, np.int64) for table in tables], counts)
    queries = np.array(seqlens_q, np.int64)
    return tree_of_nodes(order, choose_nodes(shared, queries[order], None), part, queries).on(torch.device(device))


def every_group(order, shared, queries, work, sizes=None, starts=None):
    """`plan_tree` with a node for every group."""
    nodes = choose_nodes(shared, queries[order], None, starts)
    return tree_of_nodes(order, nodes, WHOLE, queries, sizes) if nodes.first.size else None


def nodes_of(tables):
    """[(first page, end page, sequences)], from the definition: the columns in which a set of sequences agrees, and in
    all before, and with no other."""
    ends = {}
    for end in range(1, 1 + max(map(len, tables), default=0)):
        groups = {}
        for i, pages in enumerate(tables):
            if len(pages) >= end:
                groups.setdefault(tuple(pages[:end]), []).append(i)
        for members in groups.values():
            if len(members) > 1:
                ends.setdefault(tuple(members), []).append(end)
    return [(min(columns) - 1, max(columns), members) for members, columns in ends.items()]


def levels_of(nodes, tables):
    """Nodes above each sequence."""
    return [sum(i in members for *_, members in nodes) for i in range(len(tables))]


def check_tree(tree, nodes, tables, num_queries=1):
    """A PrefixTree of sequences with so many queries each has exactly these nodes."""
    first_pages, counts, parts = read_tree(tree)
    found = [(p.first_page, p.end_page, tuple(sorted({q // num_queries for q in p.queries}))) for p in parts]
    assert sorted(found) == sorted(nodes)
    assert all(
        sorted(p.queries) == [q for i in m for q in range(i * num_queries, (i + 1) * num_queries)]
        for p, (*_, m) in zip(parts, found)
    )
    assert counts == levels_of(nodes, tables)
    assert first_pages == [max([end for _, end, m in nodes if i in m], default=0) for i in range(len(tables))]
    for i, count in enumerate(counts):
        slots = [part.slot for part in parts for q in part.queries if q == i * num_queries]
        assert sorted(slots) == list(range(count))


def check_shared(tree, tables):
    """A tree, or None, of sequences with a query each whose pages are None where they were given back: in the columns
    of a node all have one page or none, and each page of a sequence is in one node or after all."""
    if tree is None:
        return
    first_pages, counts, parts = read_tree(tree)
    seen = [[column for column, page in enumerate(pages) if page is not None] for pages in tables]
    covered = [[] for _ in tables]
    for part in parts:
        members = [i for i in part.queries if i < len(tables)]
        assert len(members) > 1
        for column in range(part.first_page, part.end_page):
            assert len({tables[i][column] for i in members} - {None}) <= 1
            for i in members:
                covered[i].append(column)
    for i, own in enumerate(covered):
        assert len(own) == len(set(own))
        assert [column for column in seen[i] if column < first_pages[i]] == sorted(set(own) & set(seen[i]))
    slots = [sorted(part.slot for part in parts if i in part.queries) for i in range(len(tables))]
    assert slots == [list(range(count)) for count in counts[: len(tables)]]


def tree_of_all(batch, num_pages, seqlen_q=1, device="cpu", part=WHOLE):
    """All sequences have the same first pages."""
    return tree_of([[*range(num_pages), num_pages + i] for i in range(batch)], [seqlen_q] * batch, device, part)
