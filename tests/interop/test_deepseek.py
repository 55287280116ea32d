"""DeepSeek-V2 and -V3 of transformers over the paged latent cache, compared with their own results."""

import contextlib
import copy

import pytest
import torch
import triton
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from triton_attn import OutOfPages
from triton_attn.interop.deepseek import PagedDeepseek
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
EOS = 7
PAGE_SIZE = 16
NUM_STEPS = 32
KERNEL_STEPS = 12  # enough for the longest prompt to fill a page; the interpreter is slow
LENGTHS = (5, 17, 1, 38)

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=2560,
    initializer_range=0.3,  # large, so that tokens differ from step to step
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    attn_implementation="eager",
)


def yarn(mscale, mscale_all_dim):
    numbers = dict(factor=40.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, rope_theta=10000.0)
    return dict(rope_type="yarn", mscale=mscale, mscale_all_dim=mscale_all_dim, **numbers)


def v2(rope_parameters=None, **options):
    """V2-Lite's form, whose queries have no low rank."""
    rope_parameters = rope_parameters or yarn(0.707, 0.707)
    sizes = SIZES | dict(q_lora_rank=None, rope_parameters=rope_parameters) | options
    return DeepseekV2ForCausalLM, DeepseekV2Config(**sizes)


def v3(rope_parameters=None, **options):
    rope_parameters = rope_parameters or yarn(1.0, 1.0)
    sizes = SIZES | dict(q_lora_rank=24, num_key_value_heads=4, rope_parameters=rope_parameters) | options
    return DeepseekV3ForCausalLM, DeepseekV3Config(**sizes)


MODELS = {
    "V2-Lite": v2(),
    "V2, with unequal mscales": v2(yarn(1.0, 0.707), q_lora_rank=24, topk_method="group_limited_greedy"),
    "V3": v3(),
    "V3, halves rotated": v3(yarn(1.0, 0.707), rope_interleave=False),
    "V3, no YaRN": v3(dict(rope_type="default", rope_theta=10000.0)),
}


def model_of(name, device):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    return model_class(copy.deepcopy(config)).to(device).eval()


def prompts_of(*lengths):
    torch.manual_seed(len(lengths))
    return [torch.randint(8, 97, (length,)).tolist() for length in lengths]


