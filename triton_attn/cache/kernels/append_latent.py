"""Kernel that scatters new latent vectors and rotary keys into the slots of a latent cache, and its launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.checks import FLOAT8_MANTISSA_BITS
from ..._host.device import launch
from ..._host.latent import SCALE_BLOCK
from ..._host.layout import INDICES
from ..._host.tuned import remember
from ..._jit.args import Strides, View, scale_of
from ..._jit.paging import load_scale
from ..._jit.rope import Rope, Rotation, load_rotated
from .append import TILE_ELEMENTS, encode_float8


class Tile(NamedTuple):
    """What a kernel is compiled for: BLOCK_ROWS rows of BLOCK_D and BLOCK_ROPE elements, and what they are."""

    BLOCK_ROWS: int
    BLOCK_D: int
    BLOCK_ROPE: int
    KV_LORA_RANK: int
    ROPE_HEAD_DIM: int
    ROTARY_DIM: int  # 0: nothing is rotated
    INTERLEAVED: bool
    PAGE_SIZE: int
    SCALE_BLOCK: int  # elements that share a scale of their row, in a uint8 cache; otherwise 0
    MANTISSA_BITS: int  # of an fp8 cache without scales in its rows, held as uint8; otherwise 0


@triton.jit
def _quantize(x, BLOCK: tl.constexpr):
    """Of fp32 (rows, elements) the e4m3 bits, and a scale for every BLOCK of elements: (rows, elements / BLOCK).

    A scale is the power of two at or above max(amax / 448, 1e-4).
    """
    blocks = tl.reshape(x, (x.shape[0], x.shape[1] // BLOCK, BLOCK))
    # Which of a number and NaN is the larger differs between GPUs.
    amax = tl.max(tl.where(blocks == blocks, tl.abs(blocks), 0.0), axis=2)
    quotients = tl.maximum(tl.math.div_rn(amax, 448.0), 1e-4)
    # Up to the next exponent unless the mantissa is 0; infinity stays.
    exponents = (quotients.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    scales = exponents.to(tl.float32, bitcast=True)
    bits = encode_float8(tl.math.div_rn(blocks, tl.broadcast_to(scales[:, :, None], blocks.shape)), 3)
    return tl.reshape(bits, x.shape), scales


@triton.jit
def _scaled(x, scale, dtype, TILE: tl.constexpr):
    """x over the Scale, in the dtype of the cache."""
    if scale is not None:
        x = tl.math.div_rn(x.to(tl.float32), load_scale(scale))
    if TILE.MANTISSA_BITS > 0:
        return encode_float8(x.to(tl.float32), TILE.MANTISSA_BITS)
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=["num_positions", "num_slots", "num_tokens", *INDICES])
def _append_latent_cache_kernel(
    kv_latent,
    k_pe,
    cache,
    slot_mapping_ptr,
    positions_ptr,
    k_scale,
    k_pe_scale,
    rope,
    num_positions,
    num_slots,
    num_tokens,
    TILE: tl.constexpr,
):
    """One program writes the rows of BLOCK_ROWS tokens.

    Grid: num_tokens / BLOCK_ROWS, rounded up. kv_latent, k_pe and cache are Views without heads, of tokens and of slots
    in pages. A row of a uint8 cache has scales and rotary keys of other dtypes after the latent vector. Their strides
    follow from its own: so the compiler knows what they are multiples of.
    """
    tokens = tl.program_id(0).to(tl.int64) * TILE.BLOCK_ROWS + tl.arange(0, TILE.BLOCK_ROWS)
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    written = (slots >= 0) & (slots < num_slots)  # (BLOCK_ROWS,)
    row_offsets = slots // TILE.PAGE_SIZE * cache.strides.batch + slots % TILE.PAGE_SIZE * cache.strides.row

    offs_d = tl.arange(0, TILE.BLOCK_D)
    mask = written[:, None] & (offs_d < TILE.KV_LORA_RANK)[None, :]
    rows = kv_latent.ptr + (tokens * kv_latent.strides.row)[:, None]
    x = tl.load(rows + offs_d[None, :], mask=mask, other=0.0)  # (BLOCK_ROWS, BLOCK_D)
    rope_keys_ptr = cache.ptr + TILE.KV_LORA_RANK
    if TILE.SCALE_BLOCK > 0:
        x, scales = _quantize(x.to(tl.float32), TILE.SCALE_BLOCK)
        scales_ptr = rope_keys_ptr.to(tl.pointer_type(tl.float32))
        rope_keys_ptr += 4 * (TILE.KV_LORA_RANK // TILE.SCALE_BLOCK)
        rope_keys_ptr = rope_keys_ptr.to(tl.pointer_type(tl.bfloat16))
        offs_s = tl.arange(0, TILE.BLOCK_D // TILE.SCALE_BLOCK)
        scaled = written[:, None] & (offs_s < TILE.KV_LORA_RANK // TILE.SCALE_BLOCK)[None, :]
        tl.store(scales_ptr + (row_offsets // 4)[:, None] + offs_s[None, :], scales, mask=scaled)
    else:
        x = _scaled(x, k_scale, cache.ptr.dtype.element_ty, TILE)
    tl.store(cache.ptr + row_offsets[:, None] + offs_d[None, :], x, mask=mask)

    positions = None
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + tokens, mask=written, other=0)
    rotation = Rotation(rope, positions, num_positions)
    offs_r = tl.arange(0, TILE.BLOCK_ROPE)
    rows = k_pe.ptr + tokens * k_pe.strides.row
    x = load_rotated(rows, written, offs_r, rotation, TILE.ROPE_HEAD_DIM, TILE.ROTARY_DIM, TILE.INTERLEAVED)
    if TILE.SCALE_BLOCK > 0:  # from bytes to bf16
        row_offsets = row_offsets // 2
    mask = written[:, None] & (offs_r < TILE.ROPE_HEAD_DIM)[None, :]
    x = _scaled(x, k_pe_scale, rope_keys_ptr.dtype.element_ty, TILE)  # (BLOCK_ROWS, BLOCK_ROPE)
    tl.store(rope_keys_ptr + row_offsets[:, None] + offs_r[None, :], x, mask=mask)


class Plan(NamedTuple):
    """A launch but for its tensors and scales."""

    num_programs: int
    strides: tuple  # Strides of the Views that the kernel takes
    rope_strides: tuple  # of cos and sin, from position to position
    counts: tuple  # num_positions, num_slots, num_tokens
    is_float8: bool  # bytes: not every GPU has the dtypes of fp8
    constants: dict

    def launch(
        self, kv_latent, k_pe, cache, slot_mapping, k_scale, k_pe_scale, rope_cos, rope_sin, positions, alike=None
    ):
        """One launch, no device-to-host sync. Arguments as `append_latent_cache`, checked; alike as in `launch`."""
        if self.num_programs == 0:
            return
        if self.is_float8:
            cache = cache.view(torch.uint8)
        args = (
            *map(View, (kv_latent, k_pe, cache), self.strides),
            slot_mapping,
            positions,
            scale_of(k_scale),
            scale_of(k_scale if k_pe_scale is None else k_pe_scale),
            None if rope_cos is None else Rope(rope_cos, rope_sin, *self.rope_strides),
            *self.counts,
        )
        launch(_append_latent_cache_kernel, (self.num_programs,), kv_latent.device, args, self.constants, alike)


def plan_append_latent_cache(operands, interleaved):
    """The Plan of a launch; its operands are the arguments of `Plan.launch`."""
    kv_latent, k_pe, cache, *_, rope_cos, rope_sin, _ = operands
    layout = (kv_latent.shape, kv_latent.stride()), (k_pe.shape, k_pe.stride()), (cache.shape, cache.stride())
    rope = None if rope_cos is None else (rope_cos.shape, rope_cos.stride(0), rope_sin.stride(0))
    return _plan(layout, cache.dtype, rope, interleaved)


@remember
def _plan(layout, dtype, rope, interleaved):
    """The Plan; layout is (shape, strides) of kv_latent, k_pe and the cache.

    rope is the shape of the tables and their strides, or None.
    """
    (shape, strides), (shape_pe, strides_pe), ((num_pages, page_size, _), strides_cache) = layout
    num_tokens, kv_lora_rank = shape
    (num_positions, half), *rope_strides = rope or ((0, 0),)
    block_d, block_rope = (triton.next_power_of_2(max(1, size)) for size in (kv_lora_rank, shape_pe[1]))
    tile = Tile(
        BLOCK_ROWS=max(1, TILE_ELEMENTS // max(block_d, block_rope)),
        BLOCK_D=block_d,
        BLOCK_ROPE=block_rope,
        KV_LORA_RANK=kv_lora_rank,
        ROPE_HEAD_DIM=shape_pe[1],
        ROTARY_DIM=2 * half,
        INTERLEAVED=interleaved,
        PAGE_SIZE=page_size,
        SCALE_BLOCK=SCALE_BLOCK if dtype == torch.uint8 else 0,
        MANTISSA_BITS=FLOAT8_MANTISSA_BITS.get(dtype, 0),
    )
    return Plan(
        num_programs=-(-num_tokens // tile.BLOCK_ROWS),
        strides=(Strides(0, strides[0], 0), Strides(0, strides_pe[0], 0), Strides(*strides_cache[:2], 0)),
        rope_strides=tuple(rope_strides),
        counts=(num_positions, num_pages * page_size, num_tokens),
        is_float8=dtype in FLOAT8_MANTISSA_BITS,
        constants=dict(TILE=tile, num_warps=4),
    )
