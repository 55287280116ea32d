"""The door for vLLM without vLLM: attention, MLA and metadata by its calls; a double of its registry and interface.

tests/engines/test_vllm.py runs the same with vLLM's own classes (`make test-engines`).
"""

import ast
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_cases as cases
from host_cost import ELSEWHERE, compare, python_calls
from ranks import Ranks, combine
from vllm_cases import DIM, HEADS, HEADS_KV, MIXED, NOPE, RANK, ROPE, V_DIM, Batch, Shard, randn

from perf.model.house import ROOT
from triton_attn import mla_decode, paged_attention
from triton_attn.interop import vllm
from triton_attn.interop.vllm import paged
from triton_attn.toolchain import compile_only

# Caches contain NaN on purpose, and numpy warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore:invalid value:RuntimeWarning")
SCALE = DIM**-0.5
TOLERANCE = dict(atol=4e-3, rtol=4e-3)


def run(batch, layout="HND", kv_cache_dtype="auto", expected=None, **options):
    """(what `forward` writes, what it should be) in fp64."""
    impl = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, kv_cache_dtype=kv_cache_dtype, **options)
    cache = cases.cache_of(batch, layout, kv_cache_dtype)
    cases.fill_cache(impl, batch, cache)
    metadata = vllm.PagedMetadataBuilder().build(0, batch)
    q = randn(batch.num_tokens, HEADS, DIM, seed=9)
    output = torch.full_like(q, torch.nan)
    assert impl.forward(cases.LAYER, q, None, None, cache, metadata, output) is output
    written = output[: batch.num_actual_tokens].double()
    return written, cases.expected_attention(batch, q, cache, kv_cache_dtype, **(expected or {}))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    "kv_cache_dtype",
    [
        *(pytest.param(name, marks=pytest.mark.emulated) for name in ("auto", "int8_per_token_head")),
        "fp8",
        "fp8_e5m2",
        "fp8_per_token_head",
    ],
)
def test_mixed_prefill_and_decode(layout, kv_cache_dtype):
    torch.testing.assert_close(*run(Batch(MIXED, padding=3), layout, kv_cache_dtype), **TOLERANCE)


def test_windows_soft_caps_and_sinks():
    sinks = torch.nn.Parameter(randn(HEADS, seed=8, dtype=torch.bfloat16))
    found = run(
        Batch(MIXED),
        sliding_window=9,
        logits_soft_cap=5.0,
        sinks=sinks,
        expected=dict(window=9, softcap=5.0, sinks=sinks.detach()),
    )
    torch.testing.assert_close(*found, **TOLERANCE)


def test_alibi():
    slopes = [0.5, 0.25, 0.125, 0.0625]
    torch.testing.assert_close(*run(Batch(MIXED), alibi_slopes=slopes, expected=dict(slopes=slopes)), **TOLERANCE)


@pytest.mark.parametrize("window", [None, 4])
def test_without_causality_all_keys_or_those_in_a_window_on_both_sides_are_seen(window):
    batch = Batch(((20, 3), (7, 5), (0, 11)), causal=False)
    torch.testing.assert_close(*run(batch, sliding_window=window, expected=dict(window=window)), **TOLERANCE)


def test_keys_of_an_encoder_are_all_seen():
    batch = Batch(((20, 3), (7, 5)), causal=False)
    torch.testing.assert_close(*run(batch, attn_type="encoder_decoder"), **TOLERANCE)