def generated(model, prompt, max_new_tokens):
    """The tokens that transformers generates from one prompt."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def logits_of(model, tokens):
    """Logits after each token, by transformers without a cache."""
    return model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()


def decode(paged, prompts, num_steps):
    """Greedy tokens of each prompt and their logits (num_steps, vocab_size)."""
    seqs = [paged.cache.create(prompt)[0] for prompt in prompts]
    pending, steps = prompts, []
    for _ in range(num_steps):
        steps.append(paged.forward(seqs, pending))
        pending = steps[-1].argmax(-1, keepdim=True).tolist()
    for seq in seqs:
        paged.cache.free(seq)
    logits = torch.stack(steps, dim=1)
    return logits.argmax(-1).tolist(), logits


@pytest.fixture
def reference_on_cpu(device, monkeypatch):
    """The interpreter is too slow for long runs. On a GPU the kernels run."""
    if device == "cpu":
        monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")


def check_greedy_decoding(model, paged, num_steps=NUM_STEPS):
    """Prompts of different lengths in one batch, over a cache filled with NaN: equal tokens, logits within 1e-3.

    Returns the largest difference of a logit.
    """
    prompts = prompts_of(*LENGTHS)
    paged.cache.latent_cache.fill_(torch.nan)
    tokens, logits = decode(paged, prompts, num_steps)
    differences = []
    for prompt, own_tokens, own_logits in zip(prompts, tokens, logits):
        assert own_tokens == generated(model, prompt, num_steps)
        assert len(set(own_tokens)) > num_steps // 4
        expected = logits_of(model, prompt + own_tokens)[len(prompt) - 1 : -1]
        differences.append((own_logits - expected).abs().max().item())
    assert max(differences) < 1e-3
    return max(differences)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["V2-Lite", "V3", "V3, halves rotated"])
def test_the_kernels_decode_token_for_token(name, device, monkeypatch, record_property):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    model = model_of(name, device)
    with guard() if INTERPRETED else contextlib.nullcontext():
        difference = check_greedy_decoding(model, PagedDeepseek(model, 20, PAGE_SIZE), KERNEL_STEPS)
    record_property("figure", f"DeepSeek-{name}, {KERNEL_STEPS} greedy steps: logits differ by {difference:.1e}")


@pytest.mark.ci(but_each=3)
@pytest.mark.usefixtures("reference_on_cpu")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_token_for_token(name, device):
    model = model_of(name, device)
    check_greedy_decoding(model, PagedDeepseek(model, 20, PAGE_SIZE))


@pytest.mark.parametrize("name", MODELS)
def test_the_scale_is_that_of_transformers(name, device):
    model = model_of(name, device)
    scale = PagedDeepseek(model, 1).softmax_scale
    assert scale == pytest.approx(model.model.layers[0].self_attn.scaling, rel=1e-12)
    is_yarn = model.config.rope_parameters["rope_type"] == "yarn"
    assert (scale > 32**-0.5) == is_yarn


def test_what_makes_the_logits_would_be_missed(device, monkeypatch):
    """Without YaRN's factor in the scale or the angles, or with another convention, errors are far above the bound."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    model = model_of("V2, with unequal mscales", device)

    def difference(**changes):
        paged = PagedDeepseek(model, 8, PAGE_SIZE)
        for name, value in changes.items():
            setattr(paged, name, value(getattr(paged, name)))
        prompt = prompts_of(38)[0]
        seq, _ = paged.cache.create(prompt)
        paged.forward([seq], [prompt[:20]])
        return (paged.forward([seq], [prompt[20:]])[0] - logits_of(model, prompt)[-1]).abs().max().item()

    assert difference() < 1e-3
    assert difference(softmax_scale=lambda _: 32**-0.5) > 0.1
    assert difference(rope=lambda rope: rope | {"rope_interleaved": False}) > 0.1
    factor = model.model.rotary_emb.attention_scaling
    assert factor > 1.05
    halves = ("rope_cos", "rope_sin")
    assert difference(rope=lambda rope: rope | {name: rope[name] / factor for name in halves}) > 0.1


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_chunks_of_unequal_lengths_by_the_kernels(name, device, monkeypatch):
    """Later chunks go through decode: several new tokens each, with shorter ones padded."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    model, prompts = model_of(name, device), prompts_of(23, 9, 40)
    paged = PagedDeepseek(model, 12, PAGE_SIZE)
    paged.cache.latent_cache.fill_(torch.nan)
    seqs = [paged.cache.create(prompt)[0] for prompt in prompts]
    bounds = [(0, 11, 12, 23), (0, 2, 5, 9), (0, 30, 37, 40)]
    for chunk in range(3):
        ends = [own[chunk + 1] for own in bounds]
        logits = paged.forward(seqs, [prompt[own[chunk] : end] for prompt, own, end in zip(prompts, bounds, ends)])
        for prompt, end, own_logits in zip(prompts, ends, logits):
            torch.testing.assert_close(own_logits, logits_of(model, prompt[:end])[-1], atol=1e-3, rtol=0)


@pytest.mark.usefixtures("reference_on_cpu")
@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_generate_ends_at_the_end_token_and_gives_pages_back(name, device):
    model = model_of(name, device)
    model.lm_head.weight.data[EOS] *= 3  # likely, so that sequences end at different steps
    model.generation_config.eos_token_id = EOS
    paged, prompts = PagedDeepseek(model, 40, PAGE_SIZE), prompts_of(4, 9, 13, 21, 33, 2, 7, 11)
    outputs = paged.generate(prompts, 24)
    assert outputs == [generated(model, prompt, 24) for prompt in prompts]
    assert any(tokens[-1] == EOS for tokens in outputs)
    assert len(set(map(len, outputs))) > 2
    assert paged.cache.stats().pages_held == 0
    assert paged.generate(prompts, 0) == [[]] * 8
    assert paged.generate([], 5) == []


@pytest.mark.usefixtures("reference_on_cpu")
def test_a_prefix_that_was_computed_before_is_found(device):
    model = model_of("V3", device)
    paged, (prompt, other) = PagedDeepseek(model, 16, PAGE_SIZE), prompts_of(38, 6)
    expected = [generated(model, tokens, 8) for tokens in (prompt, other, prompt + other)]
    assert paged.generate([prompt], 1) == [expected[0][:1]]
    assert paged.generate([prompt, other, prompt + other], 8) == expected  # 32 tokens are cached, of two prompts
    assert paged.cache.stats().tokens_found == 2 * 32
    without = PagedDeepseek(model, 16, PAGE_SIZE, prefix_caching=False)
    assert [without.generate([prompt], 8) for _ in range(2)] == [expected[:1]] * 2
    assert without.cache.stats().tokens_found == 0


@pytest.mark.usefixtures("reference_on_cpu")
def test_forks_and_rejected_drafts(device):
    """Two continuations of a prompt that share its last page, and truncation of tokens."""
    model, (prompt, draft) = model_of("V2-Lite", device), prompts_of(21, 4)
    paged = PagedDeepseek(model, 8, PAGE_SIZE)
    seq, _ = paged.cache.create(prompt)
    paged.forward([seq], [prompt])
    fork = paged.cache.fork(seq)
    for own_logits, tokens in zip(paged.forward([seq, fork], [[11, *draft], [12]]), ([11, *draft], [12])):
        torch.testing.assert_close(own_logits, logits_of(model, prompt + tokens)[-1], atol=1e-3, rtol=0)
    paged.cache.truncate(seq, len(prompt) + 1)
    logits = paged.forward([seq, fork], [[13], [13]])
    for own_logits, tokens in zip(logits, ([11, 13], [12, 13])):
        torch.testing.assert_close(own_logits, logits_of(model, prompt + tokens)[-1], atol=1e-3, rtol=0)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device, monkeypatch):
    """Compared with fp32 weights, our error is at most twice that of transformers in the same dtype."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    torch.manual_seed(0)
    model_class, config = v3(first_k_dense_replace=3)  # a rounding could change a router's choice
    model, prompt = model_class(config).to(device, dtype), prompts_of(24)[0]
    in_fp32 = logits_of(copy.deepcopy(model).float(), prompt)[20:]
    paged = PagedDeepseek(model, 4, PAGE_SIZE)
    assert paged.cache.latent_cache.dtype == dtype
    seq, _ = paged.cache.create(prompt)
    paged.forward([seq], [prompt[:20]])
    logits = torch.cat([paged.forward([seq], [[token]]) for token in prompt[20:]])
    assert (logits - in_fp32).norm() < 2 * (logits_of(model, prompt)[20:] - in_fp32).norm()


