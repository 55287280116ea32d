"""Free pages in the order in which they are reused."""

from itertools import pairwise

import numpy as np

FEW = 16


class FreeList:
    """A doubly linked list of page numbers in two arrays, at first 0 to num_pages - 1.

    Entry num_pages is the end, before the first page and after the last. Each operation costs O(1) per page that it is
    given, in the worst case too: nothing is searched, and nothing is tidied later.
    """

    def __init__(self, num_pages):
        self._end = num_pages
        self._next = (np.arange(num_pages + 1) + 1) % (num_pages + 1)
        self._previous = (np.arange(num_pages + 1) - 1) % (num_pages + 1)
        # The same memory, of which Python reads and writes single numbers several times faster.
        self._next_of, self._previous_of = self._next.data, self._previous.data

    def pop(self, n):
        """A list of the first n pages, which there must be."""
        pages, page, next_of = [], self._next_of[self._end], self._next_of
        for _ in range(n):
            pages.append(page)
            page = next_of[page]
        next_of[self._end], self._previous_of[page] = page, self._end
        return pages

    def first(self, n, besides=()):
        """A list of the first n pages that are not in a set; there must be so many."""
        pages, page, next_of = [], self._next_of[self._end], self._next_of
        while n:
            if not besides or page not in besides:
                pages.append(page)
                n -= 1
            page = next_of[page]
        return pages

    def put(self, pages, at_head=False):
        """Insert an array of distinct pages, none of them in the list, in their order at one end."""
        if not pages.size:
            return
        if pages.size > FEW:
            ahead, behind = pages[:-1], pages[1:]
            self._next[ahead], self._previous[behind] = behind, ahead
        else:
            listed, next_of, previous_of = pages.tolist(), self._next_of, self._previous_of
            for ahead, behind in pairwise(listed):
                next_of[ahead], previous_of[behind] = behind, ahead
        before = self._end if at_head else self._previous_of[self._end]
        after = self._next_of[before]
        self._link(before, pages.item(0))
        self._link(pages.item(-1), after)

    def cut(self, pages):
        """Take an array of distinct pages, all of them in the list, out of it.

        A sequence is freed from its tail, so its pages are in the list in reverse order. Such a run is cut out as a
        whole.
        """
        if not pages.size:
            return
        if pages.size < FEW:  # faster one by one
            next_of, previous_of = self._next_of, self._previous_of
            for page in pages.tolist():
                before, after = previous_of[page], next_of[page]
                next_of[before], previous_of[after] = after, before
            return
        breaks = (self._next[pages[1:]] != pages[:-1]).nonzero()[0] + 1
        for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), pages.size]):
            self._link(self._previous_of[pages.item(end - 1)], self._next_of[pages.item(start)])

    def _link(self, page, following):
        self._next_of[page] = following
        self._previous_of[following] = page
