"""CacheStep: buffers at fixed addresses that follow the cache, whatever happens to its sequences between two calls.

`staged` steps send to memory of their own, as to a GPU, also where there is none.
"""

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from small_caches import DEVICE, contents, make, make_step, start

from triton_attn import (
    LatentKVCache,
    OutOfPages,
    append_kv_cache,
    append_latent_cache,
    mla_decode,
    paged_attention,
)
from triton_attn.cache import rows
from triton_attn.cache.step import CacheStep

pytestmark = pytest.mark.oldest
STAGED = pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """Memory is pinned only where there is a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


def check(step, cache, seqs, counts):
    """All that the buffers hold, by the cache's other functions."""
    there = SimpleNamespace(**contents(step))
    batch, tokens = len(seqs), sum(counts)
    lengths = cache.cache_seqlens(seqs).tolist()
    assert there.cache_seqlens == lengths + [0] * (len(there.cache_seqlens) - batch)
    positions = [length - n + i for length, n in zip(lengths, counts) for i in range(n)]
    assert there.positions == positions + [0] * (len(there.positions) - tokens)
    tables = cache.block_table(seqs).tolist()
    new = [(table, i) for table, length, n in zip(tables, lengths, counts) for i in range(length - n, length)]
    slots = [table[i // cache.page_size] * cache.page_size + i % cache.page_size for table, i in new]
    assert there.slot_mapping == slots + [-1] * (len(there.slot_mapping) - tokens)
    starts = [sum(counts[:i]) for i in range(batch + 1)]
    assert there.cu_seqlens_q == starts + [tokens] * (len(there.cu_seqlens_q) - batch - 1)
    for row, table, length in zip(there.block_table, tables, lengths):
        num_pages = -(-length // cache.page_size)
        assert row[:num_pages] == table[:num_pages]
    assert (step.batch, step.num_tokens, step.max_seqlen_q) == (batch, tokens, max(counts, default=0))


class Server:
    """Sequences of a cache, to which something happens."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.cache = make(num_pages=2000, page_size=self.rng.choice([1, 3, 4]))
        self.seqs = []

    def admit(self):
        self.seqs.append(start(self.cache, self.ids(self.rng.randrange(1, 12))))

    def free(self):
        self.cache.free(self.seqs.pop(self.rng.choice([-1, 0])))

    def shuffle(self):
        self.rng.shuffle(self.seqs)

    def fork(self):
        self.seqs.append(self.cache.fork(self.rng.choice(self.seqs)))

    def truncate(self):
        seq = self.rng.choice(self.seqs)
        self.cache.truncate(seq, self.rng.randrange(len(seq) + 1))

    def extend(self):
        self.cache.extend(self.rng.sample(self.seqs, self.rng.randrange(len(self.seqs))), 2)

    def happen(self):
        event = self.rng.choice([self.admit, self.free, self.shuffle, self.fork, self.truncate, self.extend])
        (event if self.seqs else self.admit)()

    def ids(self, n):
        return [self.rng.randrange(2) for _ in range(n)]


@STAGED
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", [2**14, 8])
def test_buffers_follow_a_server(staged, seed, kept, monkeypatch):
    """Sequences come, go, change places, fork, lose tokens, and grow outside of the step; addresses stay."""
    monkeypatch.setattr(rows, "CHANGES_KEPT", kept)
    server = Server(seed)
    rng, cache = server.rng, server.cache
    steps = [make_step(cache, 8, 50, 30, staged=staged) for _ in range(2)]
    addresses = [[getattr(step, name).data_ptr() for name in contents(step)] for step in steps]
    for _ in range(150):
        for _ in range(rng.choice([0, 0, 1, 2, 3])):
            server.happen()
        cache.free([seq for seq in server.seqs if len(seq) > 40])
        server.seqs = [seq for seq in server.seqs if seq._cache]
        now = server.seqs[: rng.choice([3, 8, 8, 8])]
        counts = [rng.choice([0, 1, 3]) for _ in now] if rng.random() < 0.2 else [1] * len(now)
        step = steps[rng.random() < 0.2]
        step.extend(now, list(map(server.ids, counts)))
        check(step, cache, now, counts)
    assert [[getattr(step, name).data_ptr() for name in contents(step)] for step in steps] == addresses
    assert all(address % 16 == 0 for of_step in addresses for address in of_step)


@pytest.fixture
def transfers(monkeypatch):
    """Bytes of each transfer from now on."""
    sizes, copy = [], torch.Tensor.copy_

    def counted(there, here, non_blocking=False):
        sizes.append(there.nbytes)
        assert non_blocking
        return copy(there, here)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    return sizes


def test_only_changes_are_sent_in_one_transfer(transfers):
    cache = make(num_pages=64, page_size=4)
    step = make_step(cache, 4, 64, staged=True)
    (header,) = transfers
    seqs = [start(cache, list(range(n))) for n in (17, 18, 19)]
    del transfers[:]
    step.extend(seqs, [[0]] * 3)  # 15 entries of the table are new
    step.extend(seqs, [[0]] * 3)  # the last one begins a page
    step.extend([seqs[1], seqs[0], seqs[2]], 1)  # six entries of each of two rows, one a new page of the second
    step.extend([seqs[1], seqs[0]], 1)
    assert transfers == [header + 16 * n for n in (15, 1, 11, 1)]
    assert header <= 4 * 256


def test_pages_that_were_given_back_are_not_sent(transfers):
    cache = make(num_pages=64, page_size=4, layer_windows=[-1, 8])
    step = make_step(cache, 4, 64, staged=True)
    (header,) = transfers
    seqs = [cache.create([])[0] for _ in range(2)]
    cache.extend(seqs, 33)
    cache.extend(seqs, 1)  # six of nine pages are behind the window
    del transfers[:]
    step.extend(seqs, 1)
    assert transfers == [header + 16 * 2 * (9 + 3)]


def test_the_table_is_written_once_where_it_changed(monkeypatch):
    """Each write is a launch on a GPU."""
    written = []
    put = CacheStep._put
    monkeypatch.setattr(CacheStep, "_put", lambda step, x: (written.append(len(x)), put(step, x)))
    cache = make(num_pages=64, page_size=4)
    step = make_step(cache, 4, 64, staged=True)
    seqs = [start(cache, list(range(n))) for n in (17, 18)]
    step.extend(seqs, 1)  # 10 entries of the table are new
    step.extend(seqs, 1)  # on the same pages
    assert written == [10]


def test_as_many_tokens_as_sequences_may_be_one_of_each_or_not():
    cache = make()
    seqs, step = [start(cache, [1]), start(cache, [2])], make_step(cache, 4, 16)
    for counts in ([1, 1], [2, 0], [1, 1], [0, 2]):
        step.extend(seqs, [[5] * n for n in counts])
        check(step, cache, seqs, counts)


def test_more_changes_than_there_is_room_for(transfers):
    cache = make(num_pages=64, page_size=1)
    step = make_step(cache, 4, 8, staged=True)
    seqs = [start(cache, [i] * 7) for i in range(4)]
    del transfers[:]
    step.extend(seqs, 1)
    assert len(transfers) == 1
    check(step, cache, seqs, [1] * 4)


def three_calls():
    """A step, and functions that call it: a batch, a larger one, and a smaller one in another order."""
    cache = make(num_pages=64, page_size=2)
    step = make_step(cache, 4, 64, 8, staged=True)
    seqs = [start(cache, [i] * 4) for i in range(4)]
    batches = (seqs[:3], [[1], [2, 3], []]), (seqs, 1), ([seqs[2], seqs[0]], [[4], [5]])
    return step, [functools.partial(step.extend, *batch) for batch in batches]


def test_calls_run_ahead_of_the_gpu(monkeypatch):
    """The device begins after the last of three calls, and has after each transfer what it should have."""
    step, calls = three_calls()
    expected = []
    for call in calls:
        call()
        expected.append(contents(step))
    step, calls = three_calls()
    todo, of_calls = [], []
    with monkeypatch.context() as patch:
        for name in ("copy_", "scatter_"):
            method = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *args, method=method, **_: todo.append((method, args)))
        for call in calls:
            call()
            of_calls.append(todo.copy())
            todo.clear()
    for of_call, state in zip(of_calls, expected, strict=True):
        for method, args in of_call:
            method(*args)
        assert contents(step) == state


@STAGED
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda step, seqs: step.extend(seqs, 1), ValueError, "seqs: expected at most max_batch = 2 sequences, got 3"),
        (lambda step, seqs: step.extend(seqs[:2], 3), ValueError, "token_ids: expected at most max_tokens = 5 new"),
        (lambda step, seqs: step.extend([seqs[2]], 4), ValueError, "at most max_seqlen = 12 tokens, got 13"),
        (lambda step, seqs: step.extend(seqs[:2], [1, 4]), OutOfPages, "2 pages are needed, 1 of 6 are free"),
        (lambda step, seqs: step.extend([seqs[0]] * 2, 1), ValueError, "seqs: expected each sequence once"),
        (lambda step, seqs: step.extend(seqs[:1], [["a"]]), TypeError, "token_ids: expected a flat list"),
    ],
)
def test_failures_change_nothing(staged, call, error, message):
    cache = make(num_pages=6)
    seqs = [start(cache, [i] * n) for i, n in enumerate((3, 4, 9))]
    step = make_step(cache, 2, 12, 5, staged=staged)
    step.extend(seqs[:1], 1)
    before = contents(step), cache.stats(), cache.block_table(seqs).tolist()
    with pytest.raises(error, match=message):
        call(step, seqs)
    assert (contents(step), cache.stats(), cache.block_table(seqs).tolist()) == before
    step.extend(seqs[1:2], 1)
    check(step, cache, seqs[1:2], [1])


@pytest.mark.parametrize("size", ["max_batch", "max_seqlen", "max_tokens"])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match=f"{size}: expected 1 or more, got 0"):
        make().step(**{"max_batch": 2, "max_seqlen": 8, "max_tokens": 2} | {size: 0})


def test_made_in_inference_mode_and_used_outside():
    cache = make()
    with torch.inference_mode():
        step = make_step(cache, 2, 8, staged=True)
    step.extend([start(cache, [1, 2, 3, 4])], 1)
    with torch.inference_mode():
        step.extend([start(cache, [1, 2, 3])], 1)


def test_no_call_enlarges_the_tables_of_the_cache():
    """Of as many sequences as the step takes, one as long as it may be, and a fork of each: more than pages."""
    batch, pages, page_size = 128, 100, 4
    cache = make(num_pages=pages, page_size=page_size)
    make_step(cache, batch, pages * page_size)
    tables = cache._tables
    seqs = [cache.create([])[0] for _ in range(batch)]
    for _ in range(pages):
        cache.extend(seqs[-1:], [page_size])
    forks = [cache.fork(seq) for seq in seqs]
    assert cache.block_table(forks).shape == (batch, pages)
    assert cache._tables is tables


def test_padding_influences_nothing():
    """A batch of three with buffers for five; the buffers of a larger batch before hold its lengths no longer."""
    cache = make(num_pages=64)
    step = cache.step(5, 64)
    seqs = [start(cache, [i] * (5 + i)) for i in range(5)]
    step.extend(seqs, 1)
    step.extend(seqs[:3], 1)
    cache.k_cache.zero_()
    cache.v_cache.normal_()
    k = torch.randn(5, 1, 2, device=DEVICE)
    append_kv_cache(k, k, cache.k_cache[0], cache.v_cache[0], step.slot_mapping)
    assert cache.k_cache.any(dim=-1).sum() == 3
    q = torch.randn(5, 1, 1, 2, device=DEVICE)
    out = paged_attention(q, cache.k_cache[0], cache.v_cache[0], step.cache_seqlens, step.block_table)
    lengths, tables = cache.cache_seqlens(seqs[:3]), cache.block_table(seqs[:3])
    alone = paged_attention(q[:3], cache.k_cache[0], cache.v_cache[0], lengths, tables)
    torch.testing.assert_close(out[:3], alone, rtol=1e-5, atol=1e-5)
    assert not out[3:].any()


def test_ragged_latents():
    """Prompts and a decode step in one call of mla_decode."""
    shape = {"num_layers": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    cache = LatentKVCache(16, 4, **shape, dtype=torch.float32, device=DEVICE)
    cache.latent_cache.fill_(float("nan"))
    step = make_step(cache, 3, 16, 12, staged=True)
    seqs, tokens = [cache.create([])[0] for _ in range(2)], [[1, 2, 3, 4, 5], [6, 7]]
    rows = torch.randn(12, 24, device=DEVICE)
    step.extend(seqs, tokens)
    append_latent_cache(*rows.split([16, 8], dim=1), cache.latent_cache[0], step.slot_mapping)
    q = torch.randn(12, 2, 24, device=DEVICE)
    queries = {"cu_seqlens_q": step.cu_seqlens_q, "max_seqlen_q": step.max_seqlen_q, "softmax_scale": 0.2}
    of_cache = cache.latent_cache[0], step.cache_seqlens, step.block_table
    out = mla_decode(*q.split([16, 8], dim=-1), *of_cache, **queries)
    for first, last in ((0, 5), (5, 7)):
        scores = 0.2 * torch.einsum("ihd,jd->hij", q[first:last], rows[first:last])
        mask = torch.ones(last - first, last - first, device=DEVICE).tril().bool()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        expected = torch.einsum("hij,jd->ihd", weights, rows[first:last, :16])
        torch.testing.assert_close(out[first:last], expected, rtol=1e-4, atol=1e-4)
    assert not out[7:].any()
