"""Sequences of tokens on pages: who holds which page, whatever a page holds."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._host.checks import check_length, check_size, fail
from .arrays import empty, from_list, grown, ranges, zeros
from .hashing import page_hashes, root_hash
from .pool import BlockPool

NO_LIMIT = 2**62
TokenIds: TypeAlias = Tensor | Iterable[int]


class Sequence:
    """A sequence of a cache, made by its `create` or `fork`; `len` is its number of tokens. Free it with `free`."""

    __slots__ = ("_cache", "_row")

    def __init__(self, cache, row):
        self._cache = cache
        self._row = row

    def __len__(self) -> int:
        if self._cache is None:
            fail("seq", "a sequence of a cache", "a freed one")
        return int(self._cache._lengths[self._row])


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment. Pages are counted once, however many sequences share them.

    Attributes:
        num_pages: all pages; pages_held + pages_free.
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


class PagedSequences:
    """Tables of pages for any number of sequences, with prefix sharing and copy-on-write; base class of the caches.

    A subclass owns the memory of the pages and says how a page is copied (`_copy_pages`). Everything here lives on the
    host, in arrays with a row per sequence, so that a batch of any size costs a few array operations; only pages that
    become full are named one by one. See `PagedKVCache` for the rules of use. Not thread-safe.
    """

    def __init__(
        self, num_pages: int, page_size: int, device: torch.device | str | int | None, prefix_caching: bool
    ) -> None:
        self.page_size = check_size("page_size", page_size)
        self.device = torch.empty(0, device=device).device  # with its index: "cuda" is another GPU at another time
        self.pool = BlockPool(num_pages, prefix_caching)
        # Rows grow by doubling. Entries of _tables past a sequence's last page are 0.
        self._tables = zeros(0, 0, dtype=torch.int32)
        self._lengths = zeros(0)
        self._known = zeros(0)  # tokens before the first one without an id, NO_LIMIT while all have one
        self._named = zeros(0)  # leading pages that are full, written and hashed
        self._roots = []
        self._unused_rows = []
        self._page_tokens = empty(self.pool.num_pages, self.page_size)
        self._tokens_asked = 0
        self._tokens_found = 0

    def create(self, token_ids: TokenIds, salt: str | bytes | None = None) -> tuple[Sequence, int]:
        """Begin a sequence with as much of `token_ids` as is cached.

        The longest prefix of full pages that other sequences wrote under the same salt is shared, but at most all
        tokens but one: the model must compute at least one to go on. No page is allocated; `extend` with the rest.

        Args:
            token_ids: list, or host array or tensor of integers; may be empty.
            salt: str, bytes or None. Only sequences of one salt share pages: a tenant, an adapter, an image.

        Returns:
            (sequence, number of tokens already cached).
        """
        ids = _as_ids(token_ids)
        root = root_hash(salt)
        pages = self.pool.lookup(page_hashes(root, ids, self.page_size))
        cached = min(pages.numel() * self.page_size, max(len(ids) - 1, 0))
        pages = pages[: self._pages_of(cached)]
        self.pool.share(pages)
        row = self._new_row(root, cached, known=NO_LIMIT, named=cached // self.page_size)
        self._widen(pages.numel())
        self._tables[row, : pages.numel()] = pages
        self._tokens_asked += len(ids)
        self._tokens_found += cached
        return Sequence(self, row), cached

    def extend(self, seqs: Iterable[Sequence], token_ids: int | Tensor | Iterable[int | TokenIds]) -> Tensor:
        """Room for new tokens at the end of each sequence, for the whole batch or not at all.

        What the sequences held before counts as written: pages that are full can be found from now on. A sequence
        whose last page is shared and not full gets a copy of it first.

        Args:
            seqs: sequences, each at most once.
            token_ids: for each sequence the ids of its new tokens (a list, or a host array or tensor), or their number
                where ids are not known: others then never find these tokens, nor what follows. A tensor or array
                (batch, n) for n new tokens each; an int for as many unknown tokens each. May be 0 or empty.

        Returns:
            slot_mapping: int64 on the cache's device, page * page_size + offset of each new token, sequence by
            sequence. Write them, with `append_kv_cache` or `append_latent_cache`, before these sequences or forks of
            them are extended again.

        Raises:
            OutOfPages: with nothing changed.
            ValueError: a sequence was freed, belongs to another cache, or is listed twice.
        """
        rows = self._rows(seqs)
        if len(set(rows.tolist())) != rows.numel():
            fail("seqs", "each sequence once", "a sequence that is listed twice")
        counts, ids, unknown = _as_batch(token_ids, rows.numel())
        lengths = self._lengths[rows]
        new_lengths = lengths + counts
        num_pages = self._pages_of(lengths)
        growth = self._pages_of(new_lengths) - num_pages
        # Sequences that go on in their last page.
        reopened = ((num_pages * self.page_size > lengths) & (counts > 0)).nonzero().squeeze(1)
        tail_entries = rows[reopened], num_pages[reopened] - 1
        tails = self._tables[tail_entries]
        must_copy = self._must_copy(tails)
        num_copied, num_grown = int(must_copy.sum()), int(growth.sum())
        copies, appended = self.pool.allocate(num_copied + num_grown).split([num_copied, num_grown])

        # Nothing fails from here on.
        self._name_full_pages(rows)
        self.pool.forget(tails[~must_copy])
        if num_copied:
            self._replace(tuple(index[must_copy] for index in tail_entries), copies)
        if num_grown:
            self._append(rows, num_pages, growth, appended)
        self._lengths[rows] = new_lengths
        slots = self._slots(rows, lengths, counts)
        if ids is not None:
            self._page_tokens.view(-1)[slots] = ids
        if unknown is not None:
            self._known[rows[unknown]] = torch.minimum(self._known[rows], lengths)[unknown]
        return self._to_device(slots)

    def commit(self, seqs: Iterable[Sequence]) -> None:
        """Say that the tokens of these sequences are written: their full pages can be found from now on.

        `extend` implies it for the sequences it extends.
        """
        self._name_full_pages(self._rows(seqs))

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same tokens, on the same pages: the first to write in a shared one copies it."""
        row = self._row(seq)
        pages = self._tables[row, : self._pages_of(len(seq))]
        self.pool.share(pages)
        fork = self._new_row(self._roots[row], len(seq), int(self._known[row]), int(self._named[row]))
        self._tables[fork, : pages.numel()] = pages
        return Sequence(self, fork)

    def truncate(self, seq: Sequence, n: int) -> None:
        """Keep the first n tokens and give up the pages after them: rejected drafts, a prompt that is changed."""
        row, length = self._row(seq), len(seq)
        n = check_length("n", n)
        if n > length:
            fail("n", f"at most the sequence's {length} tokens", n)
        dropped = self._tables[row, self._pages_of(n) : self._pages_of(length)]
        self.pool.release(dropped)
        dropped.zero_()
        self._lengths[row] = n
        if n <= self._known[row]:
            self._known[row] = NO_LIMIT
        self._named[row].clamp_(max=n // self.page_size)

    def free(self, seq: Sequence) -> None:
        """End a sequence. Pages that no other holds become free; what was committed can be found until it is reused."""
        self.truncate(seq, 0)
        self._roots[seq._row] = None
        self._unused_rows.append(seq._row)
        seq._cache = None

    def block_table(self, seqs: Iterable[Sequence]) -> Tensor:
        """int32 (batch, pages of the longest) on the cache's device: the pages of each sequence, then zeros."""
        rows = self._rows(seqs)
        width = self._pages_of(int(self._lengths[rows].max())) if rows.numel() else 0
        return self._to_device(self._tables[:, :width].index_select(0, rows))

    def cache_seqlens(self, seqs: Iterable[Sequence]) -> Tensor:
        """int32 (batch,) on the cache's device: the number of tokens of each sequence."""
        return self._to_device(self._lengths[self._rows(seqs)].to(torch.int32))

    def stats(self) -> CacheStats:
        """`CacheStats` of this moment; O(num_pages)."""
        pool = self.pool
        rows = from_list([row for row, root in enumerate(self._roots) if root is not None])
        lengths = self._lengths[rows]
        num_pages = self._pages_of(lengths)
        columns = ranges(torch.zeros_like(num_pages), num_pages)
        pages = self._tables[rows.repeat_interleave(num_pages), columns].to(torch.int64)
        tokens = (lengths.repeat_interleave(num_pages) - columns * self.page_size).clamp(max=self.page_size)
        fill = zeros(pool.num_pages).scatter_reduce(0, pages, tokens, "amax")
        return CacheStats(
            num_pages=pool.num_pages,
            pages_held=pool.num_pages - pool.num_free,
            pages_shared=pool.num_shared,
            pages_free=pool.num_free,
            pages_cached=pool.num_cached,
            num_sequences=rows.numel(),
            num_tokens=int(lengths.sum()),
            slots_used=int(fill.sum()),
            tokens_asked=self._tokens_asked,
            tokens_found=self._tokens_found,
        )

    def _copy_pages(self, src_pages, dst_pages):
        """Copy what pages hold; int32 tensors (n,) on the cache's device, no page in both."""
        raise NotImplementedError

    def _must_copy(self, pages):
        """Which pages have to be copied by the sequences that are about to write in them, one entry per sequence.

        A page that nobody but these sequences holds is kept by the first of them.
        """
        references = self.pool.ref_counts(pages)
        must_copy = references > 1
        if must_copy.any():
            pages = pages.tolist()
            writers = Counter(pages)
            kept = set()
            for i, (page, count) in enumerate(zip(pages, references.tolist())):
                if writers[page] == count and page not in kept:
                    kept.add(page)
                    must_copy[i] = False
        return must_copy

    def _replace(self, entries, copies):
        """Put copies of shared pages in their place in the tables."""
        originals = self._tables[entries]
        self._copy_pages(self._to_device(originals), self._to_device(copies))
        self._page_tokens[copies] = self._page_tokens[originals]
        self._tables[entries] = copies.to(torch.int32)
        self.pool.release(originals)

    def _append(self, rows, num_pages, counts, pages):
        """Put `counts` of the pages after the `num_pages` that each row has."""
        self._widen(int((num_pages + counts).max()))
        table_rows = rows.repeat_interleave(counts, output_size=pages.numel())
        self._tables[table_rows, ranges(num_pages, counts)] = pages.to(torch.int32)

    def _slots(self, rows, starts, counts):
        """Slots of the tokens at positions start to start + count of each row, one row after the other."""
        positions = ranges(starts, counts)
        columns = positions // self.page_size
        pages = self._tables[rows.repeat_interleave(counts, output_size=positions.numel()), columns]
        return (pages - columns) * self.page_size + positions

    def _name_full_pages(self, rows):
        """Register the pages that became full, and are written by now, under the hash of all tokens up to their end."""
        if not self.pool.prefix_caching:
            return
        named = self._named[rows]
        counts = torch.minimum(self._lengths[rows], self._known[rows]) // self.page_size - named
        todo = counts.nonzero().squeeze(1)
        if not todo.numel():
            return
        rows, named, counts = rows[todo], named[todo], counts[todo]
        pages = self._tables[rows.repeat_interleave(counts), ranges(named, counts)]
        tokens = self._page_tokens[pages].view(-1).tolist()
        last_named = self._tables[rows, named - 1]  # of no meaning where none is
        hashes = []
        for row, page, start, count in zip(rows.tolist(), last_named.tolist(), named.tolist(), counts.tolist()):
            parent = self.pool.hash_of(page) if start else self._roots[row]
            begin = len(hashes) * self.page_size
            hashes.extend(page_hashes(parent, tokens[begin : begin + count * self.page_size], self.page_size))
        self.pool.register(pages, hashes)
        self._named[rows] += counts

    def _pages_of(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def _rows(self, seqs):
        """Rows of sequences that are alive and of this cache."""
        return from_list([seq._row if getattr(seq, "_cache", None) is self else self._refuse(seq) for seq in seqs])

    def _row(self, seq):
        return int(self._rows([seq]))

    def _refuse(self, seq):
        if not isinstance(seq, Sequence):
            fail("seqs", "sequences of this cache", type(seq).__name__, TypeError)
        fail("seqs", "sequences of this cache", "a freed one" if seq._cache is None else "one of another cache")

    def _new_row(self, root, length, known, named):
        if self._unused_rows:
            row = self._unused_rows.pop()
            self._roots[row] = root
        else:
            row = len(self._roots)
            self._roots.append(root)
            if row == self._lengths.numel():
                capacity = max(16, 2 * row)
                self._tables = grown(self._tables, capacity, self._tables.shape[1])
                self._lengths, self._known, self._named = (
                    grown(x, capacity) for x in (self._lengths, self._known, self._named)
                )
        self._lengths[row], self._known[row], self._named[row] = length, known, named
        return row

    def _widen(self, width):
        """Room for `width` pages in every row."""
        if width > self._tables.shape[1]:
            self._tables = grown(self._tables, self._tables.shape[0], max(16, width, 2 * self._tables.shape[1]))

    def _to_device(self, x):
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)


def _as_batch(token_ids, batch):
    """What `extend` takes, as (number of new tokens, all ids in a row, mask of sequences without ids).

    Tokens without an id have 0 in its place. ids are None if there are none; the mask is None if all have ids.
    """
    if isinstance(token_ids, Integral):
        token_ids = check_length("token_ids", token_ids)
        counts = zeros(batch) + token_ids
        return counts, None, counts > 0
    if getattr(token_ids, "ndim", 2) != 2:
        fail("token_ids", f"shape ({batch}, n)", f"shape {tuple(token_ids.shape)}")
    token_ids = _to_list(token_ids)
    if len(token_ids) != batch:
        fail("token_ids", f"one entry for each of {batch} sequences", len(token_ids))
    unknown = None
    if set(map(type, token_ids)) != {list}:
        unknown = from_list([isinstance(item, Integral) and int(item) > 0 for item in token_ids]).bool()
        token_ids = list(map(_to_list, token_ids))
    return from_list(list(map(len, token_ids))), from_list(_as_ids(chain.from_iterable(token_ids))), unknown


def _as_ids(token_ids):
    """Token ids as an array of int64."""
    try:
        return array("q", list(_to_list(token_ids)))
    except (TypeError, OverflowError) as error:
        raise TypeError(f"token_ids: expected a flat list of int64 numbers: {error}") from None


def _to_list(token_ids) -> Any:
    """A list of an array, of a tensor on the host, or of as many zeros as an int says; other things as they are."""
    if isinstance(token_ids, Integral):
        return [0] * check_length("token_ids", token_ids)
    if isinstance(token_ids, torch.Tensor) and token_ids.device.type != "cpu":
        fail("token_ids", "token ids on the host, or their number", f"a tensor on {token_ids.device}")
    return token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
