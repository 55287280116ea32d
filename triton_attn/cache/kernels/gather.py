"""Kernel that reads the tokens of a batch from the pages of a cache into packed tensors, and its launcher."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.checks import FLOAT8_MANTISSA_BITS, QUANTIZED_BITS
from ..._host.device import arch_of, kind_of_integer, launch
from ..._host.gpu import gpu_of
from ..._host.latent import SCALE_BLOCK, latent_row
from ..._host.layout import INDICES
from ..._host.tuned import remember
from ..._jit.args import Strides, View, scales_of
from ..._jit.decode import decode
from ..._jit.heads import find_sequence, row_offsets
from ..._jit.paging import Cached, load_token_scales

TILE_ELEMENTS = 2048


class Part(NamedTuple):
    """Rows of a cache, where they go, and their factors: of all tokens a Scale, of each a View."""

    cache: View  # of slots in pages
    pack_stride: int
    out: View
    scale: object
    token_scales: object


class PartTile(NamedTuple):
    """What a Part is compiled for: rows of HEAD_DIM elements in tiles of BLOCK_D."""

    START: int  # the first element of a row, in elements of the cache
    HEAD_DIM: int
    BLOCK_D: int
    PACK: int  # elements that lie together, beside those of the next slot, pack_stride from the next ones; 0: all do
    MANTISSA_BITS: int  # of an fp8 cache, held as uint8, or int8; otherwise 0
    SCALE_BLOCK: int  # elements that share a scale of their row, which follow the elements
    BF16_IN_BYTES: bool  # elements of a uint8 cache that are bf16
    NATIVE_FLOAT8: bool  # the GPU converts fp8


@triton.jit
def _load_rows(part, ptr, offsets, is_there, TILE: tl.constexpr):
    """A tile (tokens, BLOCK_D) of the Part of a cache from ptr on; 0 where no token is."""
    offs_d = tl.arange(0, TILE.BLOCK_D)
    if TILE.PACK == 1:  # slots follow each other
        mask = (offs_d < TILE.HEAD_DIM)[:, None] & is_there[None, :]
        ptrs = ptr + (offs_d.to(tl.int64) * part.pack_stride)[:, None] + offsets[None, :]
        return tl.trans(tl.load(ptrs, mask=mask, other=0))
    else:
        columns = offs_d
        if TILE.PACK > 1:
            columns = offs_d // TILE.PACK * part.pack_stride + offs_d % TILE.PACK
        mask = is_there[:, None] & (offs_d < TILE.HEAD_DIM)[None, :]
        return tl.load(ptr + offsets[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def _gather_rows(part, cached, head, tokens, is_there, is_row, TILE: tl.constexpr):
    """Store the rows of tokens: what is cached, in the dtype of the output, and 0 where no token is."""
    page_stride, slot_stride, head_stride = part.cache.strides
    if TILE.PACK > 0:
        slot_stride = TILE.PACK
    offsets = cached.outer * page_stride + cached.slot * slot_stride + head.to(tl.int64) * head_stride  # (tokens,)
    ptr = part.cache.ptr + TILE.START
    if TILE.BF16_IN_BYTES:
        x = _load_rows(part, ptr.to(tl.pointer_type(tl.bfloat16)), offsets // 2, is_there, TILE)
    else:
        x = _load_rows(part, ptr, offsets, is_there, TILE)
    if TILE.MANTISSA_BITS > 0:
        x = decode(x, TILE.MANTISSA_BITS, TILE.NATIVE_FLOAT8, tl.float16)  # exact
    if TILE.SCALE_BLOCK > 0:
        NUM_BLOCKS: tl.constexpr = TILE.BLOCK_D // TILE.SCALE_BLOCK
        offs_s = tl.arange(0, NUM_BLOCKS)
        mask = is_there[:, None] & (offs_s < TILE.HEAD_DIM // TILE.SCALE_BLOCK)[None, :]
        scales_ptr = (ptr + TILE.HEAD_DIM).to(tl.pointer_type(tl.float32))
        scales = tl.load(scales_ptr + (offsets // 4)[:, None] + offs_s[None, :], mask=mask, other=0.0)
        blocks = tl.reshape(x.to(tl.float32), (x.shape[0], NUM_BLOCKS, TILE.SCALE_BLOCK))
        x = tl.reshape(blocks * scales[:, :, None], (x.shape[0], TILE.BLOCK_D))
    if part.token_scales is not None:
        x = x.to(tl.float32) * load_token_scales(part.token_scales, cached, is_there, head)[:, None]
    elif part.scale is not None:
        factor = part.scale.value
        if factor.dtype.is_ptr():
            factor = tl.load(factor + head * part.scale.head_stride)
        x = x.to(tl.float32) * factor
    dtype: tl.constexpr = part.out.ptr.dtype.element_ty
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)
    offs_d = tl.arange(0, TILE.BLOCK_D)
    ptrs = part.out.ptr + row_offsets(0, tokens, head, part.out.strides)[:, None] + offs_d[None, :]
    tl.store(ptrs, x, mask=is_row[:, None] & (offs_d < TILE.HEAD_DIM)[None, :])


LENGTHS = ["cu_seqlens_ptr", "seq_starts_ptr", "batch", "search_steps", "table_width", "num_pages", "num_tokens"]


@triton.jit(do_not_specialize=[*LENGTHS, *INDICES])
def _gather_cache_kernel(
    first,
    second,
    cu_seqlens_ptr,
    seq_starts_ptr,
    block_table_ptr,
    table_stride,
    batch,
    search_steps,
    table_width,
    num_pages,
    num_tokens,
    BLOCK_T: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One program reads one head of BLOCK_T tokens of both Parts: keys and values, or latent vectors and rotary keys.

    Grid: heads * num_tokens / BLOCK_T, rounded up. Which sequence a token belongs to is found by bisection.
    """
    head = tl.program_id(0) % NUM_HEADS
    tokens = tl.program_id(0) // NUM_HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = tokens < num_tokens
    sequence = find_sequence(cu_seqlens_ptr, batch, search_steps, tokens, 1, 1, 0)
    position = tokens - tl.load(cu_seqlens_ptr + sequence)
    is_there = is_row & (position >= 0) & (tokens < tl.load(cu_seqlens_ptr + sequence + 1))
    if seq_starts_ptr is not None:
        position += tl.load(seq_starts_ptr + sequence)
    column = position // PAGE_SIZE
    is_there &= (position >= 0) & (column < table_width)
    entries = block_table_ptr + sequence.to(tl.int64) * table_stride + column
    page = tl.load(entries, mask=is_there, other=-1)
    is_there &= (page >= 0) & (page < num_pages)
    cached = Cached(page.to(tl.int64), (position % PAGE_SIZE).to(tl.int64))
    tokens = tokens.to(tl.int64)
    _gather_rows(first, cached, head, tokens, is_there, is_row, FIRST)
    if SECOND.HEAD_DIM > 0:
        _gather_rows(second, cached, head, tokens, is_there, is_row, SECOND)


