"""The door for vLLM with vLLM's own abstract classes, registry, builders and layers, on a CPU: `make test-engines`.

Attention is compared with fp64, and with vLLM's unified_attention in the interpreter.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
import vllm_cases as cases
from ranks import Group, Ranks
from vllm_cases import DIM, HEADS, HEADS_KV, MIXED, NOPE, RANK, ROPE, V_DIM, Batch, Shard, randn

from perf.workloads import calls
from triton_attn.interop import vllm as door

vllm = pytest.importorskip("vllm", reason="make test-engines installs it")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.attention import AttentionConfig  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.model_executor.layers.attention import mla_attention  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402
from vllm.utils import torch_utils  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl  # noqa: E402
from vllm.v1.attention.ops import dcp  # noqa: E402
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (  # noqa: E402
    triton_reshape_and_cache_flash_per_token_head_quant,
)
from vllm.v1.attention.ops.triton_unified_attention import unified_attention  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    get_kv_quant_mode,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
PER_TOKEN = "int8_per_token_head", "fp8_per_token_head"
TOLERANCE = dict(atol=4e-3, rtol=4e-3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backends():
    """The classes as vLLM finds them by the names that users type."""
    assert door.interface_differences() == []
    door.register()
    door.register()
    return {name: AttentionBackendEnum[name].get_class() for name in door.BACKENDS}


@pytest.fixture
def config():
    with set_current_vllm_config(config := VllmConfig(device_config=DeviceConfig("cpu"))):
        yield config


def common_metadata(batch, **changes):
    fields = dict(
        query_start_loc=batch.query_start_loc,
        query_start_loc_cpu=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        num_reqs=batch.num_reqs,
        num_actual_tokens=batch.num_actual_tokens,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        block_table_tensor=batch.block_table_tensor,
        slot_mapping=batch.slot_mapping,
        seq_lens_cpu_upper_bound=batch.seq_lens,
        causal=batch.causal,
    )
    return CommonAttentionMetadata(**(fields | changes))


def test_the_name_that_users_type():
    """As vLLM reads `--attention-backend`, after the plugins that the environment's packages name."""
    load_general_plugins()
    for name in door.BACKENDS:
        assert AttentionConfig(backend=name).backend.get_class().get_name() == name


def attention_builder(backend, config):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=HEADS_KV, head_size=DIM, dtype=torch.float16)
    assert spec.dcp_sharded
    return backend.get_builder_cls()(spec, ["layer"], config, CPU)


def run(backend, config, layout="HND", kv_cache_dtype="auto", batch=None, **options):
    batch = batch or Batch(MIXED, padding=3)
    arguments = dict(alibi_slopes=None, sliding_window=None, kv_cache_dtype=kv_cache_dtype) | options
    impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, HEADS_KV, **arguments)
    cache = cases.cache_of(batch, layout, kv_cache_dtype)
    cases.fill_cache(impl, batch, cache)
    metadata = attention_builder(backend, config).build(0, common_metadata(batch))
    q = randn(batch.num_tokens, HEADS, DIM, seed=9)
    output = torch.full_like(q, torch.nan)
    impl.forward(cases.LAYER, q, None, None, cache, metadata, output)
    return batch, q, cache, output[: batch.num_actual_tokens]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e5m2", *PER_TOKEN])
def test_mixed_prefill_and_decode(backends, config, layout, kv_cache_dtype):
    batch, q, cache, out = run(backends["TRITON_ATTN_PLUS"], config, layout, kv_cache_dtype)
    expected = cases.expected_attention(batch, q, cache, kv_cache_dtype)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


def test_a_window_reaches_both_ways_without_causality(backends, config):
    """By vLLM's mask. Its Triton kernel drops values at the edge of such a window."""
    batch = Batch(MIXED, causal=False)
    batch, q, cache, out = run(backends["TRITON_ATTN_PLUS"], config, batch=batch, sliding_window=9)
    torch.testing.assert_close(out.double(), cases.expected_attention(batch, q, cache, window=9), **TOLERANCE)


def test_the_call_of_perf_peers_is_one_of_unified_attention():
    def function(**arguments):
        inspect.signature(unified_attention).bind(**arguments)

    calls.unified(function, torch.bfloat16, num_heads_q=8, num_heads_kv=2, head_dim=64, page_size=16)


UNIFIED = {
    "plain": {},
    "window": dict(sliding_window=9),
    "softcap and sinks": dict(logits_soft_cap=5.0, sinks=randn(HEADS, seed=8)),
    "alibi": dict(alibi_slopes=[0.5, 0.25, 0.125, 0.0625]),
}


