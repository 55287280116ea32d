"""Random operations on a cache that is sharded over ranks, and on one of a single process with pages of as many tokens:
all public operations, drawn alike, do the same to both.
"""

import itertools
import math
import random
from unittest import mock

import torch
from prefix_trees import every_group
from sharded_caches import first_held, pages_of
from small_caches import every_method_is_called, integers_of, make_step, quantizable, read_rows, state_of, write_rows

from triton_attn import LatentKVCache, OutOfPages, PagedKVCache, append_latent_cache, reference
from triton_attn._host.prefix_tree import read_tree
from triton_attn.cache import prefix_groups
from triton_attn.cache.prefix_groups import PrefixGroups
from triton_attn.cache.step import CacheStep
from triton_attn.parallel import context_parallel_mla_decode, context_parallel_paged_attention

LAYOUTS = [None, None, [-1, 3], [4, 4, -1], [2, -1, 7], [1, 1, 1, -1], [0, None, -1]]
RANK, ROPE = 16, 8
NUM_STEPS = 60


def check_traces(case, mesh):
    """Traces of a kind of cache from some seeds on; each public method is drawn."""
    kind, seeds = case
    cache = LatentKVCache if kind == "latent" else PagedKVCache
    with (
        every_method_is_called(cache, CacheStep, PrefixGroups),
        mock.patch.object(prefix_groups, "plan_tree", every_group),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),  # of staged steps
    ):
        for seed in seeds:
            try:
                Trace(seed, kind, mesh).run()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error


class Live:
    """A sequence of each cache, the ids of its tokens (below 0 if the caches were not told), and their contents."""

    def __init__(self, seqs, salt, tokens, contents):
        self.seqs, self.salt, self.tokens, self.contents = seqs, salt, tokens, contents


