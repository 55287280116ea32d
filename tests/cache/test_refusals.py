"""Every public method of the paged caches refuses bad input with a clear message, and leaves everything as it was."""

import contextlib
import functools
import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from prefix_trees import every_group
from small_caches import DEVICE, contents, make_step, state_of
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_attn import BlockPool, LatentKVCache, OutOfPages, PagedKVCache
from triton_attn.cache import prefix_groups, sequences, transfer
from triton_attn.cache.prefix_groups import PrefixGroups
from triton_attn.cache.sequences import PagedSequences
from triton_attn.cache.step import CacheStep

SIZE = dict(num_layers=2, num_kv_heads=1, head_dim=4, device=DEVICE, record_events=True)
KINDS = {
    "plain": lambda: PagedKVCache(12, 4, **SIZE),
    "latent": lambda: LatentKVCache(
        12, 4, num_layers=2, kv_lora_rank=16, qk_rope_head_dim=8, device=DEVICE, record_events=True
    ),
    "windows": lambda: PagedKVCache(24, 4, **SIZE, layer_windows=[-1, 3]),
    "token scales": lambda: PagedKVCache(12, 4, **SIZE, dtype=torch.int8, token_scales=True),
}
CLEAR = re.compile(r"[a-z]\w*(\[\d+\])*: expected .+, got .+", re.DOTALL)


class Scene:
    """A cache with a sequence of three pages and a half, its fork, one that was freed, one of another cache, a pool
    with held, found and free pages, a step and prefix groups."""

    def __init__(self, kind):
        self.cache, other = KINDS[kind](), KINDS[kind]()
        for x in self.cache._page_tensors():
            x.view(torch.uint8).zero_()
        (self.freed, _), (self.seq, _), (self.foreign, _) = (cache.create([]) for cache in (self.cache,) * 2 + (other,))
        self.cache.extend([self.seq, self.freed], [range(14), range(50, 59)])
        self.cache.commit([self.seq, self.freed])
        self.fork = self.cache.fork(self.seq)
        self.step = self.cache.step(2, 20, 6)
        self.step.extend([self.fork], [[7, 7]])
        self.cache.free(self.freed)
        self.group = 0 if self.cache.layers is not None else None
        self.groups = self.cache.prefix_groups(4, 2, layer_group=self.group)
        self.groups.tree([self.seq, self.fork])
        self.pages = self.cache.export_pages(self.seq)
        self.pool = BlockPool(6)
        self.pool.register(self.pool.allocate(4)[:3], [b"a", b"b", b"a"])
        self.pool.release([0, 3])

    def state(self):
        seqs = [self.seq, self.fork, self.freed, self.foreign]
        owners = [(seq._cache is self.cache, seq._row) for seq in seqs]
        return owners, [state_of(x) for x in (self.cache, self.pool, self.step, self.groups, list(self.pages))]


def calls_with_seqs(call):
    """A method of sequences with lists of them that are none."""
    return [
        lambda s: call(s, None),
        lambda s: call(s, 3),
        lambda s: call(s, [s.seq, None]),
        lambda s: call(s, [s.seq, 3]),
        lambda s: call(s, [s.freed]),
        lambda s: call(s, [s.fork, s.freed]),
        lambda s: call(s, [s.foreign, s.seq]),
    ]


def calls_with_distinct(call):
    return [*calls_with_seqs(call), lambda s: call(s, [s.seq, s.fork, s.seq])]


def calls_with_seq(call):
    return [lambda s: call(s, None), lambda s: call(s, s.freed), lambda s: call(s, s.foreign), lambda s: call(s, [])]


def calls_with_ids(call):
    wrong = (None, 1.5, "ab", [1, None], [1, 1.5], [2**63], [[1], [2]], np.zeros((1, 2), int), torch.zeros(2), [b"a"])
    return [lambda s, ids=ids: call(s, ids) for ids in wrong]


