"""What a cache holds, in numbers."""

from dataclasses import dataclass

import numpy as np

from .arrays import from_list, ranges


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment. Pages are counted once, however many sequences share them.

    Attributes:
        num_pages: all pages; pages_held + pages_free. With groups of layers, a page is one of one group.
        pages_held: held by sequences.
        pages_shared: held by more than one.
        pages_free: can be allocated now.
        pages_cached: of those that are free, pages whose content can still be found.
        num_sequences: sequences alive.
        num_tokens: tokens of all sequences.
        slots_used: slots of held pages that hold a token; held slots minus these are the internal waste.
        tokens_asked, tokens_found: tokens given to `create` since the cache was made, and those already cached.
    """

    num_pages: int
    pages_held: int
    pages_shared: int
    pages_free: int
    pages_cached: int
    num_sequences: int
    num_tokens: int
    slots_used: int
    tokens_asked: int
    tokens_found: int


def stats_of(cache):
    pool = cache.pool
    seqs = from_list([i for i, chain in enumerate(cache._chains) if chain is not None])
    rows = (seqs[:, None] * cache._num_groups + np.arange(cache._num_groups)).ravel()
    lengths, firsts = cache._lengths[rows], cache._firsts[rows]
    counts = cache._pages_of(lengths) - firsts
    columns = ranges(firsts, counts)
    tokens = np.minimum(lengths.repeat(counts) - cache.page_size * columns, cache.page_size)
    fill = np.zeros(pool.num_pages, np.int64)
    np.maximum.at(fill, cache._tables[rows.repeat(counts), columns], tokens)
    return CacheStats(
        num_pages=pool.num_pages,
        pages_held=pool.num_pages - pool.num_free,
        pages_shared=pool.num_shared,
        pages_free=pool.num_free,
        pages_cached=pool.num_cached,
        num_sequences=seqs.size,
        num_tokens=int(lengths.sum()) // cache._num_groups,  # all groups have the same
        slots_used=int(fill.sum()),
        tokens_asked=cache._tokens_asked,
        tokens_found=cache._tokens_found,
    )
