"""Pages by number: who counts on them, which are free, which can be found by what they hold."""

import numpy as np

from .._host.checks import check_length, fail


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed: free a sequence and call again."""


class BlockPool:
    """Reference counts and a least-recently-used free list over `num_pages` pages.

    A page is held while its count is above 0. A page whose count falls to 0 is free, but keeps what it holds until it
    is allocated again, the longest free first; until then `share` takes it back. With `prefix_caching`, pages can be
    registered under a hash of what they hold, and found by it while held or free.

    Every operation takes a batch and costs O(1) per page, amortised, at any `num_pages`: arrays, no loop over pages,
    except over the hashes of `register` and `lookup`. A failed operation changes nothing. Not thread-safe.

    Args:
        num_pages: pages 0 to num_pages - 1, at most 2**30. All are free at first.
        prefix_caching: False makes `register` and `lookup` do nothing.
    """

    def __init__(self, num_pages, prefix_caching=True):
        check_length("num_pages", num_pages)
        if num_pages > 2**30:
            fail("num_pages", "at most 2**30", num_pages)
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        self.num_free = num_pages
        self._refs = np.zeros(num_pages, np.int32)
        # The free list is a queue that is never searched: an entry counts only while _position of its page points at
        # it. Taking a page out of the middle clears its position; the entry is skipped, or dropped by _compact.
        self._queue = np.empty(2 * num_pages, np.int32)
        self._queue[:num_pages] = np.arange(num_pages, dtype=np.int32)
        self._position = np.arange(num_pages, dtype=np.int32)
        self._head, self._tail = 0, num_pages
        # _page_of may hold hashes of pages that were reused since: only _registered says what can be found. Each page
        # stands in it at most once, under its last hash.
        self._registered = np.zeros(num_pages, bool)
        self._page_of = {}
        self._hash_of = {}

    def allocate(self, n):
        """Take the n pages that have been free longest; what they held can no longer be found.

        Returns: int32 array (n,). Raises: OutOfPages.
        """
        check_length("n", n)
        if n > self.num_free:
            raise OutOfPages(f"{n} pages are needed, {self.num_free} of {self.num_pages} are free")
        pages = self._pop(n)
        self._position[pages] = -1
        self._refs[pages] = 1
        self._registered[pages] = False
        self.num_free -= n
        return pages

    def share(self, pages):
        """Count one more reference to each page; a page listed twice counts twice.

        Raises: ValueError, where a page does not exist, or is free and not registered: what it holds is nobody's.
        """
        pages = self._check_pages(pages)
        lost = (self._refs[pages] == 0) & ~self._registered[pages]
        if lost.any():
            fail("pages", "pages that are held, or free and registered", f"{pages[lost][0]}, which is free")
        revived = self._distinct(pages[self._refs[pages] == 0])
        self._position[revived] = -1
        self.num_free -= revived.size
        np.add.at(self._refs, pages, 1)

    def release(self, pages):
        """Count one reference less to each page, given from the head of a sequence to its tail.

        Of the pages that become free, the last listed is the first to be reused: a prefix is worth more than what
        follows it. Raises: ValueError, where a page does not exist or has fewer references than are released.
        """
        pages = self._check_pages(pages)
        np.subtract.at(self._refs, pages, 1)
        counts = self._refs[pages]
        if (counts < 0).any():
            np.add.at(self._refs, pages, 1)
            fail("pages", "pages that are held", f"{pages[counts < 0][0]}, which was released more often than taken")
        self._push(pages[counts == 0][::-1])

    def ref_count(self, page):
        """References to a page; 0: free."""
        return int(self._refs[self._check_pages([page])[0]])

    def ref_counts(self, pages):
        """References to each page: int32 array of the shape of `pages`."""
        return self._refs[self._check_pages(pages)]

    def register(self, pages, hashes):
        """Let held pages be found by hashes of what they hold; of pages with one hash, the first stays the one found.

        Raises: ValueError, where a page is free, or the numbers of pages and hashes differ.
        """
        pages = self._check_pages(pages)
        if len(pages) != len(hashes):
            fail("hashes", f"one for each of {len(pages)} pages", len(hashes))
        free = self._refs[pages] == 0
        if free.any():
            fail("pages", "pages that are held", f"{pages[free][0]}, which is free")
        if not self.prefix_caching:
            return
        for page, digest in zip(pages.tolist(), hashes):
            self._unlink(page)
            self._hash_of[page] = digest
            found = self._page_of.get(digest)
            if found is None or not self._registered[found]:
                self._page_of[digest] = page
                self._registered[page] = True

    def forget(self, pages):
        """Let pages, about to be overwritten, no longer be found."""
        self._registered[self._check_pages(pages)] = False

    def lookup(self, hashes):
        """The pages of the longest prefix of `hashes` that is registered; no reference is taken.

        Args:
            hashes: an iterable, read only as far as pages are found.

        Returns: int32 array.
        """
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None or not self._registered[page]:
                break
            pages.append(page)
        return np.array(pages, np.int32)

    def hash_of(self, page):
        """The hash that a page was last registered under, whether it is the one found by it or not."""
        return self._hash_of[page]

    @property
    def num_shared(self):
        """Pages with more than one reference; O(num_pages)."""
        return int(np.count_nonzero(self._refs > 1))

    @property
    def num_cached(self):
        """Free pages that can be found by their hash; O(num_pages)."""
        return int(np.count_nonzero(self._registered & (self._refs == 0)))

    def _unlink(self, page):
        """Drop the hash that a page was registered under before."""
        digest = self._hash_of.get(page)
        if digest is not None and self._page_of.get(digest) == page:
            del self._page_of[digest]
        self._registered[page] = False

    def _pop(self, n):
        """The first n pages of the free list."""
        taken = [np.empty(0, np.int32)]
        width = max(n, 64)
        while n:
            start, end = self._head, min(self._head + width, self._tail)
            entries = self._queue[start:end]
            live = np.flatnonzero(self._position[entries] == np.arange(start, end))[:n]
            taken.append(entries[live])
            n -= live.size
            self._head = end if n else start + int(live[-1]) + 1
            width *= 2
        return np.concatenate(taken)

    def _push(self, pages):
        """Add pages, none of them free, at the end of the free list."""
        if self._tail + pages.size > self._queue.size:
            self._compact()
        pages = self._distinct(pages)
        end = self._tail + pages.size
        self._queue[self._tail : end] = pages
        self._position[pages] = np.arange(self._tail, end)
        self._tail = end
        self.num_free += pages.size

    def _compact(self):
        """Move the free list to the start of the queue: O(num_pages), once in at least num_pages releases."""
        entries = self._queue[self._head : self._tail]
        live = entries[self._position[entries] == np.arange(self._head, self._tail)]
        self._queue[: live.size] = live
        self._position[live] = np.arange(live.size)
        self._head, self._tail = 0, live.size

    def _distinct(self, pages):
        """Pages without repetitions; overwrites their positions. Of equal indices, the last assignment stands."""
        order = np.arange(pages.size)
        self._position[pages] = order
        return pages[self._position[pages] == order]

    def _check_pages(self, pages):
        pages = np.atleast_1d(np.asarray(pages))
        if pages.size == 0:
            return np.empty(0, np.int32)
        if pages.dtype.kind not in "iu":
            fail("pages", "page numbers", f"dtype {pages.dtype}", TypeError)
        if pages.ndim != 1:
            fail("pages", "one dimension", f"shape {pages.shape}")
        if pages.min() < 0 or pages.max() >= self.num_pages:
            fail("pages", f"page numbers of 0 to {self.num_pages - 1}", f"{pages.min()} to {pages.max()}")
        return pages