def test_a_sequence_is_the_same_in_every_batch(monkeypatch):
    """As the plugin sets both under VLLM_BATCH_INVARIANT: the option, and the largest number of queries."""
    monkeypatch.setattr(vllm.PagedAttention, "batch_invariant", True)
    monkeypatch.setattr(vllm.PagedMetadataBuilder, "fixed_query_len", 64)
    alone, together = Batch(((20, 1),)), Batch(((20, 1), (0, 40)))
    together.block_table_tensor[0, : alone.width] = alone.block_table_tensor[0]  # the same pages
    together.block_table_tensor[1] = torch.arange(together.width) + alone.num_blocks
    together.num_blocks += alone.num_blocks
    together.slot_mapping = torch.cat([together.slots(0, 20), together.slots(1)])
    impl = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV)
    outs = []
    for batch in (alone, together):
        cache = cases.new_cache(batch)
        cases.fill_cache(impl, batch, cache)
        keys = (randn(21, HEADS_KV, DIM, seed=seed) for seed in (50, 51))
        impl.do_kv_cache_update(cases.LAYER, *keys, cache, batch.slots(0))
        q = randn(batch.num_tokens, HEADS, DIM, seed=9)
        q[0] = randn(HEADS, DIM, seed=10)
        metadata = vllm.PagedMetadataBuilder().build(0, batch)
        assert metadata.max_query_len == 64
        outs.append(impl.forward(cases.LAYER, q, None, None, cache, metadata, torch.empty_like(q))[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_attends_without_a_cache(window):
    batch = Batch(((0, 7), (0, 11), (0, 0)), padding=2)
    impl = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, attn_type="encoder_only", sliding_window=window)
    q, k, v = (randn(batch.num_tokens, heads, DIM, seed=i) for i, heads in enumerate((HEADS, HEADS_KV, HEADS_KV)))
    assert impl.do_kv_cache_update(cases.LAYER, k, v, torch.empty(0), batch.slot_mapping) is None
    output = torch.full_like(q, torch.nan)
    impl.forward(cases.LAYER, q, k, v, torch.empty(0), vllm.PagedMetadataBuilder().build(0, batch), output)
    for i in range(2):
        rows = batch.queries(i)
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), k[rows].double().repeat_interleave(2, 1)) * SCALE
        distance = torch.arange(len(q[rows])) - torch.arange(len(q[rows]))[:, None]
        weights = scores.masked_fill(distance.abs() >= (window or 99), -torch.inf).softmax(-1)
        expected = torch.einsum("hij,jhd->ihd", weights, v[rows].double().repeat_interleave(2, 1))
        torch.testing.assert_close(output[rows].double(), expected, **TOLERANCE)
    assert output[batch.num_actual_tokens :].isnan().all()


def test_keys_past_the_slots_are_padding():
    """vLLM's graphs pad keys, and give slots for the batch's own tokens."""
    batch, impl = Batch(((0, 5),)), vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV)
    keys = [randn(8, HEADS_KV, DIM, seed=seed) for seed in (2, 3)]
    padded, exact = cases.new_cache(batch), cases.new_cache(batch)
    impl.do_kv_cache_update(cases.LAYER, *keys, padded, batch.slot_mapping)
    impl.do_kv_cache_update(cases.LAYER, *(x[:5] for x in keys), exact, batch.slot_mapping)
    assert (~exact.isnan()).sum() == 5 * HEADS_KV * 2 * DIM
    torch.testing.assert_close(padded, exact, atol=0, rtol=0, equal_nan=True)


def test_batch_invariance_is_passed_on(monkeypatch):
    found, whole = {}, paged.paged_attention
    monkeypatch.setattr(
        paged, "paged_attention", lambda *args, **options: found.update(options) or whole(*args, **options)
    )
    monkeypatch.setattr(vllm.PagedAttention, "batch_invariant", True)
    run(Batch(((20, 1),)))
    assert found["batch_invariant"] is True


def test_a_profiling_run_gets_zeros():
    impl = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV)
    output = torch.full((3, HEADS, DIM), torch.nan)
    assert impl.forward(cases.LAYER, output, output, output, torch.empty(0), None, output) is output
    assert (output == 0).all()


def test_metadata_is_vllms_own_tensors():
    """Captured graphs follow them."""
    batch, builder = Batch(MIXED), vllm.PagedMetadataBuilder()
    metadata = builder.build(0, batch)
    for ours, theirs in (
        ("block_table", "block_table_tensor"),
        *((name, name) for name in ("seq_lens", "slot_mapping")),
    ):
        assert getattr(metadata, ours) is getattr(batch, theirs)
    builder.update_draft_decode_metadata(metadata)
    assert builder.build_for_cudagraph_capture(batch) == metadata


