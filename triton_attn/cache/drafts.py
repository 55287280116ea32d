"""What a cache keeps of a tree of drafts once the model has verified it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._host.checks import check_length, fail
from .._host.mesh import check_same, gather_objects
from .arrays import NO_LIMIT, from_list
from .copy_on_write import pages_to_copy
from .extension import book_room, copy_pages, room_for_copies, take_back
from .sharding import bits_of_pages, fetch_from_ranks
from .token_ids import as_ids


class _Path(NamedTuple):
    """Drafts that stay: those at `kept` (indices), from position start on; positions before first_moved stay as they
    are."""

    start: int
    first_moved: int
    end: int
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, start, num_drafts, accepted):
        kept = as_ids(accepted, "accepted")
        if start < 0:
            fail("num_drafts", "at most the tokens of each sequence", num_drafts)
        numbers = kept.tolist()
        if len(set(numbers)) < len(numbers) or not all(0 <= i < num_drafts for i in numbers):
            fail("accepted", f"different indices of 0 to {num_drafts - 1}", numbers)
        moved = (kept != np.arange(kept.size)).nonzero()[0]
        return cls(start, start + (int(moved[0]) if moved.size else kept.size), start + kept.size, kept)


def keep_drafts(cache, seqs, num_drafts, accepted, token_ids):
    """`keep` of a cache. Over a mesh all ranks tell each other first whether, and what, they keep."""
    if cache.key_shard is None:
        _keep(cache, *_check(cache, seqs, num_drafts, accepted, token_ids))
        return
    try:
        checked = _check(cache, seqs, num_drafts, accepted, token_ids)
    except Exception as error:
        _tell(cache, (), f"{type(error).__name__}: {error}")
        raise
    given = _tell(cache, checked[0], None)
    for rank, of_rank in enumerate(given):
        if of_rank["error"] is not None:
            fail("keep", "a call that no rank refuses", f"{of_rank['error']} on rank {rank}")
    check_same(given)
    _keep(cache, *checked)


def _tell(cache, changes, error):
    """What each rank of the mesh keeps, and why it refuses the call, if it does."""
    paths = [(path.start, path.kept.tolist()) for _, path, *_ in changes]
    return gather_objects(dict(accepted=paths, error=error), cache._group)


def _check(cache, seqs, num_drafts, accepted, token_ids):
    """(changes of rows, positions that move in each, what `pages_to_copy` finds), with nothing changed."""
    rows = cache._distinct_rows(seqs)[: len(cache._batch.seqs)].tolist()
    num_drafts = check_length("num_drafts", num_drafts)
    paths = [_Path.of(cache._lengths.item(row) - num_drafts, num_drafts, path) for row, path in _zip(rows, accepted)]
    ids = [None] * len(rows) if token_ids is None else [as_ids(own) for _, own in _zip(rows, token_ids, "token_ids")]
    for path, own in zip(paths, ids):
        if own is not None and own.size != path.kept.size:
            fail("token_ids", f"an id for each of {path.kept.size} accepted tokens", own.size)
    firsts = [path.first_moved if own is None else path.start for path, own in zip(paths, ids)]
    # A sequence has a row for each group of layers.
    changes = [
        (row + group, path, own, first)
        for row, path, own, first in zip(rows, paths, ids, firsts)
        for group in range(cache._num_groups)
    ]
    moves = [_moves_in_row(cache, row, path) for row, path, _, _ in changes]
    for row, path in zip(rows, paths):
        least = cache._least_length(row)
        if 0 < path.end < least:
            fail("accepted", f"paths that leave 0 tokens, or at least {least}: pages were given back", path.end)
    entries = [
        (row, column)
        for row, path, _, first in changes
        if first < path.end
        for column in range(max(first // cache.page_size, cache._firsts.item(row)), cache._pages_of(path.end))
    ]
    owned = pages_to_copy(cache, entries)
    cache.pool._check_free(len(owned[0]))
    return changes, moves, owned


def _keep(cache, changes, moves, owned):
    """In the steps of `extension`. What changes its rank arrives before a page is written, since another rank may
    die."""
    fetch = _fetch if cache.key_shard is None else fetch_from_ranks
    read = _slots_of(cache, changes, [sources for sources, _ in moves])
    room = room_for_copies(cache, *owned)
    try:
        written = _slots_of(cache, changes, [targets for _, targets in moves])
        arrived, rows = fetch(cache, read, written)
        copy_pages(cache, room)
        _put(cache, cache._own_slots(written[arrived]), rows)
    except BaseException:
        take_back(cache, room)
        raise
    book_room(cache, room)
    for row, path, own, first in changes:
        _rename(cache, row, path, own, first)
    for seq, (_, path, *_) in zip(cache._batch.seqs, changes[:: cache._num_groups]):
        cache.truncate(seq, path.end)


def _slots_of(cache, changes, positions):
    """Of tokens at positions of each row, one after the other."""
    return np.concatenate([from_list([]), *(cache._slots_of(row, own) for (row, *_), own in zip(changes, positions))])


def _moves_in_row(cache, row, path):
    """(positions that are read, positions that are written) in the pages that a row still holds."""
    moved = path.kept[path.first_moved - path.start :]
    sources, targets = path.start + moved, np.arange(path.first_moved, path.end)
    first_held = cache._firsts.item(row) * cache.page_size
    if first_held:
        is_held = targets >= first_held
        sources, targets = sources[is_held], targets[is_held]
        if sources.size and sources.min() < first_held:
            fail("accepted", f"drafts from position {first_held} on: earlier pages were given back", int(sources.min()))
    return sources, targets


def _rename(cache, row, path, own, first):
    """What is known of the tokens of a row: from position first on they are others, or have other ids."""
    page_size, first_page = cache.page_size, cache._firsts.item(row)
    if own is None:
        cache._known[row] = min(cache._known[row], NO_LIMIT if first == path.end else first)
    else:
        positions = np.arange(max(path.start, first_page * page_size), path.end)
        cache._tokens[cache._slots_of(row, positions)] = own[positions - path.start]
        # Pages that are gone cannot be named, and with them none that follows.
        is_known = cache._known[row] >= path.start and first_page <= path.start // page_size
        cache._known[row] = NO_LIMIT if is_known else min(cache._known[row], path.start)
    cache._named[row] = min(cache._named[row], first // page_size)


def _zip(rows, entries, name="accepted"):
    """Pairs of rows and what a caller gives for each."""
    if not isinstance(entries, Iterable):
        fail(name, f"one entry for each of {len(rows)} sequences", type(entries).__name__, TypeError)
    entries = list(entries)
    if len(entries) != len(rows):
        fail(name, f"one entry for each of {len(rows)} sequences", len(entries))
    return zip(rows, entries)


def _fetch(cache, read, written):
    """(all of the slots `written`, what the slots `read` hold, in all layers, of each tensor of the cache)"""
    pages, slots = _places(cache, read)
    return slice(None), [x[:, pages, slots] for x in bits_of_pages(cache)]


def _put(cache, written, rows):
    """Write rows of each tensor of the cache. Where one refuses, those that were written have again what was there."""
    pages, slots = _places(cache, written)
    done = []
    try:
        for x, own in zip(bits_of_pages(cache), rows):
            before = x[:, pages, slots]
            x[:, pages, slots] = own
            done.append((x, before))
    except BaseException:
        for x, before in done:
            x[:, pages, slots] = before
        raise


def _places(cache, slots):
    return map(cache._to_device, np.divmod(slots, cache._page_slots))
