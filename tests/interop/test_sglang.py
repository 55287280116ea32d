"""SGLang's attention back end on our kernels, against a double of SGLang 0.5.23: tests/helpers/sglang_double.py.

It shows that the back end keeps to the interface as that double has it. It does not show that SGLang runs on it.
"""

import re
import sys
from pathlib import Path

import pytest
import sglang_double
import torch
from sglang_double import AttentionType, HybridPool, Layer, Mode, Pool, Server

from triton_attn import reference
from triton_attn.interop import sglang as interop

ROOT = Path(__file__).parents[2]
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 16
# Prompts; a prompt beside chunks of two requests; decode, also of a request that has just come.
STEPS = [
    (Mode.EXTEND, (1, 4), (5, 1)),
    (Mode.MIXED, (4, 2, 1), (7, 3, 1)),
    (Mode.DECODE, (2, 1, 4), (1, 1, 1)),
    (Mode.DECODE, (4, 2), (1, 1)),
]


@pytest.fixture(autouse=True)
def sglang(monkeypatch):
    found = sglang_double.modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    interop._backend_class.cache_clear()
    yield found
    interop._backend_class.cache_clear()


@pytest.fixture
def reference_on_cpu(device, monkeypatch):
    """The interpreter takes too long for every case. On a GPU the kernels run."""
    if device == "cpu":
        monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")


class Model:
    """Layers on a back end, and the keys and values that each request has had: {(layer, request): [(k, v), ...]}."""

    def __init__(self, server, layers, sinks=None):
        torch.manual_seed(1)
        self.server, self.layers, self.sinks = server, layers, sinks
        self.backend = interop.create_backend(server.runner)
        self.past = {}

    def step(self, mode, requests, news, padding=0, dtype=torch.float32):
        """One forward pass. Returns [(actual, expected) of each layer]."""
        batch = self.server.batch(mode, requests, news)
        self.backend.init_forward_metadata(batch)
        return [self.attend(layer, batch, requests, news, padding, dtype) for layer in self.layers]

    def attend(self, layer, batch, requests, news, padding=0, dtype=torch.float32):
        sizes = (layer.tp_q_head_num, layer.qk_head_dim), (layer.tp_k_head_num, layer.qk_head_dim)
        sizes += ((layer.tp_v_head_num, layer.v_head_dim),)
        total, device = sum(news), self.server.device
        q, k, v = (torch.randn(total, *size, device=device, dtype=dtype) for size in sizes)
        options = {} if self.sinks is None else {"sinks": self.sinks}
        padded = torch.cat((q, q.new_full((padding, *q.shape[1:]), float("nan")))).flatten(1)
        out = self.backend.forward(padded, k.clone(), v.clone(), layer, batch, **options)
        assert out.shape == (total + padding, layer.tp_q_head_num * layer.v_head_dim)
        assert torch.equal(out[total:], torch.zeros_like(out[total:]))
        expected = [
            self.expected(layer, request, *rows)
            for request, *rows in zip(requests, q.split(list(news)), k.split(list(news)), v.split(list(news)))
        ]
        return out[:total].view(total, layer.tp_q_head_num, layer.v_head_dim), torch.cat(expected)

    def expected(self, layer, request, q, k, v):
        past = self.past.setdefault((layer.layer_id, request), [])
        past.append((k, v))
        k, v = (torch.cat(part) for part in zip(*past))
        is_causal, side = layer.attn_type is AttentionType.DECODER, layer.sliding_window_size
        return reference.flash_attention(
            q[None],
            k[None],
            v[None],
            causal=is_causal,
            softmax_scale=layer.scaling,
            window_size=(side, 0 if is_causal else side),
            softcap=layer.logit_cap,
            sinks=self.sinks,
        )[0]


def check(results, tolerance=1e-5):
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def server_of(layer, page_size, device, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Server(Pool(128, page_size, layer, dtype, device, **options), page_size, device)


@pytest.mark.usefixtures("reference_on_cpu")
@pytest.mark.parametrize(("page_size", "by_heads"), [(1, False), (4, False), (4, True), (16, True)])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        dict(sliding_window_size=3, logit_cap=2.0, scaling=0.4),
        dict(v_head_dim=24),
        dict(attn_type=AttentionType.ENCODER_ONLY),
    ],
)
def test_prompts_chunks_and_decode(attributes, page_size, by_heads, device):
    layer = Layer(HEADS, HEADS_KV, HEAD_DIM, **attributes)
    model = Model(server_of(layer, page_size, device, by_heads=by_heads), [layer])
    for mode, requests, news in STEPS:
        check(model.step(mode, requests, news, padding=2 * (not mode.is_decode())))


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_kernels_with_sinks(page_size, device):
    layer = Layer(HEADS, HEADS_KV, HEAD_DIM, sliding_window_size=4)
    model = Model(server_of(layer, page_size, device), [layer], sinks=torch.randn(HEADS, device=device))
    for mode, requests, news in STEPS[1:3]:
        check(model.step(mode, requests, news))


