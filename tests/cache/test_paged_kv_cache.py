"""PagedKVCache rule by rule: prefix reuse, copy-on-write, atomic operations, errors; sizes; the cost of a step."""

import statistics
import time

import numpy as np
import pytest
import torch
from small_caches import DEVICE, make, start
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_attn import (
    LatentKVCache,
    OutOfPages,
    PagedKVCache,
    gather_kv_cache,
    kv_cache_bytes_per_token,
    mla_decode,
    paged_attention,
)

pytestmark = pytest.mark.oldest


def read(cache, seq):
    pages = cache.block_table([seq])[0].long()
    k, v = (caches[:, pages].flatten(1, 2)[:, : len(seq), 0, 0] for caches in (cache.k_cache, cache.v_cache))
    assert torch.equal(k, v)
    assert torch.equal(k[0], k[1])
    return k[0].int().tolist()


def table(cache, seq):
    return cache.block_table([seq]).tolist()[0]


def test_tensors_have_the_documented_shapes_and_the_bytes_of_the_formula():
    for num_kv_heads, head_dim, head_dim_v, dtype in [
        (8, 128, None, torch.bfloat16),  # MHA of 8 heads, or GQA
        (1, 64, None, torch.float16),  # MQA
        (2, 192, 128, torch.float32),
        (8, 128, None, torch.float8_e4m3fn),
        (1, 64, 32, torch.float8_e5m2),
    ]:
        shape = {"num_layers": 3, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
        cache = PagedKVCache(7, **shape, dtype=dtype)
        assert cache.k_cache.shape == (3, 7, 16, num_kv_heads, head_dim)
        assert cache.v_cache.shape == (3, 7, 16, num_kv_heads, head_dim_v or head_dim)
        assert cache.k_cache[2].is_contiguous()
        allocated = cache.k_cache.untyped_storage().nbytes() + cache.v_cache.untyped_storage().nbytes()
        assert allocated == 7 * 16 * kv_cache_bytes_per_token(**shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"num_layers": 32, "num_kv_heads": 32, "head_dim": 128}, 524288),  # Llama-2-7B
        ({"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}, 131072),  # Llama-3-8B
        ({"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.float8_e4m3fn}, 65536),
        ({"num_layers": 32, "num_kv_heads": 1, "head_dim": 64}, 8192),  # Falcon-7B
        ({"num_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 70272),  # DeepSeek-V3
        ({"num_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.float8_e4m3fn}, 40016),
        ({"num_layers": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.float8_e4m3fn}, 656),
        ({"num_layers": 1, "num_kv_heads": 2, "head_dim": 192, "head_dim_v": 128}, 1280),
    ],
)
def test_bytes_per_token_of_published_models(shape, expected):
    assert kv_cache_bytes_per_token(**shape) == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({}, "num_kv_heads: expected an int"),
        ({"num_kv_heads": 8}, "head_dim: expected an int"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim: expected an int"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}, "got some of both"),
        ({"num_kv_heads": 8.0, "head_dim": 64}, "num_kv_heads: expected an int"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.float8_e5m2}, "dtype: expected float16, bf"),
    ],
)
def test_bytes_per_token_needs_one_whole_shape(shape, message):
    with pytest.raises(TypeError, match=message):
        kv_cache_bytes_per_token(num_layers=2, **shape)


def test_slots_table_and_lengths_of_a_batch():
    cache = make()
    first, second, third = (cache.create([])[0] for _ in range(3))
    slots = cache.extend([first, second, third], [[1, 2, 3], [4, 5, 6, 7, 8], []])
    assert slots.dtype == torch.int64
    assert slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert cache.extend([second, first], torch.tensor([[9, 10], [11, 12]])).tolist() == [9, 10, 3, 12]
    block_table, cache_seqlens = cache.block_table([third, second, first]), cache.cache_seqlens([third, second, first])
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.tolist() == [[0, 0], [1, 2], [0, 3]]
    assert cache_seqlens.tolist() == [0, 7, 5]
    assert (len(third), len(second), len(first)) == (0, 7, 5)
    assert cache.extend([], []).shape == (0,)
    assert cache.block_table([]).shape == (0, 0)


def test_results_do_not_change_with_the_cache():
    cache = make()
    seq = start(cache, [1, 2, 3])
    block_table, cache_seqlens = cache.block_table([seq]), cache.cache_seqlens([seq])
    cache.truncate(seq, 0)
    cache.extend([seq], 9)
    assert block_table.tolist() == [[0]]
    assert cache_seqlens.tolist() == [3]


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], 8),
        ([1, 2, 3, 4, 5, 6, 7, 8], 7),  # a full hit: one token is left to compute
        ([1, 2, 3, 4, 5, 6, 7], 4),  # a look-up of less than the second page
        ([1, 2, 3, 4, 9, 6, 7, 8, 9], 4),
        ([9, 2, 3, 4, 5, 6, 7, 8], 0),  # the second page depends on the first
        ([1, 2, 3, 4], 3),
        ([1], 0),
        ([], 0),
    ],
)
def test_the_longest_prefix_of_full_pages_is_reused(prompt, cached):
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    other, found = cache.create(prompt)
    assert found == len(other) == cached
    assert table(cache, other) == table(cache, seq)[: -(-cached // 4)]
    assert read(cache, other) == prompt[:cached]
    stats = cache.stats()
    assert (stats.tokens_asked, stats.tokens_found) == (9 + len(prompt), cached)


def test_after_a_full_hit_the_last_token_is_written_in_a_copy():
    cache = make()
    seq = start(cache, [1, 2, 3, 4])
    other, _ = cache.create([1, 2, 3, 4])
    cache.k_cache.flatten(1, 2)[:, cache.extend([other], [[4]])] = -1
    assert table(cache, other) != table(cache, seq)
    assert read(cache, seq) == [1, 2, 3, 4]


@pytest.mark.parametrize("salt", [None, "", "a", b"a", b""])
def test_only_one_salt_shares(salt):
    cache = make()
    start(cache, [1, 2, 3, 4, 5], salt)
    for other in (None, "", "a", b"a", b""):
        assert cache.create([1, 2, 3, 4, 5], other)[1] == (4 if other == salt and type(other) is type(salt) else 0)


def test_a_full_page_is_found_only_after_it_is_written():
    cache = make()
    seq, _ = cache.create([1, 2, 3, 4])
    cache.extend([seq], [[1, 2, 3, 4]])
    assert cache.create([1, 2, 3, 4, 5])[1] == 0
    other = cache.create([])[0]
    cache.extend([other], [[7]])  # does not affect the first sequence
    assert cache.create([1, 2, 3, 4, 5])[1] == 0
    cache.extend([seq], [[5]])
    assert cache.create([1, 2, 3, 4, 5])[1] == 4


def test_an_extend_by_nothing_names_full_pages():
    cache = make()
    seq, _ = cache.create([])
    for token in (1, 2, 3, 4):
        cache.extend([seq], [[token]])
    assert cache.create([1, 2, 3, 4, 5])[1] == 0
    cache.extend([seq], [[]])
    assert cache.create([1, 2, 3, 4, 5])[1] == 4


def test_a_failed_extend_makes_nothing_findable():
    cache = make(num_pages=1)
    seq, _ = cache.create([])
    cache.extend([seq], [[1, 2, 3, 4]])
    with pytest.raises(OutOfPages):
        cache.extend([seq], [[5]])
    assert cache.create([1, 2, 3, 4, 5])[1] == 0


@pytest.mark.parametrize("unknown", [1, 4])
def test_tokens_without_ids_and_what_follows_are_never_found(unknown):
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5])
    cache.extend([seq], unknown)
    cache.extend([seq], [[0] * 12])
    fork = cache.fork(seq)
    cache.commit([seq, fork])
    assert cache.create([1, 2, 3, 4, 5] + [0] * 12)[1] == 4
    cache.truncate(fork, 12)  # tokens without ids stay
    cache.commit([fork])
    assert cache.create([1, 2, 3, 4, 5] + [0] * 12)[1] == 4
    cache.free(fork)
    cache.truncate(seq, 5)
    cache.extend([seq], [[6, 7, 8, 9]])
    cache.commit([seq])
    assert cache.create([1, 2, 3, 4, 5, 6, 7, 8, 9])[1] == 8


