"""PagedKVCache(layer_windows=): groups of layers, what a window keeps, and prefixes that are right for all groups.

Models that alternate windows and all keys, as Gemma 3 and gpt-oss do, generate what they generate over a plain cache.
"""

import dataclasses
from itertools import chain

import pytest
import torch
from levels import INTERPRETED
from small_caches import DEVICE, contents, make_step

from triton_attn import OutOfPages, PagedKVCache, append_kv_cache, paged_attention
from triton_attn.cache.events import PagesCleared, PagesRemoved, PagesStored
from triton_attn.cache.hashing import page_hashes, root_hash
from triton_attn.cache.layers import group_layers
from triton_attn.cache.prefix import find_page
from triton_attn.toolchain import guard

pytestmark = pytest.mark.oldest
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts accesses in the interpreter")
PAGE = 4


def make(layer_windows, num_pages=64, **options):
    shape = dict(num_layers=len(layer_windows), num_kv_heads=1, head_dim=8, dtype=torch.float32, device=DEVICE)
    return PagedKVCache(num_pages, PAGE, **shape, layer_windows=layer_windows, **options)


def start(cache, tokens, **options):
    seq, cached = cache.create(tokens, **options)
    cache.extend([seq], [tokens[cached:]])
    cache.commit([seq])
    return seq


def tables(cache, seq):
    return cache.block_table([seq])[:, 0].tolist()


GEMMA_3_27B = ([1023] * 5 + [-1]) * 10 + [1023] * 2
GPT_OSS_120B = [127, -1] * 18


@pytest.mark.parametrize(
    ("layer_windows", "windows", "num_cache_layers"),
    [
        (GEMMA_3_27B, [-1] + [1023] * 6, 10),
        (GPT_OSS_120B, [-1, 127], 18),
        ([4095] * 32, [4095], 32),
        ([-1] * 32, [-1], 32),
        ([9] * 11 + [-1] * 10, [-1, 9], 11),  # one empty place, in place of a third group with nine
        ([9] * 13 + [-1] * 10, [-1, 9, 9], 10),
        ([9, None, 3, -1, None], [-1, 9, 3], 1),  # layers without keys, or with those of others
    ],
)
def test_groups_have_one_window_and_one_size(layer_windows, windows, num_cache_layers):
    groups = group_layers(layer_windows, len(layer_windows))
    assert (list(groups.windows), groups.num_cache_layers) == (windows, num_cache_layers)
    places = [place for place in groups.places if place is not None]
    assert [place and place.window for place in groups.places] == layer_windows
    assert len(set(places)) == len(places)
    assert all(groups.windows[place.group] == place.window for place in places)
    assert all(place.cache_layer < num_cache_layers for place in places)


