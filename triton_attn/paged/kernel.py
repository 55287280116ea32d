"""Kernel of attention over a cache, paged or contiguous."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._host.layout import INDICES
from .._jit.args import Scales, Scores, Splits
from .._jit.blocks import Blocks, block_start, end_full, num_blocks, split_blocks, visible_range
from .._jit.decode import decode_pieces
from .._jit.drafts import (
    Drafts,
    TreeMask,
    bits_in_window,
    count_bits,
    keys_before_drafts,
    load_bits,
    mask_scores_of_rows,
    scale_scores_of_tree,
    without_drafts,
)
from .._jit.heads import (
    Batch,
    find_node,
    find_sequence,
    longest_of,
    lse_offsets,
    packed_bounds,
    row_offsets,
    rows_of_node,
    sequence_of_first,
    slots_left_over,
    spare_rows,
)
from .._jit.masks import scale_scores
from .._jit.paging import cache_rows, load_token_scales
from .._jit.shards import num_cached, scale_scores_of_rank, visible_range_of_rank
from .._jit.softmax import merge_weights, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import dot_add, dot_transposed, load_tile, merge_rows, scale_rows, store_tile, zeros_tile
from .._jit.workarounds import computed_again, dot_in_ifs, fence_copies, in_vectors, of_head

# Lengths, and values computed from them: a new length must not cause a compilation.
LENGTHS = [
    "seqlen_q",
    "capacity",
    "batch",
    "num_tiles",
    "num_splits",
    "search_steps",
    "num_nodes",
    "num_slots",
    "tree_mask_ptr",
    "tree_mask_stride",
    *INDICES,
    "lse_ptr",
]


class Tile(NamedTuple):
    """What the kernel is compiled for: tiles of BLOCK_M rows and BLOCK_N keys, and their layout."""

    BLOCK_M: int
    BLOCK_N: int
    GROUP_SIZE: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    WIDEST: int  # columns of a piece
    PAGE_SIZE: int  # 0: a contiguous cache
    PACK: int  # elements of a key that lie side by side in a packed cache; 0: all of them, in a usual one
    ONE_PAGE: bool  # BLOCK_N keys lie in one page
    ALIGN: int  # divides the first key of a tile
    SHARED: bool  # rows of the sequences below a node of a prefix tree, over its keys; otherwise of one sequence
    SHARDED: bool  # the cache has one rank's keys
    TREE: bool  # bits say which of the last keys a query sees; nodes have none of these keys
    SEARCH: bool  # the sequence of a program is found by bisection
    FOLD_SCALE: bool  # scores are scaled in the exponential
    SPLIT_KEYS: int  # splits have so many keys, from key 0 on; 0: the keys of a tile of rows have equal splits
    FOLD: bool  # one program computes all splits of its rows, in order
    MANTISSA_BITS: int  # of an fp8 cache, held as uint8, or int8; otherwise 0
    V_UNIT: int  # see `_unit_of`
    NATIVE_FLOAT8: bool  # the GPU converts fp8
    CUT_CHAIN: bool  # see `dot_in_if`; no registers are left for what LICM would hoist
    VECTOR: int  # divides the strides of q
    VECTOR_CACHE: int  # divides those of the caches
    INPUT_PRECISION: str


class Queries(NamedTuple):
    """The queries of the sequence that `tile` is a tile of."""

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
def _place_in_sequence(tile, queries, head_kv, batch, TILE: tl.constexpr):
    """The Place of a tile's rows, of one sequence."""
    rows = tile * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    batch_index = 0 if batch.cu_seqlens_q_ptr is not None else queries.sequence
    head = head_kv * TILE.GROUP_SIZE + rows % TILE.GROUP_SIZE
    return Place(batch_index, queries.first + rows // TILE.GROUP_SIZE, head, rows < queries.num * TILE.GROUP_SIZE)


@triton.jit
def _load_bits(place, position, first_draft, num_drafts, tree_mask, left, TILE: tl.constexpr):
    """The bits of rows in a window, and their positions, which follow from how many drafts a row sees without it."""
    if TILE.TREE:
        bits = load_bits(tree_mask, place.batch, place.query, place.mask, num_drafts)
        position = first_draft + count_bits(bits) - 1
        if left is not None:
            bits = bits_in_window(bits, left)
        return bits, position
    else:
        return position, position  # bits are not read


@triton.jit
def _rows_of_sequence(queries, head_kv, batch, window, tree_mask, TILE: tl.constexpr):
    """Rows of one sequence and its keys, with a prefix tree those that no node has."""
    seqlen_k = tl.minimum(tl.load(batch.cache_seqlens_ptr + queries.sequence), batch.capacity)
    first_position = seqlen_k - queries.num
    num_keys = num_cached(seqlen_k, window, TILE.SHARDED)
    first_row = queries.tile * TILE.BLOCK_M
    query = (first_row + tl.arange(0, TILE.BLOCK_M)) // TILE.GROUP_SIZE  # (BLOCK_M,)
    place = _place_in_sequence(queries.tile, queries, head_kv, batch, TILE)
    start = first_row // TILE.GROUP_SIZE + first_position
    end = tl.minimum((first_row + TILE.BLOCK_M - 1) // TILE.GROUP_SIZE + 1, queries.num) + first_position
    bits, position = _load_bits(
        place, query + first_position, first_position, queries.num, tree_mask, window.left, TILE
    )
    if TILE.TREE:
        start = tl.min(position, 0)
        end = tl.max(position, 0) + 1
    first_key = 0
    if batch.tree_ptr is not None:
        first_key = tl.load(batch.tree_ptr + 2 * queries.sequence) * TILE.PAGE_SIZE
        if TILE.TREE:
            first_key = tl.minimum(first_key, keys_before_drafts(first_position, window, TILE))
    if TILE.SHARDED:
        blocks = visible_range_of_rank(start, end, num_keys, window, TILE.BLOCK_N, TILE.ALIGN, first_key)
    else:
        blocks = visible_range(start, end, num_keys, window, TILE.BLOCK_N, TILE.ALIGN, first_key)
    if TILE.TREE:
        blocks = without_drafts(blocks, first_position, window, TILE)
    return Rows(place, queries.sequence, position, num_keys, Drafts(first_position, bits), queries.sequence, blocks)


@triton.jit
def _rows_of_node(node, head_kv, batch, window, tree_mask, TILE: tl.constexpr):
    """Rows of the sequences below a node, and its keys."""
    rows = rows_of_node(node, batch, TILE.GROUP_SIZE, TILE.BLOCK_M)
    head = head_kv * TILE.GROUP_SIZE + (node.tile * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)) % TILE.GROUP_SIZE
    end_key = tl.minimum(num_cached(rows.seqlen_k, window, TILE.SHARDED), node.end_page * TILE.PAGE_SIZE)
    position = rows.position
    if tree_mask.ptr is not None:
        first_draft = rows.seqlen_k - rows.seqlen_q
        end_key = tl.minimum(end_key, keys_before_drafts(first_draft, window, TILE))
        position = first_draft + count_bits(load_bits(tree_mask, rows.batch, rows.query, rows.mask, rows.seqlen_q)) - 1
    first_key = node.first_page * TILE.PAGE_SIZE
    # Pages are those of the longest sequence of the tile, since a shorter one may end on a shared page.
    longest, table_row = longest_of(end_key, rows.sequence)
    if window.left is not None:
        table_row = sequence_of_first(position, rows.sequence)
    start, end = tl.min(position, 0), tl.max(position, 0) + 1
    if TILE.SHARDED:
        blocks = visible_range_of_rank(start, end, longest, window, TILE.BLOCK_N, TILE.ALIGN, first_key)
    else:
        blocks = visible_range(start, end, longest, window, TILE.BLOCK_N, TILE.ALIGN, first_key)
    place = Place(rows.batch, rows.query, head, rows.mask)
    blocks = end_full(blocks, end_key, TILE.BLOCK_N)
    no_drafts = Drafts(0, position)  # not read
    return Rows(place, rows.sequence, position, end_key, no_drafts, table_row, blocks)


@triton.jit
def _scale(s, scoring, rows, start_n, EXACT: tl.constexpr, DRAFTS: tl.constexpr, TILE: tl.constexpr):
    """Scores of Rows in log2 units, not yet masked. DRAFTS: some keys may be drafts of a tree."""
    scores, slopes = Scores(*scoring.scores), scoring.slopes
    if DRAFTS:
        return scale_scores_of_tree(s, scores, slopes, rows, start_n, EXACT, TILE)
    elif TILE.SHARDED:
        return scale_scores_of_rank(s, scores, slopes, rows.position, start_n, EXACT)
    else:
        return scale_scores(s, scores, slopes, rows.position, start_n, 0, EXACT)


@triton.jit
def _load_cached(cache, cached, mask, dtype, HEAD_DIM: tl.constexpr, PACK: tl.constexpr, TILE: tl.constexpr):
    """A tile of keys or values in the dtype of q. PACK: elements that lie side by side, as in `Tile`."""
    slot_stride = PACK if PACK > 0 else cache.strides.row
    PACK_STRIDE: tl.constexpr = TILE.PAGE_SIZE * PACK
    offsets = cached.outer * cache.strides.batch + cached.slot * slot_stride  # (BLOCK_N,)
    tile = load_tile(cache.ptr + offsets[:, None], mask, HEAD_DIM, TILE.WIDEST, PACK, PACK_STRIDE)
    if TILE.MANTISSA_BITS == 0:
        return tile
    else:
        return decode_pieces(tile, TILE.MANTISSA_BITS, TILE.NATIVE_FLOAT8, dtype)


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
def _clear_lses(results, place, first_split, end_split):
    """Store lse = -inf for splits that rows do not have, with a tree for nodes that are not above them."""
    for split in range(first_split, end_split):
        batch = split * results.dense_batch + place.batch
        offsets = lse_offsets(batch, place.head, place.query, results.num_heads, results.num_rows)
        tl.store(results.lse_ptr + offsets, float("-inf"), mask=place.mask)


@triton.jit
def _clear_spare_rows(results, batch, queries, program, head_kv, num_slots, TILE: tl.constexpr):
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
        _store_rows(results, place, zeros_tile(TILE.BLOCK_M, TILE.HEAD_DIM_V, TILE.WIDEST), lse, TILE.HEAD_DIM_V)
        if batch.tree_ptr is not None:
            _clear_lses(results, place, 0, num_slots)


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
    tree_mask_ptr,
    tree_mask_stride,
    sinks_ptr,
    scales,
    scores,
    seqlen_q,
    capacity,
    batch,
    num_tiles,
    search_steps,
    tree_ptr,
    num_nodes,
    num_slots,
    num_heads_kv,
    num_splits,
    out_factor,
    TILE: tl.constexpr,
):
    """One program computes a tile of rows of out and lse for one KV head, over one split of the keys.

    A row is one query head of one query. The rows of a tile share a KV head, so that its keys and values are loaded
    once for the group. Grid: num_tiles * num_splits * num_heads_kv. num_tiles counts the tiles of all sequences. In a
    packed batch it is an upper bound, and a program finds its sequence by bisection unless each sequence has one tile.
    With a tree it is that of all nodes, if SHARED, and results of nodes are in the first num_slots splits.
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
    sequences = Batch(cu_seqlens_q_ptr, cache_seqlens_ptr, batch, seqlen_q, capacity, search_steps, tree_ptr, num_nodes)
    place_of_result = split
    tree_mask = TreeMask(tree_mask_ptr, tree_mask_stride)
    if TILE.SHARED:
        node = find_node(sequences, program, TILE.GROUP_SIZE, BLOCK_M)
        if node.tile * BLOCK_M >= node.num * TILE.GROUP_SIZE:
            return
        rows = _rows_of_node(node, head_kv, sequences, scores.window, tree_mask, TILE)
        place_of_result = node.slot
    elif tree_ptr is not None:
        place_of_result = num_slots + split
    results = Results(out, lse_ptr, place_of_result, dense_batch, num_heads_kv * TILE.GROUP_SIZE, seqlen_q)
    if not TILE.SHARED:
        queries = _queries_of_sequence(program, num_tiles, sequences, TILE)
        num_own = queries.num * TILE.GROUP_SIZE - queries.tile * BLOCK_M
        num_cleared = tl.where(split == 0, num_slots, 0)
        if cu_seqlens_q_ptr is not None and num_own < BLOCK_M:
            _clear_spare_rows(results, sequences, queries, program, head_kv, num_cleared, TILE)
        if num_own <= 0:
            return
        rows = _rows_of_sequence(queries, head_kv, sequences, scores.window, tree_mask, TILE)
        if tree_ptr is not None:
            num_nodes_above = tl.load(tree_ptr + 2 * queries.sequence + 1)
            _clear_lses(results, rows.place, num_nodes_above, num_cleared)
    blocks = split_blocks(rows.blocks, split, num_splits, BLOCK_N, TILE.SPLIT_KEYS)
    # Most fixed splits of a short sequence have no keys, and no one reads their output.
    is_read = True if TILE.SPLIT_KEYS == 0 else (split == 0) | (blocks.lo < blocks.hi)

    place = rows.place
    q_rows = row_offsets(place.batch, place.query, place.head, q.strides)
    q_tile = load_tile(q.ptr + q_rows[:, None], place.mask, TILE.HEAD_DIM, TILE.WIDEST)  # (BLOCK_M, HEAD_DIM)
    k = of_head(k, head_kv, TILE.VECTOR_CACHE)
    v = of_head(v, head_kv, TILE.VECTOR_CACHE)
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
    if scales.v_tokens is not None:
        out_factor /= TILE.V_UNIT
    keys = Keys(k, v, scales.k_tokens, scales.v_tokens, head_kv, block_table_ptr, sinks_ptr)
    scoring = Scoring(scores, slopes, out_factor)
    if TILE.FOLD:
        out_tile = zeros_tile(BLOCK_M, TILE.HEAD_DIM_V, TILE.WIDEST)
        lse = tl.full([BLOCK_M], float("-inf"), tl.float32)
        first = rows.blocks.lo // TILE.SPLIT_KEYS
        before = 0 if sinks_ptr is None else (first > 0).to(tl.int32)  # the first split has the sinks
        num_folded = before + tl.cdiv(rows.blocks.hi, TILE.SPLIT_KEYS) - first
        for i in range(0, tl.maximum(num_folded, 1)):  # rows without keys may have sinks
            split = tl.where(i < before, 0, first + i - before)
            blocks = split_blocks(rows.blocks, split, num_splits, BLOCK_N, TILE.SPLIT_KEYS)
            tile, lse_here = _attend(q_tile, keys, rows, blocks, scoring, split == 0, TILE)
            kept, added, lse = merge_weights(lse, lse_here)
            out_tile = merge_rows(out_tile, kept, tile, added)
        _store_rows(results, place, out_tile, lse, TILE.HEAD_DIM_V)
    else:
        tile, lse = _attend(q_tile, keys, rows, blocks, scoring, split == 0, TILE)
        if not TILE.SHARED:
            place = _place_in_sequence(computed_again(queries.tile), queries, head_kv, sequences, TILE)
        _store_rows(results, place, tile, lse, TILE.HEAD_DIM_V, is_read)


class Keys(NamedTuple):
    """Keys and values of a head, and what finds them."""

    k: object
    v: object
    k_scales: object  # Views of all heads, or None
    v_scales: object
    head: object
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
    acc = zeros_tile(BLOCK_M, TILE.HEAD_DIM_V, TILE.WIDEST)
    PACK_V: tl.constexpr = 1 if TILE.PACK > 0 else 0
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
            k_tile = _load_cached(keys.k, cached, keys_mask, q_tile[0].dtype, TILE.HEAD_DIM, TILE.PACK, TILE)
            if BLOCK_M >= 64:
                fence_copies()
            if TILE.CUT_CHAIN:
                s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                s = dot_in_ifs(q_tile, k_tile, s, start_n, blocks, INPUT_PRECISION)
            else:
                s = dot_transposed(q_tile, k_tile, INPUT_PRECISION)  # (BLOCK_M, BLOCK_N)
            if keys.k_scales is not None:
                s *= load_token_scales(keys.k_scales, cached, keys_mask, keys.head)[None, :]
            if not TILE.FOLD_SCALE:
                s = _scale(s, scoring, rows, start_n, q_tile[0].dtype == tl.float32, TILE.TREE and not FULL, TILE)
            if not FULL:
                s = mask_scores_of_rows(s, rows, start_n, scores.window, TILE)
            p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scores.scale_log2 if TILE.FOLD_SCALE else 1.0, not FULL)
            if keys.v_scales is not None:
                p *= (load_token_scales(keys.v_scales, cached, keys_mask, keys.head) * TILE.V_UNIT)[None, :]
            v_tile = _load_cached(keys.v, cached, keys_mask, q_tile[0].dtype, TILE.HEAD_DIM_V, PACK_V, TILE)
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