@pytest.mark.parametrize("options", UNIFIED.values(), ids=UNIFIED)
def test_as_unified_attention(backends, config, options):
    """Without empty requests, of which vLLM's kernel writes nothing either."""
    batch, q, cache, out = run(backends["TRITON_ATTN_PLUS"], config, batch=Batch(MIXED[:-1]), **options)
    cache = cache.nan_to_num(0)  # vLLM's kernel reads the rest of a page, times 0
    theirs = unified(batch, q, *cache.transpose(1, 2).split(DIM, dim=-1), **options)
    torch.testing.assert_close(out, theirs, **TOLERANCE)


@pytest.mark.parametrize("kv_cache_dtype", PER_TOKEN)
def test_rows_with_scales_are_those_of_vllm(backends, config, kv_cache_dtype):
    """vLLM's kernels read what we wrote, and we read what they wrote, through the views that vLLM makes."""
    backend, batch = backends["TRITON_ATTN_PLUS"], Batch(MIXED[:-1])
    mode, spec = get_kv_quant_mode(kv_cache_dtype), dict(block_size=16, num_kv_heads=HEADS_KV, head_size=DIM)
    spec = FullAttentionSpec(**spec, dtype=torch.uint8, kv_quant_mode=mode)
    own, others = backend.customize_spec(spec), AttentionBackendEnum.TRITON_ATTN.get_class().customize_spec(spec)
    assert own == others != spec
    cache = cases.cache_of(batch, "NHD", kv_cache_dtype).zero_()
    their_cache = cases.cache_of(batch, "NHD", kv_cache_dtype).zero_()
    impl = backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, HEADS_KV, None, None, kv_cache_dtype)
    theirs = SimpleNamespace(_k_scale_cache=None, _kv_quant_mode=mode, fp8_dtype=torch.float8_e4m3fn)
    theirs._ensure_scale_caches = lambda cache: TritonAttentionImpl._ensure_scale_caches(theirs, cache)

    def update(layer, key, value, cache, slots):
        caches = TritonAttentionImpl._pth_key_value_caches(theirs, cache)
        scales = theirs._k_scale_cache, theirs._v_scale_cache
        triton_reshape_and_cache_flash_per_token_head_quant(key, value, *caches, *scales, slots, mode)

    cases.fill_cache(impl, batch, cache)
    cases.fill_cache(SimpleNamespace(do_kv_cache_update=update), batch, their_cache)
    slots = torch.cat([batch.slots(i) for i in range(batch.num_reqs)])
    views, their_views = ([x.flatten(0, 1)[slots].float() for x in door.inline_scales(x)] for x in (cache, their_cache))
    for i in (0, 1):
        torch.testing.assert_close(views[2 + i], their_views[2 + i])
        # They round by the reciprocal of the scale, in int8 halves away from 0.
        step = 1 if mode == KVQuantMode.INT8_PER_TOKEN_HEAD else views[i].abs() / 8
        assert ((views[i] - their_views[i]).abs() <= step).all()
        assert (views[i] != their_views[i]).float().mean() < 0.01
    q, metadata = randn(batch.num_tokens, HEADS, DIM, seed=9), attention_builder(backend, config)
    metadata, outs = metadata.build(0, common_metadata(batch)), []
    for x in (cache, their_cache):
        outs.append(impl.forward(cases.LAYER, q, None, None, x, metadata, torch.full_like(q, torch.nan)))
        theirs._k_scale_cache = None
        fill, torch.Tensor.fill_ = torch.Tensor.fill_, lambda x, _: x  # it fills a new cache's scales with 1
        try:
            k_cache, v_cache = TritonAttentionImpl._pth_key_value_caches(theirs, x)
        finally:
            torch.Tensor.fill_ = fill
        scales = dict(k_scale_cache=theirs._k_scale_cache, v_scale_cache=theirs._v_scale_cache, kv_quant_mode=mode)
        torch.testing.assert_close(outs[-1], unified(batch, q, k_cache, v_cache, **scales), **TOLERANCE)
    torch.testing.assert_close(*outs, atol=0.02, rtol=0.02)