def test_freed_pages_are_found_until_reuse_the_head_longest():
    cache = make(num_pages=4)
    cache.free(start(cache, list(range(12))))
    assert cache.stats().pages_cached == 3
    other = cache.create([])[0]
    cache.extend([other], 8)  # the page that was never used, then the oldest freed one
    assert cache.create(list(range(12)))[1] == 8


def test_fork_copies_nothing_until_one_writes():
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5])
    forks = [cache.fork(seq) for _ in range(2)]
    assert table(cache, seq) == table(cache, forks[0]) == table(cache, forks[1]) == [0, 1]
    assert cache.stats().pages_held == 2
    for value, one in enumerate([seq, *forks], start=6):
        slots = cache.extend([one], [[value]])
        for caches in (cache.k_cache, cache.v_cache):
            caches.flatten(1, 2)[:, slots] = value
    assert [read(cache, one) for one in (seq, *forks)] == [[1, 2, 3, 4, 5, value] for value in (6, 7, 8)]
    assert cache.stats().pages_held == 4
    assert table(cache, forks[1]) == [0, 1]  # the last one needs no copy


def test_beams_are_forked_and_freed_as_lists():
    cache = make()
    beams = cache.fork([start(cache, [1, 2, 3, 4, 5])] * 3)
    assert [table(cache, beam) for beam in beams] == [[0, 1]] * 3
    cache.extend(beams, [[6], [7], [8]])
    assert [table(cache, beam) for beam in beams] == [[0, 2], [0, 3], [0, 4]]
    children = cache.fork([beams[2], beams[0], beams[2]])
    cache.free(beams)
    assert [table(cache, child) for child in children] == [[0, 4], [0, 2], [0, 4]]
    assert cache.stats().pages_held == 4
    assert cache.fork([]) == []
    cache.free([])
    cache.free(iter(children))
    assert cache.stats().pages_held == 2


