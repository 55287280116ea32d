"""BlockPool: counts, the order of reuse, look-up; and a long random run against lists and dicts."""

import random
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from triton_attn import BlockPool, OutOfPages

pytestmark = pytest.mark.oldest


def names(items):
    """Hashes that are short enough to read."""
    return [str(item).encode() for item in items]


def test_pages_are_counted():
    pool = BlockPool(4)
    pages = pool.allocate(3)
    assert sorted(pages.tolist()) == [0, 1, 2]
    pool.register(pages, names("abc"))
    pool.share(pages[:2])
    pool.share(torch.tensor([pages[0], pages[0]]))
    assert [pool.ref_count(page) for page in pages] == [4, 2, 1]
    assert pool.ref_counts(pages).tolist() == [4, 2, 1]
    assert (pool.num_free, pool.num_shared, pool.num_cached) == (1, 2, 0)
    pool.release([pages[0], pages[1], pages[0]])
    pool.release(pages)
    assert [pool.ref_count(page) for page in pages] == [1, 0, 0]
    assert (pool.num_free, pool.num_shared, pool.num_cached) == (3, 0, 2)


def test_too_many_pages_change_nothing():
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(OutOfPages, match="3 pages are needed, 2 of 3 are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.allocate(2).tolist() == [1, 2]
    assert pool.allocate(0).tolist() == []


def test_reuse_is_least_recently_freed_first_and_tail_before_head():
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.register(np.concatenate([first, second]), names("abcdef"))
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6).tolist() == [5, 4, 3, 2, 1, 0]


def test_freed_pages_are_found_until_they_are_reused():
    pool = BlockPool(4)
    pages = pool.allocate(3)
    pool.register(pages, names("abc"))
    pool.release(pages)
    assert pool.lookup(names("abc")).tolist() == [0, 1, 2]
    assert pool.lookup(names("abx")).tolist() == [0, 1]
    assert pool.lookup(names("xbc")).tolist() == []
    pool.allocate(2)  # page 3, which was never used, then the oldest freed one
    assert pool.lookup(names("abc")).tolist() == [0, 1]
    pool.share(pool.lookup(names("ab")))
    assert pool.num_free == 0
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_a_page_that_many_take_back_at_once_is_not_free():
    """Sequences that begin with the same free page, together more than there are pages."""
    for num_sequences in range(1, 10):
        pool = BlockPool(3)
        pages = pool.allocate(3)
        pool.register(pages, names("abc"))
        pool.release([0])
        pool.share([0] * num_sequences)
        pool.release([1])
        assert pool.allocate(1).tolist() == [1]
        assert pool.ref_counts(pages).tolist() == [num_sequences, 1, 1]


@pytest.mark.parametrize("num_pages", [3, 30])  # few and many are put on the list in different ways
def test_a_page_that_two_give_up_at_once_is_free_once(num_pages):
    pool = BlockPool(num_pages)
    pages = pool.allocate(num_pages)
    pool.share(pages)
    pool.release([*pages, *pages])
    assert pool.num_free == num_pages
    assert sorted(pool.allocate(num_pages)) == pages.tolist()


def test_pages_that_cannot_be_found_are_reused_first():
    pool = BlockPool(7)
    pages = pool.allocate(6)
    pool.register(pages[:3], names("abc"))
    pool.release(pages[:4])  # a, b, c and a page that is not full
    assert pool.allocate(2).tolist() == [3, 6]
    assert pool.lookup(names("abc")).tolist() == [0, 1, 2]
    pool.forget([1])  # though it is free
    pool.release([4, 3])
    assert pool.allocate(5).tolist() == [3, 4, 1, 2, 0]


def test_lookup_reads_no_hash_more_than_it_needs():
    pool = BlockPool(2)
    pool.register(pool.allocate(1), names("a"))
    hashes = iter(names("abc"))
    pool.lookup(hashes)
    assert next(hashes) == b"c"


