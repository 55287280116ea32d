"""Prefix caching: full pages are named by what they hold, and prompts find them."""

from functools import partial

from .arrays import NO_LIMIT, from_list
from .hashing import page_hashes


def find_prefix(cache, chain, ids, num_dropped):
    """(number of the ids that are cached, an array of pages for each group): the longest prefix of full pages.

    The pages of each group go up to the last cached token.

    Args:
        chain: list of the root; the hashes that were computed follow it.
        num_dropped: last pages that are found but left out.
    """
    page_size = cache.page_size
    hashes, usable = page_hashes(chain, ids, page_size), partial(_usable_tokens, ids.size, page_size, num_dropped)
    if not cache._is_plain:
        return _find_in_groups(cache, hashes, usable)
    found = cache.pool.lookup(hashes)
    num_tokens = usable(found.size)
    return num_tokens, [found[: -(-num_tokens // page_size)]]


def find_page(cache, group, digest):
    """The page of a group that is found under a hash, or None."""
    return cache.pool._names.find(digest + cache._suffixes[group])


def name_full_pages(cache, rows):
    """Register the pages that became full, and are written by now, under the hash of all tokens up to their end."""
    if not cache.pool.prefix_caching:
        return
    pages, names, hashes, log = [], [], {}, cache._log
    names_of = _hashes_of if cache._is_plain else partial(_names_in_group, hashes)
    for row in rows:
        named = cache._named.item(row)
        num_full = min(cache._lengths.item(row), cache._known.item(row)) // cache.page_size
        if num_full > named:
            full = cache._tables[row, named:num_full]
            token_ids = cache._page_tokens.take(full, axis=0)
            names += names_of(cache, row, named, token_ids)
            pages += full.tolist()
            cache._named[row] = num_full
            if log is not None:
                chain = cache._chains[row // cache._num_groups]
                log.describe(names[-full.size :], chain[0], chain[named:num_full], token_ids)
    cache.pool._register(pages, names)
    if log is not None:
        log.forget_descriptions()


def _hashes_of(cache, row, named, token_ids):
    """Hashes of the full pages of a row that come after so many named ones; they become part of its chain."""
    seq = row // cache._num_groups
    chain = others = cache._chains[seq]
    if len(chain) > named + 1:  # a fork named pages in these places, or this sequence did before it was truncated
        chain = chain[: named + 1]
    hashes = list(page_hashes(chain, token_ids, cache.page_size))
    if chain is not others and others[: len(chain)] != chain:
        cache._chains[seq] = chain
    return hashes


def _names_in_group(hashes, cache, row, named, token_ids):
    """Names of pages of a row: hashes, which are computed once for all groups, with the suffix of the group."""
    seq, group = divmod(row, cache._num_groups)
    if (seq, named) not in hashes:
        hashes[seq, named] = _hashes_of(cache, row, named, token_ids)
    return [digest + cache._suffixes[group] for digest in hashes[seq, named]]


def _find_in_groups(cache, hashes, usable):
    """`find_prefix` where groups of layers keep different parts of a sequence.

    A prefix is cached if all its pages are found in the groups without a window, and in the others those that the
    first token after the prefix sees, whatever became of the pages before.

    Args:
        hashes: of the prompt's full pages, computed as far as they are read.
        usable: usable(num_pages) tokens are cached if so many pages are found.
    """
    windows, page_size, find = cache._windows, cache.page_size, partial(find_page, cache)
    whole = [group for group, window in enumerate(windows) if window == NO_LIMIT]
    read = []
    for digest in hashes:
        if any(find(group, digest) is None for group in whole):
            break
        read.append(digest)

    # From the right: a page that is missing in a window leaves the pages before it. No page is looked up twice.
    num_pages, looked_up = len(read), [len(read)] * len(windows)
    while True:
        num_tokens = usable(num_pages)
        for group, window in enumerate(windows):
            if window == NO_LIMIT:
                continue
            first = max(0, num_tokens - window) // page_size
            found_from = min(looked_up[group], num_pages)
            while found_from > first and find(group, read[found_from - 1]) is not None:
                found_from -= 1
            looked_up[group] = found_from
            if found_from > first:
                num_pages = looked_up[group] = found_from - 1
                break
        else:  # all windows are whole
            break
    last = -(-num_tokens // page_size)
    firsts = [0 if window == NO_LIMIT else max(0, num_tokens - window) // page_size for window in windows]
    pages = [from_list([find(group, digest) for digest in read[first:last]]) for group, first in enumerate(firsts)]
    return num_tokens, pages


def _usable_tokens(num_tokens, page_size, num_dropped, num_pages):
    """How many of a prompt's tokens need no computing if so many of its pages are found."""
    return max(0, min((num_pages - num_dropped) * page_size, num_tokens - 1))
