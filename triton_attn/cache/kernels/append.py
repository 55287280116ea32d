"""Kernel that scatters new keys and values into the slots of a paged cache, and its launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.checks import FLOAT8_MANTISSA_BITS, QUANTIZED_BITS
from ..._host.device import launch
from ..._host.layout import INDICES, without_dim
from ..._host.tuned import remember
from ..._jit.args import Strides, View, scales_of
from ..._jit.heads import row_offsets
from ..._jit.rope import Rope, Rotation, load_rotated

TILE_ELEMENTS = 4096
LEAST_SCALE: tl.constexpr = tl.constexpr(1e-6)


class Tile(NamedTuple):
    """What a kernel is compiled for: BLOCK_ROWS rows of BLOCK_D elements, and what they are."""

    BLOCK_ROWS: int
    BLOCK_D: int
    NUM_HEADS: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    ROTARY_DIM: int  # 0: nothing is rotated
    INTERLEAVED: bool
    PAGE_SIZE: int
    MANTISSA_BITS: int  # of an fp8 cache, held as uint8, or int8; otherwise 0


@triton.jit
def encode_float8(x, MANTISSA_BITS: tl.constexpr):
    """Bits of fp32 x in e4m3 (3 bits of mantissa) or e5m2 (2): nearest even, at most the largest number, NaN kept.

    In integers, because GPUs and compilers differ in which fp8 conversions they have and how those round.
    """
    LIMIT: tl.constexpr = 448.0 if MANTISSA_BITS == 3 else 57344.0
    BIAS: tl.constexpr = (1 << (6 - MANTISSA_BITS)) - 1
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    # The fp32 number whose last bit is worth the smallest fp8 number: adding it rounds a subnormal.
    ROUNDER_EXPONENT: tl.constexpr = 24 - BIAS - MANTISSA_BITS
    ROUNDER_BITS: tl.constexpr = (127 + ROUNDER_EXPONENT) << 23
    magnitude = tl.minimum(tl.abs(x), LIMIT)
    bits = magnitude.to(tl.int32, bitcast=True)
    odd = (bits >> DROPPED) & 1
    normal = ((bits + ((1 << (DROPPED - 1)) - 1) + odd) >> DROPPED) - ((127 - BIAS) << MANTISSA_BITS)
    subnormal = (magnitude + 2.0**ROUNDER_EXPONENT).to(tl.int32, bitcast=True) - ROUNDER_BITS
    code = tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (sign | code).to(tl.uint8)


@triton.jit
def _encode_int8(x):
    """fp32 x to the nearest int8, ties to the even one; NaN to 0."""
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -128.0), 127.0)
    # The last bit of 1.5 * 2^23 is worth 1: the sum is rounded to an integer, whose byte is the lowest one.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


class Rows(NamedTuple):
    """Where rows go, and which are written."""

    slots: object
    heads: object
    written: object


@triton.jit
def _offsets_of(rows, strides, TILE: tl.constexpr):
    """Offsets of Rows in a cache with these strides."""
    return row_offsets(rows.slots // TILE.PAGE_SIZE, rows.slots % TILE.PAGE_SIZE, rows.heads, strides)


@triton.jit
def _store_scales(x, scales, rows, TILE: tl.constexpr):
    """Store and return the scales of rows, (BLOCK_ROWS,): with them the largest element is that of the dtype. Infinity
    or NaN in a row gives infinity, so that all of it reads as NaN."""
    LARGEST: tl.constexpr = 127.0 if TILE.MANTISSA_BITS == 7 else 448.0 if TILE.MANTISSA_BITS == 3 else 57344.0
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)
    factors = tl.maximum(tl.math.div_rn(amax, LARGEST), LEAST_SCALE)
    tl.store(scales.ptr + _offsets_of(rows, scales.strides, TILE), factors, mask=rows.written)
    return factors


@triton.jit
def _store_rows(x, cache, scale, token_scales, rows, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Store Rows of fp32 x (BLOCK_ROWS, BLOCK_D), divided by the scale or by their own, which are stored too."""
    if token_scales is not None:
        x = tl.math.div_rn(x, _store_scales(x, token_scales, rows, TILE)[:, None])
    elif scale is not None:
        factor = scale.value
        if factor.dtype.is_ptr():
            factor = tl.load(scale.value + rows.heads * scale.head_stride)[:, None]
        x = tl.math.div_rn(x, factor)
    if TILE.MANTISSA_BITS == 0:
        x = x.to(cache.ptr.dtype.element_ty)
    elif TILE.MANTISSA_BITS == 7:
        x = _encode_int8(x)
    else:
        x = encode_float8(x, TILE.MANTISSA_BITS)
    offs_d = tl.arange(0, TILE.BLOCK_D)[None, :]
    ptrs = cache.ptr + _offsets_of(rows, cache.strides, TILE)[:, None] + offs_d
    tl.store(ptrs, x, mask=rows.written[:, None] & (offs_d < HEAD_DIM))


