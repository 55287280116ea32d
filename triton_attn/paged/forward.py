"""Kernel of attention over a cache, paged or contiguous, and its launcher: decode, prefill chunks, mixed batches."""

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._host.checks import FLOAT8_MANTISSA_BITS, MAX_ROWS, check_rows
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import count_sms, gpu_of, repeats_chains
from .._host.key_shard import KeyShard, num_ranks_of
from .._host.layout import (
    INDICES,
    LSE,
    batch_head_strides,
    clear_outputs,
    tiles_each,
    vector_elements,
    without_dim,
)
from .._host.observers import number_and_tensor
from .._host.tuned import choose, remember
from .._host.workspace import only_counts
from .._jit.args import Scales, Scores, Splits, Strides, View, bits_of_rows, scale_of, window_of
from .._jit.blocks import Blocks, block_start, num_blocks, split_blocks, visible_range
from .._jit.drafts import (
    Drafts,
    bits_in_window,
    count_bits,
    load_bits,
    mask_scores_of_tree,
    scale_scores_of_tree,
    without_drafts,
)
from .._jit.heads import find_sequence, lse_offsets, packed_bounds, row_offsets, slots_left_over, spare_rows
from .._jit.masks import mask_scores, scale_scores
from .._jit.paging import cache_rows, decode_tile
from .._jit.shards import columns_before, mask_scores_of_rank, scale_scores_of_rank, visible_range_of_rank
from .._jit.softmax import LOG2_E, merge_weights, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import dot_add, dot_transposed, load_tile, merge_rows, scale_rows, store_tile, zeros_tile
from .._jit.workarounds import dot_in_ifs, fence_copies, in_vectors
from ..merge.kernel import launch_merge
from ..merge.splits import FIXED_KEYS, SplitWork, choose_num_splits, fixed_splits, resident_programs
from .configs import PROGRAM_RATE, PagedCase, PagedConfig, fixed_rows

WIDEST: tl.constexpr = tl.constexpr(256)  # columns of a piece: no default config spills
# Lengths, and values computed from them: a new length must not cause a compilation.
LENGTHS = [
    "seqlen_q",
    "capacity",
    "batch",
    "num_tiles",
    "num_splits",
    "search_steps",
    "shared_prefix_len",
    *INDICES,
    *LSE,
]


class Tile(NamedTuple):
    """What the kernel is compiled for: tiles of BLOCK_M rows and BLOCK_N keys, and their layout."""

    BLOCK_M: int
    BLOCK_N: int
    GROUP_SIZE: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    PAGE_SIZE: int  # 0: a contiguous cache
    ONE_PAGE: bool  # BLOCK_N keys lie in one page
    SHARED: (
        bool  # rows of all sequences over the keys of the shared prefix; otherwise of one sequence over its other keys
    )
    SHARDED: bool  # the cache has one rank's keys
    TREE: bool  # bits say which of the last keys a query sees
    SEARCH: bool  # the sequence of a program is found by bisection
    FOLD_SCALE: bool  # scores are scaled in the exponential
    SPLIT_KEYS: int  # splits have so many keys, from key 0 on; 0: the keys of a tile of rows have equal splits
    FOLD: bool  # one program computes all splits of its rows, in order
    MANTISSA_BITS: int  # of an fp8 cache, held as uint8; otherwise 0
    NATIVE_FLOAT8: bool  # the GPU converts fp8
    CUT_CHAIN: bool  # see `dot_in_if`; no registers are left for what LICM would hoist
    VECTOR: int  # divides the strides of q
    VECTOR_CACHE: int  # divides those of the caches
    INPUT_PRECISION: str


class Batch(NamedTuple):
    """The sequences: num_rows are the queries of each, or all rows of a packed batch. shared_prefix_len counts the keys
    in this cache, cache_seqlens and capacity those of all ranks.
    """

    cu_seqlens_q_ptr: object
    cache_seqlens_ptr: object
    num: object
    num_rows: object
    capacity: object  # longer lengths in cache_seqlens are clamped to it
    search_steps: object
    shared_prefix_len: object


class Queries(NamedTuple):
    """The queries that `tile` is a tile of: those of one sequence, or of all with a shared prefix."""

    sequence: object
    first: object  # row of a packed batch
    num: object
    tile: object


class Place(NamedTuple):
    """Position of each row of a tile in q, out and lse."""

    batch: object
    query: object
    head: object
    mask: object