@pytest.mark.parametrize(
    ("layer_windows", "error", "message"),
    [
        ([1], ValueError, "layer_windows: expected an entry for each of 2 layers, got 1"),
        ([1, -2], ValueError, r"layer_windows\[1\]: expected -1 \(unlimited\) or more, or None, got -2"),
        ([1, 2.0], TypeError, r"layer_windows\[1\]: expected an int or None, got float"),
        ([None, None], ValueError, "layer_windows: expected a layer that keeps keys, got None for all layers"),
        (7, TypeError, "layer_windows: expected a list with an entry for each layer, got int"),
    ],
)
def test_wrong_windows(layer_windows, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(4, num_layers=2, num_kv_heads=1, head_dim=8, layer_windows=layer_windows, device="cpu")


def test_a_page_has_the_bytes_of_one_group():
    cache = make([3, 3, -1], num_pages=10)
    assert cache.k_cache.shape == (1, 10, PAGE, 1, 8)
    assert [place.group for place in cache.layers] == [1, 2, 0]


def test_pages_behind_the_window_are_given_back_and_stand_as_zeros():
    cache = make([-1, 5])
    seq = start(cache, list(range(14)))
    assert tables(cache, seq) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    cache.extend([seq], [[14, 15]])  # token 14 sees 9 to 13
    assert tables(cache, seq) == [[0, 1, 2, 3], [0, 0, 6, 7]]
    assert cache.stats().pages_held == 6
    for token in range(16, 60):
        cache.extend([seq], [[token]])
        held = cache.stats().pages_held - (token + PAGE) // PAGE
        assert held <= 3  # 5 keys and a new one, on at most 3 pages
    cache.free(seq)
    assert cache.stats().pages_held == 0


def test_drafts_can_be_taken_back():
    """However many: what the token after the accepted ones sees is there."""
    cache = make([6])
    seq = start(cache, list(range(20)))
    for accepted in (0, 1, 3, 8, 0):
        before = len(seq)
        cache.extend([seq], 8)
        cache.truncate(seq, before + accepted)
        first_seen = max(0, len(seq) - 6) // PAGE
        assert cache._firsts[seq._row] <= first_seen
    with pytest.raises(ValueError, match="n: expected 0, or at least 30: earlier pages were given back, got 25"):
        cache.truncate(seq, 25)
    cache.truncate(seq, 0)
    assert cache.stats().pages_held == 0
    cache.extend([seq], 5)
    assert cache.stats().pages_held == 2


def test_what_one_sequence_gives_back_another_keeps():
    cache = make([-1, 3])
    seq = start(cache, list(range(8)))
    fork = cache.fork(seq)
    for _ in range(8):
        cache.extend([seq], 1)
    assert tables(cache, fork) == [[0, 1], [2, 3]]
    assert tables(cache, seq)[1][:3] == [0, 0, 0]
    assert [cache.pool.ref_count(page) for page in (0, 1, 2, 3)] == [2, 2, 1, 1]


def forget(cache, seq_tokens, group, columns):
    """Let pages of a group no longer be found, as if they had been reused."""
    hashes = list(page_hashes([root_hash(None)], torch.tensor(seq_tokens).numpy(), PAGE))
    cache.pool.forget([find_page(cache, group, hashes[column]) for column in columns])


@pytest.mark.parametrize(
    ("gone", "cached"),
    [
        ([], 16),
        ([(1, 0), (1, 1)], 16),  # behind the window of token 16, which sees 11 to 15
        ([(1, 2)], 8),  # token 12 sees 7 to 11, token 8 sees 3 to 7
        ([(1, 3)], 12),
        ([(0, 1)], 4),  # a page of all keys
        ([(1, 0), (1, 3)], 12),
        ([(1, 1), (1, 3)], 4),
        ([(1, 0), (1, 2)], 0),
        ([(0, 3), (1, 1)], 4),
    ],
)
def test_a_prefix_is_found_if_each_group_has_what_the_next_token_sees(gone, cached):
    tokens = list(range(16))
    cache = make([-1, 5])
    cache.free(start(cache, tokens))
    for group, column in gone:
        forget(cache, tokens, group, [column])
    seq, found = cache.create([*tokens, 99])
    assert found == cached
    first = max(0, cached - 5) // PAGE
    assert [sum(page is not None for page in row) for row in tables(cache, seq)] == [cached // PAGE] * 2
    assert cache._firsts[seq._row : seq._row + 2].tolist() == [0, first]
    assert cache.stats().pages_held == 2 * cached // PAGE - first


def test_every_group_of_all_keys_counts():
    tokens = list(range(12))
    cache = make([-1, -1, 2])  # two groups that see all keys, of one layer each
    cache.free(start(cache, tokens))
    forget(cache, tokens, 1, [2])
    assert cache.create([*tokens, 99])[1] == 8


@pytest.mark.parametrize("layer_windows", [None, [-1], [5], [-1, 5]])
@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (7, 0), (8, 4), (9, 4), (16, 12), (17, 12), (19, 12)])
def test_the_last_page_is_computed_again(layer_windows, length, cached):
    """In a window group the pages before it must be there for the shorter prefix."""
    windows = {} if layer_windows is None else {"layer_windows": layer_windows}
    size = dict(num_layers=len(layer_windows or [0]), num_kv_heads=1, head_dim=8, device=DEVICE)
    cache = PagedKVCache(32, PAGE, **size, **windows)
    tokens = list(range(16))
    start(cache, tokens)
    assert cache.create([*tokens, 50, 51, 52][:length], recompute_last_page=True)[1] == cached