def unified(batch, q, k_cache, v_cache, **options):
    """vLLM's kernel."""
    slopes, window = options.pop("alibi_slopes", None), options.pop("sliding_window", None)
    out = torch.full_like(q[: batch.num_actual_tokens], torch.nan)
    segments = [torch.empty(64, HEADS, 16, *shape) for shape in ((DIM,), (), ())]
    unified_attention(
        q=q[: batch.num_actual_tokens],
        k=k_cache,
        v=v_cache,
        out=out,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.seq_lens,
        max_seqlen_k=batch.max_seq_len,
        softmax_scale=DIM**-0.5,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        block_table=batch.block_table_tensor,
        softcap=options.pop("logits_soft_cap", 0),
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=0,
        num_par_softmax_segments=16,
        softmax_segm_output=segments[0],
        softmax_segm_max=segments[1],
        softmax_segm_expsum=segments[2],
        alibi_slopes=None if slopes is None else torch.tensor(slopes),
        **options,
    )
    return out


def test_facts_of_attention(backends):
    backend = backends["TRITON_ATTN_PLUS"]
    ask = dict(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="fp8", block_size=16, use_mla=False, has_sink=True)
    ask |= dict(use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=True, attn_type=AttentionType.DECODER)
    ask |= dict(has_sliding_window=True, use_non_causal=True, use_batch_invariant=True, use_kv_connector=True)
    ask |= dict(device_capability=SimpleNamespace(major=8, minor=0), use_adaptive_verification=True)
    assert backend.validate_configuration(**ask) == []
    assert backend.validate_configuration(**ask, use_dcp=True) == []
    for name, value, told in (
        ("head_size", 513, "head_size"),
        ("use_mla", True, "MLA"),
        ("kv_cache_dtype", "float16", "kv_cache_dtype"),
        ("kv_cache_dtype", "int4_per_token_head", "kv_cache_dtype"),
        ("device_capability", SimpleNamespace(major=7, minor=5), "compute capability"),
        ("use_mm_prefix", True, "multimodal"),
        ("use_pcp", True, "PCP"),
    ):
        reasons = backend.validate_configuration(**(ask | {name: value}))
        assert [told in reason for reason in reasons] == [True], (name, reasons)


def test_graphs_follow_vllms_tensors(backends, config):
    batch, builder = Batch(MIXED), attention_builder(backends["TRITON_ATTN_PLUS"], config)
    assert builder.get_cudagraph_support(config, None) == AttentionCGSupport.ALWAYS
    assert builder.supports_draft_decode_metadata_update
    metadata = builder.build_for_cudagraph_capture(common_metadata(batch))
    assert metadata.seq_lens is batch.seq_lens
    assert builder.build_for_drafting(common_metadata(batch), 0).block_table is batch.block_table_tensor


@pytest.fixture
def two_ranks(config, monkeypatch):
    """A function that makes the groups of two ranks, of which vLLM's state has one at a time, and the ranks."""
    config.parallel_config.decode_context_parallel_size = 2
    ranks = Ranks(2)

    def on_each(function):
        made = []
        for rank in range(2):
            monkeypatch.setattr(parallel_state, "_DCP", Group(ranks, rank))
            made.append(function(rank))
        return made

    return ranks, on_each


def correct_out(outputs, new_output, lses, vlse, lse_idx, ctx, is_base_e):
    """vLLM's kernel without its launcher, which needs compiled code."""
    strides = *outputs.stride(), *lses.stride()
    kernel = dcp.CorrectAttnCPOutKernel.kernel[(*outputs.shape[:2], 1)]
    kernel(outputs, new_output, lses, vlse, *strides, lse_idx, outputs.shape[-1], len(lses), is_base_e)


