"""Kernel of attention in the absorbed form, and the launchers of decode and of prefill in that form.

Decode reads latent vectors from pages, prefill from rows of a tensor; all else is the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._host.checks import layout_of
from .._host.device import arch_of, input_precision, launch_packed
from .._host.gpu import count_sms, gpu_of, repeats_chains
from .._host.latent import SCALE_BLOCK, latent_parts
from .._host.layout import INDICES, LSE, capacity_of, clear_outputs, tiles_each, vector_elements
from .._host.options import wanted_kernels
from .._host.tuned import choose, remember
from .._jit.args import Sequences, Strides, View, Window
from .._jit.blocks import split_blocks, visible_range
from .._jit.heads import find_sequence, row_offsets, sequence_bounds, slots_left_over, spare_rows
from .._jit.masks import mask_scores
from .._jit.paging import decode_float8, find_keys, key_pointers, pages_of_keys
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
    store_piece,
)
from .._jit.workarounds import dot_in_ifs, fence_copies, in_vectors, multiple_of
from ..merge.kernel import launch_merge
from ..merge.splits import choose_num_splits
from .configs import MlaDecodeCase, MlaDecodeConfig
from .hopper import launch_mla_decode_hopper, plan_hopper
from .projections import launch_absorb, launch_merge_project

# A new length must not mean a new compilation.
LENGTHS = ["seqlen_q", "seqlen_k", "num_tiles", "num_splits", "num_sequences", "search_steps", "lse_stride"]
LENGTHS += [*INDICES, *LSE]


class LatentCache(NamedTuple):
    """One value for each of what a row of a latent cache holds: the latent vector, its fp8 scales, the rotary key."""

    latents: object
    scales: object  # None but in an fp8 cache
    rope_keys: object


class Pages(NamedTuple):
    """Pages of one part of a latent cache; without a block table a sequence is a page."""

    ptr: object
    page_stride: int


class AbsorbedTile(NamedTuple):
    """What `_mla_absorbed_kernel` is compiled for."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_HEADS: int
    KV_LORA_RANK: int
    PIECE_0: int  # columns of the two pieces of a latent vector; 0: there is no second one
    PIECE_1: int
    ROPE_HEAD_DIM: int  # 0: there is no rotary part
    PAGE_SIZE: int
    ONE_PAGE: bool  # a tile of keys lies in one page
    PAGES_AHEAD: bool  # page numbers are loaded a trip before their tile
    SLOT_STRIDES: LatentCache  # from one slot of a page to the next
    JOINED: bool  # rotary keys follow the latent vectors in one tensor
    FLOAT8: tuple | None  # (bits of mantissa, whether the GPU converts)
    SCALE_BLOCK: int  # elements that share an fp8 scale
    VECTOR: int  # divides the strides of q and q_pe
    VECTORS: LatentCache  # divide those of the cache's pages
    CUT_CHAIN: bool  # see `dot_in_if`
    SEARCH: bool  # programs find their sequence by bisection
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
    """Columns [START, START + BLOCK) of latent vectors; those of an fp8 row times their scales, in the given dtype."""
    tile = load_piece(ptrs, None, START, BLOCK, TILE.KV_LORA_RANK)
    if TILE.FLOAT8 is None:
        return tile
    else:
        SCALE_BLOCK: tl.constexpr = TILE.SCALE_BLOCK
        BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        scales = tl.load(scale_ptrs + (START // SCALE_BLOCK + tl.arange(0, BLOCKS))[None, :])  # (BLOCK_N, BLOCKS)
        values = decode_float8(tile, TILE.FLOAT8[0], TILE.FLOAT8[1]).to(tl.float32)
        values = tl.reshape(values, (tile.shape[0], BLOCKS, SCALE_BLOCK)) * scales[:, :, None]
        return tl.reshape(values, tile.shape).to(dtype)


@triton.jit
def _load_latents(ptrs, scale_ptrs, dtype, TILE: tl.constexpr):
    """The latent vectors of the rows at ptrs (BLOCK_N, 1), (BLOCK_N, KV_LORA_RANK) in two pieces."""
    first = _load_latent_piece(ptrs, scale_ptrs, dtype, 0, TILE.PIECE_0, TILE)
    if TILE.PIECE_1 > 0:
        return first, _load_latent_piece(ptrs, scale_ptrs, dtype, TILE.PIECE_0, TILE.PIECE_1, TILE)
    else:
        return (first,)


@triton.jit
def _zeros(TILE: tl.constexpr):
    """(BLOCK_M, KV_LORA_RANK) in two pieces."""
    # In names of their own: Triton 3.6 takes no field of a constant in a list.
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
    """(pages of the tile of keys at start, what the next trip gets as `pages`).

    A load that waits for another one in its trip costs the pipeline a stage, so of three stages two hold tiles. Two
    stages hold one tile either way, and page numbers ahead would only take registers.
    """
    if TILE.PAGES_AHEAD:
        following = start + TILE.BLOCK_N
        return pages, pages_of_keys(table_ptr, following, end, TILE.BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)
    else:
        return pages_of_keys(table_ptr, start, end, TILE.BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE), pages


class Assignment(NamedTuple):
    """The tile, sequence and split of a program. `program` counts programs of a split, `num_sequences` those of all."""

    program: object
    tile: object
    sequence: object
    split: object
    num_sequences: object


@triton.jit
def _assign(seqs, num_tiles, num_splits, num_sequences, search_steps, TILE: tl.constexpr):
    """The Assignment of a program."""
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    if TILE.SEARCH:
        cu_seqlens_ptr = seqs.cu_seqlens_q_ptr
        sequence = find_sequence(cu_seqlens_ptr, num_sequences, search_steps, tile, TILE.NUM_HEADS, TILE.BLOCK_M, 1)
        first = tl.load(cu_seqlens_ptr + sequence) * TILE.NUM_HEADS // TILE.BLOCK_M + sequence
        return Assignment(tile, tile - first, sequence, split, num_sequences)
    else:
        sequence = tl.program_id(0) // num_tiles // num_splits
        num_sequences = tl.num_programs(0) // num_tiles // num_splits
        return Assignment(sequence * num_tiles + tile, tile, sequence, split, num_sequences)


@triton.jit
def _clear_spare(spare, out, lse_ptr, lse_stride, batch, HAS_OUT: tl.constexpr, TILE: tl.constexpr):
    """Store -inf in lse, and 0 in out if it HAS_OUT, of the Spare rows of a packed tensor."""
    heads = spare.rows % TILE.NUM_HEADS
    rows = spare.rows // TILE.NUM_HEADS
    ptrs = _lse_pointers(lse_ptr, lse_stride, batch, heads, rows, TILE.NUM_HEADS)
    tl.store(ptrs, float("-inf"), mask=spare.mask)
    if HAS_OUT:
        ptrs = out.ptr + row_offsets(0, rows, heads, out.strides)
        _store_output(ptrs[:, None], spare.mask, _zeros(TILE), TILE)


@triton.jit
def _add_rotary(s, q_pe, k_pe, TILE: tl.constexpr):
    """s and the scores of the rotary part, where there is one."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION  # Triton 3.6 takes no field that is a string as an argument
    if TILE.ROPE_HEAD_DIM > 0:
        return dot_transposed(q_pe, k_pe, PRECISION, s)
    else:
        return s


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
    seqlen_q,
    seqlen_k,
    num_tiles,
    num_splits,
    num_sequences,
    search_steps,
    scale_log2,
    window,
    TILE: tl.constexpr,
):
    """One program computes a tile of rows of out and lse, over one split of the keys of a sequence.

    A row is one head of one query. All heads share the latent vectors: a tile of them is loaded once, multiplied with
    the queries as keys and with the weights of the softmax as values. Grid: num_tiles * num_splits * batch, the
    tiles of a sequence side by side; with SEARCH num_tiles counts those of all, and is not multiplied with the batch.

    cache is a LatentCache of Pages. Without a block_table a page is the tensor's row of a sequence. lse is (num_splits,
    batch, NUM_HEADS, rows). seqlen_k is the most keys that a sequence has, or all rows of packed sequences, as seqlen_q
    is of queries. Of rows after the last sequence lse is stored, and out where a user may read it: with a block_table.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    NUM_HEADS: tl.constexpr = TILE.NUM_HEADS
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    PACKED: tl.constexpr = seqs.cu_seqlens_q_ptr is not None
    own = _assign(seqs, num_tiles, num_splits, num_sequences, search_steps, TILE)
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
    queries = rows // NUM_HEADS
    heads = rows % NUM_HEADS
    positions = queries + first_position
    start = tile * BLOCK_M // NUM_HEADS + first_position
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // NUM_HEADS + 1, bounds.seqlen_q) + first_position
    blocks = split_blocks(visible_range(start, end, seqlen_k, window, BLOCK_N, BLOCK_N), split, num_splits, BLOCK_N)

    sequence = (sequence * 0 if PACKED else sequence).to(tl.int64)
    q = in_vectors(q, TILE.VECTOR)
    q_pe = in_vectors(q_pe, TILE.VECTOR)
    q_ptrs = q.ptr + row_offsets(sequence, first_q + queries, heads, q.strides)[:, None]
    q_tile = _load_queries(q_ptrs, rows_mask, TILE)  # (BLOCK_M, KV_LORA_RANK)
    if TILE.ROPE_HEAD_DIM > 0:
        q_ptrs = q_pe.ptr + row_offsets(sequence, first_q + queries, heads, q_pe.strides)[:, None]
        q_pe_tile = load_tile(q_ptrs, rows_mask, TILE.ROPE_HEAD_DIM)  # (BLOCK_M, ROPE_HEAD_DIM)
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

    m_i, l_i = softmax_init(None, heads, BLOCK_M)
    acc = _zeros(TILE)
    for start_n in tl.range(blocks.lo, blocks.hi, BLOCK_N):
        own_pages = None
        if block_table_ptr is not None:  # a loop cannot carry None
            own_pages, pages = _take_pages(pages, block_table_ptr, start_n, blocks.hi, TILE)
        keys = find_keys(own_pages, start_n, blocks.hi, BLOCK_N, TILE.PAGE_SIZE, TILE.ONE_PAGE)
        latent_ptrs = key_pointers(latents, SLOTS.latents, keys, TILE.ONE_PAGE)
        scale_ptrs = None
        if TILE.FLOAT8 is not None:
            scale_ptrs = key_pointers(cache.scales, SLOTS.scales, keys, TILE.ONE_PAGE)
        k = _load_latents(latent_ptrs, scale_ptrs, q_tile[0].dtype, TILE)  # (BLOCK_N, KV_LORA_RANK)
        if TILE.ROPE_HEAD_DIM > 0:
            rope_ptrs = key_pointers(rope_keys, SLOTS.rope_keys, keys, TILE.ONE_PAGE)
            k_pe = cast_tile(load_tile(rope_ptrs, None, TILE.ROPE_HEAD_DIM), q_pe_tile[0].dtype)
        if BLOCK_M >= 64:
            fence_copies()

        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TILE.CUT_CHAIN:
            s = dot_in_ifs(q_tile, k, s, start_n, blocks, PRECISION)
            if start_n < blocks.full_hi:
                s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            else:
                s = _add_rotary(s, q_pe_tile, k_pe, TILE)
                s = mask_scores(s, positions, start_n, seqlen_k, 0, window)
        else:
            s = dot_transposed(q_tile, k, PRECISION, s)
            s = _add_rotary(s, q_pe_tile, k_pe, TILE)
            if start_n >= blocks.full_hi:
                s = mask_scores(s, positions, start_n, seqlen_k, 0, window)
        p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, True)
        acc = dot_add(p.to(k[0].dtype), k, scale_rows(acc, alpha), PRECISION)  # (BLOCK_M, KV_LORA_RANK)

    norm, lse = softmax_finish(m_i, l_i)
    out_ptrs = out.ptr + row_offsets(sequence, first_q + queries, heads, out.strides)[:, None]
    _store_output(out_ptrs, rows_mask, scale_rows(acc, norm), TILE)
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
):
    """Launch the kernels of one call: absorption with w_uk, attention, and with w_uv or several splits the merge.

    lse is (batch, num_heads, seqlen_q) or None: not wanted. rope is (cos, sin, interleaved), cos None for none; config
    an MlaDecodeConfig (None: the default). rope_cache holds the rotary keys where latent_cache does not. queries is
    (cu_seqlens_q, max_seqlen_q) of packed tensors (total, ...). Nothing is read back.
    """
    cu_seqlens_q, max_seqlen_q = queries
    batch = cache_seqlens.shape[0]
    if q_nope.numel() == 0 or batch == 0:
        clear_outputs(out, lse)
        return
    if cu_seqlens_q is None:
        max_seqlen_q = q_nope.shape[1]
    else:
        q_nope, q_pe, out, lse = (None if x is None else x[None] for x in (q_nope, q_pe, out, lse))
    kv_lora_rank = q_nope.shape[3] if w_uk is None else w_uk.shape[2]
    if rope_cache is None:
        cache = latent_parts(latent_cache, kv_lora_rank, q_pe.shape[3])
    else:
        cache = latent_cache, None, rope_cache
    if w_uk is None:
        scale_log2 = softmax_scale * LOG2_E.value
    else:
        positions = cache_seqlens, capacity_of(latent_cache, block_table), *rope
        q_nope, q_pe = launch_absorb(q_nope, q_pe, w_uk, softmax_scale * LOG2_E.value, positions)
        scale_log2 = 1.0
    lengths = cu_seqlens_q, None, cache_seqlens, block_table, batch, max_seqlen_q, 0
    joined = rope_cache is None and latent_cache.dtype != torch.uint8
    _attend(q_nope, q_pe, cache, lengths, scale_log2, causal, w_uv, out, lse, num_splits, config, joined)


