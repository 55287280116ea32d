"""Models of transformers under torch.compile(fullgraph=True): the same results as with their own attention, or a clear
error.
"""

import copy

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import masking_utils

from triton_attn.interop.mask_functions import pattern_of
from triton_attn.interop.transformers import register

register()

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
LLAMA = transformers.LlamaConfig(**SIZES)
MISTRAL = transformers.MistralConfig(**SIZES, sliding_window=5)
GEMMA2 = transformers.Gemma2Config(**SIZES | MIXED, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
GPT_OSS = transformers.GptOssConfig(**SIZES | MIXED, num_local_experts=2, num_experts_per_tok=1)


@pytest.fixture(autouse=True)
def one_graph_each(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def decoder(config, device, implementation):
    """Always the same weights, with a separate config object, since the config stores the implementation."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(device).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(weight, std=0.2)
    model.set_attn_implementation(implementation)
    return model


def padded_prompts(seqlen, device):
    torch.manual_seed(seqlen)
    padding = torch.ones(2, seqlen, dtype=torch.int64, device=device)
    padding[1, :3] = 0
    return torch.randint(1, 64, (2, seqlen), device=device), padding


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.ci(but_each=2)
@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        pytest.param(LLAMA, (9, 13, 17), id="llama"),
        pytest.param(GPT_OSS, (9,), id="gpt-oss: windows and sinks"),
        pytest.param(GEMMA2, (9,), id="gemma2: softcap", marks=pytest.mark.full),
    ],
)
def test_padded_prompts(config, lengths, device):
    """The second length is the last one that is compiled."""
    plain, ours = decoder(config, device, "eager"), compiled(decoder(config, device, "triton_attn"))
    for seqlen in lengths:
        tokens, padding = padded_prompts(seqlen, device)
        expected, got = (model(tokens, padding, use_cache=False).logits[padding.bool()] for model in (plain, ours))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2


def decode_steps(model, cache, is_padded, device):
    """Logits of a prompt and of two single tokens after it."""
    tokens, padding = padded_prompts(12, device)
    padding = padding if is_padded else torch.ones_like(padding)
    logits = []
    for start, end in ((0, 10), (10, 11), (11, 12)):
        out = model(tokens[:, start:end], padding[:, :end] if is_padded else None, past_key_values=cache)
        logits.append(out.logits[padding[:, start:end].bool()])
    return torch.cat(logits)


DYNAMIC = pytest.param("dynamic", False, marks=pytest.mark.full)


@pytest.mark.ci
@torch.no_grad()
@pytest.mark.parametrize(("cache", "is_padded"), [DYNAMIC, ("static", True)])
def test_decode_steps(cache, is_padded, device):
    def cache_of_model():
        if cache == "dynamic":
            return transformers.DynamicCache(config=LLAMA)
        return transformers.StaticCache(config=LLAMA, max_cache_len=16)

    plain, ours = decoder(LLAMA, device, "eager"), compiled(decoder(LLAMA, device, "triton_attn"))
    expected, got = (decode_steps(model, cache_of_model(), is_padded, device) for model in (plain, ours))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.ci(but_each=2)
@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("config", "num_graphs"),
    [
        pytest.param(LLAMA, 1, id="llama"),
        pytest.param(GPT_OSS, 2, id="gpt-oss: one more as the window begins to move", marks=pytest.mark.full),
    ],
)
def test_generate_compiles_its_steps(config, num_graphs, is_padded, device):
    """generate() makes the masks and calls one compiled forward pass per token, as it does by default on a GPU."""
    compile_config = transformers.CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True
    tokens, padding = padded_prompts(7, device)
    padding = padding if is_padded else torch.ones_like(padding)
    options = {"attention_mask": padding, "max_new_tokens": 7, "do_sample": False, "cache_implementation": "static"}
    expected = decoder(config, device, "eager").generate(tokens, **options, disable_compile=True)
    got = decoder(config, device, "triton_attn").generate(tokens, **options, compile_config=compile_config)
    assert got.tolist() == expected.tolist()
    assert counters["stats"]["unique_graphs"] == num_graphs


POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.ci
@pytest.mark.parametrize(
    "padding",
    [
        pytest.param(None, id="mask"),
        pytest.param(torch.ones(2, 9, dtype=torch.int64), id="layers", marks=pytest.mark.full),
    ],
)
def test_a_training_step_over_packed_sequences(padding, device):
    """Positions are passed to the mask, or only to the layers."""
    tokens, _ = padded_prompts(9, device)
    inputs = {"position_ids": POSITIONS.to(device), "use_cache": False, "labels": tokens}
    inputs["attention_mask"] = None if padding is None else padding.to(device)

    def gradients(call, model):
        call(tokens, **inputs).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain, traced = (decoder(LLAMA, device, "triton_attn").train() for _ in range(2))
    expected, got = gradients(plain, plain), gradients(compiled(traced, "aot_eager"), traced)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_between_tokens_under_a_window(device):
    """Errors that depend on values are raised when the graph runs."""
    tokens, padding = padded_prompts(9, device)
    padding[0, 4] = 0
    ours = compiled(decoder(MISTRAL, device, "triton_attn"))
    with pytest.raises(NotImplementedError, match="padding between tokens"):
        ours(tokens, padding, use_cache=False)


@torch.no_grad()
def test_a_model_that_reads_its_mask(device):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="triton_attn").to(device)
    tokens, padding = padded_prompts(9, device)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads its attention mask by itself"):
        compiled(model)(tokens, attention_mask=padding, use_cache=False)


# Patterns of mask functions, called with stand-ins for their indices


def window_function(left, right):
    """In the form of transformers models that see `left` keys to the left and `right` to the right of their own."""

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return ((distance >= 0) & (distance <= left)) | ((distance < 0) & (-distance < right + 1))

    return inner_mask


CAUSAL = masking_utils.causal_mask_function
IDS = torch.tensor([[0, 0, 0, 1, 1]])
SERVED = {
    "causal": (CAUSAL, (float("inf"), 0)),
    "sliding": (masking_utils.sliding_window_causal_mask_function(4), (3, 0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (float("inf"), float("inf"))),
    "bidirectional sliding": (masking_utils.sliding_window_bidirectional_mask_function(3), (3, 3)),
    "one chunk": (masking_utils.chunked_causal_mask_function(5, torch.zeros(1)), (float("inf"), 0)),
    "packed": (masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(IDS)), (float("inf"), 0)),
    "a model's own window": (window_function(3, 2), (3, 2)),
    "nothing to the right": (window_function(3, 0), (3, 0)),
}
REFUSED = {
    "a branch": (lambda b, h, q, k: 1 if q <= k else 0, "a branch"),
    "no mask": (lambda b, h, q, k: True, "type bool"),
    "the first keys": (masking_utils.or_masks(CAUSAL, lambda b, h, q, k: k < 3), "an index compared with int"),
    "a kind of token": (lambda b, h, q, k: IDS[b, k] == 1, "an index compared with int"),
    "tokens of a kind": (lambda b, h, q, k: IDS[b, q] == IDS[b, q], "`==` between values"),
    "blocks": (masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(IDS)), "an index compared with int"),
    "a union": (
        masking_utils.or_masks(CAUSAL, masking_utils.packed_sequence_mask_function(IDS)),
        "`|` of masks that are not windows",
    ),
    "documents": (lambda b, h, q, k: IDS[0][q] == IDS[0][k], "only integers"),
    "a choice": (lambda b, h, q, k: torch.where(q, 1, 0), "invalid types|must be Tensor"),
    "a difference": (lambda b, h, q, k: (q <= k) ^ (k <= q), "unsupported operand"),
    "a gap": (lambda b, h, q, k: (q - k <= -3) | (q - k >= 0), "a window with a gap"),
    "not itself": (lambda b, h, q, k: k < q, "own position"),
    "every second": (lambda b, h, q, k: (q - k) % 2 == 0, "unsupported operand"),
    "each as it is": (lambda b, h, q, k: q - k <= IDS[b, k], "compared with _Index"),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(1)), "chunks of 4 for 5 keys"),
}


def test_what_mask_functions_show():
    def patterns(x):
        return x + 1, [pattern_of(function, 5) for function, _ in SERVED.values()]

    for found in (patterns(torch.zeros(1))[1], compiled(patterns)(torch.zeros(1))[1]):
        for (name, (_, sides)), pattern in zip(SERVED.items(), found):
            assert (pattern.left, pattern.right) == sides, name
            assert (pattern.sequence_ids is None) == (name != "packed")


@pytest.mark.parametrize(("mask_function", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_mask_functions_that_are_refused(mask_function, message):
    with pytest.raises(NotImplementedError, match=message):
        pattern_of(mask_function, 5)


def test_positions_without_their_sequences_are_refused():
    """On transformers that remap positions, tokens of another sequence would seem near."""
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        pytest.skip("positions are not remapped here")
    remapped = masking_utils.remap_positions_for_packed_sequence(CAUSAL, POSITIONS)
    with pytest.raises(NotImplementedError, match="without sequences"):
        pattern_of(remapped, 9)
