"""Plans of prefix trees: which are made, by the model of their cost, and wrong arguments."""

import numpy as np
import pytest
import torch

from perf.commands import prefixes
from triton_attn import prefix_tree
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


@pytest.mark.parametrize("batch", [4, 128])
@pytest.mark.parametrize("num_pages", [24, 256, 4000])
def test_parts_are_nearly_the_best(batch, num_pages):
    """Against parts of every size that has as many keys as a part must."""
    one = np.ones(1, np.int64)
    nodes = planning.Nodes(0 * one, batch * one, 0 * one, num_pages * one, batch * one, batch * num_pages * one)
    part, cost = planning.choose_part(nodes, batch, work_of())
    assert cost == planning.tree_cost(nodes, part, work_of())
    sizes = range(planning.MIN_KEYS // 16, num_pages + 1)
    sizes = [n for n in sizes if planning.num_parts(num_pages, n) <= planning.MAX_SPLITS]
    assert cost <= 1.1 * min(planning.tree_cost(nodes, n, work_of()) for n in sizes)


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
