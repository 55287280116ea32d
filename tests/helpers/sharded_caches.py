"""Caches that are sharded over gloo processes on a CPU, each held against one process with all keys."""

import contextlib
import os
import random
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from draft_trees import bits_of
from prefix_trees import tree_of

from triton_attn import (
    LatentKVCache,
    OutOfPages,
    PagedKVCache,
    append_kv_cache,
    append_latent_cache,
    kv_cache_bytes_per_token,
    mla_decode,
    paged_attention,
    reference,
)
from triton_attn.cache import sequences
from triton_attn.parallel import agreement, context_parallel_mla_decode, context_parallel_paged_attention, merging
from triton_attn.testing import assert_close_to_reference

NOPE, ROPE, RANK, V_DIM = 24, 8, 128, 20
HEADS = ("replicated", "scattered", "sharded")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of sequences with seqlens_k keys, of which the last seqlens_q are new."""

    latent: bool = False
    heads: str = "replicated"
    page_size: int = 4
    interleave: int = 1
    seqlens_q: tuple = (3, 3, 3, 3)
    seqlens_k: tuple = (50, 3, 33, 4)
    packed: bool = False
    num_heads_q: int = 8
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 24
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    weights: bool = True  # of latents: absorption and projection are in the call
    options: dict = field(default_factory=dict)
    alibi: bool = False
    sinks: bool = False
    shared: int = 0  # keys that all sequences have from the first one, with a prefix tree
    tree: str | None = None  # of KINDS of trees: the new keys are drafts
    fork: bool = True  # the first sequence is attended a second time, by a fork that has written one token more
    seed: int = 0

    @property
    def width(self):
        """Elements of a row of out, and of the queries that sharded heads gather."""
        if not self.latent:
            return self.head_dim_v, self.head_dim
        return RANK if self.heads == "sharded" or not self.weights else V_DIM, RANK + ROPE

    def bytes(self, num_ranks):
        """What a rank receives, by the table of `context_parallel_paged_attention`."""
        queries, (dim_v, dim) = sum(self.seqlens_q), self.width
        share = 1 if self.heads == "replicated" else num_ranks
        part = queries * self.num_heads_q * (dim_v * self.dtype.itemsize + 4) // share
        received = (num_ranks - 1) * (-(-part // 64) * 64)
        if self.heads == "sharded":
            received += (num_ranks - 1) * queries * self.num_heads_q * dim * self.dtype.itemsize // num_ranks
        return received


class Step:
    """The tensors of a case, the same on all ranks, and its calls."""

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.q = self._draw(sum(case.seqlens_q), case.num_heads_q, NOPE + ROPE if case.latent else case.head_dim)
        if case.latent and not case.weights:
            self.q = self._draw(sum(case.seqlens_q), case.num_heads_q, RANK + ROPE)
        self.w_uk, self.w_uv = (self._draw(case.num_heads_q, n, RANK) * RANK**-0.5 for n in (NOPE, V_DIM))
        self.new = [self._rows(n) for n in case.seqlens_k]
        self.per_head = {}
        if case.alibi:
            self.per_head["alibi_slopes"] = torch.rand(case.num_heads_q, generator=self.generator)
        if case.sinks:
            self.per_head["sinks"] = torch.randn(case.num_heads_q, generator=self.generator)
        starts = torch.tensor([0, *case.seqlens_q]).cumsum(0, dtype=torch.int32)
        self.packing = dict(cu_seqlens_q=starts, max_seqlen_q=max(case.seqlens_q)) if case.packed else {}
        self.trees = {}
        if case.tree:
            bits = torch.cat([bits_of(case.tree, n, self.generator) for n in case.seqlens_q])
            self.trees["tree_mask"] = bits if case.packed else bits.view(len(case.seqlens_q), -1)

    def _draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    def _rows(self, n):
        case = self.case
        if case.latent:
            return self._draw(n, RANK), self._draw(n, ROPE)
        return self._draw(n, case.num_heads_kv, case.head_dim), self._draw(n, case.num_heads_kv, case.head_dim_v)

    def fill(self, mesh=None):
        """A cache with the keys of all sequences, in two writes each, and the sequences."""
        case = self.case
        over = {} if mesh is None else dict(mesh=mesh, interleave=case.interleave)
        page_size = case.page_size if mesh is not None else case.page_size * 3
        sizes = dict(num_layers=1, dtype=case.cache_dtype or case.dtype, device="cpu")
        if case.latent:
            cache = LatentKVCache(64, page_size, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, **sizes, **over)
        else:
            heads = dict(num_kv_heads=case.num_heads_kv, head_dim=case.head_dim, head_dim_v=case.head_dim_v)
            cache = PagedKVCache(64, page_size, **heads, **sizes, **over)
        for x in tensors_of(cache):
            x.view(torch.uint8).fill_(0xFF)  # NaN
        seqs = []
        for rows in self.new:
            first = case.shared if seqs else 0
            seqs.append(cache.fork(seqs[0]) if first else cache.create([])[0])
            cache.truncate(seqs[-1], first)
            seq, half = seqs[-1], max(len(rows[0]) // 2, first)
            for part in (slice(first, half), slice(half, None)):
                write(cache, [x[part] for x in rows], cache.extend([seq], [len(rows[0][part])]))
        if case.fork:
            seqs.append(cache.fork(seqs[0]))
            cache.truncate(seqs[-1], len(seqs[-1]) - 1)
            write(cache, [x[:1] for x in self.new[1]], cache.extend([seqs[-1]], [1]))
            seqs = [seqs[-1], *seqs[1:-1]]
        return cache, seqs

    def operands(self, cache, seqs, rank=0, num_ranks=1):
        """Arguments of the call; of a rank's heads, if they are sharded."""
        case, own = self.case, slice(None)
        if case.heads == "sharded" and num_ranks > 1:
            share = case.num_heads_q // num_ranks
            own = slice(rank * share, (rank + 1) * share)
        q = self.q[:, own]
        if not case.packed:
            q = q.unflatten(0, (len(case.seqlens_q), -1))
        places = cache.cache_seqlens(seqs), cache.block_table(seqs)
        if not case.latent:
            return q, cache.k_cache[0], cache.v_cache[0], *places
        q = q.split([q.shape[-1] - ROPE, ROPE], dim=-1)
        weights = (self.w_uk[own], self.w_uv[own]) if case.weights else ()
        return *q, cache.latent_cache[0], *places, *weights

    @property
    def options(self):
        return dict(self.packing, return_lse=True, **self.trees, **self.case.options, **self.per_head)

    def attend(self, mesh, cache, seqs, **more):
        """out and lse of this rank's share of a sharded cache."""
        attend = context_parallel_mla_decode if self.case.latent else context_parallel_paged_attention
        placing = dict(mesh=mesh, interleave=self.case.interleave, heads=self.case.heads)
        operands = self.operands(cache, seqs, mesh.get_local_rank(), mesh.size())
        if self.case.shared:
            pages = [cache.block_table([seq])[0].tolist() for seq in seqs]
            placing["prefix_tree"] = tree_of(pages, self.case.seqlens_q)
            assert placing["prefix_tree"].sizes.num_nodes > 0
        return attend(*operands, **(placing | self.options | more))

    def expected(self, dtype=None):
        """out and lse of one process, by the definition in a dtype, or by the kernel."""
        cache, seqs = self.fill()
        operands, options = self.operands(cache, seqs), self.options
        name = "mla_decode" if self.case.latent else "paged_attention"
        if dtype is None:
            return (mla_decode if self.case.latent else paged_attention)(*operands, **options)
        operands = [x.to(dtype) if x.is_floating_point() else x for x in operands]
        if "sinks" in options:
            options["sinks"] = options["sinks"].to(dtype)
        return getattr(reference, name)(*operands, **options)

    def own(self, x, dim, mesh):
        """This rank's heads, unless it has all."""
        if self.case.heads == "replicated":
            return x
        return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def tensors_of(cache):
    return (cache.latent_cache,) if isinstance(cache, LatentKVCache) else (cache.k_cache, cache.v_cache)


