"""mla_decode with a prefix tree, against fp64 of the call without it."""

import itertools

import pytest
import torch
from prefix_trees import WHOLE, tree_of

from triton_attn import mla_decode, reference
from triton_attn.testing import poisoned_empty
from triton_attn.toolchain import guard

PAGE_SIZE, RANK, ROPE = 16, 48, 8
TABLES = {
    "one prefix": [[0, 1, 2, 3 + i] for i in range(6)],
    "forks of forks": [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5], [6, 7], [6, 8], [9], []],
    "no own pages": [[0, 1, 2], [0, 1, 2], [0, 1], [0], [3]],
}
SHORT = {"forks of forks": (60, 64, 40, 30, 17, 16, 0), "no own pages": (48, 41, 32, 16, 3), "one prefix": (64,) * 6}


def call(name, seqlens_q, num_heads, part, projected, packed, page_size=PAGE_SIZE, **options):
    """((out, lse) of the kernels, bytes of the cache that they load, fp64 (out, lse))."""
    tables, seqlens_k = TABLES[name], [n * page_size // PAGE_SIZE for n in SHORT[name]]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    batch, total = len(tables), sum(seqlens_q)
    table = torch.full((batch, 5), 2**31 - 1, dtype=torch.int32)
    cache = torch.full((11, page_size, RANK + ROPE), float("nan"))
    for i, (pages, n) in enumerate(zip(tables, seqlens_k)):
        table[i, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for column, page in enumerate(pages):
            own = slice(0, n - column * page_size)
            cache[page, own] = torch.where(
                cache[page, own].isnan(), randn(page_size, RANK + ROPE)[own], cache[page, own]
            )
    q_nope, q_pe = (
        randn(total + 3 * packed, num_heads, 20 if projected else RANK),
        randn(total + 3 * packed, num_heads, ROPE),
    )
    if packed:
        options |= {
            "cu_seqlens_q": torch.tensor([0, *itertools.accumulate(seqlens_q)], dtype=torch.int32),
            "max_seqlen_q": max(seqlens_q),
        }
    else:
        q_nope, q_pe = q_nope.unflatten(0, (batch, -1)), q_pe.unflatten(0, (batch, -1))
    weights = (0.2 * randn(num_heads, 20, RANK), 0.2 * randn(num_heads, 12, RANK)) if projected else (None, None)
    num_ranks = options.get("key_shard", (0, 1))[1]  # each has as many keys, all of them on full pages
    lengths = torch.tensor([n * num_ranks for n in seqlens_k], dtype=torch.int32)
    arguments = [q_nope, q_pe, cache, lengths, table, *weights]
    options |= {"softmax_scale": 0.2, "return_lse": True}
    tree = None if part is None else tree_of(tables, seqlens_q, part=part)
    with poisoned_empty(), guard() as accesses:
        results = mla_decode(*arguments, prefix_tree=tree, check_values=True, **options)
    options.pop("num_splits", None)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    return results, accesses.bytes_loaded, reference.mla_decode(*exact, **options)


@pytest.mark.oldest
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("part", [WHOLE, 1])
@pytest.mark.parametrize(("num_heads", "projected", "num_splits"), [(4, True, 2), (20, False, 1), (3, False, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_results(name, part, num_heads, projected, num_splits, packed):
    """Several queries, of which some end inside a node; packed ones with spare rows."""
    batch = len(TABLES[name])
    seqlens_q = (1, 3, 0, 2, 20, 1, 2)[:batch] if packed else (2,) * batch
    results, _, exact = call(name, seqlens_q, num_heads, part, projected, packed, num_splits=num_splits)
    for result, there in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), there.double(), atol=1e-5, rtol=1e-4)


def test_shared_pages_are_read_once():
    """The heads of all sequences fit in a tile, and tiles have whole pages."""
    loaded, page_size = {}, 64
    for part in (None, WHOLE, 1):
        _, accesses, _ = call("one prefix", (1,) * 6, 2, part, False, False, page_size, num_splits=1)
        page_bytes = page_size * (RANK + ROPE) * 4
        loaded[part] = sum(n for name, n in accesses.items() if name.startswith("cache.")) / page_bytes
    assert loaded == {None: 6 * 4, WHOLE: 3 + 6, 1: 3 + 6}


@pytest.mark.parametrize("key_shard", [(0, 2, 8), (1, 2, 8)])
def test_keys_of_one_rank(key_shard):
    results, _, exact = call("one prefix", (2,) * 6, 4, 1, False, False, key_shard=key_shard, num_splits=2)
    for result, there in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), there.double(), atol=1e-5, rtol=1e-4)
