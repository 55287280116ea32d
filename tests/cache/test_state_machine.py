"""PagedKVCache and LatentKVCache under random operations, step by step against a model of lists and dicts.

The cached content of a token identifies all tokens up to it and the salt. If a page is shared by mistake, reused too
early, or not copied before a write, a sequence finds the content of another.
"""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from levels import LEVEL
from prefix_trees import check_shared, check_tree, every_group, levels_of, nodes_of
from small_caches import (
    every_method_is_called,
    integers_of,
    make_step,
    quantizable,
    read_rows,
    state_of,
    write_rows,
)

from triton_attn import LatentKVCache, OutOfPages, PagedKVCache, append_latent_cache
from triton_attn._host.latent import read_latent_cache
from triton_attn.cache import prefix_groups
from triton_attn.cache.events import PagesCleared, PagesStored
from triton_attn.cache.hashing import root_hash
from triton_attn.cache.layers import group_layers
from triton_attn.cache.prefix_groups import PrefixGroups
from triton_attn.cache.step import CacheStep

pytestmark = pytest.mark.random
TIMES = {"quick": 1, "ci": 3, "full": 100}[LEVEL]
NUM_LAYERS = 2
MAX_NODES, MAX_SLOTS = 5, 2  # of a tree in memory that stays
# Windows of layers: keys before a query that are seen, -1 for all, None for a layer without keys.
LAYOUTS = [None, [-1], [2], [0, -1], [3, 3, -1, -1], [5, None, -1], [1, 1, 1, -1], [4, 7], [-1, 2, -1]]
STEPS = st.sampled_from([None, 0, 1])


class NaiveSequence:
    """Tokens (below 0 if the cache was not told them), and for each group their pages: None once given back. known and
    named are numbers of tokens and pages of each group."""

    def __init__(self, salt, tokens, pages, known, named):
        self.salt, self.tokens, self.pages, self.known, self.named = salt, tokens, pages, known, named

    def copy(self):
        return NaiveSequence(
            self.salt, list(self.tokens), list(map(list, self.pages)), list(self.known), list(self.named)
        )

    def prefix(self, length):
        return self.salt, tuple(self.tokens[:length])

    def first_held(self, group):
        """The first column of a group that was not given back."""
        return self.pages[group].count(None)

    def held(self, first=0):
        """Pages of all groups from a column on, column by column."""
        columns = list(zip(*self.pages))[first:]
        return [page for column in columns for page in column if page is not None]


