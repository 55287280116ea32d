"""Pages that leave a cache and come back: a host tier, another cache, prefixes that are found after an import."""

from unittest.mock import Mock

import pytest
import torch
from append_cases import DEVICE
from small_caches import state_of

from triton_attn import LatentKVCache, OutOfPages, PagedKVCache, append_kv_cache, paged_attention
from triton_attn.cache import transfer

SIZE = dict(num_layers=2, num_kv_heads=2, head_dim=32, head_dim_v=16, dtype=torch.float32, device=DEVICE)
PROMPT = list(range(100, 110))  # two pages of 4 and a half one


def new_cache(num_pages=8):
    return PagedKVCache(num_pages, 4, **SIZE)


def write(cache, seq, ids):
    """Append tokens whose keys and values follow from their ids."""
    slots = cache.extend([seq], [ids])
    for layer in range(2):
        generators = [torch.Generator().manual_seed(1000 * layer + token) for token in ids]
        k, v = (torch.stack([torch.randn(2, dim, generator=g) for g in generators]).to(DEVICE) for dim in (32, 16))
        append_kv_cache(k, v, cache.k_cache[layer], cache.v_cache[layer], slots)


def attend(cache, seq):
    q = torch.randn(1, 1, 4, 32, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    lengths, table = cache.cache_seqlens([seq]), cache.block_table([seq])
    return torch.stack([paged_attention(q, *pair, lengths, table) for pair in zip(cache.k_cache, cache.v_cache)])


def test_a_sequence_leaves_and_goes_on_where_it_stopped():
    cache, stays = new_cache(4), new_cache()
    seqs = [owner.create(PROMPT)[0] for owner in (cache, stays)]
    for owner, seq in zip((cache, stays), seqs):
        write(owner, seq, PROMPT)
    pages = cache.export_pages(seqs[0])
    assert [x.shape for x in pages] == [(2, 3, 4, 2, 32), (2, 3, 4, 2, 16)]
    cache.free(seqs[0])
    other, _ = cache.create([])
    write(cache, other, list(range(16)))  # nothing of the first sequence is left
    with pytest.raises(OutOfPages):
        cache.import_pages(pages, PROMPT)
    cache.free(other)
    back = cache.import_pages(pages, PROMPT)
    for token in (5, 6, 7):
        assert torch.equal(attend(cache, back), attend(stays, seqs[1]))
        write(cache, back, [token])
        write(stays, seqs[1], [token])
    assert len(back) == 13


def test_another_cache_finds_what_was_imported():
    source, target = new_cache(), new_cache(5)
    seq, _ = source.create(PROMPT)
    write(source, seq, PROMPT)
    target.free(target.import_pages(source.export_pages(seq), PROMPT))
    assert target.stats().pages_cached == 2
    hit, cached = target.create(PROMPT)
    assert cached == 8
    write(target, hit, PROMPT[8:])
    assert torch.equal(attend(target, hit), attend(source, seq))
    assert target.page_hashes(PROMPT) == [target.pool.hash_of(page) for page in target.block_table([hit])[0, :2]]
    assert target.create(PROMPT, salt="other")[1] == 0


@pytest.mark.parametrize("first_page", [0, 1, 2])
def test_pages_that_are_found_are_shared_and_only_the_rest_is_needed(first_page):
    source, target = new_cache(), new_cache(4)
    seq, _ = source.create(PROMPT)
    write(source, seq, PROMPT)
    first = target.import_pages(source.export_pages(seq), PROMPT)
    second = target.import_pages(source.export_pages(seq, first_page=first_page), PROMPT)
    assert (target.stats().pages_shared, target.stats().pages_free) == (2, 0)
    assert torch.equal(attend(target, second), attend(source, seq))
    before = state_of(target)
    with pytest.raises(OutOfPages):
        target.import_pages(source.export_pages(seq, first_page=2), PROMPT)
    assert state_of(target) == before
    target.free([first, second])
    before = state_of(target)
    # Free pages that are found are taken back: of four pages two are left, and three are needed.
    longer = torch.zeros(2, 3, 4, 2, 32, device=DEVICE), torch.zeros(2, 3, 4, 2, 16, device=DEVICE)
    with pytest.raises(OutOfPages):
        target.import_pages(longer, PROMPT[:8] + list(range(9)))
    assert state_of(target) == before


def test_pages_that_are_taken_back_are_not_written():
    """They are the next to be reused, and stay as they are: new pages are others."""
    source, target = new_cache(), new_cache(4)
    seq, _ = source.create(PROMPT)
    write(source, seq, PROMPT)
    for ids in (PROMPT[:8], list(range(8))):
        first, _ = target.create(ids)
        write(target, first, ids)
        target.commit([first])
        target.free(first)
    back = target.import_pages(source.export_pages(seq, first_page=2), PROMPT)
    assert target.stats().pages_held == 3
    assert torch.equal(attend(target, back), attend(source, seq))


def test_tokens_without_ids_are_never_found():
    source, target = new_cache(), new_cache()
    seq, _ = source.create([])
    write(source, seq, PROMPT)
    back = target.import_pages(source.export_pages(seq), 10)
    assert torch.equal(attend(target, back), attend(source, seq))
    target.commit([back])
    target.free(back)
    assert target.stats().pages_cached == 0


WINDOWS = SIZE | dict(layer_windows=[-1, 4])


def write_with_windows(cache, seq, ids):
    """As `write`, in the slots of each layer's group."""
    slots = cache.extend([seq], [ids])
    for group, layer, window in cache.layers:
        generators = [torch.Generator().manual_seed(1000 * window + token) for token in ids]
        k, v = (torch.stack([torch.randn(2, dim, generator=g) for g in generators]).to(DEVICE) for dim in (32, 16))
        append_kv_cache(k, v, cache.k_cache[layer], cache.v_cache[layer], slots[group])


def attend_with_windows(cache, seq):
    q = torch.randn(1, 1, 4, 32, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    lengths, tables = cache.cache_seqlens([seq]), cache.block_table([seq])
    outs = [
        paged_attention(q, cache.k_cache[layer], cache.v_cache[layer], lengths, tables[group], window_size=(window, 0))
        for group, layer, window in cache.layers
    ]
    return torch.stack(outs)


def test_a_sequence_of_a_model_with_windows_goes_on_where_it_stopped():
    """Of the layer with a window only the pages leave that the next token sees."""
    cache, stays = (PagedKVCache(12, 4, **WINDOWS) for _ in range(2))
    seqs = [owner.create(PROMPT)[0] for owner in (cache, stays)]
    for owner, seq in zip((cache, stays), seqs):
        write_with_windows(owner, seq, [*PROMPT, 1, 2, 3, 4, 5, 6])
        write_with_windows(owner, seq, [7])
    pages = cache.export_pages(seqs[0])
    places = cache.page_places(17)
    assert places == [*((0, column) for column in range(5)), (1, 3), (1, 4)]
    tables = cache.block_table(seqs[:1])[:, 0].tolist()
    for x, own in zip(pages, (cache.k_cache, cache.v_cache)):
        assert x.shape[1] == len(places)
        for i, (group, column) in enumerate(places):
            filled = 1 if column == 4 else 4
            assert torch.equal(x[:, i, :filled], own[:, tables[group][column], :filled])
    cache.free(seqs[0])
    other, _ = cache.create([])
    write_with_windows(cache, other, list(range(24)))  # nothing of the first sequence is left
    cache.free(other)
    back = cache.import_pages(pages, [*PROMPT, 1, 2, 3, 4, 5, 6, 7])
    for token in range(20, 30):
        assert torch.equal(attend_with_windows(cache, back), attend_with_windows(stays, seqs[1]))
        write_with_windows(cache, back, [token])
        write_with_windows(stays, seqs[1], [token])


def test_a_cut_of_a_prompt_becomes_a_prefix_for_all_groups():
    """A fork that ends with the full pages is exported, and another cache finds it; the rest of a group is shared."""
    source, target = (PagedKVCache(12, 4, **WINDOWS) for _ in range(2))
    seq, _ = source.create(PROMPT)
    write_with_windows(source, seq, PROMPT)
    cut = source.fork(seq)
    source.truncate(cut, 8)
    pages = source.export_pages(cut)
    assert source.page_places(8) == [(0, 0), (0, 1), (1, 1)]
    target.free(target.import_pages(pages, PROMPT[:8]))
    assert target.stats().pages_cached == 3
    hit, cached = target.create(PROMPT)
    assert cached == 8
    write_with_windows(target, hit, PROMPT[8:])
    assert torch.equal(attend_with_windows(target, hit), attend_with_windows(source, seq))
    before = state_of(target)
    rest = source.export_pages(seq, first_page=2)
    with pytest.raises(ValueError, match="pages: expected 5 to 5 pages"):
        target.import_pages(rest, [0, *PROMPT[1:], 1, 2, 3, 4, 5, 6])
    assert state_of(target) == before
    # All but the last page of each group is found.
    again = target.import_pages(rest, PROMPT)
    assert torch.equal(attend_with_windows(target, again), attend_with_windows(source, seq))
    assert target.stats().pages_shared == 3


def test_nothing_imported_is_something_known():
    """A sequence without tokens goes on as a new one, whether its ids were given or their number, 0."""
    cache = new_cache()
    seq = cache.import_pages(
        (torch.zeros(2, 0, 4, 2, 32, device=DEVICE), torch.zeros(2, 0, 4, 2, 16, device=DEVICE)), 0
    )
    write(cache, seq, PROMPT)
    cache.commit([seq])
    assert cache.create(PROMPT)[1] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_latents(dtype):
    size = dict(num_layers=2, kv_lora_rank=128, qk_rope_head_dim=16, dtype=dtype, device=DEVICE)
    source, target = LatentKVCache(4, 4, **size), LatentKVCache(6, 4, **size)
    seq, _ = source.create(PROMPT)
    source.extend([seq], [PROMPT])
    source.latent_cache.view(torch.uint8).copy_(torch.arange(source.latent_cache.nbytes).view(2, 4, 4, -1) % 251)
    taken = target.create([])[0]
    target.extend([taken], [[1]])
    back = target.import_pages(source.export_pages(seq), PROMPT)
    tables = source.block_table([seq])[0], target.block_table([back])[0]
    theirs, ours = (x.latent_cache.view(torch.uint8)[:, t.long()] for x, t in zip((source, target), tables))
    assert torch.equal(ours, theirs)


def test_wrong_arguments_change_nothing():
    cache = new_cache()
    seq, _ = cache.create(PROMPT)
    write(cache, seq, PROMPT)
    k, v = cache.export_pages(seq)
    before = state_of(cache)
    wrong = [
        (lambda: cache.import_pages(k, PROMPT), TypeError, "pages: expected a tuple of 2 tensors, got Tensor"),
        (lambda: cache.import_pages((k,), PROMPT), TypeError, "pages: expected a tuple of 2 tensors, got 1 of them"),
        (lambda: cache.import_pages((k, k), PROMPT), ValueError, r"pages\[1\]: expected shape"),
        (lambda: cache.import_pages((k.half(), v), PROMPT), TypeError, r"pages\[0\]: expected torch.float32"),
        (lambda: cache.import_pages((k[:, :2], v), PROMPT), ValueError, r"pages\[1\]: expected shape"),
        (
            lambda: cache.import_pages((k, v), [1] * 13),
            ValueError,
            "pages: expected 4 to 4 pages, those from a column of 0 to 0 on: 0 are found, got 3",
        ),
        (
            lambda: cache.import_pages((k, v), [1] * 8),
            ValueError,
            "pages: expected 2 to 2 pages, those from a column of 0 to 0 on: 0 are found, got 3",
        ),
        (lambda: cache.export_pages(seq, 4), ValueError, "first_page: expected at most the sequence's 3 pages, got 4"),
        (lambda: cache.export_pages(seq, 1, to=(k, v)), ValueError, r"to\[0\]: expected shape"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
        assert state_of(cache) == before


def test_a_copy_that_fails_changes_nothing(monkeypatch):
    """All pages are free and found: three hold the prompt's beginning, two would be taken for its end."""
    cache, source, beginning = new_cache(5), new_cache(), list(range(12))
    prompt = [*beginning, *range(20, 28)]
    for owner, ids in ((cache, beginning), (cache, [7] * 8), (source, prompt)):
        seq, _ = owner.create(ids)
        write(owner, seq, ids)
        owner.commit([seq])
        if owner is cache:
            owner.free(seq)
    pages, before = source.export_pages(seq, 3), state_of(cache)
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "copy_kv_pages", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            cache.import_pages(pages, prompt)
    assert state_of(cache) == before
    imported = cache.import_pages(pages, prompt)
    assert torch.equal(attend(cache, imported), attend(source, seq))
    assert cache.stats().pages_free == 0
