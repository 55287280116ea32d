"""Calls of paged_attention over hostile caches, each checked against fp64."""

import contextlib
import itertools
import math
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from draft_trees import bits_of
from prefix_trees import tree_of
from scores import Scores

from triton_attn import paged_attention
from triton_attn._host import gpu
from triton_attn._host.definition import attend, attend_tree, visible_keys
from triton_attn._host.prefix_tree import read_tree
from triton_attn._host.tuned import forget_plans
from triton_attn.paged import forward
from triton_attn.paged.configs import PagedConfig
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTIZED = (*FLOAT8, torch.int8)
PAGE_SIZES = (1, 5, 8, 16, 32, 48, 64, 80, 128, 256)  # 48 and 80: no tile divides them, and they divide no tile
HEAD_DIMS = (1, 16, 40, 64, 71, 80, 96, 128, 192, 256, 512)
DEAD_ENTRY = 2147480000
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case(Scores):
    """One call. page_size None is a contiguous cache; without varlen all sequences have the same number of queries."""

    varlen: bool
    dtype: torch.dtype
    cache_dtype: torch.dtype
    page_size: int | None
    seqlens_q: tuple
    seqlens_k: tuple
    num_heads_kv: int
    group_size: int
    head_dim: int
    head_dim_v: int
    scales: tuple  # of k and v: None, a number, "one", "per head" or "per token"
    num_splits: int
    forks: tuple  # of each sequence: None, or (an earlier sequence, how many of its first pages it has)
    part: int | None  # pages of the parts of a tree's nodes; None: a call without a tree
    q_layout: str  # keys of LAYOUTS
    cache_layout: str
    spare_rows: int  # after the last sequence
    spare_entries: int  # of the table
    gives_out: bool
    config: PagedConfig
    seed: int
    key_shard: tuple | None = None  # (rank, num_ranks, interleave): the cache has the rank's keys alone
    packed: bool = False  # vLLM's packed cache; its cache_layout says which part of a larger tensor it is
    tree: str | None = None  # of KINDS of trees: bits say which of its last keys a query sees

    @property
    def num_heads_q(self):
        return self.num_heads_kv * self.group_size

    def own(self, seqlen):
        """Positions of the first seqlen keys that are in the cache."""
        positions = torch.arange(seqlen)
        if self.key_shard is None:
            return positions
        rank, num_ranks, interleave = self.key_shard
        return positions[positions // interleave % num_ranks == rank]


PLAIN = Case(
    varlen=False,
    dtype=torch.float16,
    cache_dtype=torch.float16,
    page_size=16,
    seqlens_q=(1, 1, 1),
    seqlens_k=(47, 100, 1),
    num_heads_kv=2,
    group_size=4,
    head_dim=64,
    head_dim_v=64,
    scales=(None, None),
    num_splits=1,
    forks=(),
    part=None,
    q_layout="contiguous",
    cache_layout="contiguous",
    spare_rows=0,
    spare_entries=2,
    gives_out=False,
    config=PagedConfig(16, 32, 4, 1),
    seed=0,
)

# Memory layouts of (batch, rows, heads, dim) or (pages, slots, heads, dim).
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "heads first": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "wide": lambda x: torch.nn.functional.pad(x, (0, 16 - x.shape[-1] % 16))[..., : x.shape[-1]],
}


