"""Names of pages: hashes of what they hold, by which they are found."""

import numpy as np
from numpy.typing import NDArray

PAGES_PER_DICT = 128


class PageNames:
    """Which page is found under which hash; a page has at most one hash.

    Of pages with one hash, the first is found and the others are its twins. Once the first loses its hash, the last of
    its twins is found.

    Attributes:
        is_found: (num_pages,) bool.
        hash_of: list of the hash of each page, found or not; None if it has none.
        log: is told when a hash is found from now on, and when it is no more; or None.
    """

    def __init__(self, num_pages, log=None):
        self.log = log
        self.is_found: NDArray[np.bool_] = np.zeros(num_pages, np.bool_)
        self._is_found = self.is_found.data  # single numbers are written several times faster
        self.hash_of = [None] * num_pages
        # A dict moves all its entries when it grows: with many small ones, no call waits for long.
        self._page_of = [{} for _ in range(num_pages // PAGES_PER_DICT + 1)]
        self._twins = {}  # {hash: {page: None}} where there are any

    def find(self, digest):
        """The page that is found under a hash, or None."""
        return self._pages_near(digest).get(digest)

    def name(self, pages, hashes):
        """Give each page of a list its hash; yields what `forget` returns for those that had another."""
        hash_of, num_dicts, log = self.hash_of, len(self._page_of), self.log
        for page, digest in zip(pages, hashes):
            old = hash_of[page]
            if old == digest:
                continue
            if old is not None:
                yield self.forget(page)
            hash_of[page] = digest
            if self._page_of[hash(digest) % num_dicts].setdefault(digest, page) == page:
                self._is_found[page] = True
                if log is not None:
                    log.stored(digest)
            else:
                self._twins.setdefault(digest, {})[page] = None

    def forget(self, page):
        """Take a page's hash from it; returns the twin that is found in its place, or None."""
        digest, self.hash_of[page] = self.hash_of[page], None
        twins, promoted = self._twins.get(digest, {}), None
        if not self._is_found[page]:
            del twins[page]
        elif twins:
            promoted, _ = twins.popitem()
            self._pages_near(digest)[digest] = promoted
            self._is_found[page], self._is_found[promoted] = False, True
        else:
            del self._pages_near(digest)[digest]
            self._is_found[page] = False
            if self.log is not None:
                self.log.removed(digest)
        if not twins:
            self._twins.pop(digest, None)
        return promoted

    def _pages_near(self, digest):
        """The dict that a hash belongs to."""
        return self._page_of[hash(digest) % len(self._page_of)]
