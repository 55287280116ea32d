"""Attention over a cache: one readable example for each convention."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
from paged_cases import DEVICE, DTYPES, HEAD_DIMS, INTERPRETED, PAGE_SIZES, PLAIN, QUANTIZED, Inputs, check, using
from prefix_trees import WHOLE

from triton_attn import flash_attention, paged_attention, reference
from triton_attn.paged import forward
from triton_attn.paged.configs import PagedConfig
from triton_attn.toolchain import guard

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts the accesses of interpreted kernels")


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim):
    check(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim))


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("page_size", [*PAGE_SIZES, None])
def test_every_page_size(page_size, num_splits):
    check(replace(PLAIN, page_size=page_size, num_splits=num_splits, window_size=(70, -1)))


SHARDED = [
    {},
    dict(window_size=(7, 3)),
    dict(causal=False, window_size=(4, 6)),
    dict(alibi="per sequence", window_size=(20, -1)),
    dict(alibi="per head", softcap=0.7, sinks=torch.float32),
    dict(num_splits=3, forks=(None, (0, 2), (0, 2), (0, 1)), part=1),
    dict(forks=(None, (0, 2), (0, 2), (0, 1)), part=WHOLE, window_size=(12, -1)),
    dict(page_size=None),
]


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("options", SHARDED, ids=str)
@pytest.mark.parametrize("key_shard", [(0, 2, 1), (1, 2, 4), (2, 3, 1), (3, 4, 16), (0, 1, 1)], ids=str)
def test_keys_of_one_rank(key_shard, options):
    """Several queries, so that each sees another number of the rank's keys; a sequence with keys on one rank alone, and
    one with more keys than fit in the cache of a rank.
    """
    rows = dict(seqlens_q=(5, 0, 33, 2), seqlens_k=(140, 3, 37, 2), varlen=True, spare_rows=2, spare_entries=0)
    check(replace(PLAIN, key_shard=key_shard, **rows, **options))


PACKED = [
    dict(page_size=48, window_size=(20, 3), num_splits=3),
    dict(page_size=5, head_dim=40, head_dim_v=71, cache_layout="wide"),
    dict(page_size=64, dtype=torch.float32, cache_dtype=torch.float32, head_dim=320, cache_layout="heads first"),
    dict(cache_dtype=torch.float8_e4m3fn, scales=("per token", "per token"), head_dim=96, head_dim_v=80),
    dict(page_size=1, cache_dtype=torch.int8, scales=(0.5, "per head"), alibi="per head", softcap=0.7),
    dict(forks=(None, (0, 2), (0, 1)), part=WHOLE, window_size=(40, -1)),
    dict(varlen=True, seqlens_q=(5, 0, 3), spare_rows=2, tree="chain", sinks=torch.float32),
    dict(key_shard=(1, 2, 4), window_size=(20, -1)),
]


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_caches(options):
    check(replace(PLAIN, packed=True, **options))


def packed_caches(dtype, page_size=8, head_dim=32, head_dim_v=24):
    """A packed cache of three pages, and the same elements in the usual layout, by the formula of the docstring."""
    x, heads = 16 // dtype.itemsize, 2
    k_packed = torch.randn(3, heads, head_dim // x, page_size, x).to(dtype)
    v_packed = torch.randn(3, heads, head_dim_v, page_size).to(dtype)
    k_cache, v_cache = torch.empty(2, 3, page_size, heads, 64, dtype=dtype)
    for page, slot, h in itertools.product(range(3), range(page_size), range(heads)):
        for d in range(head_dim):
            k_cache[page, slot, h, d] = k_packed[page, h, d // x, slot, d % x]
        for d in range(head_dim_v):
            v_cache[page, slot, h, d] = v_packed[page, h, d, slot]
    packed, usual = (k_packed, v_packed), (k_cache[..., :head_dim], v_cache[..., :head_dim_v])
    return tuple(x.to(DEVICE) for x in packed), tuple(x.to(DEVICE) for x in usual)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_a_packed_cache_has_the_elements_of_the_formula(dtype):
    packed, usual = packed_caches(dtype)
    q = torch.randn(2, 2, 4, 32, dtype=dtype if dtype.itemsize > 1 else torch.bfloat16, device=DEVICE)
    lengths = torch.tensor([21, 3], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[2, 0, 1], [1, 99, 99]], dtype=torch.int32, device=DEVICE)
    for attend in (paged_attention, reference.paged_attention):
        expected = attend(q, *usual, lengths, table)
        torch.testing.assert_close(attend(q, *packed, lengths, table), expected, atol=2e-3, rtol=2e-3)
    # The operator, which torch.compile calls, gets views of the cache.
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *packed, lengths, table), paged_attention(q, *packed, lengths, table))


@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@pytest.mark.parametrize("scales", [("per head", 0.5), ("per token", "per token")], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_of_everything(dtype, cache_dtype, scales):
    check(
        replace(
            PLAIN,
            varlen=True,
            dtype=dtype,
            cache_dtype=cache_dtype or dtype,
            seqlens_q=(17, 0, 1, 5),
            seqlens_k=(130, 40, 100, 3),
            group_size=3,
            head_dim=80,
            head_dim_v=96,
            window_size=(90, -1),
            softcap=20.0,
            alibi="per sequence",
            sinks=dtype,
            scales=scales,
            num_splits=2,
            forks=(None, (0, 2), (1, 1), (1, 1)),
            part=1,
            spare_rows=3,
        )
    )


PER_TOKEN = [
    {},
    dict(scales=("per token", None)),
    dict(scales=(0.5, "per token"), num_splits=3),
    dict(page_size=1, window_size=(20, 3)),
    dict(page_size=64, window_size=(20, -1)),
    dict(page_size=None, cache_layout="heads first"),
    dict(cache_layout="heads first", dtype=torch.bfloat16, num_splits=0),
    dict(cache_layout="wide", dtype=torch.float32, head_dim=256, head_dim_v=71),
    dict(key_shard=(1, 2, 4), window_size=(40, -1)),
    dict(tree="any", window_size=(30, 0), alibi="per head"),
    dict(forks=(None, (0, 2), (0, 2)), part=1, softcap=9.0),
    dict(config=PagedConfig(64, 32, 8, 1)),
]


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("options", PER_TOKEN, ids=str)
@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=str)
def test_a_scale_for_each_token_and_head(cache_dtype, options):
    """Scales of slots without a key are NaN, and are not read."""
    rows = dict(seqlens_q=(3, 3, 3), seqlens_k=(47, 100, 64), scales=("per token", "per token"))
    check(replace(PLAIN, cache_dtype=cache_dtype, **rows | options))


@pytest.mark.parametrize("size", [1e-4, 1.0, 6e4])
@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=str)
def test_values_of_any_size_in_fp16(cache_dtype, size):
    """Weights times scales stay in the range of fp16, and keep their bits."""
    torch.manual_seed(0)
    rows = torch.randn(2, 64, 1, 32, device=DEVICE)
    largest = torch.iinfo(torch.int8).max if cache_dtype == torch.int8 else torch.finfo(cache_dtype).max
    scales = rows.abs().amax(3) / largest
    cache = (rows / scales[..., None]).round().to(cache_dtype) if cache_dtype == torch.int8 else None
    cache = (rows / scales[..., None]).to(cache_dtype) if cache is None else cache
    scales[..., 0] *= size / rows.abs().max()
    lengths = torch.tensor([64, 50], dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 1, 1, 32, device=DEVICE).half()
    out = paged_attention(q, cache, cache, lengths, k_scale=1 / largest, v_scale=scales)
    k, v = cache.double() / largest, cache.double() * scales.double()[..., None]
    for i, n in enumerate(lengths.tolist()):
        weights = (q[i, 0, 0].double() @ k[i, :n, 0].T / 32**0.5).softmax(0)
        torch.testing.assert_close(out[i, 0, 0].double(), weights @ v[i, :n, 0], rtol=2e-3, atol=2e-3 * size)


@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, num_heads_kv=2, group_size=4, head_dim=128, head_dim_v=128),  # Llama-3-8B, two of eight KV heads
        replace(PLAIN, num_heads_kv=1, group_size=71),  # Falcon-7B
        replace(PLAIN, num_heads_kv=1, group_size=8, window_size=(30, -1), sinks=torch.float16),  # gpt-oss
        replace(PLAIN, num_heads_kv=4, group_size=1, head_dim=192, head_dim_v=128),
    ],
)
def test_heads_of_real_models(case):
    check(replace(case, num_splits=2))


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("part", [None, pytest.param(1, marks=pytest.mark.emulated)])
def test_mixed_batch(part):
    """A prefill chunk, decodes, a draft, an idle slot, a sequence that is all new."""
    check(
        replace(
            PLAIN,
            varlen=True,
            seqlens_q=(40, 1, 1, 4, 0, 33),
            seqlens_k=(140, 100, 1, 77, 0, 33),
            forks=(None, (0, 4), None, (1, 2), (1, 1), (3, 2)),
            part=part,
        )
    )


@pytest.mark.parametrize(
    ("seqlens_q", "seqlens_k"), [((), ()), ((0, 0), (3, 0)), ((1,), (0,)), ((3,), (1,)), ((5, 1, 2), (0, 0, 0))]
)
def test_sizes_at_the_edge(seqlens_q, seqlens_k):
    for num_splits in (0, 1, 4):
        case = replace(PLAIN, varlen=True, seqlens_q=seqlens_q, seqlens_k=seqlens_k, num_splits=num_splits)
        check(case)
        check(replace(case, sinks=torch.float32))


@pytest.mark.oldest
def test_a_cache_in_pages_is_attention_over_keys_in_a_row():
    q = torch.randn(2, 3, 4, 32, device=DEVICE)
    k, v = (torch.randn(2, 64, 2, 32, device=DEVICE) for _ in range(2))
    seqlens = torch.tensor([64, 64], dtype=torch.int32, device=DEVICE)
    table = torch.arange(8, dtype=torch.int32, device=DEVICE).view(2, 4)
    expected = flash_attention(q, k, v, causal=True)
    for caches in ((k, v, seqlens), (k.view(8, 16, 2, 32), v.view(8, 16, 2, 32), seqlens, table)):
        torch.testing.assert_close(paged_attention(q, *caches), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_is_the_same_in_any_batch(num_splits):
    """Bitwise, if the number of splits is given."""
    inputs = Inputs(replace(PLAIN, seqlens_q=(2, 2, 2), seqlens_k=(47, 100, 5)))
    q, seqlens = inputs.q.view(3, 2, 8, 64), torch.tensor([47, 100, 5], dtype=torch.int32, device=DEVICE)

    def attend(rows):
        arguments = (inputs.k_cache, inputs.v_cache, seqlens[rows], inputs.block_table[rows])
        return paged_attention(q[rows], *arguments, num_splits=num_splits)

    together = attend([0, 1, 2])
    for i in range(3):
        assert torch.equal(attend([i])[0], together[i])
    assert torch.equal(attend([2, 0]), together[[2, 0]])


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_is_the_same_in_any_packed_batch(num_splits):
    """Bitwise, if max_seqlen_q is given too: a decode step, a draft and a chunk of at least two tiles."""
    counts = (1, 5, 40)
    inputs = Inputs(replace(PLAIN, varlen=True, seqlens_q=counts, seqlens_k=(47, 100, 140)))
    queries = inputs.q.split(counts)
    seqlens = torch.tensor([47, 100, 140], dtype=torch.int32, device=DEVICE)

    def attend(rows):
        bounds = [0, *itertools.accumulate(counts[i] for i in rows)]
        out = paged_attention(
            torch.cat([queries[i] for i in rows]),
            inputs.k_cache,
            inputs.v_cache,
            seqlens[rows],
            inputs.block_table[rows],
            cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
            max_seqlen_q=40,
            num_splits=num_splits,
        )
        return dict(zip(rows, out.split([counts[i] for i in rows])))

    alone = {i: attend([i])[i] for i in range(3)}
    for rows in ([0, 1], [2, 0], [2, 1, 0], [1, 2, 0]):
        for i, out in attend(rows).items():
            assert torch.equal(out, alone[i])


@pytest.mark.oldest
@pytest.mark.parametrize("options", [{}, {"window_size": (40, -1), "softcap": 5.0}], ids=["plain", "options"])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(512, 512), (448, 320), (64, 512)])
@pytest.mark.parametrize("config", [PagedConfig(16, 32, 4, 1), PagedConfig(64, 32, 8, 1)], ids=["16 rows", "64 rows"])
def test_wide_heads(head_dim, head_dim_v, config, options):
    """In pieces of 256 elements; with 64 rows in the form whose columns are split over the warpgroups."""
    case = replace(PLAIN, seqlens_q=(17, 17), seqlens_k=(47, 100), head_dim=head_dim, head_dim_v=head_dim_v)
    check(replace(case, config=config, **options))


def test_a_rank_whose_keys_no_row_sees_loads_none():
    """The last key, which alone is in the window, is the other rank's. Tiles begin at multiples of their size."""
    case = replace(PLAIN, seqlens_q=(1,), seqlens_k=(33,), page_size=32, key_shard=(1, 2, 1))
    check(replace(case, causal=False, window_size=(0, -1), config=PagedConfig(16, 32, 4, 1)))


