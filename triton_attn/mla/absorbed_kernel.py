"""Kernel of MLA in the absorbed form. Decode reads latent vectors from pages, prefill from rows of a tensor."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._host.layout import INDICES
from .._jit.args import View
from .._jit.blocks import Blocks, end_full, split_blocks, visible_range
from .._jit.drafts import Drafts, TreeMask, keys_before_drafts, load_bits, mask_scores_of_rows, without_drafts
from .._jit.heads import (
    Batch,
    find_node,
    find_sequence,
    longest_of,
    lse_offsets,
    row_offsets,
    rows_of_node,
    sequence_bounds,
    slots_left_over,
    spare_rows,
)
from .._jit.paging import find_keys, load_scale, pages_of_keys
from .._jit.shards import num_cached, visible_range_of_rank
from .._jit.softmax import softmax_finish, softmax_init
from .._jit.tiles import dot_transposed, scale_rows
from .._jit.workarounds import computed_again, dot_in_ifs, fence_copies, in_vectors, multiple_of
from .latents import (
    LatentCache,
    Pages,
    add_latents,
    latent_scores,
    latent_softmax,
    load_latents,
    load_queries,
    load_rope_keys,
    store_outputs,
    undo_weights,
    zero_outputs,
)

# A new length must not cause a compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "num_splits", "num_sequences", "first_split", "search_steps"]
LENGTHS += ["num_nodes", "num_slots", "tree_mask_ptr", "tree_mask_stride", *INDICES, "lse_ptr"]


class AbsorbedTile(NamedTuple):
    """What `_mla_absorbed_kernel` is compiled for."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_HEADS: int
    KV_LORA_RANK: int
    GROUPS: tuple  # (first column, columns) of the groups of a latent vector, see latents.py
    ROPE_HEAD_DIM: int  # 0: no rotary part
    ROPE_GROUPS: tuple
    PAGE_SIZE: int
    ONE_PAGE: bool  # a tile of keys lies in one page
    PAGES_AHEAD: bool  # page numbers are loaded one iteration before their tile
    SLOT_STRIDES: LatentCache  # from one slot of a page to the next
    ROPE_START: int | None  # of a row that holds its rotary key, elements before it; None: a tensor has rotary keys
    FLOAT8: tuple | None  # (mantissa bits, whether the GPU converts the format)
    SCALE_BLOCK: int  # elements that share an fp8 scale of their row; 0: rows have no scales
    PAIRS: bool  # fp8 elements are loaded two at a time, see latents.py
    PAIR_SCALES: bool  # their scales are applied after matmuls
    ROPE_PAIRS: bool  # rotary keys are fp8 too
    VECTOR: int  # divides the strides of q and q_pe
    VECTORS: LatentCache  # divide those of the cache's pages
    CUT_CHAIN: bool  # see `dot_in_if`
    SHARDED: bool  # the cache has one rank's keys
    TREE: bool  # bits say which of the last keys a query sees; nodes have none of these keys
    SEARCH: bool  # programs find their sequence by bisection
    SPLIT_KEYS: int  # splits have so many keys, from key 0 on; 0: the keys of a tile of rows have equal splits
    SHARED: bool  # rows of the sequences below a node of a prefix tree, over its keys; otherwise of one sequence
    INPUT_PRECISION: str


@triton.jit
def _take_pages(pages, table_ptr, start, end, TILE: tl.constexpr):
    """(pages of the tile of keys at start, `pages` of the next iteration).

    If keys wait for page numbers that are loaded in the same iteration, the pipeline loses a stage. With PAGES_AHEAD
    they do not wait. With two stages one tile is in flight either way, and page numbers would only take registers.
    """
    if TILE.PAGES_AHEAD:
        following = start + TILE.BLOCK_N
        return pages, pages_of_keys(table_ptr, following, end, TILE.BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)
    else:
        return pages_of_keys(table_ptr, start, end, TILE.BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE), pages


class Assignment(NamedTuple):
    """The tile, sequence and split of a program. `program` is its index in the split, num_sequences the batch size.

    split counts the splits of the launch, key_split all splits of the keys.
    """

    program: object
    tile: object
    sequence: object
    split: object
    key_split: object
    num_sequences: object


