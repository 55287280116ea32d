"""BlockPool: counts, the order of reuse, what can be found; and a long random run against lists and dicts."""

import random

import pytest
import torch

from triton_attn import BlockPool, OutOfPages

pytestmark = pytest.mark.oldest


def test_pages_are_counted():
    pool = BlockPool(4)
    pages = pool.allocate(3)
    assert sorted(pages.tolist()) == [0, 1, 2]
    pool.register(pages, "abc")
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
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6).tolist() == [5, 4, 3, 2, 1, 0]


def test_freed_pages_are_found_until_they_are_reused():
    pool = BlockPool(4)
    pages = pool.allocate(3)
    pool.register(pages, ["a", "b", "c"])
    pool.release(pages)
    assert pool.lookup("abc").tolist() == [0, 1, 2]
    assert pool.lookup("abx").tolist() == [0, 1]
    assert pool.lookup("xbc").tolist() == []
    pool.allocate(2)  # page 3, which was never used, then the tail
    assert pool.lookup("abc").tolist() == [0, 1]
    pool.share(pool.lookup("ab"))
    assert pool.num_free == 0
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_lookup_reads_no_hash_more_than_it_needs():
    pool = BlockPool(2)
    pool.register(pool.allocate(1), ["a"])
    hashes = iter("abc")
    pool.lookup(hashes)
    assert next(hashes) == "c"


def test_of_two_pages_with_one_hash_the_first_is_found():
    pool = BlockPool(3)
    first, second = pool.allocate(2).tolist()
    pool.register([first, second], "aa")
    assert pool.lookup("a").tolist() == [first]
    assert pool.hash_of(second) == "a"
    pool.forget([first])
    assert pool.lookup("a").tolist() == []
    pool.register([second], "a")
    assert pool.lookup("a").tolist() == [second]


def test_a_page_is_found_under_its_last_hash_only():
    pool = BlockPool(1)
    (page,) = pool.allocate(1)
    pool.register([page], "a")
    pool.register([page], "b")
    assert pool.lookup("a").tolist() == []
    assert pool.lookup("b").tolist() == [page]


def test_hashes_do_not_pile_up():
    pool = BlockPool(8)
    for i in range(100):
        pages = pool.allocate(8)
        pool.register(pages, range(8 * i, 8 * i + 8))
        pool.release(pages)
    assert len(pool._page_of) == len(pool._hash_of) == 8


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, prefix_caching=False)
    pool.register(pool.allocate(1), "a")
    assert pool.lookup("a").tolist() == []


def snapshot(pool):
    return pool.num_free, pool._refs.tolist(), pool._registered.tolist(), pool.lookup("ab").tolist()


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda pool: pool.allocate(-1), ValueError, "n: expected 0 to"),
        (lambda pool: pool.allocate(1.0), TypeError, "n: expected an int"),
        (lambda pool: pool.share([4]), ValueError, "pages: expected page numbers of 0 to 3, got 4 to 4"),
        (lambda pool: pool.share([-1]), ValueError, "pages: expected page numbers of 0 to 3"),
        (lambda pool: pool.share([0.5]), TypeError, "pages: expected page numbers, got dtype torch.float32"),
        (lambda pool: pool.share([[0]]), ValueError, "pages: expected one dimension"),
        (lambda pool: pool.share([0, 3]), ValueError, "free and registered, got 3, which is free"),
        (lambda pool: pool.share([0, 1]), ValueError, "free and registered, got 1, which is free"),
        (lambda pool: pool.release([0, 1]), ValueError, "pages that are held, got 1, which was released more"),
        (lambda pool: pool.release([0, 0]), ValueError, "pages that are held, got 0, which was released more"),
        (lambda pool: pool.register([1], "b"), ValueError, "pages that are held, got 1, which is free"),
        (lambda pool: pool.register([0], "bc"), ValueError, "hashes: expected one for each of 1 pages, got 2"),
    ],
)
def test_wrong_operations_change_nothing(operation, error, message):
    pool = BlockPool(4)
    pool.register(pool.allocate(2)[:1], "a")
    pool.release([1])
    before = snapshot(pool)
    with pytest.raises(error, match=message):
        operation(pool)
    assert snapshot(pool) == before
    assert pool.allocate(3).tolist() == [2, 3, 1]


@pytest.mark.parametrize("num_pages", [-1, 2**31])
def test_wrong_sizes(num_pages):
    with pytest.raises(ValueError, match="num_pages: expected"):
        BlockPool(num_pages)


class NaivePool:
    def __init__(self, num_pages):
        self.refs = [0] * num_pages
        self.free = list(range(num_pages))
        self.page_of = {}

    def allocate(self, n):
        pages, self.free = self.free[:n], self.free[n:]
        for page in pages:
            self.refs[page] = 1
        self.page_of = {digest: page for digest, page in self.page_of.items() if page not in pages}
        return pages

    def share(self, pages):
        for page in pages:
            self.refs[page] += 1
        self.free = [page for page in self.free if page not in pages]

    def release(self, pages):
        for page in pages:
            self.refs[page] -= 1
        self.free += [page for page in reversed(pages) if self.refs[page] == 0]

    def register(self, pages, digests):
        for page, digest in zip(pages, digests):
            self.page_of = {d: p for d, p in self.page_of.items() if p != page}
            self.page_of.setdefault(digest, page)

    def lookup(self, digests):
        pages = []
        for digest in digests:
            if digest not in self.page_of:
                break
            pages.append(self.page_of[digest])
        return pages


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_as_in_lists_and_dicts(seed):
    """Many more releases than pages, so that the queue of free pages is compacted time and again."""
    rng = random.Random(seed)
    num_pages = rng.choice([5, 40, 300])
    pool, naive, held = BlockPool(num_pages), NaivePool(num_pages), []
    for _ in range(2000):
        n = rng.randint(0, max(1, num_pages // 4))
        kind = rng.choice(["allocate", "share", "release", "register", "lookup"])
        if kind == "allocate" and n <= len(naive.free):
            pages = naive.allocate(n)
            assert pool.allocate(n).tolist() == pages
            held.append(pages)
        elif kind == "share":
            digests = rng.sample(range(num_pages), n)
            pages = naive.lookup(digests) or (rng.choice(held) if held else [])
            naive.share(pages)
            pool.share(pages)
            held.append(pages)
        elif kind == "release" and held:
            pages = held.pop(rng.randrange(len(held)))
            naive.release(pages)
            pool.release(torch.tensor(pages, dtype=torch.int32))
        elif kind == "register" and held:
            pages = rng.choice(held)
            digests = [rng.randrange(num_pages) for _ in pages]
            naive.register(pages, digests)
            pool.register(pages, digests)
        else:
            digests = rng.sample(range(num_pages), n)
            assert pool.lookup(digests).tolist() == naive.lookup(digests)
        assert pool._refs.tolist() == naive.refs
        assert pool.num_free == len(naive.free)
    assert pool.allocate(pool.num_free).tolist() == naive.free
