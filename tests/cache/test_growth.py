"""Tables grow without a pause: what a cache reserves takes addresses and no memory, and nothing moves into it."""

import mmap
import sys

import numpy as np
import pytest
import torch
from small_caches import DEVICE, make, make_step, start

from triton_attn.cache import arrays, rows

pytestmark = pytest.mark.oldest


@pytest.fixture
def moved(monkeypatch):
    """Shapes of the tables of all caches that were left for larger ones, from now on."""
    shapes, grow = [], rows.SequenceRows._grow

    def counted(cache, num_rows, width):
        shapes.append(cache._tables.shape)
        grow(cache, num_rows, width)

    monkeypatch.setattr(rows.SequenceRows, "_grow", counted)
    return shapes


def refuse(monkeypatch, times):
    """The system refuses so many reservations."""
    reserve, left = arrays.reserved_zeros, [times]

    def limited(shape, dtype):
        if left[0]:
            left[0] -= 1
            raise OSError("no addresses")
        return reserve(shape, dtype)

    monkeypatch.setattr(rows, "reserved_zeros", limited)


def many(cache, num_seqs):
    return [start(cache, [7, i]) for i in range(num_seqs)]


def longer(cache, seq, num_tokens):
    for _ in range(num_tokens):
        cache.extend([seq], 1)


def tables_of(cache, seqs):
    return [cache.block_table([seq]).tolist()[0] for seq in seqs]


def test_no_call_moves_anything(moved):
    """10^6 pages: thousands of sequences, forks of them, and one that becomes long."""
    cache = make(num_pages=10**6, page_size=1)
    del moved[:]
    seqs = [cache.create([])[0] for _ in range(3000)]
    cache.extend(seqs, 2)
    for n in (1, 10, 100, 1000, 10_000, 100_000):
        cache.extend(seqs[:1], [n])
    cache.free(seqs[1::2])
    cache.fork(seqs[2::2] * 4)
    cache.fork(seqs[0])
    assert len(seqs[0]) == 111_113
    assert moved == []


@pytest.mark.parametrize("groups", [None, [-1, 8]], ids=["plain", "groups"])
@pytest.mark.parametrize("order", ["rows", "columns", "rows, columns", "columns, rows", "frees"])
def test_tables_that_move_are_the_same(order, groups, moved, monkeypatch):
    """A cache whose first reservation was refused grows, and its sequences have what those of another one have."""
    options = {"num_pages": 512, "page_size": 2} | ({} if groups is None else {"layer_windows": groups})
    roomy = make(**options)
    refuse(monkeypatch, 1)
    tight = make(**options)
    assert tight._tables.shape == (16 * tight._num_groups, 16)
    assert roomy._tables.shape == (512, 512)
    del moved[:]
    found = []
    for cache in (roomy, tight):
        seqs = many(cache, 12)
        for step in order.split(", "):
            if step == "columns":
                longer(cache, seqs[3], 70)
            elif step == "frees":
                longer(cache, seqs[3], 50)
                cache.free(seqs[3:9])
                del seqs[3:9]
                seqs += many(cache, 20)
                longer(cache, seqs[-1], 70)
            else:
                seqs += many(cache, 20)
        seqs += cache.fork(seqs[::2])
        cache.extend(seqs, 3)
        found.append((tables_of(cache, seqs), cache.cache_seqlens(seqs).tolist(), cache.stats()))
        cache.reset_prefix_cache()
        cache.free(seqs)
        assert cache.stats().pages_held == 0
        assert not cache._tables.any()
    assert found[0] == found[1]
    assert moved
    assert (512, 512) not in moved


def test_windows_outgrow_what_is_reserved(moved):
    """A sequence has more columns than the cache has pages where those behind windows are given back."""
    cache = make(num_pages=32, page_size=1, layer_windows=[4, 8])
    seq, _ = cache.create([])
    del moved[:]
    longer(cache, seq, 100)
    tables = cache.block_table([seq])[:, 0]
    assert tables.shape == (2, 100)
    assert tables[:, -4:].unique().numel() == 8
    assert moved == [(32, 32), (32, 64)]


@pytest.mark.parametrize("call", ["create", "fork", "extend", "import", "import a long one"])
def test_a_reservation_that_is_refused_later_changes_nothing(call, monkeypatch):
    refuse(monkeypatch, 1)
    cache = make(num_pages=64)
    seqs = many(cache, 15 if call == "import a long one" else 16)
    before = tables_of(cache, seqs), cache.stats()
    calls = {
        "create": lambda: cache.create([]),
        "fork": lambda: cache.fork(seqs[:1]),
        "extend": lambda: cache.extend(seqs[:1], 80),
        "import": lambda: cache.import_pages(cache.export_pages(seqs[0]), [7, 0]),
        "import a long one": lambda: cache.import_pages([torch.zeros(2, 20, 4, 1, 2, device=DEVICE)] * 2, range(80)),
    }
    refuse(monkeypatch, 1)
    with pytest.raises(OSError, match="no addresses"):
        calls[call]()
    assert (tables_of(cache, seqs), cache.stats()) == before
    calls[call]()
    assert (tables_of(cache, seqs), cache.stats()) != before


def resident(x):
    """Pages of memory that an array of reserved zeros takes."""
    first, num_pages = x.ctypes.data // mmap.PAGESIZE, -(-x.nbytes // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * num_pages), np.uint64)
    return np.count_nonzero(entries >> np.uint64(62))  # in memory or swapped


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says which pages are in memory")
def test_memory_is_what_was_written():
    cache = make(num_pages=8192, page_size=1)
    assert cache._tables.nbytes == 4 * 8192**2
    assert resident(cache._tables) == 0
    seqs = [cache.create([])[0] for _ in range(100)]
    cache.extend(seqs, 2)
    assert 0 < resident(cache._tables) <= 100
    cache.extend(seqs[:1], [4096])
    assert resident(cache._tables) <= 100 + 4
    make_step(cache, 60, 2048)  # of 120 sequences
    assert resident(cache._tables) == 120 * 2 + 2 + 1  # and the rest of the first
