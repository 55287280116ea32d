"""Kernel of MLA in the absorbed form, and its launchers for decode and prefill.

Decode reads latent vectors from pages, prefill from rows of a tensor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._host.checks import FLOAT8_MANTISSA_BITS, MAX_ROWS, layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import count_sms, gpu_of, repeats_chains
from .._host.key_shard import KeyShard, num_ranks_of
from .._host.latent import SCALE_BLOCK, latent_parts
from .._host.layout import INDICES, LSE, capacity_of, clear_outputs, tiles_each, vector_elements
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._host.workspace import empty, only_counts
from .._jit.args import Sequences, ShardWindow, Strides, View, Window, bits_of_rows, scale_of, window_of
from .._jit.blocks import split_blocks, visible_range
from .._jit.drafts import Drafts, load_bits, mask_scores_of_tree, without_drafts
from .._jit.heads import find_sequence, row_offsets, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import mask_scores
from .._jit.paging import decode_float8, decode_tile, find_keys, key_pointers, load_scale, pages_of_keys
from .._jit.shards import columns_before, mask_scores_of_rank, visible_range_of_rank
from .._jit.softmax import LOG2_E, softmax_finish, softmax_init, softmax_step
from .._jit.tiles import (
    cast_tile,
    dot_add,
    dot_transposed,
    load_piece,
    load_tile,
    piece_0,
    piece_1,
    scale_rows,
    scale_tile,
    store_piece,
)
from .._jit.workarounds import decode_once, dot_in_ifs, fence_copies, in_vectors, multiple_of
from ..merge.kernel import launch_merge
from ..merge.splits import FIXED_KEYS, MAX_WORKSPACE_BYTES, choose_num_splits, resident_programs
from .configs import MlaDecodeCase, MlaDecodeConfig, split_work
from .hopper import HopperPlan, launch_mla_decode_hopper, plan_hopper
from .projections import launch_absorb, launch_merge_project, prepare_absorb

# Columns of a piece of a latent vector. For gfx942 Triton 3.6.0 and 3.9.0 put a whole piece into shared memory, twice
# as much for 512 columns; on NVIDIA GPUs registers change by up to 27 either way, and neither form spills.
WIDEST = 256
# A new length must not cause a compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "num_splits", "num_sequences", "first_split", "search_steps"]
LENGTHS += ["lse_stride"]
LENGTHS += [*INDICES, *LSE]


class LatentCache(NamedTuple):
    """One value for each part of a row of a latent cache: the latent vector, its fp8 scales, the rotary key."""

    latents: object
    scales: object  # None unless rows have scales of their own
    rope_keys: object


class Pages(NamedTuple):
    """Pages of one part of a latent cache. Without a block table each sequence is a page."""

    ptr: object
    page_stride: int


class AbsorbedTile(NamedTuple):
    """What `_mla_absorbed_kernel` is compiled for."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_HEADS: int
    KV_LORA_RANK: int
    PIECE_0: int  # columns of the two pieces of a latent vector; PIECE_1 is 0 if there is one piece
    PIECE_1: int
    ROPE_HEAD_DIM: int  # 0: no rotary part
    PAGE_SIZE: int
    ONE_PAGE: bool  # a tile of keys lies in one page
    PAGES_AHEAD: bool  # page numbers are loaded one iteration before their tile
    SLOT_STRIDES: LatentCache  # from one slot of a page to the next
    JOINED: bool  # a row of the cache is a latent vector and then its rotary key
    FLOAT8: tuple | None  # (mantissa bits, whether the GPU converts the format)
    SCALE_BLOCK: int  # elements that share an fp8 scale of their row; 0: rows have no scales
    VECTOR: int  # divides the strides of q and q_pe
    VECTORS: LatentCache  # divide those of the cache's pages
    CUT_CHAIN: bool  # see `dot_in_if`
    SHARDED: bool  # the cache has one rank's keys
    TREE: bool  # bits say which of the last keys a query sees
    SEARCH: bool  # programs find their sequence by bisection
    SPLIT_KEYS: int  # splits have so many keys, from key 0 on; 0: the keys of a tile of rows have equal splits
    INPUT_PRECISION: str


@triton.jit
def _load_queries(ptrs, rows_mask, TILE: tl.constexpr):
    """Absorbed queries, (BLOCK_M, KV_LORA_RANK) in two pieces."""
    first = load_piece(ptrs, rows_mask, 0, TILE.PIECE_0, TILE.KV_LORA_RANK)
    if TILE.PIECE_1 > 0:
        return first, load_piece(ptrs, rows_mask, TILE.PIECE_0, TILE.PIECE_1, TILE.KV_LORA_RANK)
    else:
        return (first,)


