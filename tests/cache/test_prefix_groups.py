"""PrefixGroups over long walks of forks, growth, cuts and ends: the tree is that of the tables after each step."""

import numpy as np
import pytest
import torch
from append_cases import DEVICE
from prefix_trees import check_shared, check_tree, every_group, nodes_of
from small_caches import make

from triton_attn import PagedKVCache, append_kv_cache, paged_attention
from triton_attn._host.prefix_tree import read_tree
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


WINDOW, WINDOW_PAGE = 40, 16


def windowed_cache(**options):
    """A layer that sees all keys and one with a window, whose keys are NaN where nothing is written."""
    size = dict(num_layers=2, num_kv_heads=1, head_dim=32, dtype=torch.float32, device=DEVICE)
    cache = PagedKVCache(80, WINDOW_PAGE, **size, layer_windows=[-1, WINDOW], **options)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    return cache


def write(cache, seqs, tokens):
    """Extend sequences by as many tokens each, written in both layers."""
    slots = cache.extend(seqs, tokens)
    for group, layer, _ in cache.layers:
        k, v = (torch.randn(slots.shape[1], 1, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
        append_kv_cache(k.to(DEVICE), v.to(DEVICE), cache.k_cache[layer], cache.v_cache[layer], slots[group])


def sequences_of_one_prompt(cache):
    """Seven sequences on a prompt of six pages: forks of one that went on for a page, prompts with other ends, and a
    fork of one of these. They have given back different numbers of the pages that they share."""
    prompt = list(range(96))
    seqs = [cache.create(prompt)[0]]
    write(cache, seqs, [prompt])
    cache.commit(seqs)
    for end in (1, 9, 25):
        own, found = cache.create([*prompt, *range(200, 200 + end)])
        write(cache, [own], [[*prompt, *range(200, 200 + end)][found:]])
        seqs.append(own)
    for _ in range(17):
        write(cache, seqs[:1], [[7]])
    seqs += cache.fork([seqs[0], seqs[0], seqs[2]])
    write(cache, seqs, [[1]] * len(seqs))
    return seqs


def test_groups_with_a_window_share_what_they_have():
    """Sequences that gave back different pages share the rest; the tree is a new one when they give back more."""
    cache = windowed_cache()
    seqs = sequences_of_one_prompt(cache)
    groups = cache.prefix_groups(4, layer_group=1)
    tables = cache.block_table(seqs)[1]
    held = held_pages(cache, seqs, 1)
    tables = [[page if own else None for page, own in zip(*row)] for row in zip(tables.tolist(), held)]
    tree = groups.tree(seqs)
    check_shared(tree, tables)
    shared = [set(table[:6]) - {None} for table in tables]
    assert len({len(own) for own in shared}) > 1
    node = next(part for part in read_tree(tree)[2] if len(part.queries) == len(seqs))
    assert (node.first_page, node.end_page) == (6 - max(map(len, shared)), 6)
    assert groups.tree(seqs) is tree
    for _ in range(WINDOW_PAGE + 1):
        write(cache, seqs, [[1]] * len(seqs))
    again = next((part for part in read_tree(groups.tree(seqs))[2] if len(part.queries) == len(seqs)), None)
    assert again is None or again.first_page > node.first_page


def held_pages(cache, seqs, group):
    """Which columns of the block table each sequence has in a group."""
    lengths, firsts = cache.cache_seqlens(seqs).tolist(), cache._firsts[[seq._row + group for seq in seqs]].tolist()
    return [[first <= i < -(-n // cache.page_size) for i in range(max(lengths))] for n, first in zip(lengths, firsts)]


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_attention_with_the_trees_of_both_groups(seqlen_q, with_mask, static):
    """Results are those without trees: no row reads a page that its sequence gave back."""
    cache = windowed_cache()
    seqs = sequences_of_one_prompt(cache)
    write(cache, seqs, [[2] * seqlen_q] * len(seqs))
    held = cache.block_table(seqs)
    lost = torch.ones(80, dtype=torch.bool)
    for group in range(2):
        for row, is_held in zip(held[group].tolist(), held_pages(cache, seqs, group)):
            lost[[page for page, own in zip(row, is_held) if own]] = False
    for tensor in (cache.k_cache, cache.v_cache):
        tensor[:, lost] = torch.nan  # page 0 of the zeros in tables too, if no one has it
    options = dict(max_batch=9, seqlen_q=seqlen_q, max_slots=16) if static else {}
    q = torch.randn(len(seqs), seqlen_q, 4, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    lengths = cache.cache_seqlens(seqs)
    if static:
        padding = 9 - len(seqs)
        q, lengths = torch.cat([q, q[:padding]]), torch.cat([lengths, lengths.new_zeros(padding)])
    mask = dict(tree_mask=torch.tensor([[1, 3, 5][:seqlen_q]] * len(q), device=DEVICE)) if with_mask else {}
    for group, layer, window in cache.layers:
        groups = cache.prefix_groups(4, layer_group=group, **options)
        tree, table = groups.tree(seqs, seqlen_q), held[group]
        assert tree is not None
        table = torch.cat([table, table.new_zeros(len(q) - len(seqs), table.shape[1])])
        arguments = q, cache.k_cache[layer], cache.v_cache[layer], lengths, table
        mask |= dict(window_size=(window, 0))
        out = paged_attention(*arguments, prefix_tree=tree, check_values=True, **mask)
        expected = paged_attention(*arguments, **mask)
        assert expected.isfinite().all()
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_group_of_layers_has_to_be_named():
    for cache, group, error, message in (
        (windowed_cache(), None, TypeError, "layer_group: expected an int with layer_windows, got NoneType"),
        (windowed_cache(), 2, ValueError, "layer_group: expected 0 to 1, got 2"),
        (make(num_pages=4), 0, ValueError, "layer_group: expected None without layer_windows, got 0"),
    ):
        with pytest.raises(error, match=message):
            cache.prefix_groups(4, layer_group=group)