@pytest.mark.usefixtures("reference_on_cpu")
@pytest.mark.parametrize("page_size", [1, 4])
def test_window_layers_with_slots_of_their_own(page_size, device):
    layers = [Layer(HEADS, HEADS_KV, HEAD_DIM), Layer(HEADS, HEADS_KV, HEAD_DIM, layer_id=1, sliding_window_size=3)]
    torch.manual_seed(0)
    pool = HybridPool(128, page_size, layers[0], torch.float32, device)
    model = Model(Server(pool, page_size, device), layers)
    for mode, requests, news in STEPS:
        check(model.step(mode, requests, news))


@pytest.mark.usefixtures("reference_on_cpu")
def test_fp8_pool_with_scales(device):
    scales = dict(k_scale_float=0.5, v_scale_float=0.25)
    tensors = {name.removesuffix("_float"): torch.tensor(scale, device=device) for name, scale in scales.items()}
    layer = Layer(HEADS, HEADS_KV, HEAD_DIM, **scales, **tensors)
    server = server_of(layer, 4, device, torch.float8_e4m3fn)
    model = Model(server, [layer])
    for mode, requests, news in STEPS:
        check(model.step(mode, requests, news), tolerance=0.15)
    plain = Layer(HEADS, HEADS_KV, HEAD_DIM)
    (actual, expected), *_ = Model(server_of(plain, 4, device), [layer]).step(*STEPS[0])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)  # scales belong to fp8 pools only


@pytest.mark.usefixtures("reference_on_cpu")
@pytest.mark.parametrize("hybrid", [False, True])
def test_replays_of_a_captured_decode_step(hybrid, device):
    """What a graph would read stays in place: replays write other requests into it, and padding has one key."""
    layers = [Layer(HEADS, HEADS_KV, HEAD_DIM), Layer(HEADS, HEADS_KV, HEAD_DIM, layer_id=1, sliding_window_size=3)]
    torch.manual_seed(0)
    pool = (
        HybridPool(128, 4, layers[0], torch.float32, device)
        if hybrid
        else Pool(128, 4, layers[0], torch.float32, device)
    )
    layers = layers[: 1 + hybrid]
    model = Model(Server(pool, 4, device), layers)
    backend = model.backend
    backend.init_cuda_graph_state(4, 4)
    model.step(*STEPS[0])
    model.step(*STEPS[1])
    captured = model.server.batch(Mode.DECODE, [], [])
    captured.batch_size, fill = 3, backend.get_cuda_graph_seq_len_fill_value()
    captured.req_pool_indices, captured.out_cache_loc = torch.zeros(2, 3, dtype=torch.int64, device=device)
    captured.seq_lens = torch.full_like(captured.req_pool_indices, fill)
    backend.init_forward_metadata_out_graph(captured, in_capture=True)
    places = [x.data_ptr() for x in vars(backend.forward_metadata).values() if isinstance(x, torch.Tensor)]
    assert len(places) == (4 if hybrid else 2)

    for requests in ((2, 1, 4), (4, 2)):
        batch = model.server.batch(Mode.DECODE, requests, [1] * len(requests))
        padding = 3 - len(requests)
        padded = {name: [0] * padding for name in ("req_pool_indices", "out_cache_loc")} | {
            "seq_lens": [fill] * padding
        }
        real = {name: getattr(batch, name) for name in padded}
        for name, values in padded.items():
            setattr(batch, name, torch.cat((real[name], real[name].new_tensor(values))))
        batch.batch_size = 3
        backend.init_forward_metadata_out_graph(batch)
        metadata = backend.forward_metadata
        assert [x.data_ptr() for x in vars(metadata).values() if isinstance(x, torch.Tensor)] == places
        for layer in layers:
            q, k, v = (torch.randn(3, n, HEAD_DIM, device=device) for n in (HEADS, HEADS_KV, HEADS_KV))
            out = backend.forward(q.flatten(1), k, v, layer, batch).view(3, HEADS, HEAD_DIM)
            for i, request in enumerate(requests):
                rows = (x[i : i + 1] for x in (q, k, v))
                check([(out[i : i + 1], model.expected(layer, request, *rows))])