def launch_mla_absorbed(
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse, lengths, softmax_scale, causal, heads_each
):
    """Launch the kernels of a prefill, heads_each heads at a time: what is absorbed takes memory for those alone.

    Tensors are (batch, seqlen, ...) or packed (total, ...), lse (batch, num_heads, seqlen_q) or (num_heads, total_q);
    lengths is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), the first two None in a dense batch.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    batch = q_pe.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if q_pe.numel() == 0 or batch == 0:
        clear_outputs(out, lse)
        return
    if cu_seqlens_q is not None:
        q_nope, q_pe, kv_latent, k_pe, out, lse = (
            None if x is None else x[None] for x in (q_nope, q_pe, kv_latent, k_pe, out, lse)
        )
    lengths = cu_seqlens_q, cu_seqlens_k, None, None, batch, max_seqlen_q, max_seqlen_k
    for first in range(0, q_pe.shape[2], heads_each):
        heads = slice(first, first + heads_each)
        q, q_rope = launch_absorb(q_nope[:, :, heads], q_pe[:, :, heads], w_uk[heads], softmax_scale * LOG2_E.value)
        cache, lse_here = (kv_latent, None, k_pe), None if lse is None else lse[:, heads]
        _attend(q, q_rope, cache, lengths, 1.0, causal, w_uv[heads], out[:, :, heads], lse_here, num_splits=1)


def _attend(q, q_pe, cache, lengths, scale_log2, causal, w_uv, out, lse, num_splits=0, config=None, joined=False):
    """Attention of absorbed queries (batch, seqlen_q, num_heads, dim), and what follows it.

    cache is (latent vectors, scales, rotary keys); lengths is (cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table,
    batch, max_seqlen_q, max_seqlen_k), None for what there is not. joined: rotary keys follow the latent vectors in one
    tensor.
    """
    cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, batch, max_seqlen_q, max_seqlen_k = lengths
    latents, _, rope_keys = cache
    arch = arch_of(q)
    hopper = None
    if gpu_of(arch).wgmma and config is None and joined and cu_seqlens_q is None:
        hopper = _plan_for_hopper(q, q_pe, latents, rope_keys, block_table, causal, num_splits)
    if hopper is not None:
        _, num_splits, *_ = hopper
        parts, lse_parts = _results(q, out, lse, w_uv, num_splits)
        launch_mla_decode_hopper(
            hopper, q, q_pe, latents, rope_keys, parts, lse_parts, cache_seqlens, block_table, max_seqlen_q, scale_log2
        )
        _finish(parts, lse_parts, w_uv, out, lse)
        return
    num_programs, num_splits, constants = _plan(
        layout_of(q, q_pe, *(x for x in cache if x is not None)),
        q.dtype,
        latents.dtype,
        latents.data_ptr() % 16 == 0 and rope_keys.data_ptr() % 16 == 0,
        None if block_table is None else block_table.shape[1],
        batch,
        max_seqlen_q,
        max_seqlen_k,
        num_splits,
        arch,
        input_precision(q.dtype, arch),
        count_sms(q.device, arch),
        config,
        joined,
        cu_seqlens_q is not None,
    )
    parts, lse_parts = _results(q, out, lse, w_uv, num_splits)
    split_stride, *strides, _ = parts.stride()
    args = (
        View(q, Strides(*q.stride()[:3])),
        View(q_pe, Strides(*q_pe.stride()[:3])),
        LatentCache(*(None if x is None else Pages(x, x.stride(0)) for x in cache)),
        View(parts, Strides(*strides)),
        split_stride,
        lse_parts,
        lse_parts.stride(-2),
        cache_seqlens,
        block_table,
        None if block_table is None else block_table.stride(0),
        Sequences(cu_seqlens_q, cu_seqlens_k),
        q.shape[1],
        latents.shape[1] if block_table is None else capacity_of(latents, block_table),
        num_programs if constants["TILE"].SEARCH else num_programs // batch,
        num_splits,
        batch,
        batch.bit_length(),
        scale_log2,
        Window(None, 0 if causal else None),
    )
    launch_packed(_mla_absorbed_kernel, (num_programs * num_splits,), q.device, args, constants)
    _finish(parts, lse_parts, w_uv, out, lse)


def _results(q, out, lse, w_uv, num_splits):
    """Where the splits' outputs go, (splits, batch, seqlen_q, num_heads, dim), and their log-sum-exp (splits, batch,
    num_heads, seqlen_q)."""
    batch, seqlen_q, num_heads, _ = q.shape
    lse_shape = num_splits, batch, num_heads, seqlen_q
    if num_splits > 1 or w_uv is not None:
        # The sum of one split is rounded before the projection in any case.
        dtype = torch.float32 if num_splits > 1 else out.dtype
        parts = out.new_empty((num_splits, *q.shape), dtype=dtype)
        return parts, out.new_empty(lse_shape, dtype=torch.float32)
    # Without a place for the log-sum-exp the compiler makes wgmma wait for each other.
    return out[None], out.new_empty(lse_shape, dtype=torch.float32) if lse is None else lse[None]


def _finish(parts, lse_parts, w_uv, out, lse):
    """Out and lse of the splits', where those are not yet it."""
    if w_uv is not None:
        launch_merge_project(parts, lse_parts, w_uv, out, lse)
    elif parts.shape[0] > 1:
        launch_merge(parts, lse_parts, out, lse)