def calls_with_length(call):
    return [lambda s, n=n: call(s, n) for n in (-1, 2**31, 1.0, True, None, "1")]


def calls_with_batches(call):
    """What `extend` takes as token_ids, of two sequences."""
    wrong = (-1, True, None, 1.5, [1], [1, 2, 3], [1, -1], [[1]], [[1], None], [[1], [1.5]], [[1], ["a"]], [[1], [[2]]])
    arrays = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)
    return [lambda s, ids=ids: call(s, ids) for ids in (*wrong, *arrays)]


def more_pages(scene, num_tokens):
    """Pages of so many tokens."""
    num_pages = len(scene.cache.page_places(num_tokens))
    return tuple([x[:, :1].repeat(1, num_pages, 1, 1, 1) for x in scene.pages])


def of_group(scene, **options):
    return dict(num_heads_q=4, layer_group=scene.group) | options


def wrong_pages(pages):
    """Tensors of pages that are not those of the cache."""
    first, *rest = pages
    wide = torch.cat([first, first], dim=4)[..., ::2]
    wrong = [
        None,
        first,
        (),
        (*pages, first),
        (None, *rest),
        (first.to(torch.float64), *rest),
        (first[:0], *rest),
        (first[:, :, :2], *rest),
        (first[..., :1], *rest),
        (first[0], *rest),
        (wide, *rest),
        (first.to("meta"), *rest),
        (*rest, first[:, :1]),
    ]
    return wrong