@pytest.mark.parametrize(
    ("name", "value"), [("causal", torch.ones(1, dtype=torch.bool)), ("mm_req_doc_ranges", {0: [(0, 3)]})]
)
def test_metadata_that_is_not_supported_raises(name, value):
    batch = Batch(MIXED)
    setattr(batch, name, value)
    with pytest.raises(NotImplementedError, match=f"{name}: expected"):
        vllm.PagedMetadataBuilder().build(0, batch)


@pytest.mark.parametrize(
    ("name", "value"), [("use_alibi_sqrt", True), ("chunk_lookback", 2), ("kv_cache_dtype", "int4_per_token_head")]
)
def test_options_of_a_layer_that_are_not_supported_raise(name, value):
    with pytest.raises(NotImplementedError, match=f"{name}: "):
        vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, **{name: value})


def test_options_at_their_defaults_are_supported():
    vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, use_alibi_sqrt=False, chunk_lookback=-1)


@pytest.mark.parametrize("name", ["output_scale", "output_block_scale"])
def test_outputs_are_not_quantized(name):
    impl, x = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV), torch.empty(1, HEADS, DIM)
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl.forward(cases.LAYER, x, x, x, x, None, x, **{name: torch.ones(1)})


def test_a_cache_has_the_models_dtype_or_fp8():
    assert vllm.unsupported_cache_dtype(torch.float16, "fp8") is None
    assert vllm.unsupported_cache_dtype(torch.float16, None) is None
    assert vllm.unsupported_cache_dtype(torch.bfloat16, "bfloat16") is None
    assert vllm.unsupported_cache_dtype(torch.float16, "bfloat16").startswith("kv_cache_dtype: expected")


def test_scales_are_those_that_the_layer_has_at_the_call():
    """The layer keeps views of them: it must see new tensors, and new values in the same tensors."""
    batch = Batch(MIXED)
    kept, fresh = (vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, kv_cache_dtype="fp8") for _ in range(2))
    cache = cases.new_cache(batch, dtype=torch.uint8)
    cases.fill_cache(kept, batch, cache)
    metadata = vllm.PagedMetadataBuilder().build(0, batch)
    q = randn(batch.num_tokens, HEADS, DIM, seed=9)
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0))

    def outputs():
        fresh._viewed = (None, None, {})
        return [impl.forward(layer, q, None, None, cache, metadata, torch.empty_like(q)) for impl in (kept, fresh)]

    for change in ("k in place", "v in place", "k", "v"):
        before = outputs()[0]
        name = f"_{change[0]}_scale"
        if "in place" in change:
            getattr(layer, name).mul_(2)
        else:
            setattr(layer, name, getattr(layer, name) * 2)
        found, expected = outputs()
        assert torch.equal(found, expected), change
        assert not torch.equal(found, before), change


@pytest.mark.compiled
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_host_cost(record_property, kv_cache_dtype):
    """A decode step costs at most 1.3 times `paged_attention` over views of the cache."""
    impl = vllm.PagedAttention(HEADS, DIM, SCALE, HEADS_KV, kv_cache_dtype=kv_cache_dtype, sliding_window=32)
    q, output = (torch.empty(8, HEADS, DIM, dtype=torch.float16) for _ in range(2))
    cache = torch.empty(32, HEADS_KV, 16, 2 * DIM, dtype=torch.float16 if kv_cache_dtype == "auto" else torch.uint8)
    (k_cache, v_cache), _ = impl._split(cases.LAYER, cache)
    batch = Batch([(63, 1)] * 8)
    metadata = vllm.PagedMetadataBuilder().build(0, batch)
    options = dict(cu_seqlens_q=batch.query_start_loc, max_seqlen_q=1, softmax_scale=SCALE, window_size=(31, 0))
    if kv_cache_dtype == "fp8":
        options |= dict(k_scale=cases.LAYER._k_scale.view(1), v_scale=cases.LAYER._v_scale.view(1))
    tensors = k_cache, v_cache, batch.seq_lens, batch.block_table_tensor
    with compile_only("sm_90", every_launch=False):
        calls = {
            "direct": lambda: paged_attention(q, *tensors, **options, out=output),
            "door": lambda: impl.forward(cases.LAYER, q, None, None, cache, metadata, output),
        }
        cost, _, ratio = compare(calls["door"], calls["direct"], batches=100)
        extra_calls = python_calls(calls["door"]) - python_calls(calls["direct"])
    record_property(
        "figure",
        f"{cost:.0f} us a decode step of vLLM, {ratio:.2f} of the direct call, {extra_calls} more Python calls",
    )
    assert extra_calls <= 7
    assert ratio <= 1.3 * ELSEWHERE


