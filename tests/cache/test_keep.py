"""keep: of the drafts of a tree those of one path stay, and follow the tokens before them."""

import pytest
import torch

from triton_attn import LatentKVCache, OutOfPages, PagedKVCache

PROMPT = list(range(6))


def make_cache(num_pages=8, **options):
    return PagedKVCache(num_pages, 4, num_layers=2, num_kv_heads=1, head_dim=2, device="cpu", **options)


def fill(cache, seq, first=0):
    """The keys of the token at position p are p, those of the second layer 100 more; values are negative."""
    slots = slots_of(cache, seq)
    for layer in range(2):
        for tensor, sign in ((cache.k_cache, 1), (cache.v_cache, -1)):
            rows = tensor[layer].flatten(0, 1)
            content = sign * (torch.arange(len(seq)) + 100 * layer)
            rows[slots[first:]] = content[first:, None, None].expand(-1, 1, 2).to(tensor.dtype)


def slots_of(cache, seq):
    table, positions = cache.block_table([seq])[0].long(), torch.arange(len(seq))
    return table[positions // cache.page_size] * cache.page_size + positions % cache.page_size


def keys(cache, seq, layer=0):
    slots = slots_of(cache, seq)
    content = cache.k_cache[layer].float().flatten(0, 1)[slots, 0, 0]
    assert torch.equal(cache.v_cache[layer].float().flatten(0, 1)[slots, 0, 1], -content)
    return content.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_path_follows_the_context(dtype):
    cache = make_cache(dtype=dtype)
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [PROMPT])
    cache.extend([seq], [5])
    fill(cache, seq)
    cache.keep([seq], 5, [[0, 2, 4]], [[50, 51, 52]])
    assert keys(cache, seq) == [*PROMPT, 6, 8, 10]
    as_stored = torch.tensor([100.0, 101, 102, 103, 104, 105, 106, 108, 110]).to(dtype).float().tolist()
    assert keys(cache, seq, layer=1) == as_stored
    assert cache.stats().num_tokens == 9
    assert cache.stats().pages_held == 3
    cache.commit([seq])
    _, found = cache.create([*PROMPT, 50, 51, 52])
    assert found == 8  # the second page has two accepted drafts


def test_sources_and_targets_may_overlap():
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [11])
    fill(cache, seq)
    cache.keep([seq], 5, [[4, 3, 0, 1]])
    assert keys(cache, seq) == [*PROMPT, 10, 9, 6, 7]


def test_nothing_is_kept():
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [11])
    cache.keep([seq], 5, [[]])
    assert len(seq) == 6
    assert cache.stats().pages_held == 2


def test_drafts_are_not_found_by_others():
    """Keys of drafts that were extended by number have no name, also after they moved without ids."""
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [PROMPT])
    cache.extend([seq], [6])
    cache.keep([seq], 6, [[1, 3]])
    cache.commit([seq])
    assert cache.create([*PROMPT, 0, 0, 1])[1] == 4


def test_pages_that_others_found_are_found_by_what_stays():
    """Drafts with ids fill a page, and another path of them fills it again."""
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [[*PROMPT, 6, 7]])
    cache.commit([seq])
    cache.keep([seq], 2, [[1, 0]], [[7, 6]])
    cache.commit([seq])
    assert [cache.create([*PROMPT, *ids, 9])[1] for ids in ([6, 7], [7, 6])] == [4, 8]


def test_a_fork_keeps_what_it_shares():
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [11])
    fill(cache, seq)
    fork = cache.fork(seq)
    cache.keep([seq], 5, [[1, 2]])
    assert keys(cache, seq) == [*PROMPT, 7, 8]
    assert keys(cache, fork) == list(range(11))
    full = make_cache(num_pages=3)
    seq, _ = full.create(PROMPT)
    full.extend([seq], [11])
    fill(full, seq)
    fork = full.fork(seq)
    with pytest.raises(OutOfPages):
        full.keep([seq], 5, [[1, 2]])
    assert keys(full, seq) == keys(full, fork) == list(range(11))


def test_a_step_sees_the_new_page():
    """The block table of a step is updated where a shared page was copied."""
    cache = make_cache()
    step = cache.step(2, 32, 16)
    seq, _ = cache.create(PROMPT)
    step.extend([seq], [11])
    fork = cache.fork(seq)
    cache.keep([seq], 5, [[1, 2]])
    step.extend([seq], [1])
    assert torch.equal(step.block_table[0, :3], cache.block_table([seq])[0])
    cache.free([seq, fork])