REFUSED = {
    "create": [
        *calls_with_ids(lambda s, ids: s.cache.create(ids)),
        lambda s: s.cache.create(range(14), 5),
        lambda s: s.cache.create(range(14), recompute_last_page=1),
    ],
    "extend": [
        *calls_with_distinct(lambda s, seqs: s.cache.extend(seqs, 1)),
        *calls_with_batches(lambda s, ids: s.cache.extend([s.fork, s.seq], ids)),
        lambda s: s.cache.extend(s.seq, [[1]]),
        lambda s: s.cache.extend([s.seq], 10**4),
        lambda s: s.cache.extend([s.seq, s.fork], [[1], range(60)]),
    ],
    "step": [
        *calls_with_length(lambda s, n: s.cache.step(n, 20)),
        *calls_with_length(lambda s, n: s.cache.step(2, n)),
        *calls_with_length(lambda s, n: s.cache.step(2, 20, n) if n is not None else s.cache.step(0, 20)),
        lambda s: s.cache.step(0, 20),
    ],
    "prefix_groups": [
        *calls_with_length(lambda s, n: s.cache.prefix_groups(**of_group(s, num_heads_q=n))),
        *calls_with_length(lambda s, n: s.cache.prefix_groups(**of_group(s, max_batch=2, seqlen_q=n))),
        *calls_with_length(lambda s, n: s.cache.prefix_groups(**of_group(s, max_batch=2, max_nodes=n))),
        *calls_with_length(lambda s, n: s.cache.prefix_groups(**of_group(s, max_batch=2, max_slots=n))),
        lambda s: s.cache.prefix_groups(**of_group(s, layer_group=2)),
        lambda s: s.cache.prefix_groups(**of_group(s, layer_group=-1)),
        lambda s: s.cache.prefix_groups(**of_group(s, layer_group="0")),
    ],
    "commit": calls_with_seqs(lambda s, seqs: s.cache.commit(seqs)),
    "fork": calls_with_seqs(lambda s, seqs: s.cache.fork(seqs)),
    "truncate": [
        *calls_with_seq(lambda s, seq: s.cache.truncate(seq, 0)),
        *calls_with_length(lambda s, n: s.cache.truncate(s.seq, n)),
        lambda s: s.cache.truncate(s.seq, 15),
    ],
    "keep": [
        *calls_with_distinct(lambda s, seqs: s.cache.keep(seqs, 1, [[0], [0]])),
        *calls_with_length(lambda s, n: s.cache.keep([s.seq, s.fork], n, [[0], [0]])),
        *calls_with_ids(lambda s, ids: s.cache.keep([s.fork, s.seq], 2, [[1], ids])),
        *calls_with_ids(lambda s, ids: s.cache.keep([s.fork, s.seq], 2, [[1], [1]], [[5], ids])),
        *(
            lambda s, own=own: s.cache.keep([s.fork, s.seq], 2, own)
            for own in (None, 3, [[1]], [[1], [2]], [[1], [-1]])
        ),
        *(lambda s, own=own: s.cache.keep([s.fork, s.seq], 2, [[1], [0]], own) for own in (3, [[1]], [[1], [1, 2]])),
        lambda s: s.cache.keep([s.fork, s.seq], 2, [[1], [0, 0]]),
        lambda s: s.cache.keep([s.fork, s.seq], 15, [[1], [0]]),
    ],
    "free": calls_with_distinct(lambda s, seqs: s.cache.free(seqs)),
    "page_hashes": [
        *calls_with_ids(lambda s, ids: s.cache.page_hashes(ids)),
        lambda s: s.cache.page_hashes([1], 5),
    ],
    "page_places": [
        *calls_with_length(lambda s, n: s.cache.page_places(n)),
        *calls_with_length(lambda s, n: s.cache.page_places(5, n)),
    ],
    "export_pages": [
        *calls_with_seq(lambda s, seq: s.cache.export_pages(seq)),
        *calls_with_length(lambda s, n: s.cache.export_pages(s.seq, n)),
        lambda s: s.cache.export_pages(s.seq, 5),
        *(lambda s, i=i: s.cache.export_pages(s.seq, to=wrong_pages(s.pages)[i]) for i in range(1, 12)),
    ],
    "import_pages": [
        *calls_with_ids(lambda s, ids: s.cache.import_pages(s.pages, ids)),
        *calls_with_length(lambda s, n: s.cache.import_pages(s.pages, n)),
        *(lambda s, i=i: s.cache.import_pages(wrong_pages(s.pages)[i], 14) for i in range(13)),
        lambda s: s.cache.import_pages(s.pages, range(14), 5),
        lambda s: s.cache.import_pages(s.pages, 40),
        lambda s: s.cache.import_pages([x[:, :0] for x in s.pages], 14),
        lambda s: s.cache.import_pages(more_pages(s, 200), 200),
    ],
    "block_table": calls_with_seqs(lambda s, seqs: s.cache.block_table(seqs)),
    "cache_seqlens": calls_with_seqs(lambda s, seqs: s.cache.cache_seqlens(seqs)),
}
REFUSED_BY_STEP = {
    "extend": [
        *calls_with_distinct(lambda s, seqs: s.step.extend(seqs, 1)),
        *calls_with_batches(lambda s, ids: s.step.extend([s.fork, s.seq], ids)),
        lambda s: s.step.extend([s.seq], 7),
        lambda s: s.step.extend([s.fork], 5),
    ],
}
REFUSED_BY_GROUPS = {
    "tree": [
        *calls_with_distinct(lambda s, seqs: s.groups.tree(seqs)),
        *calls_with_length(lambda s, n: s.groups.tree([s.seq, s.fork], n)),
        *(lambda s, n=n: s.groups.tree([s.seq, s.fork], n) for n in (2, [1], [1, 2], [1, -1], [1.0, 1.0])),
    ],
}


def calls_with_pages(name, *rest):
    wrong = (None, 3, "ab", [[0]], [1.0], [None], [6], [0, -1], [1, [2]], torch.zeros(2))
    return [lambda s, pages=pages: getattr(s.pool, name)(pages, *rest) for pages in wrong]