@triton.jit
def _assign(seqs, num_tiles, num_splits, num_sequences, first_split, search_steps, TILE: tl.constexpr):
    """The Assignment of a program."""
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    key_split = split if first_split is None else first_split + split
    if TILE.SEARCH:
        cu_seqlens_ptr = seqs.cu_seqlens_q_ptr
        sequence = find_sequence(cu_seqlens_ptr, num_sequences, search_steps, tile, TILE.NUM_HEADS, TILE.BLOCK_M, 1)
        first = tl.load(cu_seqlens_ptr + sequence) * TILE.NUM_HEADS // TILE.BLOCK_M + sequence
        return Assignment(tile, tile - first, sequence, split, key_split, num_sequences)
    else:
        sequence = tl.program_id(0) // num_tiles // num_splits
        num_sequences = tl.num_programs(0) // num_tiles // num_splits
        return Assignment(sequence * num_tiles + tile, tile, sequence, split, key_split, num_sequences)


@triton.jit
def _add_rotary(s, q_pe, k_pe, TILE: tl.constexpr):
    """s plus the scores of the rotary part, if there is one."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION  # Triton 3.6 does not pass on strings of a constexpr tuple
    if TILE.ROPE_HEAD_DIM > 0:
        return dot_transposed(q_pe, k_pe, PRECISION, s)
    else:
        return s


@triton.jit
def _visible_keys(start, end, first_key, num_keys, window, TILE: tl.constexpr):
    """The Blocks of the keys [first_key, num_keys) that rows at the positions [start, end) see."""
    if TILE.SHARDED:
        return visible_range_of_rank(start, end, num_keys, window, TILE.BLOCK_N, TILE.BLOCK_N, first_key)
    else:
        return visible_range(start, end, num_keys, window, TILE.BLOCK_N, TILE.BLOCK_N, first_key)


@triton.jit
def _load_drafts(tree_mask, batch, rows, mask, num_drafts, first_draft, TILE: tl.constexpr):
    """The Drafts of a tile of rows. Without a tree of drafts they are not read."""
    bits = rows
    if TILE.TREE:
        bits = load_bits(tree_mask, batch, rows, mask, num_drafts)
    return Drafts(first_draft, bits)


class Rows(NamedTuple):
    """A tile of rows: where they are in tensors (batch, query, head), and the keys that they see."""

    mask: object
    batch: object  # 0 if packed
    query: object
    head: object
    position: object  # among the keys of the row's sequence, those of all ranks
    end_key: object  # of the tile, or of each row
    drafts: Drafts
    table_row: object  # the sequence whose pages are read
    blocks: Blocks


@triton.jit
def _rows_of_sequence(own, bounds, batch, num_splits, window, tree_mask, TILE: tl.constexpr):
    """Rows of one sequence and its keys in a split, with a prefix tree those that no node has."""
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    first_row = own.tile * TILE.BLOCK_M
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    seqlen_k = bounds.seqlen_k
    if batch.cache_seqlens_ptr is not None:
        seqlen_k = tl.minimum(tl.load(batch.cache_seqlens_ptr + own.sequence), seqlen_k)
    first_position = seqlen_k - bounds.seqlen_q
    start = first_row // NUM_HEADS + first_position
    end = tl.minimum((first_row + TILE.BLOCK_M - 1) // NUM_HEADS + 1, bounds.seqlen_q) + first_position
    num_keys = num_cached(seqlen_k, window, TILE.SHARDED)
    first_key = 0
    if batch.tree_ptr is not None:
        first_key = tl.load(batch.tree_ptr + 2 * own.sequence) * TILE.PAGE_SIZE
        if TILE.TREE:
            first_key = tl.minimum(first_key, keys_before_drafts(first_position, window, TILE))
    blocks = _visible_keys(start, end, first_key, num_keys, window, TILE)
    if TILE.TREE:
        blocks = without_drafts(blocks, first_position, window, TILE)
    blocks = split_blocks(blocks, own.key_split, num_splits, TILE.BLOCK_N, TILE.SPLIT_KEYS)
    queries, heads = rows // NUM_HEADS, rows % NUM_HEADS
    mask = rows < bounds.seqlen_q * NUM_HEADS
    of_tensor = (own.sequence * 0 if batch.cu_seqlens_q_ptr is not None else own.sequence).to(tl.int64)
    query = bounds.first_q + queries
    drafts = _load_drafts(tree_mask, of_tensor, query, mask, bounds.seqlen_q, first_position, TILE)
    return Rows(mask, of_tensor, query, heads, queries + first_position, num_keys, drafts, own.sequence, blocks)


@triton.jit
def _rows_of_node(node, batch, window, HAS_DRAFTS: tl.constexpr, TILE: tl.constexpr):
    """Rows of the sequences below a node, and its keys."""
    rows = rows_of_node(node, batch, TILE.NUM_HEADS, TILE.BLOCK_M)
    heads = (node.tile * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)) % TILE.NUM_HEADS
    end_key = tl.minimum(num_cached(rows.seqlen_k, window, TILE.SHARDED), node.end_page * TILE.PAGE_SIZE)
    if HAS_DRAFTS:
        end_key = tl.minimum(end_key, keys_before_drafts(rows.seqlen_k - rows.seqlen_q, window, TILE))
    # Pages are those of the longest sequence of the tile, since a shorter one may end on a shared page.
    longest, table_row = longest_of(end_key, rows.sequence)
    start, end = tl.min(rows.position, 0), tl.max(rows.position, 0) + 1
    blocks = _visible_keys(start, end, node.first_page * TILE.PAGE_SIZE, longest, window, TILE)
    blocks = end_full(blocks, end_key, TILE.BLOCK_N)
    no_drafts = Drafts(0, rows.query)  # not read
    return Rows(rows.mask, rows.batch, rows.query, heads, rows.position, end_key, no_drafts, table_row, blocks)


class Results(NamedTuple):
    """Outputs and log-sum-exps (splits, batch, NUM_HEADS, rows), and where those of a program are."""

    out: View  # of its split
    lse_ptr: object
    num_rows: object
    split: object
    dense_batch: object  # 1 if packed
    num_cleared: object  # slots of a tree's nodes that it clears, where a row has none


@triton.jit
def _clear_slots(results, batch, heads, rows, mask, first_slot, TILE: tl.constexpr):
    """Store lse = -inf in the slots of a tree's nodes from first_slot on."""
    for slot in range(first_slot, results.num_cleared):
        index = slot * results.dense_batch + batch
        ptrs = results.lse_ptr + lse_offsets(index, heads, rows, TILE.NUM_HEADS, results.num_rows)
        tl.store(ptrs, float("-inf"), mask=mask)


