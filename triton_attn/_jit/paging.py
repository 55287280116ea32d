"""Where the keys of a sequence lie in a cache: token -> page and slot through the block table."""

from typing import NamedTuple

import triton
import triton.language as tl


class Cached(NamedTuple):
    """Where keys lie, int64: a page and a slot in it, or a sequence and a row of a contiguous cache."""

    outer: object
    slot: object


@triton.jit
def cache_rows(table_ptr, sequence, start, end, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Where the keys from start to start + TILE.BLOCK_N are Cached.

    table_ptr points to the sequence's pages of TILE.PAGE_SIZE keys; without a table the cache is contiguous. With
    TILE.ONE_PAGE the keys lie in a single page. No entry is read for keys from `end` on, where only a MASKED tile goes.
    """
    keys = start + tl.arange(0, TILE.BLOCK_N)
    if table_ptr is None:
        return Cached(tl.cast(sequence, tl.int64), keys.to(tl.int64))
    elif TILE.ONE_PAGE:
        page = tl.load(table_ptr + start // TILE.PAGE_SIZE)
        return Cached(page.to(tl.int64), (keys % TILE.PAGE_SIZE).to(tl.int64))
    else:
        mask = keys < end if MASKED else None
        pages = tl.load(table_ptr + keys // TILE.PAGE_SIZE, mask=mask, other=0 if MASKED else None)
        return Cached(pages.to(tl.int64), (keys % TILE.PAGE_SIZE).to(tl.int64))


class CachedKeys(NamedTuple):
    """A tile of keys in a latent cache: slot + slots of one page, or slots of a page each."""

    page: object
    slot: object
    slots: object


@triton.jit
def pages_of_keys(table_ptr, start, end, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """The pages of `find_keys`: one, or one a key. No entry is read where start is `end` or more."""
    if ONE_PAGE:
        return tl.load(table_ptr + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        keys = tl.minimum(start + tl.arange(0, ROWS), end - 1)
        return tl.load(table_ptr + keys // PAGE_SIZE, mask=keys >= start, other=0)


@triton.jit
def find_keys(pages, start, end, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """The keys start to start + ROWS. From `end` on the last key is repeated: loads need no mask, scores have one.

    pages are those of `pages_of_keys`; None: the cache is contiguous, and slots are keys. With ONE_PAGE the keys lie in
    a single page.
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
    """Pointers (keys, 1) to the rows of CachedKeys in pages that are a page_stride apart."""
    if ONE_PAGE:
        ptr = pages.ptr + (keys.page * pages.page_stride + keys.slot * SLOT_STRIDE)
        return ptr + (keys.slots * SLOT_STRIDE)[:, None]
    else:
        return pages.ptr + (keys.page * pages.page_stride + keys.slots * SLOT_STRIDE)[:, None]


@triton.jit
def decode_float8(bits, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """fp16 values of e4m3 (3 bits of mantissa) or e5m2 (2) elements, exact, NaN kept.

    By the GPU's own conversion where it is NATIVE, otherwise in integers.
    """
    if NATIVE:
        return bits.to(tl.float8e4nv if MANTISSA_BITS == 3 else tl.float8e5, bitcast=True).to(tl.float16)
    bits = bits.to(tl.int16)
    if MANTISSA_BITS == 2:  # the upper half of an fp16 number
        return (bits << 8).to(tl.float16, bitcast=True)
    magnitude = bits & 0x7F
    shifted = ((bits & 0x80) << 8) | (magnitude << 7)
    # fp16 has another bias of the exponent, 15 in place of 7.
    values = shifted.to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), values).to(tl.float16)