# Of the pool pages 1 and 2 are held, 0 and 3 free, of which 0 can be found as page 2 can.
REFUSED_BY_POOL = {
    "allocate": [*calls_with_length(lambda s, n: s.pool.allocate(n)), lambda s: s.pool.allocate(5)],
    "share": [*calls_with_pages("share"), lambda s: s.pool.share([0, 1, 3])],
    "release": [
        *calls_with_pages("release"),
        lambda s: s.pool.release([1, 0]),
        lambda s: s.pool.release([2, 1, 1]),
    ],
    "ref_count": [lambda s, n=n: s.pool.ref_count(n) for n in (None, -1, 6, 1.0, "1", [1])],
    "ref_counts": calls_with_pages("ref_counts"),
    "register": [
        *calls_with_pages("register", [b"x"]),
        lambda s: s.pool.register([1, 3], [b"x", b"y"]),
        *(
            lambda s, own=own: s.pool.register([1, 2], own)
            for own in (None, 3, [b"x"], [b"x", None], [b"x", [1]], "xy", b"xy", [b"x", 1])
        ),
    ],
    "forget": calls_with_pages("forget"),
    "lookup": [lambda s, own=own: s.pool.lookup(own) for own in (None, 3, [b"b", []], "b", b"b")],
    "hash_of": [lambda s, n=n: s.pool.hash_of(n) for n in (None, -1, 6, 1.0, "1", [1])],
}
WITHOUT_INPUT = {"stats", "reset_prefix_cache", "take_events", "forget_all"}
TABLES = {
    **dict.fromkeys(KINDS, REFUSED),
    "step": REFUSED_BY_STEP,
    "groups": REFUSED_BY_GROUPS,
    "pool": REFUSED_BY_POOL,
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_method_is_in_the_table(kind):
    owner = {"latent": LatentKVCache, "step": CacheStep, "groups": PrefixGroups, "pool": BlockPool}.get(
        kind, PagedKVCache
    )
    methods = {name for name in dir(owner) if name[0] != "_" and callable(getattr(owner, name))}
    assert methods - WITHOUT_INPUT == set(TABLES[kind])


def check_refused(scene, call):
    before = scene.state()
    with pytest.raises((TypeError, ValueError, OutOfPages)) as raised:
        call(scene)
    assert scene.state() == before, f"{raised.value}, and something changed"
    if raised.type is not OutOfPages:
        assert CLEAR.fullmatch(str(raised.value)), str(raised.value)


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        *((kind, kind, name) for kind in KINDS for name in REFUSED),
        *(
            (kind, owner, name)
            for kind in ("plain", "windows")
            for owner in ("step", "groups")
            for name in TABLES[owner]
        ),
        *(("plain", "pool", name) for name in REFUSED_BY_POOL),
    ],
)
def test_a_refused_call_changes_nothing(kind, owner, name):
    scene = Scene(kind)
    for call in TABLES[owner][name]:
        check_refused(scene, call)


def test_events_are_not_taken_where_none_are_kept():
    cache = PagedKVCache(4, 4, **SIZE | dict(record_events=False))
    before = state_of(cache)
    with pytest.raises(ValueError, match="take_events: expected a cache that was made with record_events=True"):
        cache.take_events()
    assert state_of(cache) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_whose_copy_is_refused_changes_nothing(kind):
    """The copy itself refuses tensors of a trace, and caches with gradients, which are right in all that is checked
    before."""
    scene = Scene(kind)
    fakes = tuple(map(FakeTensorMode().from_tensor, scene.pages))
    before = scene.state()
    for ids in (14, [*range(8), *range(100, 106)]):
        with pytest.raises(Exception, match="FakeTensor"):
            scene.cache.import_pages(fakes, ids)
        assert scene.state() == before
    seq = scene.cache.import_pages(scene.pages, 14)
    for ours, theirs in zip(scene.cache.export_pages(seq), scene.pages):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