# As MIXED, and a context that some ranks have no key of.
SHARED = ((1, 2), *MIXED)
NEW = ((0, 7), (0, 1))


def layer_of_rank(group, **options):
    """One head of keys, as vLLM has it on each rank that shares them."""
    layer_class = type("PagedAttention", (vllm.PagedAttention,), dict(dcp_world_size=group.world_size))
    layer = layer_class(HEADS, DIM, SCALE, 1, **options)
    layer.dcp_group, layer.dcp_combine = group, combine
    return layer


def builder_of_rank(shard):
    builder = vllm.PagedMetadataBuilder()
    builder.key_shard = shard.rank, shard.world_size, shard.interleave
    return builder


def new_keys_and_values(batch):
    """As `fill_cache` writes them."""
    return (randn(batch.num_tokens, 1, DIM, seed=seed) for seed in (4, 5))


def attend_on_ranks(ranks, q, requests, interleave=1, causal=True, capture=False, **options):
    """What the ranks write, each for its heads and with its share of the keys, side by side. sinks and alibi_slopes are
    of all heads.
    """

    def run_rank(group):
        rank, world_size = group.rank_in_group, group.world_size
        shard = Shard(requests, rank, world_size, interleave, padding=2, causal=causal)
        own = {name: x[rank * HEADS : (rank + 1) * HEADS] for name, x in options.items() if name in PER_HEAD}
        layer = layer_of_rank(group, **(options | own))
        is_fp8 = options.get("kv_cache_dtype") == "fp8"
        cache = cases.new_cache(shard, dtype=torch.uint8 if is_fp8 else torch.float16, heads_kv=1)
        cases.fill_cache(layer, shard, cache, heads_kv=1)
        builder = builder_of_rank(shard)
        metadata = builder.build_for_cudagraph_capture(shard) if capture else builder.build(0, shard)
        own_q = q.chunk(world_size, dim=1)[rank]
        output = torch.full_like(own_q, torch.nan)
        layer.forward(cases.LAYER, own_q, *new_keys_and_values(shard), cache, metadata, output)
        return output[: shard.num_actual_tokens]

    return torch.cat(ranks.run(run_rank), dim=1)


PER_HEAD = "sinks", "alibi_slopes"
OPTIONS_OF_RANKS = [
    pytest.param(2, 1, True, dict(logits_soft_cap=5.0), id="softcap"),
    pytest.param(2, 4, True, dict(kv_cache_dtype="fp8"), id="fp8"),
    pytest.param(3, 16, True, dict(sliding_window=11), id="window"),
    pytest.param(2, 1, False, dict(sliding_window=11, logits_soft_cap=5.0), id="not causal"),
    pytest.param(2, 2, True, dict(alibi_slopes=[0.5 - 0.05 * i for i in range(2 * HEADS)]), id="alibi"),
    pytest.param(2, 1, True, dict(kv_sharing_target_layer_name="first"), id="shared keys"),
]


@pytest.mark.parametrize(("world_size", "interleave", "causal", "options"), OPTIONS_OF_RANKS)
def test_ranks_that_share_the_keys_are_as_one(world_size, interleave, causal, options):
    """Also in a batch without context, as a captured graph attends to it."""
    q, sinks = (randn(*shape, seed=9) for shape in ((200, world_size * HEADS, DIM), (world_size * HEADS,)))
    for requests, capture in ((SHARED, False), (NEW, True)):
        batch, ranks = Batch(requests, padding=2, causal=causal), Ranks(world_size)
        rows = q[: batch.num_tokens]
        found = attend_on_ranks(ranks, rows, requests, interleave, causal, capture, sinks=sinks, **options)
        expected = expected_of_ranks(batch, rows, sinks=sinks, **options)
        torch.testing.assert_close(found.double(), expected, **TOLERANCE)
        assert ranks.num_exchanges == 3 + ("alibi_slopes" in options)  # queries, outs, lses