def write(cache, rows, slots):
    append = append_latent_cache if isinstance(cache, LatentKVCache) else append_kv_cache
    append(*rows, *(x[0] for x in tensors_of(cache)), slots)


def check_values(case, mesh):
    """out and lse are those of one process."""
    step = Step(case)
    found = step.attend(mesh, *step.fill(mesh))
    exact, by_torch, by_kernel = (step.expected(dtype) for dtype in (torch.float64, torch.float32, None))
    eps = torch.finfo(case.dtype).eps
    for name, dim, *results in zip(("out", "lse"), (-2, -2), found, exact, by_torch, by_kernel):
        result, of_exact, *others = results
        of_exact, *others = (step.own(x, dim, mesh) for x in (of_exact, *others))
        # The definition in the dtype of the cache has no error in its products; the kernel on one process has that too.
        error = max(largest(x.double() - of_exact) for x in others)
        assert result.shape == of_exact.shape, f"{name}: {result.shape}"
        floor = 8 * eps * max(1.0, largest(of_exact))
        assert_close_to_reference(result, of_exact, torch_error=error, factor=3.0, floor=floor, name=name)


def largest(x):
    """The largest magnitude of the finite elements, 0 if there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def check_bytes(case, mesh):
    """The bytes that this rank receives are those of the docstring's table."""
    step = Step(case)
    cache, seqs = step.fill(mesh)
    with received_bytes(mesh) as received:
        step.attend(mesh, cache, seqs)
    assert sum(received) == case.bytes(mesh.size()), f"{received}, expected {case.bytes(mesh.size())} in all"


