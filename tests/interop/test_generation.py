"""A transformers model that generates over the paged cache: the same tokens as by itself."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.generate import BeamSearch, Generator, Samples, draw
from triton_attn.cache.kernels import append
from triton_attn.paged.forward import Launches

EOS = 7
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def plain(device):
    """A model with its own attention. Its weights are large, so that tokens differ from step to step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=EOS,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(device).eval()


@pytest.fixture
def reference_on_cpu(device, monkeypatch):
    """The interpreter is too slow for long runs. On a GPU the kernels run."""
    if device == "cpu":
        monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")


def generator_of(plain, num_pages=64):
    return Generator(copy.deepcopy(plain), num_pages, PAGE_SIZE)


def prompts(*lengths):
    torch.manual_seed(len(lengths))
    return [torch.randint(8, 97, (length,)).tolist() for length in lengths]


def run(generator, *later):
    """Run to the end. `later[i]` is added after step i. Returns the stats after each step."""
    history, later = [], list(later)
    while later or generator.waiting or generator.running:
        generator.step()
        history.append(generator.cache.stats())
        if later:
            generator.add(later.pop(0))
    assert history[-1].pages_held == 0
    assert history[-1].pages_free == history[-1].num_pages
    assert history[-1].num_sequences == 0
    return history


def generated(plain, prompt, max_new_tokens, **options):
    """The tokens that transformers generates: lists of new tokens, cut after the end token."""
    ids = torch.tensor([prompt], device=plain.device)
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    rows = out[:, len(prompt) :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def sampled(plain, prompt, max_new_tokens, request, sample):
    """Sample number `sample` of a request, each token from the plain model's logits over the whole text."""
    fresh = Samples(prompt, max_new_tokens, request.width, request.temperature, seed=request.seed)
    tokens = []
    while len(tokens) < max_new_tokens and tokens[-1:] != [EOS]:
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + tokens], device=plain.device)).logits[0, -1].float().cpu()
        tokens.append(draw(logits, request.temperature, fresh.generators[sample]))
    return tokens


@pytest.mark.usefixtures("reference_on_cpu")
def test_greedy_requests_that_join_and_leave(plain):
    lengths, news = (5, 17, 1, 28, 9, 12, 22), (12, 3, 9, 6, 1, 12, 5)
    requests = [Samples(prompt, new) for prompt, new in zip(prompts(*lengths), news)]
    generator = generator_of(plain)
    for request in requests[:3]:
        generator.add(request)
    history = run(generator, *requests[3:])
    assert len({stats.num_sequences for stats in history}) > 2  # sequences joined and left
    for request, new in zip(requests, news):
        assert request.outputs == generated(plain, request.prompt, new)


@pytest.mark.usefixtures("reference_on_cpu")
def test_requests_wait_for_pages_and_share_a_prompt(plain):
    prompt, other = prompts(18, 3)
    requests = [Samples(prompt, 6), Samples(other, 4), Samples(prompt, 6), Samples([*prompt, *other], 6)]
    generator = generator_of(plain, num_pages=8)  # room for one of the long requests, or one of them and the short one
    for request in requests:
        generator.add(request)
    history = run(generator)
    assert max(stats.pages_held for stats in history) <= 8
    assert history[-1].tokens_found == 16 + 16  # whole pages of a sequence that had already ended
    for request in requests:
        assert request.outputs == generated(plain, request.prompt, request.max_new_tokens)
    with pytest.raises(ValueError, match="9 pages"):
        generator.add(Samples(prompt, 18))
    with pytest.raises(ValueError, match="prompt"):
        generator.add(Samples([], 4))


@pytest.mark.usefixtures("reference_on_cpu")
def test_parallel_samples_share_the_prompt(plain):
    """Two prompts, one ending within a page. Its last page is copied when the samples diverge."""
    first, second, greedy = prompts(18, 12, 7)
    requests = [Samples(first, 10, 4, 0.8, seed=1), Samples(second, 8, 4, 1.3, seed=2)]
    generator = generator_of(plain)
    generator.add(requests[0])
    history = run(generator, Samples(greedy, 5), requests[1])
    assert (history[0].pages_held, history[0].pages_shared) == (5, 5)
    assert (history[1].pages_held, history[1].pages_shared) == (4 + 4 + 2, 4)
    for request in requests:
        assert len(set(map(tuple, request.outputs))) == 4
        for sample, tokens in enumerate(request.outputs):
            assert tokens == sampled(plain, request.prompt, request.max_new_tokens, request, sample)


