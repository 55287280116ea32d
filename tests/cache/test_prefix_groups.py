"""PrefixGroups over long walks of forks, growth, cuts and ends: the tree is that of the tables after each step."""

import numpy as np
import pytest
import torch
from prefix_trees import check_tree, every_group, nodes_of
from small_caches import make

from triton_attn.cache import prefix_groups

PAGE_SIZE, MOST = 2, 12  # sequences


@pytest.fixture(autouse=True)
def a_node_for_every_group(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(prefix_groups, "plan_tree", every_group)


def table_of(cache, seq):
    return cache.block_table([seq])[0].tolist()


def check_groups(cache, groups, seqs):
    tables = [table_of(cache, seq) for seq in seqs]
    tree, nodes = groups.tree(seqs), nodes_of(tables)
    if nodes:
        check_tree(tree, nodes, tables)
    else:
        assert tree is None


class Walk:
    """Random operations on a cache's sequences. Few pages: they are soon used again, in an order of their own."""

    def __init__(self, cache, seed):
        self.cache, self.random = cache, np.random.default_rng(seed)
        self.seqs = [cache.create([])[0]]

    def step(self):
        """One operation on a sequence. A batch that is full loses one."""
        seq = self.seqs[self.random.integers(len(self.seqs))]
        kind = self.random.choice(["fork", "extend", "truncate", "free"], p=[0.3, 0.35, 0.25, 0.1])
        if len(self.seqs) == MOST or (kind == "free" and len(self.seqs) > 1):
            self.seqs.remove(seq)
            self.cache.free(seq)
        elif kind == "fork":
            self.seqs.insert(self.random.integers(len(self.seqs) + 1), self.cache.fork(seq))
        elif kind == "truncate":
            self.cache.truncate(seq, self.random.integers(len(seq) + 1).item())
        else:
            self.cache.extend([seq], self.random.integers(1, 3 * PAGE_SIZE).item())


@pytest.mark.parametrize("seed", range(4))
def test_trees_are_those_of_the_tables(seed):
    """Of all sequences, and of a part that changes from call to call."""
    cache = make(num_pages=200, page_size=PAGE_SIZE)
    walk, of_all, of_some = Walk(cache, seed), cache.prefix_groups(4), cache.prefix_groups(4)
    for _ in range(300):
        walk.step()
        check_groups(cache, of_all, walk.seqs)
        check_groups(cache, of_some, walk.seqs[: walk.random.integers(len(walk.seqs)) + 1])