def test_sequences_of_different_lengths_are_forked_and_freed_together():
    cache = make()
    seqs = [start(cache, [i] * n) for i, n in ((1, 3), (2, 9))]
    forks = cache.fork(seqs)
    cache.free(seqs)
    assert [table(cache, fork) for fork in forks] == [[0], [1, 2, 3]]
    assert (cache.stats().pages_held, cache.stats().pages_shared) == (4, 0)
    cache.free(forks)
    assert cache.stats().pages_held == 0


def test_of_a_list_that_is_freed_what_is_shared_is_reused_last():
    cache = make(num_pages=3)
    seq = start(cache, [1, 2, 3, 4])
    fork = cache.fork(seq)
    cache.extend([seq, fork], [[5, 6, 7, 8], [6, 7, 8, 9]])
    assert [table(cache, one) for one in (seq, fork)] == [[0, 1], [0, 2]]
    cache.commit([seq, fork])
    cache.free([seq, fork])
    other, _ = cache.create([])
    cache.extend([other], 12)
    assert table(cache, other) == [2, 1, 0]


def test_a_list_of_sequences_may_change_between_calls():
    cache = make()
    seqs = [start(cache, [i] * i) for i in range(1, 4)]
    assert cache.cache_seqlens(seqs).tolist() == [1, 2, 3]
    seqs.reverse()
    assert cache.cache_seqlens(seqs).tolist() == [3, 2, 1]
    freed = seqs.pop()
    assert cache.cache_seqlens(seqs).tolist() == [3, 2]
    cache.free(freed)
    assert cache.cache_seqlens(seqs).tolist() == [3, 2]
    cache.free(seqs[0])
    with pytest.raises(ValueError, match="a freed one"):
        cache.cache_seqlens(seqs)
    forks = cache.fork([start(cache, [4] * n) for n in (5, 6)])
    assert forks.pop() is not forks[0]
    assert cache.block_table(forks).shape == (1, 2)


def test_a_copied_page_is_found_by_its_own_tokens():
    cache = make()
    seq = start(cache, [1, 2])
    fork = cache.fork(seq)
    cache.extend([seq, fork], [[3, 4], [5, 6]])
    cache.commit([seq, fork])
    for tokens in ([1, 2, 3, 4], [1, 2, 5, 6]):
        assert cache.create([*tokens, 0])[1] == 4


def test_forks_that_part_are_found_by_all_their_tokens():
    """Once they differ, equal pages of theirs are pages of different prefixes."""
    cache = make()
    seq = start(cache, [1, 2, 3, 4])
    fork = cache.fork(seq)
    for own in ([[5] * 4, [6] * 4], [[7] * 4] * 2):
        cache.extend([seq, fork], own)
        cache.commit([seq, fork])
    for differing, table_of in ((5, table(cache, seq)), (6, table(cache, fork))):
        found, cached = cache.create([1, 2, 3, 4, *[differing] * 4, *[7] * 4, 0])
        assert (cached, table(cache, found)) == (12, table_of)


