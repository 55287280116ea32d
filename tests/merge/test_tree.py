"""Plans of prefix trees: which are made, by the model of their cost, and wrong arguments."""

import itertools

import numpy as np
import pytest
import torch

from perf.commands import prefixes
from triton_attn import prefix_tree
from triton_attn._host.prefix_tree import TreeSizes
from triton_attn.merge import tree as planning
from triton_attn.merge.tree import TreeWork, sorted_tables

SHAPE = dict(num_heads_q=32, num_heads_kv=8, head_dim_v=128, token_bytes=4096)


def work_of(page_size=16, num_sms=132):
    return TreeWork(4096 * page_size, page_size, 32, 8, 128, num_sms)


@pytest.mark.parametrize("batch", [1, 8, 128, 1024])
@pytest.mark.parametrize("num_pages", [1, 16, 1024])
def test_no_tree_where_nothing_is_shared(batch, num_pages):
    table = np.arange(batch * num_pages).reshape(batch, num_pages)
    assert prefix_tree(table, [16 * num_pages] * batch, 16, **SHAPE, device="cpu") is None


def test_a_tree_where_it_pays_alone():
    """By the model a call with a tree is faster in every case for which one is made."""
    made = 0
    for case in prefixes.cases():
        row = prefixes.predict(case)
        made += row.is_made
        assert row.with_tree <= row.without
        assert row.is_made or row.bytes_with == row.bytes_without
    assert 0 < made < len(list(prefixes.cases()))


def test_beams_over_a_prompt_load_25_times_fewer_bytes(record_property):
    """Four tiles of 128 rows read the prompt in place of 128 sequences; with partial results it is 19 times."""
    row = prefixes.predict(prefixes.Case("128 beams", 128, 4096, 16))
    fewer, with_results = (row.bytes_without / (row.bytes_with + extra) for extra in (0, row.result_bytes))
    figure = f"128 beams over 4k, predicted: {fewer:.1f} times fewer bytes, {with_results:.1f} with partial results"
    record_property("figure", figure)
    assert fewer >= 25
    assert with_results >= 19


@pytest.mark.parametrize(("num_pages", "num_nodes"), [(1, 1), (2, 65)])
def test_a_node_that_does_not_pay_is_left_out_of_a_tree_that_does(num_pages, num_nodes):
    """128 beams in pairs: a page that a pair shares is fewer bytes than its partial results, two are more."""
    pairs = [[*range(256), *range(256 + 9 * i, 256 + 9 * i + num_pages)] for i in range(64)]
    table = [[*pages, 2000 + 2 * i + j] for i, pages in enumerate(pairs) for j in range(2)]
    _, shared = sorted_tables(np.array(table), np.full(128, len(table[0])))
    assert len(planning.groups(shared)) == 65
    assert len(planning.choose_nodes(shared, np.ones(128, np.int64), work_of()).first) == num_nodes


