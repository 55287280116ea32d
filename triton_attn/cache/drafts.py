"""What a cache keeps of a tree of drafts once the model has verified it."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._host.checks import check_length, fail
from .arrays import NO_LIMIT, from_list
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
        kept = as_ids(accepted)
        if start < 0:
            fail("num_drafts", "at most the tokens of each sequence", num_drafts)
        numbers = kept.tolist()
        if len(set(numbers)) < len(numbers) or not all(0 <= i < num_drafts for i in numbers):
            fail("accepted", f"different indices of 0 to {num_drafts - 1}", numbers)
        moved = (kept != np.arange(kept.size)).nonzero()[0]
        return cls(start, start + (int(moved[0]) if moved.size else kept.size), start + kept.size, kept)


def keep_drafts(cache, seqs, num_drafts, accepted, token_ids):
    """`keep` of a cache."""
    rows = cache._distinct_rows(seqs).tolist()
    cache._refuse_windows("keep")
    if cache.key_shard is not None:
        raise NotImplementedError("keep: not supported for a cache that is sharded over a mesh, got a mesh")
    num_drafts = check_length("num_drafts", num_drafts)
    paths = [_Path.of(cache._lengths.item(row) - num_drafts, num_drafts, path) for row, path in _zip(rows, accepted)]
    ids = [None] * len(rows) if token_ids is None else [as_ids(own) for _, own in _zip(rows, token_ids, "token_ids")]
    for path, own in zip(paths, ids):
        if own is not None and own.size != path.kept.size:
            fail("token_ids", f"an id for each of {path.kept.size} accepted tokens", own.size)
    firsts = [path.first_moved if own is None else path.start for path, own in zip(paths, ids)]
    entries = [
        (row, column)
        for row, path, first in zip(rows, paths, firsts)
        if first < path.end
        for column in range(first // cache.page_size, cache._pages_of(path.end))
    ]
    _own_pages(cache, entries)

    # Nothing fails from here on.
    sources, targets = [from_list([])], [from_list([])]
    for row, path, own, first in zip(rows, paths, ids, firsts):
        moved = path.kept[path.first_moved - path.start :]
        sources.append(cache._slots_of(row, path.start + moved))
        targets.append(cache._slots_of(row, np.arange(path.first_moved, path.end)))
        if own is not None:
            cache._tokens[cache._slots_of(row, np.arange(path.start, path.end))] = own
            cache._known[row] = NO_LIMIT if cache._known[row] >= path.start else cache._known[row]
        else:
            cache._known[row] = min(cache._known[row], NO_LIMIT if first == path.end else first)
        cache._named[row] = min(cache._named[row], first // cache.page_size)
    _move(cache, np.concatenate(sources), np.concatenate(targets))
    for seq, path in zip(cache._batch.seqs, paths):
        cache.truncate(seq, path.end)


def _zip(rows, entries, name="accepted"):
    """Pairs of rows and what a caller gives for each."""
    entries = list(entries)
    if len(entries) != len(rows):
        fail(name, f"one entry for each of {len(rows)} sequences", len(entries))
    return zip(rows, entries)


def _own_pages(cache, entries):
    """Copy those of the pages at these (row, column) that others hold, and let the others not be found. Raises
    OutOfPages."""
    pages = [cache._tables.item(entry) for entry in entries]
    must_copy = cache._must_copy(pages) if pages else []
    copies = cache.pool.allocate(sum(must_copy))
    cache.pool.forget([page for page, copy in zip(pages, must_copy) if not copy])
    if copies.size:
        copied = [entry for entry, copy in zip(entries, must_copy) if copy]
        cache._replace(copied, np.array([cache._tables.item(entry) for entry in copied]), copies)
        cache._changes.extend(copied)


def _move(cache, sources, targets):
    """Copy what the slots `sources` hold to the slots `targets`, in all layers; a slot may be in both."""
    if sources.size:
        source_pages, source_slots = map(cache._to_device, np.divmod(sources, cache.page_size))
        pages, slots = map(cache._to_device, np.divmod(targets, cache.page_size))
        for x in cache._page_tensors():
            bits = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
            bits[:, pages, slots] = bits[:, source_pages, source_slots]
