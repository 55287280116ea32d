"""Which sequence holds which pages. What a page stores is left to the caches.

The state is in `SequenceRows` and `BlockPool`. Public methods that are more than a few lines are functions of a cache
in other files: `prefix` names full pages and finds them, `extension` makes room for tokens, `drafts` keeps accepted
ones, `transfer` moves pages out and in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._host.checks import check_bool, check_int, check_length, check_size, fail
from .._host.key_shard import KeyShard, num_ranks_of
from ..merge.tree import tree_work
from .arrays import NO_LIMIT, from_list, index_of, largest, written_zeros
from .copy import copy_kv_pages
from .drafts import keep_drafts
from .events import EventLog, PageEvent, group_suffix
from .extension import book, copy_pages, lay_out, new_tokens, take_back
from .hashing import page_hashes, root_hash
from .layers import LayerGroups
from .pool import BlockPool
from .prefix import find_prefix, name_full_pages
from .prefix_groups import PrefixGroups
from .rows import SequenceRows
from .stats import CacheStats, stats_of
from .step import CacheStep
from .token_ids import as_ids
from .transfer import export_pages, import_pages, page_places

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


@dataclass(slots=True, eq=False)
class _Batch:
    """The sequences of the last call. The next calls of a step are likely to name the same ones."""

    seqs: list[Sequence]
    rows: NDArray[np.int64]  # those of all sequences in the first group, then those in the second
    is_distinct: bool
    # So many times at least, a token can be added to each with nothing to do first; -1: for each there is something.
    num_spare: int = 0


NO_BATCH = _Batch([], from_list([]), True)


class PagedSequences(SequenceRows):
    """Sequences on pages of a pool, with prefix sharing and copy-on-write; base class of the caches.

    A subclass owns the memory of the pages and names it (`_page_tensors`). Everything here lives on the host: a step
    costs a few operations on arrays of `SequenceRows`, and a loop over those sequences that need pages or have pages to
    be named. With groups of layers, the rows of a sequence grow together, and are named, copied and given back each on
    its own. See `PagedKVCache` for the rules of use. Not thread-safe.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        device: torch.device | str | int | None,
        prefix_caching: bool,
        key_shard: KeyShard | None = None,
        groups: LayerGroups | None = None,
        record_events: bool = False,
    ) -> None:
        self.key_shard = key_shard
        self._page_slots = check_size("page_size", page_size)
        self.device = torch.empty(0, device=device).device  # with its index: "cuda" is another GPU at another time
        self._on_host = self.device.type == "cpu"
        self.pool = BlockPool(num_pages, prefix_caching)
        self.layers = None if groups is None else groups.places
        self._shape_of_groups = () if groups is None else (len(groups.windows),)
        windows = [NO_LIMIT] if groups is None else [NO_LIMIT if n < 0 else n for n in groups.windows]
        super().__init__(self.pool.num_pages, self._page_slots * num_ranks_of(key_shard), windows)
        self._suffixes = list(map(group_suffix, range(self._num_groups)))
        self._page_tokens = written_zeros((self.pool.num_pages, self.page_size), np.int64)  # ids of what pages hold
        self._tokens = self._page_tokens.reshape(-1)
        self._log = EventLog(self.page_size) if check_bool("record_events", record_events) else None
        self.pool._names.log = self._log
        self._batch = NO_BATCH
        self._tokens_asked = 0
        self._tokens_found = 0

    def create(
        self, token_ids: TokenIds, salt: str | bytes | None = None, *, recompute_last_page: bool = False
    ) -> tuple[Sequence, int]:
        """Begin a sequence with as much of `token_ids` as is cached.

        The longest prefix of full pages that other sequences wrote under the same salt is shared, but at most all
        tokens but one: the model must compute at least one to go on. With `layer_windows` these are all pages of the
        layers that see all keys, and of the others those in the window of the first token that is not cached. No page
        is allocated; `extend` with the rest.

        Args:
            token_ids: list, or host array or tensor of integers; may be empty.
            salt: str, bytes or None. Only sequences of one salt share pages: a tenant, an adapter, an image.
            recompute_last_page: leave the last page that is found to be computed again. Draft models like EAGLE's need
                the model's hidden states of the tokens before the first new one, and what they cached at the end of a
                page depends on the next token.

        Returns:
            (sequence, number of tokens already cached).
        """
        ids = as_ids(token_ids)
        num_dropped = int(check_bool("recompute_last_page", recompute_last_page))
        chain = [root_hash(salt)]
        cached, pages = find_prefix(self, chain, ids, num_dropped)
        num_full, width = cached // self.page_size, self._pages_of(cached)
        del chain[1 + num_full :]
        self._widen(width)
        row = self._new_row(chain)
        self.pool._share(pages[0] if self._is_plain else np.concatenate(pages))
        for group_row, of_group in enumerate(pages, row):
            first = width - of_group.size
            self._tables[group_row, first:width] = of_group
            self._lengths[group_row], self._limits[group_row], self._known[group_row] = cached, 0, NO_LIMIT
            self._named[group_row], self._firsts[group_row] = num_full, first
        self._tokens_asked += ids.size
        self._tokens_found += cached
        return Sequence(self, row), cached

    def extend(self, seqs: Iterable[Sequence], token_ids: int | Tensor | Iterable[int | TokenIds]) -> Tensor:
        """Reserve slots for new tokens at the end of each sequence, for the whole batch or not at all.

        What the sequences held before counts as written: pages that are full can be found from now on. A sequence
        whose last page is shared and not full gets a copy of it first.

        Args:
            seqs: sequences, each at most once.
            token_ids: for each sequence the ids of its new tokens (a list, or a host array or tensor), or their number
                where ids are not known: others then never find these tokens, nor what follows. A tensor or array
                (batch, n) for n new tokens each; an int for as many unknown tokens each. May be 0 or empty.

        Returns:
            slot_mapping: int64 on the cache's device, page * page_size + offset of each new token, sequence by
            sequence; with a mesh those of this rank's pages, and -1 for tokens of other ranks. Write them, with
            `append_kv_cache` or `append_latent_cache`, before these sequences or forks of them are extended again.
            With `layer_windows` (groups, tokens), a row for each group of layers.

        Raises:
            OutOfPages: with nothing changed.
            ValueError: a sequence was freed, belongs to another cache, or is listed twice.
        """
        rows = self._distinct_rows(seqs)
        new, lengths = new_tokens(self, token_ids, rows), self._lengths[rows]
        ends = lengths + new[0]
        slots, _, room = lay_out(self, rows, lengths, ends, new[0])
        try:
            own_slots = self._own_slots(slots)
            sent = self._to_device(self._by_group(own_slots) if self._shape_of_groups else own_slots)
            if room is not None:
                copy_pages(self, room)
        except BaseException:
            take_back(self, room)
            raise
        book(self, rows, lengths, ends, new, slots, room)
        return sent

    def step(self, max_batch: int, max_seqlen: int, max_tokens: int | None = None) -> CacheStep:
        """A `CacheStep`: slots, lengths and block tables at addresses that stay, so that a CUDA graph replays.

        The cache makes room for 2 * max_batch sequences of max_seqlen tokens, such as beams beside those that they
        replace, and writes its memory, so that no later call has to ask the system for it. Without a step a call does,
        4 KB at a time. Tables move where sequences times groups of layers exceed num_pages or 2^34 / num_pages.

        Args:
            max_batch: most sequences of a call.
            max_seqlen: most tokens of a sequence; block tables are that wide.
            max_tokens: most new tokens of a call, all sequences together; None is max_batch, one each.
        """
        return CacheStep(self, max_batch, max_seqlen, max_tokens)

    def prefix_groups(
        self,
        num_heads_q: int,
        max_batch: int | None = None,
        seqlen_q: int = 1,
        max_nodes: int = 64,
        max_slots: int = 8,
        layer_group: int | None = None,
    ) -> PrefixGroups:
        """A `PrefixGroups`: the prefix trees of batches, for `paged_attention` and `mla_decode`.

        Args:
            num_heads_q: query heads of a call, on this GPU.
            max_batch: sequences of a tree at an address that stays, for CUDA graphs; None: each tree is a new one.
            seqlen_q: queries of each sequence, if max_batch is given.
            max_nodes, max_slots: nodes of the tree and most of them above a sequence, if max_batch is given. A graph
                has a program for each, and memory for results of max_slots nodes. Trees that need more are not made.
            layer_group: with `layer_windows` the group of layers, `group` of a `LayerPlace`, whose pages are compared.
                None without.

        Example:
            >>> cache = triton_attn.PagedKVCache(257, 16, num_layers=1, num_kv_heads=8, head_dim=64)
            >>> seq, _ = cache.create([])
            >>> slots = cache.extend([seq], [4096])
            >>> groups, seqs = cache.prefix_groups(num_heads_q=32), cache.fork([seq] * 16)
            >>> groups.tree(seqs) is not None  # for prefix_tree of paged_attention; None where none pays
            True
        """
        if self.layers is None and layer_group is not None:
            fail("layer_group", "None without layer_windows", layer_group)
        group = 0 if self.layers is None else check_int("layer_group", layer_group, "an int with layer_windows")
        if not 0 <= group < self._num_groups:
            fail("layer_group", f"0 to {self._num_groups - 1}", layer_group)
        work = tree_work(self.page_size, num_heads_q, *self._tree_shape(), self.device)
        return PrefixGroups(self, group, work, max_batch, seqlen_q, max_nodes, max_slots)

    def commit(self, seqs: Iterable[Sequence]) -> None:
        """Say that the tokens of these sequences are written: their full pages can be found from now on.

        `extend` implies it for the sequences it extends.
        """
        name_full_pages(self, self._rows(seqs).tolist())

    @overload
    def fork(self, seqs: Sequence) -> Sequence: ...

    @overload
    def fork(self, seqs: Iterable[Sequence]) -> list[Sequence]: ...

    def fork(self, seqs: Sequence | Iterable[Sequence]) -> Sequence | list[Sequence]:
        """A second sequence with the same tokens, on the same pages: the first to write in a shared one copies it.

        Of a list, the fork of each; a sequence may be listed several times. `[seq] * n` has n forks.
        """
        rows = self._rows(_as_iterable(seqs))
        num_seqs = len(self._batch.seqs)
        copies, chains = self._new_rows(num_seqs), self._chains
        tables, pages = self._held(rows)
        self.pool._share_held(pages)
        self._limits[rows] = 0
        firsts, num_groups = copies.tolist()[:num_seqs], self._num_groups
        for row, copy in zip(rows.tolist(), firsts):
            chains[copy // num_groups] = chains[row // num_groups]
        self._tables[:, : tables.shape[1]][copies] = tables
        self._states[:, copies] = self._states.take(rows, axis=1)
        forks = list(map(Sequence, repeat(self), firsts))
        self._batch = _Batch(list(forks), copies, True, num_spare=-1)  # they are likely to be extended next
        return forks[0] if isinstance(seqs, Sequence) else forks

    def truncate(self, seq: Sequence, n: int) -> None:
        """Keep the first n tokens and give up the pages after them: rejected drafts, a prompt that is changed.

        With `layer_windows` pages behind a window are gone: n is 0, or at least such that the next token sees only
        pages that are there. Tokens since the last `extend` can always be given up.
        """
        row, length = self._row(seq), len(seq)
        n = check_length("n", n)
        if n > length:
            fail("n", f"at most the sequence's {length} tokens", n)
        least = self._least_length(row)
        if 0 < n < least:
            fail("n", f"0, or at least {least}: earlier pages were given back", n)
        first, last = self._pages_of(n), self._pages_of(length)
        self.pool._release(self._pages_between(row, first, last))
        for group_row in range(row, row + self._num_groups):
            self._tables[group_row, first:last] = 0
            if first < last:
                self._changes.extend([group_row], [first])
            self._lengths[group_row] = n
            self._limits[group_row] = 0
            if n == 0 or n <= self._known[group_row]:
                self._known[group_row] = NO_LIMIT
            self._named[group_row] = min(self._named[group_row], n // self.page_size)
            if n == 0:
                self._firsts[group_row] = 0
        self._batch.num_spare = 0

    def keep(
        self,
        seqs: Iterable[Sequence],
        num_drafts: int,
        accepted: Iterable[Iterable[int]],
        token_ids: Iterable[TokenIds] | None = None,
    ) -> None:
        """Of the last num_drafts tokens of each sequence keep a path, for the whole batch or not at all.

        What the cache holds of these tokens moves to follow the tokens before them, in every layer and on the pages of
        every group of layers: a step after the verification of a tree of drafts (`tree_mask` of `paged_attention`).
        Extend a sequence by the *number* of its drafts, not their ids: tokens of a tree do not follow each other, and
        must not be found as a prefix. Pages that are written and shared are copied first.

        Over a mesh all ranks make the same call. They compare it first, in a collective of a few bytes for each draft
        with a sync, so that no rank changes anything where one refuses. Where accepted tokens change their ranks, one
        all-to-all follows. A rank receives `kv_cache_bytes_per_token` for each accepted token i that it holds from now
        on and did not hold before; with `layer_windows` that of the layers of a page, for each group that still holds
        the token's page:

            rank(start + i) = own,  rank(start + accepted[i]) != own,  rank(t) = t // interleave % num_ranks

        where start is the length of the sequence without its drafts.

        Args:
            seqs: sequences, each at most once.
            num_drafts: how many of the last tokens of each sequence are drafts.
            accepted: for each sequence the indices, 0 to num_drafts - 1, of the drafts that stay, in their new order;
                may be empty.
            token_ids: for each sequence the ids of these tokens, so that they can be found once they fill pages. None
                where they are not known.

        Raises:
            OutOfPages: with nothing changed.
            ValueError: a sequence was freed, belongs to another cache, is listed twice, or has fewer tokens; an index
                is out of range or listed twice; with `layer_windows` also if pages of the drafts were given back, which
                those since the last `extend` have not been.
            On every rank of a mesh also if ranks differ, or another one refuses the call. If the device of one rank
            fails meanwhile, only its cache stays as it was: docs/many-gpus.md says how the others find out.

        Example:
            >>> cache = triton_attn.PagedKVCache(8, 16, num_layers=2, num_kv_heads=1, head_dim=64)
            >>> seq, _ = cache.create([])
            >>> slots = cache.extend([seq], [10])
            >>> slots = cache.extend([seq], [4])  # drafts, which the model writes and verifies
            >>> cache.keep([seq], 4, [[0, 2]])  # the first and the third are right
            >>> len(seq)
            12
        """
        keep_drafts(self, seqs, num_drafts, accepted, token_ids)

    def free(self, seqs: Sequence | Iterable[Sequence]) -> None:
        """End a sequence, or each of a list. Pages that no other holds become free.

        What was committed can be found until it is reused: the last pages of a sequence first, and of a list those of
        the last sequence.
        """
        rows = self._distinct_rows(_as_iterable(seqs))
        tables, pages = self._held(rows)
        self.pool._release(pages)
        self._tables[:, : tables.shape[1]][index_of(rows)] = 0
        freed = rows.tolist()[: len(self._batch.seqs)]
        for seq, row in zip(self._batch.seqs, freed):
            self._chains[row // self._num_groups] = None
            seq._cache = None
        self._unused_rows.extend(freed)
        self._batch = NO_BATCH

    def reset_prefix_cache(self) -> None:
        """Let nothing that is cached by now be found: after a change of the weights. O(num_pages).

        Sequences go on as they are. What they hold, and what they write after it, is not found by others either.
        """
        self.pool.forget_all()
        used = slice(len(self._chains) * self._num_groups)
        self._known[used][self._lengths[used] > 0] = -1  # not 0, up to which `keep` may learn ids
        self._named[used] = self._limits[used] = self._batch.num_spare = 0

    def take_events(self) -> list[PageEvent]:
        """What can be found from now on and what no longer, since the last call, in order; see `record_events`.

        Replayed, `PagesStored`, `PagesRemoved` and `PagesCleared` give the hashes of all prefixes that `create` finds.
        """
        if self._log is None:
            fail("take_events", "a cache that was made with record_events=True", "one without")
        return self._log.take()

    def page_hashes(self, token_ids: TokenIds, salt: str | bytes | None = None) -> list[bytes]:
        """The names of the full pages of a prompt, under which they are found: equal in every cache of this page_size.

        A name follows from the salt, the page's tokens and all before them; it is the key of a page in a store outside.

        Example:
            >>> cache = triton_attn.PagedKVCache(8, 16, num_layers=2, num_kv_heads=1, head_dim=64)
            >>> names = cache.page_hashes(range(40))
            >>> len(names), len(names[0]), names == cache.page_hashes(range(32))  # two full pages
            (2, 32, True)
            >>> names[0] == cache.page_hashes(range(40), salt="tenant")[0]
            False
        """
        return list(page_hashes([root_hash(salt)], as_ids(token_ids), self.page_size))

    def page_places(self, num_tokens: int, first_page: int = 0) -> list[tuple[int, int]]:
        """(group, column of the block table) of each page that `export_pages` gives of a sequence of so many tokens.

        Without `layer_windows` the columns from first_page on, of group 0. With it group by group: all of a group that
        sees all keys, and of one with a window those that the next token sees.

        Example:
            >>> size = dict(num_layers=2, num_kv_heads=1, head_dim=64)
            >>> cache = triton_attn.PagedKVCache(16, 16, **size, layer_windows=[-1, 30])
            >>> cache.page_places(80)
            [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4)]
        """
        return page_places(self, num_tokens, first_page)

    def export_pages(
        self, seq: Sequence, first_page: int = 0, *, to: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Copy a sequence's pages from `first_page` on out of the cache, all layers in one launch.

        The copy runs on the current stream: read it once the stream got so far. The sequence stays as it is, and may
        be freed at once. With `layer_windows` the pages of all groups follow each other, as `page_places` says: of a
        group with a window those that the next token sees.

        Args:
            first_page: pages before it are left out: another tier has them.
            to: tensors that are written, of the shapes that are returned, on the cache's device or in pinned host
                memory. None allocates them, pinned.

        Returns:
            keys and values, or latents: tensors (num_layers, pages, page_size, num_heads_kv, width) as the cache stores
            them. num_heads_kv of latents is 1, and with `layer_windows` num_layers is that of a group. With
            token_scales two more, whose width is the bytes of a scale: view them as torch.float32. Slots past the last
            token hold anything.

        Raises:
            ValueError: as `extend`; first_page is beyond the sequence's last page; `to` has other shapes.

        Example:
            >>> cache = triton_attn.PagedKVCache(8, 16, num_layers=2, num_kv_heads=1, head_dim=64)
            >>> seq, _ = cache.create([])
            >>> slots = cache.extend([seq], [range(40)])  # three pages, which the model writes
            >>> k, v = cache.export_pages(seq, first_page=1)
            >>> k.shape
            torch.Size([2, 2, 16, 1, 64])
        """
        return export_pages(self, seq, first_page, to)

    def import_pages(
        self, pages: tuple[Tensor, ...], token_ids: int | TokenIds, salt: str | bytes | None = None
    ) -> Sequence:
        """Begin a sequence whose last pages come from elsewhere: from a host tier, a store, another cache.

        Full pages that this cache can find are shared, and only the others are copied, all layers in one launch on the
        current stream. The sequence goes on as if its tokens had been computed here. Its full pages can be found at
        once: `cache.free(cache.import_pages(...))` makes them a cached prefix.

        Args:
            pages: what `export_pages` returned for the last pages of these tokens, on the cache's device or in pinned
                host memory; those of `page_places` before them have to be found here. They may be overwritten once the
                stream got so far.
            token_ids: ids of all tokens of the sequence, or their number where ids are not known.
            salt: as in `create`.

        Raises:
            OutOfPages: with nothing changed.
            ValueError: pages do not fit the cache or the tokens, or pages before them are not found; nothing changed.

        Example:
            >>> cache = triton_attn.PagedKVCache(8, 16, num_layers=2, num_kv_heads=1, head_dim=64)
            >>> pages = torch.randn(2, 2, 3, 16, 1, 64).bfloat16().unbind()  # keys and values of three pages
            >>> seq = cache.import_pages(pages, range(40))
            >>> len(seq), torch.equal(cache.v_cache[:, cache.block_table([seq])[0]], pages[1])
            (40, True)
            >>> cache.create(range(40))[1]  # tokens that a second prompt finds
            32
        """
        return Sequence(self, import_pages(self, pages, token_ids, salt))

    def block_table(self, seqs: Iterable[Sequence]) -> Tensor:
        """int32 (batch, pages of the longest) on the cache's device: the pages of each sequence, then zeros.

        With `layer_windows` (groups, batch, pages of the longest), with zeros also where pages behind the group's
        window were given back.
        """
        rows = self._rows(seqs)
        width = self._pages_of(largest(self._lengths[rows]))
        tables = self._tables[rows, :width]
        return self._to_device(self._by_group(tables) if self._shape_of_groups else tables)

    def cache_seqlens(self, seqs: Iterable[Sequence]) -> Tensor:
        """int32 (batch,) on the cache's device: the number of tokens of each sequence."""
        rows = self._rows(seqs)[: len(self._batch.seqs)]
        return self._to_device(self._lengths[rows].astype(np.int32))

    def stats(self) -> CacheStats:
        """`CacheStats` of this moment; O(num_pages)."""
        return stats_of(self)

    def _tree_shape(self) -> tuple[int, int, int]:
        """KV heads, elements of a row of the results, and bytes of a token in one layer."""
        raise NotImplementedError

    def _page_tensors(self):
        """The memory of the pages: tensors (num_layers, num_pages, page_size, ...), as `copy_kv_pages` takes them."""
        raise NotImplementedError

    def _copy_pages(self, src_pages, dst_pages):
        """Copy what pages hold; int64 arrays (n,), no page in both."""
        pages = [self._to_device(pages.astype(np.int32)) for pages in (src_pages, dst_pages)]
        copy_kv_pages(self._page_tensors(), *pages)

    def _own_slots(self, slots):
        """Slots of tokens as kernels take them: with a mesh those of this rank, -1 for tokens of others."""
        return slots if self.key_shard is None else self.key_shard.slots_of(slots, self._page_slots)

    def _rows(self, seqs):
        """Rows of sequences that are alive and of this cache."""
        if not isinstance(seqs, (list, Iterable)):
            fail("seqs", "a list of sequences", type(seqs).__name__, TypeError)
        seqs = list(seqs)
        if seqs != self._batch.seqs:  # sequences are equal if they are the same
            rows = [seq._row if type(seq) is Sequence and seq._cache is self else self._row(seq) for seq in seqs]
            self._batch = _Batch(seqs, self._rows_of_groups(rows), len(set(rows)) == len(rows))
        return self._batch.rows

    def _distinct_rows(self, seqs):
        rows = self._rows(seqs)
        if not self._batch.is_distinct:
            fail("seqs", "each sequence once", "a sequence that is listed twice")
        return rows

    def _row(self, seq):
        if getattr(seq, "_cache", None) is self:
            return seq._row
        if not isinstance(seq, Sequence):
            fail("seqs", "sequences of this cache", type(seq).__name__, TypeError)
        fail("seqs", "sequences of this cache", "a freed one" if seq._cache is None else "one of another cache")

    def _to_device(self, x):
        x = torch.from_numpy(x)
        return x if self._on_host else x.pin_memory().to(self.device, non_blocking=True)


def _as_iterable(seqs):
    return seqs if isinstance(seqs, (list, Iterable)) else [seqs]  # asked first, list is several times faster
