"""What prefix trees save, by the model of `triton_attn.merge.tree`. Needs no GPU, and nothing is measured.

Bytes are those of keys and values that programs load in one layer, from the L2 cache or memory, and besides those of a
tree's partial results, written and read. Times are those of the keys that sequences share: all else is the same.
"""

from typing import NamedTuple

import numpy as np

from perf.results.tables import print_table
from triton_attn.merge.tree import TreeWork, alone_cost, choose_nodes, choose_part, num_parts, sorted_tables

PAGE_SIZE = 16
NUM_SMS = 132
MODELS = {  # query heads, KV heads, elements of a value, bytes of a token in one layer in bf16
    "Llama-3-8B": (32, 8, 128, 4096),
    "Llama-3-70B, a GPU of 8": (8, 1, 128, 512),
    "DeepSeek-V3, a GPU of 8": (16, 1, 512, 1152),
    "DeepSeek-V3": (128, 1, 512, 1152),
}


class Case(NamedTuple):
    """Sequences that share a prefix of so many tokens, in `groups` groups that share half as many more."""

    name: str
    batch: int
    prefix: int
    own: int
    groups: int = 1
    model: str = "Llama-3-8B"


class Row(NamedTuple):
    is_made: bool
    bytes_without: int
    bytes_with: int
    result_bytes: int
    without: float  # ns
    with_tree: float


def cases():
    for model in MODELS:
        yield Case("beams", 128, 4096, 16, model=model)
        yield Case("system prompt", 256, 1024, 512, model=model)
        yield Case("few-shot prompts", 64, 2048, 128, groups=8, model=model)
        yield Case("two samples", 2, 1024, 256, model=model)
        yield Case("nothing shared", 128, 0, 2048, model=model)


def tables_of(case):
    """(block table, pages of each sequence)"""
    root, own = case.prefix // PAGE_SIZE, -(-case.own // PAGE_SIZE)
    level = root // 2 if case.groups > 1 else 0
    columns = [np.arange(root), None, None]
    table = np.empty((case.batch, root + level + own), np.int64)
    for i in range(case.batch):
        group = i * case.groups // case.batch
        columns[1] = root + group * level + np.arange(level)
        columns[2] = root + case.groups * level + i * own + np.arange(own)
        table[i] = np.concatenate(columns)
    return table, np.full(case.batch, table.shape[1])


def predict(case):
    """The Row of a Case: a decode step of one token each."""
    heads_q, heads_kv, dim, token_bytes = MODELS[case.model]
    work = TreeWork(token_bytes * PAGE_SIZE, PAGE_SIZE, heads_q, heads_kv, dim, NUM_SMS)
    table, counts = tables_of(case)
    order, shared = sorted_tables(table, counts)
    queries = np.ones(len(order), np.int64)
    nodes = choose_nodes(shared, queries, work)
    num_bytes = int(counts.sum() * work.tiles(1)) * work.page_bytes
    best = choose_part(nodes, len(order), work) if nodes.first.size else None
    alone = alone_cost(nodes, work)
    if best is None or best[1] >= alone:
        return Row(False, num_bytes, num_bytes, 0, alone, alone)
    part, cost = best
    pages = nodes.end_page - nodes.first_page
    saved = (nodes.loads_alone - work.tiles(nodes.queries) * pages).sum() * work.page_bytes
    results = (work.result_bytes(nodes.queries) * num_parts(pages, part)).sum()
    return Row(True, num_bytes, int(num_bytes - saved), int(results), alone, cost)


def run(out_dir):
    """Print the table."""
    rows = []
    for case in cases():
        row = predict(case)
        rows.append(
            case._asdict()
            | {
                "tree": "yes" if row.is_made else "no",
                "MB": f"{row.bytes_without / 1e6:.1f}",
                "MB, tree": f"{row.bytes_with / 1e6:.1f}",
                "MB of results": f"{row.result_bytes / 1e6:.1f}",
                "fewer": f"{row.bytes_without / row.bytes_with:.1f}",
                "us": f"{row.without / 1e3:.1f}",
                "us, tree": f"{row.with_tree / 1e3:.1f}",
            }
        )
    print("bytes of a layer, and us for the keys that are shared, predicted for an H100, not measured")
    print_table(rows)


def add_arguments(parser):
    pass