class Rows(NamedTuple):
    """A tile of rows and the keys that it sees."""

    place: Place
    sequence: object  # of the tile, or of each row
    position: object  # of each row among the keys of its sequence, those of all ranks
    end_key: object  # of the tile, or of each row
    drafts: Drafts
    table_row: object  # the sequence whose pages are read
    blocks: Blocks


class Results(NamedTuple):
    """Outputs; log-sum-exps (split, batch, num_heads, num_rows), contiguous, or None; what addresses a row of them."""

    out: Splits
    lse_ptr: object
    split: object
    dense_batch: object
    num_heads: object
    num_rows: object


@triton.jit
def _queries_of_sequence(program, num_tiles, batch, TILE: tl.constexpr):
    """The Queries of a program: of the sequence that its tile belongs to."""
    if TILE.SEARCH:
        sequence = find_sequence(
            batch.cu_seqlens_q_ptr, batch.num, batch.search_steps, program, TILE.GROUP_SIZE, TILE.BLOCK_M, 1
        )
        tile = program
    else:
        tiles_each = num_tiles // batch.num
        sequence = program // tiles_each
        tile = program % tiles_each
    first = 0
    num = batch.num_rows
    if batch.cu_seqlens_q_ptr is not None:
        first, num = packed_bounds(batch.cu_seqlens_q_ptr, sequence, batch.num_rows)
    if TILE.SEARCH:
        tile -= first * TILE.GROUP_SIZE // TILE.BLOCK_M + sequence
    return Queries(sequence, first, num, tile)


@triton.jit
def _queries_of_all(program, batch):
    """The Queries of a program over the shared prefix: of all sequences."""
    if batch.cu_seqlens_q_ptr is None:
        return Queries(0, 0, batch.num * batch.num_rows, program)
    else:
        return Queries(0, 0, tl.minimum(tl.load(batch.cu_seqlens_q_ptr + batch.num), batch.num_rows), program)


@triton.jit
def _num_cached(seqlen_k, window, TILE: tl.constexpr):
    """How many of the first keys of a sequence are in the cache."""
    if TILE.SHARDED:
        return columns_before(seqlen_k, window)
    else:
        return seqlen_k


@triton.jit
def _load_bits(place, position, first_draft, num_drafts, tree, left, TILE: tl.constexpr):
    """The bits of rows in a window, and their positions, which follow from how many drafts a row sees without it."""
    if TILE.TREE:
        bits = load_bits(tree, place.batch, place.query, place.mask, num_drafts)
        position = first_draft + count_bits(bits) - 1
        if left is not None:
            bits = bits_in_window(bits, left)
        return bits, position
    else:
        return position, position  # bits are not read