class Plan(NamedTuple):
    """A launch but for its tensors, its scales and the number of tokens."""

    arch: str
    rows: tuple  # shapes of a token's rows of both results
    strides: tuple  # of each Part Strides, pack_stride, Strides of the output
    counts: tuple  # batch, search_steps, table_width, num_pages
    table_stride: int
    is_empty: bool  # there is no page
    is_float8: bool  # bytes: not every GPU has the dtypes of fp8
    constants: dict

    def is_for(self, cache):
        """Whether it is for the GPU of a cache: CPU tensors may stand for those of any."""
        return self.arch == arch_of(cache)

    def launch(self, caches, places, scales, out, alike=None):
        """One launch, no device-to-host sync. caches are those of the keys and values, or the latent cache twice;
        places are cu_seqlens_k, block_table and seq_starts, scales those of both caches, out both results. alike: as in
        `launch`, but the number of tokens may differ."""
        num_tokens, constants = out[0].shape[0], self.constants
        num_programs = -(-num_tokens // constants["BLOCK_T"]) * constants["NUM_HEADS"]
        if num_programs == 0:
            return
        if self.is_empty:
            for x in out:
                x.zero_()
            return
        first, second = caches
        if self.is_float8:
            first, second = first.view(torch.uint8), second.view(torch.uint8)
        cu_seqlens, block_table, seq_starts = places
        k_scale, v_scale, k_tokens, v_tokens = scales_of(*scales)
        of_first, pack_first, of_first_out, of_second, pack_second, of_second_out = self.strides
        args = (
            Part(View(first, of_first), pack_first, View(out[0], of_first_out), k_scale, k_tokens),
            Part(View(second, of_second), pack_second, View(out[1], of_second_out), v_scale, v_tokens),
            cu_seqlens,
            seq_starts,
            block_table,
            self.table_stride,
            *self.counts,
            num_tokens,
        )
        if alike is not None:
            alike = alike, kind_of_integer(num_tokens)
        launch(_gather_cache_kernel, (num_programs,), cu_seqlens.device, args, constants, alike)


def plan_gather_kv_cache(k_cache, v_cache, block_table, out):
    """The Plan of a launch for keys and values.

    k_cache is (num_pages, page_size, heads, head_dim) or (num_pages, page_size, heads, head_dim / x, x), v_cache
    (num_pages, page_size, heads, head_dim_v), of any stride of the last dimension.
    """
    layouts = tuple([(x.shape, x.stride(), y.stride()) for x, y in zip((k_cache, v_cache), out)])
    return _plan(layouts, None, k_cache.dtype, (block_table.shape, block_table.stride(0)), arch_of(k_cache))


def plan_gather_latent_cache(latent_cache, block_table, out):
    """The Plan of a launch for latent vectors and rotary keys, which out are."""
    shape, strides = latent_cache.shape, latent_cache.stride()
    # Both parts have the strides of the rows: so the compiler knows what they are multiples of.
    layouts = tuple([((*shape[:2], 1, x.shape[1]), (*strides[:2], 0, 1), (x.stride(0), 0)) for x in out])
    sizes = out[0].shape[1], out[1].shape[1]
    table = block_table.shape, block_table.stride(0)
    return _plan(layouts, sizes, latent_cache.dtype, table, arch_of(latent_cache))


@remember
def _plan(layouts, latent_sizes, dtype, table, arch):
    """The Plan; layouts are (shape, strides, strides of the output) of both Parts, and table those of the block table.

    latent_sizes are kv_lora_rank and qk_rope_head_dim, or None of keys and values.
    """
    (num_pages, page_size, num_heads, *_), *_ = layouts[0]
    has_scales = dtype == torch.uint8
    starts, bits = (0, 0), QUANTIZED_BITS.get(dtype, 0)
    if has_scales:
        starts, bits = (0, latent_row(*latent_sizes)[1]), QUANTIZED_BITS[torch.float8_e4m3fn]
    elif latent_sizes is not None:
        starts = 0, latent_sizes[0]
    tiles, strides = [], []
    for i, (shape, own, of_out) in enumerate(layouts):
        head_dim, is_bf16 = math.prod(shape[3:]), has_scales and i == 1
        tile = PartTile(
            START=starts[i],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(max(1, head_dim)),
            PACK=shape[4] if len(shape) == 5 else int(head_dim > 1 and own[3] != 1),
            MANTISSA_BITS=0 if is_bf16 else bits,
            SCALE_BLOCK=SCALE_BLOCK if has_scales and i == 0 else 0,
            BF16_IN_BYTES=is_bf16,
            NATIVE_FLOAT8=not is_bf16 and bits in gpu_of(arch).native_fp8,
        )
        tiles.append(tile)
        strides += Strides(*own[:3]), own[3] if tile.PACK > 0 else 0, Strides(0, *of_out[:2])
    first, second = tiles
    (batch, width), table_stride = table
    return Plan(
        arch=arch,
        rows=tuple([(size,) for size in latent_sizes] if latent_sizes else [(num_heads, x.HEAD_DIM) for x in tiles]),
        strides=tuple(strides),
        counts=(batch, batch.bit_length(), width, num_pages),
        table_stride=table_stride,
        is_empty=batch * width * num_pages * page_size == 0,
        is_float8=dtype in FLOAT8_MANTISSA_BITS,
        constants=dict(
            BLOCK_T=max(1, TILE_ELEMENTS // max(first.BLOCK_D, second.BLOCK_D)),
            NUM_HEADS=num_heads,
            PAGE_SIZE=page_size,
            FIRST=first,
            SECOND=second,
            num_warps=4,
        ),
    )
