"""Memory saved by pages and their sharing, compared with the PagedAttention paper (Kwon et al., arXiv 2309.06180).

    python examples/sharing.py --requests 256

A seeded simulation with real cache objects. A fixed number of requests runs, each step adds a token to every sequence,
and when a request ends the next one starts. Figures are averages over the steps after warm-up.

Lengths are log-normal, drawn separately for prompt and output, and cut at 2048 tokens together. The means of ShareGPT
(161 and 338) and Alpaca (19 and 58) are from the paper's figure 11. The means for translation (30 and 30, one sentence
each) and all spreads (sigma of the logarithm: 1.0, 0.7, 0.5) are our assumptions. Output tokens never coincide with
those of other outputs.

Beam search takes the best `width` of all beams' continuations. The next-token distribution of a beam at a step is
geometric, p(k) = u (1 - u)^k, with u uniform in (0, 1) and drawn separately for each beam and step. This choice decides
how long beams keep a common history, and so how much they share.

Three tables: (1) pages saved by sharing, relative to the pages without sharing. (2) GiB held by OPT-13B (the paper's
model) against the number of running requests with a common system prompt, for contiguous reservation (of 2048 tokens,
or of the output's next power of two), pages, and shared pages. External fragmentation of reservations is not counted.
(3) Slots of held pages without a token, against page size.
"""

import argparse
import itertools
import math
import random
import statistics
from dataclasses import dataclass

import torch

from triton_attn import PagedKVCache, kv_cache_bytes_per_token

MAX_LENGTH = 2048
VOCABULARY = 50_000
BYTES_PER_TOKEN = kv_cache_bytes_per_token(num_layers=40, num_kv_heads=40, head_dim=128, dtype=torch.float16)  # OPT-13B
WIDTHS = (2, 4, 6)
PAGE_SIZES = (1, 8, 16, 32, 64, 128)
RUNNING = (1, 2, 4, 8, 16, 32, 64, 128)
PAGE_SIZE = 16
SYSTEM_PROMPT = 341  # tokens of the paper's prefix with five examples
METHODS = ("sampling", "beam search")


@dataclass(frozen=True)
class Workload:
    """`paper` has the paper's savings in percent by (method, width)."""

    name: str
    mean_prompt: float
    mean_output: float
    sigma: float
    paper: dict

    def draw(self, rng):
        """(prompt length, output length)."""
        prompt, output = (_lognormal(rng, mean, self.sigma) for mean in (self.mean_prompt, self.mean_output))
        prompt = min(prompt, MAX_LENGTH - 1)
        return prompt, min(output, MAX_LENGTH - prompt)


SHAREGPT = Workload(
    "ShareGPT-like",
    161.31,
    337.99,
    1.0,
    # Section 6.3 gives the ends of the ranges.
    {("sampling", 2): 16.2, ("sampling", 6): 30.5, ("beam search", 2): 44.3, ("beam search", 6): 66.3},
)
ALPACA = Workload(
    "Alpaca-like",
    19.31,
    58.45,
    0.7,
    {
        ("sampling", 2): 6.09,
        ("sampling", 4): 8.53,
        ("sampling", 6): 9.79,
        ("beam search", 2): 37.56,
        ("beam search", 4): 53.13,
        ("beam search", 6): 55.16,
    },  # figure 15
)
TRANSLATION = Workload("translation-like", 30, 30, 0.5, {})
WORKLOADS = (ALPACA, SHAREGPT, TRANSLATION)


@dataclass(frozen=True)
class Usage:
    """Averages over steps, for all sequences together.

    `pages_unshared` is the number of pages if no sequence shared one. `reserved_max` and `reserved_pow2` are
    contiguously reserved tokens.
    """

    tokens: float
    slots_used: float
    pages_held: float
    pages_unshared: float
    reserved_max: float
    reserved_pow2: float

    @property
    def saving(self):
        return 100 * (1 - self.pages_held / self.pages_unshared)


class Request:
    """A prompt, and `width` sequences that continue it."""

    def __init__(self, cache, lengths, method, width, system_prompt, rng):
        self.cache = cache
        self.method = method
        self.rng = rng
        prompt_length, self.output_length = lengths
        self.prompt_length = min(system_prompt + prompt_length, MAX_LENGTH - self.output_length)
        own = self.prompt_length - system_prompt
        prompt = [*range(system_prompt), *(rng.randrange(VOCABULARY) for _ in range(own))]
        seq, cached = cache.create(prompt)
        cache.extend([seq], [prompt[cached:]])
        cache.commit([seq])
        self.seqs = [seq, *(cache.fork(seq) for _ in range(width - 1))]
        self.scores = None

    def choose(self):
        """Before each new token, beam search replaces the sequences by the parents of the best continuations."""
        if self.method != "beam search":
            return
        width = len(self.seqs)
        scores = [0.0] if self.scores is None else self.scores
        continuations = []
        for beam, score in enumerate(scores):
            u = self.rng.uniform(1e-9, 1 - 1e-9)
            continuations += [(score + math.log(u) + k * math.log1p(-u), beam) for k in range(width)]
        best = sorted(continuations, reverse=True)[:width]
        self.scores = [score for score, _ in best]
        seqs, kept = [], set()
        for _, beam in best:
            seqs.append(self.cache.fork(self.seqs[beam]) if beam in kept else self.seqs[beam])
            kept.add(beam)
        for beam, seq in enumerate(self.seqs):
            if beam not in kept:
                self.cache.free(seq)
        self.seqs = seqs

    def is_done(self):
        return len(self.seqs[0]) == self.prompt_length + self.output_length

    def end(self):
        for seq in self.seqs:
            self.cache.free(seq)


