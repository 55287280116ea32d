"""Kernel that reads the tokens of a batch from the pages of a cache into packed tensors, and its launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.checks import QUANTIZED_BITS
from ..._host.device import arch_of, launch
from ..._host.gpu import gpu_of
from ..._host.latent import SCALE_BLOCK, latent_parts
from ..._host.layout import INDICES
from ..._host.tuned import remember
from ..._jit.args import Strides, View, scales_of
from ..._jit.decode import decode
from ..._jit.heads import find_sequence, row_offsets
from ..._jit.paging import Cached, load_token_scales

TILE_ELEMENTS = 2048


class Part(NamedTuple):
    """Rows of a cache, where they go, and their factors: of all tokens a Scale, of each a View, of blocks of a row."""

    cache: View  # of slots in pages
    pack_stride: int
    out: View
    scale: object
    token_scales: object
    block_scales_ptr: object


class PartTile(NamedTuple):
    """What a Part is compiled for: rows of HEAD_DIM elements in tiles of BLOCK_D."""

    HEAD_DIM: int
    BLOCK_D: int
    PACK: int  # elements that lie together, beside those of the next slot, pack_stride from the next ones; 0: all do
    MANTISSA_BITS: int  # of an fp8 cache, held as uint8, or int8; otherwise 0
    SCALE_BLOCK: int  # elements that share a scale of their row
    NUM_STRIDE_BYTES: int  # strides of slots count bytes, of which an element has so many; 0: they count elements
    NATIVE_FLOAT8: bool  # the GPU converts fp8


@triton.jit
def _load_rows(part, offsets, is_there, TILE: tl.constexpr):
    """A tile (tokens, BLOCK_D) of a cache; 0 where no token is."""
    offs_d = tl.arange(0, TILE.BLOCK_D)
    if TILE.PACK == 1:  # slots follow each other
        mask = (offs_d < TILE.HEAD_DIM)[:, None] & is_there[None, :]
        ptrs = part.cache.ptr + (offs_d.to(tl.int64) * part.pack_stride)[:, None] + offsets[None, :]
        return tl.trans(tl.load(ptrs, mask=mask, other=0))
    else:
        columns = offs_d
        if TILE.PACK > 1:
            columns = offs_d // TILE.PACK * part.pack_stride + offs_d % TILE.PACK
        mask = is_there[:, None] & (offs_d < TILE.HEAD_DIM)[None, :]
        return tl.load(part.cache.ptr + offsets[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def _gather_rows(part, cached, head, tokens, is_there, is_row, TILE: tl.constexpr):
    """Store the rows of tokens: what is cached, in the dtype of the output, and 0 where no token is."""
    page_stride, slot_stride, head_stride = part.cache.strides
    if TILE.PACK > 0:
        slot_stride = TILE.PACK
    offsets = cached.outer * page_stride + cached.slot * slot_stride + head.to(tl.int64) * head_stride  # (tokens,)
    row_starts = offsets
    if TILE.NUM_STRIDE_BYTES > 0:
        offsets = offsets // TILE.NUM_STRIDE_BYTES
    x = _load_rows(part, offsets, is_there, TILE)
    if TILE.MANTISSA_BITS > 0:
        x = decode(x, TILE.MANTISSA_BITS, TILE.NATIVE_FLOAT8, tl.float16)  # exact
    if TILE.SCALE_BLOCK > 0:
        NUM_BLOCKS: tl.constexpr = TILE.BLOCK_D // TILE.SCALE_BLOCK
        offs_s = tl.arange(0, NUM_BLOCKS)
        mask = is_there[:, None] & (offs_s < TILE.HEAD_DIM // TILE.SCALE_BLOCK)[None, :]
        scales = tl.load(part.block_scales_ptr + (row_starts // 4)[:, None] + offs_s[None, :], mask=mask, other=0.0)
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


def launch_gather_kv_cache(k_cache, v_cache, places, k_scale, v_scale, out):
    """Launch the kernel for keys and values: one launch, no device-to-host sync.

    k_cache is (num_pages, page_size, heads, head_dim) or (num_pages, page_size, heads, head_dim / x, x), v_cache
    (num_pages, page_size, heads, head_dim_v), of any stride of the last dimension. places are cu_seqlens_k, block_table
    and seq_starts. out are k and v.
    """
    layout = (k_cache.shape, k_cache.stride(), out[0].stride()), (v_cache.shape, v_cache.stride(), out[1].stride())
    plan = _plan(layout, (0, 0), QUANTIZED_BITS.get(k_cache.dtype, 0), arch_of(k_cache))
    scales = scales_of(k_scale, v_scale)
    factors = (scales.k, scales.k_tokens, None), (scales.v, scales.v_tokens, None)
    _launch(plan, (k_cache, v_cache), factors, places, out)


def launch_gather_latent_cache(latent_cache, places, k_scale, k_pe_scale, out):
    """The same for latent vectors and rotary keys, which out are."""
    sizes = out[0].shape[-1], out[1].shape[-1]
    latents, block_scales, rope_keys = latent_parts(latent_cache, *sizes)
    has_scales, elements = block_scales is not None, latent_cache.element_size()
    # All strides are those of the rows: so the compiler knows what the others are multiples of.
    pages, strides = latent_cache.shape[:2], (*latents.stride()[:2], 0, 1)
    layout = tuple([((*pages, 1, x.shape[1]), strides, (x.stride()[0], 0)) for x in out])
    bits = QUANTIZED_BITS.get(torch.float8_e4m3fn if has_scales else latent_cache.dtype, 0)
    plan = _plan(layout, (0, rope_keys.element_size() // elements if has_scales else 0), bits, arch_of(latent_cache))
    scales = scales_of(k_scale, k_scale if k_pe_scale is None else k_pe_scale)
    factors = (scales.k, None, block_scales), (scales.v, None, None)
    _launch(plan, (latents, rope_keys), factors, places, out)


def _launch(plan, caches, factors, places, out):
    cu_seqlens, block_table, seq_starts = places
    num_tokens, constants = out[0].shape[0], plan.constants
    num_programs = -(-num_tokens // constants["BLOCK_T"]) * constants["NUM_HEADS"]
    if num_programs == 0:
        return
    (num_pages, page_size, *_), (batch, width) = caches[0].shape, block_table.shape
    if batch * width * num_pages * page_size == 0:
        for x in out:
            x.zero_()
        return
    parts = []
    for cache, x, own, (strides, out_strides, pack_stride) in zip(caches, out, factors, plan.strides):
        if cache.itemsize == 1 and cache.dtype != torch.int8:  # bytes: not every GPU has the dtypes of fp8
            cache = cache.view(torch.uint8)
        parts.append(Part(View(cache, strides), pack_stride, View(x, out_strides), *own))
    counts = batch, batch.bit_length(), width, num_pages, num_tokens
    args = (*parts, cu_seqlens, seq_starts, block_table, block_table.stride(0), *counts)
    launch(_gather_cache_kernel, (num_programs,), caches[0].device, args, constants)


class Plan(NamedTuple):
    """A launch but for its tensors and the number of tokens."""

    strides: tuple  # of both caches: (Strides, those of the output, pack_stride)
    constants: dict


@remember
def _plan(layout, stride_bytes, mantissa_bits, arch):
    """The Plan of a launch; layout is (shape, strides, strides of the output) of both caches. With stride_bytes above
    0, a part's strides count bytes, and its elements have so many: the second part of rows with scales, which is not
    quantized."""
    (_, page_size, num_heads, *_), *_ = layout[0]
    tiles = []
    for (shape, strides, _), num_bytes in zip(layout, stride_bytes):
        head_dim = shape[3] * (shape[4] if len(shape) == 5 else 1)
        bits = 0 if num_bytes else mantissa_bits
        tiles.append(
            PartTile(
                HEAD_DIM=head_dim,
                BLOCK_D=triton.next_power_of_2(max(1, head_dim)),
                PACK=shape[4] if len(shape) == 5 else int(head_dim > 1 and strides[3] != 1),
                MANTISSA_BITS=bits,
                SCALE_BLOCK=0,
                NUM_STRIDE_BYTES=num_bytes,
                NATIVE_FLOAT8=bits in gpu_of(arch).native_fp8,
            )
        )
    if any(stride_bytes):
        tiles[0] = tiles[0]._replace(SCALE_BLOCK=SCALE_BLOCK)
    first, second = tiles
    constants = dict(
        BLOCK_T=max(1, TILE_ELEMENTS // max(first.BLOCK_D, second.BLOCK_D)),
        NUM_HEADS=num_heads,
        PAGE_SIZE=page_size,
        FIRST=first,
        SECOND=second,
        num_warps=4,
    )
    strides = [
        (Strides(*own[:3]), Strides(0, *of_out[:2]), own[3] if tile.PACK > 0 else 0)
        for (_, own, of_out), tile in zip(layout, tiles)
    ]
    return Plan(tuple(strides), constants)
