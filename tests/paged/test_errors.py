"""Wrong arguments of paged_attention: the error names the argument, before anything is launched or written."""

import pytest
import torch
from prefix_trees import tree_of_all

from triton_attn import paged_attention

TREE = tree_of_all(2, 1, 3)
SHARED = torch.tensor([[0, 1, 2], [0, 99, 99]], dtype=torch.int32)


def changed_tree(place, number):
    """TREE with another number in a place of its memory."""
    memory = TREE.memory.clone()
    memory[place] = number
    return TREE._replace(memory=memory)


def arguments(**changes):
    given = {
        "q": torch.zeros(2, 3, 4, 16),
        "k_cache": torch.zeros(5, 8, 2, 16),
        "v_cache": torch.zeros(5, 8, 2, 24),
        "cache_seqlens": torch.tensor([20, 3], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1, 2], [3, 99, 99]], dtype=torch.int32),
    }
    return given | changes


def quantized(**changes):
    caches = {"k_cache": torch.zeros(5, 8, 2, 16).to(torch.int8), "v_cache": torch.zeros(5, 8, 2, 24).to(torch.int8)}
    return arguments(**caches | changes)


def packed(dtype=torch.float32, **changes):
    x = 16 // dtype.itemsize
    caches = {
        "k_cache": torch.zeros(5, 2, 16 // x, 8, x, dtype=dtype),
        "v_cache": torch.zeros(5, 2, 24, 8, dtype=dtype),
    }
    return arguments(**caches | changes)


def varlen(**changes):
    return arguments(
        q=torch.zeros(6, 4, 16), cu_seqlens_q=torch.tensor([0, 2, 6], dtype=torch.int32), max_seqlen_q=4, **changes
    )


CASES = [
    (arguments(q=None), TypeError, "q: expected a tensor"),
    (arguments(q=torch.zeros(2, 16)), ValueError, r"q: expected \(batch, seqlen_q"),
    (arguments(q=torch.zeros(2, 3, 4, 16, dtype=torch.int64)), TypeError, "q: expected float16"),
    (arguments(q=torch.zeros(2, 3, 3, 16)), ValueError, "k_cache: expected a number of heads that divides q's 3"),
    (arguments(q=torch.zeros(2, 3, 4, 32)[..., ::2]), ValueError, "q: expected a contiguous last dimension"),
    (arguments(q=torch.zeros(6, 4, 16)), ValueError, "cu_seqlens_q: expected a tensor"),
    (arguments(k_cache=torch.zeros(5, 8, 2, 16).half()), TypeError, "k_cache: expected q's dtype"),
    (arguments(k_cache=torch.zeros(5, 8, 2, 17)), ValueError, "k_cache: expected q's head dimension 16"),
    (arguments(k_cache=torch.zeros(5, 8, 2)), ValueError, r"k_cache: expected \(num_pages, page_size"),
    (arguments(v_cache=torch.zeros(4, 8, 2, 24)), ValueError, "v_cache: expected k_cache's shape"),
    (arguments(v_cache=torch.zeros(5, 8, 2, 513)), ValueError, "v_cache: expected a head dimension of 1 to 512"),
    (arguments(v_cache=torch.zeros(5, 8, 2, 24).to(torch.float8_e5m2)), TypeError, "v_cache: expected k_cache's dtype"),
    (arguments(k_cache=torch.zeros(5, 0, 2, 16), v_cache=torch.zeros(5, 0, 2, 24)), ValueError, "page size of 1"),
    (arguments(cache_seqlens=torch.tensor([20, 3])), TypeError, "cache_seqlens: expected torch.int32, got torch.int64"),
    (arguments(cache_seqlens=torch.zeros(3, dtype=torch.int32)), ValueError, r"cache_seqlens: expected shape \(2\)"),
    (
        arguments(cache_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
        ValueError,
        "cache_seqlens: expected device cpu, got meta",
    ),
    (arguments(block_table=torch.zeros(3, 3, dtype=torch.int32)), ValueError, "block_table: expected shape"),
    (arguments(block_table=torch.zeros(2, 3)), TypeError, "block_table: expected torch.int32, got torch.float32"),
    (arguments(block_table=torch.zeros(3, 2, dtype=torch.int32).T), ValueError, "block_table: expected a contiguous"),
    (arguments(block_table=None), ValueError, "k_cache: expected q's batch size 2"),
    (arguments(max_seqlen_q=4), ValueError, "max_seqlen_q: expected q's 3 queries"),
    (arguments(causal=1), TypeError, "causal: expected a bool"),
    (arguments(softmax_scale=0.0), ValueError, "softmax_scale: expected a number above 0"),
    (arguments(softmax_scale=-1), ValueError, "softmax_scale: expected a number above 0"),
    (arguments(softmax_scale=float("nan")), ValueError, "softmax_scale: expected a finite number"),
    (arguments(window_size=5), TypeError, "window_size: expected a pair"),
    (arguments(softcap=-1.0), ValueError, "softcap: expected 0"),
    (arguments(key_shard=(0, 2)), TypeError, r"key_shard: expected \(rank, num_ranks, interleave\) or None"),
    (arguments(key_shard=(2, 2, 1)), ValueError, "key_shard: expected a rank of 0 to 1, got 2"),
    (arguments(key_shard=(0, 2, 3)), ValueError, "key_shard: expected an interleave that divides the 8 keys of a page"),
    (arguments(key_shard=(0, 2**29, 8)), ValueError, "key_shard: expected num_ranks \\* interleave below"),
    (arguments(alibi_slopes=torch.zeros(3)), ValueError, "alibi_slopes: expected shape"),
    (arguments(sinks=torch.zeros(4, dtype=torch.float16)), TypeError, "sinks: expected torch.float32"),
    (arguments(k_scale=0.0), ValueError, "k_scale: expected a number above 0"),
    (arguments(v_scale=torch.ones(3)), ValueError, "v_scale: expected shape"),
    (arguments(v_scale=torch.ones(2, dtype=torch.float16)), TypeError, "v_scale: expected torch.float32"),
    (arguments(k_scale=torch.ones(4)[::2]), ValueError, "k_scale: expected a contiguous last dimension"),
    (
        arguments(v_scale=torch.ones(5, 8, 2)),
        ValueError,
        "v_scale: expected no scales per token with a cache",
    ),
    (quantized(k_scale=torch.ones(5, 8, 1)), ValueError, r"k_scale: expected shape \(5, 8, 2\)"),
    (quantized(v_scale=torch.ones(5, 8, 2).half()), TypeError, "v_scale: expected torch.float32, got torch.float16"),
    (quantized(v_cache=torch.zeros(5, 8, 2, 24).to(torch.float8_e5m2)), TypeError, "v_cache: expected k_cache's dtype"),
    (
        packed(k_cache=torch.zeros(5, 2, 2, 8, 8)),
        ValueError,
        r"k_cache: expected \(num_pages, num_heads_kv, head_dim / 4, page_size, 4\) of a packed cache of torch.float32",
    ),
    (packed(k_cache=torch.zeros(5, 2, 5, 8, 4)), ValueError, "k_cache: expected q's head dimension 16, got 20"),
    (packed(k_cache=torch.zeros(5, 3, 4, 8, 4)), ValueError, r"v_cache: expected shape \(5, 3, head_dim_v, 8\), since"),
    (packed(k_cache=torch.zeros(5, 2, 4, 9, 4)), ValueError, r"v_cache: expected shape \(5, 2, head_dim_v, 9\), since"),
    (packed(k_cache=torch.zeros(5, 2, 4, 4, 8).mT), ValueError, "k_cache: expected a packed cache that is contiguous"),
    (
        packed(k_cache=torch.zeros(5, 2, 4, 16, 4)[:, :, :, ::2]),
        ValueError,
        "k_cache: expected a packed cache that is contiguous",
    ),
    (packed(v_cache=torch.zeros(5, 8, 2, 24)), ValueError, r"v_cache: expected shape \(5, 2, head_dim_v, 8\), since"),
    (packed(v_cache=torch.zeros(5, 2, 6, 8, 4)), ValueError, r"v_cache: expected shape \(5, 2, head_dim_v, 8\), since"),
    (packed(v_cache=torch.zeros(5, 2, 8, 24).mT), ValueError, "v_cache: expected a packed cache that is contiguous"),
    (packed(v_cache=torch.zeros(5, 2, 513, 8)), ValueError, "v_cache: expected a head dimension of 1 to 512"),
    (
        packed(q=torch.zeros(2, 3, 4, 18)),
        ValueError,
        "q: expected a head dimension that is a multiple of 4, since k_ca",
    ),
    (packed(q=torch.zeros(2, 3, 3, 16)), ValueError, "k_cache: expected a number of heads that divides q's 3"),
    (packed(block_table=None), ValueError, "block_table: expected a tensor, since k_cache is packed"),
    (packed(k_scale=torch.ones(3)), ValueError, "k_scale: expected shape"),
    (packed(key_shard=(0, 2, 3)), ValueError, "key_shard: expected an interleave that divides the 8 keys of a page"),
    (arguments(v_cache=torch.zeros(5, 2, 6, 8, 4)), ValueError, r"v_cache: expected \(num_pages, page_size"),
    (arguments(num_splits=-1), ValueError, "num_splits: expected 0"),
    (arguments(num_splits=257), ValueError, "num_splits: expected 0 .chosen. to 256"),
    (arguments(num_splits=1.5), TypeError, "num_splits: expected an int"),
    (arguments(batch_invariant=1), TypeError, "batch_invariant: expected a bool"),
    (arguments(batch_invariant=True, num_splits=2), ValueError, "num_splits: expected 0 with batch_invariant"),
    (arguments(batch_invariant=True, prefix_tree=TREE), ValueError, "prefix_tree: expected None with batch_inv"),
    (arguments(prefix_tree=[]), TypeError, "prefix_tree: expected a PrefixTree or None, got list"),
    (arguments(prefix_tree=tree_of_all(3, 1, 3)), ValueError, "prefix_tree: expected a tree of 2 sequences"),
    (
        arguments(prefix_tree=TREE._replace(memory=TREE.memory.to("meta"))),
        ValueError,
        "prefix_tree: expected a tree on q's device cpu, got meta",
    ),
    (
        arguments(
            block_table=None, k_cache=torch.zeros(2, 8, 2, 16), v_cache=torch.zeros(2, 8, 2, 24), prefix_tree=TREE
        ),
        ValueError,
        "prefix_tree: expected None without a block_table",
    ),
    (arguments(out=torch.zeros(2, 3, 4, 16)), ValueError, "out: expected shape"),
    (arguments(out=torch.zeros(2, 3, 4, 24).half()), TypeError, "out: expected torch.float32, got torch.float16"),
    (arguments(out=torch.zeros(2, 3, 24, 4).mT), ValueError, "out: expected a contiguous last dimension"),
    (arguments(q=torch.zeros(2, 3, 4, 16, requires_grad=True)), NotImplementedError, "q: gradients are not supported"),
    (varlen() | {"q": torch.zeros(2, 3, 4, 16)}, ValueError, r"q: expected \(total_q"),
    (varlen() | {"max_seqlen_q": None}, TypeError, "max_seqlen_q: expected an int"),
    (
        varlen() | {"cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens_q: expected shape \(3,\)",
    ),
    (
        arguments(check_values=True, cache_seqlens=torch.tensor([20, 9], dtype=torch.int32)),
        ValueError,
        r"block_table\[1, 1\]: expected a page of 0 to 4, got 99",
    ),
    (
        arguments(check_values=True, cache_seqlens=torch.tensor([25, 3], dtype=torch.int32)),
        ValueError,
        r"cache_seqlens\[0\]",
    ),
    (
        arguments(check_values=True, prefix_tree=TREE),
        ValueError,
        r"block_table\[1, 0:1\]: expected pages \[0\], which a node of prefix_tree shares, got \[3\]",
    ),
    (
        arguments(check_values=True, prefix_tree=tree_of_all(2, 1, 2), block_table=SHARED),
        ValueError,
        "prefix_tree: expected a tree of 6 queries, got 4",
    ),
    (
        arguments(check_values=True, prefix_tree=tree_of_all(2, 2, 3), block_table=SHARED),
        ValueError,
        r"block_table\[1, 0:2\]: expected pages \[0, 1\], which a node of prefix_tree shares, got \[0\]",
    ),
    (
        arguments(check_values=True, prefix_tree=changed_tree(-1, 1), block_table=SHARED),
        ValueError,
        r"prefix_tree: expected nodes with all queries of sequence 0, once, got \[0, 1, 2, 1\]",
    ),
    (
        arguments(check_values=True, prefix_tree=changed_tree(7, 1), block_table=SHARED),
        ValueError,
        r"prefix_tree: expected nodes that have the first 1 pages of sequence 0 once, got \[\(1, 1, 0\)\]",
    ),
    (
        varlen(check_values=True) | {"max_seqlen_q": 3},
        ValueError,
        "cu_seqlens_q, sequence 1: expected a length of 0 to 3",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), CASES, ids=range(len(CASES)))
def test_bad_arguments_are_named(given, error, message):
    out = given.get("out")
    before = None if out is None else out.clone()
    with pytest.raises(error, match=message):
        paged_attention(**given)
    assert out is None or torch.equal(out, before)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "cache_seqlens", "block_table", "cu_seqlens_q"])
def test_a_tensor_on_another_device_is_named(name):
    given = varlen()
    with pytest.raises(ValueError, match=f"^{name}: expected .*device cpu, got meta"):
        paged_attention(**given | {name: given[name].to("meta")})


def test_good_arguments_pass():
    paged_attention(**arguments(check_values=True))
    paged_attention(**varlen(check_values=True))
    paged_attention(**packed(check_values=True))