@pytest.mark.usefixtures("reference_on_cpu")
def test_a_sample_does_not_depend_on_the_batch(plain):
    first, second = prompts(11, 6)
    alone, beside = Samples(first, 6, 2, 1.0, seed=3), Samples(first, 6, 2, 1.0, seed=3)
    generator = generator_of(plain)
    generator.add(alone)
    run(generator)
    generator = generator_of(plain)
    generator.add(Samples(second, 6, 3, 1.0, seed=4))
    run(generator, beside)
    assert alone.outputs == beside.outputs


@pytest.mark.usefixtures("reference_on_cpu")
def test_beam_search(plain):
    cases = list(zip(prompts(19, 6, 26, 1), (10, 12, 5, 8)))
    requests = [BeamSearch(prompt, new, 4) for prompt, new in cases]
    generator = generator_of(plain, num_pages=128)
    for request in requests[:2]:
        generator.add(request)
    history = run(generator, *requests[2:])
    assert max(stats.pages_shared for stats in history) >= 5
    for request, (prompt, new) in zip(requests, cases):
        assert request.outputs == generated(plain, prompt, new, num_beams=4, num_return_sequences=4)


@pytest.mark.usefixtures("reference_on_cpu")
def test_branches_that_end_early(plain):
    """A likely end token, so that branches end at different steps, and a search ends once it cannot improve."""
    plain = copy.deepcopy(plain)
    plain.lm_head.weight.data[EOS] *= 3
    generator = generator_of(plain, num_pages=128)
    starts = prompts(4, 9, 13, 21, 16, 2, 7, 11)
    greedy = [Samples(prompt, 12) for prompt in starts[:4]]
    sampling = Samples(starts[0], 12, 4, 2.0, seed=6)
    for request in (*greedy, sampling):
        generator.add(request)
    run(generator)
    for request in greedy:
        assert request.outputs == generated(plain, request.prompt, 12)
    assert len({len(request.outputs[0]) for request in greedy}) > 2
    for sample, tokens in enumerate(sampling.outputs):
        assert tokens == sampled(plain, sampling.prompt, 12, sampling, sample)
    assert len(set(map(len, sampling.outputs))) > 1

    num_steps = []
    for prompt in starts:
        request = BeamSearch(prompt, 12, 4)
        generator.add(request)
        num_steps.append(len(run(generator)))
        assert request.outputs == generated(plain, prompt, 12, num_beams=4, num_return_sequences=4)
    assert min(num_steps) < max(num_steps)


def test_the_kernels_run(plain, monkeypatch):
    """A greedy request, two samples and two beams in one batch, with the kernels of this process."""
    calls = []
    append_kernel, paged_kernel = append.Plan.launch, Launches.launch
    monkeypatch.setattr(append.Plan, "launch", lambda *a: (calls.append("append"), append_kernel(*a)))
    monkeypatch.setattr(Launches, "launch", lambda *a, **b: (calls.append("attend"), paged_kernel(*a, **b)))
    greedy, sampling, searching = prompts(9, 6, 3)
    requests = [Samples(greedy, 4), Samples(sampling, 3, 2, 1.0, seed=5), BeamSearch(searching, 3, 2)]
    generator = generator_of(plain)
    generator.add(requests[0])
    generator.add(requests[1])
    history = run(generator, requests[2])
    num_launches = len(history) * 2  # one per layer
    assert calls.count("append") == calls.count("attend") == num_launches
    assert max(stats.pages_shared for stats in history) > 0
    assert requests[0].outputs == generated(plain, greedy, 4)
    for sample, tokens in enumerate(requests[1].outputs):
        assert tokens == sampled(plain, sampling, 3, requests[1], sample)
    assert requests[2].outputs == generated(plain, searching, 3, num_beams=2, num_return_sequences=2)