def expected_of_ranks(batch, q, sinks, kv_cache_dtype="auto", **options):
    names = dict(logits_soft_cap="softcap", sliding_window="window", alibi_slopes="slopes")
    named = {names[name]: x for name, x in options.items() if name in names}
    one = vllm.PagedAttention(HEADS, DIM, SCALE, 1, kv_cache_dtype=kv_cache_dtype)
    cache = cases.new_cache(batch, dtype=torch.uint8 if kv_cache_dtype == "fp8" else torch.float16, heads_kv=1)
    cases.fill_cache(one, batch, cache, heads_kv=1)
    return cases.expected_attention(batch, q, cache, kv_cache_dtype, sinks=sinks, **named)


def test_ranks_exchange_nothing_without_context():
    """All know it, by the host's bounds of the lengths. A graph exchanges also then, since it is replayed later."""
    ranks, q, sinks = Ranks(2), randn(10, 2 * HEADS, DIM, seed=9), randn(2 * HEADS)
    found = attend_on_ranks(ranks, q, NEW, sinks=sinks)
    expected = expected_of_ranks(Batch(NEW, padding=2), q, sinks)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)
    assert ranks.num_exchanges == 0
    shard = Shard(NEW, 1, 2)
    builder = builder_of_rank(shard)
    assert not builder.build(0, shard).has_context
    assert builder.build_for_cudagraph_capture(shard).has_context
    shard.seq_lens_cpu_upper_bound = None  # not known: there may be context
    assert builder.build(0, shard).has_context


def test_keys_of_another_layer_are_read_from_the_cache():
    """The layer has no new keys, so that an exchange is needed without context too."""
    ranks, q, sinks = Ranks(2), randn(10, 2 * HEADS, DIM, seed=9), randn(2 * HEADS)
    found = attend_on_ranks(ranks, q, NEW, sinks=sinks, kv_sharing_target_layer_name="first")
    torch.testing.assert_close(found.double(), expected_of_ranks(Batch(NEW, padding=2), q, sinks), **TOLERANCE)
    assert ranks.num_exchanges == 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attn_type", dict(attn_type="encoder_decoder")),
        ("num_kv_heads", dict(num_kv_heads=2)),
        ("head_size", dict(head_size=80)),
    ],
)
def test_what_ranks_cannot_share_raises(monkeypatch, name, options):
    """With decode_context_parallel_size > 1. An encoder has no cache to share."""
    monkeypatch.setattr(vllm.PagedAttention, "dcp_world_size", 2)
    arguments = dict(num_heads=HEADS, head_size=DIM, scale=SCALE, num_kv_heads=1)
    with pytest.raises(NotImplementedError, match=f"{name}: expected .*decode_context_parallel_size > 1"):
        vllm.PagedAttention(**(arguments | options))
    vllm.PagedAttention(**arguments)
    vllm.PagedAttention(**(arguments | options | dict(attn_type="encoder_only")))


def latent_attention(kv_cache_dtype="auto", dcp_world_size=1, **changes):
    """A layer as vLLM's own __init__ leaves it."""
    impl = vllm.LatentAttention()
    impl.num_heads, impl.scale, impl.kv_cache_dtype = HEADS, (NOPE + ROPE) ** -0.5, kv_cache_dtype
    impl.kv_lora_rank, impl.qk_nope_head_dim, impl.qk_rope_head_dim, impl.v_head_dim = RANK, NOPE, ROPE, V_DIM
    impl.kv_b_proj, impl.dcp_world_size = cases.Projection(), dcp_world_size
    vars(impl).update(changes)
    return impl


