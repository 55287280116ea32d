"""Continuous batching over a paged KV cache: a Llama of transformers generates with triton_attn's attention.

    python examples/generate.py --requests 12 --samples 4 --beams 4

Requests of different lengths join and leave the batch at any step. A step computes the prompts of new requests and one
token for each running continuation, in one call of the model and one `paged_attention` per layer. Parallel samples and
beams share the pages of their common tokens (`fork`). A page is copied when the first of them writes to it. Weights are
random, so the text means nothing. The example shows which sequence holds which page.

On the CPU the torch reference runs; with TRITON_INTERPRET=1 the kernels run in Triton's interpreter.
"""

import argparse
import itertools
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from triton_attn import PagedKVCache, append_kv_cache, paged_attention


class Step(NamedTuple):
    """The batch as the layers need it: sequences whose last tokens are computed, concatenated."""

    cache: PagedKVCache
    slots: torch.Tensor  # slots of the tokens for their keys and values
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int


def paged_layer(module, query, key, value, attention_mask, scaling=None, sliding_window=None, step=None, **kwargs):
    """Attention of one layer, called by transformers: query (1, num_heads_q, num_tokens, head_dim), already rotated."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k_cache, v_cache = step.cache.k_cache[module.layer_idx], step.cache.v_cache[module.layer_idx]
    append_kv_cache(k, v, k_cache, v_cache, step.slots)
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        step.cache_seqlens,
        step.block_table,
        cu_seqlens_q=step.cu_seqlens_q,
        max_seqlen_q=step.max_seqlen_q,
        softmax_scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, -1),
    )
    return out[None], None


AttentionInterface.register("triton_attn_paged", paged_layer)


@dataclass(eq=False)
class Branch:
    """One continuation of a prompt: its new tokens, those that are not yet computed, and its sequence in the cache."""

    tokens: list = field(default_factory=list)
    pending: list = field(default_factory=list)
    seq: Any = None  # in the cache
    sample: int = 0  # index of the sample
    score: float = 0.0  # of a beam: log probability of its tokens

    def child(self, token, **fields):
        return Branch([*self.tokens, token], [token], **fields)


class Request:
    """A prompt with its running branches and its finished token lists (`outputs`, the best first)."""

    def __init__(self, prompt, max_new_tokens, width):
        self.prompt, self.max_new_tokens, self.width = list(prompt), max_new_tokens, width
        self.branches = []
        self.outputs = []

    def choose(self, logits, eos):
        """Pairs (parent, child) of the branches that continue, given logits (len(branches), vocab_size) of the next
        token.

        A branch may have several children or none. Finished branches go to `outputs`.
        """
        raise NotImplementedError

    def ends(self, branch, eos):
        return branch.tokens[-1] in eos or len(branch.tokens) == self.max_new_tokens


def draw(logits, temperature, generator):
    """A token drawn from softmax(logits / temperature), logits (vocab_size,). At temperature 0 the most likely one."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


class Samples(Request):
    """`n` independent continuations. Sample i has its own generator, seeded with (seed, i), so it does not depend on
    the rest of the batch.
    """

    def __init__(self, prompt, max_new_tokens, n=1, temperature=0.0, seed=0):
        super().__init__(prompt, max_new_tokens, n)
        self.temperature, self.seed = temperature, seed
        self.generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(n)]
        self.outputs = [None] * n

    def choose(self, logits, eos):
        parents = list(zip(self.branches, logits))
        if not self.branches[0].tokens:  # all samples begin after the prompt
            parents *= self.width
            samples = range(self.width)
        else:
            samples = [branch.sample for branch in self.branches]
        pairs = []
        for (parent, row), sample in zip(parents, samples):
            child = parent.child(draw(row, self.temperature, self.generators[sample]), sample=sample)
            if self.ends(child, eos):
                self.outputs[sample] = child.tokens
            else:
                pairs.append((parent, child))
        return pairs


