"""Plans of paged attention: after any other call, a call launches what it would launch as the first.

Each neighbour differs from a call in one thing. Nothing is compiled: launches are recorded and not made.
"""

import functools
import itertools
from unittest import mock

import pytest
import torch
from plans import check_neighbour, launches_of, matmul_precision, padded, unaligned
from prefix_trees import tree_of_all

from triton_attn import override_config, paged_attention
from triton_attn.merge import kernel as merge
from triton_attn.paged import forward

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16


def call(
    dtype=BF16,
    cache_dtype=None,
    batch=2,
    seqlen_q=1,
    heads=(8, 2),
    head_dims=(64, 64),
    pages=(8, 16),
    table_width=32,
    packed=None,
    change=None,
    writes=False,
    **options,
):
    """change: {tensor: function}. packed: max_seqlen_q of packed queries. pages: number and size; table_width None: a
    contiguous cache."""
    num_pages, page_size = (batch, pages[1]) if table_width is None else pages
    tensors = {
        "q": torch.empty(batch, seqlen_q, heads[0], head_dims[0], dtype=dtype),
        "k": torch.empty(num_pages, page_size, heads[1], head_dims[0], dtype=cache_dtype or dtype),
        "v": torch.empty(num_pages, page_size, heads[1], head_dims[1], dtype=cache_dtype or dtype),
        "out": torch.empty(batch, seqlen_q, heads[0], head_dims[1], dtype=dtype),
    }
    if packed:
        tensors["q"] = tensors["q"].flatten(0, 1)
        options |= {"cu_seqlens_q": torch.zeros(batch + 1, dtype=torch.int32), "max_seqlen_q": packed}
    for name, of_tensor in (change or {}).items():
        tensors[name] = of_tensor(tensors[name])
    q, k, v, out = tensors.values()
    table = None if table_width is None else torch.zeros(batch, table_width, dtype=torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int32)
    paged_attention(q, k, v, lengths, table, out=out if writes else None, **options)


def heads_first(x):
    return torch.empty(x.transpose(-2, -3).shape, dtype=x.dtype).transpose(-2, -3)


def few_sms():
    return mock.patch.object(forward, "count_sms", return_value=4)


FP32 = {"dtype": torch.float32}
WRITTEN = {"writes": True, "num_splits": 1}
# (what a call has, what a neighbour of it has besides)
NEIGHBOURS = {
    "dtype": ({}, {"dtype": torch.float16}),
    "dtype of the cache": ({}, {"cache_dtype": torch.float8_e4m3fn}),
    "format of fp8": ({"cache_dtype": torch.float8_e4m3fn}, {"cache_dtype": torch.float8_e5m2}),
    "batch": ({}, {"batch": 3}),
    "seqlen_q": ({}, {"seqlen_q": 5}),
    "query heads": ({}, {"heads": (6, 2)}),
    "KV heads": ({}, {"heads": (8, 1)}),
    "head_dim": ({}, {"head_dims": (80, 64)}),
    "head_dim_v": ({}, {"head_dims": (64, 80)}),
    "page_size": ({}, {"pages": (8, 64)}),
    **{f"strides of {x}": ({"seqlen_q": 2}, {"change": {x: heads_first}}) for x in ("q", "k", "v")},
    **{f"rows of {x}": ({}, {"change": {x: padded}}) for x in ("q", "k", "v")},
    **{f"start of {x}": ({}, {"change": {x: unaligned}}) for x in ("k", "v")},
    "strides of out": ({"seqlen_q": 2} | WRITTEN, {"change": {"out": heads_first}}),
    "pages of a sequence": ({}, {"table_width": 64}),
    "contiguous": ({}, {"table_width": None}),
    "packed": ({}, {"packed": 1}),
    "max_seqlen_q": ({"packed": 1, "seqlen_q": 64}, {"packed": 64}),
    "splits": ({}, {"num_splits": 3}),
    "batch-invariant": ({}, {"batch_invariant": True}),
    "tree": ({}, {"prefix_tree": tree_of_all(2, 4)}),
    "nodes of a tree": ({"prefix_tree": tree_of_all(2, 4)}, {"prefix_tree": tree_of_all(2, 4, part=1)}),
    "causal": ({"seqlen_q": 2}, {"causal": False}),
    "left": ({}, {"window_size": (64, 0)}),
    "softmax_scale": ({}, {"softmax_scale": 0.5}),
    "softcap": ({}, {"softcap": 30.0}),
    "bound of softcap": ({"softcap": 30.0}, {"softcap": 20.0}),
    "ALiBi": ({}, {"alibi_slopes": torch.ones(8)}),
    "sinks": ({}, {"sinks": torch.ones(8)}),
    "k_scale": ({}, {"k_scale": 0.5}),
    "k_scale of each head": ({}, {"k_scale": torch.ones(2)}),
    "v_scale": ({}, {"v_scale": 0.5}),
    "lse": ({}, {"return_lse": True}),
    "precision of fp32": (FP32, {"inside": lambda: matmul_precision("high")}),
    "architecture": ({"cache_dtype": torch.float8_e4m3fn, "inside": few_sms}, {"arch": "sm_80"}),
    "SMs": ({}, {"inside": few_sms}),
    "fp32": ({"cache_dtype": torch.float8_e4m3fn}, FP32),
    "sequences of packed queries": ({"packed": 3, "seqlen_q": 3}, {"batch": 3, "seqlen_q": 2}),
    "strides of out of splits": ({"seqlen_q": 2, "writes": True, "num_splits": 3}, {"change": {"out": heads_first}}),
    "config": ({}, {"inside": lambda: override_config("paged", block_n=32)}),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_plan_is_not_that_of_a_neighbour(name):
    check_neighbour(functools.partial(launches_of, call, (forward, merge)), *NEIGHBOURS[name])


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_batch_invariant_tiles_do_not_follow_the_batch(arch, dim):
    """Whatever a query is computed with is the same beside other queries, other sequences and a wider table. SEARCH and
    FOLD say where a program finds its rows, and which program computes a split."""
    of_batch = dict(SEARCH=None, FOLD=None)
    tiles = set()
    for batch, seqlen_q, width in itertools.product((1, 2, 300), (1, 5, 300), (1, 32, 4096)):
        for packed in (None, seqlen_q):
            options = dict(batch=batch, seqlen_q=seqlen_q, table_width=width, packed=packed, batch_invariant=True)
            (_, _, _, constants), *_ = launches_of(call, (forward, merge), arch, head_dims=(dim, dim), **options)
            tile = forward.Tile._make(constants.pop("TILE"))._replace(**of_batch)
            tiles.add((tile, *constants.items()))
    assert len(tiles) == 1