class SharedScene(Scene):
    """A scene with another fork, whose last page is shared, and a step that sends to memory of its own."""

    def __init__(self, kind):
        super().__init__(kind)
        self.staged = make_step(self.cache, 3, 20, 8, staged=True)
        self.staged.extend([self.fork], [1])
        self.last = self.cache.fork(self.seq)
        for x in self.cache._page_tensors():
            own = x.view(torch.uint8)
            own.copy_(torch.arange(own.numel(), device=DEVICE).view(own.shape) % 251)
        self.imported = [*range(8), *range(100, 106)]  # two pages of it are found

    def all_but_free_pages(self):
        """`state`, but for what is on pages that are free and not found, which are 0 from now on, and what prefix
        groups know, which is no more than the tables say."""
        pool = self.cache.pool
        kept = (pool._refs > 0) | pool._names.is_found
        for x in self.cache._page_tensors():
            x.view(torch.uint8)[:, torch.from_numpy(~kept)] = 0
        owners, (cache, own_pool, step, _, pages) = self.state()
        return owners, cache, own_pool, step, pages

    def tables(self):
        seqs = [self.seq, self.fork, self.last]
        return self.cache.block_table(seqs).tolist(), self.cache.cache_seqlens(seqs).tolist()


# Each copies a page, sends or writes something.
ON_THE_DEVICE = {
    "extend": lambda s: s.cache.extend([s.last], [[1]]),
    "extend, several": lambda s: s.cache.extend([s.fork, s.last, s.seq], [[1, 2], [3], 5]),
    "step": lambda s: s.step.extend([s.fork, s.last], [[1], [2, 3]]),
    "staged step": lambda s: s.staged.extend([s.fork, s.last, s.seq], [[1], [2, 3], 5]),
    "keep": lambda s: s.cache.keep([s.last, s.fork], 3, [[2], [1, 0]], [[8], [8, 9]]),
    "import": lambda s: s.cache.import_pages(s.pages, s.imported),
    "export": lambda s: s.cache.export_pages(s.fork),
    "tree": lambda s: s.groups.tree([s.seq, s.last]),
    "block table": lambda s: s.cache.block_table([s.fork]),
}
COPYING = ("extend", "extend, several", "step", "staged step", "keep")