def simulate(
    workload, *, method="sampling", width=1, running=16, requests=256, system_prompt=0, page_size=PAGE_SIZE, seed=0
):
    """`Usage` of `running` concurrent requests until `requests` of them have ended, after a warm-up of `running`
    requests.
    """
    # A separate generator for lengths gives the same requests for every method.
    lengths, rng = random.Random(seed), random.Random(seed + 1)
    # An upper bound: every sequence at its longest, and one copy in flight for each.
    num_pages = running * width * (MAX_LENGTH // page_size + 2)
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1}
    cache = PagedKVCache(num_pages, page_size, **shape, dtype=torch.float16, device="cpu")
    active, ended, steps = [], 0, []
    while ended < running + requests:
        while len(active) < running:
            active.append(Request(cache, workload.draw(lengths), method, width, system_prompt, rng))
        for request in active:
            request.choose()
        cache.extend([seq for request in active for seq in request.seqs], 1)
        if ended >= running:
            steps.append(_usage(cache, active))
        done = [request for request in active if request.is_done()]
        active = [request for request in active if not request.is_done()]
        for request in done:
            request.end()
        ended += len(done)
    return Usage(*map(statistics.fmean, zip(*steps)))


def _usage(cache, active):
    stats = cache.stats()
    sequences = [(request, len(seq)) for request in active for seq in request.seqs]
    return (
        stats.num_tokens,
        stats.slots_used,
        stats.pages_held,
        sum(-(-length // cache.page_size) for _, length in sequences),
        MAX_LENGTH * len(sequences),
        sum(_pow2_reservation(request) for request, _ in sequences),
    )


def _pow2_reservation(request):
    output = 1 << (request.output_length - 1).bit_length()
    return min(request.prompt_length + output, MAX_LENGTH)


def _lognormal(rng, mean, sigma):
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def main(requests=256):
    """Print the three tables, and return their rows."""
    tables = [
        [saving(*case, requests) for case in itertools.product(WORKLOADS, METHODS, WIDTHS)],
        [held(*case, requests) for case in itertools.product((SHAREGPT, TRANSLATION), RUNNING)],
        [waste(*case, requests) for case in itertools.product(WORKLOADS, PAGE_SIZES)],
    ]
    for rows in tables:
        columns = [list(column) for column in zip(rows[0], *([_text(cell) for cell in row.values()] for row in rows))]
        widths = [max(map(len, column)) for column in columns]
        for line in zip(*columns):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
        print()
    return tables


def _text(cell):
    return "" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def saving(workload, method, width, requests):
    usage = simulate(workload, method=method, width=width, requests=requests)
    return {
        "workload": workload.name,
        "method": method,
        "width": width,
        "pages without sharing": usage.pages_unshared,
        "pages held": usage.pages_held,
        "saved, %": usage.saving,
        "the paper's, %": workload.paper.get((method, width)),
    }


def held(workload, running, requests):
    usage = simulate(workload, running=running, requests=requests, system_prompt=SYSTEM_PROMPT)
    tokens = {
        "2048 tokens reserved, GiB": usage.reserved_max,
        "power of two reserved, GiB": usage.reserved_pow2,
        "pages, GiB": usage.pages_unshared * PAGE_SIZE,
        "shared pages, GiB": usage.pages_held * PAGE_SIZE,
    }
    gib = {name: n * BYTES_PER_TOKEN / 2**30 for name, n in tokens.items()}
    return {"workload": workload.name, "running requests": running, **gib, "saved, %": usage.saving}


def waste(workload, page_size, requests):
    usage = simulate(workload, page_size=page_size, requests=requests)
    unused = {
        "page size": page_size,
        "slots without a token, %": 1 - usage.slots_used / (usage.pages_held * page_size),
        "of 2048 tokens reserved, %": 1 - usage.tokens / usage.reserved_max,
        "of a power of two, %": 1 - usage.tokens / usage.reserved_pow2,
    }
    return {"workload": workload.name} | {
        name: 100 * share if isinstance(share, float) else share for name, share in unused.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="finished requests (default: %(default)s)")
    main(**vars(parser.parse_args()))