def test_of_forks_extended_together_one_keeps_the_page():
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5])
    forks = [cache.fork(seq) for _ in range(2)]
    cache.extend([*forks, seq], 1)
    assert [table(cache, one) for one in (*forks, seq)] == [[0, 2], [0, 3], [0, 1]]


def test_each_token_of_many_steps_has_a_slot_on_its_page():
    cache = make()
    seqs = [start(cache, [1, 2, 3, 4, 5]), start(cache, [9])]
    for _ in range(12):
        slots = cache.extend(seqs, [[6], [7]]).tolist()
        lengths, tables = cache.cache_seqlens(seqs).tolist(), cache.block_table(seqs).tolist()
        assert slots == [4 * pages[(n - 1) // 4] + (n - 1) % 4 for n, pages in zip(lengths, tables)]
    assert cache.stats().pages_held == 5 + 4


def test_a_batch_with_room_for_more_tokens_has_none_after_a_truncation():
    cache = make()
    seqs = [start(cache, [1, 2, 3, 4, 5]), start(cache, [9])]
    for token in (6, 7):
        cache.extend(seqs, [[token], [token]])
    cache.truncate(seqs[0], 4)
    cache.extend(seqs, [[8], [8]])
    assert [table(cache, seq) for seq in seqs] == [[0, 1], [2]]
    assert cache.stats().pages_held == 3


def test_truncated_tokens_are_overwritten_and_no_longer_found():
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    cache.truncate(seq, 6)
    assert cache.create([1, 2, 3, 4, 5, 6, 7, 8])[1] == 7
    reader = cache.fork(seq)
    cache.truncate(reader, 4)
    cache.free(cache.create([1, 2, 3, 4, 5, 6, 7, 8])[0])
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    cache.truncate(seq, 6)
    cache.extend([seq], [[9]])
    assert table(cache, seq) == [0, 1]
    assert cache.create([1, 2, 3, 4, 5, 6, 7, 8])[1] == 4


@pytest.mark.parametrize(("kept", "old"), [(4, 8), (6, 4)])
def test_full_pages_after_a_truncation_are_found_by_their_own_tokens(kept, old):
    """And not by those that they had before, of which `old` tokens are still found."""
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    cache.truncate(seq, kept)
    tokens = [*range(1, kept + 1), *[9] * (12 - kept)]
    cache.extend([seq], [tokens[kept:]])
    cache.commit([seq])
    found, cached = cache.create([*tokens, 0])
    assert (cached, table(cache, found)) == (12, table(cache, seq))
    assert cache.create([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 0])[1] == old


def test_after_a_truncation_tokens_go_on_at_the_new_end():
    cache = make()
    seq = start(cache, [1, 2, 3, 4, 5])
    cache.extend([seq], [[6]])
    cache.truncate(seq, 3)
    assert cache.extend([seq], [[9]]).tolist() == [3]
    assert cache.extend([seq], [[9]]).tolist() == [4]


def test_a_batch_is_extended_whole_or_not_at_all():
    cache = make(num_pages=4)
    seqs = [start(cache, [i, i, i]) for i in range(3)]
    before = cache.block_table(seqs).tolist(), cache.cache_seqlens(seqs).tolist(), cache.stats()
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4 are free"):
        cache.extend(seqs, [[1, 1], [1], [1, 1]])
    assert (cache.block_table(seqs).tolist(), cache.cache_seqlens(seqs).tolist(), cache.stats()) == before
    cache.free(seqs[1])
    cache.extend([seqs[0], seqs[2]], [[1, 1], [1, 1]])
    assert cache.stats().pages_free == 0


def test_pages_come_back_in_full():
    cache = make()
    seqs = [start(cache, [1] * n) for n in range(1, 9)]
    seqs += [cache.fork(seq) for seq in seqs]
    for seq in seqs:
        cache.free(seq)
    stats = cache.stats()
    assert (stats.pages_free, stats.pages_held, stats.num_sequences, stats.slots_used) == (16, 0, 0, 0)


def test_copies_read_as_much_as_the_tail():
    """Every layer, with different widths of K and V, in one call."""
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 6, "head_dim_v": 3}
    cache = PagedKVCache(4, 4, **shape, dtype=torch.bfloat16, device=DEVICE)
    cache.k_cache.normal_()
    cache.v_cache.normal_()
    seq, _ = cache.create([])
    cache.extend([seq], 2)
    cache.extend([cache.fork(seq)], 1)
    for caches in (cache.k_cache, cache.v_cache):
        assert torch.equal(caches[:, 0], caches[:, 1])


USES = {
    "extend": lambda cache, seq: cache.extend([seq], 1),
    "fork": lambda cache, seq: cache.fork(seq),
    "fork of a list": lambda cache, seq: cache.fork([seq]),
    "truncate": lambda cache, seq: cache.truncate(seq, 0),
    "free": lambda cache, seq: cache.free(seq),
    "free of a list": lambda cache, seq: cache.free([seq]),
    "commit": lambda cache, seq: cache.commit([seq]),
    "block_table": lambda cache, seq: cache.block_table([seq]),
    "cache_seqlens": lambda cache, seq: cache.cache_seqlens([seq]),
}


@pytest.mark.parametrize("use", USES)
def test_freed_and_foreign_sequences_are_refused(use):
    cache = make()
    freed, foreign = start(cache, [1, 2, 3]), start(make(), [1, 2, 3])
    cache.free(freed)
    before = cache.stats()
    for seq, error, message in [
        (freed, ValueError, "a freed one"),
        (foreign, ValueError, "one of another cache"),
        (0, TypeError, "int"),
    ]:
        with pytest.raises(error, match=f"seqs: expected sequences of this cache, got {message}"):
            USES[use](cache, seq)
    assert cache.stats() == before
    with pytest.raises(ValueError, match="a freed one"):
        len(freed)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([[1]], ValueError, "token_ids: expected one entry for each of 2 sequences, got 1"),
        ([[1], [1.5]], TypeError, "token_ids: expected a flat list of int64 numbers"),
        ([[1], ["a"]], TypeError, "token_ids: expected a flat list of int64 numbers"),
        ([[1], [[1, 2]]], TypeError, "token_ids: expected a flat list of int64 numbers"),
        ([[1], [2**63]], TypeError, "token_ids: expected a flat list of int64 numbers"),
        ([1, -1], ValueError, "token_ids: expected 0 to"),
        (-1, ValueError, "token_ids: expected 0 to"),
        (True, TypeError, "token_ids: expected an int"),
        (torch.tensor([1, 2]), ValueError, r"token_ids: expected shape \(2, n\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, "token_ids: expected one entry for each of 2 sequences"),
        (torch.zeros(2, 1), TypeError, "token_ids: expected a flat list of int64 numbers"),
        ([torch.zeros(2, 1, dtype=torch.int64), 1], TypeError, "token_ids: expected a flat list of int64 numbers"),
        (torch.zeros(2, 1, dtype=torch.int64, device="meta"), ValueError, "token_ids: expected numbers on the host"),
    ],
)
def test_wrong_token_ids_change_nothing(token_ids, error, message):
    cache = make()
    seqs = [start(cache, [1, 2, 3]) for _ in range(2)]
    before = cache.stats()
    with pytest.raises(error, match=message):
        cache.extend(seqs, token_ids)
    assert cache.stats() == before