@pytest.fixture
def pinned(monkeypatch):
    """Memory is pinned only where there is a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


@contextlib.contextmanager
def refused(number):
    """Of transfers, copies of pages, reads and writes of parts of a tensor that this process makes meanwhile, one
    is refused, or none; a list of their names."""
    made, depth = [], [0]

    def limited(operation):
        @functools.wraps(operation)
        def call(*args, **options):
            if depth[0] == 0:
                made.append(operation.__name__)
                if len(made) - 1 == number:
                    raise MemoryError("refused")
            depth[0] += 1
            try:
                return operation(*args, **options)
            finally:
                depth[0] -= 1

        return call

    operations = [(torch.Tensor, name) for name in ("pin_memory", "copy_", "scatter_", "__getitem__", "__setitem__")]
    operations += [(PagedSequences, "_to_device"), (sequences, "copy_kv_pages"), (transfer, "copy_kv_pages")]
    with contextlib.ExitStack() as patches:
        for owner, name in operations:
            patches.enter_context(mock.patch.object(owner, name, limited(getattr(owner, name))))
        yield made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ON_THE_DEVICE)
def test_whatever_the_device_refuses_changes_nothing(name, kind, pinned):
    """Each thing that a call does on the device fails once; then the call does what it would have done."""
    call, expected = ON_THE_DEVICE[name], SharedScene(kind)
    expected.all_but_free_pages()
    with refused(None) as made:
        call(expected)
    assert made
    assert ("copy_kv_pages" in made) == (name in (*COPYING, "import", "export"))
    for number in range(len(made)):
        scene = SharedScene(kind)
        before = scene.all_but_free_pages()
        with refused(number), pytest.raises(MemoryError, match="refused"):
            call(scene)
        assert scene.all_but_free_pages() == before, f"{made[number]} was refused, and something changed"
        call(scene)
        assert scene.tables() == expected.tables()
        assert contents(scene.staged) == contents(expected.staged)
        assert torch.equal(scene.groups.static.memory, expected.groups.static.memory)
        assert scene.all_but_free_pages() == expected.all_but_free_pages()


@pytest.mark.parametrize("name", COPYING)
def test_a_page_that_a_copy_has_overwritten_is_not_found(name, pinned):
    """Each free page can be found. Some are copied to before the device refuses what follows."""

    class FullScene(SharedScene):
        def __init__(self):
            super().__init__("plain")
            ids = range(200, 200 + 4 * self.cache.pool.num_free)
            seq, _ = self.cache.create(ids)
            self.cache.extend([seq], [ids])
            self.cache.commit([seq])
            self.cache.free(seq)
            self.names = self.cache.page_hashes(ids)

        def found(self):
            pages = self.cache.pool.lookup(self.names).tolist()
            return {page: [x[:, page].tolist() for x in self.cache._page_tensors()] for page in pages}

    scene = FullScene()
    with refused(None) as made:
        ON_THE_DEVICE[name](scene)
    for number in range(len(made)):
        scene = FullScene()
        before = scene.found()
        with refused(number), pytest.raises(MemoryError, match="refused"):
            ON_THE_DEVICE[name](scene)
        after = scene.found()
        assert all(before[page] == content for page, content in after.items())
        assert (after == before) == (number <= made.index("copy_kv_pages")), made[number]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("wrong", ["not contiguous", "another device", "another size", "of a trace"])
def test_a_copy_of_a_shared_page_that_is_refused_changes_nothing(wrong, name, kind, pinned):
    """The memory of the pages was put in another place, of which no copy is made."""
    scene = SharedScene(kind)
    attribute = "latent_cache" if kind == "latent" else "v_cache"
    own = getattr(scene.cache, attribute)
    other = {
        "not contiguous": own.repeat_interleave(2, dim=-1)[..., ::2],
        "another device": own.to("meta"),
        "another size": own[..., None],
        "of a trace": FakeTensorMode().from_tensor(own),
    }[wrong]
    before = scene.state(), contents(scene.staged)
    setattr(scene.cache, attribute, other)
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError)):
        ON_THE_DEVICE[name](scene)
    setattr(scene.cache, attribute, own)
    assert (scene.state(), contents(scene.staged)) == before


def test_a_tree_that_could_not_be_sent_is_planned_again(monkeypatch, pinned):
    """Two sequences of a batch share their last page until both go on."""
    monkeypatch.setattr(prefix_groups, "plan_tree", every_group)
    scenes = [SharedScene("plain") for _ in range(2)]
    for scene in scenes:
        scene.groups.tree([scene.seq, scene.last])
        scene.cache.extend([scene.seq, scene.last], 1)
        if scene is scenes[0]:
            with refused(0), pytest.raises(MemoryError, match="refused"):
                scene.groups.tree([scene.seq, scene.last])
        scene.groups.tree([scene.seq, scene.last])
    assert torch.equal(*(scene.groups.static.memory for scene in scenes))


@pytest.mark.parametrize("kind", ["plain", "windows"])
def test_numbers_of_tokens_take_no_memory_before_they_are_refused(kind):
    """Of 2^31 tokens the ids alone would be 16 GB."""
    scene, most = Scene(kind), 2**31 - 1
    calls = [
        lambda: scene.cache.extend([scene.seq], [most]),
        lambda: scene.cache.extend([scene.seq], most),
        lambda: scene.cache.extend([scene.seq, scene.fork], [[1], most]),
        lambda: scene.step.extend([scene.seq, scene.fork], [[1], most]),
        lambda: scene.cache.import_pages(scene.pages, most),
    ]
    for call in calls:
        before = scene.state()
        tracemalloc.start()
        with pytest.raises((ValueError, OutOfPages)):
            call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
        assert scene.state() == before
