"""Pages that leave a cache for host memory or another cache, and come back."""

from bisect import bisect_left
from itertools import accumulate
from numbers import Integral

import numpy as np
import torch

from .._host.checks import check_last_contiguous, check_length, check_tensor, fail
from .arrays import NO_LIMIT, from_list
from .copy import copy_kv_pages
from .hashing import page_hashes, root_hash
from .prefix import find_page, name_full_pages
from .token_ids import as_ids


def page_places(cache, num_tokens, first_page):
    """`page_places` of a cache."""
    num_tokens, first_page = check_length("num_tokens", num_tokens), check_length("first_page", first_page)
    end = cache._pages_of(num_tokens)
    starts = enumerate(_first_pages(cache, num_tokens))
    return [(group, column) for group, start in starts for column in range(max(start, first_page), end)]


def export_pages(cache, seq, first_page, to):
    """`export_pages` of a cache."""
    row, num_pages = cache._row(seq), cache._pages_of(len(seq))
    first_page = check_length("first_page", first_page)
    if first_page > num_pages:
        fail("first_page", f"at most the sequence's {num_pages} pages", first_page)
    firsts = [max(first_page, start) for start in _first_pages(cache, len(seq))]
    pages = np.concatenate([cache._tables[own, first:num_pages] for own, first in enumerate(firsts, row)])
    sources = cache._page_tensors()
    if to is None:
        to = tuple([_host_pages(cache, x, pages.size) for x in sources])
    _check_exported(cache, "to", to, pages.size)
    copy_kv_pages(sources, cache._to_device(pages), cache._to_device(np.arange(pages.size, dtype=np.int32)), to=to)
    return to


def import_pages(cache, pages, token_ids, salt):
    """`import_pages` of a cache; the first row of the sequence."""
    has_ids = not isinstance(token_ids, Integral)
    ids = as_ids(token_ids) if has_ids else from_list([])
    num_tokens = ids.size if has_ids else check_length("token_ids", token_ids)
    is_known = has_ids or num_tokens == 0
    num_pages, starts = cache._pages_of(num_tokens), _first_pages(cache, num_tokens)
    num_given = _check_exported(cache, "pages", pages, None)
    chain = [root_hash(salt)]
    found = _find(cache, page_hashes(chain, ids, cache.page_size), starts) if is_known else [[] for _ in starts]
    ends = [start + len(own) for start, own in zip(starts, found)]  # of the columns that are found, by group
    given_from = _given_from(starts, ends, num_pages, num_given, sum(map(len, found)))
    shared, num_new = from_list([page for own in found for page in own]), sum(num_pages - end for end in ends)
    cache.pool._check_free(num_new + int((cache.pool._refs[shared] == 0).sum()))
    new_pages = cache.pool._next_free(num_new, besides=shared)
    firsts = [max(given_from, start) for start in starts]
    num_of_groups = [num_pages - first for first in firsts]
    given = [
        np.arange(end - first, num_pages - first) + num_before
        for end, first, num_before in zip(ends, firsts, accumulate(num_of_groups, initial=0))
    ]
    cache._widen(num_pages)
    cache._make_room_for_rows(1)
    # The copy refuses what it cannot read before it writes, and the pages are still free.
    given, destinations = (cache._to_device(x.astype(np.int32)) for x in (np.concatenate(given), new_pages))
    copy_kv_pages(tuple([x.detach() for x in pages]), given, destinations, to=cache._page_tensors())

    # Nothing fails from here on.
    cache.pool._share(shared)
    cache.pool._take(new_pages)
    del chain[1 + max(ends) :]
    row = cache._new_row(chain)
    num_used = 0
    for group_row, (start, end, own) in enumerate(zip(starts, ends, found), row):
        new = new_pages[num_used : num_used + num_pages - end]
        cache._tables[group_row, start:num_pages] = np.concatenate([from_list(own), new])
        cache._lengths[group_row], cache._limits[group_row] = num_tokens, 0
        cache._known[group_row], cache._named[group_row] = (NO_LIMIT, end) if is_known else (0, 0)
        cache._firsts[group_row] = start
        if is_known:
            positions = np.arange(end * cache.page_size, num_tokens)
            cache._tokens[cache._slots_of(group_row, positions)] = ids[positions]
        num_used += new.size
    name_full_pages(cache, range(row, row + cache._num_groups))
    return row


def _first_pages(cache, num_tokens):
    """The first page of each group that the token after so many sees; it is at most the page of that token."""
    return [max(0, num_tokens - window) // cache.page_size for window in cache._windows]


def _find(cache, hashes, starts):
    """For each group the pages that are found from its first column on, as far as none is missing."""
    if starts == [0]:
        return [cache.pool.lookup(hashes).tolist()]
    found = [[] for _ in starts]
    for column, digest in enumerate(hashes):
        is_done = True
        for group, (start, own) in enumerate(zip(starts, found)):
            if column == start + len(own) and (page := find_page(cache, group, digest)) is not None:
                own.append(page)
            is_done &= start + len(own) <= column
        if is_done:
            break
    return found


def _given_from(starts, ends, num_pages, num_given, num_found):
    """The column from which on so many pages are given, if these are enough."""

    def count(first):
        return sum(num_pages - max(first, start) for start in starts)

    last = min([end for end in ends if end < num_pages], default=num_pages)
    columns = range(last + 1)
    given_from = bisect_left(columns, -num_given, key=lambda first: -count(first))
    if given_from > last or count(given_from) != num_given:
        expected = f"{count(last)} to {count(0)} pages, those from a column of 0 to {last} on: {num_found} are found"
        fail("pages", expected, num_given)
    return given_from


def _host_pages(cache, tensor, num_pages):
    """Memory for so many pages of one of the cache's tensors, which its device reads and writes."""
    shape = (tensor.shape[0], num_pages, *tensor.shape[2:])
    return torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=not cache._on_host)


def _check_exported(cache, name, tensors, num_pages):
    """Check tensors of pages outside of the cache, before anything changes; their number of pages."""
    own = cache._page_tensors()
    if not isinstance(tensors, (tuple, list)) or len(tensors) != len(own):
        got = f"{len(tensors)} of them" if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        fail(name, f"a tuple of {len(own)} tensors", got, TypeError)
    check_tensor(f"{name}[0]", tensors[0], (own[0].shape[0], "pages", *own[0].shape[2:]), (own[0].dtype,), None)
    num_pages = tensors[0].shape[1] if num_pages is None else num_pages
    for i, (x, like) in enumerate(zip(tensors, own)):
        shape, device = (like.shape[0], num_pages, *like.shape[2:]), tensors[0].device if i else None
        check_tensor(f"{name}[{i}]", x, shape, (like.dtype,), device)
        check_last_contiguous(f"{name}[{i}]", x)
        if x.device != cache.device and not (x.device.type == "cpu" and x.is_pinned()):
            fail(f"{name}[{i}]", f"a tensor on {cache.device} or in pinned host memory", f"one on {x.device}")
    return num_pages
