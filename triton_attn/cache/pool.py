"""Pages by number: who counts on them, which are free, which can be found by what they hold."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._host.checks import check_bool, check_length, fail
from .arrays import from_list, zeros

Pages: TypeAlias = Tensor | Sequence[int]


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed: free a sequence and call again."""


class BlockPool:
    """Reference counts and a least-recently-used free list over `num_pages` pages.

    A page is held while its count is above 0. With `prefix_caching`, pages can be registered under a hash of what they
    hold, and found by it while held or free. A page whose count falls to 0 is free. If it can be found, it keeps what
    it holds until it is allocated again, and until then `share` takes it back. `allocate` takes pages that cannot be
    found first, since nothing is lost with them, then those that have been free longest.

    Every operation takes a batch and costs O(1) per page, amortised, at any `num_pages`: a few operations on arrays,
    and a loop only over the hashes that are registered, looked up, or dropped because their page is reused. A failed
    operation changes nothing. Not thread-safe.

    Args:
        num_pages: pages 0 to num_pages - 1. All are free at first.
        prefix_caching: False makes `register` do nothing, so that `lookup` finds nothing.

    Page numbers are taken as a list, array or host tensor of integers, and returned as int64 host tensors.
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        num_pages = check_length("num_pages", num_pages)
        self.num_pages = num_pages
        self.prefix_caching = check_bool("prefix_caching", prefix_caching)
        self.num_free = num_pages
        self._refs = zeros(num_pages, dtype=torch.int32)
        # The free list is a queue that is never searched: an entry counts only while _position of its page points at
        # it. Taking a page out of the middle clears its position; the entry is skipped, or dropped by _compact. Pages
        # that can be found are put at its end, others at its head, so that all of these come before all of those.
        self._queue = zeros(3 * num_pages)
        self._position = zeros(num_pages)
        self._queue[:num_pages] = self._position.copy_(torch.arange(num_pages, device="cpu"))
        self._head, self._tail = 0, num_pages
        # _hash_of has the pages that are marked in _registered; _page_of those marked in _found, one for each hash, and
        # _twins the others of the same hash. A hash without others is not in _twins.
        self._registered = zeros(num_pages, dtype=torch.bool)
        self._found = zeros(num_pages, dtype=torch.bool)
        self._hash_of = {}
        self._page_of = {}
        self._twins = {}

    def allocate(self, n: int) -> Tensor:
        """Take n free pages, those that cannot be found before those that can, of these the longest free first.

        What they held can no longer be found in them.

        Returns: (n,). Raises: OutOfPages.
        """
        n = check_length("n", n)
        if n > self.num_free:
            raise OutOfPages(f"{n} pages are needed, {self.num_free} of {self.num_pages} are free")
        pages = self._pop(n)
        self._position[pages] = -1
        self._refs[pages] = 1
        self._forget(pages)
        self.num_free -= n
        return pages

    def share(self, pages: Pages) -> None:
        """Count one more reference to each page; a page listed twice counts twice.

        Raises: ValueError, where a page does not exist, or is free and cannot be found: what it holds is nobody's.
        """
        pages = self._check_pages(pages)
        is_free = self._refs[pages] == 0
        lost = is_free & ~self._found[pages]
        if lost.any():
            fail("pages", "pages that are held, or free and found", f"{int(pages[lost][0])}, which is free")
        revived = self._distinct(pages[is_free])
        self._position[revived] = -1
        self.num_free -= revived.numel()
        self._count(pages, 1)

    def release(self, pages: Pages) -> None:
        """Count one reference less to each page, given from the head of a sequence to its tail.

        Of the pages that become free, the last listed is the first to be reused: a prefix is worth more than what
        follows it. Raises: ValueError, where a page does not exist or has fewer references than are released.
        """
        pages = self._check_pages(pages)
        self._count(pages, -1)
        references = self._refs[pages]
        if (references < 0).any():
            self._count(pages, 1)
            excess = int(pages[references < 0][0])
            fail("pages", "pages that are held", f"{excess}, which was released more often than taken")
        freed = pages[references == 0].flip(0)
        found = self._found[freed]
        self.num_free += self._push(freed[found]) + self._push(freed[~found], at_head=True)

    def ref_count(self, page: int) -> int:
        """References to a page; 0: free."""
        return int(self._refs[self._check_pages([page])])

    def ref_counts(self, pages: Pages) -> Tensor:
        """References to each page: int32, one for each."""
        return self._refs[self._check_pages(pages)]

    def register(self, pages: Pages, hashes: Sequence[bytes]) -> None:
        """Let held pages be found by hashes of what they hold.

        Of pages with one hash, the first stays the one found; once it is reused or forgotten, the last of the others
        is. Raises: ValueError, where a page is free, or the numbers of pages and hashes differ.
        """
        pages = self._check_pages(pages)
        if pages.numel() != len(hashes):
            fail("hashes", f"one for each of {pages.numel()} pages", len(hashes))
        is_free = self._refs[pages] == 0
        if is_free.any():
            fail("pages", "pages that are held", f"{int(pages[is_free][0])}, which is free")
        if not self.prefix_caching:
            return
        numbers = pages.tolist()
        for page, digest in zip(numbers, hashes):
            if self._hash_of.get(page) == digest:
                continue
            self._unlink(page)
            self._hash_of[page] = digest
            if self._page_of.setdefault(digest, page) != page:
                self._twins.setdefault(digest, {})[page] = None
        self._registered[pages] = True
        found = [self._page_of[self._hash_of[page]] == page for page in numbers]
        self._found[pages] = torch.tensor(found, dtype=torch.bool, device="cpu")

    def forget(self, pages: Pages) -> None:
        """Let pages, about to be overwritten, no longer be found; those that are free are the next to be reused."""
        pages = self._check_pages(pages)
        self._forget(pages)
        self._push(pages[self._refs[pages] == 0], at_head=True)

    def lookup(self, hashes: Iterable[bytes]) -> Tensor:
        """The pages of the longest prefix of `hashes` that is registered; no reference is taken.

        Args:
            hashes: an iterable, read only as far as pages are found.
        """
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return torch.tensor(pages, dtype=torch.int64, device="cpu")

    def hash_of(self, page: int) -> bytes:
        """The hash that a page is registered under, whether it is the one found by it or not."""
        return self._hash_of[page]

    @property
    def num_shared(self) -> int:
        """Pages with more than one reference; O(num_pages)."""
        return int((self._refs > 1).sum())

    @property
    def num_cached(self) -> int:
        """Free pages that can be found by their hash; O(num_pages)."""
        return int((self._found & (self._refs == 0)).sum())

    def _count(self, pages, by):
        self._refs.index_add_(0, pages, torch.full_like(pages, by, dtype=torch.int32))

    def _forget(self, pages):
        registered = self._registered[pages]
        if registered.any():
            pages = pages[registered]
            for page in pages.tolist():
                self._unlink(page)
            self._registered[pages] = False
            self._found[pages] = False

    def _unlink(self, page):
        """Drop the hash of a page, if it has one; if it was found by it, another of this hash is from now on."""
        digest = self._hash_of.pop(page, None)
        if digest is None:
            return
        twins = self._twins.get(digest, {})
        if self._page_of[digest] != page:
            del twins[page]
        elif twins:
            twin, _ = twins.popitem()
            self._page_of[digest] = twin
            self._found[twin] = True
            if self._refs[twin] == 0:
                self._push(from_list([twin]))
        else:
            del self._page_of[digest]
        if not twins:
            self._twins.pop(digest, None)

    def _pop(self, n):
        """The first n pages of the free list."""
        taken = []
        width = max(n, 64)
        while n:
            start, end = self._head, min(self._head + width, self._tail)
            entries = self._queue[start:end]
            live = self._is_live(start, end).nonzero().squeeze(1)[:n]
            taken.append(entries[live])
            n -= live.numel()
            self._head = end if n else start + int(live[-1]) + 1
            width *= 2
        return torch.cat(taken) if taken else self._queue[:0]

    def _push(self, pages, at_head=False):
        """Put pages at one end of the free list, wherever in it they were; returns their number without repetitions."""
        if not pages.numel():
            return 0
        room = self._head if at_head else self._queue.numel() - self._tail
        if pages.numel() > room:
            self._compact()
        pages = self._distinct(pages)
        count = pages.numel()
        start = self._head - count if at_head else self._tail
        self._queue[start : start + count] = pages
        self._position[pages] = torch.arange(start, start + count, device="cpu")
        if at_head:
            self._head = start
        else:
            self._tail += count
        return count

    def _compact(self):
        """Move the free list to the middle of the queue: O(num_pages), once in at least num_pages entries."""
        live = self._queue[self._head : self._tail][self._is_live(self._head, self._tail)]
        self._head, self._tail = self.num_pages, self.num_pages + live.numel()
        self._queue[self._head : self._tail] = live
        self._position[live] = torch.arange(self._head, self._tail, device="cpu")

    def _is_live(self, start, end):
        """Which entries of the queue from start to end are pages of the free list."""
        return self._position[self._queue[start:end]] == torch.arange(start, end, device="cpu")

    def _distinct(self, pages):
        """Pages without repetitions; overwrites their positions. Of several writes to one place, one stands."""
        order = torch.arange(pages.numel(), device="cpu")
        self._position[pages] = order
        return pages[self._position[pages] == order]

    def _check_pages(self, pages):
        pages = torch.as_tensor(pages, device="cpu")
        if pages.ndim != 1:
            fail("pages", "one dimension", f"shape {tuple(pages.shape)}")
        if pages.numel() == 0:
            return pages.to(torch.int64)
        if pages.dtype not in (torch.int64, torch.int32):
            fail("pages", "page numbers", f"dtype {pages.dtype}", TypeError)
        lowest, highest = map(int, pages.aminmax())
        if lowest < 0 or highest >= self.num_pages:
            fail("pages", f"page numbers of 0 to {self.num_pages - 1}", f"{lowest} to {highest}")
        return pages.to(torch.int64)