class Inputs:
    """The inputs of a call, and `clean` keys and values (1, seqlen_k, heads, dim) of each sequence.

    Slots without a key are NaN. Entries of the table past a sequence's pages are invalid.
    """

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        batch = len(case.seqlens_q)
        self.q = self._randn(sum(case.seqlens_q) + case.spare_rows, case.num_heads_q, case.head_dim).to(case.dtype)
        self.own = [case.own(n) for n in case.seqlens_k]
        self._lay_out_pages(case, batch)
        self.k_scale, self.v_scale = map(self._scale, case.scales)
        self.k_cache, self.clean_k = self._cache(case.head_dim, self.k_scale, is_key=True)
        self.v_cache, self.clean_v = self._cache(case.head_dim_v, self.v_scale, is_key=False)
        slopes_shape = (batch, case.num_heads_q) if case.alibi == "per sequence" else (case.num_heads_q,)
        self.alibi_slopes = torch.rand(slopes_shape, generator=self.generator).to(DEVICE) if case.alibi else None
        self.sinks = self._randn(case.num_heads_q).to(case.sinks) if case.sinks else None
        lengths = (*case.seqlens_q, case.spare_rows)
        self.bits = None
        if case.tree:
            self.bits = [bits_of(case.tree, n, self.generator).to(DEVICE) for n in lengths]

    def _randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def _scale(self, scale):
        if scale == "per token" and self.case.cache_dtype not in QUANTIZED:
            return None
        if scale == "per token":
            scales = (torch.rand(*self.cache_shape, self.case.num_heads_kv, generator=self.generator) + 0.1) / 16
            scales[self._is_unused()] = NAN
            # With the layout "heads first", one after the other for a head; never of stride 1 for heads.
            return lay_out(scales[..., None], self.case.cache_layout)[..., 0].to(DEVICE)
        if isinstance(scale, str):
            shape = (1 if scale == "one" else self.case.num_heads_kv,)
            return (torch.rand(shape, generator=self.generator) + 0.5).to(DEVICE)
        return scale

    def _lay_out_pages(self, case, batch):
        """The table, and the (page, slot) of each sequence's keys."""
        seqlens, num_ranks = [len(own) for own in self.own], case.key_shard[1] if case.key_shard else 1
        if case.page_size is None:
            self.cache_shape = (batch, max(seqlens, default=0) + 3)
            if case.key_shard:  # turns end with the cache
                self.cache_shape = (batch, -(-self.cache_shape[1] // case.key_shard[2]) * case.key_shard[2])
            self.block_table = None
            self.places = [
                (torch.full((n,), i, device=DEVICE), torch.arange(n, device=DEVICE)) for i, n in enumerate(seqlens)
            ]
            return
        counts = [-(-n // case.page_size) for n in seqlens]
        width = max(*case.seqlens_k, 0, 0)  # keys of all ranks: tables are as wide on each
        width = -(-width // (case.page_size * num_ranks)) + case.spare_entries
        num_pages = sum(counts) + 3
        pages = torch.randperm(num_pages, generator=self.generator).tolist()
        tables = []
        self.cache_shape = (num_pages, case.page_size)
        table = torch.full((batch, width), DEAD_ENTRY, dtype=torch.int32)
        self.places = []
        for i, (n, count) in enumerate(zip(seqlens, counts)):
            parent, num_shared = (case.forks and case.forks[i]) or (i, 0)
            own = tables[parent][: min(num_shared, count)] if num_shared else []
            own += [pages.pop() for _ in range(count - len(own))]
            tables.append(own)
            table[i, :count] = torch.tensor(own, dtype=torch.int32)
            keys = torch.arange(n)
            places = torch.tensor(own, dtype=torch.long)[keys // case.page_size], keys % case.page_size
            self.places.append(tuple(x.to(DEVICE) for x in places))
        self.block_table = table.to(DEVICE)
        self.tables = tables

    def tree(self):
        """A PrefixTree with a node for every group of sequences that share pages, whether or not it pays."""
        return tree_of(self.tables, self.case.seqlens_q, DEVICE, self.case.part)

    def _cache(self, dim, scale, is_key):
        case = self.case
        values = self._randn(*self.cache_shape, case.num_heads_kv, dim)
        per_token = getattr(scale, "ndim", 0) == 3
        values = (24 * values if per_token else values).to(case.cache_dtype)
        exact = values.double()
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=torch.float64, device=DEVICE)
            exact *= scale.unsqueeze(-1) if per_token else scale.reshape(-1, 1)
        clean = [exact[place][None] for place in self.places]
        if case.cache_dtype.itemsize == 1:
            values.view(torch.uint8)[self._is_unused()] = 0x7F  # NaN in both formats of fp8
        else:
            values[self._is_unused()] = NAN
        if case.packed:
            return pack(values, 16 // values.element_size() if is_key else None, case.cache_layout), clean
        return lay_out(values, case.cache_layout), clean

    def _is_unused(self):
        """Slots without a key."""
        unused = torch.ones(self.cache_shape, dtype=torch.bool, device=DEVICE)
        for place in self.places:
            unused[place] = False
        return unused

    def expected(self, dtype, upcast):
        """out (rows, heads, dim) and lse (rows, heads) of all sequences, computed in dtype."""
        outs = [self.q.new_zeros(0, self.case.num_heads_q, self.case.head_dim_v, dtype=upcast)]
        lses = [self.q.new_zeros(0, self.case.num_heads_q, dtype=torch.promote_types(dtype, torch.float32))]
        queries = self.q.split((*self.case.seqlens_q, self.case.spare_rows))
        for i, (k, v) in enumerate(zip(self.clean_k, self.clean_v)):
            slopes = self.alibi_slopes[i] if self.case.alibi == "per sequence" else self.alibi_slopes
            own, offset = self.own[i].to(DEVICE), self.case.seqlens_k[i] - self.case.seqlens_q[i]
            places = dict(offset=offset, key_positions=own)
            places |= {} if self.bits is None else dict(tree_mask=self.bits[i])
            out, lse = (attend if self.bits is None else attend_tree)(
                queries[i][None].to(upcast),
                k.to(upcast),
                v.to(upcast),
                alibi_slopes=slopes,
                sinks=self.sinks,
                compute_dtype=dtype,
                **places,
                **self.case.options,
            )
            outs.append(out[0])
            lses.append(lse[0].T)
        return torch.cat(outs), torch.cat(lses)

    def call(self, **options):
        """out (rows, heads, dim) and lse (rows, heads) of the public function, without the spare rows."""
        case = self.case
        q = self.q if case.varlen else self.q.unflatten(0, (len(case.seqlens_q), -1) if case.seqlens_q else (0, 3))
        if case.varlen:
            cu_seqlens = [0, *itertools.accumulate(case.seqlens_q)]
            options["cu_seqlens_q"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
            options["max_seqlen_q"] = max(case.seqlens_q, default=0)
        q = lay_out(q, case.q_layout)
        if case.tree:
            options["tree_mask"] = torch.cat(self.bits).view(q.shape[:-2])
        if case.gives_out:
            larger = torch.full((*q.shape[:-1], case.head_dim_v + 3), NAN, dtype=case.dtype, device=DEVICE)
            options["out"] = larger[..., : case.head_dim_v]
        out, lse = paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            torch.tensor(case.seqlens_k, dtype=torch.int32, device=DEVICE),
            self.block_table,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            num_splits=case.num_splits,
            prefix_tree=None if case.part is None else self.tree(),
            key_shard=case.key_shard,
            return_lse=True,
            **case.options,
            **options,
        )
        if case.gives_out:
            assert out is options["out"]
        rows = sum(case.seqlens_q)
        if not case.varlen:
            return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        assert (out[rows:] == 0).all()
        assert (lse[:, rows:] == -math.inf).all()
        return out[:rows], lse.T[:rows]


def pack(x, together=None, layout="contiguous"):
    """vLLM's packed cache of (pages, slots, heads, dim): keys, so many elements of which lie together, or values. With
    the layout "heads first" every second page of a larger tensor of NaN, with "wide" all heads of it but one."""
    dtype = x.dtype
    bits = x.view(torch.uint8) if dtype.itemsize == 1 else x
    packed = bits.permute(0, 2, 3, 1) if together is None else bits.unflatten(3, (-1, together)).permute(0, 2, 3, 1, 4)
    if layout == "contiguous":
        return packed.contiguous().view(dtype)
    num_pages, num_heads, num_rows, *row = packed.shape
    sizes = (2 * num_pages, num_heads) if layout == "heads first" else (num_pages, num_heads + 1)
    larger = torch.full((*sizes, num_rows, *row), 0x7F if dtype.itemsize == 1 else NAN, dtype=bits.dtype, device=DEVICE)
    part = larger[::2] if layout == "heads first" else larger[:, 1:]
    return part.copy_(packed).view(dtype)


def lay_out(x, layout):
    """fp8 is moved as uint8, since torch cannot pad it."""
    if x.dtype.itemsize == 1:
        return LAYOUTS[layout](x.view(torch.uint8)).view(x.dtype)
    return LAYOUTS[layout](x)


@contextlib.contextmanager
def using(config):
    """The kernel runs with these tiles. On a GPU it uses its own, which fit."""
    if not INTERPRETED:
        yield
        return
    with (
        mock.patch.object(forward, "choose", return_value=config),
        mock.patch.object(gpu, "has_wgmma", return_value=True),  # with 8 warps, 64 rows use the form of sm_90
    ):
        forget_plans()
        yield
    forget_plans()


def check(case):
    """The call is right in every row, writes each element once, and reads exactly the visible keys."""
    inputs = Inputs(case)
    with using(case.config), poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        out, lse = inputs.call()
    if out.numel():
        check_values(case, inputs, out, lse)
    if INTERPRETED and out.numel():
        check_accesses(case, inputs, accesses)


def check_values(case, inputs, out, lse):
    out64, lse64 = inputs.expected(torch.float64, torch.float64)
    torch_out, _ = inputs.expected(case.dtype, case.dtype)
    _, torch_lse = inputs.expected(torch.float32, torch.float32)
    # Weights sum to 1 and each is rounded once: an output may be off by this share of the values, even if they cancel.
    # In fp32 the rounding of the scores counts; in half precision, tanh through exp2 is exact to the rounding of
    # softcap.
    finite = lse64[lse64.isfinite()]
    score_error = torch.finfo(torch.float32).eps * (4 + (case.dtype != torch.float32) * case.softcap)
    largest = max((v.abs().max().item() for v in inputs.clean_v if v.numel()), default=0.0)
    floor = max(torch.finfo(case.dtype).eps, score_error) * largest
    assert_close_to_reference(out, out64, torch_out=torch_out, floor=floor)
    floor = score_error * max(1.0, finite.abs().amax().item() if finite.numel() else 0.0)
    assert_close_to_reference(lse, lse64, torch_out=torch_lse, floor=floor, name="lse")


def check_accesses(case, inputs, accesses):
    """If one tile has all rows of a KV head for a sequence, each visible key is loaded once. With a prefix tree, a key
    of a node is loaded once for each tile of the node's rows."""
    size = case.cache_dtype.itemsize
    tree = None if case.part is None else read_tree(inputs.tree())
    most = keys_loaded(case, inputs, tree) * case.num_heads_kv
    exactly = max(case.seqlens_q) * case.group_size <= case.config.block_m
    if tree is not None and (
        case.window_size != (-1, -1) or (case.causal and not case.tree)
    ):  # a tile has rows that see fewer keys
        exactly = exactly and all(n <= 1 for n in case.seqlens_q) and case.window_size == (-1, -1)
    bytes_of_key = {"k.ptr": size * case.head_dim, "v.ptr": size * case.head_dim_v}
    for name, scale in (("scales.k_tokens.ptr", inputs.k_scale), ("scales.v_tokens.ptr", inputs.v_scale)):
        if getattr(scale, "ndim", 0) == 3:
            bytes_of_key[name] = 4
    for name, of_key in bytes_of_key.items():
        loaded = accesses.bytes_loaded[name]
        assert loaded <= most * of_key
        if exactly:
            assert loaded == most * of_key


def keys_loaded(case, inputs, tree=None):
    """Keys from the first to the last visible one for the rows of a tile, over all tiles. If each tile is in one page,
    the first key is rounded down to a tile; in a packed cache, to what divides a page and a tile. With a tree, all keys
    of its nodes for each tile of their rows, and of the sequences those that no node has.
    """
    align = 1
    if case.page_size and case.page_size % case.config.block_n == 0:
        align = case.config.block_n
    elif case.packed:
        align = math.gcd(case.page_size, case.config.block_n)
    total, first_pages = 0, [0] * len(case.seqlens_q)
    if tree is not None:
        first_pages, _, parts = tree
        of_query = [i for i, n in enumerate(case.seqlens_q) for _ in range(n)]
        for part in parts:
            ends = [
                min(part.end_page * case.page_size, len(case.own(case.seqlens_k[of_query[q]]))) for q in part.queries
            ]
            if case.tree:
                ends = [min(end, _keys_before_drafts(case, of_query[q])) for end, q in zip(ends, part.queries)]
            rows = torch.tensor(ends).repeat_interleave(case.group_size)
            for tile in rows.split(case.config.block_m):
                total += max(int(tile.max()) - part.first_page * case.page_size, 0)
    for i, (seqlen_q, seqlen_k, first_page) in enumerate(zip(case.seqlens_q, case.seqlens_k, first_pages)):
        if case.tree:
            total += _keys_of_tree(
                case,
                inputs.bits[i],
                seqlen_k,
                align,
                min(first_page * (case.page_size or 0), _keys_before_drafts(case, i)),
            )
            continue
        visible, _ = visible_keys(seqlen_q, seqlen_k, case.causal, case.window_size, "cpu")
        visible = visible[:, case.own(seqlen_k)]
        visible[:, : first_page * (case.page_size or 0)] = False
        rows = visible.repeat_interleave(case.group_size, dim=0)
        for tile in rows.split(case.config.block_m) if len(rows) else ():
            seen = tile.any(0).nonzero()
            if len(seen):
                total += int(seen[-1]) + 1 - int(seen[0]) // align * align
    return total


def _keys_before_drafts(case, i):
    """Those on the full pages before the drafts of a sequence: a prefix tree's nodes have no others."""
    page_size = case.page_size or 1
    return len(case.own(max(0, case.seqlens_k[i] - case.seqlens_q[i]))) // page_size * page_size


def _keys_of_tree(case, bits, seqlen_k, align, first_key):
    """Of one sequence: all keys from first_key on, since any may be a draft that is seen, but for those before the
    window."""
    left, total = case.window_size[0], 0
    first = seqlen_k - len(bits)
    counts = torch.tensor([bin(x % 2 ** len(bits)).count("1") for x in bits.tolist()])
    positions = (first + counts - 1).repeat_interleave(case.group_size)
    for tile in positions.split(case.config.block_m) if len(bits) else ():
        before = len(case.own(max(int(tile.min()) - left, 0))) if left >= 0 else 0
        lo = max(before, first_key) // align * align if left >= 0 else first_key
        total += max(len(case.own(seqlen_k)) - lo, 0)
    return total
