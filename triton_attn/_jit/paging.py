"""Positions of keys in a cache: the block table gives the page of a token."""

from typing import NamedTuple

import triton
import triton.language as tl

from .workarounds import loaded_once, multiple_of


class Cached(NamedTuple):
    """Positions of keys (int64): page and slot, or sequence and row of a contiguous cache."""

    outer: object
    slot: object


@triton.jit
def cache_rows(table_ptr, sequence, start, mask, TILE: tl.constexpr):
    """Cached positions of the keys [start, start + TILE.BLOCK_N).

    table_ptr points to the sequence's row of the block table, with TILE.PAGE_SIZE keys a page. It is None for a
    contiguous cache. With TILE.ONE_PAGE all keys of the tile are in one page. No entry is read for keys outside of mask
    (BLOCK_N,), None if there are none.

    In a packed cache the compiler has to know which slots follow each other: TILE.ALIGN keys from each multiple of it.
    """
    if TILE.PACK > 0:
        start = multiple_of(start, TILE.ALIGN)
    keys = start + tl.arange(0, TILE.BLOCK_N)
    if table_ptr is None:
        return Cached(tl.cast(sequence, tl.int64), keys.to(tl.int64))
    elif TILE.ONE_PAGE:
        page = tl.load(table_ptr + start // TILE.PAGE_SIZE)
        return Cached(page.to(tl.int64), (keys % TILE.PAGE_SIZE).to(tl.int64))
    else:
        pages = tl.load(table_ptr + keys // TILE.PAGE_SIZE, mask=mask, other=None if mask is None else 0)
        return Cached(pages.to(tl.int64), (keys % TILE.PAGE_SIZE).to(tl.int64))


class CachedKeys(NamedTuple):
    """Positions of a tile of keys in a latent cache: slots slot + slots of one page, or one page and slot per key."""

    page: object
    slot: object
    slots: object


@triton.jit
def pages_of_keys(table_ptr, start, end, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """The pages for `find_keys`: one page, or one per key. Nothing is read if start >= end."""
    if ONE_PAGE:
        return tl.load(table_ptr + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        keys = tl.minimum(start + tl.arange(0, ROWS), end - 1)
        return tl.load(table_ptr + keys // PAGE_SIZE, mask=keys >= start, other=0)


@triton.jit
def find_keys(pages, start, end, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """CachedKeys of [start, start + ROWS). From `end` on the last key is repeated, so loads need no mask; scores do.

    pages come from `pages_of_keys`. They are None in a contiguous cache, where the slot of a key is its position. With
    ONE_PAGE all keys are in one page.
    """
    if ONE_PAGE:
        slots = tl.minimum(tl.arange(0, ROWS), end - 1 - start).to(tl.int64)
        return CachedKeys(pages.to(tl.int64), tl.cast(start % PAGE_SIZE, tl.int64), slots)
    else:
        keys = tl.minimum(start + tl.arange(0, ROWS), end - 1)
        if pages is None:
            return CachedKeys(0, 0, keys.to(tl.int64))
        else:
            return CachedKeys(pages.to(tl.int64), 0, (keys % PAGE_SIZE).to(tl.int64))


@triton.jit
def key_pointers(pages, SLOT_STRIDE: tl.constexpr, keys, ONE_PAGE: tl.constexpr):
    """Pointers (keys, 1) to the rows of CachedKeys."""
    if ONE_PAGE:
        ptr = pages.ptr + (keys.page * pages.page_stride + keys.slot * SLOT_STRIDE)
        return ptr + (keys.slots * SLOT_STRIDE)[:, None]
    else:
        return pages.ptr + (keys.page * pages.page_stride + keys.slots * SLOT_STRIDE)[:, None]


@triton.jit
def load_token_scales(scales, cached, mask, head):
    """The factors of a head of the keys at these Cached positions, (keys,); 0 outside of mask. scales is a View."""
    offsets = cached.outer * scales.strides.batch + cached.slot * scales.strides.row
    ptr = scales.ptr + tl.cast(head, tl.int64) * scales.strides.head
    return loaded_once(tl.load(ptr + offsets, mask=mask, other=None if mask is None else 0.0))


@triton.jit
def load_scale(scale):
    """The factor of a Scale that all heads share."""
    factor = scale.value
    if factor.dtype.is_ptr():
        factor = tl.load(factor)
    return factor