class CacheMachine(RuleBasedStateMachine):
    """The content of a token is one integer, plus the index of the layer. Subclasses define how a cache stores it."""

    steps, has_layouts = 0, False

    def make_cache(self, *args, **options):
        raise NotImplementedError

    def tensors(self):
        """The whole content of the cache."""
        raise NotImplementedError

    def write_layer(self, layer, contents, slots):
        raise NotImplementedError

    def read_layer(self, layer, slots):
        raise NotImplementedError

    @initialize(
        num_pages=st.integers(4, 24),
        page_size=st.sampled_from([1, 2, 3, 4]),
        prefix_caching=st.integers(0, 7).map(bool),
        layout=st.none() | st.sampled_from(LAYOUTS),
        record_events=st.booleans(),
        token_scales=st.booleans(),
    )
    def make(self, num_pages, page_size, prefix_caching, layout, record_events, token_scales):
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        layout = layout if self.has_layouts else None
        num_pages *= 1 if layout is None else len(group_layers(layout, len(layout)).windows)
        self.cache = self.make_cache(
            num_pages,
            page_size,
            num_layers=NUM_LAYERS if layout is None else len(layout),
            prefix_caching=prefix_caching,
            record_events=record_events,
            token_scales=token_scales,
            **({} if layout is None else {"layer_windows": layout}),
        )
        self.places = [(0, layer) for layer in range(NUM_LAYERS)]  # the group of each layer with keys, and its tensors
        self.windows = [-1]  # of each group
        if layout is not None:
            places = [place for place in self.cache.layers if place is not None]
            self.places = [(place.group, place.cache_layer) for place in places]
            self.windows = [window for _, window in sorted({(place.group, place.window) for place in places})]
        self.is_grouped = layout is not None
        self.announced = set()  # by the events: (group, hash)
        for tensor in self.tensors():
            tensor.view(torch.uint8).fill_(0xFF)  # NaN in all of them
        self.cache_steps = [make_step(self.cache, 64, 200, 512, staged=staged) for staged in (False, True)]
        static = dict(max_batch=256, max_nodes=MAX_NODES, max_slots=MAX_SLOTS)
        numbers = range(len(self.windows)) if self.is_grouped else [None]
        self.groups = [
            [self.cache.prefix_groups(4, layer_group=number, **options) for options in ({}, {}, static)]
            for number in numbers
        ]
        self.free_pages = list(range(num_pages))  # in the order of use
        self.named = {}  # (group, salt, tokens) -> pages that contain the last of them; the first one is found
        self.live = {}  # handle -> NaiveSequence
        self.dead = []
        self.contents = {}  # (salt, tokens) -> content of the last of them
        self.unwritten = []
        self.num_unknown = 0
        self.history = []

    # Operations on the cache, and their expected results.

    @rule(data=st.data(), salt=st.sampled_from([None, "a"]), prefill=st.booleans(), recompute=st.integers(0, 3))
    def create(self, data, salt, prefill, recompute):
        tokens, recompute = self.draw_prompt(data), recompute == 0
        expected, firsts = self.findable_prefix(salt, tokens, recompute)
        seq, cached = self.cache.create(tokens, salt, recompute_last_page=recompute)
        assert cached == expected
        pages = [[None] * first for first in firsts]
        for group, of_group in enumerate(pages):
            for column in range(len(of_group), self.pages_of(cached)):
                of_group.append(self.named[self.name(group, salt, tokens, column)][0])
        num_groups = len(pages)
        naive = NaiveSequence(
            salt, tokens[:cached], pages, [cached] * num_groups, [cached // self.page_size] * num_groups
        )
        self.free_pages = [page for page in self.free_pages if page not in naive.held()]
        self.live[seq] = naive
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        assert self.cache.page_hashes(tokens, salt) == [self.hash(salt, tokens[:end]) for end in ends]
        if prefill:
            self.extend_batch([seq], [tokens[cached:]])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def extend(self, data):
        seqs = self.draw_batch(data)
        new_ids = st.lists(st.integers(0, 1), max_size=2 * self.page_size)
        new_tokens = [data.draw(st.integers(0, 3) | new_ids, label="new tokens") for _ in seqs]
        self.extend_batch(seqs, new_tokens, data.draw(STEPS))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def decode(self, data):
        new_tokens = [[data.draw(st.integers(0, 1), label="token")] for _ in self.live]
        self.extend_batch(list(self.live), new_tokens, data.draw(STEPS))

    def extend_batch(self, seqs, new_tokens, step=None):
        self.write()
        counts = [tokens if isinstance(tokens, int) else len(tokens) for tokens in new_tokens]
        grown = [self.pages_of(len(self.live[seq].tokens) + n) for seq, n in zip(seqs, counts)]
        num_new = sum(pages - len(self.live[seq].pages[0]) for seq, pages in zip(seqs, grown)) * len(self.windows)
        copied = self.tails_to_copy(seqs, counts)
        originals = list(copied.values())
        behind = self.behind(seqs)
        # Copies are made before anything changes: new pages are those that are free by now, then those given back.
        new_pages = [*self.free_pages, *self.last_held(behind)][: num_new + len(copied)]
        if len(new_pages) < num_new + len(copied):
            before = self.snapshot()
            with pytest.raises(OutOfPages):
                self.call_extend(seqs, new_tokens, step)
            assert self.snapshot() == before
            return
        slots = self.call_extend(seqs, new_tokens, step)
        # Full pages are named and those behind windows given back before new ones lose their names, which move to the
        # next pages with that content.
        self.name_full_pages(seqs)
        last_held = self.last_held(behind)
        for seq, group, column in behind:
            self.live[seq].pages[group][column] = None
        self.put_back(last_held)
        taken = self.take(new_pages)
        for seq, n, num_pages in zip(seqs, counts, grown):
            self.grow(seq, n, num_pages, copied, taken)
        assert not taken
        assert not copied
        self.release(originals)  # others may have given them back in this call
        starts = []
        for seq, tokens, n in zip(seqs, new_tokens, counts):
            starts.append(len(self.live[seq].tokens))
            self.append(self.live[seq], tokens, n)
            self.history = [*self.history, [max(0, token) for token in self.live[seq].tokens]][-8:]
        self.check_slots(seqs, starts, slots)
        if step is not None:
            check_step(self.cache_steps[step], [self.live[seq] for seq in seqs], self.is_grouped)

    def behind(self, seqs):
        """(seq, group, column) of the pages that no new token sees, group by group."""
        behind = []
        for group, window in enumerate(self.windows):
            for seq in seqs if window >= 0 else ():
                naive = self.live[seq]
                for column, page in enumerate(naive.pages[group]):
                    if page is not None and (column + 1) * self.page_size + window <= len(naive.tokens):
                        behind.append((seq, group, column))
        return behind

    def last_held(self, entries):
        """Distinct pages that are free once these entries of tables are given up, the last listed first."""
        pages = [self.live[seq].pages[group][column] for seq, group, column in entries]
        return [page for page in reversed(list(dict.fromkeys(pages))) if pages.count(page) == self.holders(page)]

    def call_extend(self, seqs, new_tokens, step):
        """Slots of each group, from the cache or through one of its steps."""
        if step is None:
            slots = self.cache.extend(seqs, new_tokens)
        else:
            step = self.cache_steps[step]
            step.extend(seqs, new_tokens)
            assert (step.slot_mapping[..., step.num_tokens :] == -1).all()
            slots = step.slot_mapping[..., : step.num_tokens]
        assert slots.dim() == 1 + self.is_grouped
        return self.by_group(slots)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data):
        self.write()
        seqs = self.draw_batch(data)
        self.cache.commit(seqs)
        self.name_full_pages(seqs)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        seq = data.draw(st.sampled_from(list(self.live)), label="seq")
        self.live[self.cache.fork(seq)] = self.live[seq].copy()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork_many(self, data):
        """As beam search does: some several times, others not at all."""
        seqs = data.draw(st.lists(st.sampled_from(list(self.live)), max_size=4), label="seqs")
        for seq, fork in zip(seqs, self.cache.fork(seqs), strict=True):
            self.live[fork] = self.live[seq].copy()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def truncate(self, data):
        self.write()
        seq = data.draw(st.sampled_from(list(self.live)), label="seq")
        n = data.draw(st.integers(0, len(self.live[seq].tokens)), label="n")
        if self.sees_what_is_gone(self.live[seq], n):
            before = self.snapshot()
            with pytest.raises(ValueError, match="earlier pages were given back"):
                self.cache.truncate(seq, n)
            assert self.snapshot() == before
            return
        self.cache.truncate(seq, n)
        self.drop(self.live[seq], n)

    @rule(now=st.sampled_from([False] * 9 + [True]))
    def reset_prefix_cache(self, now):
        if not now:
            return
        self.write()
        self.cache.reset_prefix_cache()
        self.named = {}
        for naive in self.live.values():
            naive.known, naive.named = [-1 if naive.tokens else 0] * len(naive.pages), [0] * len(naive.pages)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), gives_ids=st.booleans())
    def keep(self, data, gives_ids):
        self.write()
        seqs = self.draw_batch(data)
        num_drafts = data.draw(st.integers(0, min(len(self.live[seq].tokens) for seq in seqs)), label="drafts")
        drafts = st.lists(st.integers(0, max(0, num_drafts - 1)), unique=True, max_size=num_drafts)
        paths = [data.draw(drafts, label="path") for _ in seqs]
        starts = [len(self.live[seq].tokens) - num_drafts for seq in seqs]
        firsts, ids = [], []
        for start, path in zip(starts, paths):
            same = next((i for i, draft in enumerate(path) if i != draft), len(path))
            firsts.append(start if gives_ids else start + same)
            ids.append([100 + self.num_unknown + i for i in range(len(path))])  # others do not have their content
            self.num_unknown += len(path)
        writers = {}
        for seq, start, path, first in zip(seqs, starts, paths, firsts):
            for group, pages in enumerate(self.live[seq].pages):
                columns = range(first // self.page_size, self.pages_of(start + len(path)))
                for column in columns if first < start + len(path) else ():
                    if pages[column] is not None:
                        writers.setdefault(pages[column], []).append((seq, group))
        copied = {
            (*writer, page)
            for page, own in writers.items()
            for writer in own[: len(own) - (self.holders(page) == len(own))]
        }
        is_gone = any(self.loses_drafts(self.live[seq], start, path) for seq, start, path in zip(seqs, starts, paths))
        if is_gone or len(copied) > len(self.free_pages):
            before = self.snapshot()
            with pytest.raises(ValueError if is_gone else OutOfPages, match="were given back" if is_gone else "needed"):
                self.cache.keep(seqs, num_drafts, paths, ids if gives_ids else None)
            assert self.snapshot() == before
            return
        self.cache.keep(seqs, num_drafts, paths, ids if gives_ids else None)
        taken = self.take_pages(len(copied))
        self.forget([page for page, own in writers.items() if self.holders(page) == len(own)])
        before = [
            [self.content(self.live[seq], start + i) for i in path] for seq, start, path in zip(seqs, starts, paths)
        ]
        for seq, start, path, first, own, kept in zip(seqs, starts, paths, firsts, ids, before):
            naive, end = self.live[seq], start + len(path)
            for group, (table,) in enumerate(self.by_group(self.cache.block_table([seq]))):
                for i, page in enumerate(table):
                    if (seq, group, naive.pages[group][i]) in copied:
                        taken.remove(page)
                        naive.pages[group][i] = page
                known = naive.known[group]
                if not gives_ids:
                    naive.known[group] = min(known, first)
                elif known >= start and naive.first_held(group) <= start // self.page_size:
                    naive.known[group] = end
                else:
                    naive.known[group] = min(known, start)
            if not gives_ids:
                own = naive.tokens[start:first] + [-1 - self.num_unknown - i for i in range(end - first)]
                self.num_unknown += len(path)
            naive.tokens[start:end] = own
            for i, content in enumerate(kept):
                self.contents[naive.prefix(start + i + 1)] = content
            naive.named = [min(named, first // self.page_size) for named in naive.named]
        assert not taken
        for seq, start, path in zip(seqs, starts, paths):
            self.drop(self.live[seq], start + len(path))

    def loses_drafts(self, naive, start, path):
        """Whether a draft would move from a page that is gone to one that is not, or the next token miss a page."""
        moves = [(start + draft, start + i) for i, draft in enumerate(path) if path[: i + 1] != list(range(i + 1))]
        return self.sees_what_is_gone(naive, start + len(path)) or any(
            pages[read // self.page_size] is None and pages[written // self.page_size] is not None
            for pages in naive.pages
            for read, written in moves
        )

    @precondition(lambda self: self.live)
    @rule(data=st.data(), frees=st.booleans(), gives_ids=st.booleans())
    def move(self, data, frees, gives_ids):
        """Pages leave the cache and come back, as another sequence or, freed before, as the same one."""
        self.write()
        seq = data.draw(st.sampled_from(list(self.live)), label="seq")
        self.cache.commit([seq])
        self.name_full_pages([seq])
        source = self.live[seq].copy()
        num_pages = self.pages_of(len(source.tokens))
        first = data.draw(st.integers(0, num_pages), label="first page")
        before = self.snapshot()
        exported = self.cache.export_pages(seq, first)
        assert self.snapshot() == before
        if frees:
            self.cache.free(seq)
            self.drop(self.live.pop(seq), 0)
            self.dead.append(seq)
        gives_ids = gives_ids and min(source.tokens, default=0) >= 0
        starts = self.first_seen(len(source.tokens))
        places = [(group, column) for group, own in enumerate(starts) for column in range(max(own, first), num_pages)]
        assert self.cache.page_places(len(source.tokens), first) == places
        assert all(tensor.shape[1] == len(places) for tensor in exported)
        found = [self.found_pages(source, group, own) if gives_ids else [] for group, own in enumerate(starts)]
        ends = [start + len(own) for start, own in zip(starts, found)]
        num_new = sum(num_pages - end for end in ends)
        revived = [page for own in found for page in own if page in self.free_pages]
        arguments = exported, source.tokens if gives_ids else len(source.tokens), source.salt
        # What is neither found nor given: exports from a column that no group has are equal to those from the first.
        is_lost = any(end < min(num_pages, max(first, start)) for start, end in zip(starts, ends))
        if is_lost or num_new + len(revived) > len(self.free_pages):
            before = self.snapshot()
            with pytest.raises(ValueError if is_lost else OutOfPages):
                self.cache.import_pages(*arguments)
            assert self.snapshot() == before
            return
        back = self.cache.import_pages(*arguments)
        self.free_pages = [page for page in self.free_pages if page not in revived]
        taken, pages = self.take_pages(num_new), []
        tables = self.by_group(self.cache.block_table([back]))
        for (table,), start, end, own in zip(tables, starts, ends, found, strict=True):
            assert (table[:start], table[start:end]) == ([0] * start, own)
            taken -= set(table[end:])
            pages.append([None] * start + table[start:])
        assert not taken
        self.live[back] = self.moved(source, pages, ends, gives_ids)
        self.name_full_pages([back])

    def first_seen(self, n):
        """The first column of each group that the token after the first n sees."""
        return [max(0, n - window) // self.page_size if window >= 0 else 0 for window in self.windows]

    def found_pages(self, naive, group, start):
        """The pages of a group that a prompt of these tokens finds from a column on, the last full one too."""
        found = []
        for column in range(start, len(naive.tokens) // self.page_size):
            name = self.name(group, naive.salt, naive.tokens, column)
            if name not in self.named:
                break
            found.append(self.named[name][0])
        return found

    def moved(self, source, pages, ends, gives_ids):
        """The model of an imported sequence. Tokens without ids are new ones, with the content of the old."""
        tokens = list(source.tokens)
        if not gives_ids:
            tokens = [-1 - self.num_unknown - i for i in range(len(tokens))]
            self.num_unknown += len(tokens)
        num_known, named = (len(tokens), ends) if gives_ids else (0, [0] * len(pages))
        naive = NaiveSequence(source.salt, tokens, pages, [num_known] * len(pages), named)
        for position in range(len(tokens)):
            self.contents[naive.prefix(position + 1)] = self.content(source, position)
        return naive

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        self.write()
        seq = data.draw(st.sampled_from(list(self.live)), label="seq")
        self.cache.free(seq)
        self.drop(self.live.pop(seq), 0)
        self.dead.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_many(self, data):
        self.write()
        seqs = self.draw_batch(data)
        self.cache.free(seqs)
        self.release([page for seq in seqs for page in self.live.pop(seq).held()])
        self.dead += seqs

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_after_free(self, data):
        seq = data.draw(st.sampled_from(self.dead), label="seq")
        uses = [
            lambda: self.cache.extend([*self.live, seq], 1),
            lambda: self.cache.fork(seq),
            lambda: self.cache.truncate(seq, 0),
            lambda: self.cache.free(seq),
            lambda: self.cache.fork([*self.live, seq]),
            lambda: self.cache.free([*self.live, seq]),
            lambda: self.cache.commit([seq]),
            lambda: self.cache.keep([*self.live, seq], 0, [[]] * (1 + len(self.live))),
            lambda: self.cache.block_table([seq]),
            lambda: self.cache.cache_seqlens([seq]),
        ]
        before = self.snapshot()
        for use in uses:
            with pytest.raises(ValueError, match="a freed one"):
                use()
        assert self.snapshot() == before

    # After each step.

    @invariant()
    def tables_are_the_models(self):
        CacheMachine.steps += 1
        tables = self.cache.block_table(self.live)
        width = max((len(naive.pages[0]) for naive in self.live.values()), default=0)
        assert tables.shape == (*[len(self.windows)] * self.is_grouped, len(self.live), width)
        for group, table in enumerate(self.by_group(tables)):
            pages = [naive.pages[group] for naive in self.live.values()]
            assert table == [[page or 0 for page in row] + [0] * (width - len(row)) for row in pages]
        assert self.cache.cache_seqlens(self.live).tolist() == [len(naive.tokens) for naive in self.live.values()]

    @invariant()
    def trees_are_those_of_the_tables(self):
        """Of all sequences and of some, and in memory with room for few nodes."""
        seqs = list(self.live)
        for group, batches in enumerate(self.groups):
            for groups, own in zip(batches, (seqs, seqs[::2][::-1], seqs), strict=True):
                self.check_tree(groups, own, group)

    def check_tree(self, groups, own, group):
        tree, tables = groups.tree(own), [self.live[seq].pages[group] for seq in own]
        assert groups.tree(own) is tree
        if self.windows[group] >= 0:
            check_shared(groups.static or tree, tables)
            return
        nodes = nodes_of(tables)
        if groups.static is not None:
            tables += [[]] * (groups.static.batch - len(tables))
            fits = len(nodes) <= MAX_NODES and max(levels_of(nodes, tables)) <= MAX_SLOTS
            assert tree is (groups.static if nodes and fits else None)
            check_tree(groups.static, nodes if fits else [], tables)
        elif nodes:
            check_tree(tree, nodes, tables)
        else:
            assert tree is None

    @invariant()
    def references_are_table_entries(self):
        entries = [page for naive in self.live.values() for page in naive.held()]
        pool = self.cache.pool
        assert [pool.ref_count(page) for page in range(pool.num_pages)] == [
            entries.count(page) for page in range(pool.num_pages)
        ]
        assert sorted(self.free_pages + list(set(entries))) == list(range(pool.num_pages))
        stats = self.cache.stats()
        assert stats.pages_free == len(self.free_pages)
        assert stats.pages_held == len(set(entries))
        assert stats.pages_shared == sum(entries.count(page) > 1 for page in set(entries))
        assert stats.pages_cached == len(self.findable() & set(self.free_pages))
        assert stats.num_sequences == len(self.live)
        assert stats.num_tokens == sum(len(naive.tokens) for naive in self.live.values())
        fill = {}
        for naive in self.live.values():
            for pages in naive.pages:
                for i, page in enumerate(pages):
                    tokens = min(self.page_size, len(naive.tokens) - i * self.page_size)
                    fill[page] = max(fill.get(page, 0), tokens)
        fill.pop(None, None)
        assert stats.slots_used == sum(fill.values())

    @invariant()
    def pages_in_windows_are_held(self):
        """Those that the next token sees."""
        for naive in self.live.values():
            assert not self.sees_what_is_gone(naive, len(naive.tokens))

    @invariant()
    def every_token_is_read_back(self):
        for layer, (group, index) in enumerate(self.places):
            unwritten = {slots[group] for slots, _ in self.unwritten}
            slots, contents = [], []
            for naive in self.live.values():
                for position in range(len(naive.tokens)):
                    slot = self.slot(naive, group, position)
                    if slot is not None and slot not in unwritten:
                        slots.append(slot)
                        contents.append(self.content(naive, position))
            contents = torch.tensor(contents)
            slots = torch.tensor(slots, dtype=torch.long)
            assert torch.equal(self.read_layer(index, slots), contents + layer)

    @invariant()
    def events_say_what_can_be_found(self):
        if self.cache._log is None:
            return
        for event in self.cache.take_events():
            self.replay(event)
        found = {(group, self.hash(salt, tokens)) for group, salt, tokens in self.named}
        assert self.announced == found

    def replay(self, event):
        if isinstance(event, PagesCleared):
            self.announced.clear()
            return
        names = {(event.group, digest) for digest in event.hashes}
        if not isinstance(event, PagesStored):
            assert names <= self.announced
            self.announced -= names
            return
        assert not names & self.announced
        self.announced |= names
        assert len(event.token_ids) == len(event.hashes) * event.page_size
        assert event.root in (root_hash(None), root_hash("a"))
        parent = event.parent or event.root
        for i, digest in enumerate(event.hashes):
            parent = page_hash(parent, event.token_ids[i * event.page_size : (i + 1) * event.page_size])
            assert parent == digest

    def hash(self, salt, tokens):
        digest = root_hash(salt)
        for start in range(0, len(tokens), self.page_size):
            digest = page_hash(digest, tokens[start : start + self.page_size])
        return digest

    # The model.

    def by_group(self, x):
        return (x if self.is_grouped else x[None]).tolist()

    def draw_prompt(self, data):
        """Mostly a prefix of a present or past sequence, with zeros for unknown tokens."""
        ids = st.lists(st.integers(0, 1), max_size=2 * self.page_size)
        if not self.history or data.draw(st.integers(0, 3), label="new if 0") == 0:
            return data.draw(ids, label="prompt")
        tokens = data.draw(st.sampled_from(self.history), label="as before")
        return tokens[: data.draw(st.integers(0, len(tokens)), label="cut")] + data.draw(ids, label="rest")

    def draw_batch(self, data):
        """Some of the live sequences in any order, often all of them."""
        seqs = data.draw(st.permutations(list(self.live)), label="seqs")
        return seqs[: data.draw(st.integers(1, 2 * len(seqs)), label="number of seqs")]

    def name(self, group, salt, tokens, column):
        return group, salt, tuple(tokens[: (column + 1) * self.page_size])

    def findable_prefix(self, salt, tokens, recompute):
        """(tokens, first column of each group) of the longest one whose pages are all there that are needed."""
        for num_pages in range(len(tokens) // self.page_size, -1, -1):
            length = max(0, min((num_pages - recompute) * self.page_size, len(tokens) - 1))
            firsts = self.first_seen(length)
            if all(
                self.name(group, salt, tokens, column) in self.named
                for group, first in enumerate(firsts)
                for column in range(first, num_pages)
            ):
                return length, firsts
        raise AssertionError("no page is a prefix, too")

    def sees_what_is_gone(self, naive, n):
        """Whether the token after the first n sees a page that was given back, or would begin on it."""
        for pages, first in zip(naive.pages, self.first_seen(n)):
            if n and None in pages[first : max(first + 1, self.pages_of(n))]:
                return True
        return False

    def findable(self):
        return {pages[0] for pages in self.named.values()}

    def pages_of(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def slot(self, naive, group, position):
        page = naive.pages[group][position // self.page_size]
        return None if page is None else page * self.page_size + position % self.page_size

    def content(self, naive, position):
        return float(self.contents.setdefault(naive.prefix(position + 1), 10 * len(self.contents)))

    def holders(self, page):
        return sum(page in pages for naive in self.live.values() for pages in naive.pages)

    def tails_to_copy(self, seqs, counts):
        """{(seq, group): its last page, which it must copy}, group by group. The last writer keeps a page that only
        writers hold."""
        writers = {}
        for seq, n in zip(seqs, counts):
            naive = self.live[seq]
            if n and len(naive.tokens) % self.page_size:
                for group, pages in enumerate(naive.pages):
                    writers.setdefault(pages[-1], []).append((seq, group))
        copied = {}
        for page, writing in writers.items():
            kept = 1 if self.holders(page) == len(writing) else 0
            copied |= dict.fromkeys(writing[: len(writing) - kept], page)
        entries = [(seq, group) for group in range(len(self.windows)) for seq in seqs]
        return {entry: copied[entry] for entry in entries if entry in copied}

    def take_pages(self, n):
        return self.take(self.free_pages[:n])

    def take(self, pages):
        self.free_pages = [page for page in self.free_pages if page not in pages]
        self.forget(pages)
        return set(pages)

    def forget(self, pages):
        for prefix, named in list(self.named.items()):
            left = [page for page in named if page not in pages]
            if not left:
                del self.named[prefix]
            elif left[0] != named[0]:  # of the others, the last one is found from now on
                self.named[prefix] = [left[-1], *left[:-1]]
                self.put_back([page for page in left[-1:] if page in self.free_pages])
            else:
                self.named[prefix] = left

    def release(self, pages):
        """Pages that left tables, in order; one that is listed more than once counts where it is listed first."""
        self.put_back([page for page in reversed(list(dict.fromkeys(pages))) if not self.holders(page)])

    def put_back(self, pages):
        """Pages that can be found are taken last."""
        findable = self.findable()
        rest = [page for page in self.free_pages if page not in pages]
        lost, found = ([page for page in pages if (page in findable) == is_found] for is_found in (False, True))
        self.free_pages = lost + rest + found

    def grow(self, seq, n, num_pages, copied, taken):
        """A sequence's table shows which pages it got. All other entries must be unchanged."""
        naive = self.live[seq]
        table = self.cache.block_table([seq])
        for group, row in enumerate(self.by_group(table)):
            (row,), pages = row, naive.pages[group]
            keeps = len(pages) - (copied.pop((seq, group), None) is not None)
            assert row[:keeps] == [page or 0 for page in pages[:keeps]]
            assert len(row) == num_pages
            for page in row[keeps:]:
                taken.remove(page)
            if n and len(naive.tokens) % self.page_size and keeps == len(pages):
                self.forget([pages[-1]])
            pages[keeps:] = row[keeps:]

    def append(self, naive, tokens, n):
        """Write the new tokens, which have slots in each group."""
        if not isinstance(tokens, int):
            naive.known = [known + n if known == len(naive.tokens) else known for known in naive.known]
        if isinstance(tokens, int):
            tokens = [-1 - self.num_unknown - i for i in range(n)]
            self.num_unknown += n
        for token in tokens:
            naive.tokens.append(token)
            position = len(naive.tokens) - 1
            slots = [self.slot(naive, group, position) for group in range(len(self.windows))]
            assert all(self.holders(slot // self.page_size) == 1 for slot in slots)
            self.unwritten.append((slots, self.content(naive, position)))

    def check_slots(self, seqs, starts, slots):
        new = [
            (self.live[seq], p) for seq, start in zip(seqs, starts) for p in range(start, len(self.live[seq].tokens))
        ]
        for group, of_group in enumerate(slots):
            assert of_group == [self.slot(naive, group, position) for naive, position in new]

    def write(self):
        """The writes of a model between two calls of `extend`."""
        if not self.unwritten:
            return
        slots, contents = map(torch.tensor, zip(*self.unwritten))
        for layer, (group, index) in enumerate(self.places):
            self.write_layer(index, contents + layer, slots[:, group].contiguous())
        self.unwritten = []

    def name_full_pages(self, seqs):
        for group in range(len(self.windows)):
            for seq in seqs if self.prefix_caching else ():
                naive = self.live[seq]
                for i in range(naive.named[group], naive.known[group] // self.page_size):
                    name, page = (group, *naive.prefix((i + 1) * self.page_size)), naive.pages[group][i]
                    named = self.named.get(name, [])
                    if page not in named:
                        self.forget([page])
                        self.named[name] = [*named, page]
                    naive.named[group] = i + 1

    def drop(self, naive, n):
        keep = self.pages_of(n)
        dropped, naive.pages = naive.held(keep), [pages[:keep] for pages in naive.pages]
        naive.tokens = naive.tokens[:n]
        naive.known = [n if n == 0 else min(known, n) for known in naive.known]
        naive.named = [min(named, n // self.page_size) for named in naive.named]
        self.release(dropped)

    def snapshot(self):
        return state_of([self.cache, *self.cache_steps])


def check_step(step, naives, is_grouped):
    """Lengths, and pages of the rows."""
    lengths = [len(naive.tokens) for naive in naives]
    assert step.cache_seqlens.tolist() == lengths + [0] * (len(step.cache_seqlens) - len(lengths))
    for group, table in enumerate((step.block_table if is_grouped else step.block_table[None]).tolist()):
        for row, naive in zip(table, naives):
            pages = naive.pages[group]
            assert [page if is_there is not None else None for page, is_there in zip(row, pages)] == pages


def page_hash(parent, token_ids):
    return hashlib.sha256(parent + np.array(token_ids, np.int64).tobytes()).digest()


class PagedKVMachine(CacheMachine):
    """Keys and values say the integer, in fp32 or in int8 with a scale for each token."""

    kind, has_layouts = PagedKVCache, True

    def make_cache(self, *args, token_scales, **options):
        sizes = dict(num_kv_heads=1, head_dim=2, dtype=torch.int8 if token_scales else torch.float32)
        return PagedKVCache(*args, **sizes, token_scales=token_scales, **options)

    def tensors(self):
        cache = self.cache
        scales = () if cache.k_scale is None else (cache.k_scale.transpose(2, 3), cache.v_scale.transpose(2, 3))
        return cache.k_cache, cache.v_cache, *scales

    def write_layer(self, layer, contents, slots):
        rows = quantizable(contents)
        write_rows(self.cache, layer, rows, -rows, slots, check_values=True)

    def read_layer(self, layer, slots):
        k, v = read_rows(self.cache, layer, slots)
        integers = integers_of(k)
        assert torch.equal(integers_of(-v), integers)
        return integers


class LatentMachine(CacheMachine):
    """The integer is the whole latent vector, and the rotary key in two digits that are exact in bf16 too."""

    kind, dtype, kv_lora_rank = LatentKVCache, torch.float32, 3

    def make_cache(self, *args, token_scales, **options):
        return LatentKVCache(*args, kv_lora_rank=self.kv_lora_rank, qk_rope_head_dim=2, dtype=self.dtype, **options)

    def tensors(self):
        return (self.cache.latent_cache,)

    def write_layer(self, layer, contents, slots):
        digits = torch.stack([contents // 256, contents % 256], dim=1)
        kv_latent = contents[:, None].repeat(1, self.kv_lora_rank)
        append_latent_cache(kv_latent, digits, self.cache.latent_cache[layer], slots, check_values=True)

    def read_layer(self, layer, slots):
        rows = read_latent_cache(self.cache.latent_cache[layer], self.kv_lora_rank, 2).flatten(0, 1)[slots]
        latents, digits = rows.split([self.kv_lora_rank, 2], dim=1)
        contents = digits @ torch.tensor([256.0, 1.0])
        torch.testing.assert_close(latents, self.stored(contents[:, None].expand_as(latents)), rtol=0, atol=0)
        return contents

    def stored(self, latents):
        return latents


class Float8LatentMachine(LatentMachine):
    dtype, kv_lora_rank = torch.float8_e4m3fn, 128

    def stored(self, latents):
        """fp8 times the scale of the block, whose elements are all equal."""
        scale = 2.0 ** (latents / 448).clamp(min=1e-4).log2().ceil()
        return (latents / scale).to(self.dtype).float() * scale


@pytest.mark.parametrize(
    ("machine", "examples", "min_steps"),
    [(PagedKVMachine, 34, 1000), (LatentMachine, 7, 200), (Float8LatentMachine, 7, 200)],
)
def test_random_operations(machine, examples, min_steps, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(prefix_groups, "plan_tree", every_group)
    CacheMachine.steps = 0
    with every_method_is_called(machine.kind, CacheStep, PrefixGroups):
        run_state_machine_as_test(machine, settings=settings(max_examples=TIMES * examples, stateful_step_count=50))
    print(f"{CacheMachine.steps} steps")
    assert CacheMachine.steps >= TIMES * min_steps
