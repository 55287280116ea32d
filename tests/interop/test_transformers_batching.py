"""Continuous batching of transformers on our kernels: the tokens of its own attention."""

import gc
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.integrations import hub_kernels

from triton_attn import reference
from triton_attn.interop import transformers as interop
from triton_attn.interop.transformers import attention, register_for_generate_batch

initialization = pytest.importorskip("transformers.generation.continuous_batching.initialization")
if tuple(map(int, transformers.__version__.split(".")[:2])) < interop.FIRST_BATCHING:
    pytest.skip("continuous batching needs transformers 5.24", allow_module_level=True)

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3)
SIZES |= dict(eos_token_id=7, bos_token_id=None, pad_token_id=0)
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
CONFIGS = {
    "Llama": dict(SIZES),
    "Gemma2": SIZES | WINDOWS | dict(attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "Mistral": SIZES | dict(sliding_window=6),
    "GptOss": SIZES | WINDOWS | dict(num_local_experts=2, num_experts_per_tok=1),
}
PROMPTS = [list(range(11, 16)), [36], list(range(20, 60))]  # the last one is longer than a batch
NUM_TOKENS = 5


def model_of(kind):
    """A decoder with large weights, so that tokens differ from step to step."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    implementation = "sdpa" if kind in ("Llama", "Mistral") else "eager"  # sdpa has no softcap and no sinks
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def expected_tokens(model):
    """Greedy, of each prompt by itself."""
    options = dict(max_new_tokens=NUM_TOKENS, do_sample=False)
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


def batched_tokens(model, **options):
    batching = dict(page_size=4, num_blocks=64, max_batch_tokens=32, use_cuda_graph=False, **options)
    outputs = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=7),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**batching),
        warmup=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of our attention, call by call."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(interop, "attention", spy)
    return seen


@pytest.fixture
def on_cpu(monkeypatch):
    """Block tables, which transformers uses on GPUs, and the reference, since the interpreter takes too long."""
    monkeypatch.setattr(initialization, "is_torch_xpu_available", lambda *args, **kwargs: True)
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    gc.freeze()  # generate_batch collects garbage twice
    yield
    gc.unfreeze()


@pytest.fixture
def name(calls):
    """Its attention is the spy."""
    return register_for_generate_batch("flash 2 of the tests")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "max_blocks"), [("Llama", None), ("Llama", 0), ("Gemma2", None), ("Mistral", None), ("GptOss", None)]
)
def test_the_tokens_of_transformers(kind, max_blocks, name, calls, monkeypatch):
    """Steps with one token of each request use block tables if no layer has a window. How many there are is not known,
    since requests may join late.
    """
    model = model_of(kind)
    expected = expected_tokens(model)
    if getattr(model, "_compatible_flash_implementations", None):  # transformers falls back to these
        monkeypatch.setattr(type(model), "_compatible_flash_implementations", [name])
    model.set_attn_implementation(name)
    assert batched_tokens(model, max_blocks_per_request=max_blocks) == expected
    assert model.config._attn_implementation == name
    tables = [call["block_table"] for call in calls if call["block_table"] is not None]
    assert bool(tables) == (kind == "Llama" and max_blocks is None)
    assert any(call.get("sliding_window") for call in calls) == (kind != "Llama")
    assert any(call.get("s_aux") is not None for call in calls) == (kind == "GptOss")


@pytest.mark.usefixtures("on_cpu")
def test_generate_under_the_same_name(name, calls):
    model = model_of("Llama")
    expected = expected_tokens(model)
    model.set_attn_implementation(name)
    assert expected_tokens(model) == expected
    assert calls


LAYER = SimpleNamespace()


def decode_step(device, dtype=torch.float32):
    """Arguments of a layer: sequences of 6, 1 and 8 keys and a row of padding over pages of 4. Slots without a key are
    NaN.
    """
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 4, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
    k_cache, v_cache = torch.full((2, 7, 4, 2, 16), float("nan"), device=device, dtype=dtype)
    block_table = torch.tensor([[5, 0, -1], [3, -1, -1], [6, 2, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    for page, length in ((5, 4), (0, 1), (6, 4), (2, 3)):
        k_cache[page, :length], v_cache[page, :length] = torch.randn(2, length, 2, 16, device=device, dtype=dtype)
    cu_seq_lens_k = torch.tensor([0, 6, 7, 15, 15], dtype=torch.int32, device=device)
    pages = dict(block_table=block_table, k_cache=k_cache, v_cache=v_cache, cu_seq_lens_k=cu_seq_lens_k)
    cu_seq_lens_q = torch.arange(5, dtype=torch.int32, device=device)
    return (query, key, value), pages | dict(cu_seq_lens_q=cu_seq_lens_q, max_length_q=1, max_length_k=1)


@pytest.mark.parametrize("options", [{}, dict(sliding_window=3, softcap=2.0, scaling=0.4, sinks=True)])
def test_a_layer_over_block_tables(options, device):
    tensors, pages = decode_step(device)
    sinks = torch.randn(4, device=device) if options.pop("sinks", False) else None
    out, weights = attention(LAYER, *tensors, None, is_causal=True, s_aux=sinks, **pages, **options)
    assert weights is None
    assert out.shape == (1, 4, 4, 16)
    q, new_k, new_v = (x[0].transpose(0, 1) for x in tensors)
    for i, length in enumerate((6, 1, 8)):
        table = pages["block_table"][i, : -(-length // 4)].tolist()
        k, v = (pages[name][table].flatten(0, 1)[:length] for name in ("k_cache", "v_cache"))
        assert torch.equal(k[-1], new_k[i])
        assert torch.equal(v[-1], new_v[i])
        expected = reference.flash_attention(
            q[i][None, None],
            k[None],
            v[None],
            causal=True,
            window_size=(options.get("sliding_window", 0) - 1, 0),
            softcap=options.get("softcap", 0.0),
            softmax_scale=options.get("scaling"),
            sinks=sinks,
        )
        torch.testing.assert_close(out[0, i], expected[0, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(out[0, 3], torch.zeros_like(out[0, 3]))  # padding, which is written nowhere
    assert pages["k_cache"].isfinite().all((2, 3)).sum() == 6 + 1 + 8


def test_block_table_needs_its_cache_and_no_dropout(device):
    tensors, pages = decode_step(device)
    for wrong in (dict(k_cache=None), dict(v_cache=None), dict(cu_seq_lens_k=None), dict(dropout=0.1)):
        with pytest.raises(NotImplementedError, match="block_table: expected k_cache"):
            attention(LAYER, *tensors, None, is_causal=True, **pages | wrong)


@pytest.mark.parametrize(
    "name", ["triton_attn", "flash", "2_flash", "owner/flash_2", "paged|flash_2", "flash_2:kernel"]
)
def test_a_name_that_continuous_batching_refuses(name):
    with pytest.raises(ValueError, match='name: expected "flash" with a 2 or a 3'):
        register_for_generate_batch(name)


def test_an_old_version_is_refused(monkeypatch):
    monkeypatch.setattr(interop, "__version__", "5.23.1")
    with pytest.raises(ImportError, match=r"transformers: expected 5\.24 or later"):
        register_for_generate_batch()


def test_other_names_are_loaded_as_before():
    name = register_for_generate_batch()
    loader = hub_kernels.load_and_register_attn_kernel
    assert register_for_generate_batch() == name
    assert hub_kernels.load_and_register_attn_kernel is loader  # registered once
    assert hub_kernels.load_and_register_attn_kernel(name) is interop.flash_attn
    assert hub_kernels.load_and_register_attn_kernel("no name of a kernel") is None