@triton.jit
def _load_latent_piece(ptrs, scale_ptrs, dtype, START: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Columns [START, START + BLOCK) of latent vectors, times the scales of their rows; fp8 elements in dtype."""
    tile = load_piece(ptrs, None, START, BLOCK, TILE.KV_LORA_RANK)
    if TILE.FLOAT8 is None:
        return tile
    elif TILE.SCALE_BLOCK == 0:
        values = decode_float8(tile, TILE.FLOAT8[0], TILE.FLOAT8[1])
        if TILE.FLOAT8[1] and dtype == tl.bfloat16:
            values = values.to(tl.float32)  # these become bf16 two at a time, fp16 one by one
        return decode_once(values.to(dtype))
    else:
        SCALE_BLOCK: tl.constexpr = TILE.SCALE_BLOCK
        BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        scales = tl.load(scale_ptrs + (START // SCALE_BLOCK + tl.arange(0, BLOCKS))[None, :])  # (BLOCK_N, BLOCKS)
        values = decode_float8(tile, TILE.FLOAT8[0], TILE.FLOAT8[1]).to(tl.float32)
        values = tl.reshape(values, (tile.shape[0], BLOCKS, SCALE_BLOCK)) * scales[:, :, None]
        return tl.reshape(values, tile.shape).to(dtype)


@triton.jit
def _load_latents(latents, scales, keys, dtype, TILE: tl.constexpr):
    """The latent vectors of CachedKeys, (BLOCK_N, KV_LORA_RANK) in two pieces."""
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    ptrs = key_pointers(latents, SLOTS.latents, keys, TILE.ONE_PAGE)
    scale_ptrs = None
    if TILE.SCALE_BLOCK > 0:
        scale_ptrs = key_pointers(scales, SLOTS.scales, keys, TILE.ONE_PAGE)
    first = _load_latent_piece(ptrs, scale_ptrs, dtype, 0, TILE.PIECE_0, TILE)
    if TILE.PIECE_1 > 0:
        return first, _load_latent_piece(ptrs, scale_ptrs, dtype, TILE.PIECE_0, TILE.PIECE_1, TILE)
    else:
        return (first,)


@triton.jit
def _load_rope_keys(rope_keys, keys, dtype, TILE: tl.constexpr):
    """The rotary keys of CachedKeys, (BLOCK_N, ROPE_HEAD_DIM) in the given dtype."""
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    tile = load_tile(key_pointers(rope_keys, SLOTS.rope_keys, keys, TILE.ONE_PAGE), None, TILE.ROPE_HEAD_DIM)
    if TILE.FLOAT8 is not None and TILE.SCALE_BLOCK == 0:
        return decode_tile(tile, TILE.FLOAT8[0], TILE.FLOAT8[1], dtype)
    else:
        return cast_tile(tile, dtype)


@triton.jit
def _load_rope_queries(ptrs, rows_mask, k_scale, k_pe_scale, TILE: tl.constexpr):
    """Rotary queries, (BLOCK_M, ROPE_HEAD_DIM). They take the factor that only rotary keys have."""
    tile = load_tile(ptrs, rows_mask, TILE.ROPE_HEAD_DIM)
    if k_pe_scale is not None:
        return cast_tile(scale_tile(tile, load_scale(k_pe_scale) / load_scale(k_scale)), tile[0].dtype)
    else:
        return tile


@triton.jit
def _zeros(TILE: tl.constexpr):
    """(BLOCK_M, KV_LORA_RANK) in two pieces."""
    # Triton 3.6 does not support fields of a constexpr in a list.
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    PIECE_0: tl.constexpr = TILE.PIECE_0
    PIECE_1: tl.constexpr = TILE.PIECE_1
    first = tl.zeros([BLOCK_M, PIECE_0], tl.float32)
    if PIECE_1 > 0:
        return first, tl.zeros([BLOCK_M, PIECE_1], tl.float32)
    else:
        return (first,)


@triton.jit
def _store_output(ptrs, rows_mask, tile, TILE: tl.constexpr):
    """Store a tile in its pieces to the rows at ptrs (rows, 1) that are in rows_mask."""
    store_piece(ptrs, rows_mask, tile[0], 0, TILE.KV_LORA_RANK)
    if TILE.PIECE_1 > 0:
        store_piece(ptrs, rows_mask, tile[1], TILE.PIECE_0, TILE.KV_LORA_RANK)


@triton.jit
def _lse_pointers(lse_ptr, lse_stride, batch, heads, rows, NUM_HEADS: tl.constexpr):
    """Pointers to the given rows of heads in lse (batch, NUM_HEADS, rows)."""
    return lse_ptr + (tl.cast(batch, tl.int64) * NUM_HEADS + heads) * lse_stride + rows


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
def _clear_spare(spare, out, lse_ptr, lse_stride, batch, HAS_OUT: tl.constexpr, TILE: tl.constexpr):
    """Store lse = -inf and, with HAS_OUT, out = 0 in the Spare rows of a packed tensor."""
    heads = spare.rows % TILE.NUM_HEADS
    rows = spare.rows // TILE.NUM_HEADS
    ptrs = _lse_pointers(lse_ptr, lse_stride, batch, heads, rows, TILE.NUM_HEADS)
    tl.store(ptrs, float("-inf"), mask=spare.mask)
    if HAS_OUT:
        ptrs = out.ptr + row_offsets(0, rows, heads, out.strides)
        _store_output(ptrs[:, None], spare.mask, _zeros(TILE), TILE)


@triton.jit
def _add_rotary(s, q_pe, k_pe, TILE: tl.constexpr):
    """s plus the scores of the rotary part, if there is one."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION  # Triton 3.6 does not pass on strings of a constexpr tuple
    if TILE.ROPE_HEAD_DIM > 0:
        return dot_transposed(q_pe, k_pe, PRECISION, s)
    else:
        return s


@triton.jit
def _load_drafts(tree, batch, rows, mask, num_drafts, first_draft, TILE: tl.constexpr):
    """The Drafts of a tile of rows. Without a tree they are not read."""
    bits = rows
    if TILE.TREE:
        bits = load_bits(tree, batch, rows, mask, num_drafts)
    return Drafts(first_draft, bits)


@triton.jit
def _visible_keys(start, end, seqlen_k, first_draft, window, TILE: tl.constexpr):
    """How many keys of a sequence are in the cache, and the Blocks that rows at the positions [start, end) see."""
    if TILE.SHARDED:
        num_keys = columns_before(seqlen_k, window)
        return num_keys, visible_range_of_rank(start, end, num_keys, window, TILE.BLOCK_N, TILE.BLOCK_N, 0)
    elif TILE.TREE:
        blocks = visible_range(start, end, seqlen_k, window, TILE.BLOCK_N, TILE.BLOCK_N)
        return seqlen_k, without_drafts(blocks, first_draft, TILE.BLOCK_N)
    else:
        return seqlen_k, visible_range(start, end, seqlen_k, window, TILE.BLOCK_N, TILE.BLOCK_N)


@triton.jit
def _mask(s, positions, drafts, start_n, num_keys, window, TILE: tl.constexpr):
    """Scores, -inf where a row at one of the positions, or with one of the Drafts' bits, does not see a key."""
    if TILE.TREE:
        return mask_scores_of_tree(s, positions, drafts, start_n, num_keys, window)
    elif TILE.SHARDED:
        return mask_scores_of_rank(s, positions, start_n, num_keys, window)
    else:
        return mask_scores(s, positions, start_n, num_keys, 0, window)


@triton.jit(do_not_specialize=LENGTHS)
def _mla_absorbed_kernel(
    q,
    q_pe,
    cache,
    out,
    out_split_stride,
    lse_ptr,
    lse_stride,
    cache_seqlens_ptr,
    block_table_ptr,
    table_stride,
    seqs,
    tree,
    seqlen_q,
    seqlen_k,
    num_tiles,
    num_splits,
    num_sequences,
    first_split,
    search_steps,
    scale_log2,
    k_scale,
    k_pe_scale,
    window,
    TILE: tl.constexpr,
):
    """One program computes a tile of rows of out and lse, over one split of the keys of a sequence.

    A row is one head of one query. All heads share the latent vectors. A tile of them is loaded once, and is both keys
    and values. Grid: num_tiles * num_splits * batch, where num_tiles is that of a sequence. With SEARCH it is that of
    all sequences, and the grid is num_tiles * num_splits.

    cache is a LatentCache of Pages. lse is (num_splits, batch, NUM_HEADS, rows). seqlen_q and seqlen_k of packed
    tensors are all their rows; otherwise seqlen_k bounds the keys of a sequence. In rows after the last sequence lse is
    stored, and with a block_table out too. k_scale is the Scale of the cache, k_pe_scale that of rotary keys; or None.
    first_split is the first of the launch, if splits are fixed: most of a short sequence have no keys then, and no one
    reads their output.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    own = _assign(seqs, num_tiles, num_splits, num_sequences, first_split, search_steps, TILE)
    tile, sequence, split, num_sequences = own.tile, own.sequence, own.split, own.num_sequences
    bounds = sequence_bounds(seqs, sequence, seqlen_q, seqlen_k)
    first_q, first_k, seqlen_k = bounds.first_q, bounds.first_k, bounds.seqlen_k
    if cache_seqlens_ptr is not None:
        seqlen_k = tl.minimum(tl.load(cache_seqlens_ptr + sequence), seqlen_k)
    # Packed tensors have a batch of one.
    batch = split if PACKED else split * num_sequences + sequence
    out = View(out.ptr + tl.cast(split, tl.int64) * out_split_stride, out.strides)
    num_own = bounds.seqlen_q * NUM_HEADS - tile * BLOCK_M
    if PACKED:
        if num_own < BLOCK_M:
            left_over = slots_left_over(own.program, first_q + bounds.seqlen_q, BLOCK_M, NUM_HEADS)
            spare = spare_rows(seqs.cu_seqlens_q_ptr, num_sequences, seqlen_q, left_over, num_own, BLOCK_M, NUM_HEADS)
            if spare.any:
                _clear_spare(spare, out, lse_ptr, lse_stride, batch, block_table_ptr is not None, TILE)
        if num_own <= 0:
            return
    first_position = seqlen_k - bounds.seqlen_q
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_mask = rows < bounds.seqlen_q * NUM_HEADS
    queries, heads = rows // NUM_HEADS, rows % NUM_HEADS
    positions = queries + first_position
    start = tile * BLOCK_M // NUM_HEADS + first_position
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // NUM_HEADS + 1, bounds.seqlen_q) + first_position
    seqlen_k, blocks = _visible_keys(start, end, seqlen_k, first_position, window, TILE)
    blocks = split_blocks(blocks, own.key_split, num_splits, BLOCK_N, TILE.SPLIT_KEYS)

    sequence = (sequence * 0 if PACKED else sequence).to(tl.int64)
    drafts = _load_drafts(tree, sequence, first_q + queries, rows_mask, bounds.seqlen_q, first_position, TILE)
    q = in_vectors(q, TILE.VECTOR)
    q_pe = in_vectors(q_pe, TILE.VECTOR)
    q_ptrs = q.ptr + row_offsets(sequence, first_q + queries, heads, q.strides)[:, None]
    q_tile = _load_queries(q_ptrs, rows_mask, TILE)  # (BLOCK_M, KV_LORA_RANK)
    if TILE.ROPE_HEAD_DIM > 0:
        q_ptrs = q_pe.ptr + row_offsets(sequence, first_q + queries, heads, q_pe.strides)[:, None]
        q_pe_tile = _load_rope_queries(q_ptrs, rows_mask, k_scale, k_pe_scale, TILE)  # (BLOCK_M, ROPE_HEAD_DIM)
    else:
        q_pe_tile, k_pe = q_tile, q_tile  # not read

    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    latents = Pages(cache.latents.ptr, multiple_of(cache.latents.page_stride, TILE.VECTORS.latents))
    if TILE.JOINED:
        rope_keys = Pages(latents.ptr + TILE.KV_LORA_RANK, latents.page_stride)
    else:
        rope_keys = Pages(cache.rope_keys.ptr, multiple_of(cache.rope_keys.page_stride, TILE.VECTORS.rope_keys))
    if block_table_ptr is None:
        first_row = tl.cast(first_k, tl.int64)
        latents_row = sequence * latents.page_stride + first_row * SLOTS.latents
        latents = Pages(latents.ptr + latents_row, 0)
        rope_row = sequence * rope_keys.page_stride + first_row * SLOTS.rope_keys
        rope_keys = Pages(rope_keys.ptr + rope_row, 0)
    else:
        block_table_ptr += own.sequence.to(tl.int64) * table_stride
        pages = pages_of_keys(block_table_ptr, blocks.lo, blocks.hi, BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)

    if k_scale is not None:
        scale_log2 *= load_scale(k_scale)
    m_i, l_i = softmax_init(None, heads, BLOCK_M)
    acc = _zeros(TILE)
    for start_n in tl.range(blocks.lo, blocks.hi, BLOCK_N):
        own_pages = None
        if block_table_ptr is not None:  # a loop cannot carry None
            own_pages, pages = _take_pages(pages, block_table_ptr, start_n, blocks.hi, TILE)
        keys = find_keys(own_pages, start_n, blocks.hi, BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)
        k = _load_latents(latents, cache.scales, keys, q_tile[0].dtype, TILE)  # (BLOCK_N, KV_LORA_RANK)
        if TILE.ROPE_HEAD_DIM > 0:
            k_pe = _load_rope_keys(rope_keys, keys, q_tile[0].dtype, TILE)  # (BLOCK_N, ROPE_HEAD_DIM)
        if BLOCK_M >= 64:
            fence_copies()

        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TILE.CUT_CHAIN:
            s = dot_in_ifs(q_tile, k, s, start_n, blocks, PRECISION)
            if start_n < blocks.full_hi:
                s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            else:
                s = _mask(_add_rotary(s, q_pe_tile, k_pe, TILE), positions, drafts, start_n, seqlen_k, window, TILE)
        else:
            s = dot_transposed(q_tile, k, PRECISION, s)
            s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            if start_n >= blocks.full_hi:
                s = _mask(s, positions, drafts, start_n, seqlen_k, window, TILE)
        p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, True)
        acc = dot_add(p.to(k[0].dtype), k, scale_rows(acc, alpha), PRECISION)  # (BLOCK_M, KV_LORA_RANK)

    norm, lse = softmax_finish(m_i, l_i)
    if k_scale is not None:
        norm *= load_scale(k_scale)
    out_ptrs = out.ptr + row_offsets(sequence, first_q + queries, heads, out.strides)[:, None]
    is_read = True if first_split is None else (blocks.lo < blocks.hi) | (num_splits == 1)
    _store_output(out_ptrs, rows_mask & is_read, scale_rows(acc, norm), TILE)
    tl.store(_lse_pointers(lse_ptr, lse_stride, batch, heads, first_q + queries, NUM_HEADS), lse, mask=rows_mask)


def launch_mla_decode(
    q_nope,
    q_pe,
    latent_cache,
    out,
    lse,
    cache_seqlens,
    block_table,
    w_uk,
    w_uv,
    rope,
    softmax_scale,
    causal,
    num_splits=0,
    config=None,
    rope_cache=None,
    queries=(None, None),
    factors=(None, None),
    batch_invariant=False,
    key_shard=None,
    workspace=None,
    tree_mask=None,
):
    """Launch the kernels of `mla_decode`: absorption with w_uk, attention, merge and projection of the splits.

    lse is (batch, num_heads, seqlen_q) or None: not wanted. rope is (cos, sin, interleaved), cos None for none; config
    an MlaDecodeConfig (None: the default). rope_cache holds the rotary keys if latent_cache does not. queries is
    (cu_seqlens_q, max_seqlen_q) of packed tensors (total, ...). factors is (k_scale, k_pe_scale). key_shard is the
    KeyShard of the cache, or None. tree_mask is that of `mla_decode`. No device-to-host sync.
    """
    cu_seqlens_q, max_seqlen_q = queries
    batch, absorb = cache_seqlens.shape[0], None
    if q_nope.numel() == 0 or batch == 0:
        if not only_counts(workspace):
            clear_outputs(out, lse)
        return
    if cu_seqlens_q is None:
        max_seqlen_q = q_nope.shape[1]
    else:
        q_nope, q_pe, out, lse = (None if x is None else x[None] for x in (q_nope, q_pe, out, lse))
    kv_lora_rank = q_nope.shape[3] if w_uk is None else w_uk.shape[2]
    if rope_cache is None:
        cache = LatentCache(*latent_parts(latent_cache, kv_lora_rank, q_pe.shape[3]))
    else:
        cache = LatentCache(latent_cache, None, rope_cache)
    if w_uk is None:
        scale_log2 = softmax_scale * LOG2_E.value
    else:
        positions = cache_seqlens, capacity_of(latent_cache, block_table, key_shard), *rope
        scale = softmax_scale * LOG2_E.value
        absorb, (q_nope, q_pe) = prepare_absorb(q_nope, q_pe, w_uk, scale, positions, workspace, batch_invariant)
        scale_log2 = 1.0
    joined = rope_cache is None and latent_cache.dtype != torch.uint8
    sequences = AbsorbedSequences(cu_seqlens_q, None, cache_seqlens, block_table, batch, max_seqlen_q)
    call = AbsorbedCall(q_nope, q_pe, cache, sequences, scale_log2, causal and tree_mask is None, joined, factors)
    call = call._replace(batch_invariant=batch_invariant, key_shard=key_shard, tree_mask=tree_mask)
    _attend(call, w_uv, out, lse, num_splits, config, absorb, workspace)


def launch_mla_absorbed(
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse, lengths, softmax_scale, causal, heads_each
):
    """Launch the kernels of a prefill for heads_each heads at a time, which limits the memory of absorbed queries.

    Tensors are (batch, seqlen, ...) or packed (total, ...), lse (batch, num_heads, seqlen_q) or (num_heads, total_q);
    lengths is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), the first two None in a dense batch.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, _ = lengths
    batch = q_pe.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if q_pe.numel() == 0 or batch == 0:
        clear_outputs(out, lse)
        return
    if cu_seqlens_q is not None:
        q_nope, q_pe, kv_latent, k_pe, out, lse = (
            None if x is None else x[None] for x in (q_nope, q_pe, kv_latent, k_pe, out, lse)
        )
    sequences = AbsorbedSequences(cu_seqlens_q, cu_seqlens_k, None, None, batch, max_seqlen_q)
    cache = LatentCache(kv_latent, None, k_pe)
    for first in range(0, q_pe.shape[2], heads_each):
        heads = slice(first, first + heads_each)
        q = launch_absorb(q_nope[:, :, heads], q_pe[:, :, heads], w_uk[heads], softmax_scale * LOG2_E.value)
        call = AbsorbedCall(*q, cache, sequences, 1.0, causal, joined=False)
        _attend(call, w_uv[heads], out[:, :, heads], None if lse is None else lse[:, heads], num_splits=1)