def test_of_two_pages_with_one_hash_the_first_is_found():
    pool = BlockPool(3)
    first, second = pool.allocate(2).tolist()
    pool.register([first, second], names("aa"))
    assert pool.lookup(names("a")).tolist() == [first]
    assert pool.hash_of(second) == b"a"
    pool.register([second, first], names("aa"))  # again
    assert pool.lookup(names("a")).tolist() == [first]
    pool.forget([second])
    assert pool.lookup(names("a")).tolist() == [first]
    pool.forget([first])
    assert pool.lookup(names("a")).tolist() == []
    pool.register([second], names("a"))
    assert pool.lookup(names("a")).tolist() == [second]


@pytest.mark.parametrize("is_free", [False, True])
def test_a_page_is_found_once_the_one_of_the_same_hash_is_gone(is_free):
    pool = BlockPool(4)
    pages = pool.allocate(4)
    pool.register(pages, [b"10", b"20", b"30", b"10"])
    if is_free:
        pool.release([3])
    pool.forget([0])
    assert pool.lookup([b"10", b"20", b"30"]).tolist() == [3, 1, 2]
    assert pool.num_cached == is_free
    pool.release([2, 1] if is_free else [2, 1, 3])
    pool.release([0])
    assert pool.allocate(1).tolist() == [0]
    assert pool.allocate(2).tolist() == [3, 1]
    assert pool.lookup([b"10"]).tolist() == []
    assert not pool._names._twins


def test_of_two_free_pages_with_one_hash_the_one_that_is_not_found_is_reused_first():
    pool = BlockPool(2)
    pages = pool.allocate(2)
    pool.register(pages, names("aa"))
    pool.release(pages)
    assert pool.num_cached == 1
    assert pool.allocate(1).tolist() == [1]
    assert pool.lookup(names("a")).tolist() == [0]


def test_a_page_that_is_found_in_place_of_another_can_be_shared_and_registered_anew():
    pool = BlockPool(3)
    pool.register(pool.allocate(3), names("aaa"))
    pool.register([0], names("b"))
    assert pool.lookup(names("a")).tolist() == [2]  # the last one
    pool.register([1], names("c"))
    pool.release([0, 1, 2])
    pool.share(pool.lookup(names("a")))
    assert [pool.lookup(names(letter)).tolist() for letter in "abc"] == [[2], [0], [1]]
    pool.register([2], names("d"))
    assert pool.lookup(names("a")).tolist() == []
    assert not pool._names._twins


def test_a_page_is_found_under_its_last_hash_only():
    pool = BlockPool(1)
    (page,) = pool.allocate(1)
    pool.register([page], names("a"))
    pool.register([page], names("b"))
    assert pool.lookup(names("a")).tolist() == []
    assert pool.lookup(names("b")).tolist() == [page]


