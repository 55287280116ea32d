"""What a cache knows of each sequence, and the tables of its pages, in arrays that grow."""

from collections import deque
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from .arrays import INT64, NO_LIMIT, index_of, reserved_zeros

NUM_STATES = 6  # _lengths to _firsts
RESERVED_BYTES = 2**36  # most addresses for the tables of a cache: of 10^6 pages, 17,000 sequences of any length
CHANGES_KEPT = 2**14


class ChangeLog:
    """The last changes of the tables: pairs of a row and the first of its entries that may have changed.

    A reader keeps the count up to which it has read.
    """

    def __init__(self):
        self.count = 0
        self._last = deque(maxlen=CHANGES_KEPT)

    def extend(self, rows, columns):
        """Add changes of a list of rows."""
        self.count += len(rows)
        self._last.extend(zip(rows, columns))

    def since(self, count):
        """The changes after the first `count` ones, in any order; None if some are no longer kept."""
        missed = self.count - count
        return None if missed > len(self._last) else islice(reversed(self._last), missed)


class SequenceRows:
    """Arrays with a row for each sequence. With groups of layers a sequence has a row for each group, one after the
    other; rows of a batch are those of all its sequences in the first group, then those in the second.

    Attributes:
        page_size: tokens on a page.
        _windows: of each group, keys before a query that it sees; NO_LIMIT if all.
        _is_plain: there is one group, which sees all keys.
        _tables: int32 (rows, columns), the pages of each; 0 where a row has none.
        _lengths: int64 (rows,), tokens of each. The arrays of `_states` that follow are like it.
        _limits: up to this length tokens can be added with nothing to do first: they fit on the last page, which is the
            sequence's alone and cannot be found, and all full pages are named. 0 where there is something to do.
        _bases: below the limit, the slot of a token is its position plus this.
        _known: tokens before the first one without an id, NO_LIMIT while all have one.
        _named: leading pages that are full, written and hashed.
        _firsts: the first page that is held; those before it are behind the window and were given back.
        _chains: of each sequence, its root and the hashes of its first pages, as many as are named; None if it ended.
            Forks share the list; what comes after is another's.
        _unused_rows: the first row of each sequence that ended, or is yet to be made.
        _changes: `ChangeLog` of the tables.
    """

    def __init__(self, num_pages, page_size, windows):
        self.page_size = page_size
        self._windows = windows
        self._num_groups = len(windows)
        self._is_plain = windows == [NO_LIMIT]
        self._tables: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._states: NDArray[np.int64] = np.zeros((NUM_STATES, 0), np.int64)
        self._changes = ChangeLog()
        self._chains = []
        self._unused_rows = []
        # A sequence can hold all pages, and, without forks, there can be as many sequences as pages.
        width = max(16, num_pages)
        num_rows = max(16 * self._num_groups, min(num_pages, RESERVED_BYTES // (4 * width)))
        try:
            self._grow(num_rows, width)
        except OSError:  # a limit of addresses: take what is needed, when it is needed
            self._grow(16 * self._num_groups, 16)

    def _new_row(self, chain):
        """The first row of a sequence with this chain, see `_new_rows`."""
        row = self._new_rows(1).item(0)
        self._chains[row // self._num_groups] = chain
        return row

    def _new_rows(self, num_seqs):
        """Rows of all groups for so many sequences without chains. Tables are all 0, states their last owners'."""
        unused = self._unused_rows
        if len(unused) < num_seqs:
            self._add_rows(num_seqs - len(unused))
        firsts = unused[len(unused) - num_seqs :]
        del unused[len(unused) - num_seqs :]
        rows = self._rows_of_groups(firsts)
        self._changes.extend(rows.tolist(), repeat(0))
        return rows

    def _add_rows(self, num_seqs):
        """Rows of so many sequences more than there ever were at once."""
        num_groups = self._num_groups
        first = len(self._chains) * num_groups
        last = first + num_seqs * num_groups
        self._lengthen(last)
        self._unused_rows[:0] = range(last - num_groups, first - 1, -num_groups)
        self._chains += [None] * num_seqs

    def _make_room_for_rows(self, num_seqs):
        """Room for the rows of so many sequences more than there are, so that `_new_rows` cannot fail."""
        self._lengthen((len(self._chains) - len(self._unused_rows) + num_seqs) * self._num_groups)

    def _lengthen(self, num_rows):
        """Room for so many rows."""
        if num_rows > self._lengths.size:
            self._grow(max(num_rows, 2 * self._lengths.size), self._tables.shape[1])

    def _widen(self, width):
        """Room for `width` pages in every row."""
        if width > self._tables.shape[1]:
            self._grow(self._lengths.size, max(width, 2 * self._tables.shape[1]))

    def _reserve(self, num_seqs, width):
        """Room for so many sequences of `width` pages, in memory that has been written as in `written_zeros`."""
        num_rows = num_seqs * self._num_groups
        self._widen(width)
        if num_rows > self._lengths.size:
            self._grow(num_rows, self._tables.shape[1])
        self._tables[:num_rows, :width] += 0
        self._states[:, :num_rows] += 0

    def _grow(self, num_rows, width):
        """Larger tables and states, which take memory where they are written. What is used moves there."""
        tables, states = reserved_zeros((num_rows, width), np.int32), reserved_zeros((NUM_STATES, num_rows), np.int64)
        used = slice(len(self._chains) * self._num_groups)
        states[:, used] = self._states[:, used]
        for row, num_pages in enumerate(self._pages_of(states[0, used]).tolist()):
            tables[row, :num_pages] = self._tables[row, :num_pages]
        self._tables, self._states = tables, states
        self._lengths, self._limits, self._bases, self._known, self._named, self._firsts = states

    def _rows_of_groups(self, rows):
        """From the first rows of sequences, those of all groups, as a batch has them."""
        rows = np.array(rows, INT64)
        return rows if self._num_groups == 1 else (rows + np.arange(self._num_groups)[:, None]).ravel()

    def _by_group(self, x):
        """(groups * n, ...) as (groups, n, ...)."""
        return x.reshape(self._num_groups, x.shape[0] // self._num_groups, *x.shape[1:])

    def _pages_of(self, num_tokens):
        return (num_tokens + self.page_size - 1) // self.page_size

    def _held(self, rows):
        """(tables, as wide as the longest, and the pages in them, sequence by sequence); rows of all groups.

        Of one sequence these are all groups' pages of a column, then those of the next: see `_pages_between`.
        """
        lengths = self._lengths[rows]
        of_each = lengths.tolist()
        width = self._pages_of(max(of_each, default=0))
        tables = self._tables[:, :width][index_of(rows)]  # twice as fast as both at once
        if self._is_plain and self._pages_of(min(of_each, default=0)) == width:
            return tables, tables.ravel().astype(INT64)  # with int64 numpy indexes several times faster
        columns = np.arange(width)
        is_held = (columns >= self._firsts[rows, None]) & (columns < self._pages_of(lengths)[:, None])
        pages, is_held = (self._by_group(x).transpose(1, 2, 0) for x in (tables, is_held))
        return tables, pages[is_held].astype(INT64)

    def _pages_between(self, row, first, last):
        """The pages of a sequence in these columns: all groups' pages of a column, then those of the next.

        So the ends of all groups are reused before their beginnings: a prefix needs pages of all.
        """
        if self._is_plain:
            return self._tables[row, first:last]
        rows = slice(row, row + self._num_groups)
        is_held = np.arange(first, last)[:, None] >= self._firsts[rows]
        return self._tables[rows, first:last].T[is_held]

    def _least_length(self, row):
        """From how many tokens on the next one sees only pages that are there, in all groups of a sequence."""
        if self._is_plain:
            return 0
        firsts = self._firsts[row : row + self._num_groups].tolist()
        return max(first and first * self.page_size + window for first, window in zip(firsts, self._windows))

    def _slots_of(self, row, positions):
        """The slots of a sequence's tokens at these positions."""
        columns = positions // self.page_size
        return (self._tables[row, columns].astype(np.int64) - columns) * self.page_size + positions
