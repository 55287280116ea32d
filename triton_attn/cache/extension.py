"""How sequences grow, or write pages that they share: `extend` of a cache and of a `CacheStep`, and `keep`.

All take these steps in this order, so that a call that is refused leaves the cache as it was:

1. `lay_out` says where the new tokens go, or raises OutOfPages. New pages are in the tables, and free as before. For
   `keep`, whose tokens have their pages, `room_for_copies` does.
2. All that the device may refuse: transfers, and copies of pages by `copy_pages`. If it does, `take_back` undoes the
   first step.
3. `book`, or `book_room` alone, makes tokens and pages the sequences' own. It does not fail.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arrays import from_list, ranges
from .copy_on_write import leave_originals, pages_to_copy
from .pool import NO_PAGES
from .prefix import name_full_pages
from .token_ids import ONE_EACH, as_batch

NOTHING_BEHIND = [], NO_PAGES


@dataclass(slots=True, eq=False)
class Room:
    """What rows need to grow, see `_room_for`, or to write pages that they have, see `room_for_copies`."""

    rows: list[int]
    columns: list[int]  # of the next token of each, or of the page that is copied
    limits: list[int]  # of each from now on; 0 for those that get no token
    bases: NDArray[np.int64]  # of each until now, to take back
    full: list[int]  # rows with pages to be named
    behind: list[tuple[int, slice]]  # what `_pages_behind` finds
    released: NDArray[np.integer]
    copied: list[tuple[int, int]]  # what `pages_to_copy` finds
    originals: list[int]
    kept: list[int]
    growths: list[tuple[int, int, int]]  # (row, first column, last column) of new pages
    new_pages: NDArray[np.int64]  # the copies, then those of growths
    is_copied: bool = False


def new_tokens(cache, token_ids, rows):
    """What `as_batch` returns for the sequences of these rows, once for each group."""
    num_groups = cache._num_groups
    if num_groups == 1:
        return as_batch(token_ids, rows.size)
    counts, ids, unknown = as_batch(token_ids, rows.size // num_groups)
    counts = counts if counts is ONE_EACH else np.tile(counts, num_groups)
    return counts, *(None if x is None else np.tile(x, num_groups) for x in (ids, unknown))


def lay_out(cache, rows, lengths, ends, counts):
    """(slots of new tokens, their positions, a `Room` or None) of rows that grow from these lengths to `ends`.

    As long as each row of a batch can take another token, `num_spare` tells, and no row is looked at.
    """
    batch, room, one_each = cache._batch, None, counts is ONE_EACH
    if one_each and batch.num_spare > 0:
        batch.num_spare -= 1
    elif batch.num_spare < 0:
        batch.num_spare = 0
        room = _room_for(cache, rows, lengths, ends)
    else:
        # An extension by nothing names full pages too.
        left = cache._limits[rows] - (ends if one_each else np.maximum(ends, lengths + 1))
        least = left.item(left.argmin()) if left.size else 0
        batch.num_spare = max(least, 0)
        if least < 0:
            short = (left < 0).nonzero()[0]  # it indexes faster than a mask
            room = _room_for(cache, rows[short], lengths[short], ends[short])
    if one_each:
        return cache._bases[rows] + lengths, lengths, room
    positions = ranges(lengths, counts)
    columns = positions // cache.page_size
    return (cache._tables[rows.repeat(counts), columns] - columns) * cache.page_size + positions, positions, room


def room_for_copies(cache, copied, originals, kept):
    """The `Room` of rows that write pages, which `pages_to_copy` found, and get no others."""
    copies = cache.pool._next_free(len(copied))
    for entry, copy in zip(copied, copies.tolist()):
        cache._tables[entry] = copy
    rows, columns = [row for row, _ in copied], [column for _, column in copied]
    limits, bases = [0] * len(rows), cache._bases[rows]
    return Room(rows, columns, limits, bases, [], *NOTHING_BEHIND, copied, originals, kept, [], copies)


def copy_pages(cache, room):
    """Copy the pages that rows share and are about to write."""
    if room.copied:
        cache._copy_pages(from_list(room.originals), room.new_pages[: len(room.copied)])
        room.is_copied = True


def take_back(cache, room):
    """Undo `lay_out`. What a copy has overwritten since is found no longer."""
    if room is None:
        return
    for entry, original in zip(room.copied, room.originals):
        cache._tables[entry] = original
    for row, first, last in room.growths:
        cache._tables[row, first:last] = 0
    cache._bases[room.rows] = room.bases
    if room.is_copied:
        cache.pool.forget(room.new_pages[: len(room.copied)])


def book(cache, rows, lengths, ends, new, slots, room):
    """Rows grow to `ends` by what `new_tokens` returns."""
    counts, ids, unknown = new
    if room is not None:
        book_room(cache, room)
    if ids is not None:
        cache._tokens[slots if unknown is None else slots[~unknown.repeat(counts)]] = ids
    if unknown is not None:
        cache._known[rows[unknown]] = np.minimum(cache._known[rows], lengths)[unknown]
    cache._lengths[rows] = ends


def _room_for(cache, rows, lengths, ends):
    """The `Room` of rows that grow from `lengths` to `ends`, with new pages in their tables.

    Few rows of a batch come here in a step: a loop over them is faster than operations on short arrays.
    """
    page_size, bases, named = cache.page_size, cache._bases[rows], cache._named[rows].tolist()
    rows, lengths, ends = rows.tolist(), lengths.tolist(), ends.tolist()
    columns, limits, full, tails, growths, num_new, width = [], [], [], [], [], 0, 0
    for row, length, end, num_named in zip(rows, lengths, ends, named):
        column, first, last = length // page_size, -(-length // page_size), -(-end // page_size)
        columns.append(column)
        # Tokens that fill a page go up to it or beyond, and then the page has to be named.
        limits.append((column + 1) * page_size if end > length else 0)
        if column > num_named:
            full.append(row)
        if end > length and first > column:  # it goes on in its last page
            tails.append((row, column))
        if last > first:
            growths.append((row, first, last))
            num_new, width = num_new + last - first, max(width, last)
    behind, released = NOTHING_BEHIND if cache._is_plain else _pages_behind(cache, rows, lengths)
    copied, originals, kept = pages_to_copy(cache, tails)
    used = len(copied)
    num_new += used
    if num_new > cache.pool.num_free:
        cache.pool._check_free(num_new, released)
    cache._widen(width)

    # Nothing fails from here on.
    new_pages, tables = cache.pool._next_free(num_new, released), cache._tables
    for entry, copy in zip(copied, new_pages.tolist()):
        tables[entry] = copy
    for row, first, last in growths:
        tables[row, first:last] = new_pages[used : used + last - first]
        used += last - first
    for row, column, limit in zip(rows, columns, limits):
        if limit:
            cache._bases[row] = (tables.item(row, column) - column) * page_size
    return Room(rows, columns, limits, bases, full, behind, released, copied, originals, kept, growths, new_pages)


def book_room(cache, room):
    """What rows need is theirs. What is given back was named first, and can be found."""
    if room.full:
        name_full_pages(cache, room.full)
    if room.behind:
        _give_back(cache, room.behind, room.released)
    cache.pool._take(room.new_pages)
    if room.kept:
        cache.pool._forget(room.kept)
    if room.copied:
        leave_originals(cache, room.originals, room.new_pages[: len(room.copied)])
    for row, limit in zip(room.rows, room.limits):
        cache._limits[row] = limit
    cache._changes.extend(room.rows, room.columns)
    if not cache._is_plain:
        _limit_by_windows(cache, room.rows)


def _pages_behind(cache, rows, lengths):
    """([(row, slice of columns)], their pages): what is held, and no token from these lengths on sees."""
    behind = []
    for row, length in zip(rows, lengths):
        first, last = cache._firsts.item(row), (length - cache._windows[row % cache._num_groups]) // cache.page_size
        if last > first:
            behind.append((row, slice(first, last)))
    return behind, np.concatenate([cache._tables[span] for span in behind]) if behind else NO_PAGES


def _give_back(cache, behind, pages):
    cache.pool._release(pages)
    for row, columns in behind:
        cache._tables[row, columns] = 0
        cache._firsts[row] = columns.stop


def _limit_by_windows(cache, rows):
    """Rows have to do something from the length on at which their next page is behind the window."""
    for row in rows:
        next_length = (cache._firsts.item(row) + 1) * cache.page_size + cache._windows[row % cache._num_groups]
        cache._limits[row] = min(cache._limits.item(row), next_length)