def test_forms_of_token_ids():
    tokens = [5, 6, 7, 8, 9]
    for form in (tokens, tuple(tokens), np.array(tokens, np.int32), torch.tensor(tokens)):
        cache = make()
        start(cache, tokens)
        assert cache.create(form)[1] == 4
        seq = cache.create([])[0]
        cache.extend([seq], [form])
        cache.free(seq)
        cache = make()
        seq, other = cache.create([])[0], cache.create([])[0]
        cache.extend([other, seq], [3, form])
        cache.commit([seq])
        assert cache.create(tokens)[1] == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache, seq: cache.extend([seq, seq], 1), ValueError, "seqs: expected each sequence once"),
        (lambda cache, seq: cache.free([seq, seq]), ValueError, "seqs: expected each sequence once"),
        (lambda cache, seq: cache.truncate(seq, 4), ValueError, "n: expected at most the sequence's 3 tokens, got 4"),
        (lambda cache, seq: cache.truncate(seq, -1), ValueError, "n: expected 0 to"),
        (lambda cache, seq: cache.create([1], 7), TypeError, "salt: expected str, bytes or None, got int"),
        (lambda cache, seq: cache.create([[1], [2, 3]]), TypeError, "token_ids: expected a flat list of int64"),
        (lambda cache, seq: make(page_size=0), ValueError, "page_size: expected 1 or more"),
        (lambda cache, seq: PagedKVCache(1, num_layers=0, num_kv_heads=1, head_dim=1), ValueError, "num_layers: exp"),
    ],
)
def test_wrong_arguments(call, error, message):
    cache = make()
    seq = start(cache, [1, 2, 3])
    with pytest.raises(error, match=message):
        call(cache, seq)
    assert len(seq) == 3