class Trace:
    """The content of a token says all tokens up to it and the salt, as an fp32 number holds exactly."""

    def __init__(self, seed, kind, mesh):
        self.draw, self.mesh, self.num_ranks = random.Random(seed), mesh, mesh.size()
        self.rank, draw = mesh.get_local_rank(), self.draw
        page_size, self.interleave = draw.choice([(1, 1), (2, 1), (4, 2), (4, 4), (3, 1)])
        layout = draw.choice(LAYOUTS) if kind != "latent" else None
        num_groups = 1
        sizes = dict(num_layers=len(layout or [-1]), device="cpu", record_events=True)
        if kind == "latent":
            sizes |= dict(kv_lora_rank=RANK, qk_rope_head_dim=ROPE, dtype=torch.float32)
        else:
            dtype = dict(dtype=torch.int8, token_scales=True) if kind == "token scales" else dict(dtype=torch.float32)
            sizes |= dict(num_kv_heads=1, head_dim=2, layer_windows=layout, **dtype)
            num_groups = PagedKVCache(0, **sizes)._num_groups
        make = LatentKVCache if kind == "latent" else PagedKVCache
        num_pages = draw.randint(4, 24) * num_groups
        own_pages = num_pages + (self.rank + seed) % self.num_ranks  # the rank with the fewest decides for all
        self.caches = [make(num_pages, page_size * self.num_ranks, **sizes)]
        self.caches.append(make(own_pages, page_size, mesh=mesh, interleave=self.interleave, **sizes))
        self.page_size, self.is_grouped = page_size * self.num_ranks, layout is not None
        for x in itertools.chain.from_iterable(map(pages_of, self.caches)):
            x.fill_(math.nan if x.is_floating_point() else 127)  # where nothing is written
        places = [(0, 0, -1)] if self.caches[0].layers is None else self.caches[0].layers
        self.places = [place for place in places if place is not None]  # (group, layer of the tensors, window)
        self.steps = [[make_step(cache, 128, 1000, 600, staged=staged) for cache in self.caches] for staged in (0, 1)]
        self.groups = [
            [[cache.prefix_groups(2, layer_group=group, **static) for cache in self.caches] for static in statics()]
            for group in (range(num_groups) if self.is_grouped else [None])
        ]
        self.live, self.content_of, self.history, self.num_unknown = [], {}, [(None, [])], 0

    def run(self):
        """Every operation at least once, as far as there are sequences to draw."""
        names = [name for name in vars(Trace) if name.startswith("draw_")]
        often = ["draw_create", "draw_extend", "draw_extend", "draw_decode", "draw_keep", "draw_move"]
        names = 2 * names + self.draw.choices(names + 2 * often, k=NUM_STEPS - 2 * len(names))
        self.draw.shuffle(names)
        for name in names:
            getattr(self, name if self.live else "draw_create")()
            self.compare()
        self.attend()
        self.both("free", *[(own,) for own in self.seqs_of(self.live)])
        self.live = []
        self.compare()
        assert self.caches[1].stats().pages_free == self.caches[1].pool.num_pages

    # Operations.

    def draw_create(self):
        salt, tokens = self.prompt()
        created = self.both("create", (tokens,), (tokens,), salt=salt, recompute_last_page=self.draw.random() < 0.25)
        (_, cached), (_, found) = created
        assert cached == found, f"{found} tokens are found, {cached} without ranks"
        contents = [self.content_of[salt, tuple(tokens[: i + 1])] for i in range(cached)]
        self.live.append(Live([seq for seq, _ in created], salt, tokens[:cached], contents))
        if self.draw.random() < 0.7:
            self.extend(self.live[-1:], [tokens[cached:]])
        hashes = self.both("page_hashes", (tokens,), (tokens,), salt=salt)
        assert hashes[0] == hashes[1]

    def draw_extend(self):
        batch = self.batch()
        self.extend(batch, [self.ids(self.draw.randint(0, 9)) for _ in batch])

    def draw_decode(self):
        self.extend(list(self.live), [self.ids(1) for _ in self.live])

    def extend(self, batch, new):
        given = [len(own) if self.draw.random() < 0.15 else own for own in new]
        step = self.draw.choice([None, *self.steps])
        slots = self.both("extend", *[(own, given) for own in self.seqs_of(batch)], of=step or self.caches)
        if slots is None:
            return
        if step is not None:
            slots = [own.slot_mapping[..., : own.num_tokens].clone() for own in step]
            assert all((own.slot_mapping[..., own.num_tokens :] == -1).all() for own in step)
        added = []
        for live, own, ids in zip(batch, new, given):
            for token in own if ids is own else self.unknown(len(own)):
                live.tokens.append(token)
                name = live.salt, tuple(live.tokens)
                live.contents.append(self.content_of.setdefault(name, 10 * len(self.content_of)))
            added += live.contents[len(live.contents) - len(own) :]
            self.history = [*self.history, (live.salt, [max(0, token) for token in live.tokens])][-8:]
        for cache, where in zip(self.caches, slots):
            for group, layer, _ in self.places:
                write(
                    cache,
                    layer,
                    torch.tensor(added, dtype=torch.long) + layer,
                    where[group] if self.is_grouped else where,
                )
        if step is not None:
            self.compare_steps(step, batch)

    def draw_commit(self):
        self.both("commit", *[(own,) for own in self.seqs_of(self.batch())])

    def draw_fork(self):
        """One, or those of a list: some several times, others not at all."""
        batch = [self.draw.choice(self.live) for _ in range(self.draw.randint(0, 3))]
        if len(batch) == 1:
            forks = [[fork] for fork in self.both("fork", *[(seq,) for seq in batch[0].seqs])]
        else:
            forks = self.both("fork", *[(own,) for own in self.seqs_of(batch)])
        for live, *pair in zip(batch, *forks, strict=True):
            self.live.append(Live(pair, live.salt, list(live.tokens), list(live.contents)))

    def draw_truncate(self):
        live = self.draw.choice(self.live)
        n = self.draw.randint(0, len(live.tokens))
        if self.both("truncate", *[(seq, n) for seq in live.seqs]) is not None:
            live.tokens, live.contents = live.tokens[:n], live.contents[:n]

    def draw_keep(self):
        batch = [live for live in self.batch() if live.tokens] or self.live
        num_drafts = self.draw.randint(0, min(9, *(len(live.tokens) for live in batch)))
        paths = [self.draw.sample(range(num_drafts), self.draw.randint(0, num_drafts)) for _ in batch]
        if self.draw.random() < 0.7:
            paths = list(map(sorted, paths))
        # No other sequence has these tokens: what was written of them follows other drafts.
        ids = [[1000 + number for number in self.unknown(len(path), 1)] for path in paths]
        ids = ids if self.draw.random() < 0.5 else None
        kept = self.both("keep", *[(own, num_drafts, paths, ids) for own in self.seqs_of(batch)])
        if kept is None:
            return
        for i, (live, path) in enumerate(zip(batch, paths)):
            start = len(live.tokens) - num_drafts
            same = 0 if ids else next((i for i, draft in enumerate(path) if i != draft), len(path))
            new = ids[i] if ids else live.tokens[start : start + same] + self.unknown(len(path) - same)
            live.contents = live.contents[:start] + [live.contents[start + draft] for draft in path]
            live.tokens = live.tokens[:start] + new
            self.remember(live)

    def draw_move(self):
        """Pages leave the caches and come back, as another sequence or, freed before, as the same one."""
        live = self.draw.choice(self.live)
        num_tokens = len(live.tokens)
        self.both("commit", *[([seq],) for seq in live.seqs])
        first = self.draw.randint(0, -(-num_tokens // self.page_size))
        exported = self.both("export_pages", *[(seq, first) for seq in live.seqs])
        places = self.both("page_places", *[(num_tokens, first)] * 2)
        assert places[0] == places[1]
        assert {x.shape[1] for own in exported for x in own} == {len(places[0])}
        if self.draw.random() < 0.5:
            self.both("free", *[(seq,) for seq in live.seqs])
            self.live.remove(live)
        has_ids = min(live.tokens, default=0) >= 0 and self.draw.random() < 0.7
        tokens = live.tokens if has_ids else num_tokens
        back = self.both("import_pages", *[(own, tokens, live.salt) for own in exported])
        if back is not None:
            tokens = list(live.tokens) if has_ids else self.unknown(num_tokens)
            self.live.append(Live(back, live.salt, tokens, list(live.contents)))
            self.remember(self.live[-1])

    def draw_free(self):
        batch = self.draw.sample(self.live, self.draw.randint(1, min(3, len(self.live))))
        given = [own[0] if len(batch) == 1 else own for own in self.seqs_of(batch)]
        self.both("free", *[(own,) for own in given])
        self.live = [live for live in self.live if live not in batch]

    def draw_reset(self):
        if self.draw.random() < 0.3:  # or too little would be found
            self.both("reset_prefix_cache", (), ())

    # What is drawn.

    def prompt(self):
        """A salt and tokens, which mostly begin as a present or past sequence."""
        salt, before = self.draw.choice([(self.draw.choice([None, "a"]), []), *4 * self.history])
        end = self.draw.choice([len(before), self.draw.randint(0, len(before))])
        return salt, before[:end] + self.ids(self.draw.randint(0, 2 * self.page_size))

    def ids(self, n):
        return [self.draw.randint(0, 1) for _ in range(n)]

    def batch(self):
        """Some of the sequences in any order, often all of them."""
        return self.draw.sample(self.live, min(len(self.live), self.draw.randint(1, 2 * len(self.live))))

    def seqs_of(self, batch):
        return [[live.seqs[j] for live in batch] for j in (0, 1)]

    def unknown(self, n, sign=-1):
        """Numbers for so many tokens, which no other token has."""
        self.num_unknown += n
        return [sign * (self.num_unknown - i) for i in range(n)]

    def remember(self, live):
        """What is found under a sequence's ids from now on."""
        for i, content in enumerate(live.contents):
            self.content_of[live.salt, tuple(live.tokens[: i + 1])] = content

    def both(self, name, *given, of=None, **options):
        """What a method returns of each cache for its own arguments; None if both refuse it alike, with nothing
        changed."""
        before, results, errors = self.state(), [], []
        for own, arguments in zip(of or self.caches, given, strict=True):
            try:
                results.append(getattr(own, name)(*arguments, **options))
            except (OutOfPages, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")
        if not errors:
            return results
        assert len(set(errors)) == 1, f"{name}: {errors}"
        assert not results, f"{name}: one cache refuses it: {errors[0]}"
        assert self.state() == before, f"{name}: {errors[0]}, and something changed"
        return None

    # What is compared.

    def state(self):
        return [state_of(cache) for cache in self.caches]

    def compare(self):
        whole, sharded = self.caches
        seqs = self.seqs_of(self.live)
        tables = [cache.block_table(own) for cache, own in zip(self.caches, seqs)]
        assert whole.stats() == sharded.stats()
        assert whole.take_events() == sharded.take_events()
        assert torch.equal(*tables)
        lengths = [len(live.tokens) for live in self.live]
        assert [cache.cache_seqlens(own).tolist() for cache, own in zip(self.caches, seqs)] == [lengths] * 2
        held = [
            page
            for live in self.live
            for group in range(sharded._num_groups)
            for page in self.table_of(sharded, live.seqs[1], group)[
                first_held(sharded, live.seqs[1], group) // self.page_size :
            ]
        ]
        for cache in self.caches:
            assert [cache.pool.ref_count(page) for page in range(cache.pool.num_pages)] == [
                held.count(page) for page in range(cache.pool.num_pages)
            ]
        for live in self.live:
            for group, layer, window in self.places:
                self.compare_contents(live, group, layer, window)
        for group in self.groups:
            for batch, pair in zip((self.live, self.live[::2][::-1], self.live), group, strict=True):
                trees = [groups.tree(own) for groups, own in zip(pair, self.seqs_of(batch))]
                assert (trees[0] is None) == (trees[1] is None)
                assert trees[0] is None or read_tree(trees[0]) == read_tree(trees[1])

    def compare_contents(self, live, group, layer, window):
        """What the next token sees, page by page: a rank has its own tokens."""
        pages = torch.tensor(self.table_of(self.caches[1], live.seqs[1], group), dtype=torch.long)
        assert len(pages) == math.ceil(len(live.tokens) / self.page_size)
        num_slots = self.page_size // self.num_ranks
        first = max(0, len(live.tokens) - window) // self.page_size if window >= 0 else 0
        turns = enumerate(live.contents)
        own = [x + layer for t, x in turns if t // self.interleave % self.num_ranks == self.rank][first * num_slots :]
        slots = (pages[first:, None] * num_slots + torch.arange(num_slots)).flatten()[: len(own)]
        for found in read(self.caches[1], layer, slots):
            assert found.tolist() == own, f"{found.tolist()}, expected {own}"

    def compare_steps(self, steps, batch):
        """Lengths, positions and, but for entries that the caches have not, the table."""
        for name in ("cache_seqlens", "positions", "cu_seqlens_q"):
            assert torch.equal(*(getattr(step, name) for step in steps)), name
        for step, cache, own in zip(steps, self.caches, self.seqs_of(batch)):
            table = cache.block_table(own)
            there = step.block_table[..., : table.shape[-2], : table.shape[-1]]
            assert torch.equal(torch.where(table != 0, there, 0), table)

    def table_of(self, cache, seq, group):
        table = cache.block_table([seq])
        return (table[group] if self.is_grouped else table)[0].tolist()

    def attend(self):
        """Over a tree of all nodes a query of each sequence attends over the ranks' keys as over the whole.

        It sees what the next token does, but for that token itself: after a truncation older pages may be gone.
        """
        group, layer, window = self.draw.choice(self.places)
        generator = torch.Generator().manual_seed(0)
        sharding = dict(mesh=self.mesh, interleave=self.interleave)
        is_latent = isinstance(self.caches[0], LatentKVCache)
        operands = []
        for j, cache in enumerate(self.caches):
            own = self.seqs_of(self.live)[j]
            table = cache.block_table(own)[group] if self.is_grouped else cache.block_table(own)
            places = dict(cache_seqlens=cache.cache_seqlens(own), block_table=table)
            if is_latent:
                operands.append(dict(latent_cache=cache.latent_cache[layer], **places))
                continue
            tensors = dict(k_cache=cache.k_cache, v_cache=cache.v_cache, k_scale=cache.k_scale, v_scale=cache.v_scale)
            operands.append({name: x if x is None else x[layer] for name, x in tensors.items()} | places)
        sharding["prefix_tree"] = self.groups[group][0][1].tree(self.seqs_of(self.live)[1])
        options = dict(softmax_scale=2.0**-20)
        if is_latent:
            q = [torch.randn(len(self.live), 1, 2, n, generator=generator) for n in (RANK, ROPE)]
            expected = reference.mla_decode(*q, **operands[0], **options)
            found = context_parallel_mla_decode(*q, **operands[1], **options, **sharding)
        else:
            q = torch.randn(len(self.live), 1, 2, 2, generator=generator)
            options["window_size"] = window - 1 if window > 0 else window, -1
            expected = reference.paged_attention(q, **operands[0], **options)
            found = context_parallel_paged_attention(q, **operands[1], **options, **sharding)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * 2**20)


def statics():
    """Options of `prefix_groups`: trees of all sequences, of some, and in memory that stays."""
    return {}, {}, dict(max_batch=256, max_nodes=5, max_slots=2)


def write(cache, layer, integers, slots):
    """Write rows that say which integer each stands for."""
    if isinstance(cache, LatentKVCache):
        rows = integers[:, None].float()
        append_latent_cache(rows.repeat(1, RANK), rows.repeat(1, ROPE), cache.latent_cache[layer], slots)
        return
    rows = quantizable(integers)
    write_rows(cache, layer, rows, rows, slots)


def read(cache, layer, slots):
    """The integers that these slots stand for, by keys and by values, or by latents and rotary keys."""
    if isinstance(cache, LatentKVCache):
        rows = cache.latent_cache[layer].flatten(0, 1)[slots]
        assert (rows == rows[:, :1]).all()
        return [rows[:, 0]]
    return [integers_of(rows) for rows in read_rows(cache, layer, slots)]