def test_a_full_pool_goes_on_where_a_window_gives_pages_back():
    """And raises, with nothing changed, where it does not."""
    cache = make([5], num_pages=3)
    seq = start(cache, list(range(12)))
    cache.extend([seq], [list(range(12, 16))])  # gives one page back, and takes one
    cache.extend([seq], [list(range(16, 20))])
    assert cache.stats().pages_free == 0
    cache.extend([seq], [list(range(20, 24))])
    fork = cache.fork(seq)
    before = cache.stats(), tables(cache, seq), tables(cache, fork)
    with pytest.raises(OutOfPages, match="3 pages are needed, 0 of 3 are free"):
        cache.extend([seq], 12)
    assert (cache.stats(), tables(cache, seq), tables(cache, fork)) == before


def test_a_page_that_some_copy_while_another_gives_it_back_is_free_and_found():
    cache = make([4])
    longer = start(cache, list(range(12)))
    seqs = cache.fork([longer] * 2)
    for seq in seqs:
        cache.truncate(seq, 6)
    cache.extend([*seqs, longer], [[6], [7], [12]])
    assert tables(cache, longer) == [[0, 0, 2, 5]]
    assert [tables(cache, seq) for seq in seqs] == [[[0, 3]], [[0, 4]]]
    stats = cache.stats()
    assert (stats.pages_held, stats.pages_shared, stats.pages_cached) == (5, 1, 1)
    again, cached = cache.create(list(range(9)))
    assert (cached, tables(cache, again)) == (8, [[0, 1]])


def test_after_a_reset_nothing_old_is_found():
    for layer_windows in ([-1, 3], [-1]):
        cache = make(layer_windows)
        freed, seq = list(range(12)), list(range(100, 110))
        cache.free(start(cache, freed))
        live = start(cache, seq)
        fork = cache.fork(live)
        cache.reset_prefix_cache()
        cache.extend([live, fork], [list(range(110, 120))] * 2)
        cache.commit([live, fork])
        assert cache.create(freed)[1] == cache.create([*seq, *range(110, 120)])[1] == 0
        assert len(live) == 20
        start(cache, freed)
        assert cache.create(freed)[1] == 11
        cache.truncate(live, 0)  # what it wrote before is gone
        cache.extend([live], [seq])
        cache.commit([live])
        assert cache.create(seq)[1] == 8


def test_events_have_what_a_router_needs():
    cache = make([-1, 3], num_pages=11, record_events=True)
    tokens = list(range(9))
    seq = start(cache, tokens)
    first, second = page_hashes([root_hash(None)], torch.tensor(tokens).numpy(), PAGE)
    stored = dict(hashes=[first, second], parent=None, root=root_hash(None), token_ids=tokens[:8], page_size=PAGE)
    assert cache.take_events() == [PagesStored(**stored, group=group) for group in (0, 1)]
    assert cache.take_events() == []
    cache.extend([seq], [[9, 10, 11, 12]])  # page 0 of group 1 is given back, and can still be found
    (third,) = list(page_hashes([second], torch.tensor([8, 9, 10, 11]).numpy(), PAGE))
    cache.commit([seq])
    events = cache.take_events()
    assert [(event.hashes, event.parent, event.token_ids) for event in events] == [
        ([third], second, [8, 9, 10, 11])
    ] * 2
    start(cache, tokens)  # the same content on other pages: nothing new can be found
    assert cache.take_events() == []
    cache.extend([cache.create([])[0]], PAGE)  # the last two pages that are free
    assert PagesRemoved([first], 1) in cache.take_events()
    cache.reset_prefix_cache()
    assert cache.take_events() == [PagesCleared()]
    cache.free(seq)
    start(cache, tokens[:PAGE], salt="a")
    assert cache.take_events()[0].root == root_hash("a")