def test_without_prefix_caching():
    cache = make(prefix_caching=False)
    seq = start(cache, [1, 2, 3, 4, 5])
    assert cache.create([1, 2, 3, 4, 5])[1] == 0
    fork = cache.fork(seq)
    cache.extend([seq, fork], [[6], [6]])
    assert cache.stats().pages_held == 3


@pytest.mark.parametrize("equal_lengths", [False, True], ids=["spread", "in step"])
def test_bookkeeping_of_a_decode_step(equal_lengths, capsys):
    """256 sequences, one token each. In step, all fill their pages and get new ones in the same call.

    CPU time is used, so other processes do not count. The bound is generous, and the time is printed.
    """
    cache = PagedKVCache(256 * 80, num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float16)
    seqs = []
    for i in range(256):
        seq, _ = cache.create([])
        cache.extend([seq], [range(i, i + 900 + (0 if equal_lengths else i))])
        seqs.append(seq)
    cache.commit(seqs)
    times = []
    for step in range(64):
        tokens = [[step]] * 256
        begin = time.process_time()
        cache.extend(seqs, tokens)
        cache.block_table(seqs)
        cache.cache_seqlens(seqs)
        times.append(1e3 * (time.process_time() - begin))
    median = statistics.median(times)
    with capsys.disabled():
        print(f"\ndecode bookkeeping, 256 sequences: median {median:.2f} ms, slowest step {max(times):.2f} ms")
    assert median < 5


def test_made_or_grown_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        cache = make(num_pages=32)
        seq = start(cache, [1, 2, 3])
    seqs = [seq, *(cache.fork(seq) for _ in range(20))]
    cache.extend(seqs[:5], [[4, 5]] * 5)
    with torch.inference_mode():
        cache.extend(seqs[5:8], [[4, 5]] * 3)
    cache.truncate(seq, 2)
    cache.free(seq)


def test_a_batch_without_a_token():
    """Its table has no columns; every call takes it."""
    cache, latents = make(), LatentKVCache(4, 4, num_layers=1, kv_lora_rank=16, qk_rope_head_dim=8, device=DEVICE)
    seqs, others = ([of.create([])[0] for _ in range(3)] for of in (cache, latents))
    keys, q = (cache.k_cache[0], cache.v_cache[0]), torch.randn(3, 1, 1, 2, device=DEVICE)
    out, lse = paged_attention(q, *keys, cache.cache_seqlens(seqs), cache.block_table(seqs), return_lse=True)
    assert not out.any()
    assert (lse == float("-inf")).all()
    q = (torch.randn(3, 1, 2, n, dtype=torch.bfloat16, device=DEVICE) for n in (16, 8))
    places = latents.cache_seqlens(others), latents.block_table(others)
    assert not mla_decode(*q, latents.latent_cache[0], *places, softmax_scale=0.2).any()
    starts = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    k, v = gather_kv_cache(*keys, cache.block_table(seqs), starts, 0)
    assert k.shape == v.shape == (0, 1, 2)


def test_a_cache_keeps_the_gpu_it_was_made_on():
    with FakeTensorMode():
        cache = make(device="cuda")
    assert cache.device == cache.k_cache.device == torch.device("cuda", 0)


def test_host_arrays_stay_on_the_host_under_another_default_device():
    with torch.device("meta"):
        cache = make(device="cpu")
        seq = start(cache, [1, 2, 3, 4, 5])
        cache.extend([seq, cache.fork(seq)], [[6], [7]])
        assert cache.create([1, 2, 3, 4, 5])[1] == 4
        assert cache.stats().pages_held == 3
        assert cache.block_table([seq]).device.type == "cpu"
