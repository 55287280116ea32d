"""Prefix trees that have a node for every group of sequences, whether or not it pays."""

import numpy as np
import torch

from triton_attn._host.prefix_tree import TreeSizes
from triton_attn.merge.tree import choose_nodes, sorted_tables, tree_of_nodes

WHOLE = 2**31 - 1
ROOM = TreeSizes(12, 5, 40, 10)


def tree_of(tables, seqlens_q, device="cpu", part=WHOLE, sizes=None):
    """The PrefixTree of lists of pages, whose nodes are cut in parts of so many pages; None if sizes have no room."""
    counts = np.array([len(table) for table in tables], np.int64)
    order, shared = sorted_tables([np.array(table, np.int64) for table in tables], counts)
    queries = np.array(seqlens_q, np.int64)
    tree = tree_of_nodes(order, choose_nodes(shared, queries[order], None), part, queries, sizes)
    return None if tree is None else tree.on(torch.device(device))


def tree_of_all(batch, num_pages, seqlen_q=1, device="cpu", part=WHOLE):
    """All sequences have the same first pages."""
    return tree_of([[*range(num_pages), num_pages + i] for i in range(batch)], [seqlen_q] * batch, device, part)