def test_an_fp8_cache(device, monkeypatch):
    """Prompts are attended unquantized, so the first logits are exact. Later ones have the error of e4m3."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    torch.manual_seed(0)
    model_class, config = v3(kv_lora_rank=128, num_hidden_layers=1, first_k_dense_replace=1)
    model, prompt = model_class(config).to(device).eval(), prompts_of(20)[0]
    paged = PagedDeepseek(model, 4, PAGE_SIZE, dtype=torch.float8_e4m3fn)
    assert paged.cache.latent_cache.dtype == torch.uint8
    seq, _ = paged.cache.create(prompt)
    expected = logits_of(model, [*prompt, 50])
    torch.testing.assert_close(paged.forward([seq], [prompt])[0], expected[-2], atol=1e-3, rtol=0)
    logits = paged.forward([seq], [[50]])[0]
    error = (logits - expected[-1]).norm() / expected[-1].norm()
    assert 1e-4 < error < 0.05


@pytest.mark.usefixtures("reference_on_cpu")
def test_refused_steps_change_nothing(device):
    model = model_of("V2-Lite", device)
    paged, (prompt, long) = PagedDeepseek(model, 3, PAGE_SIZE), prompts_of(20, 30)
    seq, _ = paged.cache.create(prompt)
    other, _ = paged.cache.create(long)
    for tokens, error, message in (
        ([prompt], ValueError, "new_tokens: expected one list for each of 2 sequences, got 1"),
        ([prompt, []], ValueError, r"new_tokens\[1\]: expected 1 to 48 tokens, for 48 positions, got 0"),
        ([prompt, [9] * 49], ValueError, r"new_tokens\[1\]: expected 1 to 48 tokens, for 48 positions, got 49"),
        ([prompt, long], OutOfPages, "pages"),
    ):
        with pytest.raises(error, match=message):
            paged.forward([seq, other], tokens)
    with pytest.raises(ValueError, match="seqs: expected 1 or more sequences"):
        paged.forward([], [])
    assert len(seq) == len(other) == paged.cache.stats().pages_held == 0
    torch.testing.assert_close(paged.forward([seq], [prompt])[0], logits_of(model, prompt)[-1], atol=1e-3, rtol=0)


@pytest.mark.usefixtures("reference_on_cpu")
def test_generate_gives_pages_back_when_it_fails(device):
    paged = PagedDeepseek(model_of("V2-Lite", device), 3, PAGE_SIZE)
    with pytest.raises(OutOfPages):
        paged.generate(prompts_of(20, 15), 24)
    assert paged.cache.stats().num_sequences == paged.cache.stats().pages_held == 0


def test_other_models_are_refused(device):
    with pytest.raises(TypeError, match="model: expected DeepseekV2ForCausalLM or DeepseekV3ForCausalLM, got Linear"):
        PagedDeepseek(torch.nn.Linear(2, 2), 4)
    model = model_of("V3", device)
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(NotImplementedError, match=r"model: expected rope_type .*, got dynamic"):
        PagedDeepseek(model, 4)