TREES = {
    "one prefix": (None, (0, 5), (0, 5), (0, 5), (0, 5), (0, 5)),
    "forks of forks": (None, (0, 5), (1, 3), (2, 2), (3, 1), (0, 4)),
    "two groups and one alone": (None, (0, 3), None, (2, 4), None, (2, 1)),
    "forks that have nothing of their own": (None, (0, 9), (0, 9), (1, 6), (3, 9), (0, 0)),
}


@pytest.mark.oldest
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(window_size=(20, -1), sinks=torch.float32)], ids=str)
@pytest.mark.parametrize("forks", TREES.values(), ids=TREES)
@pytest.mark.parametrize("part", [WHOLE, 2])
@pytest.mark.parametrize("varlen", [False, True])
def test_prefix_trees(varlen, part, forks, options):
    """Of some sequences the last shared page is not full, so that they end inside a node."""
    case = replace(PLAIN, seqlens_q=(2,) * 6, seqlens_k=(90, 130, 85, 84, 70, 0), forks=forks, part=part)
    case = replace(case, scales=("one", "per head"), q_layout="heads first", varlen=varlen, **options)
    for config in (PLAIN.config, PagedConfig(64, 16, 4, 1)):
        check(replace(case, config=config))


@interpreted
@pytest.mark.parametrize("part", [WHOLE, 1])
def test_shared_pages_are_read_once(part):
    """All rows of a node fit in a tile: as many pages are loaded as the sequences have, each once."""
    case = replace(PLAIN, seqlens_q=(1,) * 8, seqlens_k=(96, 96, 96, 80, 64, 48, 32, 16), num_heads_kv=1, group_size=2)
    case = replace(case, forks=(None, (0, 5), (1, 4), (2, 3), (3, 3), (4, 2), (5, 1), None), part=part)
    inputs, loaded = Inputs(case), {}
    for inputs.case in (replace(case, part=None), case):
        with using(case.config), guard() as accesses:
            inputs.call()
        loaded[inputs.case.part] = accesses.bytes_loaded["k.ptr"] / (16 * 64 * 2)
    unique = len({page for table in inputs.tables for page in table})
    assert loaded == {None: sum(map(len, inputs.tables)), part: unique}