def test_shared_layers_write_nothing_and_an_idle_batch_needs_nothing(device, reference_on_cpu):
    layer = Layer(HEADS, HEADS_KV, HEAD_DIM)
    model = Model(server_of(layer, 4, device), [layer])
    batch = model.server.batch(Mode.EXTEND, (1,), (3,))
    model.backend.init_forward_metadata(batch)
    model.attend(layer, batch, (1,), (3,))
    before = model.server.runner.token_to_kv_pool.k_buffer.clone()
    q, other = torch.randn(3, HEADS * HEAD_DIM, device=device), torch.randn(3, HEADS_KV, HEAD_DIM, device=device)
    shared = model.backend.forward(q, None, None, layer, batch)
    assert torch.equal(model.backend.forward(q, other, other, layer, batch, save_kv_cache=False), shared)
    after = model.server.runner.token_to_kv_pool.k_buffer
    assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))
    idle = model.server.batch(Mode.IDLE, (), ())
    model.backend.init_forward_metadata(idle)
    assert model.backend.forward(q[:0], None, None, layer, idle).shape == (0, HEADS * HEAD_DIM)


def test_register_adds_the_name_once(sglang):
    interop.register()
    interop.register()
    assert sglang["sglang.srt.arg_groups.choices"].ATTENTION_BACKEND_CHOICES.count("triton_attn") == 1
    backends = sglang["sglang.srt.layers.attention.attention_registry"].ATTENTION_BACKENDS
    assert backends == {"triton_attn": interop.create_backend}


def test_the_entry_point_is_register():
    source = (ROOT / "pyproject.toml").read_text()
    assert re.search(
        r'^\[project\.entry-points\."sglang\.srt\.plugins"\]\ntriton_attn = "triton_attn\.interop\.sglang:register"$',
        source,
        flags=re.MULTILINE,
    )


def test_it_is_a_back_end_of_sglang(device):
    backend = interop.create_backend(server_of(Layer(HEADS, HEADS_KV, HEAD_DIM), 4, device).runner)
    assert isinstance(backend, sglang_double.AttentionBackend)
    assert backend.needs_cpu_seq_lens is False
    assert backend.support_triton()


def test_a_runner_that_is_not_supported(device, monkeypatch):
    runner = server_of(Layer(HEADS, HEADS_KV, HEAD_DIM), 4, device).runner
    for place, name, case in (
        (runner, "use_mla_backend", "an MLA model"),
        (runner.kv_index_translator, "is_translating", "a unified pool"),
        (runner.token_to_kv_pool, "is_quantized_kv_cache", "a quantized pool"),
        (sglang_double.PARALLEL, "dcp_enabled", "decode context parallelism"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, True, raising=False)
            with pytest.raises(NotImplementedError, match=f"runner: .* got {case}"):
                interop.create_backend(runner)


@pytest.mark.parametrize(
    ("name", "attributes", "options"),
    [
        ("is_cross_attention", dict(is_cross_attention=True), {}),
        ("attn_type", dict(attn_type=AttentionType.DECODER_BIDIRECTIONAL), {}),
        ("logit_capping_method", dict(logit_cap=3.0, logit_capping_method="sigmoid"), {}),
        ("xai_temperature_len", dict(xai_temperature_len=512), {}),
        ("return_lse", {}, dict(return_lse=True)),
        ("score_mod", {}, dict(score_mod=torch.add)),
        ("k_rope", {}, dict(k_rope=torch.zeros(1))),
        ("key_buffer", dict(tp_k_head_num=1), {}),
    ],
)
def test_a_layer_that_is_not_supported(name, attributes, options, device):
    layer = Layer(HEADS, HEADS_KV, HEAD_DIM)
    server = server_of(layer, 4, device)
    backend = interop.create_backend(server.runner)
    batch = server.batch(Mode.DECODE, (1,), (1,))
    backend.init_forward_metadata(batch)
    vars(layer).update(attributes)
    q = torch.zeros(1, HEADS * HEAD_DIM, device=device)
    with pytest.raises(NotImplementedError, match=f"^{name}"):
        backend.forward(q, None, None, layer, batch, **options)


@pytest.mark.parametrize("mode", [Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2, Mode.DLLM_EXTEND])
def test_a_forward_mode_that_is_not_supported(mode, device):
    server = server_of(Layer(HEADS, HEADS_KV, HEAD_DIM), 4, device)
    backend = interop.create_backend(server.runner)
    backend.init_cuda_graph_state(2, 2)
    for start in (backend.init_forward_metadata, backend.init_forward_metadata_out_graph):
        with pytest.raises(NotImplementedError, match=f"forward_mode: .* got {mode.name}"):
            start(server.batch(mode, (1,), (2,)))
    with pytest.raises(NotImplementedError, match=r"forward_mode: .* got EXTEND in a CUDA graph"):
        backend.init_forward_metadata_out_graph(server.batch(Mode.EXTEND, (1,), (2,)))