@triton.jit(do_not_specialize=["num_positions", "num_slots", "num_tokens", *INDICES])
def _append_kv_cache_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping_ptr,
    positions_ptr,
    scales,
    rope,
    num_positions,
    num_slots,
    num_tokens,
    TILE: tl.constexpr,
):
    """One program writes BLOCK_ROWS rows of keys and of values; a row is one head of one token.

    Grid: num_tokens * NUM_HEADS / BLOCK_ROWS, rounded up. k, v and the caches are Views, of tokens and of
    slots in pages.
    """
    rows = tl.program_id(0).to(tl.int64) * TILE.BLOCK_ROWS + tl.arange(0, TILE.BLOCK_ROWS)
    tokens = rows // TILE.NUM_HEADS
    heads = rows % TILE.NUM_HEADS
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    written = (slots >= 0) & (slots < num_slots)  # (BLOCK_ROWS,)
    offs_d = tl.arange(0, TILE.BLOCK_D)

    positions = None
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + tokens, mask=written, other=0)
    rotation = Rotation(rope, positions, num_positions)
    k_rows = k.ptr + row_offsets(0, tokens, heads, k.strides)
    to = Rows(slots, heads, written)
    k_tile = load_rotated(k_rows, written, offs_d, rotation, TILE.HEAD_DIM, TILE.ROTARY_DIM, TILE.INTERLEAVED)
    _store_rows(k_tile, k_cache, scales.k, scales.k_tokens, to, TILE.HEAD_DIM, TILE)

    mask = written[:, None] & (offs_d < TILE.HEAD_DIM_V)[None, :]
    v_rows = v.ptr + row_offsets(0, tokens, heads, v.strides)
    v_tile = tl.load(v_rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_rows(v_tile, v_cache, scales.v, scales.v_tokens, to, TILE.HEAD_DIM_V, TILE)


class Plan(NamedTuple):
    """A launch but for its tensors and scales."""

    num_programs: int
    strides: tuple  # Strides of the Views that the kernel takes
    rope_strides: tuple  # of cos and sin, from position to position
    counts: tuple  # num_positions, num_slots, num_tokens
    is_float8: bool  # bytes: not every GPU has the dtypes of fp8
    constants: dict

    def launch(self, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rope_cos, rope_sin, positions, alike=None):
        """One launch, no device-to-host sync. Arguments as `append_kv_cache`, checked; alike as in `launch`."""
        if self.num_programs == 0:
            return
        if self.is_float8:
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        of_k, of_v, of_k_cache, of_v_cache = self.strides
        args = (
            View(k, of_k),
            View(v, of_v),
            View(k_cache, of_k_cache),
            View(v_cache, of_v_cache),
            slot_mapping,
            positions,
            scales_of(k_scale, v_scale),
            None if rope_cos is None else Rope(rope_cos, rope_sin, *self.rope_strides),
            *self.counts,
        )
        launch(_append_kv_cache_kernel, (self.num_programs,), k.device, args, self.constants, alike)


def plan_append_kv_cache(operands, interleaved):
    """The Plan of a launch; its operands are the arguments of `Plan.launch`."""
    k, v, k_cache, v_cache, *_, rope_cos, rope_sin, _ = operands
    layout = (k.shape, k.stride()), (v.shape, v.stride()), k_cache.shape, k_cache.stride(), v_cache.stride()
    rope = None if rope_cos is None else (rope_cos.shape, rope_cos.stride(0), rope_sin.stride(0))
    return _plan(layout, k_cache.dtype, rope, interleaved)


@remember
def _plan(layout, dtype, rope, interleaved):
    """The Plan; layout is (shape, strides) of k and v, the shape of k_cache, strides of the caches.

    rope is the shape of the tables and their strides, or None.
    """
    (shape_k, strides_k), (shape_v, strides_v), (num_pages, page_size, *_), *of_caches = layout
    num_tokens, num_heads, head_dim = shape_k
    (num_positions, half), *rope_strides = rope or ((0, 0),)
    block_d = triton.next_power_of_2(max(head_dim, shape_v[2]))
    tile = Tile(
        BLOCK_ROWS=max(1, TILE_ELEMENTS // block_d),
        BLOCK_D=block_d,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=shape_v[2],
        ROTARY_DIM=2 * half,
        INTERLEAVED=interleaved,
        PAGE_SIZE=page_size,
        MANTISSA_BITS=QUANTIZED_BITS.get(dtype, 0),
    )
    return Plan(
        num_programs=-(-num_tokens * num_heads // tile.BLOCK_ROWS),
        strides=tuple([Strides(*without_dim(strides)) for strides in (strides_k, strides_v, *of_caches)]),
        rope_strides=tuple(rope_strides),
        counts=(num_positions, num_pages * page_size, num_tokens),
        is_float8=dtype in FLOAT8_MANTISSA_BITS,
        constants=dict(TILE=tile, num_warps=4),
    )
