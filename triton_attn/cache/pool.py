"""Reference counts of pages, the list of free pages, and the lookup of pages by their content."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._host.checks import check_bool, check_length, fail
from .arrays import INT64, from_list, written_zeros
from .free_list import FEW, FreeList
from .names import PageNames

NO_PAGES = from_list([])
Pages: TypeAlias = NDArray[np.integer] | Tensor | Sequence[int]


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed: free a sequence and call again.

    Example:
        >>> try:
        ...     pages = triton_attn.BlockPool(num_pages=2).allocate(3)
        ... except triton_attn.OutOfPages as error:
        ...     print(error)
        3 pages are needed, 2 of 2 are free
    """


class BlockPool:
    """Reference counts and a least-recently-used free list over `num_pages` pages.

    A page is held while its count is above 0. With `prefix_caching`, pages can be registered under a hash of what they
    hold, and found by it while held or free. A page whose count falls to 0 is free. If it can be found, it keeps what
    it holds until it is allocated again, and until then `share` takes it back. `allocate` takes pages that cannot be
    found first, since nothing is lost with them, then those that have been free longest.

    Every operation takes a batch and costs O(1) per page, at any `num_pages`: no call pays for earlier ones. A failed
    operation changes nothing. Not thread-safe.

    Args:
        num_pages: pages 0 to num_pages - 1. All are free at first.
        prefix_caching: False makes `register` do nothing, so that `lookup` finds nothing.

    Page numbers are taken as a list, array or host tensor of integers, and returned as int64 arrays of numpy.

    Example:
        >>> pool = triton_attn.BlockPool(num_pages=8)
        >>> pages = pool.allocate(3)
        >>> pool.share(pages[:1])  # two references
        >>> pool.release(pages)
        >>> pool.num_free
        7
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        num_pages = check_length("num_pages", num_pages)
        self.num_pages = num_pages
        self.prefix_caching = check_bool("prefix_caching", prefix_caching)
        self.num_free = num_pages
        self._refs: NDArray[np.int64] = written_zeros(num_pages, np.int64)
        self._refs_of = self._refs.data  # the same memory, of which Python reads and writes single numbers faster
        # Pages that can be found are put at its end, others at its head, so that all of these come before all of those.
        self._free = FreeList(num_pages)
        self._names = PageNames(num_pages)
        self._order = written_zeros(num_pages, np.int64)  # for _distinct

    def allocate(self, n: int) -> NDArray[np.int64]:
        """Take n free pages: first those that cannot be found, then those that have been free longest.

        Their old content can no longer be found.

        Returns: (n,). Raises: OutOfPages.
        """
        n = check_length("n", n)
        if n > self.num_free:
            self._check_free(n)
        pages, refs_of, hash_of = self._free.pop(n), self._refs_of, self._names.hash_of
        self.num_free -= n
        for page in pages:
            refs_of[page] = 1
            if hash_of[page] is not None:
                self._keep_longer(self._names.forget(page))
        return np.array(pages, INT64)

    def share(self, pages: Pages) -> None:
        """Count one more reference to each page; a page listed twice counts twice.

        Raises: ValueError, where a page does not exist, or is free and cannot be found: what it holds is nobody's.
        """
        self._share(self._check_pages(pages))

    def release(self, pages: Pages) -> None:
        """Count one reference less to each page, given from the head of a sequence to its tail.

        Of the pages that become free, the last listed is the first to be reused: a prefix is worth more than what
        follows it. Raises: ValueError, where a page does not exist or has fewer references than are released.
        """
        pages = self._check_pages(pages)
        if np.count_nonzero(self._refs[pages]) < pages.size or self._distinct(pages).size < pages.size:
            listed, counts = np.unique(pages, return_counts=True)
            excess = listed[counts > self._refs[listed]]
            if excess.size:
                fail("pages", "pages that are held", f"{excess[0]}, which was released more often than taken")
        self._release(pages)

    def ref_count(self, page: int) -> int:
        """References to a page; 0: free."""
        return self._refs[self._check_pages([page])].item()

    def ref_counts(self, pages: Pages) -> NDArray[np.int64]:
        """References to each page, one number for each."""
        return self._refs[self._check_pages(pages)]

    def register(self, pages: Pages, hashes: Sequence[bytes]) -> None:
        """Let held pages be found by the hashes of their content.

        If several pages have one hash, the first is found. Once it is reused or forgotten, the last of the others is
        found. Raises: ValueError, where a page is free, or the numbers of pages and hashes differ.
        """
        pages = self._check_pages(pages)
        if not isinstance(hashes, Sequence):
            fail("hashes", "a list of bytes", type(hashes).__name__, TypeError)
        if pages.size != len(hashes):
            fail("hashes", f"one for each of {pages.size} pages", len(hashes))
        for digest in hashes:
            _check_hash(digest)
        references = self._refs[pages]
        if np.count_nonzero(references) < pages.size:
            fail("pages", "pages that are held", f"{pages[references == 0][0]}, which is free")
        if self.prefix_caching:
            self._register(pages.tolist(), hashes)

    def forget(self, pages: Pages) -> None:
        """Let pages, about to be overwritten, no longer be found; those that are free are the next to be reused."""
        pages = self._check_pages(pages)
        self._forget(pages.tolist())
        free = self._distinct(pages[self._refs[pages] == 0])
        self._free.cut(free)
        self._free.put(free, at_head=True)

    def forget_all(self) -> None:
        """Let no page be found any more, whatever it holds; O(num_pages)."""
        self._names = PageNames(self.num_pages, self._names.log)
        if self._names.log is not None:
            self._names.log.cleared()

    def lookup(self, hashes: Iterable[bytes]) -> NDArray[np.int64]:
        """The pages of the longest prefix of `hashes` that is registered; no reference is taken.

        Args:
            hashes: an iterable, read only as far as pages are found.
        """
        if not isinstance(hashes, Iterable):
            fail("hashes", "bytes of each page", type(hashes).__name__, TypeError)
        pages = []
        for digest in hashes:
            _check_hash(digest)
            page = self._names.find(digest)
            if page is None:
                break
            pages.append(page)
        return from_list(pages)

    def hash_of(self, page: int) -> bytes | None:
        """The hash that a page is registered under, whether it is the one found by it or not; None if it is not."""
        return self._names.hash_of[self._check_pages([page]).item()]

    @property
    def num_shared(self) -> int:
        """Pages with more than one reference; O(num_pages)."""
        return int((self._refs > 1).sum())

    @property
    def num_cached(self) -> int:
        """Free pages that can be found by their hash; O(num_pages)."""
        return int((self._names.is_found & (self._refs == 0)).sum())

    # What the public functions do once pages are checked. The pages of a cache's own tables need no check.

    def _check_free(self, n: int, released: NDArray[np.integer] = NO_PAGES) -> None:
        """Raise OutOfPages unless n pages are free as soon as these are released."""
        num_free = self.num_free
        if n > num_free and released.size:
            num_free += self._freed_by(released).size
        if n > num_free:
            raise OutOfPages(f"{n} pages are needed, {num_free} of {self.num_pages} are free")

    def _next_free(self, n, released=NO_PAGES, besides=NO_PAGES):
        """n pages to `_take`: the next that `allocate` returns, without some, then those that are free once others are
        released. There must be so many."""
        num_free = self.num_free
        if n <= num_free:
            return from_list(self._free.first(n, {*besides.tolist()} if besides.size else ()))
        return np.concatenate([from_list(self._free.first(num_free)), self._freed_by(released)[: n - num_free]])

    def _freed_by(self, pages):
        """Those that `_release` of these pages frees, in the order in which it does."""
        listed, counts = np.unique(pages, return_counts=True)
        return self._distinct(pages[np.isin(pages, listed[self._refs[listed] == counts])][::-1]).astype(INT64)

    def _take(self, pages):
        """Allocate these free pages."""
        self._free.cut(pages[::-1])  # of neighbours in the list it is one run
        self.num_free -= pages.size
        self._refs[pages] = 1
        self._forget(pages.tolist())

    def _share(self, pages):
        references = self._refs[pages]
        if np.count_nonzero(references) < pages.size:
            is_free = references == 0
            lost = is_free & ~self._names.is_found[pages]
            if lost.any():
                fail("pages", "pages that are held, or free and found", f"{pages[lost][0]}, which is free")
            revived = self._distinct(pages[is_free])
            self._free.cut(revived)
            self.num_free -= revived.size
        self._share_held(pages)

    def _share_held(self, pages):
        np.add.at(self._refs, pages, 1)

    def _release_shared(self, pages):
        """Release a short list of pages of which others hold each."""
        refs_of = self._refs_of
        for page in pages:
            refs_of[page] -= 1

    def _release(self, pages):
        if pages.size == 0:
            return
        # Of sequences that share pages it is the first page that has more references, and the others need no look.
        references = self._refs[pages] if self._refs_of[pages.item(0)] == 1 else None
        if references is not None and references.item(references.argmax()) == 1:  # no page is listed twice
            self._refs[pages] = 0
            freed = pages[::-1]
        else:
            np.subtract.at(self._refs, pages, 1)
            last_held = (self._refs[pages] == 0).nonzero()[0]
            if not last_held.size:
                return
            freed = self._distinct(pages[last_held[::-1]])
        found = self._names.is_found[freed]
        num_found = np.count_nonzero(found)
        if num_found:
            self._free.put(freed[found])
        if num_found < freed.size:
            self._free.put(freed[~found] if num_found else freed, at_head=True)
        self.num_free += freed.size

    def _register(self, numbers, hashes):
        for promoted in self._names.name(numbers, hashes):
            self._keep_longer(promoted)

    def _forget(self, numbers):
        hash_of = self._names.hash_of
        for page in numbers:
            if hash_of[page] is not None:
                self._keep_longer(self._names.forget(page))

    def _keep_longer(self, page):
        """Move a page that can be found from now on, if it is one and free, to the end of the free list."""
        if page is not None and self._refs[page] == 0:
            pages = from_list([page])
            self._free.cut(pages)
            self._free.put(pages)

    def _distinct(self, pages):
        """Pages without repetitions. Of several writes to one place, the last one stands."""
        if pages.size < FEW:
            return from_list([*dict.fromkeys(pages[::-1].tolist())][::-1])
        order = np.arange(pages.size)
        self._order[pages] = order
        return pages[self._order[pages] == order]

    def _check_pages(self, pages):
        try:
            pages = np.asarray(pages)
        except ValueError:  # lists of different lengths
            fail("pages", "one dimension", "lists of different lengths")
        if pages.ndim != 1:
            fail("pages", "one dimension", f"shape {pages.shape}")
        if pages.size == 0:
            return pages.astype(np.int64)
        if pages.dtype.kind not in "iu":
            fail("pages", "page numbers", f"dtype {pages.dtype}", TypeError)
        # As unsigned numbers, those below 0 are the highest.
        pages = pages.astype(np.int64, copy=False)
        if pages.view(np.uint64).max() >= self.num_pages:
            fail("pages", f"page numbers of 0 to {self.num_pages - 1}", f"{pages.min()} to {pages.max()}")
        return pages


def _check_hash(digest):
    if not isinstance(digest, bytes):
        fail("hashes", "bytes of each page", type(digest).__name__, TypeError)