def test_without_events_there_is_nothing_to_take():
    with pytest.raises(ValueError, match="take_events: expected a cache that was made with record_events=True"):
        make([-1]).take_events()


@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
def test_a_step_has_buffers_for_each_group(staged, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    cache = make([-1, 5, 5])
    step = make_step(cache, 4, 64, 16, staged=staged)
    seqs = [start(cache, list(range(10 * i, 10 * i + 5 + i))) for i in range(3)]
    assert step.block_table.shape == (3, 4, 16)
    assert step.slot_mapping.shape == (3, 16)
    for tokens in ([[1], [2], [3]], [[1, 2, 3], [], [4]], *([[1], [2], [3]] for _ in range(9)), [[9]]):
        seqs = seqs[: len(tokens)]
        step.extend(seqs, tokens)
        there = contents(step)
        lengths = cache.cache_seqlens(seqs).tolist()
        assert there["cache_seqlens"] == lengths + [0] * (4 - len(seqs))
        positions = [p for seq, new in zip(seqs, tokens) for p in range(len(seq) - len(new), len(seq))]
        owners = [i for i, new in enumerate(tokens) for _ in new]
        assert there["positions"][: len(positions)] == positions
        table = cache.block_table(seqs).tolist()
        for group in range(3):
            slots = [table[group][i][p // PAGE] * PAGE + p % PAGE for i, p in zip(owners, positions)]
            assert there["slot_mapping"][group] == slots + [-1] * (16 - len(slots))
            for i, seq in enumerate(seqs):
                first, last = cache._firsts[seq._row + group], -(-len(seq) // PAGE)
                assert there["block_table"][group][i][first:last] == table[group][i][first:last]


@dataclasses.dataclass
class Model:
    """Layers with random weights that see a window or all keys, with sinks or without; greedy."""

    layer_windows: list
    sinks: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return (torch.randn(shape, generator=generator) * shape[0] ** -0.5).to(DEVICE)

        self.embedding = draw(40, 32) * 40**0.5
        self.layers = [(draw(32, 4 * 8), draw(32, 2 * 8), draw(32, 32)) for _ in self.layer_windows]
        self.sink = torch.linspace(-1, 1, 4, device=DEVICE) if self.sinks else None

    def cache(self, is_plain, num_pages=400):
        windows = {} if is_plain else {"layer_windows": self.layer_windows}
        shape = dict(num_layers=len(self.layers), num_kv_heads=1, head_dim=8, dtype=torch.float32, device=DEVICE)
        cache = PagedKVCache(num_pages, PAGE, **shape, **windows)
        for x in (cache.k_cache, cache.v_cache):
            x.fill_(float("nan"))
        return cache

    def next_tokens(self, cache, seqs, tokens):
        """After these new tokens of each sequence."""
        slots = cache.extend(seqs, tokens)
        lengths, table = cache.cache_seqlens(seqs), cache.block_table(seqs)
        ends = torch.tensor([0, *map(len, tokens)], device=DEVICE).cumsum(0, dtype=torch.int32)
        x = self.embedding[torch.tensor([*chain(*tokens)], device=DEVICE)]
        for i, (w_q, w_kv, w_out) in enumerate(self.layers):
            place = None if cache.layers is None else cache.layers[i]
            group, layer = (..., i) if place is None else (place.group, place.cache_layer)
            q, (k, v) = (x @ w_q).unflatten(1, (4, 8)), (x @ w_kv).unflatten(1, (2, 1, 8)).unbind(1)
            append_kv_cache(k, v, cache.k_cache[layer], cache.v_cache[layer], slots[group])
            out = paged_attention(
                q,
                cache.k_cache[layer],
                cache.v_cache[layer],
                lengths,
                table[group],
                cu_seqlens_q=ends,
                max_seqlen_q=max(map(len, tokens)),
                window_size=(self.layer_windows[i], 0),
                sinks=self.sink,
            )
            x = x + torch.tanh(out.flatten(1) @ w_out)
        cache.commit(seqs)
        return (x @ self.embedding.T)[ends[1:].long() - 1].argmax(-1).tolist()

    def generate(self, cache, steps=20):
        """Prompts in chunks, one of them with a prefix that is cached, drafts that are taken back, and forks."""
        prompts = [[(3 * i + 5 * j) % 40 for i in range(n)] for j, n in enumerate((37, 9))]
        seqs = [cache.create(prompt)[0] for prompt in prompts]
        self.next_tokens(cache, seqs, [prompt[:9] for prompt in prompts])
        self.next_tokens(cache, seqs[:1], [prompts[0][9:22]])
        texts = [[*prompts[0], *self.next_tokens(cache, seqs[:1], [prompts[0][22:]])], [*prompts[1], 7]]
        again, cached = cache.create([*prompts[0], 11, 12])
        assert cached == 36
        seqs.append(again)
        texts.append([*prompts[0], 11, 12])
        texts[2] += self.next_tokens(cache, [again], [texts[2][cached:]])
        for step in range(steps):
            new = [text[len(seq) :] for text, seq in zip(texts, seqs)]
            drafts = [[*tokens, 1, 2, 3] for tokens in new] if step % 4 == 1 else new
            if drafts is not new:
                self.next_tokens(cache, seqs, drafts)
                for seq, text in zip(seqs, texts):
                    cache.truncate(seq, len(text) - 1)
                new = [text[len(seq) :] for text, seq in zip(texts, seqs)]
            for text, token in zip(texts, self.next_tokens(cache, seqs, new)):
                text.append(token)
            if step == 6:
                seqs.append(cache.fork(seqs[0]))
                texts.append([*texts[0][:-1], 5])
        return texts, seqs


MODELS = {
    "Gemma 3": Model([6, 6, 6, 6, 6, -1]),
    "gpt-oss": Model([5, -1, 5, -1], sinks=True),
    "Mistral": Model([9, 9]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_generates_what_it_generates_over_a_plain_cache(name):
    model = MODELS[name]
    expected, _ = model.generate(model.cache(is_plain=True))
    cache = model.cache(is_plain=False)
    texts, seqs = model.generate(cache)
    assert texts == expected
    assert len({tuple(text[-8:]) for text in texts}) == len(texts)  # they do differ
    windows = [
        max(place.window for place in cache.layers if place.group == group) for group in range(cache._num_groups)
    ]
    for group, window in enumerate(windows):
        for seq in seqs:
            held = -(-len(seq) // PAGE) - int(cache._firsts[seq._row + group])
            assert held <= (-(-len(seq) // PAGE) if window < 0 else -(-(window + 2) // PAGE) + 1)


@interpreted
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("seqlen_q", "seqlens"), [(1, (40, 23, 70)), (3, (41, 7, 64)), (17, (40, 39, 66))])
def test_entries_of_pages_that_were_given_back_are_never_loaded(seqlen_q, seqlens, num_splits):
    """With page numbers far outside of the cache in their place the guard sees no other access, and nothing changes."""
    cache = make([7], num_pages=80)
    seqs = [start(cache, list(range(n - seqlen_q))) for n in seqlens]
    cache.extend(seqs, seqlen_q)
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = (x[0].normal_(generator=generator) for x in (cache.k_cache, cache.v_cache))
    q = torch.randn(len(seqs), seqlen_q, 2, 8, generator=generator)
    table, lengths = cache.block_table(seqs)[0], cache.cache_seqlens(seqs)
    firsts = cache._firsts[[seq._row for seq in seqs]].tolist()
    assert max(firsts) > 3
    poisoned = table.clone()
    for row, first in zip(poisoned, firsts):
        row[:first] = 2**30
    options = dict(window_size=(7, 0), num_splits=num_splits)
    expected = paged_attention(q, k_cache, v_cache, lengths, table, **options)
    with guard():
        out = paged_attention(q, k_cache, v_cache, lengths, poisoned, **options)
    assert torch.equal(out, expected)
