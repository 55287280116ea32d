"""Hit rate of prefix caching on two serving traces, compared with a cache that reuses pages in the order of freeing."""

import random

import pytest

from triton_attn.cache.free_list import FreeList
from triton_attn.cache.pool import BlockPool
from triton_attn.cache.sequences import PagedSequences


class OneOrder(FreeList):
    def put(self, pages, at_head=False):
        super().put(pages)


class LeastRecentlyFreed(BlockPool):
    """All free pages in one order, with and without a known hash."""

    def __init__(self, num_pages):
        super().__init__(num_pages)
        self._free = OneOrder(num_pages)


def chats(rng):
    """40 users take turns: each prompt is the whole conversation plus 5 to 40 tokens, and the answer has as many."""
    said = [[] for _ in range(40)]
    for _ in range(600):
        tokens = said[rng.randrange(40)]
        if len(tokens) > 600:
            tokens.clear()
        tokens += tokens_of(rng, 5, 40)
        reply = tokens_of(rng, 5, 40)
        yield list(tokens), [reply]
        tokens += reply


def samples(rng):
    """4 answers to each of 40 questions that recur. The cache is not told the answers' tokens."""
    questions = [tokens_of(rng, 100, 400) for _ in range(40)]
    for _ in range(300):
        yield rng.choice(questions), [rng.randrange(10, 60) for _ in range(4)]


def tokens_of(rng, low, high):
    return [rng.randrange(2**17) for _ in range(rng.randrange(low, high))]


def hit_rate(pool, trace, num_pages, page_size, num_running=4):
    cache = PagedSequences(num_pages, page_size, "cpu", prefix_caching=True)
    cache._copy_pages = lambda src_pages, dst_pages: None
    cache.pool = pool(num_pages)
    running = []
    for prompt, answers in trace(random.Random(0)):
        if len(running) == num_running:
            for seq in running.pop(0):
                cache.free(seq)
        seq, cached = cache.create(prompt)
        cache.extend([seq], [prompt[cached:]])
        seqs = [seq] + [cache.fork(seq) for _ in answers[1:]]
        cache.extend(seqs, answers)
        cache.commit(seqs)
        running.append(seqs)
    stats = cache.stats()
    return stats.tokens_found / stats.tokens_asked


@pytest.mark.ci
@pytest.mark.parametrize(("trace", "num_pages", "page_size"), [(chats, 300, 32), (samples, 450, 16)])
def test_pages_that_cannot_be_found_make_room_for_pages_that_can(trace, num_pages, page_size):
    before, now = (hit_rate(pool, trace, num_pages, page_size) for pool in (LeastRecentlyFreed, BlockPool))
    print(f"{trace.__name__}: {before:.2f} of the prompts' tokens found in the order of freeing, {now:.2f} by ours")
    assert now > before + 0.05