@contextlib.contextmanager
def received_bytes(mesh):
    """A list, to which each collective adds the bytes that it brings from other ranks, whose parts are all as large if
    their counts are not given."""
    received = []

    def counting(owner, name):
        collective = getattr(owner, name)

        def call(output, x, *counts, **options):
            parts = counts[0] if counts else [1] * mesh.size()
            others = sum(parts) - parts[mesh.get_local_rank()]
            received.append(output.nbytes * others // max(1, sum(parts)))
            return collective(output, x, *counts, **options)

        return mock.patch.object(owner, name, call)

    with counting(merging, "_all_gather"), counting(dist, "all_to_all_single"):
        yield received


def check_keep(case, mesh):
    """Accepted drafts move between ranks as they do inside one process, in a cache of any dtype and on the pages of
    each group of layers, with the bytes that the docstring says; forks stay."""
    seed, kind = case
    draw, num_ranks, rank = random.Random(seed), mesh.size(), mesh.get_local_rank()
    caches, of_token, interleave = caches_to_keep(draw, kind, mesh)
    lengths, num_drafts = [draw.randint(0, 20) for _ in range(3)], draw.randint(1, 12)
    num_earlier = draw.randint(0, num_drafts)  # drafts of a call before, whose pages may be gone
    content = [torch.randint(1, 120, (40,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    seqs = []
    for cache in caches:
        own = [cache.create([])[0] for _ in lengths]
        for counts in (lengths, [num_earlier] * 3, [num_drafts - num_earlier] * 3):
            cache.extend(own, counts)
        for seq, numbers in zip(own, content):
            fill(cache, seq, numbers)
        seqs.append(own)
    forks = [cache.fork(own[1]) for cache, own in zip(caches, seqs)]
    fewest = draw.choice([0, num_earlier])  # fewer may leave a sequence that ends on a page that is gone
    accepted = [draw.sample(range(num_drafts), draw.randint(fewest, num_drafts)) for _ in lengths]
    if draw.random() < 0.8:  # otherwise one may move from a page that is gone to one that is not
        accepted = list(map(sorted, accepted))
    moves = [
        (start + i, start + j)
        for seq, start, path in zip(seqs[1], lengths, accepted)
        for group in range(caches[1]._num_groups)
        for i, j in enumerate(path)
        if start + i >= first_held(caches[1], seq, group)
    ]
    before = [rows_of(caches[1], seq) for seq in (forks[1], *seqs[1])]
    with received_bytes(mesh) as received:
        refused = [refuses(cache.keep, own, num_drafts, accepted) for cache, own in zip(caches, seqs)]
    assert refused[0] == refused[1]

    moves = [] if refused[0] else [[position // interleave % num_ranks for position in move] for move in moves]
    assert len(received) == any(new != old for new, old in moves)
    assert sum(received) == of_token * sum(new == rank != old for new, old in moves), received
    assert caches[0].stats() == caches[1].stats()
    after = [rows_of(caches[1], seq) for seq in (forks[1], *seqs[1])]
    assert all(map(equal, before[: 4 if refused[0] else 1], after))
    for one, other in zip(*seqs):
        own = keys_of(caches[1], other)
        assert equal([x[:, keys] for x, keys in zip(rows_of(caches[0], one), own)], rows_of(caches[1], other))


def caches_to_keep(draw, kind, mesh):
    """A cache of one process and one of the mesh, the bytes of a token in the layers of a group, and interleave."""
    page_size, interleave = draw.choice([(1, 1), (2, 1), (4, 2), (4, 4), (3, 1)])
    sizes, windows = dict(num_layers=2), {}
    if kind == "latent":
        sizes |= dict(kv_lora_rank=3, qk_rope_head_dim=2, dtype=draw.choice([torch.float32, torch.bfloat16]))
    else:
        heads = dict(num_kv_heads=2, head_dim=3, head_dim_v=2)
        sizes |= heads | draw.choice([dict(dtype=torch.bfloat16), dict(dtype=torch.int8, token_scales=True)])
    if kind == "windows":
        layout = draw.choice([[-1, 2], [0, 7], [0, -1], [-1, -1, -1, 1, 1]])  # the last: groups of 2, 1 and 2 layers
        windows = dict(layer_windows=layout)
    make = partial(LatentKVCache if kind == "latent" else PagedKVCache, 256, device="cpu", **windows)
    of_cache = sizes | dict(num_layers=len(windows["layer_windows"]) if windows else 2)
    caches = [make(page_size=page_size * mesh.size(), **of_cache)]
    caches.append(make(page_size=page_size, mesh=mesh, interleave=interleave, **of_cache))
    num_layers = len(pages_of(caches[0])[0])
    return caches, kv_cache_bytes_per_token(**sizes | dict(num_layers=num_layers)), interleave


def refuses(method, *arguments):
    """Whether it raises ValueError."""
    try:
        method(*arguments)
    except ValueError:
        return True
    return False


def equal(one, other):
    """Of two lists of tensors."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def check_refused_keep(case, mesh):
    """Fails with what the call raises, which one rank refuses or makes with other drafts; nothing changes."""
    cache = PagedKVCache(8, 4, num_layers=1, num_kv_heads=1, head_dim=2, device="cpu", mesh=mesh)
    seq, _ = cache.create([])
    cache.extend([seq], [9])
    before = cache.stats(), cache.block_table([seq]).tolist()
    try:
        cache.keep([seq], 4, [case[mesh.get_local_rank()]])
    except ValueError as error:
        raise AssertionError(
            f"{error}; same: {(cache.stats(), cache.block_table([seq]).tolist()) == before}"
        ) from error


def check_failed_keep(num_kept, mesh):
    """The copy of a page fails on the last rank alone. Fails with what the next call raises; nothing changes then."""
    cache = PagedKVCache(8, 4, num_layers=1, num_kv_heads=1, head_dim=2, device="cpu", mesh=mesh)
    seq, _ = cache.create([])
    cache.extend([seq], [9])
    fill(cache, seq, torch.arange(1, 10))
    fork = cache.fork(seq)

    def state():
        rows = [x.tolist() for sequence in (seq, fork) for x in rows_of(cache, sequence)]
        return cache.stats(), cache.block_table([seq, fork]).tolist(), rows

    before, is_last = state(), mesh.get_local_rank() == mesh.size() - 1
    copy = mock.Mock(side_effect=MemoryError("no memory")) if is_last else sequences.copy_kv_pages
    fails = pytest.raises(MemoryError) if is_last else contextlib.nullcontext()
    with mock.patch.object(sequences, "copy_kv_pages", copy), fails:
        cache.keep([seq], 4, [range(1, 1 + num_kept)])
    assert (state() == before) == is_last
    before = state()
    try:
        cache.keep([seq], 1, [[0]])
    except ValueError as error:
        raise AssertionError(f"{error}; same: {state() == before}") from error


def first_held(cache, seq, group):
    """The first position whose page a group of layers did not give back."""
    return cache._firsts[seq._row + group].item() * cache.page_size


def keys_of(cache, seq):
    """For each group of layers, which of the tokens that all ranks hold are this rank's."""
    found = []
    for group in range(cache._num_groups):
        positions, shard = torch.arange(first_held(cache, seq, group), len(seq)), cache.key_shard
        is_own = torch.tensor(True) if shard is None else positions // shard.interleave % shard.num_ranks == shard.rank
        found.append(is_own.expand(len(positions)).nonzero().flatten())
    return found


def places_of_tokens(cache, seq):
    """For each group of layers the positions of the tokens that the cache holds, their pages and slots."""
    table = cache.block_table([seq])
    for group, keys in enumerate(keys_of(cache, seq)):
        first, (row,) = first_held(cache, seq, group), table if cache.layers is None else table[group]
        columns = first // cache.page_size + torch.arange(len(keys)) // cache._page_slots
        yield first + keys, row.long()[columns], torch.arange(len(keys)) % cache._page_slots


def keep_without_the_last(mesh):
    """Both ranks have agreed on a path, and one dies while its drafts move; the cache of the other is as before."""
    cache = PagedKVCache(16, 2, num_layers=2, num_kv_heads=1, head_dim=2, device="cpu", mesh=mesh)
    seq, _ = cache.create([])
    cache.extend([seq], [11])
    fill(cache, seq, torch.arange(1, 12))
    fork = cache.fork(seq)

    def state():
        rows = [x.tolist() for sequence in (seq, fork) for x in rows_of(cache, sequence)]
        return cache.stats(), cache.block_table([seq, fork]).tolist(), len(seq), len(fork), rows

    before, exchange = state(), dist.all_to_all_single
    is_last = mesh.get_local_rank() == mesh.size() - 1
    with mock.patch.object(dist, "all_to_all_single", (lambda *args, **options: os._exit(1)) if is_last else exchange):
        try:
            cache.keep([seq], 6, [[1, 4, 3]])
        finally:
            assert state() == before


def fill(cache, seq, content):
    """Each token's number in every layer and tensor, times one for each."""
    for positions, pages, slots in places_of_tokens(cache, seq):
        for i, x in enumerate(pages_of(cache)):
            for layer in range(len(x)):
                numbers = content[positions] * (1 if x.dtype == torch.int8 else 1 + layer + 2 * i)
                x[layer][pages, slots] = numbers.view(-1, *[1] * (x.ndim - 3)).expand(-1, *x.shape[3:]).to(x.dtype)


def pages_of(cache):
    return [
        x
        for x in (*tensors_of(cache), getattr(cache, "k_scale", None), getattr(cache, "v_scale", None))
        if x is not None
    ]


def rows_of(cache, seq):
    """(layers, keys, all numbers of a token) of the keys of a sequence that the cache has, for each group of layers."""
    return [
        torch.cat([x[:, pages, slots].double().flatten(2) for x in pages_of(cache)], dim=2)
        for _, pages, slots in places_of_tokens(cache, seq)
    ]


class Decoder:
    """A model of two layers with random weights, which decodes greedily over any cache."""

    def __init__(self, latent):
        self.latent, generator = latent, torch.Generator().manual_seed(7)

        def draw(*shape):
            return torch.randn(shape, generator=generator) * shape[-2] ** -0.5

        self.embedding = torch.randn(50, 32, generator=generator)
        new = 16 + 8 if latent else 2 * 2 * 16
        of_q = 4 * (12 + 8) if latent else 4 * 16
        self.layers = [(draw(32, of_q), draw(32, new), draw(4 * 16, 32)) for _ in range(2)]
        self.weights = draw(4, 12, 16), draw(4, 16, 16)  # of latents

    def cache(self, page_size, mesh=None):
        over = dict(num_layers=2, dtype=torch.float32, device="cpu", mesh=mesh)
        if self.latent:
            return LatentKVCache(60, page_size, kv_lora_rank=16, qk_rope_head_dim=8, **over)
        return PagedKVCache(60, page_size, num_kv_heads=2, head_dim=16, **over)

    def logits(self, cache, seqs, tokens, mesh=None):
        """Of the last token of each sequence, after these new tokens of each."""
        slots = cache.extend(seqs, tokens)
        counts = torch.tensor([len(of_one) for of_one in tokens])
        ends = counts.cumsum(0, dtype=torch.int32)
        starts = torch.nn.functional.pad(ends, (1, 0))
        options = dict(cu_seqlens_q=starts, max_seqlen_q=int(counts.max()))
        if mesh is not None:
            options |= dict(mesh=mesh)
        places = cache.cache_seqlens(seqs), cache.block_table(seqs)
        x = self.embedding[torch.tensor([token for of_one in tokens for token in of_one])]
        for i, (w_q, w_new, w_out) in enumerate(self.layers):
            q, new = (x @ w_q).unflatten(1, (4, -1)), x @ w_new
            if self.latent:
                append_latent_cache(*new.split([16, 8], dim=1), cache.latent_cache[i], slots)
                attend = mla_decode if mesh is None else context_parallel_mla_decode
                out = attend(*q.split([12, 8], dim=2), cache.latent_cache[i], *places, *self.weights, **options)
            else:
                k, v = new.unflatten(1, (2, 2, 16)).unbind(1)
                append_kv_cache(k, v, cache.k_cache[i], cache.v_cache[i], slots)
                attend = paged_attention if mesh is None else context_parallel_paged_attention
                out = attend(q, cache.k_cache[i], cache.v_cache[i], *places, **options)
            x = x + torch.tanh(out.flatten(1) @ w_out)
        return (x @ self.embedding.T)[ends - 1]

    def generate(self, cache, mesh=None):
        """All tokens of all sequences: of two prompts, of a fork of each, which goes on with another token, and of a
        prompt whose beginning is cached."""
        prompts = [[(7 * i + 3 * j) % 50 for i in range(n)] for j, n in enumerate((21, 13))]
        seqs = [cache.create(prompt)[0] for prompt in prompts]
        best = self.logits(cache, seqs, prompts, mesh).topk(2).indices.tolist()
        seqs += cache.fork(seqs)
        texts = [[*prompt, first] for prompt, (first, _) in zip(prompts, best)]
        texts += [[*prompt, second] for prompt, (_, second) in zip(prompts, best)]
        for step in range(12):
            found = self.logits(cache, seqs, [[text[-1]] for text in texts], mesh).argmax(1).tolist()
            for text, token in zip(texts, found):
                text.append(token)
            if step == 4:
                cache.free(seqs.pop(1))
                text = [*texts.pop(1)[:9], 11, 12]
                seq, cached = cache.create(text)
                assert cached == 8  # a page
                first = self.logits(cache, [seq], [text[cached:]], mesh).argmax(1).tolist()
                seqs.append(seq)
                texts.append(text + first)
        return texts


def check_generation(latent, mesh):
    model, page_size = Decoder(latent), 8 // mesh.size()
    expected = model.generate(model.cache(8))
    assert model.generate(model.cache(page_size, mesh), mesh) == expected
    assert len({tuple(text[-6:]) for text in expected}) == len(expected)  # they do differ


def check_out_of_pages(num_pages, mesh):
    """The rank with the fewest pages decides: all raise at the same call, and go on alike."""
    rank = mesh.get_local_rank()
    cache = PagedKVCache(num_pages[rank], 4, num_layers=1, num_kv_heads=1, head_dim=8, device="cpu", mesh=mesh)
    first, _ = cache.create([])
    fork = cache.fork(first)
    cache.extend([first], [4 * mesh.size() * (min(num_pages) - 1)])
    before = cache.stats(), cache.block_table([first, fork]).tolist()
    failed = False
    try:
        cache.extend([first, fork], [1, 4 * mesh.size()])
    except OutOfPages:
        failed = True
    assert failed
    assert (cache.stats(), cache.block_table([first, fork]).tolist()) == before
    cache.extend([fork], [1])
    assert cache.stats().pages_free == 0


def check_difference(changes, mesh):
    """Fails with what the call raises; changes are those of the ranks: fields of the case, or `table` or `given` of the
    call alone."""
    change = dict(changes[mesh.get_local_rank()])
    reorders, given = change.pop("table", False), change.pop("given", {})
    step = Step(Case(**change))
    cache, seqs = step.fill(mesh)
    try:
        step.attend(mesh, cache, list(reversed(seqs)) if reorders else seqs, **given)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from error


def check_difference_later(changes, mesh):
    """Fails with what the next call raises, where the host waits for no transfer."""
    change = changes[mesh.get_local_rank()]
    with mock.patch.object(agreement, "waits_for_transfers", return_value=False):
        step = Step(Case(**change))
        cache, seqs = step.fill(mesh)
        step.attend(mesh, cache, seqs)
        try:
            step.attend(mesh, cache, seqs)
        except ValueError as error:
            raise AssertionError(str(error)) from error


def check_cache_difference(sizes, mesh):
    """Fails with what the making of the cache raises."""
    own = dict(num_layers=1, num_kv_heads=1, head_dim=8, device="cpu") | sizes[mesh.get_local_rank()]
    try:
        PagedKVCache(4, 4, mesh=mesh, **own)
    except ValueError as error:
        raise AssertionError(str(error)) from error
