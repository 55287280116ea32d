"""Random prefix trees: nodes against their definition, and the choice of nodes against every other choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefix_trees import check_tree, nodes_of, tree_of

from triton_attn._host.prefix_tree import read_tree
from triton_attn.merge import tree as planning
from triton_attn.merge.tree import TreeWork, alone_cost, choose_nodes, choose_part, sorted_tables, tree_cost

pytestmark = pytest.mark.random


@st.composite
def tables(draw, most=40):
    """Forks of forks, that then go on alone or not; some are empty."""
    result, unused = [], itertools.count()
    for i in range(draw(st.integers(0, 9))):
        parent = draw(st.integers(0, i)) if i else 0
        pages = list(result[parent][: draw(st.integers(0, most))]) if parent < i else []
        result.append(pages + [next(unused) for _ in range(draw(st.sampled_from([0, 0, 1, 3, most])))])
    return result


@given(tables(most=5), st.integers(1, 3))
def test_nodes_are_those_of_the_definition(tables, num_queries):
    check_tree(tree_of(tables, [num_queries] * len(tables)), nodes_of(tables), tables, num_queries)


@given(tables(most=5), st.integers(1, 3))
def test_parts_cover_their_nodes(tables, part):
    """The parts above a sequence are its columns up to its own pages, each once and in slots of their own."""
    tree = tree_of(tables, [1] * len(tables), part=part)
    first_pages, counts, parts = read_tree(tree)
    for i, table in enumerate(tables):
        own = sorted((p.first_page, p.end_page, p.slot) for p in parts if i in p.queries)
        assert [column for first, end, _ in own for column in range(first, end)] == list(range(first_pages[i]))
        assert sorted(slot for *_, slot in own) == list(range(counts[i]))
        assert all(0 < end - first <= part for first, end, _ in own)
        assert first_pages[i] <= len(table)


def work_of(page_size=16, num_sms=132):
    return TreeWork(4096 * page_size, page_size, 32, 8, 128, num_sms)


def costs(tables, kept, work):
    """(cost of the best parts of the kept groups, of the same keys without a tree), with pages of groups that are left
    out given to those below."""
    counts = np.array([len(table) for table in tables])
    _, shared = sorted_tables([np.array(table, np.int64) for table in tables], counts)
    queries = np.ones(len(tables), np.int64)
    found = planning.groups(shared)
    covered, chosen = np.zeros(len(tables), np.int64), []
    for keep, (end_page, first, end) in zip(kept, found):
        if keep:
            loads_alone = work.tiles(queries[first:end]).sum() * (end_page - covered[first])
            chosen.append((first, end, covered[first], end_page, end - first, loads_alone))
            covered[first:end] = end_page
    nodes = planning.Nodes._make(np.array(chosen, np.int64).reshape(-1, 6).T)
    if not chosen:
        return 0.0, 0.0
    return choose_part(nodes, len(tables), work)[1], alone_cost(nodes, work)


@given(tables(most=700))
def test_chosen_nodes_are_nearly_the_best(tables):
    """Against every set of groups, by what each saves; a set that saves nothing is a call without a tree."""
    work = work_of()
    order, shared = sorted_tables([np.array(table, np.int64) for table in tables], np.array([*map(len, tables)], int))
    found = planning.groups(shared)
    if len(found) > 6:
        return
    best = max(-np.subtract(*costs(tables, kept, work)) for kept in itertools.product((0, 1), repeat=len(found)))
    nodes = choose_nodes(shared, np.ones(len(order), np.int64), work)
    tree = planning.plan_tree(order, shared, np.ones(len(order), np.int64), work)
    saved = 0.0
    if nodes.first.size:
        part, cost = choose_part(nodes, len(order), work)
        assert cost == tree_cost(nodes, part, work)
        saved = max(0.0, alone_cost(nodes, work) - cost)
    assert (tree is not None) == (saved > 0)
    # What a tree saves is small where the best set is another: 5 us are about one launch.
    assert saved >= 0.9 * best - 5000