def test_groups_of_layers():
    """A path moves on the pages of each group; the group with a window has given back what is before them."""
    cache = PagedKVCache(24, 4, num_layers=2, num_kv_heads=1, head_dim=1, layer_windows=[-1, 5], device="cpu")
    seq, _ = cache.create(PROMPT)
    for start, ids in ((0, [*PROMPT, 6, 7, 8, 9]), (10, [10, 11, 12]), (13, 7)):
        slots = cache.extend([seq], [ids])
        for group, layer, _ in cache.layers:
            new = torch.arange(start, start + slots.shape[1]) + 100 * group
            cache.k_cache[layer].flatten()[slots[group]] = new.to(cache.k_cache.dtype)
    before = cache.block_table([seq]).tolist()
    assert before[1][0][:2] == [0, 0]  # given back
    fork = cache.fork(seq)
    cache.keep([seq], 7, [[0, 2, 4, 5]], [[90, 92, 94, 95]])
    assert len(seq) == 17
    for group, layer, _ in cache.layers:
        table = cache.block_table([seq])[group, 0]
        first = 8 if group else 0
        positions = torch.arange(first, 17)
        read = cache.k_cache[layer].flatten()[table[positions // 4].long() * 4 + positions % 4]
        assert read.tolist() == [100 * group + i for i in [*range(first, 14), 15, 17, 18]]
    assert cache.block_table([fork]).tolist() == before
    cache.commit([seq])
    tokens = [*range(13), 90, 92, 94, 95]
    assert cache.create([*tokens, 1])[1] == 16


def test_drafts_that_were_given_back_do_not_move():
    """Drafts of several steps, of which a small window has given back the first."""
    cache = PagedKVCache(24, 4, num_layers=2, num_kv_heads=1, head_dim=1, layer_windows=[-1, 1], device="cpu")
    seq, _ = cache.create([])
    cache.extend([seq], [[0, 1, 2, 3]])
    for _ in range(10):
        cache.extend([seq], [1])
    before = cache.stats(), cache.block_table([seq]).tolist()
    assert before[1][1][0][:3] == [0, 0, 0]
    for path, message in (
        ([9, 1], "accepted: expected paths that leave 0 tokens, or at least 13"),
        ([*range(1, 10), 0], "accepted: expected drafts from position 12 on: earlier pages were given back, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.keep([seq], 10, [path])
        assert (cache.stats(), cache.block_table([seq]).tolist()) == before
    cache.keep([seq], 10, [[*range(8), 9, 8]], [list(range(4, 14))])  # what moves is there
    cache.commit([seq])
    assert len(seq) == 14


def test_old_weights_are_not_found_after_a_reset():
    """Drafts at the begin of a sequence were computed before it; ids given later are no reason to find them."""
    cache = make_cache()
    seq, _ = cache.create([])
    cache.extend([seq], [4])
    cache.reset_prefix_cache()
    cache.keep([seq], 4, [[0, 1, 2, 3]], [[0, 1, 2, 3]])
    cache.commit([seq])
    assert cache.create([0, 1, 2, 3, 4])[1] == 0
    cache.truncate(seq, 0)
    cache.extend([seq], [PROMPT])
    cache.commit([seq])
    assert cache.create(PROMPT)[1] == 4  # what is written after the reset is


def test_latent_vectors():
    cache = LatentKVCache(4, 4, num_layers=1, kv_lora_rank=3, qk_rope_head_dim=2, device="cpu")
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [9])
    cache.latent_cache[0].flatten(0, 1)[slots_of(cache, seq)] = torch.arange(9.0)[:, None].bfloat16()
    cache.keep([seq], 3, [[2]])
    assert cache.latent_cache[0].flatten(0, 1)[slots_of(cache, seq), 4].tolist() == [*PROMPT, 8]


def test_errors():
    cache = make_cache()
    seq, _ = cache.create(PROMPT)
    cache.extend([seq], [6])
    for arguments, error, message in [
        ((7, [[0]]), ValueError, "num_drafts: expected at most the tokens of each sequence, got 7"),
        ((-1, [[0]]), ValueError, "num_drafts: expected"),
        ((2, [[2]]), ValueError, r"accepted: expected different indices of 0 to 1, got \[2\]"),
        ((2, [[1, 1]]), ValueError, r"accepted: expected different indices of 0 to 1, got \[1, 1\]"),
        ((2, [[0], [1]]), ValueError, "accepted: expected one entry for each of 1 sequences, got 2"),
        ((2, [[0]], [[5, 6]]), ValueError, "token_ids: expected an id for each of 1 accepted tokens, got 2"),
        ((2, [[0]], []), ValueError, "token_ids: expected one entry for each of 1 sequences, got 0"),
        ((2, [0]), TypeError, "accepted: expected a flat list"),
    ]:
        with pytest.raises(error, match=message):
            cache.keep([seq], *arguments)
        assert len(seq) == 6
    with pytest.raises(ValueError, match="each sequence once"):
        cache.keep([seq, seq], 1, [[], []])
