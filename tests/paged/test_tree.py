"""tree_mask of paged_attention: the drafts of a tree, each of which sees the context and its own path."""

from dataclasses import replace

import pytest
import torch
from draft_trees import KINDS, bits_of, bits_of_tree, random_parents, signed
from invariance import short_splits
from paged_cases import DEVICE, FLOAT8, PLAIN, Inputs, check, using
from prefix_trees import WHOLE, tree_of

from triton_attn import merge_attention, paged_attention, reference, workspace_bytes
from triton_attn.paged import forward
from triton_attn.paged.configs import PagedConfig
from triton_attn.toolchain import guard

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TREE = replace(
    PLAIN, varlen=True, tree="tree", spare_rows=3, seqlens_q=(23, 0, 64, 1, 9), seqlens_k=(130, 5, 97, 1, 70)
)
OPTIONS = [
    {},
    dict(num_splits=3),
    dict(window_size=(40, -1)),
    dict(window_size=(2, -1)),  # narrower than trees are deep
    dict(window_size=(30, 5), causal=False, alibi="per sequence"),
    dict(alibi="per head", num_splits=2),
    dict(softcap=0.7, sinks=torch.float32),
    dict(cache_dtype=FLOAT8[0], scales=("per head", 0.5)),
    dict(page_size=None),
    dict(page_size=64, window_size=(50, -1)),  # a tile lies in one page
    dict(dtype=torch.bfloat16, cache_dtype=torch.bfloat16, group_size=3, config=PagedConfig(64, 64, 4, 1)),
    dict(key_shard=(1, 2, 1), num_splits=2),
    dict(key_shard=(2, 3, 4), window_size=(40, -1), alibi="per sequence"),
    dict(key_shard=(0, 4, 16), window_size=(2, -1), page_size=64, softcap=0.7, sinks=torch.float32),
    dict(key_shard=(1, 3, 5), page_size=None, alibi="per head", group_size=3, config=PagedConfig(64, 64, 4, 1)),
]


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind, options):
    check(replace(TREE, tree=kind, **options))


@pytest.mark.emulated
def test_a_window_in_a_small_tree():
    """In two splits; one sequence has no drafts."""
    check(replace(TREE, seqlens_q=(5, 0, 9), seqlens_k=(40, 3, 21), window_size=(20, -1), num_splits=2))