@interpreted
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("part", [None, WHOLE, 1])
@pytest.mark.parametrize("window_size", [(0, -1), (20, -1), (40, 8), (-1, 8)])
def test_pages_that_a_query_sees_are_read_once(window_size, part, num_splits):
    """With a tree each page that any sequence sees, without one the pages of each; tiles are pages."""
    case = replace(PLAIN, seqlens_q=(1,) * 8, seqlens_k=(96, 96, 96, 80, 64, 48, 32, 16), num_heads_kv=1, group_size=2)
    case = replace(case, forks=(None, (0, 5), (1, 4), (2, 3), (3, 3), (4, 2), (5, 1), None), part=part)
    case = replace(case, window_size=window_size, causal=False, sinks=torch.float32, num_splits=num_splits)
    case = replace(case, config=PagedConfig(16, 16, 4, 1))
    inputs = Inputs(case)
    with using(case.config), guard() as accesses:
        inputs.call()
    left = window_size[0] if window_size[0] >= 0 else 96
    seen = [table[max(0, n - 1 - left) // 16 :] for table, n in zip(inputs.tables, case.seqlens_k)]
    pages = [page for own in seen for page in own]
    for name in ("k.ptr", "v.ptr"):
        assert accesses.bytes_loaded[name] == len(pages if part is None else set(pages)) * 16 * 64 * 2


@interpreted
def test_pages_outside_of_the_window_are_not_touched(record_property):
    """A decode step reads the visible keys, rounded up to at most a tile."""
    case = replace(PLAIN, seqlens_k=(1000, 513, 64), page_size=64, config=PagedConfig(16, 64, 4, 1))
    for window, seen in ((-1, 1000 + 513 + 64), (99, 100 + 100 + 64)):
        inputs = Inputs(replace(case, window_size=(window, -1)))
        with using(case.config), guard() as accesses:
            inputs.call()
        loaded = accesses.bytes_loaded["k.ptr"] / (2 * 64 * 2)
        tiles = sum(-(-min(n, window + 1 if window >= 0 else n) // 64) * 64 for n in case.seqlens_k)
        figure = f"decode, window {window}: {loaded:.0f} keys loaded, {seen} seen, {tiles} in whole tiles"
        record_property("figure", figure)
        assert loaded <= 1.05 * tiles
        assert window >= 0 or loaded == seen


@pytest.mark.parametrize("attend", [paged_attention, reference.paged_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize("options", [{}, dict(key_shard=(1, 2, 4)), dict(tree_mask=[0b001, 0b000, 0b101])], ids=str)
def test_pages_before_the_window_may_be_gone(options, attend):
    """Where the table had them there is one that holds NaN."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 32, generator=generator).to(DEVICE)
    caches = list(torch.randn(2, 17, 16, 2, 32, generator=generator).to(DEVICE))
    table = torch.arange(1, 17, dtype=torch.int32).view(2, 8)
    seqlens = torch.tensor([120, 77], dtype=torch.int32, device=DEVICE)
    if "tree_mask" in options:
        options = dict(tree_mask=torch.tensor([options["tree_mask"]] * 2, device=DEVICE))
    options = options | dict(window_size=(20, -1), return_lse=True)
    expected = attend(q, *caches, seqlens, table.to(DEVICE), **options)
    num_ranks = options.get("key_shard", (0, 1, 1))[1]
    for row, seqlen in zip(table, seqlens.tolist()):
        row[: (seqlen - 3 - 20 - ("tree_mask" in options)) // (16 * num_ranks)] = 0
    assert (table == 0).any()
    for cache in caches:
        cache[0] = float("nan")
    for result, wanted in zip(attend(q, *caches, seqlens, table.to(DEVICE), **options), expected):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("page_size", [48, 80])
def test_pages_that_a_tile_does_not_divide(page_size):
    check(replace(PLAIN, page_size=page_size))


@pytest.mark.parametrize("where", ["k_cache", "v_cache", "q", "block_table"])
def test_offsets_past_32_bits(where):
    """Pages, queries and rows of the table that lie far apart, in memory that is never touched."""
    inputs = Inputs(replace(PLAIN, seqlens_q=(1, 1), seqlens_k=(20, 33), head_dim=16, head_dim_v=16))
    tensors = {
        "q": inputs.q.view(2, 1, 8, 16),
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        "block_table": inputs.block_table,
    }
    seqlens = torch.tensor([20, 33], dtype=torch.int32, device=DEVICE)
    expected = paged_attention(cache_seqlens=seqlens, **tensors, num_splits=1)
    x = tensors[where]
    stride = (2**31 + 64) // (1 if len(x) == 2 else 4)
    memory = torch.empty((len(x) - 1) * stride + x.numel(), dtype=x.dtype, device=DEVICE)
    tensors[where] = memory.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)
    assert torch.equal(paged_attention(cache_seqlens=seqlens, **tensors, num_splits=1), expected)


def test_result_goes_where_it_is_asked_to():
    inputs = Inputs(PLAIN)
    seqlens = torch.tensor(PLAIN.seqlens_k, dtype=torch.int32, device=DEVICE)
    arguments = (inputs.q[:, None], inputs.k_cache, inputs.v_cache, seqlens, inputs.block_table)
    for num_splits in (1, 3):
        out = torch.zeros(3, 1, 8, 64, dtype=torch.float16, device=DEVICE)
        assert paged_attention(*arguments, num_splits=num_splits, out=out) is out
        assert torch.equal(out, paged_attention(*arguments, num_splits=num_splits))


def test_splits_follow_from_shapes_alone():
    """A captured graph stays right as sequences grow: no choice depends on the content of tensors."""
    inputs = Inputs(PLAIN)
    chosen = []
    for seqlens in ((47, 100, 1), (1, 1, 1)):
        misses = forward._plan.cache_info().misses
        cache_seqlens = torch.tensor(seqlens, dtype=torch.int32, device=DEVICE)
        paged_attention(inputs.q[:, None], inputs.k_cache, inputs.v_cache, cache_seqlens, inputs.block_table)
        chosen.append(forward._plan.cache_info().misses - misses)
    assert chosen[1] == 0


def test_values_are_checked_if_asked_for(monkeypatch):
    inputs = Inputs(PLAIN)
    seqlens = torch.tensor([47, 10**6, 1], dtype=torch.int32, device=DEVICE)
    arguments = (inputs.q[:, None], inputs.k_cache, inputs.v_cache, seqlens, inputs.block_table)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]: expected 0 to the"):
        paged_attention(*arguments, check_values=True)
    monkeypatch.setitem(os.environ, "TRITON_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]"):
        paged_attention(*arguments)