class BeamSearch(Request):
    """The continuations with the highest log probability per token that beam search with `width` beams finds, best
    first.
    """

    def __init__(self, prompt, max_new_tokens, width):
        super().__init__(prompt, max_new_tokens, width)
        self.done = []  # (score per token, tokens), best first

    def choose(self, logits, eos):
        scores = torch.tensor([branch.score for branch in self.branches])[:, None] + logits.log_softmax(-1)
        vocab_size = logits.shape[-1]
        # Enough candidates for `width` beams to remain if every beam ends.
        best = scores.flatten().topk(min(max(2, 1 + len(eos)) * self.width, scores.numel()))
        pairs = []
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent = self.branches[index // vocab_size]
            child = parent.child(index % vocab_size, score=score)
            if not self.ends(child, eos):
                pairs.append((parent, child))
            elif rank < self.width:
                self.done.append((score / len(child.tokens), child.tokens))
        self.done = sorted(self.done, key=lambda done: done[0], reverse=True)[: self.width]
        pairs = pairs[: self.width]
        if pairs and len(self.done) == self.width:
            child = pairs[0][1]
            if child.score / len(child.tokens) <= self.done[-1][0]:
                pairs = []  # no running beam can become better than the finished ones
        if not pairs:
            self.outputs = [tokens for _, tokens in self.done]
        return pairs


class Generator:
    """A causal language model of transformers that processes many requests at once.

    Args:
        model: LlamaForCausalLM, or another decoder with plain attention (no softcap, no sinks). Its attention
            implementation is set to the one of this module.
        num_pages, page_size: of the cache.
    """

    def __init__(self, model, num_pages, page_size=16):
        model.set_attn_implementation("triton_attn_paged")
        self.model, config = model.eval(), model.config
        eos = model.generation_config.eos_token_id
        self.eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        self.cache = PagedKVCache(
            num_pages,
            page_size,
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
        )
        self.waiting, self.running = deque(), []

    def add(self, request):
        """Add a request. It joins the batch as soon as there is room for its longest possible continuation.

        Raises: ValueError, if it can never fit.
        """
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError("request: expected a prompt and at least one new token")
        if self._pages(request) > self.cache.pool.num_pages:
            raise ValueError(f"request: needs {self._pages(request)} pages, there are {self.cache.pool.num_pages}")
        self.waiting.append(request)

    @torch.no_grad()
    def step(self):
        """Generate one token for every running branch. Returns (finished requests, tokens computed)."""
        self._join()
        if not self.running:
            return [], 0
        branches = [branch for request in self.running for branch in request.branches]
        logits = self._forward([branch.seq for branch in branches], [branch.pending for branch in branches])
        num_tokens = sum(len(branch.pending) for branch in branches)
        for request, rows in zip(self.running, logits.split([len(request.branches) for request in self.running])):
            self._replace(request, request.choose(rows, self.eos))
        done = [request for request in self.running if not request.branches]
        self.running = [request for request in self.running if request.branches]
        return done, num_tokens

    def _pages(self, request):
        return request.width * -(-(len(request.prompt) + request.max_new_tokens) // self.cache.page_size)

    def _join(self):
        reserved = sum(map(self._pages, self.running))
        while self.waiting and reserved + self._pages(self.waiting[0]) <= self.cache.pool.num_pages:
            request = self.waiting.popleft()
            reserved += self._pages(request)
            seq, cached = self.cache.create(request.prompt)
            request.branches = [Branch(pending=request.prompt[cached:], seq=seq)]
            self.running.append(request)

    def _forward(self, seqs, new_tokens):
        """Logits (len(seqs), vocab_size) of the token after the new ones, in fp32 on the host."""
        cache, device = self.cache, self.model.device
        positions = [len(seq) + i for seq, tokens in zip(seqs, new_tokens) for i in range(len(tokens))]
        slots = cache.extend(seqs, new_tokens)
        bounds = torch.tensor([0, *itertools.accumulate(map(len, new_tokens))], dtype=torch.int32, device=device)
        step = Step(cache, slots, cache.cache_seqlens(seqs), cache.block_table(seqs), bounds, max(map(len, new_tokens)))
        tokens = torch.tensor([list(itertools.chain(*new_tokens))], device=device)
        positions = torch.tensor([positions], device=device)
        hidden = self.model.model(tokens, position_ids=positions, use_cache=False, step=step).last_hidden_state
        cache.commit(seqs)
        return self.model.lm_head(hidden[0, bounds[1:].long() - 1]).float().cpu()

    def _replace(self, request, pairs):
        """Let children continue from their parents: one child takes the parent's place, the others share its pages."""
        for parent in request.branches:
            children = [child for its_parent, child in pairs if its_parent is parent]
            for child in children[1:]:
                child.seq = self.cache.fork(parent.seq)
            if children:
                children[0].seq = parent.seq
            else:
                self.cache.free(parent.seq)
        request.branches = [child for _, child in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--requests", type=int, default=12, help="number; a third each of greedy, parallel samples, beam search"
    )
    parser.add_argument("--samples", type=int, default=4, help="samples per sampling request")
    parser.add_argument("--beams", type=int, default=4, help="beams per beam search")
    parser.add_argument("--prompt-tokens", type=int, default=60, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="most new tokens of a continuation")
    parser.add_argument("--num-pages", type=int, default=64, help="pages of the cache; with few of them requests wait")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    numbers = random.Random(args.seed)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(args.device, torch.float32 if args.device == "cpu" else torch.float16)
    generator = Generator(model, args.num_pages, args.page_size)
    for i in range(args.requests):
        prompt = [numbers.randrange(config.vocab_size) for _ in range(numbers.randint(1, args.prompt_tokens))]
        new_tokens = numbers.randint(1, args.new_tokens)
        if i % 3 == 2:
            generator.add(BeamSearch(prompt, new_tokens, args.beams))
        else:
            n, temperature = (args.samples, 1.0) if i % 3 else (1, 0.0)
            generator.add(Samples(prompt, new_tokens, n, temperature, seed=args.seed + i))

    history = []
    start = time.perf_counter()
    with tqdm(total=args.requests, unit="request") as bar:
        while generator.waiting or generator.running:
            done, num_tokens = generator.step()
            stats = generator.cache.stats()
            history.append((num_tokens, stats.pages_held, stats.pages_shared))
            bar.set_postfix(tokens=num_tokens, pages_held=stats.pages_held, pages_shared=stats.pages_shared)
            bar.update(len(done))
    seconds = time.perf_counter() - start
    tokens, held, shared = zip(*history)
    print(
        f"{len(history)} steps, {sum(tokens) / len(tokens):.1f} tokens per step, {sum(tokens) / seconds:.0f} per second"
    )
    print(
        f"pages of {args.num_pages}: at most {max(held)} held and {max(shared)} shared, {stats.pages_held} at the end"
    )


if __name__ == "__main__":
    main()