def _plan_for_hopper(q, q_pe, latents, rope_keys, block_table, causal, num_splits):
    """That of hopper.py's kernel where it serves the call and is wanted, else None."""
    wanted = wanted_kernels()
    if wanted == "portable" or any(x.data_ptr() % 16 for x in (q, q_pe, latents, rope_keys)):
        return None
    layout, num_sms = layout_of(q, q_pe, latents), count_sms(q.device, arch_of(q))
    return plan_hopper(layout, q.dtype, latents.dtype, block_table.shape[1], causal, num_splits, num_sms, wanted)


@remember
def _plan(
    layout,
    dtype,
    cache_dtype,
    bases_aligned,
    table_width,
    batch,
    max_seqlen_q,
    max_seqlen_k,
    num_splits,
    arch,
    precision,
    num_sms,
    config,
    joined,
    packed,
):
    """(programs of a split, splits, constants of the kernel): what follows from layouts and options alone."""
    (shape_q, strides_q), (shape_pe, strides_pe), *cache = layout
    num_heads, kv_lora_rank = shape_q[2:]
    if shape_pe[3] == 0:  # strides of nothing
        strides_pe, cache[-1] = strides_q, cache[0]
    is_fp8 = cache_dtype == torch.uint8
    paged = table_width is not None
    page_size = cache[0][0][1]
    rows = [strides[1] for _, strides in cache]
    # Latent vectors and rotary keys in vectors of 16 bytes: rows and pages of both are multiples of it.
    sizes = (cache_dtype.itemsize, torch.float32.itemsize, torch.bfloat16.itemsize) if is_fp8 else (dtype.itemsize,) * 2
    aligned = bases_aligned and all(
        stride * size % 16 == 0 for (_, strides), size in zip(cache, sizes) for stride in strides[:2]
    )
    num_rows = max_seqlen_q * num_heads
    seqlen_k = table_width * page_size if paged else max_seqlen_k
    case = MlaDecodeCase(arch, dtype, kv_lora_rank, shape_pe[3], num_rows, is_fp8, paged, seqlen_k, page_size)
    tiles = config or choose(MlaDecodeConfig, case)
    num_programs = batch * tiles_each(num_rows, shape_q[1] * num_heads, batch, tiles.block_m)
    num_searched = shape_q[1] * num_heads // tiles.block_m + batch
    search = packed and paged and num_searched < num_programs
    num_programs = num_searched if search else num_programs
    num_key_tiles = -(-seqlen_k // tiles.block_n)
    one_page = paged and page_size % tiles.block_n == 0
    cut_chain = repeats_chains(arch, tiles.block_m, tiles.num_warps)
    widest = 512 if cut_chain and one_page else 256  # in two pieces fewer registers are live
    tile = AbsorbedTile(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        PIECE_0=piece_0(kv_lora_rank, widest),
        PIECE_1=piece_1(kv_lora_rank, widest),
        ROPE_HEAD_DIM=shape_pe[3],
        PAGE_SIZE=page_size if paged else 1,
        ONE_PAGE=one_page,
        PAGES_AHEAD=tiles.num_stages > 2,
        SLOT_STRIDES=LatentCache(*rows) if is_fp8 else LatentCache(rows[0], None, rows[1]),
        JOINED=joined,
        FLOAT8=(3, 3 in gpu_of(arch).native_fp8) if is_fp8 else None,
        SCALE_BLOCK=SCALE_BLOCK,
        VECTOR=vector_elements(dtype.itemsize, strides_q, strides_pe),
        VECTORS=LatentCache(16 // sizes[0], None, 16 // sizes[-1]) if aligned else LatentCache(1, None, 1),
        CUT_CHAIN=cut_chain,
        SEARCH=search,
        INPUT_PRECISION=precision,
    )
    constants = dict(TILE=tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    num_slots = num_sms * tiles.programs_per_sm(is_fp8)
    return num_programs, num_splits or choose_num_splits(num_programs, num_key_tiles, num_slots), constants