@triton.jit
def _rows_of_sequence(queries, head_kv, batch, window, tree, TILE: tl.constexpr):
    """Rows of one sequence and its keys after the shared prefix."""
    seqlen_k = tl.minimum(tl.load(batch.cache_seqlens_ptr + queries.sequence), batch.capacity)
    first_position = seqlen_k - queries.num
    num_keys = _num_cached(seqlen_k, window, TILE)
    first_row = queries.tile * TILE.BLOCK_M
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    query = rows // TILE.GROUP_SIZE  # (BLOCK_M,)
    head = head_kv * TILE.GROUP_SIZE + rows % TILE.GROUP_SIZE
    batch_index = 0 if batch.cu_seqlens_q_ptr is not None else queries.sequence
    place = Place(batch_index, queries.first + query, head, rows < queries.num * TILE.GROUP_SIZE)
    start = first_row // TILE.GROUP_SIZE + first_position
    end = tl.minimum((first_row + TILE.BLOCK_M - 1) // TILE.GROUP_SIZE + 1, queries.num) + first_position
    bits, position = _load_bits(place, query + first_position, first_position, queries.num, tree, window.left, TILE)
    if TILE.TREE:
        start = tl.min(position, 0)
        end = tl.max(position, 0) + 1
    ALIGN: tl.constexpr = TILE.BLOCK_N if TILE.ONE_PAGE else 1
    if TILE.SHARDED:
        blocks = visible_range_of_rank(start, end, num_keys, window, TILE.BLOCK_N, ALIGN, batch.shared_prefix_len)
    else:
        blocks = visible_range(start, end, num_keys, window, TILE.BLOCK_N, ALIGN, batch.shared_prefix_len)
    if TILE.TREE:
        blocks = without_drafts(blocks, first_position, TILE.BLOCK_N)
    return Rows(place, queries.sequence, position, num_keys, Drafts(first_position, bits), queries.sequence, blocks)


@triton.jit
def _rows_of_prefix(queries, head_kv, batch, window, tree, TILE: tl.constexpr):
    """Rows of several sequences and the keys of the shared prefix."""
    rows = queries.tile * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    head = head_kv * TILE.GROUP_SIZE + rows % TILE.GROUP_SIZE
    # Rows past the last query repeat it.
    query = tl.minimum(rows // TILE.GROUP_SIZE, queries.num - 1)  # (BLOCK_M,)
    if batch.cu_seqlens_q_ptr is None:
        sequence = query // batch.num_rows
        first_query = sequence * batch.num_rows
        seqlen_q = batch.num_rows
    else:
        sequence = find_sequence(batch.cu_seqlens_q_ptr, batch.num, batch.search_steps, query, 1, 1, 0)
        first_query, seqlen_q = packed_bounds(batch.cu_seqlens_q_ptr, sequence, batch.num_rows)
    seqlen_k = tl.minimum(tl.load(batch.cache_seqlens_ptr + sequence), batch.capacity)
    mask = rows < queries.num * TILE.GROUP_SIZE
    if batch.cu_seqlens_q_ptr is None:
        place = Place(sequence, query - first_query, head, mask)
    else:
        place = Place(0, query, head, mask)
    first_draft = seqlen_k - seqlen_q
    bits, position = _load_bits(
        place, query - first_query + first_draft, first_draft, seqlen_q, tree, window.left, TILE
    )
    end_key = tl.minimum(_num_cached(seqlen_k, window, TILE), batch.shared_prefix_len)
    # Pages are those of the longest sequence of the tile, since a shorter one may end inside the prefix.
    longest = tl.max(end_key, 0)
    table_row = tl.max(tl.where(end_key == longest, sequence, 0), 0)
    ALIGN: tl.constexpr = TILE.BLOCK_N if TILE.ONE_PAGE else 1
    start, end = tl.min(position, 0), tl.max(position, 0) + 1
    if TILE.SHARDED:
        lo, full_lo, full_hi, hi = visible_range_of_rank(start, end, longest, window, TILE.BLOCK_N, ALIGN, 0)
    else:
        lo, full_lo, full_hi, hi = visible_range(start, end, longest, window, TILE.BLOCK_N, ALIGN)
    full_keys = tl.maximum(tl.minimum(full_hi, tl.min(end_key, 0)) - full_lo, 0)
    blocks = Blocks(lo, full_lo, full_lo + full_keys // TILE.BLOCK_N * TILE.BLOCK_N, hi)
    if TILE.TREE:
        blocks = without_drafts(blocks, tl.min(first_draft, 0), TILE.BLOCK_N)
    return Rows(place, sequence, position, end_key, Drafts(first_draft, bits), table_row, blocks)


@triton.jit
def _scale(s, scoring, rows, start_n, EXACT: tl.constexpr, DRAFTS: tl.constexpr, TILE: tl.constexpr):
    """Scores of Rows in log2 units, not yet masked. DRAFTS: some keys may be drafts of a tree."""
    scores, slopes = Scores(*scoring.scores), scoring.slopes
    if DRAFTS:
        return scale_scores_of_tree(s, scores, slopes, rows.position, rows.drafts, start_n, EXACT)
    elif TILE.SHARDED:
        return scale_scores_of_rank(s, scores, slopes, rows.position, start_n, EXACT)
    else:
        return scale_scores(s, scores, slopes, rows.position, start_n, 0, EXACT)


@triton.jit
def _mask(s, rows, start_n, window, TILE: tl.constexpr):
    """Scores of Rows, -inf where a row does not see a key."""
    if TILE.TREE:
        return mask_scores_of_tree(s, rows.position, rows.drafts, start_n, rows.end_key, window)
    elif TILE.SHARDED:
        return mask_scores_of_rank(s, rows.position, start_n, rows.end_key, window)
    else:
        return mask_scores(s, rows.position, start_n, rows.end_key, 0, window)


@triton.jit
def _load_cached(cache, cached, mask, dtype, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """A tile of keys or values in the dtype of q."""
    offsets = cached.outer * cache.strides.batch + cached.slot * cache.strides.row  # (BLOCK_N,)
    tile = load_tile(cache.ptr + offsets[:, None], mask, HEAD_DIM, WIDEST)
    if TILE.MANTISSA_BITS == 0:
        return tile
    else:
        return decode_tile(tile, TILE.MANTISSA_BITS, TILE.NATIVE_FLOAT8, dtype)


@triton.jit
def _store_rows(results, place, tile, lse, HEAD_DIM: tl.constexpr, is_read=True):
    """Store rows of out, unless no one reads them, and, if wanted, their log-sum-exps."""
    out = results.out
    offsets = tl.cast(results.split, tl.int64) * out.split_stride
    offsets += row_offsets(place.batch, place.query, place.head, out.view.strides)
    store_tile(out.view.ptr + offsets[:, None], place.mask & is_read, tile, HEAD_DIM)
    if results.lse_ptr is not None:
        batch = results.split * results.dense_batch + place.batch
        offsets = lse_offsets(batch, place.head, place.query, results.num_heads, results.num_rows)
        tl.store(results.lse_ptr + offsets, lse, mask=place.mask)


@triton.jit
def _clear_spare_rows(results, batch, queries, program, head_kv, TILE: tl.constexpr):
    """Store out = 0 and lse = -inf in those rows after the last sequence that are the program's (`spare_rows`)."""
    num_own = queries.num * TILE.GROUP_SIZE - queries.tile * TILE.BLOCK_M
    left_over = slots_left_over(program, queries.first + queries.num, TILE.BLOCK_M, TILE.GROUP_SIZE)
    spare = spare_rows(
        batch.cu_seqlens_q_ptr, batch.num, batch.num_rows, left_over, num_own, TILE.BLOCK_M, TILE.GROUP_SIZE
    )
    if spare.any:
        head = head_kv * TILE.GROUP_SIZE + spare.rows % TILE.GROUP_SIZE
        place = Place(0, spare.rows // TILE.GROUP_SIZE, head, spare.mask)
        lse = tl.full([TILE.BLOCK_M], float("-inf"), tl.float32)
        _store_rows(results, place, zeros_tile(TILE.BLOCK_M, TILE.HEAD_DIM_V, WIDEST), lse, TILE.HEAD_DIM_V)


@triton.jit(do_not_specialize=LENGTHS)
def _paged_fwd_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    table_stride,
    cu_seqlens_q_ptr,
    tree,
    sinks_ptr,
    scales,
    scores,
    seqlen_q,
    capacity,
    batch,
    num_tiles,
    search_steps,
    shared_prefix_len,
    num_heads_kv,
    num_splits,
    out_factor,
    TILE: tl.constexpr,
):
    """One program computes a tile of rows of out and lse for one KV head, over one split of the keys.

    A row is one query head of one query. The rows of a tile share a KV head, so that its keys and values are loaded
    once for the group. Grid: num_tiles * num_splits * num_heads_kv. num_tiles counts the tiles of all sequences. In a
    packed batch it is an upper bound, and a program finds its sequence by bisection unless each sequence has one tile.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    # Triton 3.6 loses the constants of a nested tuple at the next `if` unless it is rebuilt.
    scales = Scales(*scales)
    scores = Scores(*scores)
    program = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    head_kv = tl.program_id(0) // num_tiles // num_splits
    q = in_vectors(q, TILE.VECTOR)
    k = in_vectors(k, TILE.VECTOR_CACHE)
    v = in_vectors(v, TILE.VECTOR_CACHE)
    dense_batch = batch if cu_seqlens_q_ptr is None else 1
    results = Results(out, lse_ptr, split, dense_batch, num_heads_kv * TILE.GROUP_SIZE, seqlen_q)
    sequences = Batch(cu_seqlens_q_ptr, cache_seqlens_ptr, batch, seqlen_q, capacity, search_steps, shared_prefix_len)

    if TILE.SHARED:
        queries = _queries_of_all(program, sequences)
    else:
        queries = _queries_of_sequence(program, num_tiles, sequences, TILE)
    num_own = queries.num * TILE.GROUP_SIZE - queries.tile * BLOCK_M
    if cu_seqlens_q_ptr is not None and num_own < BLOCK_M:
        _clear_spare_rows(results, sequences, queries, program, head_kv, TILE)
    if num_own <= 0:
        return
    if TILE.SHARED:
        rows = _rows_of_prefix(queries, head_kv, sequences, scores.window, tree, TILE)
    else:
        rows = _rows_of_sequence(queries, head_kv, sequences, scores.window, tree, TILE)
    blocks = split_blocks(rows.blocks, split, num_splits, BLOCK_N, TILE.SPLIT_KEYS)
    # Most fixed splits of a short sequence have no keys, and no one reads their output.
    is_read = True if TILE.SPLIT_KEYS == 0 else (split == 0) | (blocks.lo < blocks.hi)

    place = rows.place
    q_rows = row_offsets(place.batch, place.query, place.head, q.strides)
    q_tile = load_tile(q.ptr + q_rows[:, None], place.mask, TILE.HEAD_DIM, WIDEST)  # (BLOCK_M, HEAD_DIM)
    k = View(k.ptr + tl.cast(head_kv, tl.int64) * k.strides.head, k.strides)
    v = View(v.ptr + tl.cast(head_kv, tl.int64) * v.strides.head, v.strides)
    if block_table_ptr is not None:
        block_table_ptr += tl.cast(rows.table_row, tl.int64) * table_stride
    if scales.k is not None:
        scale_log2 = scores.scale_log2 * tl.load(scales.k.value + head_kv * scales.k.head_stride)
        scores = Scores(scale_log2, scores.softcap, scores.alibi, scores.window)
    slopes = None
    if scores.alibi is not None:
        slopes = _load_slopes(scores.alibi, rows)
    if scales.v is not None:
        out_factor *= tl.load(scales.v.value + head_kv * scales.v.head_stride)
    keys = Keys(k, v, block_table_ptr, sinks_ptr)
    scoring = Scoring(scores, slopes, out_factor)
    if TILE.FOLD:
        out_tile = zeros_tile(BLOCK_M, TILE.HEAD_DIM_V, WIDEST)
        lse = tl.full([BLOCK_M], float("-inf"), tl.float32)
        first = rows.blocks.lo // TILE.SPLIT_KEYS
        before = 0 if sinks_ptr is None else (first > 0).to(tl.int32)  # the first split has the sinks
        for i in range(0, before + tl.cdiv(rows.blocks.hi, TILE.SPLIT_KEYS) - first):
            split = tl.where(i < before, 0, first + i - before)
            blocks = split_blocks(rows.blocks, split, num_splits, BLOCK_N, TILE.SPLIT_KEYS)
            tile, lse_here = _attend(q_tile, keys, rows, blocks, scoring, split == 0, TILE)
            kept, added, lse = merge_weights(lse, lse_here)
            out_tile = merge_rows(out_tile, kept, tile, added)
        _store_rows(results, place, out_tile, lse, TILE.HEAD_DIM_V)
    else:
        has_sinks = (split == 0) & (TILE.SHARED | (shared_prefix_len == 0))
        tile, lse = _attend(q_tile, keys, rows, blocks, scoring, has_sinks, TILE)
        _store_rows(results, place, tile, lse, TILE.HEAD_DIM_V, is_read)


class Keys(NamedTuple):
    """Keys and values of a head, and what finds them."""

    k: object
    v: object
    table_ptr: object
    sinks_ptr: object


class Scoring(NamedTuple):
    """Scores, the ALiBi slopes of the rows or None, and a factor of the output."""

    scores: object
    slopes: object
    out_factor: object


@triton.jit
def _attend(q_tile, keys, rows, blocks, scoring, has_sinks, TILE: tl.constexpr):
    """(tile of out, lse) of the rows over the keys of blocks; with has_sinks the sinks are among them."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    INPUT_PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    scores = Scores(*scoring.scores)
    m_i, l_i = softmax_init(keys.sinks_ptr, rows.place.head, BLOCK_M)  # (BLOCK_M,)
    if keys.sinks_ptr is not None:
        m_i = tl.where(has_sinks, m_i, float("-inf"))
        l_i = tl.where(has_sinks, l_i, 0.0)
    acc = zeros_tile(BLOCK_M, TILE.HEAD_DIM_V, WIDEST)
    # With fixed splits one loop body, which masks, takes all tiles in order: which are full depends on other rows.
    for FULL in tl.static_range(1 if TILE.SPLIT_KEYS > 0 else 2):
        for i in tl.range(0, num_blocks(blocks, FULL, BLOCK_N), disable_licm=TILE.CUT_CHAIN):
            start_n = block_start(blocks, i, FULL, BLOCK_N)
            keys_mask = None
            if not FULL:
                keys_mask = start_n + tl.arange(0, BLOCK_N) < blocks.hi
                if TILE.SPLIT_KEYS > 0 and not TILE.ONE_PAGE:  # pages before the window may be gone
                    keys_mask &= start_n + tl.arange(0, BLOCK_N) >= rows.blocks.lo
            cached = cache_rows(keys.table_ptr, rows.table_row, start_n, keys_mask, TILE)
            # (BLOCK_N, HEAD_DIM)
            k_tile = _load_cached(keys.k, cached, keys_mask, q_tile[0].dtype, TILE.HEAD_DIM, TILE)
            if BLOCK_M >= 64:
                fence_copies()
            if TILE.CUT_CHAIN:
                s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                s = dot_in_ifs(q_tile, k_tile, s, start_n, blocks, INPUT_PRECISION)
            else:
                s = dot_transposed(q_tile, k_tile, INPUT_PRECISION)  # (BLOCK_M, BLOCK_N)
            if not TILE.FOLD_SCALE:
                s = _scale(s, scoring, rows, start_n, q_tile[0].dtype == tl.float32, TILE.TREE and not FULL, TILE)
            if not FULL:
                s = _mask(s, rows, start_n, scores.window, TILE)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scores.scale_log2 if TILE.FOLD_SCALE else 1.0, not FULL)
            v_tile = _load_cached(keys.v, cached, keys_mask, q_tile[0].dtype, TILE.HEAD_DIM_V, TILE)
            if BLOCK_M >= 64:
                fence_copies()
            acc = dot_add(p.to(v_tile[0].dtype), v_tile, scale_rows(acc, alpha), INPUT_PRECISION)
    norm, lse = softmax_finish(m_i, l_i, TILE.FOLD)
    return scale_rows(acc, norm * scoring.out_factor), lse


@triton.jit
def _load_slopes(alibi, rows):
    """ALiBi slopes of the rows, (BLOCK_M, 1)."""
    offsets = tl.cast(rows.sequence, tl.int64) * alibi.strides.batch
    return tl.load(alibi.ptr + (offsets + rows.place.head.to(tl.int64) * alibi.strides.head))[:, None]


class Problem(NamedTuple):
    """Everything of a call that the plan of its launches depends on; plans are cached by it."""

    layout: tuple  # (shape, strides) of q, k_cache and v_cache
    strides_out: tuple
    dtype: torch.dtype
    cache_dtype: torch.dtype
    batch: int
    max_seqlen_q: int
    table_width: int | None  # None: a contiguous cache
    num_splits: int
    batch_invariant: bool
    shared_prefix_len: int
    softmax_scale: float
    window: tuple
    softcap: float | None
    has_alibi: bool
    has_tree: bool
    key_shard: KeyShard | None
    bases_aligned: bool  # k_cache and v_cache start at multiples of 16 bytes
    arch: str
    precision: str  # of fp32 matmuls
    num_sms: int
    config: PagedConfig | None

    @property
    def fold_scale(self):
        """Whether the exponential can apply the scale, since nothing comes between."""
        return self.softcap is None and not self.has_alibi

    @property
    def capacity(self):
        """Keys of the longest sequence that the cache can hold."""
        slots = self.layout[1][0][1]
        return min(slots if self.table_width is None else slots * self.table_width, MAX_ROWS)

    @property
    def capacity_of_all(self):
        """The same of the caches of all ranks."""
        return min(self.capacity * num_ranks_of(self.key_shard), MAX_ROWS)


class Pass(NamedTuple):
    """A launch over the shared prefix, or over the other keys."""

    num_programs: int
    num_tiles: int
    num_splits: int
    constants: dict


class Plan(NamedTuple):
    """The launches of a call but for its tensors and the scales of its cache."""

    passes: tuple  # none where there is nothing to compute
    num_splits: int  # of all passes
    strides: tuple  # Strides of q, k_cache, v_cache, and of out or a split of it
    capacity: int  # of all ranks
    shared_prefix_len: int  # of the keys in this cache
    scores: Scores  # without ALiBi


def launch_paged_fwd(call, out, lse, config=None):
    """Launch the kernels of a PagedCall: attention over the shared prefix if there is one, over the rest, and the merge
    if there is more than one split. No device-to-host sync.

    out is (batch, seqlen_q, num_heads_q, head_dim_v), or (total_q, num_heads_q, head_dim_v) with cu_seqlens_q; lse as
    `flash_attention` returns it, or None: not wanted. config is a PagedConfig (None: the default).
    """
    q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, *_ = call
    plan = _plan(_problem_of(call, out, config))
    outs, lses, split_stride = out, lse, 0
    if plan.num_splits > 1:
        outs, lses = _new_splits(plan.num_splits, out, call.workspace)
        split_stride = outs.stride(0)
    if call.workspace is not None and only_counts(call.workspace):
        return
    if not plan.passes:
        clear_outputs(out, lse)
        return
    if k_cache.dtype in FLOAT8_MANTISSA_BITS:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    strides_q, strides_k, strides_v, strides_out = plan.strides
    operands = View(q, strides_q), View(k_cache, strides_k), View(v_cache, strides_v)
    scales, scores, out_factor = _scales_and_scores(call, plan)
    (*_, num_rows, _, _), (batch, *_) = call.layout[0][0], cache_seqlens.shape
    num_heads_kv = call.layout[1][0][2]
    table_stride = None if block_table is None else block_table.stride(0)
    tree = None if call.options.tree_mask is None else bits_of_rows(call.options.tree_mask)
    first = 0  # split
    for num_programs, num_tiles, num_splits, constants in plan.passes:
        args = (
            *operands,
            Splits(View(outs[first:] if first else outs, strides_out), split_stride),
            lses[first:] if first else lses,
            cache_seqlens,
            block_table,
            table_stride,
            cu_seqlens_q,
            tree,
            call.options.sinks,
            scales,
            scores,
            num_rows,
            plan.capacity,
            batch,
            num_tiles,
            batch.bit_length(),
            plan.shared_prefix_len,
            num_heads_kv,
            num_splits,
            out_factor,
        )
        launch_packed(_paged_fwd_kernel, (num_programs,), q.device, args, constants)
        first += num_splits
    if plan.num_splits > 1:
        if out.ndim == 3:
            outs, lses, out, lse = outs[:, None], lses[:, None], out[None], None if lse is None else lse[None]
        launch_merge(outs, lses, out, lse, call.batch_invariant)


def _new_splits(num_splits, out, workspace):
    """Room for the splits' outputs and log-sum-exps."""
    *batch, rows, heads, _ = out.shape
    empty = out.new_empty if workspace is None else partial(workspace.take, out)
    outs = empty((num_splits, *out.shape), dtype=torch.float32)
    return outs, empty((num_splits, *batch, heads, rows), dtype=torch.float32)


def _scales_and_scores(call, plan):
    """Scales, Scores and a factor of out. A scale that is a number multiplies softmax_scale or out."""
    scores, k_scale, v_scale, alibi = plan.scores, call.k_scale, call.v_scale, call.options.alibi_slopes
    if alibi is not None:
        batch_stride, head_stride = batch_head_strides(alibi)
        scores = scores._replace(alibi=View(alibi, Strides(batch_stride, 0, head_stride)))
    if k_scale is None and v_scale is None:
        return NO_SCALES, scores, 1.0
    (k_number, k_tensor), (v_number, v_tensor) = number_and_tensor(k_scale), number_and_tensor(v_scale)
    if k_number is not None:
        scores = scores._replace(scale_log2=scores.scale_log2 * k_number)
    return Scales(scale_of(k_tensor), scale_of(v_tensor)), scores, 1.0 if v_number is None else v_number


NO_SCALES = Scales(None, None)


def _problem_of(call, out, config):
    q, k_cache, v_cache, cache_seqlens, block_table, _, max_seqlen_q, options, layout, *_ = call
    prefix = call.shared_prefix_len
    softmax_scale, window, softcap, alibi_slopes, *_ = options
    dtype, arch = q.dtype, arch_of(q)
    # By position: keywords take twice as long.
    return Problem(
        layout,
        out.stride(),
        dtype,
        k_cache.dtype,
        cache_seqlens.shape[0],
        max_seqlen_q,
        None if block_table is None else block_table.shape[1],
        call.num_splits,
        call.batch_invariant,
        prefix if call.key_shard is None else call.key_shard.num_keys(prefix),
        softmax_scale,
        window,
        softcap,
        alibi_slopes is not None,
        options.tree_mask is not None,
        call.key_shard,
        (k_cache.data_ptr() | v_cache.data_ptr()) % 16 == 0,
        arch,
        input_precision(dtype, arch),
        count_sms(q.device, arch),
        config,
    )


@remember
def _plan(problem):
    """The Plan of a call."""
    (shape_q, _), _, (shape_v, _) = problem.layout
    window = window_of(problem.window, problem.key_shard)
    scores = Scores(problem.softmax_scale * LOG2_E.value, problem.softcap, None, window)
    passes = ()
    if math.prod(shape_q[:-1]) > 0 and problem.max_seqlen_q > 0 and problem.batch > 0:
        check_rows("q", math.prod(shape_q[:-1]) // shape_v[2])
        prefixes = (True, False) if problem.shared_prefix_len else (False,)
        passes = tuple(_plan_pass(problem, shared) for shared in prefixes)
    num_splits = sum(one.num_splits for one in passes)
    strides_out = problem.strides_out
    if num_splits > 1:  # splits are contiguous
        rows, heads, dim = *shape_q[-3:-1], shape_v[-1]
        strides_out = (rows * heads * dim, heads * dim, dim, 1)[-len(shape_q) :]
    strides = *(one for _, one in problem.layout), strides_out
    strides = tuple(Strides(*without_dim(one)) for one in strides)
    return Plan(passes, num_splits, strides, problem.capacity_of_all, problem.shared_prefix_len, scores)


def _plan_pass(problem, shared):
    (shape_q, strides_q), (_, strides_k), (shape_v, strides_v) = problem.layout
    *_, num_heads_q, head_dim = shape_q
    _, slots, num_heads_kv, head_dim_v = shape_v
    group_size = num_heads_q // num_heads_kv
    num_rows = math.prod(shape_q[:-2]) * group_size  # of a KV head
    longest = num_rows if shared else problem.max_seqlen_q * group_size
    is_paged = problem.table_width is not None
    vector_cache = 1
    if problem.bases_aligned:
        vector_cache = vector_elements(problem.cache_dtype.itemsize, strides_k, strides_v)
    case = PagedCase(
        arch=problem.arch,
        dtype=problem.dtype,
        cache_dtype=problem.cache_dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        rows=fixed_rows(max(head_dim, head_dim_v)) if problem.batch_invariant else longest,
        loads_vectors=vector_cache > 1,
        is_plain=problem.fold_scale and is_paged,
        seqlen_k=1 if problem.batch_invariant else problem.capacity,
        page_size=slots,
    )
    config = problem.config or choose(PagedConfig, case)
    search = len(shape_q) == 3 and not shared and longest > config.block_m
    if search:
        num_tiles = num_rows // config.block_m + problem.batch
    else:
        num_sequences = 1 if shared else problem.batch
        num_tiles = tiles_each(longest, num_rows, num_sequences, config.block_m) * num_sequences
    first_key = 0 if shared else problem.shared_prefix_len
    num_keys = problem.shared_prefix_len if shared else max(problem.capacity - first_key, 0)
    num_splits, in_turn = problem.num_splits, False
    if num_splits == 0:
        work = _work_of(problem, case, config, num_tiles * num_heads_kv, num_keys)
        if problem.batch_invariant:
            num_splits, in_turn = fixed_splits(work, num_keys)
        else:
            num_splits = choose_num_splits(work)
    if in_turn:
        num_splits = 1
    mantissa_bits = FLOAT8_MANTISSA_BITS.get(problem.cache_dtype, 0)
    tile = Tile(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        PAGE_SIZE=slots if is_paged else 0,
        ONE_PAGE=is_paged and slots % config.block_n == 0 and first_key % config.block_n == 0,
        SHARED=shared,
        SHARDED=problem.key_shard is not None,
        TREE=problem.has_tree,
        SEARCH=search,
        FOLD_SCALE=problem.fold_scale,
        SPLIT_KEYS=FIXED_KEYS if problem.batch_invariant else 0,
        FOLD=in_turn,
        MANTISSA_BITS=mantissa_bits,
        NATIVE_FLOAT8=mantissa_bits in gpu_of(problem.arch).native_fp8,
        CUT_CHAIN=repeats_chains(problem.arch, config.block_m, config.num_warps),
        VECTOR=vector_elements(problem.dtype.itemsize, strides_q),
        VECTOR_CACHE=vector_cache,
        INPUT_PRECISION=problem.precision,
    )
    constants = dict(TILE=tile, num_warps=config.num_warps, num_stages=config.num_stages)
    return Pass(num_tiles * num_splits * num_heads_kv, num_tiles, num_splits, constants)


def _work_of(problem, case, config, num_programs, num_keys):
    """The SplitWork of a pass over num_keys keys, of which a window shows the last."""
    left = problem.window[0]
    if left is not None:
        num_keys = min(num_keys, left + 1 + problem.max_seqlen_q)
    dims = case.head_dim + case.head_dim_v
    (shape_q, _), *_ = problem.layout
    return SplitWork(
        num_programs,
        num_key_tiles=-(-num_keys // config.block_n),
        tile_elements=config.block_n * dims,
        element_size=problem.cache_dtype.itemsize,
        program_rate=PROGRAM_RATE,
        tile_flops=2 * config.block_m * config.block_n * dims,
        num_rows=math.prod(shape_q[:-1]),
        row_elements=case.head_dim_v,
        num_sms=problem.num_sms,
        resident=resident_programs(config.shared_bytes(case), config, case.gpu),
        has_merge=problem.shared_prefix_len > 0,
    )
