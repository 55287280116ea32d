"""The buffers that a server's step reads on the GPU, at fixed addresses."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._host.checks import check_size, fail
from .arrays import largest
from .extension import book, copy_pages, lay_out, new_tokens, take_back
from .token_ids import ONE_EACH

if TYPE_CHECKING:
    from .sequences import Sequence, TokenIds

ALIGNMENT = 256  # bytes, as torch aligns tensors: kernels are compiled for aligned addresses


class CacheStep:
    """Slots, lengths and block tables of a batch at fixed addresses, so that a CUDA graph that reads them can be
    replayed.

        step = cache.step(max_batch=64, max_seqlen=8192)
        # Once for each captured batch size, as a CUDA graph:
        for each layer:
            append_kv_cache(k, v, cache.k_cache[layer], cache.v_cache[layer], step.slot_mapping[:batch])
            paged_attention(q, cache.k_cache[layer], cache.v_cache[layer], step.cache_seqlens[:batch],
                            step.block_table[:batch])
        # A step of the server, with len(seqs) <= batch:
        step.extend(seqs, [[token] for token in tokens])
        graph.replay()

    `extend` is that of the cache, and fills the buffers. It compares the sequences with those of the call before: they
    may be any, in any order. Only what changed is sent, from pinned memory, in one transfer on the current stream of
    the caller, without a sync: rows and tokens, and the entries of the block table that changed. Of a sequence that has
    its row of the call before these are the pages that it got since; of another one, all its pages. A call that changes
    more than 2 * max(max_batch, max pages) entries makes a second transfer.

    Rows from len(seqs) on are padding: their length is 0, and slots past the last token are -1, so that nothing is
    written for them and their out is 0. A graph of a larger batch needs nothing else. A cache may have several steps,
    such as one for decode and one with more tokens for prompts, and sequences may move between them. Work that reads
    the buffers must be on the same stream, or ordered before the next call by the caller.

    Attributes:
        slot_mapping: (max_tokens,) int64, of each new token, sequence by sequence; with `layer_windows`
            (groups, max_tokens).
        positions: (max_tokens,) int64, of each new token in its sequence; 0 in padding.
        cache_seqlens: (max_batch,) int32, new tokens included.
        cu_seqlens_q: (max_batch + 1,) int32, where the new tokens of each sequence begin; num_tokens in padding.
        block_table: (max_batch, max pages) int32; with `layer_windows` (groups, max_batch, max pages). Entries past the
            last page of a sequence, and those of pages that were given back behind a window, are undefined.
        batch, num_tokens, max_seqlen_q: ints of the last call: sequences, new tokens, most new tokens of a sequence.
    """

    def __init__(self, cache, max_batch, max_seqlen, max_tokens):
        max_batch, max_seqlen = check_size("max_batch", max_batch), check_size("max_seqlen", max_seqlen)
        max_tokens = max_batch if max_tokens is None else check_size("max_tokens", max_tokens)
        self._cache, self._max_seqlen = cache, max_seqlen
        max_pages, groups, num_groups = cache._pages_of(max_seqlen), cache._shape_of_groups, cache._num_groups
        cache._reserve(2 * max_batch, max_pages)
        self._max_changes = 2 * num_groups * max(max_batch, max_pages)
        fields = {
            "slot_mapping": (torch.int64, num_groups * max_tokens),
            "positions": (torch.int64, max_tokens),
            "cache_seqlens": (torch.int32, max_batch),
            "cu_seqlens_q": (torch.int32, max_batch + 1),
            "changes": (torch.int64, 2 * self._max_changes),  # pairs of an entry of the table and its page
        }
        with torch.inference_mode(False):
            self.block_table = torch.zeros(*groups, max_batch, max_pages, dtype=torch.int32, device=cache.device)
            self._there, there = _fields(fields, cache.device)
            self._here, here = (self._there, there) if cache._on_host else _fields(fields, torch.device("cpu"))
        slots, self.positions, self.cache_seqlens, self.cu_seqlens_q, changes = there.values()
        self.slot_mapping = slots.view(*groups, max_tokens)
        self._slots, self._positions, self._seqlens, self._starts, self._changes = (x.numpy() for x in here.values())
        self._slots = self._slots.reshape(num_groups, max_tokens).T if num_groups > 1 else self._slots  # tokens first
        self._changes = self._changes.reshape(-1, 2)
        self._changes_there = changes.view(-1, 2)
        self._header = changes.data_ptr() - self._there.data_ptr()  # bytes before the changes
        self._flat_table = self.block_table.view(-1)
        self._table_here = self._flat_table.numpy() if self._there is self._here else None
        # Rows of the cache, by row of the block table; of one group after the other.
        self._rows = np.full((num_groups, max_batch), -1)
        self._num_read = 0  # of the cache's changes
        self._clear()
        if self._table_here is None:
            self._send((), (), self._here.pin_memory())

    def _clear(self):
        """Padding alone, on the host; nothing is known of what the device has."""
        self._slots[:], self._positions[:], self._seqlens[:], self._starts[:] = -1, 0, 0, 0
        self.batch = self.num_tokens = self.max_seqlen_q = 0
        self._in_use = self._slots[:0], self._positions[:0], self._seqlens[:0]  # by the last call
        self._batch = None  # of the cache, at the last call
        self._rows[:] = -1
        self._places = {}  # the inverse of _rows

    def extend(self, seqs: "Iterable[Sequence]", token_ids: "int | Tensor | Iterable[int | TokenIds]") -> None:
        """Room for new tokens at the end of each sequence, as the cache's `extend`; then fill the buffers.

        Args:
            seqs: sequences, each at most once. Row i of the buffers is the i-th.
            token_ids: as the cache's `extend` takes them.

        Raises:
            OutOfPages, ValueError, TypeError: as the cache's `extend`, and ValueError for more sequences, tokens or a
                longer sequence than the step was made for; with nothing changed, in the buffers either. Where
                a transfer to the buffers fails, the cache is as it was, and the next call sends all of them.
        """
        cache = self._cache
        rows = cache._distinct_rows(seqs)
        new, lengths, num_groups = new_tokens(cache, token_ids, rows), cache._lengths[rows], cache._num_groups
        counts = new[0]
        ends = lengths + counts
        batch = rows.size // num_groups
        num_tokens = batch if counts is ONE_EACH else int(counts.sum()) // num_groups
        self._check_room(batch, num_tokens, ends)
        slots, positions, room = lay_out(cache, rows, lengths, ends, counts)
        try:
            message = None if self._table_here is not None else self._here.pin_memory()
            if room is not None:
                copy_pages(cache, room)
            self._fill(counts, num_tokens, cache._own_slots(slots), positions, ends)
            if room is not None or cache._batch is not self._batch or cache._changes.count != self._num_read:
                self._send(*self._changed_entries(rows, ends, room), message)
            elif message is not None:
                self._send((), (), message)
        except BaseException:
            take_back(cache, room)
            raise
        book(cache, rows, lengths, ends, new, slots, room)
        self._num_read = cache._changes.count

    def _check_room(self, batch, num_tokens, ends):
        if batch > self._seqlens.size:
            fail("seqs", f"at most max_batch = {self._seqlens.size} sequences", batch)
        if num_tokens > self._positions.size:
            fail("token_ids", f"at most max_tokens = {self._positions.size} new tokens", num_tokens)
        if largest(ends) > self._max_seqlen:
            fail("token_ids", f"sequences of at most max_seqlen = {self._max_seqlen} tokens", largest(ends))

    def _fill(self, counts, num_tokens, slots, positions, ends):
        """Write all but the table to the host's memory; the rest of it is padding already.

        All groups have the same positions, lengths and counts: those of the first are taken.
        """
        num_groups = self._cache._num_groups
        if num_groups > 1:
            ends, slots = ends[: ends.size // num_groups], slots.reshape(num_groups, num_tokens).T
            counts, positions = counts if counts is ONE_EACH else counts[: ends.size], positions[:num_tokens]
        batch, one_each = ends.size, counts is ONE_EACH
        if batch != self.batch or num_tokens != self.num_tokens:
            self._slots[num_tokens : self.num_tokens] = -1
            self._positions[num_tokens : self.num_tokens] = 0
            self._seqlens[batch : self.batch] = 0
            self._in_use = self._slots[:num_tokens], self._positions[:num_tokens], self._seqlens[:batch]
        own_slots, own_positions, own_seqlens = self._in_use
        own_slots[...], own_positions[...], own_seqlens[...] = slots, positions, ends
        if one_each and batch == self.batch == self.num_tokens and self.max_seqlen_q <= 1:
            return  # as in the call before
        longest = min(1, batch) if one_each else int(counts.max())
        self._starts[1 : batch + 1] = np.broadcast_to(counts, ends.shape).cumsum()
        self._starts[batch + 1 :] = num_tokens
        self.batch, self.num_tokens, self.max_seqlen_q = batch, num_tokens, longest

    def _changed_entries(self, rows, ends, room):
        """(entries of the table as if it were flat, their pages), two lists: what the device does not have."""
        cache, width, max_batch = self._cache, self.block_table.shape[-1], self._seqlens.size
        tables, held_from, page_size = cache._tables, cache._firsts, cache.page_size
        entries, pages = [], []
        for place, first in self._changed_rows(rows, room).items():
            row, start = self._rows.item(place), place * width
            first = max(first, held_from.item(row))
            last = (ends.item(place % max_batch) + page_size - 1) // page_size
            entries += range(start + first, start + last)
            pages += tables[row, first:last].tolist()
        return entries, pages

    def _changed_rows(self, rows, room):
        """{row of the block table: its first entry that the device may not have}"""
        batch, changes = self._cache._batch, self._cache._changes.since(self._num_read)
        if changes is None:
            changes, self._batch, self._rows[:] = (), None, -1
        if room is not None:  # what is not in the log yet
            changes = chain(changes, zip(room.rows, room.columns))
        firsts = {}
        if batch is not self._batch:
            rows = rows.reshape(len(self._rows), -1)
            places = np.arange(self._rows.size).reshape(self._rows.shape)[:, : rows.shape[1]]
            here = self._rows[:, : rows.shape[1]]
            firsts = dict.fromkeys(places[here != rows].tolist(), 0)
            self._batch, self._places = batch, dict(zip(rows.ravel().tolist(), places.ravel().tolist()))
            self._rows[:, : rows.shape[1]], self._rows[:, rows.shape[1] :] = rows, -1
        for row, column in changes:
            place = self._places.get(row)
            if place is not None:
                firsts[place] = min(column, firsts[place]) if place in firsts else column
        return firsts

    def _send(self, entries, pages, message):
        """Bring the device up to date: send what `_fill` wrote, from pinned memory as large, and put pages in these
        entries of the table. On the host the buffers are what `_fill` wrote, and there is no message."""
        if self._table_here is not None:
            if entries:
                self._table_here[entries] = pages
            return
        together = min(len(entries), self._max_changes)
        self._changes[:together, 0] = entries[:together]
        self._changes[:together, 1] = pages[:together]
        used = slice(self._header + 16 * together)
        try:
            message[used].numpy()[:] = self._here[used].numpy()
            # Torch gives pinned memory to others only after transfers from it, so that calls can run ahead of the GPU.
            self._there[used].copy_(message[used], non_blocking=True)
            if together:
                self._put(self._changes_there[:together])
            if together < len(entries):
                self._put(self._cache._to_device(np.array([entries[together:], pages[together:]]).T.copy()))
        except BaseException:
            self._clear()
            raise

    def _put(self, changes):
        """Apply changes that are on the device. Of a little-endian int64, the int32 is the first half."""
        self._flat_table.scatter_(0, changes[:, 0], changes.view(torch.int32)[:, 2])


def _fields(fields, device):
    """One piece of memory of zeros, and a tensor in it for each {name: (dtype, size)}."""
    sizes = [-(-dtype.itemsize * size // ALIGNMENT) * ALIGNMENT for dtype, size in fields.values()]
    memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    pieces = zip(fields.items(), memory.split(sizes))
    return memory, {name: piece[: dtype.itemsize * size].view(dtype) for (name, (dtype, size)), piece in pieces}
