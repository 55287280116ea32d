"""Calls of mla_decode over hostile caches, each checked against fp64."""

import contextlib
import math
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from draft_trees import bits_of
from prefix_trees import tree_of

from triton_attn import append_latent_cache, mla_decode
from triton_attn._host import gpu
from triton_attn._host.checks import MAX_ROWS
from triton_attn._host.definition import attend, attend_tree, rotate
from triton_attn._host.latent import latent_storage, read_latent_cache
from triton_attn._host.prefix_tree import read_tree
from triton_attn._host.tuned import forget_plans
from triton_attn.mla import absorbed
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PAGE_SIZES = (1, 5, 16, 32, 48, 64)
DEAD_ENTRY = 2147480000
TILES = MlaDecodeConfig(16, 32, 4, 3)  # three stages: page numbers are loaded a trip ahead
PLAIN = dict(window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None)

# Memory layouts of (batch, rows, heads, dim).
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "wide": lambda x: torch.nn.functional.pad(x, (3, 13))[..., 3:-13],
}


@dataclass(frozen=True)
class Case:
    """One call. With w_uk queries are absorbed, with w_uv outputs projected. With seqlens_q queries are packed, and two
    rows follow the last sequence; max_seqlen_q is a bound of these lengths, None the longest."""

    dtype: torch.dtype = torch.float16
    is_fp8: bool = False  # rows of bytes with scales
    cache_dtype: torch.dtype | None = None  # else: fp8 with the factors k_scale and k_pe_scale; None is dtype
    k_scale: float | None = None
    k_pe_scale: float | None = None
    scale_tensors: bool = False
    page_size: int = 16
    seqlen_q: int = 1
    seqlens_k: tuple = (47, 100, 1)
    seqlens_q: tuple | None = None
    max_seqlen_q: int | None = None
    two_tensors: bool = False  # rotary keys have a cache of their own
    num_heads: int = 4
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    kv_lora_rank: int = 64
    v_head_dim: int = 24
    with_uk: bool = True
    with_uv: bool = True
    causal: bool = True
    softmax_scale: float | None = None
    rotary_dim: int = 0
    rope_interleaved: bool = False
    num_splits: int = 1
    q_layout: str = "contiguous"
    one_layer: bool = False  # the cache is a slice of a cache of all layers, with gaps between rows
    config: MlaDecodeConfig = TILES
    seed: int = 0
    key_shard: tuple | None = None  # (rank, num_ranks, interleave): the cache has the rank's keys alone
    tree: str | None = None  # of KINDS of trees: bits say which of its last keys a query sees
    forks: tuple = ()  # of each sequence: None, or (an earlier sequence, how many of its first pages it has)
    part: int | None = None  # pages of the parts of a prefix tree's nodes; None: a call without one

    @property
    def lengths_q(self):
        """Queries of each sequence."""
        return [self.seqlen_q] * len(self.seqlens_k) if self.seqlens_q is None else self.seqlens_q

    def own(self, seqlen):
        """Positions of the first seqlen keys that are in the cache."""
        positions = torch.arange(max(seqlen, 0))
        if self.key_shard is None:
            return positions
        rank, num_ranks, interleave = self.key_shard
        return positions[positions // interleave % num_ranks == rank]


class Inputs:
    """The inputs of a call, and for each sequence the rows (keys, kv_lora_rank + qk_rope_head_dim) of its cache.

    Slots without a key are NaN. Entries of the table past a sequence's pages are invalid.
    """

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        nope, rank = case.qk_nope_head_dim, case.kv_lora_rank
        rows = len(case.seqlens_k), case.seqlen_q, case.num_heads
        if case.seqlens_q is not None:
            rows = sum(case.seqlens_q) + 2, case.num_heads
        self.q_nope = self._randn(*rows, nope if case.with_uk else rank)
        self.q_pe = self._randn(*rows, case.qk_rope_head_dim)
        # As in models: views of one weight.
        weight = self._randn(case.num_heads, nope + case.v_head_dim, rank) * rank**-0.5
        w_uk, w_uv = weight.split([nope, case.v_head_dim], dim=1)
        self.w_uk, self.w_uv = w_uk if case.with_uk else None, w_uv if case.with_uv else None
        self.rope = {}
        if case.rotary_dim:
            shape = max(case.seqlens_k, default=0) + 8, case.rotary_dim // 2
            angles = 6 * torch.rand(shape, generator=self.generator).to(DEVICE)
            tables = {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
            self.rope = tables | {"rope_interleaved": case.rope_interleaved}
        self._fill_cache()
        self.bits = None
        if case.tree:
            spare = () if case.seqlens_q is None else (2,)
            bits = [bits_of(case.tree, n, self.generator) for n in (*case.lengths_q, *spare)]
            self.bits = torch.cat([torch.empty(0, dtype=torch.int64), *bits]).view(rows[:-1]).to(DEVICE)

    def _randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.case.dtype)

    def _fill_cache(self):
        case = self.case
        seqlens = [len(case.own(n)) for n in case.seqlens_k]
        counts = [-(-n // case.page_size) for n in seqlens]
        num_pages = sum(counts) + 2
        pages = torch.randperm(num_pages, generator=self.generator).tolist()
        self.block_table = torch.full((len(counts), max(counts, default=0) + 2), DEAD_ENTRY, dtype=torch.int32)
        dtype, width = case.cache_dtype or case.dtype, case.kv_lora_rank + case.qk_rope_head_dim
        if case.is_fp8:
            dtype, width = latent_storage(case.kv_lora_rank, case.qk_rope_head_dim, torch.float8_e4m3fn)
        shape = (num_pages, 3, case.page_size, width + 16) if case.one_layer else (num_pages, case.page_size, width)
        memory = torch.full((math.prod(shape) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=DEVICE)
        memory = memory.view(dtype).view(shape)
        self.cache = memory[:, 1, :, 4 : 4 + width] if case.one_layer else memory
        self.tables, all_places = [], []
        for i, (n, count) in enumerate(zip(seqlens, counts)):
            parent, num_shared = (case.forks and case.forks[i]) or (i, 0)
            table = self.tables[parent][: min(num_shared, count)] if num_shared else []
            table += [pages.pop() for _ in range(count - len(table))]
            self.tables.append(table)
            own = torch.tensor(table, dtype=torch.long)
            self.block_table[i, :count] = own
            keys = torch.arange(n)
            slots = own[keys // case.page_size] * case.page_size + keys % case.page_size
            latents, k_pe = self._randn(n, case.kv_lora_rank), self._randn(n, case.qk_rope_head_dim)
            places = own[keys // case.page_size], keys % case.page_size
            if case.qk_rope_head_dim:
                with mock.patch.dict("os.environ", TRITON_ATTN_BACKEND="reference"):
                    append_latent_cache(latents, k_pe, self.cache, slots.to(DEVICE), **self.scales)
            elif dtype.itemsize == 1:
                latents = (latents.float() / (case.k_scale or 1.0)).to(dtype)
                self.cache.view(torch.uint8)[places] = latents.view(torch.uint8)
            else:
                self.cache[places] = latents / (case.k_scale or 1.0)
            all_places.append(places)
        # A fork has written its keys over those of the pages that it shares.
        self.rows = [
            self._read(self.cache.view(torch.uint8)[x].view(dtype) if dtype.itemsize == 1 else self.cache[x])
            for x in all_places
        ]
        self.block_table = self.block_table.to(DEVICE)

    def prefix_tree(self):
        """A PrefixTree with a node for every group of sequences that share pages; None in a call without one."""
        return None if self.case.part is None else tree_of(self.tables, self.case.lengths_q, DEVICE, self.case.part)

    def _read(self, stored):
        """Rows of the cache in fp64. Scales of fp32 are exact."""
        case = self.case
        rows = read_latent_cache(stored, case.kv_lora_rank, case.qk_rope_head_dim, torch.float64)
        k_scale = 1.0 if case.k_scale is None else case.k_scale
        factors = torch.tensor([k_scale, k_scale if case.k_pe_scale is None else case.k_pe_scale]).double()
        rows[:, : case.kv_lora_rank] *= factors[0].item()
        rows[:, case.kv_lora_rank :] *= factors[1].item()
        return rows

    @property
    def scales(self):
        """Options of both functions."""
        numbers = dict(k_scale=self.case.k_scale, k_pe_scale=self.case.k_pe_scale)
        given = {name: x for name, x in numbers.items() if x is not None}
        if self.case.scale_tensors:
            return {name: torch.tensor([x], device=DEVICE) for name, x in given.items()}
        return given

    @property
    def places(self):
        """Of each sequence in the queries: its row of a batch, its rows of packed tensors."""
        if self.case.seqlens_q is None:
            return range(len(self.rows))
        ends = torch.tensor(self.case.seqlens_q).cumsum(0).tolist()
        return [slice(end - n, end) for n, end in zip(self.case.seqlens_q, ends)]

    @property
    def softmax_scale(self):
        width = self.case.qk_nope_head_dim + self.case.qk_rope_head_dim
        return width**-0.5 if self.case.softmax_scale is None else self.case.softmax_scale

    def call(self, **options):
        case = self.case
        seqlens = torch.tensor(case.seqlens_k, dtype=torch.int32, device=DEVICE)
        options = {"return_lse": True, "num_splits": case.num_splits} | options
        if case.seqlens_q is not None:
            longest = max(case.seqlens_q) if case.max_seqlen_q is None else case.max_seqlen_q
            cu_seqlens_q = torch.tensor([0, *case.seqlens_q], device=DEVICE).cumsum(0, dtype=torch.int32)
            options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": longest}
        cache = self.cache
        if case.tree:
            options["tree_mask"] = self.bits
        if case.two_tensors:
            cache, rope_cache = (x.contiguous() for x in cache.split([case.kv_lora_rank, case.qk_rope_head_dim], -1))
            options["rope_cache"] = rope_cache
        return mla_decode(
            LAYOUTS[case.q_layout](self.q_nope),
            LAYOUTS[case.q_layout](self.q_pe),
            cache,
            seqlens,
            self.block_table,
            self.w_uk,
            self.w_uv,
            causal=case.causal,
            softmax_scale=case.softmax_scale,
            key_shard=case.key_shard,
            prefix_tree=self.prefix_tree(),
            **self.rope,
            **self.scales,
            **options,
        )

    def expected(self, dtype):
        """out and lse by the absorbed form, every step in dtype."""
        case = self.case
        weights = [x if x is None else x.to(dtype) for x in (self.w_uk, self.w_uv)]
        dim = case.kv_lora_rank if weights[1] is None else case.v_head_dim
        out = torch.zeros(*self.q_pe.shape[:-1], dim, dtype=dtype, device=DEVICE)
        lse = torch.full_like(out[..., 0], -math.inf).mT.contiguous()
        for own, seqlen, rows in zip(self.places, case.seqlens_k, self.rows):
            q_nope, q_pe, rows = self.q_nope[own].to(dtype), self.q_pe[own].to(dtype), rows.to(dtype)
            if self.rope:
                positions = (torch.arange(case.seqlen_q) + seqlen - case.seqlen_q).clamp(min=0)
                cos, sin = (self.rope[name][positions].to(dtype).unsqueeze(1) for name in ("rope_cos", "rope_sin"))
                q_pe = rotate(q_pe, cos, sin, case.rope_interleaved)
            if weights[0] is not None:
                q_nope = torch.einsum("ihn,hnc->ihc", q_nope, weights[0])
            q = torch.cat([q_nope, q_pe], dim=-1)
            k = rows.unsqueeze(1).expand(-1, case.num_heads, -1)
            places = dict(offset=seqlen - len(q), key_positions=case.own(seqlen).to(DEVICE))
            places |= dict(tree_mask=self.bits[own]) if case.tree else {}
            out_i, lse_i = (attend_tree if case.tree else attend)(
                q[None],
                k[None],
                k[None, :, :, : case.kv_lora_rank],
                causal=case.causal,
                softmax_scale=self.softmax_scale,
                compute_dtype=dtype,
                **places,
                **PLAIN,
            )
            if weights[1] is not None:
                out_i = torch.einsum("bihc,hvc->bihv", out_i.to(dtype), weights[1])
            out[own] = out_i[0]
            (lse[own] if case.seqlens_q is None else lse[:, own]).copy_(lse_i[0])
        return out, lse


@contextlib.contextmanager
def using(config):
    """The kernel runs with these tiles. On a GPU it uses its own, which fit."""
    if not INTERPRETED:
        yield
        return
    with (
        mock.patch.object(absorbed, "choose", return_value=config),
        mock.patch.object(gpu, "has_wgmma", return_value=True),  # with 8 warps, 64 rows use the form of sm_90
    ):
        forget_plans()
        yield
    forget_plans()


def check(case):
    """The call is right, writes each element once, and reads exactly the whole tiles of visible keys."""
    inputs = Inputs(case)
    with using(case.config), poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        out, lse = inputs.call()
    if not out.numel():
        return
    out64, lse64 = inputs.expected(torch.float64)
    torch_out, torch_lse = inputs.expected(case.dtype)
    eps = max(torch.finfo(case.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    # Weights sum to 1 and each is rounded once, and so are the queries of the scores: their effect, even if values
    # cancel.
    largest = max((rows.abs().max().item() for rows in inputs.rows if rows.numel()), default=0.0)
    if case.with_uv:
        largest *= inputs.w_uv.double().abs().sum(-1).max().item() / 2
    assert_close_to_reference(out, out64, torch_out=torch_out, floor=eps * largest)
    finite = lse64[lse64.isfinite()]
    scale = max(1.0, finite.abs().amax().item() if finite.numel() else 0.0)
    torch_error = (torch_lse.double() - lse64)[lse64.isfinite()].abs().max().item() if finite.numel() else 0.0
    assert_close_to_reference(lse, lse64, torch_error=torch_error, floor=eps * scale, name="lse")
    if INTERPRETED:
        row_bytes = inputs.cache.shape[2] * inputs.cache.element_size()
        assert cache_bytes(accesses) == keys_in_tiles(case, inputs.prefix_tree()) * row_bytes


def cache_bytes(accesses):
    """Bytes loaded from the cache, whose parts are separate arguments."""
    return sum(n for name, n in accesses.bytes_loaded.items() if name.startswith("cache."))


def keys_in_tiles(case, tree=None):
    """Keys in the visible tiles of each tile of rows, for all of these: of a prefix tree's nodes, and of sequences."""
    queries = [(i, j) for i, n in enumerate(case.lengths_q) for j in range(n)]
    first_pages, _, parts = ([0] * len(case.seqlens_k), [], []) if tree is None else read_tree(tree)
    total = sum(
        _keys_of_rows(case, [queries[q] for q in part.queries], part.first_page, part.end_page, in_node=True)
        for part in parts
    )
    for i, (seqlen_q, first_page) in enumerate(zip(case.lengths_q, first_pages)):
        if case.tree:
            first_page = min(first_page, _pages_before_drafts(case, i))
        total += _keys_of_rows(case, [(i, j) for j in range(seqlen_q)], first_page, MAX_ROWS)
    return total


def _pages_before_drafts(case, i):
    return len(case.own(case.seqlens_k[i] - case.lengths_q[i])) // case.page_size


def _keys_of_rows(case, queries, first_page, end_page, in_node=False):
    """Keys in the visible tiles of these columns for all heads of queries, (sequence, query), in tiles of rows."""
    total, lengths_q = 0, case.lengths_q
    rows = [query for query in queries for _ in range(case.num_heads)]
    for start in range(0, len(rows), case.config.block_m):
        tile = rows[start : start + case.config.block_m]
        end = max(len(case.own(case.seqlens_k[i])) for i, _ in tile)
        if case.causal and not case.tree:
            end = min(end, len(case.own(max(case.seqlens_k[i] - lengths_q[i] + j + 1 for i, j in tile))))
        if case.tree and in_node:
            end = max(_pages_before_drafts(case, i) for i, _ in tile) * case.page_size
        num_keys = max(0, min(end, end_page * case.page_size) - first_page * case.page_size)
        total += -(-num_keys // case.config.block_n) * case.config.block_n
    return total
