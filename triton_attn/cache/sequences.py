"""Which sequence holds which pages. What a page stores is left to the caches."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._host.checks import check_bool, check_int, check_length, check_size, fail
from .._host.key_shard import KeyShard, num_ranks_of
from ..merge.tree import tree_work
from .arrays import INT64, NO_LIMIT, from_list, largest, ranges, reserved_zeros, written_zeros
from .copy import copy_kv_pages
from .drafts import keep_drafts
from .events import EventLog, PageEvent, group_suffix
from .hashing import page_hashes, root_hash
from .layers import LayerGroups
from .pool import NO_PAGES, BlockPool
from .prefix import find_in_groups
from .prefix_groups import PrefixGroups
from .step import CacheStep, ChangeLog
from .token_ids import ONE_EACH, as_batch, as_ids
from .transfer import export_pages, import_pages, page_places

NOTHING_BEHIND = [], NO_PAGES
NUM_STATES = 6  # see _grow
RESERVED_BYTES = 2**36  # most addresses for the tables of a cache: of 10^6 pages, 17,000 sequences of any length
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


@dataclass(slots=True, eq=False)
class _Batch:
    seqs: list[Sequence]
    rows: NDArray[np.int64]  # those of all sequences in the first group, then those in the second
    is_distinct: bool
    # So many times, or more often, a token can be added to each with nothing to do first; -1: to each something is.
    num_spare: int = 0


NO_BATCH = _Batch([], from_list([]), True)


@dataclass(slots=True, eq=False)
class _Room:
    """What rows need to grow, see `_room_for`."""

    rows: list[int]
    columns: list[int]  # of the next token of each
    limits: list[int]  # 0 for those that get no token
    growths: list[tuple[int, int, int]]  # (row, first column, last column) of new pages
    full: list[int]  # rows with pages to be named
    copied: list[tuple[int, int]]  # what `_to_copy` finds
    originals: list[int]
    kept: list[int]
    behind: list[tuple[int, slice]]  # what `_pages_behind` finds
    released: NDArray[np.integer]
    new_pages: NDArray[np.int64]  # copies, then those of growths
    bases: NDArray[np.int64]  # of the rows until now
    is_copied: bool = False


class PagedSequences:
    """Tables of pages for any number of sequences, with prefix sharing and copy-on-write; base class of the caches.

    A subclass owns the memory of the pages and names it (`_page_tensors`). Everything here lives on the
    host, in arrays with a row per sequence: a step costs a few array operations, and a loop over those sequences that
    need pages or have pages to be named. With groups of layers a sequence has a row for each group, one after the
    other, which grow together and are named, copied and given back each on its own. See `PagedKVCache` for the rules of
    use. Not thread-safe.
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
        self.page_size = self._page_slots * num_ranks_of(key_shard)
        self.device = torch.empty(0, device=device).device  # with its index: "cuda" is another GPU at another time
        self._on_host = self.device.type == "cpu"
        self.pool = BlockPool(num_pages, prefix_caching)
        self.layers = None if groups is None else groups.places
        self._shape_of_groups = () if groups is None else (len(groups.windows),)
        # Keys before a query that it sees, by group.
        self._windows = [NO_LIMIT] if groups is None else [NO_LIMIT if n < 0 else n for n in groups.windows]
        self._num_groups = len(self._windows)
        self._is_plain = self._windows == [NO_LIMIT]
        self._suffixes = list(map(group_suffix, range(self._num_groups)))
        self._tables: NDArray[np.int32] = np.zeros((0, 0), np.int32)  # entries past a sequence's last page are 0
        self._states: NDArray[np.int64] = np.zeros((NUM_STATES, 0), np.int64)
        self._changes = ChangeLog()
        # Of each sequence, or None: its root and the hashes of its first pages, as many as are named. Forks share the
        # list; what comes after is another's.
        self._chains = []
        self._unused_rows = []  # the first of each sequence
        # A sequence can hold all pages, and, without forks, there can be as many sequences as pages.
        width = max(16, self.pool.num_pages)
        num_rows = max(16 * self._num_groups, min(self.pool.num_pages, RESERVED_BYTES // (4 * width)))
        try:
            self._grow(num_rows, width)
        except OSError:  # a limit of addresses: take what is needed, when it is needed
            self._grow(16 * self._num_groups, 16)
        self._page_tokens = written_zeros((self.pool.num_pages, self.page_size), np.int64)
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
        root, page_size = root_hash(salt), self.page_size
        chain = [root]
        hashes, usable = page_hashes(chain, ids, page_size), partial(_usable_tokens, ids.size, page_size, num_dropped)
        if self._is_plain:
            found = self.pool.lookup(hashes)
            cached = usable(found.size)
            pages = [found[: self._pages_of(cached)]]
        else:
            cached, pages = find_in_groups(self._find, hashes, self._windows, NO_LIMIT, page_size, usable)
        num_full, width = cached // page_size, self._pages_of(cached)
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
        new, lengths = self._new_tokens(token_ids, rows), self._lengths[rows]
        ends = lengths + new[0]
        slots, _, room = self._lay_out(rows, lengths, ends, new[0])
        try:
            own_slots = self._own_slots(slots)
            sent = self._to_device(self._by_group(own_slots) if self._shape_of_groups else own_slots)
            if room is not None:
                self._copy_tails(room)
        except BaseException:
            self._take_back(room)
            raise
        self._extend(rows, lengths, ends, new, slots, room)
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
        self._name_full_pages(self._rows(seqs).tolist())

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
            On every rank of a mesh also if ranks differ, or another one refuses the call.

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
        self._tables[:, : tables.shape[1]][_index_of(rows)] = 0
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
        pool = self.pool
        seqs = from_list([i for i, chain in enumerate(self._chains) if chain is not None])
        lengths = self._lengths[seqs * self._num_groups]
        rows = (seqs[:, None] * self._num_groups + np.arange(self._num_groups)).ravel()
        counts = self._pages_of(self._lengths[rows]) - self._firsts[rows]
        columns = ranges(self._firsts[rows], counts)
        tokens = np.minimum(self._lengths[rows].repeat(counts) - self.page_size * columns, self.page_size)
        fill = np.zeros(pool.num_pages, np.int64)
        np.maximum.at(fill, self._tables[rows.repeat(counts), columns], tokens)
        return CacheStats(
            num_pages=pool.num_pages,
            pages_held=pool.num_pages - pool.num_free,
            pages_shared=pool.num_shared,
            pages_free=pool.num_free,
            pages_cached=pool.num_cached,
            num_sequences=seqs.size,
            num_tokens=int(lengths.sum()),
            slots_used=int(fill.sum()),
            tokens_asked=self._tokens_asked,
            tokens_found=self._tokens_found,
        )

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

    # An extension has three steps. `_lay_out` says where the new tokens go, which `_take_back` undoes. Then comes all
    # that the device may refuse: transfers, and copies of pages by `_copy_tails`. The bookkeeping of `_extend` is last,
    # and does not fail.

    def _lay_out(self, rows, lengths, ends, counts):
        """(slots of new tokens, their positions, a `_Room` or None) of rows that grow from these lengths to `ends`.

        Raises OutOfPages. New pages are in the tables, and nobody else's yet.
        """
        # An extension by nothing names full pages too.
        batch, room, one_each = self._batch, None, counts is ONE_EACH
        if one_each and batch.num_spare > 0:
            batch.num_spare -= 1
        elif batch.num_spare < 0:
            batch.num_spare = 0
            room = self._room_for(rows, lengths, ends)
        else:
            left = self._limits[rows] - (ends if one_each else np.maximum(ends, lengths + 1))
            least = left.item(left.argmin()) if left.size else 0
            batch.num_spare = max(least, 0)
            if least < 0:
                short = (left < 0).nonzero()[0]  # it indexes faster than a mask
                room = self._room_for(rows[short], lengths[short], ends[short])
        if one_each:
            return self._bases[rows] + lengths, lengths, room
        positions = ranges(lengths, counts)
        columns = positions // self.page_size
        return (self._tables[rows.repeat(counts), columns] - columns) * self.page_size + positions, positions, room

    def _extend(self, rows, lengths, ends, new, slots, room):
        """Rows grow to `ends` by what `as_batch` returns."""
        _, ids, unknown = new
        if room is not None:
            self._make_room(room)
        if ids is not None:
            self._tokens[slots if unknown is None else slots[~unknown.repeat(new[0])]] = ids
        if unknown is not None:
            self._known[rows[unknown]] = np.minimum(self._known[rows], lengths)[unknown]
        self._lengths[rows] = ends

    def _room_for(self, rows, lengths, ends):
        """The `_Room` of rows that grow from `lengths` to `ends`, with new pages in their tables. Raises OutOfPages.

        Few rows of a batch come here in a step: a loop over them is faster than operations on short arrays.
        """
        page_size, tails, growths, full, growth, width = self.page_size, [], [], [], 0, 0
        bases, columns, limits = self._bases[rows], [], []
        rows, lengths, ends, named = rows.tolist(), lengths.tolist(), ends.tolist(), self._named[rows].tolist()
        for row, length, end, num_named in zip(rows, lengths, ends, named):
            column, first, last = length // page_size, -(-length // page_size), -(-end // page_size)
            columns.append(column)
            # Tokens that fill a page go up to it or beyond, and then the page has to be named.
            limits.append((column + 1) * page_size if end > length else 0)
            if end > length and first > column:  # it goes on in its last page
                tails.append((row, column))
            if last > first:
                growths.append((row, first, last))
                growth, width = growth + last - first, max(width, last)
            if column > num_named:
                full.append(row)
        copied, originals, kept = self._to_copy(tails)
        used = len(copied)
        behind, released = NOTHING_BEHIND if self._is_plain else self._pages_behind(rows, lengths)
        if used + growth > self.pool.num_free:
            self.pool._check_free(used + growth, released)
        self._widen(width)

        # Nothing fails from here on.
        new_pages, tables = self.pool._next_free(used + growth, released), self._tables
        for entry, copy in zip(copied, new_pages.tolist()):
            tables[entry] = copy
        for row, first, last in growths:
            tables[row, first:last] = new_pages[used : used + last - first]
            used += last - first
        for row, column, limit in zip(rows, columns, limits):
            if limit:
                self._bases[row] = (tables.item(row, column) - column) * page_size
        return _Room(rows, columns, limits, growths, full, copied, originals, kept, behind, released, new_pages, bases)

    def _copy_tails(self, room):
        if room.copied:
            self._copy_pages(from_list(room.originals), room.new_pages[: len(room.copied)])
            room.is_copied = True

    def _take_back(self, room):
        """Undo `_lay_out`. What a copy has overwritten since is found no longer."""
        if room is None:
            return
        for entry, original in zip(room.copied, room.originals):
            self._tables[entry] = original
        for row, first, last in room.growths:
            self._tables[row, first:last] = 0
        self._bases[room.rows] = room.bases
        if room.is_copied:
            self.pool.forget(room.new_pages[: len(room.copied)])

    def _make_room(self, room):
        """What rows need is theirs. What is given back was named first, and can be found."""
        if room.full:
            self._name_full_pages(room.full)
        if room.behind:
            self._give_back(room.behind, room.released)
        self.pool._take(room.new_pages)
        if room.kept:
            self.pool._forget(room.kept)
        if room.copied:
            self._leave(room.originals, room.new_pages[: len(room.copied)])
        for row, limit in zip(room.rows, room.limits):
            self._limits[row] = limit
        self._changes.extend(room.rows, room.columns)
        if not self._is_plain:
            self._limit_by_windows(room.rows)

    def _pages_behind(self, rows, lengths):
        """([(row, slice of columns)], their pages): what is held, and no token from these lengths on sees."""
        behind = []
        for row, length in zip(rows, lengths):
            first, last = self._firsts.item(row), (length - self._windows[row % self._num_groups]) // self.page_size
            if last > first:
                behind.append((row, slice(first, last)))
        return behind, np.concatenate([self._tables[span] for span in behind]) if behind else NO_PAGES

    def _give_back(self, behind, pages):
        self.pool._release(pages)
        for row, columns in behind:
            self._tables[row, columns] = 0
            self._firsts[row] = columns.stop

    def _limit_by_windows(self, rows):
        """Rows have to do something from the length on at which their next page is behind the window."""
        for row in rows:
            next_length = (self._firsts.item(row) + 1) * self.page_size + self._windows[row % self._num_groups]
            self._limits[row] = min(self._limits.item(row), next_length)

    def _least_length(self, row):
        """From how many tokens on the next one sees only pages that are there, in all groups of a sequence."""
        if self._is_plain:
            return 0
        firsts = self._firsts[row : row + self._num_groups].tolist()
        return max(first and first * self.page_size + window for first, window in zip(firsts, self._windows))

    def _to_copy(self, entries):
        """Of the pages at these (row, column) of the tables, which are about to be written, those that must be copied:
        (their entries, these pages, the pages that need no copy), three lists.

        A page that nobody but these rows holds is kept by the last of them.
        """
        tables, refs_of, left, copied, originals, kept = self._tables, self.pool._refs_of, {}, [], [], []
        for entry in entries:
            page = tables.item(entry)
            references = left.get(page) or refs_of[page]
            left[page] = references - 1
            if references > 1:
                copied.append(entry)
                originals.append(page)
            else:
                kept.append(page)
        return copied, originals, kept

    def _leave(self, originals, copies):
        """Give up pages that `_to_copy` found, whose copies were made."""
        self._page_tokens[copies] = self._page_tokens.take(originals, axis=0)
        if self._is_plain:  # others hold each
            self.pool._release_shared(originals)
        else:  # or held it: what is behind their windows may have been given back since `_to_copy`
            self.pool._release(from_list(originals))

    def _slots_of(self, row, positions):
        """The slots of a sequence's tokens at these positions."""
        columns = positions // self.page_size
        return (self._tables[row, columns].astype(np.int64) - columns) * self.page_size + positions

    def _own_slots(self, slots):
        """Slots of tokens as kernels take them: with a mesh those of this rank, -1 for tokens of others."""
        return slots if self.key_shard is None else self.key_shard.slots_of(slots, self._page_slots)

    def _name_full_pages(self, rows):
        """Register the pages that became full, and are written by now, under the hash of all tokens up to their end."""
        if not self.pool.prefix_caching:
            return
        pages, names, hashes, log = [], [], {}, self._log
        names_of = self._hash if self._is_plain else partial(self._names_in_group, hashes)
        for row in rows:
            named = self._named.item(row)
            num_full = min(self._lengths.item(row), self._known.item(row)) // self.page_size
            if num_full > named:
                full = self._tables[row, named:num_full]
                token_ids = self._page_tokens.take(full, axis=0)
                names += names_of(row, named, token_ids)
                pages += full.tolist()
                self._named[row] = num_full
                if log is not None:
                    chain = self._chains[row // self._num_groups]
                    log.describe(names[-full.size :], chain[0], chain[named:num_full], token_ids)
        self.pool._register(pages, names)
        if log is not None:
            log.forget_descriptions()

    def _hash(self, row, named, token_ids):
        """Hashes of the full pages of a row that come after so many named ones; they become part of its chain."""
        seq = row // self._num_groups
        chain = others = self._chains[seq]
        if len(chain) > named + 1:
            chain = chain[: named + 1]
        hashes = list(page_hashes(chain, token_ids, self.page_size))
        if chain is not others and others[: len(chain)] != chain:
            self._chains[seq] = chain
        return hashes

    def _names_in_group(self, hashes, row, named, token_ids):
        """Names of pages of a row: hashes, which are computed once for all groups, with the suffix of the group."""
        seq, group = divmod(row, self._num_groups)
        if (seq, named) not in hashes:
            hashes[seq, named] = self._hash(row, named, token_ids)
        return [digest + self._suffixes[group] for digest in hashes[seq, named]]

    def _find(self, group, digest):
        """The page of a group that is found under a hash, or None."""
        return self.pool._names.find(digest + self._suffixes[group])

    def _pages_of(self, num_tokens):
        return (num_tokens + self.page_size - 1) // self.page_size

    def _held(self, rows):
        """(tables, as wide as the longest, and the pages in them, sequence by sequence); rows of all groups.

        Of one sequence these are all groups' pages of a column, then those of the next: see `_pages_between`.
        """
        lengths = self._lengths[rows]
        of_each = lengths.tolist()
        width = self._pages_of(max(of_each, default=0))
        tables = self._tables[:, :width][_index_of(rows)]  # twice as fast as both at once
        if self._is_plain and self._pages_of(min(of_each, default=0)) == width:
            return tables, tables.ravel().astype(INT64)  # with int64 numpy indexes several times faster
        columns = np.arange(width)
        is_held = (columns >= self._firsts[rows, None]) & (columns < self._pages_of(lengths)[:, None])
        by_sequence = (self._by_group(x).transpose(1, 2, 0) for x in (tables, is_held))
        pages, is_held = by_sequence
        return tables, pages[is_held].astype(INT64)

    def _pages_between(self, row, first, last):
        """The pages of a sequence in these columns: all groups' pages of a column, then those of the next.

        So the ends of all groups are reused before their beginnings: a prefix needs pages of all.
        """
        if self._is_plain:
            return self._tables[row, first:last]
        rows = slice(row, row + self._num_groups)
        is_held = np.arange(first, last)[:, None] >= self._firsts[rows]
        return self._tables[rows, first:last].T[is_held]

    def _new_tokens(self, token_ids, rows):
        """What `as_batch` returns for the sequences of these rows, once for each group."""
        num_groups = self._num_groups
        if num_groups == 1:
            return as_batch(token_ids, rows.size)
        counts, ids, unknown = as_batch(token_ids, rows.size // num_groups)
        counts = counts if counts is ONE_EACH else np.tile(counts, num_groups)
        return counts, *(None if x is None else np.tile(x, num_groups) for x in (ids, unknown))

    def _by_group(self, x):
        """(groups * n, ...) as (groups, n, ...)."""
        return x.reshape(self._num_groups, x.shape[0] // self._num_groups, *x.shape[1:])

    def _rows_of_groups(self, rows):
        """From the first rows of sequences, those of all groups as `_Batch` has them."""
        rows = np.array(rows, INT64)
        return rows if self._num_groups == 1 else (rows + np.arange(self._num_groups)[:, None]).ravel()

    def _rows(self, seqs):
        """Rows of sequences that are alive and of this cache. The calls of one step name the same ones: keep them."""
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

    def _new_row(self, chain):
        """The first row of a sequence with this chain, see `_new_rows`."""
        row = self._new_rows(1).item(0)
        self._chains[row // self._num_groups] = chain
        return row

    def _new_rows(self, num_seqs):
        """Rows of all groups for so many sequences without chains. Tables are all 0, states their last owners'."""
        unused = self._unused_rows
        if len(unused) < num_seqs:
            self._add_rows(num_seqs - len(unused))
        firsts = unused[len(unused) - num_seqs :]
        del unused[len(unused) - num_seqs :]
        rows = self._rows_of_groups(firsts)
        self._changes.extend(rows.tolist(), repeat(0))
        return rows

    def _add_rows(self, num_seqs):
        """Rows of so many sequences more than there ever were at once."""
        num_groups = self._num_groups
        first = len(self._chains) * num_groups
        last = first + num_seqs * num_groups
        self._lengthen(last)
        self._unused_rows[:0] = range(last - num_groups, first - 1, -num_groups)
        self._chains += [None] * num_seqs

    def _make_room_for_rows(self, num_seqs):
        """Room for the rows of so many sequences more than there are, so that `_new_rows` cannot fail."""
        self._lengthen((len(self._chains) - len(self._unused_rows) + num_seqs) * self._num_groups)

    def _lengthen(self, num_rows):
        """Room for so many rows."""
        if num_rows > self._lengths.size:
            self._grow(max(num_rows, 2 * self._lengths.size), self._tables.shape[1])

    def _grow(self, num_rows, width):
        """Larger tables and states, which take memory where they are written. What is used moves there."""
        tables, states = reserved_zeros((num_rows, width), np.int32), reserved_zeros((NUM_STATES, num_rows), np.int64)
        used = slice(len(self._chains) * self._num_groups)
        states[:, used] = self._states[:, used]
        for row, num_pages in enumerate(self._pages_of(states[0, used]).tolist()):
            tables[row, :num_pages] = self._tables[row, :num_pages]
        self._tables, self._states = tables, states
        # _limits: up to this length tokens can be added with nothing to do first: they fit on the last page, which is
        # the sequence's alone and cannot be found, and all full pages are named. 0 where there is something to do.
        # _bases: below the limit, the slot of a token is its position plus this.
        # _known: tokens before the first one without an id, NO_LIMIT while all have one.
        # _named: leading pages that are full, written and hashed.
        # _firsts: the first page that is held; those before it are behind the window and were given back.
        self._lengths, self._limits, self._bases, self._known, self._named, self._firsts = states

    def _reserve(self, num_seqs, width):
        """Room for so many sequences of `width` pages, in memory that has been written as in `written_zeros`."""
        num_rows = num_seqs * self._num_groups
        self._widen(width)
        if num_rows > self._lengths.size:
            self._grow(num_rows, self._tables.shape[1])
        self._tables[:num_rows, :width] += 0
        self._states[:, :num_rows] += 0

    def _widen(self, width):
        """Room for `width` pages in every row."""
        if width > self._tables.shape[1]:
            self._grow(self._lengths.size, max(width, 2 * self._tables.shape[1]))

    def _to_device(self, x):
        x = torch.from_numpy(x)
        return x if self._on_host else x.pin_memory().to(self.device, non_blocking=True)


def _index_of(rows):
    """What picks rows of a table: numpy takes a slice several times faster than a list of one."""
    return slice(rows.item(), rows.item() + 1) if rows.size == 1 else rows


def _as_iterable(seqs):
    return seqs if isinstance(seqs, (list, Iterable)) else [seqs]  # asked first, list is several times faster


def _usable_tokens(num_tokens, page_size, num_dropped, num_pages):
    """How many of a prompt's tokens need no computing if so many of its pages are found."""
    return max(0, min((num_pages - num_dropped) * page_size, num_tokens - 1))
