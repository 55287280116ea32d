"""Pages by number: who counts on them, which are free, which can be found by what they hold."""

import torch

from .._host.checks import check_bool, check_length, fail
from .arrays import zeros


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed: free a sequence and call again."""


class BlockPool:
    """Reference counts and a least-recently-used free list over `num_pages` pages.

    A page is held while its count is above 0. A page whose count falls to 0 is free, but keeps what it holds until it
    is allocated again, the longest free first; until then `share` takes it back. With `prefix_caching`, pages can be
    registered under a hash of what they hold, and found by it while held or free.

    Every operation takes a batch and costs O(1) per page, amortised, at any `num_pages`: a few operations on arrays,
    and a loop only over the hashes that are registered, looked up, or dropped because their page is reused. A failed
    operation changes nothing. Not thread-safe.

    Args:
        num_pages: pages 0 to num_pages - 1. All are free at first.
        prefix_caching: False makes `register` do nothing, so that `lookup` finds nothing.

    Page numbers are taken as a list, array or host tensor of integers, and returned as int64 host tensors.
    """

    def __init__(self, num_pages, prefix_caching=True):
        num_pages = check_length("num_pages", num_pages)
        self.num_pages = num_pages
        self.prefix_caching = check_bool("prefix_caching", prefix_caching)
        self.num_free = num_pages
        self._refs = zeros(num_pages, dtype=torch.int32)
        # The free list is a queue that is never searched: an entry counts only while _position of its page points at
        # it. Taking a page out of the middle clears its position; the entry is skipped, or dropped by _compact.
        self._queue = zeros(2 * num_pages)
        self._position = zeros(num_pages)
        self._queue[:num_pages] = self._position.copy_(torch.arange(num_pages, device="cpu"))
        self._head, self._tail = 0, num_pages
        # _page_of is exact: its values are the pages that are marked in _registered, each under its _hash_of.
        self._registered = zeros(num_pages, dtype=torch.bool)
        self._page_of = {}
        self._hash_of = {}

    def allocate(self, n):
        """Take the n pages that have been free longest; what they held can no longer be found.

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

    def share(self, pages):
        """Count one more reference to each page; a page listed twice counts twice.

        Raises: ValueError, where a page does not exist, or is free and not registered: what it holds is nobody's.
        """
        pages = self._check_pages(pages)
        is_free = self._refs[pages] == 0
        lost = is_free & ~self._registered[pages]
        if lost.any():
            fail("pages", "pages that are held, or free and registered", f"{int(pages[lost][0])}, which is free")
        revived = self._distinct(pages[is_free])
        self._position[revived] = -1
        self.num_free -= revived.numel()
        self._count(pages, 1)

    def release(self, pages):
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
        self._push(pages[references == 0].flip(0))

    def ref_count(self, page):
        """References to a page; 0: free."""
        return int(self._refs[self._check_pages([page])])

    def ref_counts(self, pages):
        """References to each page: int32, one for each."""
        return self._refs[self._check_pages(pages)]

    def register(self, pages, hashes):
        """Let held pages be found by hashes of what they hold; of pages with one hash, the first stays the one found.

        Raises: ValueError, where a page is free, or the numbers of pages and hashes differ.
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
            self._unlink(page)
            self._hash_of[page] = digest
            self._page_of.setdefault(digest, page)
        found = [self._page_of.get(self._hash_of[page]) == page for page in numbers]
        self._registered[pages] = torch.tensor(found, dtype=torch.bool, device="cpu")

    def forget(self, pages):
        """Let pages, about to be overwritten, no longer be found."""
        self._forget(self._check_pages(pages))

    def lookup(self, hashes):
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

    def hash_of(self, page):
        """The hash that a page was last registered under, whether it is the one found by it or not."""
        return self._hash_of[page]

    @property
    def num_shared(self):
        """Pages with more than one reference; O(num_pages)."""
        return int((self._refs > 1).sum())

    @property
    def num_cached(self):
        """Free pages that can be found by their hash; O(num_pages)."""
        return int((self._registered & (self._refs == 0)).sum())

    def _count(self, pages, by):
        self._refs.index_add_(0, pages, torch.full_like(pages, by, dtype=torch.int32))

    def _forget(self, pages):
        registered = self._registered[pages]
        if registered.any():
            for page in pages[registered].tolist():
                self._unlink(page)
            self._registered[pages] = False

    def _unlink(self, page):
        """Drop the hash that a page is found by, if it is."""
        digest = self._hash_of.get(page)
        if digest is not None and self._page_of.get(digest) == page:
            del self._page_of[digest]

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

    def _push(self, pages):
        """Add pages, none of them free, at the end of the free list."""
        if self._tail + pages.numel() > self._queue.numel():
            self._compact()
        pages = self._distinct(pages)
        end = self._tail + pages.numel()
        self._queue[self._tail : end] = pages
        self._position[pages] = torch.arange(self._tail, end, device="cpu")
        self._tail = end
        self.num_free += pages.numel()

    def _compact(self):
        """Move the free list to the start of the queue: O(num_pages), once in at least num_pages releases."""
        live = self._queue[self._head : self._tail][self._is_live(self._head, self._tail)]
        self._head, self._tail = 0, live.numel()
        self._queue[: self._tail] = live
        self._position[live] = torch.arange(self._tail, device="cpu")

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