@pytest.mark.parametrize(("interleave", "capture"), [(1, False), (4, True)])
def test_ranks_that_share_the_keys_are_as_one(backends, config, monkeypatch, two_ranks, interleave, capture):
    """vLLM's groups are doubles; its exchange and correction run."""
    monkeypatch.setattr(dcp, "_CORRECT_ATTN_CP_OUT_KERNEL", correct_out)
    config.parallel_config.cp_kv_cache_interleave_size = interleave
    backend, (ranks, on_each) = backends["TRITON_ATTN_PLUS"], two_ranks
    impls = on_each(lambda rank: backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, 1))
    builders = on_each(lambda rank: attention_builder(backend, config))
    assert [impl.need_to_return_lse_for_decode for impl in impls] == [True, True]
    assert [impl.dcp_combine for impl in impls] == [dcp.cp_lse_ag_out_rs] * 2
    assert [builder.supports_draft_decode_metadata_update for builder in builders] == [True, True]
    requests = ((1, 2), *MIXED)
    q = randn(Batch(requests).num_tokens, 2 * HEADS, DIM, seed=9)

    def run_rank(group):
        rank = group.rank_in_group
        shard, impl = Shard(requests, rank, 2, interleave), impls[rank]
        cache = cases.new_cache(shard, heads_kv=1)
        cases.fill_cache(impl, shard, cache, heads_kv=1)
        build, common = builders[rank].build_for_cudagraph_capture, common_metadata(shard)
        metadata = build(common) if capture else builders[rank].build(0, common)
        new = (randn(shard.num_tokens, 1, DIM, seed=seed) for seed in (4, 5))
        own = q.chunk(2, dim=1)[rank]
        return impl.forward(cases.LAYER, own, *new, cache, metadata, torch.full_like(own, torch.nan))

    found = torch.cat(ranks.run(run_rank), dim=1)
    batch, one = Batch(requests), door.PagedAttention(HEADS, DIM, DIM**-0.5, 1)
    cache = cases.new_cache(batch, heads_kv=1)
    cases.fill_cache(one, batch, cache, heads_kv=1)
    torch.testing.assert_close(found.double(), cases.expected_attention(batch, q, cache), **TOLERANCE)


def test_ranks_exchange_as_configured(backends, config, two_ranks):
    config.parallel_config.dcp_comm_backend = "a2a"
    make, (_, on_each) = backends["TRITON_ATTN_PLUS"].get_impl_cls(), two_ranks
    for impl in on_each(lambda rank: make(HEADS, DIM, 1.0, 1)):
        assert impl.dcp_combine is dcp.dcp_a2a_lse_reduce


def test_batch_invariance_is_passed_on(backends, config, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    backend = backends["TRITON_ATTN_PLUS"]
    metadata = attention_builder(backend, config).build(0, common_metadata(Batch(MIXED)))
    assert metadata.max_query_len == config.scheduler_config.max_num_batched_tokens
    assert backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, HEADS_KV).batch_invariant is True


def latent_impl(backend, kv_cache_dtype):
    dims = dict(kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, qk_head_dim=NOPE + ROPE)
    options = None, None, kv_cache_dtype, None, "decoder", None
    scale = (NOPE + ROPE) ** -0.5
    return backend.get_impl_cls()(
        HEADS, RANK + ROPE, scale, 1, *options, q_lora_rank=None, v_head_dim=V_DIM, kv_b_proj=cases.Projection(), **dims
    )


class PrefillBackend:
    """vLLM's builder asks for one; its kernels are not called."""

    def clone(self):
        return self

    def get_name(self):
        return "NONE"

    def prepare_metadata(self, metadata):
        pass


def latent_builder(backend, config, monkeypatch, kv_cache_dtype, num_speculative_tokens=0, is_adaptive=False):
    layer = SimpleNamespace(q_lora_rank=None, kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE)
    layer.v_head_dim, layer.num_heads, layer.prefill_backend = V_DIM, HEADS, PrefillBackend()
    model = SimpleNamespace(dtype=torch.float16, max_model_len=64, get_head_size=lambda: 576)
    speculative = None
    if num_speculative_tokens:
        speculative = SimpleNamespace(num_speculative_tokens=num_speculative_tokens, parallel_drafting=False)
        speculative.enable_adaptive_verification = is_adaptive
    whole = SimpleNamespace(
        model_config=model,
        speculative_config=speculative,
        parallel_config=config.parallel_config,
        scheduler_config=config.scheduler_config,
        attention_config=config.attention_config,
        cache_config=SimpleNamespace(block_size=16, cache_dtype=kv_cache_dtype),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
        use_v2_model_runner=True,
    )
    monkeypatch.setattr(mla_attention, "get_num_attention_heads_from_layers", lambda *_: HEADS)
    for module in (mla_attention, torch_utils):
        monkeypatch.setattr(module, "PIN_MEMORY", False)  # vLLM pins by the platform, torch needs a GPU
    # A workspace of two pages, so that contexts come in chunks.
    builder_class = backend.get_builder_cls()
    monkeypatch.setattr(builder_class, "determine_chunked_prefill_workspace_size", staticmethod(lambda _: 32))
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=RANK + ROPE, dtype=torch.float16)
    return builder_class(spec, ["layer"], whole, CPU)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("num_queries", [(1, 1), (3, 3), (3, 1)], ids=["single", "uniform", "ragged"])