def num_compared(nodes, batch, work, limits):
    """The number of sizes of parts, each with as many keys as a part must have and within the limits, than which the
    chosen one costs at most 10 % more."""
    pages = nodes.end_page - nodes.first_page
    least, longest = max(1, planning.MIN_KEYS // work.page_size), int(pages.max())
    costs = []
    for size in range(min(least, longest), longest + 1):
        parts = planning.num_parts(pages, size)
        slots = max(int(parts[(nodes.first <= i) & (i < nodes.end)].sum()) for i in nodes.first)
        row_bytes = 4 * (work.row_elements + 1) * work.num_heads_q
        fits = slots * row_bytes * int(nodes.queries.max()) <= planning.MAX_WORKSPACE_BYTES
        if fits and slots <= limits.num_slots and int(parts.sum()) <= limits.num_nodes:
            costs.append(planning.tree_cost(nodes, size, work))
    chosen = planning.choose_part(nodes, batch, work, limits)
    assert (chosen is None) == (not costs)
    if chosen is not None:
        assert chosen[1] == planning.tree_cost(nodes, chosen[0], work)
        assert min(costs) <= chosen[1] <= 1.1 * min(costs)
    return len(costs)


@pytest.mark.parametrize("model", prefixes.MODELS)
@pytest.mark.parametrize("limits", [(2**31, planning.MAX_SPLITS), (2**31, 40), (64, 8), (64, 3)])
def test_parts_are_nearly_the_best(model, limits):
    """Within 10 % for prefixes of any length, for pages of any size, and for nodes of several lengths on two levels."""
    num_heads_q, num_heads_kv, dim, token_bytes = prefixes.MODELS[model]
    limits = TreeSizes(limits[0], limits[1], 2**31, 2**31)
    compared = 0
    for page_size, batch, num_keys in itertools.product((16, 64, 256), (2, 16, 128), (700, 5000, 9000, 40000)):
        work = TreeWork(token_bytes * page_size, page_size, num_heads_q, num_heads_kv, dim, 132)
        pages, half = num_keys // page_size, batch // 2
        one_node = [(0, batch, 0, pages, batch)]
        levels = [
            (0, batch, 0, pages // 2, batch),
            (0, half, pages // 2, pages, half),
            (half, batch, pages // 2, 3 * pages // 4 + 1, batch - half),
        ]
        for rows in (one_node, levels):
            nodes = planning.Nodes(*np.array(rows).T, np.zeros(len(rows), np.int64))
            compared += num_compared(nodes, batch, work, limits)
    assert compared > 100


def test_parts_of_a_static_tree_keep_within_its_nodes():
    """Parts of every size but the largest would be more nodes than there is room for, and the tree would be lost."""
    table = [[*range(256), *range(1000 + 64 * (i // 8), 1064 + 64 * (i // 8)), 2000 + i] for i in range(64)]
    order, shared = sorted_tables(np.array(table), np.full(64, 321))
    sizes = TreeSizes(12, 8, 8 * 64, 64)
    tree = planning.plan_tree(order, shared, np.ones(64, np.int64), work_of(), sizes=sizes)
    assert tree is not None
    assert 9 < len(tree.nodes) <= 12


def test_a_tree_that_needs_more_room_than_there_is():
    table = [[*range(256), 256 + i] for i in range(64)]
    order, shared = sorted_tables(np.array(table), np.full(64, 257))
    queries = np.ones(64, np.int64)
    free = planning.plan_tree(order, shared, queries, work_of())
    assert free is not None
    few = planning.plan_tree(order, shared, queries, work_of(), sizes=free.sizes._replace(num_slots=1, num_nodes=1))
    assert few is not None
    assert few.suffixes[:, 1].max() == 1  # one part in place of many
    assert planning.plan_tree(order, shared, queries, work_of(), sizes=free.sizes._replace(num_nodes=0)) is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(block_table=[[0.5]]), TypeError, r"block_table: expected integers in 2 dimension"),
        (
            dict(block_table=torch.zeros(2, 3, device="meta").int()),
            ValueError,
            "block_table: expected values on the host",
        ),
        (dict(cache_seqlens=[5]), ValueError, "cache_seqlens: expected one for each of 2 rows"),
        (dict(cache_seqlens=[5, 49]), ValueError, "cache_seqlens: expected 0 to the table's 48"),
        (dict(num_heads_kv=5), ValueError, "num_heads_kv: expected a number that divides num_heads_q = 32"),
        (dict(seqlens_q=[1, -1]), ValueError, "seqlens_q: expected 2 numbers"),
        (dict(seqlens_q=[1]), ValueError, "seqlens_q: expected 2 numbers"),
    ],
)
def test_errors(changes, error, message):
    call = dict(block_table=[[0, 1, 2], [0, 1, 3]], cache_seqlens=[40, 40], page_size=16, device="cpu") | SHAPE
    assert prefix_tree(**call, always=True).sizes.num_nodes == 1
    with pytest.raises(error, match=message):
        prefix_tree(**call | changes)


def test_several_queries_and_whole_trees():
    tree = prefix_tree([[0, 1, 2], [0, 1, 3]], [40, 40], 16, **SHAPE, seqlens_q=[2, 5], always=True, device="cpu")
    assert (tree.batch, tree.total_q) == (2, 7)
    assert tree.sizes.longest == 7