def decode_metadata(batch, causal=True, varlen_graphs=False):
    builder = vllm.LatentMetadataBuilder()
    builder.varlen_graphs = varlen_graphs
    starts, lengths = batch.query_start_loc, batch.seq_lens
    sizes = batch.num_tokens, batch.max_query_len
    decode = builder._build_decode(batch.block_table_tensor, lengths, batch.max_seq_len, starts, starts, *sizes, None)
    return SimpleNamespace(decode=decode, causal=causal)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize(
    ("num_queries", "causal"),
    [
        pytest.param((1, 1, 1), True, id="single"),
        pytest.param((3, 3, 3), True, id="uniform"),
        pytest.param((3, 3, 3), False, id="not causal"),
        pytest.param((20, 1, 2, 0), True, id="ragged", marks=pytest.mark.emulated),
    ],
)
def test_mla_decode(kv_cache_dtype, num_queries, causal):
    batch = Batch([*zip((0, 15, 40, 0), num_queries)], padding=2 if 0 in num_queries else 0)
    impl, cache = latent_attention(kv_cache_dtype, dcp_world_size=2), cases.new_latent_cache(batch, kv_cache_dtype)
    cases.fill_latent_cache(impl, batch, cache, kv_cache_dtype)
    q = randn(batch.num_tokens, HEADS, RANK + ROPE, seed=12)
    metadata = decode_metadata(batch, causal)
    assert (metadata.decode.query_start_loc is None) == (0 not in num_queries)
    out, lse = impl.forward_mqa(q, cache, metadata, cases.LAYER)
    expected = cases.expected_latent(batch, *q.split([RANK, ROPE], dim=-1), impl.scale, causal, kv_cache_dtype)
    for found, wanted in zip((out, lse), expected):
        torch.testing.assert_close(found[: batch.num_actual_tokens].double(), wanted, **TOLERANCE)
    assert (out[batch.num_actual_tokens :] == 0).all()
    impl.dcp_world_size = 1
    again, no_lse = impl.forward_mqa(q.split([RANK, ROPE], dim=-1), cache, metadata, cases.LAYER)
    assert torch.equal(again, out)
    assert no_lse is None


def test_graphs_of_ragged_decodes_find_their_rows_on_the_device():
    """Captured over as many queries each, and replayed over others."""
    batch = Batch(((15, 3), (40, 3)))
    assert decode_metadata(batch).decode.query_start_loc is None
    assert decode_metadata(batch, varlen_graphs=True).decode.query_start_loc is batch.query_start_loc
    singles = Batch(((15, 1), (40, 1)))
    assert decode_metadata(singles, varlen_graphs=True).decode.query_start_loc is None


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_mla_decode_on_ranks_that_share_the_keys(kv_cache_dtype):
    requests = ((20, 1), (0, 1), (40, 1))
    q = randn(3, 2 * HEADS, RANK + ROPE, seed=12)

    def run_rank(group):
        shard, impl = Shard(requests, group.rank_in_group, 2), latent_attention(kv_cache_dtype, dcp_world_size=2)
        cache = cases.new_latent_cache(shard, kv_cache_dtype)
        cases.fill_latent_cache(impl, shard, cache, kv_cache_dtype)
        shard.seq_lens = (shard.seq_lens + 1 - shard.rank) // 2
        return combine(*impl.forward_mqa(q, cache, decode_metadata(shard), cases.LAYER), group, return_lse=True)

    found = (torch.cat(parts, dim=1).double() for parts in zip(*Ranks(2).run(run_rank)))
    scale = (NOPE + ROPE) ** -0.5
    expected = cases.expected_latent(Batch(requests), *q.split([RANK, ROPE], dim=-1), scale, True, kv_cache_dtype)
    for x, wanted in zip(found, expected):
        torch.testing.assert_close(x, wanted, **TOLERANCE)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
def test_mla_prefill_in_chunks(kv_cache_dtype):
    batch = Batch(((0, 5), (40, 9), (16, 1), (3, 17)))
    impl, cache = latent_attention(kv_cache_dtype), cases.new_latent_cache(batch, kv_cache_dtype)
    latents, ropes = cases.fill_latent_cache(impl, batch, cache, kv_cache_dtype)
    q = randn(batch.num_tokens, HEADS, NOPE + ROPE, seed=13)
    output = torch.full((batch.num_tokens, HEADS * V_DIM), torch.nan, dtype=q.dtype)
    impl.forward_mha(q, latents, ropes.unsqueeze(1), cache, cases.prefill_metadata(batch), cases.LAYER._k_scale, output)
    expected = cases.expected_prefill(batch, q, impl.kv_b_proj, impl.scale, kv_cache_dtype)
    torch.testing.assert_close(output.view(-1, HEADS, V_DIM).double(), expected, **TOLERANCE)