@pytest.mark.parametrize(
    ("seqlens_q", "seqlens_k"), [((), ()), ((0, 0), (3, 0)), ((5,), (5,)), ((64,), (64,)), ((9, 4), (3, 0))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_at_the_edge(kind, seqlens_q, seqlens_k):
    """No context, and fewer keys than drafts."""
    case = replace(TREE, tree=kind, seqlens_q=seqlens_q, seqlens_k=seqlens_k, spare_rows=0)
    check(case)
    check(replace(case, alibi="per head", num_splits=4))


def inputs(num_drafts=40, seqlens=(90, 61), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, *caches = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for shape in ((len(seqlens), num_drafts, 4, 32), (20, 16, 2, 32), (20, 16, 2, 32))
    )
    table = torch.randperm(20, generator=generator)[: 6 * len(seqlens)].view(-1, 6).int().to(DEVICE)
    return q, *caches, torch.tensor(seqlens, dtype=torch.int32, device=DEVICE), table


def test_the_formula_of_the_docstring():
    """Scores written out, with positions that are the depths in the tree."""
    q, k_cache, v_cache, seqlens, table = inputs(64, (96, 64))
    generator = torch.Generator().manual_seed(1)
    slopes, left, cap = torch.rand(4, generator=generator).to(DEVICE), 2, 3.0
    parents = [random_parents(64, generator) for _ in range(2)]
    tree_mask = torch.stack(list(map(bits_of_tree, parents))).to(DEVICE)
    options = dict(alibi_slopes=slopes, window_size=(left, -1), softcap=cap)
    out = paged_attention(q, k_cache, v_cache, seqlens, table, tree_mask=tree_mask, **options)
    for b, (seqlen, own) in enumerate(zip(seqlens.tolist(), parents)):
        k, v = (x[table[b].long()].flatten(0, 1)[:seqlen].double().repeat_interleave(2, 1) for x in (k_cache, v_cache))
        first, paths = seqlen - 64, []
        for i, parent in enumerate(own):
            paths.append([*(paths[parent] if parent >= 0 else []), i])
        depths = torch.tensor([len(path) - 1 for path in paths])
        positions = torch.cat([torch.arange(first), first + depths])
        for i, path in enumerate(paths):
            seen = torch.tensor([*range(first), *[first + j for j in path]])
            distance = first + depths[i] - positions[seen]
            seen, distance = seen[distance <= left], distance[distance <= left].to(DEVICE)
            scores = torch.einsum("hd,khd->hk", q[b, i].double(), k[seen]) * 32**-0.5
            scores = cap * torch.tanh(scores / cap) - slopes.double()[:, None] * distance
            expected = torch.einsum("hk,khd->hd", scores.softmax(1), v[seen])
            torch.testing.assert_close(out[b, i].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.oldest
@pytest.mark.parametrize("options", [{}, dict(window_size=(30, 0)), dict(alibi_slopes=torch.ones(4))], ids=str)
@pytest.mark.parametrize("num_drafts", [8, 40])
def test_a_chain_is_causal(num_drafts, options):
    """Where the same tiles are masked, the bits are the same."""
    arguments = inputs(num_drafts)
    options = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    chain = bits_of_tree(range(-1, num_drafts - 1)).expand(2, -1).to(DEVICE)
    out, lse = paged_attention(*arguments, tree_mask=chain, num_splits=1, return_lse=True, **options)
    expected, expected_lse = paged_attention(*arguments, num_splits=1, return_lse=True, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if num_drafts == 8 and not options else 1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0 if num_drafts == 8 and not options else 1e-6)


def test_a_path_is_a_sequence():
    """A draft gets what it gets as the last token of a sequence that ends with its path."""
    q, k_cache, v_cache, seqlens, table = inputs(7, (90, 61))
    slopes = torch.rand(4).to(DEVICE)
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 5], [0, 2, 5, 6]]
    tree_mask = torch.tensor([[sum(1 << j for j in path) for path in paths]] * 2, device=DEVICE)
    options = dict(alibi_slopes=slopes, window_size=(20, -1), sinks=torch.zeros(4, device=DEVICE))
    out = paged_attention(q, k_cache, v_cache, seqlens, table, tree_mask=tree_mask, **options)
    for i, path in enumerate(paths):
        caches = k_cache.clone(), v_cache.clone()
        for cache in caches:
            for b, seqlen in enumerate(seqlens.tolist()):
                rows = cache[table[b].long()].flatten(0, 1)
                first = seqlen - 7
                rows[first : first + len(path)] = rows[[first + j for j in path]]
                cache[table[b].long()] = rows.view(6, *cache.shape[1:])
        expected = paged_attention(q[:, i : i + 1], *caches, seqlens - 7 + len(path), table, **options)
        torch.testing.assert_close(out[:, i : i + 1], expected, rtol=0, atol=2e-6)


@pytest.mark.emulated
@pytest.mark.parametrize("rank", [0, 1])
def test_a_small_tree_of_one_rank(rank):
    case = replace(TREE, seqlens_q=(5, 0, 9), seqlens_k=(80, 3, 41), window_size=(40, -1), alibi="per head")
    check(replace(case, key_shard=(rank, 2, 2), num_splits=2))


@pytest.mark.parametrize("options", [{}, dict(window_size=(9, -1)), dict(alibi_slopes=torch.ones(4))], ids=str)
@pytest.mark.parametrize(("num_ranks", "interleave"), [(2, 1), (3, 4), (5, 16)])
def test_ranks_that_share_the_keys(num_ranks, interleave, options):
    """Merged, the results over the keys of each rank are those over all."""
    q, k_cache, v_cache, seqlens, table = inputs(33)
    options = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    bits = torch.stack([bits_of("tree", 33, torch.Generator().manual_seed(i)) for i in range(2)]).to(DEVICE)
    options |= dict(tree_mask=bits, return_lse=True)
    expected = paged_attention(q, k_cache, v_cache, seqlens, table, **options)
    pages, parts = torch.arange(4, dtype=torch.int32, device=DEVICE).view(2, 2), []
    for rank in range(num_ranks):
        own = [x.new_full((4, 48, 2, 32), float("nan")) for x in (k_cache, v_cache)]
        for b, seqlen in enumerate(seqlens.tolist()):
            keys = torch.arange(seqlen)
            keys = keys[keys // interleave % num_ranks == rank]
            for cache, whole in zip(own, (k_cache, v_cache)):
                cache[2 * b : 2 * b + 2].flatten(0, 1)[: len(keys)] = whole[table[b].long()].flatten(0, 1)[keys]
        shard = dict(key_shard=(rank, num_ranks, interleave))
        parts.append(paged_attention(q, *own, seqlens, pages, **shard, **options, check_values=True))
    outs, lses = map(torch.stack, zip(*parts))
    for result, wanted in zip(merge_attention(outs, lses), expected):
        torch.testing.assert_close(result, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("options", [{}, dict(window_size=(30, -1)), dict(alibi_slopes=torch.ones(4))], ids=str)
def test_batch_invariant(options, fold):
    """The bits of a draft do not depend on the other sequences."""
    q, k_cache, v_cache, seqlens, table = inputs()
    options = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    bits = torch.stack([bits_of("tree", 40, torch.Generator().manual_seed(i)) for i in range(2)]).to(DEVICE)
    with short_splits(forward, fold):
        out = paged_attention(q, k_cache, v_cache, seqlens, table, tree_mask=bits, batch_invariant=True, **options)
        for i in range(2):
            one = slice(i, i + 1)
            alone = paged_attention(
                q[one], k_cache, v_cache, seqlens[one], table[one], tree_mask=bits[one], batch_invariant=True, **options
            )
            assert torch.equal(out[one], alone)
    expected = reference.paged_attention(q, k_cache, v_cache, seqlens, table, tree_mask=bits, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_mask_of_any_strides():
    """A buffer that is wider than the queries, as a CUDA graph has it, whose rows are padding from some query on."""
    arguments = inputs(8)
    buffer = torch.full((2, 64), -1, device=DEVICE)
    buffer[:, :8] = bits_of_tree([-1, 0, 0, 1, 2, 2, 5, -1]).to(DEVICE)
    buffer[1, 5:8] = 0  # sees the context alone
    out = paged_attention(*arguments, tree_mask=buffer[:, :8])
    expected = reference.paged_attention(*arguments, tree_mask=buffer[:, :8].clone())
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_the_operator_and_the_workspace():
    arguments, bits = inputs(8), bits_of_tree([-1, 0, 0, 1, 2, 2, 5, -1]).expand(2, -1).to(DEVICE)
    expected = paged_attention(*arguments, tree_mask=bits, num_splits=2)
    options = dict(tree_mask=bits, num_splits=2)
    workspace = torch.empty(workspace_bytes(paged_attention, *arguments, **options), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(paged_attention(*arguments, **options, workspace=workspace), expected)
    traced = torch.compile(paged_attention, backend="eager", fullgraph=True)(*arguments, **options)
    assert torch.equal(traced, expected)
    looped = torch.vmap(lambda mask: paged_attention(*arguments, tree_mask=mask, num_splits=2))(
        torch.stack([bits, bits])
    )
    assert torch.equal(looped[1], expected)


def test_the_kernel_reads_no_draft_twice_and_no_key_past_the_last():
    case = replace(TREE, seqlens_q=(30, 12), seqlens_k=(95, 40), group_size=1, config=PagedConfig(32, 32, 4, 1))
    check(replace(case, window_size=(10, -1)))
    with using(case.config):
        assert Inputs(case).call()[0].isfinite().all()


SHARED = replace(
    TREE,
    seqlens_q=(5, 3, 5, 0, 9, 2),
    seqlens_k=(90, 99, 85, 70, 84, 40),
    forks=(None, (0, 5), (1, 3), (2, 2), (0, 4), None),
    part=WHOLE,
)
SHARING = [
    {},
    dict(num_splits=3, part=1),
    dict(window_size=(40, -1), alibi="per sequence"),
    dict(window_size=(2, -1)),
    dict(alibi="per head", softcap=0.7, sinks=torch.float32),
    dict(page_size=64, seqlens_k=(290, 299, 285, 70, 284, 40), window_size=(150, -1)),
    dict(varlen=False, spare_rows=0, seqlens_q=(7,) * 6, num_splits=2),
    dict(forks=(None, *[(0, 9)] * 5), seqlens_k=(90, 90, 85, 90, 84, 40)),  # drafts are on shared pages too
    # Pages of two ranks are twice as long; drafts begin on them too.
    dict(key_shard=(1, 2, 8), seqlens_k=(180, 190, 165, 70, 160, 80), num_splits=2),
    dict(key_shard=(0, 2, 1), window_size=(70, -1), alibi="per head", seqlens_k=(135, 134, 133, 70, 160, 80)),
]


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("options", SHARING, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes(kind, options):
    """Nodes have the keys before the drafts for all rows, and each sequence's own launch has the bits."""
    check(replace(SHARED, tree=kind, **options))


@pytest.mark.emulated
def test_a_small_tree_with_a_shared_prefix():
    check(replace(SHARED, seqlens_q=(2, 3), seqlens_k=(40, 37), forks=(None, (0, 2)), window_size=(35, -1)))


def test_pages_that_are_loaded_are_the_unique_ones():
    """Six sequences with drafts of 3 tokens share four pages, and have one of their own each."""
    case = replace(
        PLAIN, tree="tree", seqlens_q=(3,) * 6, seqlens_k=(70,) * 6, forks=(None, *[(0, 4)] * 5), num_heads_kv=1
    )
    case = replace(case, group_size=2, config=PagedConfig(64, 16, 4, 1))
    loaded = {}
    for part in (None, WHOLE, 1):
        inputs = Inputs(replace(case, part=part))
        with using(case.config), guard() as accesses:
            inputs.call()
        key_bytes = case.head_dim * case.cache_dtype.itemsize
        loaded[part] = accesses.bytes_loaded["k.ptr"] / key_bytes
    assert loaded == {None: 6 * 70, WHOLE: 64 + 6 * 6, 1: 64 + 6 * 6}


def test_the_operator_takes_both():
    """Under a compiler, and with a workspace of the caller's."""
    q, k_cache, v_cache, seqlens, table = inputs(8, (70, 61))
    table[1, :3] = table[0, :3]
    tree = tree_of([pages[:5] for pages in table.tolist()], [8, 8], DEVICE)
    bits = bits_of_tree([-1, 0, 0, 1, 2, 2, 5, -1]).expand(2, -1).to(DEVICE)
    arguments = q, k_cache, v_cache, seqlens, table
    options = dict(tree_mask=bits, prefix_tree=tree, check_values=True, window_size=(30, -1))
    out = paged_attention(*arguments, **options)
    expected = reference.paged_attention(*arguments, tree_mask=bits, window_size=(30, -1))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    workspace = torch.empty(workspace_bytes(paged_attention, *arguments, **options), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(paged_attention(*arguments, **options, workspace=workspace), out)
    assert torch.equal(torch.compile(paged_attention, backend="eager", fullgraph=True)(*arguments, **options), out)


ERRORS = [
    (dict(tree_mask=[[0]]), TypeError, "tree_mask: expected a tensor"),
    (dict(tree_mask=torch.zeros(2, 8).int()), TypeError, "tree_mask: expected torch.int64, got torch.int32"),
    (dict(tree_mask=signed([1] * 8)), ValueError, r"tree_mask: expected shape \(2, 8\), got shape \(8,\)"),
    (dict(tree_mask=torch.zeros(8, 2).long().T), ValueError, "tree_mask: expected a contiguous last dimension"),
    (dict(tree_mask=torch.zeros(2, 8, device="meta").long()), ValueError, "tree_mask: expected device cpu, got meta"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="the messages name the CPU")
@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        paged_attention(*inputs(8), **options)


def test_more_than_64_drafts():
    q, *rest = inputs(65)
    message = "tree_mask: expected at most 64 queries of a sequence, got 65"
    with pytest.raises(ValueError, match=message):
        paged_attention(q, *rest, tree_mask=torch.zeros(2, 65, device=DEVICE).long())
    packed = dict(
        cu_seqlens_q=torch.tensor([0, 65, 130], dtype=torch.int32, device=DEVICE),
        tree_mask=torch.zeros(130, device=DEVICE).long(),
    )
    with pytest.raises(ValueError, match=message):
        paged_attention(q.flatten(0, 1), *rest, max_seqlen_q=65, **packed)
    with pytest.raises(ValueError, match=message):
        paged_attention(q.flatten(0, 1), *rest, max_seqlen_q=torch.tensor(65, device=DEVICE), **packed)
