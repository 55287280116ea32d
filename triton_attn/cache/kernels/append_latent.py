"""Kernel that scatters new latent vectors and rotary keys into the slots of a latent cache, and its launcher."""

import triton
import triton.language as tl

from ..._host.device import launch
from ..._host.latent import SCALE_BLOCK, latent_parts
from ..._host.layout import INDICES
from ..._jit.rope import load_rotated
from .append import TILE_ELEMENTS, encode_float8


@triton.jit
def _quantize(x, BLOCK: tl.constexpr):
    """Of fp32 (rows, numbers) the e4m3 bits, and a scale for every BLOCK of numbers: (rows, numbers / BLOCK).

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


@triton.jit(do_not_specialize=["num_positions", "num_slots", "num_tokens", *INDICES])
def _append_latent_cache_kernel(
    kv_latent_ptr,
    k_pe_ptr,
    latents_ptr,
    scales_ptr,
    rope_keys_ptr,
    slot_mapping_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    token_strides,
    cache_strides,
    rope_strides,
    num_positions,
    num_slots,
    num_tokens,
    KV_LORA_RANK: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """One program writes the rows of BLOCK_ROWS tokens.

    Grid: num_tokens / BLOCK_ROWS, rounded up. latents, scales (None but in an fp8 cache) and rope_keys are the parts of
    the cache's rows. Strides are a token's of kv_latent and k_pe, (page, offset) of latents, a position's of cos and
    sin. Those of scales and rope_keys follow, and so the compiler knows what they are multiples of.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    written = (slots >= 0) & (slots < num_slots)
    row_offsets = slots // PAGE_SIZE * cache_strides[0] + slots % PAGE_SIZE * cache_strides[1]

    offs_d = tl.arange(0, BLOCK_D)
    mask = written[:, None] & (offs_d < KV_LORA_RANK)[None, :]
    latents = tl.load(kv_latent_ptr + (tokens * token_strides[0])[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if scales_ptr is not None:
        latents, scales = _quantize(latents.to(tl.float32), SCALE_BLOCK)
        offs_s = tl.arange(0, BLOCK_D // SCALE_BLOCK)
        scaled = written[:, None] & (offs_s < KV_LORA_RANK // SCALE_BLOCK)[None, :]
        tl.store(scales_ptr + (row_offsets // 4)[:, None] + offs_s[None, :], scales, mask=scaled)
    tl.store(latents_ptr + row_offsets[:, None] + offs_d[None, :], latents, mask=mask)

    offs_r = tl.arange(0, BLOCK_ROPE)
    mask = written[:, None] & (offs_r < ROPE_HEAD_DIM)[None, :]
    rows = k_pe_ptr + tokens * token_strides[1]
    positions = None
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + tokens, mask=written, other=0)
    k_pe = load_rotated(
        rows, offs_r, mask, positions, written, cos_ptr, sin_ptr, rope_strides, num_positions, ROTARY_DIM, INTERLEAVED
    )
    if scales_ptr is not None:  # from bytes to bf16
        row_offsets = row_offsets // 2
    k_pe = k_pe.to(rope_keys_ptr.dtype.element_ty)
    tl.store(rope_keys_ptr + row_offsets[:, None] + offs_r[None, :], k_pe, mask=mask)


def launch_append_latent_cache(
    kv_latent, k_pe, latent_cache, slot_mapping, rope_cos, rope_sin, positions, rope_interleaved
):
    """Launch the append kernel: one launch, nothing read back. Arguments as `append_latent_cache`, checked."""
    num_tokens, kv_lora_rank = kv_latent.shape
    qk_rope_head_dim = k_pe.shape[1]
    block_d = triton.next_power_of_2(kv_lora_rank)
    block_rope = triton.next_power_of_2(qk_rope_head_dim)
    block_rows = max(1, TILE_ELEMENTS // max(block_d, block_rope))
    num_programs = -(-num_tokens // block_rows)
    if num_programs == 0:
        return
    latents, scales, rope_keys = latent_parts(latent_cache, kv_lora_rank, qk_rope_head_dim)
    launch(
        _append_latent_cache_kernel,
        (num_programs,),
        kv_latent.device,
        kv_latent,
        k_pe,
        latents,
        scales,
        rope_keys,
        slot_mapping,
        rope_cos,
        rope_sin,
        positions,
        (kv_latent.stride(0), k_pe.stride(0)),
        latents.stride()[:2],
        None if rope_cos is None else (rope_cos.stride(0), rope_sin.stride(0)),
        0 if rope_cos is None else rope_cos.shape[0],
        latent_cache.shape[0] * latent_cache.shape[1],
        num_tokens,
        KV_LORA_RANK=kv_lora_rank,
        ROPE_HEAD_DIM=qk_rope_head_dim,
        ROTARY_DIM=0 if rope_cos is None else 2 * rope_cos.shape[1],
        INTERLEAVED=rope_interleaved,
        PAGE_SIZE=latent_cache.shape[1],
        SCALE_BLOCK=SCALE_BLOCK,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        BLOCK_ROPE=block_rope,
        num_warps=4,
    )