def test_mla_without_rotary_keys(monkeypatch):
    monkeypatch.setattr(cases, "ROPE", 0)
    batch = Batch(((0, 3), (40, 1), (16, 2)))
    impl, cache = latent_attention(qk_rope_head_dim=0), cases.new_latent_cache(batch)
    impl.check_arguments()
    latents, ropes = cases.fill_latent_cache(impl, batch, cache)
    assert (cache.shape[-1], ropes.shape[-1]) == (RANK, 0)
    q = randn(batch.num_tokens, HEADS, RANK, seed=12)
    out, _ = impl.forward_mqa(q, cache, decode_metadata(batch), cases.LAYER)
    expected, _ = cases.expected_latent(batch, q, q[..., :0], impl.scale)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    q = randn(batch.num_tokens, HEADS, NOPE, seed=13)
    output = torch.full((batch.num_tokens, HEADS * V_DIM), torch.nan, dtype=q.dtype)
    impl.forward_mha(q, latents, ropes.unsqueeze(1), cache, cases.prefill_metadata(batch), cases.LAYER._k_scale, output)
    expected = cases.expected_prefill(batch, q, impl.kv_b_proj, impl.scale)
    torch.testing.assert_close(output.view(-1, HEADS, V_DIM).double(), expected, **TOLERANCE)


@pytest.mark.compiled
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_host_cost_of_mla(record_property, kv_cache_dtype):
    """A decode step of 16 heads costs at most 1.3 times `mla_decode` over tensors of its own form."""
    rank, rope, batch = 512, 64, Batch([(63, 1)] * 8)
    impl = latent_attention(kv_cache_dtype, kv_lora_rank=rank, qk_rope_head_dim=rope)
    q_nope, q_pe = torch.empty(8, 16, rank, dtype=torch.float16), torch.empty(8, 16, rope, dtype=torch.float16)
    cache = torch.empty(64, 16, rank + rope, dtype=torch.float16 if kv_cache_dtype == "auto" else torch.float8_e4m3fn)
    metadata = decode_metadata(batch)
    tensors = q_nope.unsqueeze(1), q_pe.unsqueeze(1), cache, batch.seq_lens, batch.block_table_tensor
    options = dict(softmax_scale=impl.scale, k_scale=None if kv_cache_dtype == "auto" else cases.LAYER._k_scale.view(1))
    with compile_only("sm_90", every_launch=False):
        calls = {
            "direct": lambda: mla_decode(*tensors, **options),
            "door": lambda: impl.forward_mqa((q_nope, q_pe), cache, metadata, cases.LAYER),
        }
        cost, _, ratio = compare(calls["door"], calls["direct"], batches=100)
        extra_calls = python_calls(calls["door"]) - python_calls(calls["direct"])
    record_property(
        "figure",
        f"{cost:.0f} us an MLA decode step of vLLM, {ratio:.2f} of the direct call, {extra_calls} more Python calls",
    )
    assert extra_calls <= 4
    assert ratio <= 1.3 * ELSEWHERE


def test_mla_profiling_writes_nothing():
    impl = latent_attention()
    impl.do_kv_cache_update(randn(2, RANK), randn(2, 1, ROPE), torch.empty(0), torch.zeros(2).long(), "auto", None)


@pytest.mark.parametrize(
    ("given", "changes", "name"),
    [
        (dict(sliding_window=8), {}, "sliding_window"),
        (dict(logits_soft_cap=30.0), {}, "logits_soft_cap"),
        ({}, dict(qk_rope_head_dim=0, kv_cache_dtype="fp8_ds_mla"), "qk_rope_head_dim"),
        ({}, dict(kv_cache_dtype="fp8_e5m2"), "kv_cache_dtype"),
    ],
)
def test_options_of_an_mla_layer_that_are_not_supported_raise(given, changes, name):
    with pytest.raises(NotImplementedError, match=f"{name}: "):
        latent_attention(**changes).check_arguments(**given)
    latent_attention().check_arguments(sliding_window=None, attn_type="decoder")