@triton.jit
def _clear_spare(own, bounds, num_own, batch, results, HAS_OUT: tl.constexpr, TILE: tl.constexpr):
    """Store lse = -inf and, with HAS_OUT, out = 0 in those rows of a packed tensor after the last sequence that are the
    program's (`spare_rows`)."""
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    left_over = slots_left_over(own.program, bounds.first_q + bounds.seqlen_q, TILE.BLOCK_M, NUM_HEADS)
    cu_seqlens_ptr, num_rows = batch.cu_seqlens_q_ptr, batch.num_rows
    spare = spare_rows(cu_seqlens_ptr, own.num_sequences, num_rows, left_over, num_own, TILE.BLOCK_M, NUM_HEADS)
    if spare.any:
        heads, rows = spare.rows % NUM_HEADS, spare.rows // NUM_HEADS
        ptrs = results.lse_ptr + lse_offsets(results.split, heads, rows, NUM_HEADS, results.num_rows)
        tl.store(ptrs, float("-inf"), mask=spare.mask)
        if HAS_OUT:
            ptrs = results.out.ptr + row_offsets(0, rows, heads, results.out.strides)
            store_outputs(ptrs[:, None], spare.mask, zero_outputs(TILE), TILE)
        if batch.tree_ptr is not None:
            _clear_slots(results, 0, heads, rows, spare.mask, 0, TILE)


