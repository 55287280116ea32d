"""Which sequences of a batch share leading pages, kept up to date as they fork, grow and end."""

from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._host.checks import check_size, fail
from .._host.prefix_tree import PrefixTree, TreeSizes
from ..merge.tree import HostTree, empty_tree, key_of, lengths_q, num_shared, plan_tree
from .arrays import NO_LIMIT, grown
from .pool import NO_PAGES

if TYPE_CHECKING:
    from .sequences import Sequence


class PrefixGroups:
    """The prefix tree of a batch of a cache's sequences, step by step.

        groups = cache.prefix_groups(num_heads_q=32)
        # A step of the server:
        slots = cache.extend(seqs, tokens)
        tree = groups.tree(seqs)  # one for all layers; None where sharing does not pay
        paged_attention(q, cache.k_cache[layer], cache.v_cache[layer], cache.cache_seqlens(seqs),
                        cache.block_table(seqs), prefix_tree=tree)

    The sequences are kept in the order of their pages, in which those that share pages are neighbours. A call takes
    out and puts back those whose pages changed, and looks at their neighbours alone: O(changes) and their pages. Where
    groups are as they were, as in most steps of a decode, the tree of the call before is returned, and nothing is sent.

    With `layer_windows` they are those of one group of layers, whose layers take the tree with its block table. In a
    group with a window sequences share what both still have: the keys of a node are those that any of them sees.

    With max_batch, trees are in memory of their own for CUDA graphs: `static` is their PrefixTree, for a batch of
    max_batch sequences of which the last may be padding of length 0. `tree` fills it in one transfer on the current
    stream, and where it returns None no node is left in it, so that a captured graph stays right.

    Attributes:
        static: a PrefixTree at an address that stays; None without max_batch.
    """

    def __init__(self, cache, layer_group, work, max_batch, seqlen_q, max_nodes, max_slots):
        self._cache, self._group, self._work = cache, layer_group, work
        self._has_window = cache._windows[layer_group] != NO_LIMIT
        self._batch = None  # of the cache, at the last call
        self._num_read = 0  # of the cache's changes
        self._sorted = []  # (key, row), see `key_of`
        self._shared = []  # leading pages in common with the one before
        self._keys = {}  # {row: key}
        self._holders = {}  # {page: a row that has or had it}, for groups with a window
        self._starts = NO_PAGES  # first pages that sequences have, of the last tree
        self._is_unsorted = False  # a sequence shares pages with one that was put in after it gave earlier ones back
        self._queries: NDArray[np.int64] = np.zeros(0, np.int64)
        self._tree = None
        self.static: PrefixTree | None = None
        if max_batch is not None:
            max_batch, seqlen_q = check_size("max_batch", max_batch), check_size("seqlen_q", seqlen_q)
            total_q = max_batch * seqlen_q
            num_slots = check_size("max_slots", max_slots)
            sizes = TreeSizes(check_size("max_nodes", max_nodes), num_slots, num_slots * total_q, total_q)
            with torch.inference_mode(False):
                self.static = empty_tree(max_batch, total_q, sizes).on(cache.device)

    def tree(self, seqs: "Iterable[Sequence]", seqlens_q: int | Tensor | NDArray[Any] | Iterable[int] = 1):
        """The `PrefixTree` of a batch, None where sharing does not pay.

        Args:
            seqs: sequences, each at most once, in the order of the call's.
            seqlens_q: queries of each: one number, or one for each on the host. With max_batch it is seqlen_q of all.

        Raises:
            TypeError, ValueError: as `cache.extend`, and for more sequences or other queries than max_batch.
        """
        cache = self._cache
        rows = cache._distinct_rows(seqs)
        if cache._num_groups > 1:
            rows = cache._by_group(rows)[self._group]
        queries = self._queries_of(seqlens_q, rows.size)
        is_known = cache._batch is self._batch and np.array_equal(queries, self._queries)
        if self._update(rows.tolist()) or not is_known or self._gave_back(rows):
            self._batch, self._queries = None, queries  # where the tree cannot be sent, the next call plans again
            self._tree = self._plan(rows)
            self._batch = cache._batch
        return self._tree

    def _queries_of(self, seqlens_q, batch):
        queries = lengths_q(seqlens_q, batch)
        if self.static is None:
            return queries
        max_batch, total_q = self.static.batch, self.static.total_q
        if batch > max_batch:
            fail("seqs", f"at most max_batch = {max_batch} sequences", batch)
        if (queries != total_q // max_batch).any():
            fail("seqlens_q", f"seqlen_q = {total_q // max_batch} of each sequence", seqlens_q)
        return np.full(max_batch, total_q // max_batch)

    def _update(self, rows):
        """Bring the order up to date with the cache's tables; whether a sequence that stays shares other pages."""
        log = self._cache._changes
        if self._num_read == log.count and self._cache._batch is self._batch:
            return False
        changes, self._num_read = log.since(self._num_read), log.count
        present = set(rows)
        stale = present if changes is None else {row for row, _ in changes} & self._keys.keys()
        gone = self._keys.keys() - present
        for row in gone:
            self._take_out(row)
        for row in present - self._keys.keys():
            self._put_in(row, self._key(row))
        is_changed = any([self._renew(row) for row in stale & present])
        if self._is_unsorted:
            self._sort(present)
            return True
        return is_changed

    def _gave_back(self, rows):
        """Whether there is a tree, and its sequences have given back pages since."""
        return self._has_window and self._tree is not None and (self._cache._firsts[rows] != self._starts).any()

    def _key(self, row):
        cache = self._cache
        pages, first = cache._tables[row, : cache._pages_of(cache._lengths.item(row))], cache._firsts.item(row)
        key = key_of(pages)
        return key if first == 0 else self._before(pages, first) + key[4 * first :]

    def _before(self, pages, first):
        """What stands in a key for pages that were given back: those of a sequence that shares a later one.

        They only decide which sequences are neighbours. No node has a key of theirs for a sequence that lacks them.
        """
        for column in range(first, pages.size):
            holder = self._holders.get(pages.item(column))
            key = self._keys.get(holder, b"")
            if key[4 * column : 4 * column + 4] == key_of(pages[column : column + 1]):
                differs = key[4 * first : 4 * column] != key_of(pages[first:column])
                self._is_unsorted |= differs and self._cache._firsts.item(holder) > first
                return key[: 4 * first]
        return bytes(4 * first)

    def _sort(self, rows):
        """Put all rows in again: those first that have the first pages, after which the others are named."""
        self._sorted, self._shared, self._keys = [], [], {}
        for row in sorted(rows, key=self._cache._firsts.item):
            self._put_in(row, self._key(row))
        self._is_unsorted = False

    def _remember(self, row, key):
        self._keys[row] = key
        if self._has_window:
            cache = self._cache
            pages = cache._tables[row, cache._firsts.item(row) : cache._pages_of(cache._lengths.item(row))]
            self._holders.update(dict.fromkeys(pages.tolist(), row))

    def _renew(self, row):
        """Take the pages that a row has now; whether it shares others than before."""
        key, old = self._key(row), self._keys[row]
        if key == old:
            return False
        place = bisect_left(self._sorted, (old, row))
        around = self._shared[place : place + 2]
        if len(around) < 2:
            around = [*around, 0]
        if max(around) < num_shared(old, key):  # what makes it differ from its neighbours is as it was
            self._sorted[place] = key, row
            self._remember(row, key)
            return False
        self._take_out(row)
        self._put_in(row, key)
        return True

    def _take_out(self, row):
        place = bisect_left(self._sorted, (self._keys.pop(row), row))
        del self._sorted[place]
        shared = self._shared.pop(place)
        if place < len(self._shared):
            self._shared[place] = min(self._shared[place], shared)

    def _put_in(self, row, key):
        place = bisect_left(self._sorted, (key, row))
        self._sorted.insert(place, (key, row))
        self._remember(row, key)
        self._shared.insert(place, num_shared(self._sorted[place - 1][0], key) if place else 0)
        if place + 1 < len(self._sorted):
            self._shared[place + 1] = num_shared(key, self._sorted[place + 1][0])

    def _plan(self, rows):
        """The tree of the groups as they are."""
        places = dict(zip(rows.tolist(), range(rows.size)))
        order, starts = [places[row] for _, row in self._sorted], None
        if self._has_window:
            self._starts = self._cache._firsts[rows]
            starts = self._starts[order]
        if self.static is None:
            tree = plan_tree(np.array(order, np.int64), self._shared, self._queries, self._work, starts=starts)
            return None if tree is None else tree.on(self._cache.device)
        padding = range(rows.size, self.static.batch)
        order, shared = np.array([*order, *padding], np.int64), [*self._shared, *[0] * len(padding)]
        starts = None if starts is None else grown(starts, order.size)
        tree = plan_tree(order, shared, self._queries, self._work, sizes=self.static.sizes, starts=starts)
        filled = tree or empty_tree(self.static.batch, self.static.total_q, self.static.sizes)
        _send(filled, self.static.memory)
        return None if tree is None else self.static


def _send(tree: HostTree, there: Tensor) -> None:
    memory = torch.from_numpy(tree.array())
    there.copy_(memory if there.device.type == "cpu" else memory.pin_memory(), non_blocking=True)