def vllm_double(version="0.33.0", interface=None, fields=vllm.COMMON_FIELDS):
    """Modules with the names, signatures and fields that the door reads of vLLM."""
    backend = types.ModuleType("vllm.v1.attention.backend")
    for path, arguments in (interface or vllm.INTERFACE).items():
        class_name, method = path.split(".")
        if not hasattr(backend, class_name):
            setattr(backend, class_name, type(class_name, (), {}))
        names = {}
        exec(f"def {method}({', '.join(arguments.split())}): pass", names)
        setattr(getattr(backend, class_name), method, names[method])
    backend.CommonAttentionMetadata = SimpleNamespace(__dataclass_fields__=dict.fromkeys(fields))
    registry = types.ModuleType("vllm.v1.attention.backends.registry")
    registry.AttentionBackendEnum = SimpleNamespace(__members__={})
    registry.paths = {}

    def register_backend(name, class_path):
        """As vLLM's: a string is a new name, which must be new."""
        if isinstance(name, str):
            assert name not in registry.AttentionBackendEnum.__members__
            registry.AttentionBackendEnum.__members__[name] = name = SimpleNamespace(name=name)
        registry.paths[name.name] = class_path

    registry.register_backend = register_backend
    modules = {"vllm.v1.attention.backend": backend, "vllm.v1.attention.backends.registry": registry}
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = []
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules["vllm"].__version__ = version
    return modules


def test_a_known_interface_is_registered_again_and_again(monkeypatch):
    for name, module in (modules := vllm_double()).items():
        monkeypatch.setitem(sys.modules, name, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vllm.register()
        vllm.register()
    assert modules["vllm.v1.attention.backends.registry"].paths == {
        "TRITON_ATTN_PLUS": "triton_attn.interop.vllm.backends.AttentionPlusBackend",
        "TRITON_ATTN_PLUS_MLA": "triton_attn.interop.vllm.backends.LatentPlusBackend",
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(version="0.34.1"), "got version 0.34.1"),
        (
            dict(interface=vllm.INTERFACE | {"MLAAttentionImpl.forward_mqa": "self q cache"}),
            "got MLAAttentionImpl.forward_mqa with self q cache",
        ),
        (
            dict(interface={k: v for k, v in vllm.INTERFACE.items() if k != "AttentionImpl.forward"}),
            "got AttentionImpl.forward with nothing",
        ),
        (dict(fields=vllm.COMMON_FIELDS[1:]), "got CommonAttentionMetadata without query_start_loc"),
    ],
)
def test_another_interface_is_not_registered(monkeypatch, changes, told):
    for name, module in (modules := vllm_double(**changes)).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.warns(RuntimeWarning, match=told):
        vllm.register()
    assert modules["vllm.v1.attention.backends.registry"].paths == {}


def test_without_vllm_there_is_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.warns(RuntimeWarning, match=r"an import error .*not registered"):
        vllm.register()


def test_the_door_imports_nothing_of_vllm():
    """Neither vLLM nor the module that does, unless a function is called."""
    paths = set(Path(vllm.__file__).parent.glob("*.py")) - {Path(vllm.__file__).with_name("backends.py")}
    assert len(paths) == 4
    for path in paths:
        nodes = ast.parse(path.read_text()).body
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
        assert not any("backends" in ast.unparse(node) for node in nodes if isinstance(node, ast.ImportFrom))


def test_the_package_names_its_entry_point():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    at = lines.index('[project.entry-points."vllm.general_plugins"]')
    assert lines[at + 1] == 'triton_attn = "triton_attn.interop.vllm:register"'


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (torch.zeros(2, 2, 16, 136), TypeError, "kv_cache: expected an int8 or uint8 tensor, got torch.float32"),
        (torch.zeros(2, 2, 16, 134, dtype=torch.int8), ValueError, r"kv_cache: expected \(num_blocks, num_kv_heads"),
        (torch.zeros(16, 136, dtype=torch.int8), ValueError, r"got shape \(16, 136\)"),
        (torch.zeros(2, 2, 16, 138, dtype=torch.int8)[..., 1:137], ValueError, "rows at multiples of 4 bytes"),
    ],
)
def test_caches_that_have_no_scales_in_their_rows(cache, error, message):
    with pytest.raises(error, match=message):
        vllm.inline_scales(cache)