def test_hashes_do_not_pile_up():
    pool = BlockPool(8)
    for i in range(100):
        pages = pool.allocate(8)
        pool.register(pages, names(8 * i + j // 2 for j in range(8)))
        pool.release(pages)
    kept = pool._names
    assert (kept.hash_of.count(None), sum(map(len, kept._page_of)), len(kept._twins)) == (0, 4, 4)
    pool.allocate(8)
    assert (kept.hash_of.count(None), sum(map(len, kept._page_of)), len(kept._twins)) == (8, 0, 0)


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, prefix_caching=False)
    pool.register(pool.allocate(1), names("a"))
    assert pool.lookup(names("a")).tolist() == []


def snapshot(pool):
    return pool.num_free, pool._refs.tolist(), pool._names.hash_of.copy(), pool.lookup(names("ab")).tolist()


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda pool: pool.allocate(-1), ValueError, "n: expected 0 to"),
        (lambda pool: pool.allocate(1.0), TypeError, "n: expected an int"),
        (lambda pool: pool.share([4]), ValueError, "pages: expected page numbers of 0 to 3, got 4 to 4"),
        (lambda pool: pool.share([-1]), ValueError, "pages: expected page numbers of 0 to 3"),
        (lambda pool: pool.share([0.5]), TypeError, "pages: expected page numbers, got dtype float64"),
        (lambda pool: pool.share([[0]]), ValueError, "pages: expected one dimension"),
        (lambda pool: pool.share([0, 3]), ValueError, "free and found, got 3, which is free"),
        (lambda pool: pool.share([0, 1]), ValueError, "free and found, got 1, which is free"),
        (lambda pool: pool.release([0, 1]), ValueError, "pages that are held, got 1, which was released more"),
        (lambda pool: pool.release([0, 0]), ValueError, "pages that are held, got 0, which was released more"),
        (lambda pool: pool.register([1], names("b")), ValueError, "pages that are held, got 1, which is free"),
        (lambda pool: pool.register([0], names("bc")), ValueError, "hashes: expected one for each of 1 pages, got 2"),
        (lambda pool: pool.register([0], "b"), TypeError, "hashes: expected bytes of each page, got str"),
        (lambda pool: pool.register([0], b"b"), TypeError, "hashes: expected bytes of each page, got int"),
        (lambda pool: pool.lookup("ab"), TypeError, "hashes: expected bytes of each page, got str"),
    ],
)
def test_wrong_operations_change_nothing(operation, error, message):
    pool = BlockPool(4)
    pool.register(pool.allocate(2)[:1], names("a"))
    pool.release([1])
    before = snapshot(pool)
    with pytest.raises(error, match=message):
        operation(pool)
    assert snapshot(pool) == before
    assert pool.allocate(3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("num_pages", [-1, 2**31])
def test_wrong_sizes(num_pages):
    with pytest.raises(ValueError, match="num_pages: expected"):
        BlockPool(num_pages)


def in_order(pool):
    """The free list from its head to its end, which must be the reverse of the other way round."""
    free, end = pool._free, pool.num_pages
    walks = []
    for links in (free._next, free._previous):
        pages, page = [], links[end]
        while page != end:
            pages.append(int(page))
            page = links[page]
        walks.append(pages)
    assert walks[0] == walks[1][::-1]
    return walks[0]


class NaivePool:
    def __init__(self, num_pages):
        self.refs = [0] * num_pages
        self.free = list(range(num_pages))
        self.pages_of = {}  # the first of them is found

    def allocate(self, n):
        pages = self.free[:n]
        self.take(pages)
        return pages

    def take(self, pages):
        self.free = [page for page in self.free if page not in pages]
        for page in pages:
            self.refs[page] = 1
        self.forget(pages)

    def put_back(self, pages):
        """At the end of the free list if a page can be found, otherwise at its head. Of repetitions the last counts."""
        pages = list(dict.fromkeys(reversed(pages)))[::-1]
        found = {pages[0] for pages in self.pages_of.values()}
        rest = [page for page in self.free if page not in pages]
        self.free = [page for page in pages if page not in found] + rest + [page for page in pages if page in found]

    def share(self, pages):
        for page in pages:
            self.refs[page] += 1
        self.free = [page for page in self.free if page not in pages]

    def release(self, pages):
        for page in pages:
            self.refs[page] -= 1
        self.put_back([page for page in reversed(pages) if self.refs[page] == 0])

    def register(self, pages, digests):
        for page, digest in zip(pages, digests):
            if page not in self.pages_of.get(digest, []):
                self.unlink(page)
                self.pages_of.setdefault(digest, []).append(page)

    def forget(self, pages):
        for page in pages:
            self.unlink(page)
        self.put_back([page for page in pages if self.refs[page] == 0])

    def unlink(self, page):
        for digest, pages in list(self.pages_of.items()):
            if page not in pages:
                continue
            was_found = page == pages[0]
            pages.remove(page)
            if not pages:
                del self.pages_of[digest]
            elif was_found:
                pages.insert(0, pages.pop())
                self.put_back([pages[0]] if self.refs[pages[0]] == 0 else [])

    def lookup(self, digests):
        pages = []
        for digest in digests:
            if digest not in self.pages_of:
                break
            pages.append(self.pages_of[digest][0])
        return pages


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_as_in_lists_and_dicts(seed):
    rng = random.Random(seed)
    num_pages = rng.choice([5, 40, 300])
    pool, naive, held = BlockPool(num_pages), NaivePool(num_pages), []
    for _ in range(2000):
        n = rng.randint(0, max(1, num_pages // 4))
        kind = rng.choice(["allocate", "take", "share", "release", "register", "forget", "lookup"])
        if kind == "allocate" and n <= len(naive.free):
            pages = naive.allocate(n)
            assert pool.allocate(n).tolist() == pages
            held.append(pages)
        elif kind == "take" and n <= len(naive.free):
            besides = rng.sample(naive.free, rng.randint(0, len(naive.free) - n))
            pages = [page for page in naive.free if page not in besides][:n]
            taken = pool._next_free(n, besides=np.array(besides, np.int64))
            assert taken.tolist() == pages
            naive.take(pages)
            pool._take(taken)
            held.append(pages)
        elif kind == "share":
            digests = names(rng.sample(range(num_pages), n))
            pages = naive.lookup(digests) or (rng.choice(held) if held else [])
            pages = pages * rng.randint(1, 2)
            naive.share(pages)
            pool.share(pages)
            held.append(pages)
        elif kind == "release" and held:
            pages = held.pop(rng.randrange(len(held)))
            naive.release(pages)
            pool.release(torch.tensor(pages, dtype=torch.int32))
        elif kind == "register" and held:
            pages = list(dict.fromkeys(rng.choice(held)))
            digests = names(rng.randrange(num_pages) for _ in pages)
            naive.register(pages, digests)
            pool.register(pages, digests)
        elif kind == "forget":
            pages = rng.sample(range(num_pages), n // 4)
            naive.forget(pages)
            pool.forget(pages)
        else:
            digests = names(rng.sample(range(num_pages), n))
            assert pool.lookup(digests).tolist() == naive.lookup(digests)
        assert pool._refs.tolist() == naive.refs
        assert pool.num_free == len(naive.free)
        assert in_order(pool) == naive.free
    assert pool.allocate(pool.num_free).tolist() == naive.free


class Steps:
    """The most that one call does, whatever the machine: lines of Python, and bytes of memory it holds at once.

    An operation on all pages needs a byte for each of them or more, so does a dict that grows with all its entries.
    """

    def __init__(self):
        self.lines = self.bytes = 0

    def __call__(self, operation, *arguments):
        lines = 0

        def count(frame, event, _):
            nonlocal lines
            lines += event == "line"
            return count

        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        tracer = sys.gettrace()
        sys.settrace(count)
        try:
            return operation(*arguments)
        finally:
            sys.settrace(tracer)
            self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[1] - before)
            self.lines = max(self.lines, lines)


@pytest.fixture
def steps():
    tracemalloc.start()
    yield Steps()
    tracemalloc.stop()


def test_no_call_pays_for_others(steps):
    """64 pages a call: the pool is filled, freed and found again but for its ends, so that long runs of the free list
    are taken out of its middle, and drained."""
    num_pages, per_call = 2**15, 64
    pool = BlockPool(num_pages)
    pages = np.random.default_rng(0).permutation(num_pages)
    batches = pages.reshape(-1, per_call)
    for _ in batches:
        steps(pool.allocate, per_call)
    for batch in batches:
        steps(pool.register, batch, names(batch))
    for batch in batches:
        steps(pool.release, batch)
    for batch in batches[1:-1]:
        steps(pool.share, steps(pool.lookup, names(batch)))
    assert steps(pool.allocate, per_call + 1).tolist() == [*batches[0][::-1], batches[-1][-1]]
    for batch in batches[1:-1]:
        steps(pool.release, batch)
        steps(pool.forget, batch[:8])
    for _ in range(pool.num_free // per_call):
        steps(pool.allocate, per_call)
    print(f"{steps.lines} lines, {steps.bytes} bytes for {per_call} pages")
    assert steps.lines < 20 * per_call
    assert steps.bytes < num_pages
