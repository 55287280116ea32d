"""Kernel that scatters new keys and values into the slots of a paged cache, and its launcher."""

import torch
import triton
import triton.language as tl

from ..._host.checks import FLOAT8_MANTISSA_BITS
from ..._host.device import launch
from ..._host.layout import INDICES, scale_stride
from ..._jit.rope import load_rotated

TILE_ELEMENTS = 4096


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
def _store_rows(
    x,
    cache_ptr,
    strides,
    scale,
    scale_stride,
    slots,
    heads,
    offs_d,
    mask,
    PAGE_SIZE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """Store rows of fp32 x in their slots, divided by the scale.

    The scale is None (1), a number with scale_stride None, or a pointer to one number or one per head. MANTISSA_BITS is
    0 unless the cache holds fp8, as uint8.
    """
    if scale is not None:
        if scale_stride is not None:
            scale = tl.load(scale + heads * scale_stride)[:, None]
        x = tl.math.div_rn(x, scale)
    x = encode_float8(x, MANTISSA_BITS) if MANTISSA_BITS > 0 else x.to(cache_ptr.dtype.element_ty)
    offsets = slots // PAGE_SIZE * strides[0] + slots % PAGE_SIZE * strides[1] + heads * strides[2]
    tl.store(cache_ptr + offsets[:, None] + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_positions", "num_slots", "num_tokens", *INDICES])
def _append_kv_cache_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    k_scale,
    v_scale,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    scale_strides,
    rope_strides,
    num_positions,
    num_slots,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_ROWS rows of keys and of values; a row is one head of one token.

    Grid: num_tokens * NUM_HEADS / BLOCK_ROWS, rounded up. Strides are (token, head) of k and v, (page, offset, head) of
    the caches, the head's of both scales, and the position's of cos and sin.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = rows // NUM_HEADS
    heads = rows % NUM_HEADS
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    written = (slots >= 0) & (slots < num_slots)
    offs_d = tl.arange(0, BLOCK_D)

    mask = written[:, None] & (offs_d < HEAD_DIM)[None, :]
    k_rows = k_ptr + (tokens * k_strides[0] + heads * k_strides[1])
    positions = None
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + tokens, mask=written, other=0)
    k = load_rotated(
        k_rows, offs_d, mask, positions, written, cos_ptr, sin_ptr, rope_strides, num_positions, ROTARY_DIM, INTERLEAVED
    )
    _store_rows(
        k,
        k_cache_ptr,
        k_cache_strides,
        k_scale,
        scale_strides[0],
        slots,
        heads,
        offs_d,
        mask,
        PAGE_SIZE,
        MANTISSA_BITS,
    )

    mask = written[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    v_rows = v_ptr + (tokens * v_strides[0] + heads * v_strides[1])[:, None]
    v = tl.load(v_rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_rows(
        v,
        v_cache_ptr,
        v_cache_strides,
        v_scale,
        scale_strides[1],
        slots,
        heads,
        offs_d,
        mask,
        PAGE_SIZE,
        MANTISSA_BITS,
    )


def launch_append_kv_cache(
    k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rope_cos, rope_sin, positions, rope_interleaved
):
    """Launch the append kernel: one launch, nothing read back. Arguments as `append_kv_cache`, checked."""
    num_tokens, num_heads, head_dim = k.shape
    head_dim_v = v.shape[-1]
    block_d = 1 << (max(head_dim, head_dim_v) - 1).bit_length()
    block_rows = max(1, TILE_ELEMENTS // block_d)
    num_programs = -(-num_tokens * num_heads // block_rows)
    if num_programs == 0:
        return
    dtype = k_cache.dtype
    if dtype in FLOAT8_MANTISSA_BITS:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    launch(
        _append_kv_cache_kernel,
        (num_programs,),
        k.device,
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        rope_cos,
        rope_sin,
        positions,
        k.stride()[:2],
        v.stride()[:2],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        (scale_stride(k_scale), scale_stride(v_scale)),
        None if rope_cos is None else (rope_cos.stride(0), rope_sin.stride(0)),
        0 if rope_cos is None else rope_cos.shape[0],
        k_cache.shape[0] * k_cache.shape[1],
        num_tokens,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        ROTARY_DIM=0 if rope_cos is None else 2 * rope_cos.shape[-1],
        INTERLEAVED=rope_interleaved,
        PAGE_SIZE=k_cache.shape[1],
        MANTISSA_BITS=FLOAT8_MANTISSA_BITS.get(dtype, 0),
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