class AbsorbedSequences(NamedTuple):
    """The sequences of a batch. Those of decode have cache_seqlens and a block_table, packed ones cu_seqlens."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    block_table: torch.Tensor | None
    batch: int
    max_seqlen_q: int


class AbsorbedCall(NamedTuple):
    """Attention of absorbed queries (batch, seqlen_q, num_heads, dim); packed ones have a batch of 1."""

    q: torch.Tensor
    q_pe: torch.Tensor
    cache: LatentCache  # tensors (pages or batch, slots or rows, dim)
    sequences: AbsorbedSequences
    scale_log2: float
    causal: bool
    joined: bool  # rotary keys follow the latent vectors in one tensor
    factors: tuple = (None, None)  # (k_scale, k_pe_scale)
    batch_invariant: bool = False
    key_shard: KeyShard | None = None
    tree_mask: torch.Tensor | None = None


class AbsorbedKey(NamedTuple):
    """Everything of a call that the plan of its attention depends on; plans are cached by it."""

    layout: tuple  # (shape, strides) of q, q_pe and latent vectors
    layout_scales: tuple | None  # None unless rows have scales of their own
    layout_rope: tuple
    dtype: torch.dtype
    cache_dtype: torch.dtype
    q_aligned: bool  # q and q_pe start at multiples of 16 bytes
    cache_aligned: bool  # latent vectors and rotary keys do
    table_width: int | None  # None: keys are rows of a tensor
    packed: bool
    batch: int
    max_seqlen_q: int
    causal: bool
    has_tree: bool
    joined: bool
    has_factors: bool
    is_projected: bool  # a launch that multiplies with w_uv follows
    key_shard: KeyShard | None
    num_splits: int
    batch_invariant: bool
    arch: str
    precision: str  # of fp32 matmuls
    num_sms: int


class AbsorbedPlan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int  # of a split
    num_splits: int
    strides: tuple  # Strides of q and q_pe
    page_strides: LatentCache
    counts: tuple  # seqlen_q, seqlen_k and num_tiles
    window: Window | ShardWindow
    constants: dict


def _attend(call, w_uv, out, lse, num_splits, config=None, absorb=None, workspace=None):
    """Attention of an AbsorbedCall, and what follows it. absorb launches what fills its queries.

    The memory of all launches comes before the first one: if the workspace is too small, nothing was launched.
    """
    plan = _plan(_key_of(call, w_uv is not None, num_splits), wanted_kernels(), config)
    in_rounds = call.batch_invariant and plan.num_splits > 1
    if in_rounds:
        parts, lse_parts = _results_of_round(call.q, plan.num_splits, workspace)
    else:
        parts, lse_parts = _results(call.q, out, lse, w_uv, plan.num_splits, workspace)
    if only_counts(workspace):
        return
    if absorb is not None:
        absorb()
    if in_rounds:
        merged = (out, lse) if w_uv is None else (parts[0], lse_parts[0])
        _merge_in_rounds(plan, call, parts, lse_parts, merged)
        parts, lse_parts = parts[:1], lse_parts[:1]
    elif type(plan) is HopperPlan:
        launch_mla_decode_hopper(plan, call, parts, lse_parts)
    else:
        _launch(plan, call, parts, lse_parts)
    if w_uv is not None:
        launch_merge_project(parts, lse_parts, w_uv, out, lse, call.batch_invariant)
    elif plan.num_splits > 1 and not in_rounds:
        launch_merge(parts, lse_parts, out, lse)


def _results_of_round(q, num_splits, workspace):
    """Room for the merged results of fixed splits, then for those of as many splits as MAX_WORKSPACE_BYTES hold."""
    batch, seqlen_q, num_heads, rank = q.shape
    split_bytes = torch.float32.itemsize * (rank + 1) * batch * seqlen_q * num_heads
    places = 1 + max(1, min(num_splits, MAX_WORKSPACE_BYTES // split_bytes))
    parts = empty(workspace, q, (places, *q.shape), torch.float32)
    return parts, empty(workspace, q, (places, batch, num_heads, seqlen_q), torch.float32)


def _merge_in_rounds(plan, call, parts, lses, merged):
    """Attention merged over fixed splits, one after the other, into merged, (out, lse).

    The capacity of the cache decides how many splits there are. A round computes those for which parts has room, and
    merges them with the result of the rounds before, which is parts[0].
    """
    each = len(parts) - 1
    for first in range(0, plan.num_splits, each):
        end = 1 + min(each, plan.num_splits - first)
        _launch(plan, call, parts[1:end], lses[1:end], first)
        rounds = slice(1 if first == 0 else 0, end)
        target = merged if first + each >= plan.num_splits else (parts[0], lses[0])
        launch_merge(parts[rounds], lses[rounds], *target, in_order=True)


def _launch(plan, call, parts, lse_parts, first_split=0):
    """Launch the portable kernel for the splits that have room in parts, from first_split on."""
    cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, batch, _ = call.sequences
    split_stride, *strides, _ = parts.stride()
    of_q, of_q_pe = plan.strides
    args = (
        View(call.q, of_q),
        View(call.q_pe, of_q_pe),
        LatentCache._make(
            [x if x is None else Pages(_bytes(x), stride) for x, stride in zip(call.cache, plan.page_strides)]
        ),
        View(parts, Strides(*strides)),
        split_stride,
        lse_parts,
        lse_parts.stride(-2),
        cache_seqlens,
        block_table,
        None if block_table is None else block_table.stride(0),
        Sequences(cu_seqlens_q, cu_seqlens_k, None),
        None if call.tree_mask is None else bits_of_rows(call.tree_mask),
        *plan.counts,
        len(parts),
        batch,
        first_split if call.batch_invariant else None,
        batch.bit_length(),
        call.scale_log2,
        *_factors(*call.factors, call.q_pe.shape[-1]),
        plan.window,
    )
    launch_packed(_mla_absorbed_kernel, (plan.num_programs * len(parts),), call.q.device, args, plan.constants)


def _bytes(x):
    """fp8 elements as uint8: not every GPU has the type."""
    return x.view(torch.uint8) if x.dtype in FLOAT8_MANTISSA_BITS else x


def _factors(k_scale, k_pe_scale, rope_dim):
    """The Scales of the kernel."""
    if k_pe_scale is None or rope_dim == 0:
        return scale_of(k_scale), None
    return scale_of(1.0 if k_scale is None else k_scale), scale_of(k_pe_scale)


def _results(q, out, lse, w_uv, num_splits, workspace):
    """Outputs of the splits (splits, batch, seqlen_q, num_heads, dim), and their log-sum-exps (splits, batch,
    num_heads, seqlen_q). With one split and no projection they are out and lse."""
    batch, seqlen_q, num_heads, _ = q.shape
    lse_shape = num_splits, batch, num_heads, seqlen_q
    if num_splits > 1 or w_uv is not None:
        # A single split is rounded before the projection anyway.
        dtype = torch.float32 if num_splits > 1 else out.dtype
        parts = empty(workspace, out, (num_splits, *q.shape), dtype)
        return parts, empty(workspace, out, lse_shape, torch.float32)
    # The kernel always stores lse. Without the store the loop is the same, and there would be one more variant.
    return out[None], empty(workspace, out, lse_shape, torch.float32) if lse is None else lse[None]


def _key_of(call, is_projected, num_splits):
    q, q_pe, (latents, scales, rope_keys), sequences, _, causal, joined, factors, batch_invariant, key_shard, *_ = call
    cu_seqlens_q, _, _, block_table, batch, max_seqlen_q = sequences
    dtype, arch = q.dtype, arch_of(q)
    # By position: keywords take twice as long.
    return AbsorbedKey(
        layout_of(q, q_pe, latents),
        None if scales is None else (scales.shape, scales.stride()),
        (rope_keys.shape, rope_keys.stride()),
        dtype,
        latents.dtype,
        (q.data_ptr() | q_pe.data_ptr()) % 16 == 0,
        (latents.data_ptr() | rope_keys.data_ptr()) % 16 == 0,
        None if block_table is None else block_table.shape[1],
        cu_seqlens_q is not None,
        batch,
        max_seqlen_q,
        causal,
        call.tree_mask is not None,
        joined,
        factors != (None, None),
        is_projected,
        key_shard,
        num_splits,
        batch_invariant,
        arch,
        input_precision(dtype, arch),
        count_sms(q.device, arch),
    )


@remember
def _plan(key, wanted, config):
    """The AbsorbedPlan of a call, or the HopperPlan where hopper.py's kernel supports it and is wanted."""
    if config is None and not key.has_tree and (plan := plan_hopper(key, wanted)) is not None:
        return plan
    (shape_q, strides_q), (shape_pe, strides_pe), of_latents = key.layout
    cache = [of_latents, key.layout_scales, key.layout_rope]
    num_heads, kv_lora_rank = shape_q[2:]
    if shape_pe[3] == 0:  # the strides of empty tensors mean nothing
        strides_pe, cache[2] = strides_q, of_latents
    is_fp8, has_scales = key.cache_dtype.itemsize == 1, key.layout_scales is not None
    paged = key.table_width is not None
    num_slots = of_latents[0][1]
    # Latent vectors and rotary keys are loaded 16 bytes at a time if rows and pages of both are multiples of that.
    item_sizes = LatentCache(*[key.cache_dtype.itemsize] * 3)
    if has_scales:
        item_sizes = LatentCache(1, torch.float32.itemsize, torch.bfloat16.itemsize)
    page_strides, rows = (LatentCache._make([x and x[1][i] for x in cache]) for i in (0, 1))
    aligned = key.cache_aligned and all(
        stride is None or stride * size % 16 == 0
        for strides in (page_strides, rows)
        for stride, size in zip(strides, item_sizes)
    )
    num_rows = key.max_seqlen_q * num_heads
    seqlen_k = min(num_slots * key.table_width, MAX_ROWS) if paged else num_slots  # of the longest sequence, at most
    widths = kv_lora_rank, shape_pe[3]
    tile_rows, longest = (num_heads, 1) if key.batch_invariant else (num_rows, seqlen_k)
    case = MlaDecodeCase(key.arch, key.dtype, *widths, tile_rows, is_fp8, paged, longest, num_slots, has_scales)
    tiles = config or choose(MlaDecodeConfig, case)
    num_tiles = tiles_each(num_rows, shape_q[1] * num_heads, key.batch, tiles.block_m)  # of a sequence
    num_searched = shape_q[1] * num_heads // tiles.block_m + key.batch  # of all
    search = key.packed and paged and num_searched < key.batch * num_tiles
    num_programs = num_searched if search else key.batch * num_tiles
    one_page = paged and num_slots % tiles.block_n == 0
    cut_chain = repeats_chains(key.arch, tiles.block_m, tiles.num_warps)
    mantissa_bits = FLOAT8_MANTISSA_BITS.get(key.cache_dtype, 3)  # rows with scales are uint8, and e4m3
    widest = 512 if cut_chain and one_page else WIDEST
    tile = AbsorbedTile(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        PIECE_0=piece_0(kv_lora_rank, widest),
        PIECE_1=piece_1(kv_lora_rank, widest),
        ROPE_HEAD_DIM=shape_pe[3],
        PAGE_SIZE=num_slots if paged else 1,
        ONE_PAGE=one_page,
        PAGES_AHEAD=tiles.num_stages > 2,
        SLOT_STRIDES=rows,
        JOINED=key.joined,
        FLOAT8=(mantissa_bits, mantissa_bits in gpu_of(key.arch).native_fp8) if is_fp8 else None,
        SCALE_BLOCK=SCALE_BLOCK if has_scales else 0,
        VECTOR=vector_elements(key.dtype.itemsize, strides_q, strides_pe),
        VECTORS=LatentCache(*[16 // size if aligned else 1 for size in item_sizes])._replace(scales=None),
        CUT_CHAIN=cut_chain,
        SHARDED=key.key_shard is not None,
        TREE=key.has_tree,
        SEARCH=search,
        SPLIT_KEYS=FIXED_KEYS if key.batch_invariant else 0,
        INPUT_PRECISION=key.precision,
    )
    num_splits = key.num_splits
    if key.batch_invariant:
        num_splits = max(1, -(-seqlen_k // FIXED_KEYS))
    elif num_splits == 0:
        resident = resident_programs(tiles.shared_bytes(case), tiles, case.gpu)
        num_splits = choose_num_splits(split_work(key, tiles.block_m, tiles.block_n, num_programs, seqlen_k, resident))
    return AbsorbedPlan(
        num_programs,
        num_splits,
        (Strides(*strides_q[:3]), Strides(*strides_pe[:3])),
        page_strides,
        (shape_q[1], min(seqlen_k * num_ranks_of(key.key_shard), MAX_ROWS), num_searched if search else num_tiles),
        window_of((None, 0 if key.causal else None), key.key_shard),
        dict(TILE=tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages),
    )