@triton.jit(do_not_specialize=LENGTHS)
def _mla_absorbed_kernel(
    q,
    q_pe,
    cache,
    out,
    out_split_stride,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    table_stride,
    seqs,
    tree_mask_ptr,
    tree_mask_stride,
    seqlen_q,
    seqlen_k,
    num_tiles,
    num_splits,
    num_sequences,
    first_split,
    search_steps,
    tree_ptr,
    num_nodes,
    num_slots,
    scale_log2,
    k_scale,
    k_pe_scale,
    window,
    TILE: tl.constexpr,
):
    """One program computes a tile of rows of out and lse, over one split of the keys of a sequence.

    A row is one head of one query. All heads share the latent vectors. A tile of them is loaded once, and is both keys
    and values. Grid: num_tiles * num_splits * batch, where num_tiles is that of a sequence. With SEARCH it is that of
    all sequences, and the grid is num_tiles * num_splits. With SHARED a program finds its node.

    cache is a LatentCache of Pages; one without a pointer is a part of the rows of latent vectors. lse is (num_splits,
    batch, NUM_HEADS, seqlen_q); results of a tree's nodes are in its first num_slots splits. seqlen_q and seqlen_k of
    packed tensors are all their rows; otherwise seqlen_k bounds the keys of a sequence. In rows after the last sequence
    lse is stored, and with a block_table out too. k_scale is the Scale of the cache, k_pe_scale that of rotary keys; or
    None. first_split is the first of the launch, if splits are fixed. Most of a short sequence have no keys then, and
    no one reads their output.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    batch = Batch(
        seqs.cu_seqlens_q_ptr, cache_seqlens_ptr, num_sequences, seqlen_q, seqlen_k, search_steps, tree_ptr, num_nodes
    )
    if TILE.SHARED:
        node = find_node(batch, tl.program_id(0), NUM_HEADS, BLOCK_M)
        if node.tile * BLOCK_M >= node.num * NUM_HEADS:
            return
        split = node.slot
        rows = _rows_of_node(node, batch, window, tree_mask_ptr is not None, TILE)
    else:
        own = _assign(seqs, num_tiles, num_splits, num_sequences, first_split, search_steps, TILE)
        split = own.split if tree_ptr is None else num_slots + own.split
        bounds = sequence_bounds(seqs, own.sequence, seqlen_q, seqlen_k)
        num_own = bounds.seqlen_q * NUM_HEADS - own.tile * BLOCK_M
        of_split = View(out.ptr + tl.cast(split, tl.int64) * out_split_stride, out.strides)
        num_cleared = tl.where(own.split == 0, num_slots, 0)
        results = Results(of_split, lse_ptr, seqlen_q, split, 1 if PACKED else num_sequences, num_cleared)
        if PACKED and num_own < BLOCK_M:
            _clear_spare(own, bounds, num_own, batch, results, block_table_ptr is not None, TILE)
        if PACKED and num_own <= 0:
            return
        tree_mask = TreeMask(tree_mask_ptr, tree_mask_stride)
        rows = _rows_of_sequence(own, bounds, batch, num_splits, window, tree_mask, TILE)
        if tree_ptr is not None:
            num_above = tl.load(tree_ptr + 2 * own.sequence + 1)
            _clear_slots(results, rows.batch, rows.head, rows.query, rows.mask, num_above, TILE)
    blocks = rows.blocks
    q = in_vectors(q, TILE.VECTOR)
    q_pe = in_vectors(q_pe, TILE.VECTOR)
    q_ptrs = q.ptr + row_offsets(rows.batch, rows.query, rows.head, q.strides)[:, None]
    q_pe_ptrs = q_pe.ptr + row_offsets(rows.batch, rows.query, rows.head, q_pe.strides)[:, None]
    q_tile, q_pe_tile, scale_log2 = load_queries(q_ptrs, q_pe_ptrs, rows.mask, k_scale, k_pe_scale, scale_log2, TILE)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    latents = Pages(cache.latents.ptr, multiple_of(cache.latents.page_stride, TILE.VECTORS.latents))
    scales = cache.scales
    if TILE.ROPE_START is None:
        rope_keys = Pages(cache.rope_keys.ptr, multiple_of(cache.rope_keys.page_stride, TILE.VECTORS.rope_keys))
    elif TILE.SCALE_BLOCK > 0:  # bytes
        rope_ptr = (latents.ptr + TILE.ROPE_START).to(tl.pointer_type(tl.bfloat16))
        rope_keys = Pages(rope_ptr, multiple_of(cache.rope_keys.page_stride, TILE.VECTORS.rope_keys))
        scales = Pages((latents.ptr + TILE.KV_LORA_RANK).to(tl.pointer_type(tl.float32)), scales.page_stride)
    else:
        rope_keys = Pages(latents.ptr + TILE.ROPE_START, latents.page_stride)
    if block_table_ptr is None:
        first_row = tl.cast(bounds.first_k, tl.int64)
        latents = Pages(latents.ptr + rows.batch * latents.page_stride + first_row * SLOTS.latents, 0)
        rope_keys = Pages(rope_keys.ptr + rows.batch * rope_keys.page_stride + first_row * SLOTS.rope_keys, 0)
    else:
        block_table_ptr += rows.table_row.to(tl.int64) * table_stride
        pages = pages_of_keys(block_table_ptr, blocks.lo, blocks.hi, BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)

    m_i, l_i = softmax_init(None, rows.head, BLOCK_M)
    acc = zero_outputs(TILE)
    for start_n in tl.range(blocks.lo, blocks.hi, BLOCK_N):
        own_pages = None
        if block_table_ptr is not None:  # a loop cannot carry None
            own_pages, pages = _take_pages(pages, block_table_ptr, start_n, blocks.hi, TILE)
        keys = find_keys(own_pages, start_n, blocks.hi, BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)
        k, k_scales = load_latents(latents, scales, keys, dtype, TILE)  # (BLOCK_N, KV_LORA_RANK)
        k_pe = load_rope_keys(rope_keys, keys, dtype, TILE)  # (BLOCK_N, ROPE_HEAD_DIM)
        if BLOCK_M >= 64:
            fence_copies()

        if TILE.CUT_CHAIN:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = dot_in_ifs(q_tile, k, s, start_n, blocks, PRECISION)
            if start_n < blocks.full_hi:
                s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            else:
                s = mask_scores_of_rows(_add_rotary(s, q_pe_tile, k_pe, TILE), rows, start_n, window, TILE)
        else:
            s = latent_scores(q_tile, k, k_scales, TILE)
            s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            if start_n >= blocks.full_hi:
                s = mask_scores_of_rows(s, rows, start_n, window, TILE)
        weights, alpha, m_i, l_i = latent_softmax(s, k_scales, m_i, l_i, scale_log2, dtype, TILE)
        acc = add_latents(weights, k, scale_rows(acc, alpha), TILE)  # (BLOCK_M, KV_LORA_RANK)

    norm, lse = softmax_finish(m_i, l_i)
    norm = undo_weights(norm, TILE)
    if TILE.SHARED:
        node = find_node(batch, computed_again(tl.program_id(0)), NUM_HEADS, BLOCK_M)
        rows = _rows_of_node(node, batch, window, tree_mask_ptr is not None, TILE)
    if k_scale is not None:
        norm *= load_scale(k_scale)
    out_ptrs = out.ptr + row_offsets(rows.batch, rows.query, rows.head, out.strides)[:, None]
    out_ptrs += tl.cast(split, tl.int64) * out_split_stride
    is_read = True if first_split is None else (blocks.lo < blocks.hi) | (num_splits == 1)
    store_outputs(out_ptrs, rows.mask & is_read, scale_rows(acc, norm), TILE)
    lse_batch = split if PACKED else split * num_sequences + rows.batch
    tl.store(lse_ptr + lse_offsets(lse_batch, rows.head, rows.query, NUM_HEADS, seqlen_q), lse, mask=rows.mask)