def test_mla_decodes_and_prefills(backends, config, monkeypatch, kv_cache_dtype, num_queries):
    """Two decodes, which may draft, then prefills with and without context in chunks."""
    backend = backends["TRITON_ATTN_PLUS_MLA"]
    decodes = Batch([*zip((20, 33), num_queries)])
    batch = Batch([*zip((20, 33), num_queries), (40, 9), (0, 5), (17, 12)])
    impl = latent_impl(backend, kv_cache_dtype)
    builder = latent_builder(backend, config, monkeypatch, kv_cache_dtype, max(num_queries) - 1)
    metadata = builder.build(0, common_metadata(batch))
    assert (metadata.num_decodes, metadata.num_prefills) == (2, 3)
    assert (metadata.decode.query_start_loc is None) == (len({*num_queries}) == 1)
    cache = cases.new_latent_cache(batch, kv_cache_dtype)
    latents, ropes = cases.fill_latent_cache(impl, batch, cache, kv_cache_dtype)
    decoded = metadata.num_decode_tokens

    absorbed = randn(decoded, HEADS, RANK + ROPE, seed=12)
    q_nope, q_pe = absorbed.split([RANK, ROPE], dim=-1)
    out, lse = impl.forward_mqa((q_nope, q_pe), cache, metadata, cases.LAYER)
    assert lse is None
    expected, _ = cases.expected_latent(decodes, q_nope, q_pe, impl.scale, True, kv_cache_dtype)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)

    q = randn(batch.num_tokens, HEADS, NOPE + ROPE, seed=13)
    output = torch.full((batch.num_tokens - decoded, HEADS * V_DIM), torch.nan, dtype=q.dtype)
    ropes = ropes.unsqueeze(1)
    impl.forward_mha(q[decoded:], latents[decoded:], ropes[decoded:], cache, metadata, cases.LAYER._k_scale, output)
    expected = cases.expected_prefill(batch, q, impl.kv_b_proj, impl.scale, kv_cache_dtype)[decoded:]
    torch.testing.assert_close(output.view(-1, HEADS, V_DIM).double(), expected, **TOLERANCE)


def test_mla_prefill_with_context_parallelism_is_vllms(backends, config, monkeypatch):
    impl, calls = latent_impl(backends["TRITON_ATTN_PLUS_MLA"], "auto"), []
    monkeypatch.setattr(mla_attention.MLACommonImpl, "forward_mha", lambda self, *args: calls.append(args))
    impl.dcp_world_size = 2
    impl.forward_mha(1, 2, 3)
    assert calls == [(1, 2, 3)]


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_graphs_of_mla_decodes_as_vllm_replays_them(backends, config, monkeypatch, is_adaptive):
    """With adaptive verification a graph of three queries each is replayed for fewer, whose rows the device knows."""
    builder = latent_builder(backends["TRITON_ATTN_PLUS_MLA"], config, monkeypatch, "auto", 2, is_adaptive)
    batch = Batch(((20, 3), (33, 3)))
    decode = builder.build_for_cudagraph_capture(common_metadata(batch)).decode
    assert decode.max_query_len == 3
    assert decode.query_start_loc is None or is_adaptive
    assert not is_adaptive or decode.query_start_loc.data_ptr() == batch.query_start_loc.data_ptr()


def test_facts_of_mla(backends, config):
    backend = backends["TRITON_ATTN_PLUS_MLA"]
    assert backend.is_mla()
    assert backend.supports_dcp()
    assert not backend.supports_pcp()
    assert backend.supports_device_cpu_query_lens_mismatch()
    assert backend.supports_kv_cache_dtype("fp8_ds_mla")
    assert backend.supports_kv_cache_dtype("fp8")
    assert not backend.supports_kv_cache_dtype("fp8_e5m2")
    assert backend.get_builder_cls().get_cudagraph_support(config, None) == AttentionCGSupport.UNIFORM_BATCH
    sizes = SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=SimpleNamespace(num_speculative_tokens=3, parallel_drafting=False),
        use_v2_model_runner=True,
    )
    assert backend.get_builder_cls().get_varlen_cudagraph_max_query_len(sizes, None) == 4
    sizes.parallel_config.decode_context_parallel_size = 2
    assert backend.get_builder_cls().get_varlen_cudagraph_max_query_len(sizes, None) is None
    impl = latent_impl(backend, "auto")
    assert (impl.can_return_lse_for_decode, impl.lse_base_on_e, impl.supports_quant_query_input) == (True, True, False)
