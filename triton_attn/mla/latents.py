"""Tiles of latent vectors: how the kernel of the absorbed form loads, decodes and multiplies them.

A tile is a tuple of pieces (rows, columns), and tiles of queries and of outputs have the same ones. Their columns are
loaded in groups. A group is one piece. If TILE.PAIRS it is two: fp8 elements are loaded two at a time, those with even
columns are one piece and those with odd columns the other.

Why pairs: Triton converts single fp8 elements in registers, in the layout of their load. A matmul then reads them
through shared memory as 16-bit numbers, and no copy runs ahead of the loop. Pairs are 16-bit numbers already. They are
copied ahead, ldmatrix loads them as operands, and an elementwise instruction of 16-bit numbers decodes them there.

Pairs are decoded to fp16, which has every e4m3 and e5m2 number and which one instruction makes of two elements; bf16
would take four. Queries and weights must fit into fp16 too:

- `_fit_queries` multiplies a row of queries by a power of two: its largest element is below 2^15.
- The running maximum of the softmax is that of a weight times the largest scale of its key. Weights times scales are
  thus at most 1, however large scales are, and are stored in units of 1 / WEIGHT.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .._jit.decode import decode_float8, decode_pieces, is_nvidia
from .._jit.paging import key_pointers, load_scale
from .._jit.softmax import softmax_step
from .._jit.tiles import cast_tile, load_piece, scale_tile, store_piece

# What a weight of 1 is in fp16: weights down to 2^-29 have all bits of their mantissa.
WEIGHT: tl.constexpr = tl.constexpr(2.0**15)
# Scales below are taken for it where they divide, since those of a latent vector of zeros may be 0.
LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-60)


class LatentCache(NamedTuple):
    """One value for each part of a row of a latent cache: the latent vector, its fp8 scales, the rotary key."""

    latents: object
    scales: object  # None unless rows have scales of their own
    rope_keys: object


class Pages(NamedTuple):
    """Pages of one part of a latent cache. Without a block table each sequence is a page."""

    ptr: object
    page_stride: int


@triton.constexpr_function
def unit_of_pairs(MANTISSA_BITS, NATIVE):
    """What a decoded 1.0 stands for. Where integer instructions move the bits of e4m3 to those of fp16, whose exponent
    has another bias, the factor is left to scales."""
    return 256.0 if is_nvidia() and MANTISSA_BITS == 3 and not NATIVE else 1.0


@triton.constexpr_function
def _decode_instructions(MANTISSA_BITS, NATIVE, ODD):
    """PTX that decodes the even or the odd ones of two pairs of fp8 elements."""
    if MANTISSA_BITS == 2:  # the upper half of an fp16 number
        shift = "mov.b32 a, $1;" if ODD else "shl.b32 a, $1, 8;"
        return "{.reg .b32 a; " + shift + " and.b32 $0, a, 0xff00ff00;}"
    if NATIVE:
        half = "b" if ODD else "a"
        select = "{.reg .b32 x; .reg .b16 a, b; prmt.b32 x, $1, 0, 0x3120; mov.b32 {a, b}, x; "
        return select + "cvt.rn.f16x2.e4m3x2 $0, " + half + ";}"
    sign, magnitude = ("mov.b32 s, $1;", "shr.b32 a, $1, 1;") if ODD else ("shl.b32 s, $1, 8;", "shl.b32 a, $1, 7;")
    move = sign + magnitude + "and.b32 s, s, 0x80008000; and.b32 a, a, 0x3f803f80; or.b32 a, a, s;"
    # 36000 times the code of NaN is infinite, and no other product is: times 0 it makes NaN of the code.
    find_nan = "mov.b32 z, 0x80008000; mov.b32 c, 0x78657865; fma.rn.f16x2 c, a, c, z; mov.b32 z, 0;"
    return "{.reg .b32 a, s, c, z; " + move + find_nan + "fma.rn.f16x2 $0, c, z, a;}"


@triton.jit
def _decode_half(pairs, ODD: tl.constexpr, TILE: tl.constexpr):
    """The elements of pairs (uint16) with even or with odd columns in fp16, divided by `unit_of_pairs`."""
    if is_nvidia():
        asm: tl.constexpr = _decode_instructions(TILE.FLOAT8[0], TILE.FLOAT8[1], ODD)
        return tl.inline_asm_elementwise(asm, "=r,r", [pairs], tl.float16, True, 2)
    else:
        return decode_float8((pairs >> (8 if ODD else 0)).to(tl.uint8), TILE.FLOAT8[0], TILE.FLOAT8[1])


@triton.jit
def _load_pieces(ptrs, rows_mask, ROPE: tl.constexpr, TILE: tl.constexpr):
    """Rows at ptrs (rows, 1) in pieces; 0 outside rows_mask."""
    GROUPS: tl.constexpr = TILE.ROPE_GROUPS if ROPE else TILE.GROUPS
    WIDTH: tl.constexpr = TILE.ROPE_HEAD_DIM if ROPE else TILE.KV_LORA_RANK
    tile = ()
    for i in tl.static_range(len(GROUPS)):
        group = load_piece(ptrs, rows_mask, GROUPS[i][0], GROUPS[i][1], WIDTH)
        if TILE.ROPE_PAIRS if ROPE else TILE.PAIRS:
            even, odd = tl.split(tl.reshape(group, (group.shape[0], group.shape[1] // 2, 2)))
            tile += (even, odd)
        else:
            tile += (group,)
    return tile


@triton.jit
def _load_pairs(ptrs, ROPE: tl.constexpr, TILE: tl.constexpr):
    """Rows of fp8 elements at ptrs (rows, 1) in pieces, in fp16."""
    GROUPS: tl.constexpr = TILE.ROPE_GROUPS if ROPE else TILE.GROUPS
    WIDTH: tl.constexpr = TILE.ROPE_HEAD_DIM if ROPE else TILE.KV_LORA_RANK
    ptrs = ptrs.to(tl.pointer_type(tl.uint16))
    tile = ()
    for i in tl.static_range(len(GROUPS)):
        pairs = load_piece(ptrs, None, GROUPS[i][0] // 2, GROUPS[i][1] // 2, WIDTH // 2)
        tile += (_decode_half(pairs, False, TILE), _decode_half(pairs, True, TILE))
    return tile


@triton.jit
def _load_elements(ptrs, scale_ptrs, dtype, START: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Columns [START, START + BLOCK) of latent vectors, times the scales of their rows; fp8 elements in dtype."""
    tile = load_piece(ptrs, None, START, BLOCK, TILE.KV_LORA_RANK)
    if TILE.FLOAT8 is None:
        return tile
    elif TILE.SCALE_BLOCK == 0:
        values = decode_float8(tile, TILE.FLOAT8[0], TILE.FLOAT8[1])
        if TILE.FLOAT8[1] and dtype == tl.bfloat16:
            values = values.to(tl.float32)  # these become bf16 two at a time, fp16 one by one
        return values.to(dtype)
    else:
        SCALE_BLOCK: tl.constexpr = TILE.SCALE_BLOCK
        BLOCKS: tl.constexpr = BLOCK // SCALE_BLOCK
        scales = tl.load(scale_ptrs + (START // SCALE_BLOCK + tl.arange(0, BLOCKS))[None, :])  # (BLOCK_N, BLOCKS)
        values = decode_float8(tile, TILE.FLOAT8[0], TILE.FLOAT8[1]).to(tl.float32)
        values = tl.reshape(values, (tile.shape[0], BLOCKS, SCALE_BLOCK)) * scales[:, :, None]
        return tl.reshape(values, tile.shape).to(dtype)


@triton.jit
def _load_scales(scales, keys, TILE: tl.constexpr):
    """The scales (BLOCK_N,) of each group of columns of CachedKeys, for what `_load_pairs` returns."""
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    # Not key_pointers: for gfx942 Triton 3.6.0 does not reshape pointers.
    if TILE.ONE_PAGE:
        ptrs = scales.ptr + (keys.page * scales.page_stride + keys.slot * SLOTS.scales) + keys.slots * SLOTS.scales
    else:
        ptrs = scales.ptr + (keys.page * scales.page_stride + keys.slots * SLOTS.scales)
    tile = ()
    for i in tl.static_range(len(TILE.GROUPS)):
        tile += (tl.load(ptrs + i) * unit_of_pairs(TILE.FLOAT8[0], TILE.FLOAT8[1]),)
    return tile


@triton.jit
def load_latents(latents, scales, keys, dtype, TILE: tl.constexpr):
    """The latent vectors of CachedKeys, (BLOCK_N, KV_LORA_RANK), and the scales (BLOCK_N,) of each group of columns.

    Without TILE.PAIRS they are in dtype, and scales are () because they are applied; the same if there are none.
    """
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    GROUPS: tl.constexpr = TILE.GROUPS
    ptrs = key_pointers(latents, SLOTS.latents, keys, TILE.ONE_PAGE)
    if TILE.PAIR_SCALES:
        return _load_pairs(ptrs, False, TILE), _load_scales(scales, keys, TILE)
    elif TILE.PAIRS:
        return _load_pairs(ptrs, False, TILE), ()
    else:
        scale_ptrs = None
        if TILE.SCALE_BLOCK > 0:
            scale_ptrs = key_pointers(scales, SLOTS.scales, keys, TILE.ONE_PAGE)
        tile = ()
        for i in tl.static_range(len(GROUPS)):
            tile += (_load_elements(ptrs, scale_ptrs, dtype, GROUPS[i][0], GROUPS[i][1], TILE),)
        return tile, ()


@triton.jit
def load_rope_keys(rope_keys, keys, dtype, TILE: tl.constexpr):
    """The rotary keys of CachedKeys, (BLOCK_N, ROPE_HEAD_DIM) in the given dtype, or in fp16 like `load_latents`; () if
    there is no rotary part."""
    SLOTS: tl.constexpr = TILE.SLOT_STRIDES
    if TILE.ROPE_HEAD_DIM == 0:
        return ()
    elif TILE.ROPE_PAIRS:
        return _load_pairs(key_pointers(rope_keys, SLOTS.rope_keys, keys, TILE.ONE_PAGE), True, TILE)
    else:
        tile = _load_pieces(key_pointers(rope_keys, SLOTS.rope_keys, keys, TILE.ONE_PAGE), None, True, TILE)
        if TILE.FLOAT8 is not None and TILE.SCALE_BLOCK == 0:
            return decode_pieces(tile, TILE.FLOAT8[0], TILE.FLOAT8[1], dtype)
        else:
            return cast_tile(tile, dtype)


@triton.jit
def load_queries(ptrs, rope_ptrs, rows_mask, k_scale, k_pe_scale, scale_log2, TILE: tl.constexpr):
    """(q, q_pe, scale_log2): absorbed and rotary queries in the pieces of keys, () if there is no rotary part, and the
    factor of their scores, (BLOCK_M,) if TILE.PAIRS."""
    q, q_pe = _load_pieces(ptrs, rows_mask, False, TILE), ()
    if TILE.ROPE_HEAD_DIM > 0:
        q_pe = _load_pieces(rope_ptrs, rows_mask, True, TILE)
        if k_pe_scale is not None:
            q_pe = cast_tile(scale_tile(q_pe, load_scale(k_pe_scale) / load_scale(k_scale)), q[0].dtype)
    if k_scale is not None:
        scale_log2 *= load_scale(k_scale)
    if TILE.PAIRS:
        return _fit_queries(q, q_pe, scale_log2, TILE)
    else:
        return q, q_pe, scale_log2


@triton.jit
def _largest(tile, most):
    """The largest magnitude of each row, and at least `most` (rows,)."""
    for i in tl.static_range(len(tile)):
        most = tl.maximum(most, tl.max(tl.abs(tile[i].to(tl.float32)), 1))
    return most


@triton.jit
def _fit_queries(q, q_pe, scale_log2, TILE: tl.constexpr):
    """(q, q_pe, scale_log2) for keys in pairs: q in fp16, and scale_log2 (BLOCK_M,).

    Queries of another dtype than fp16 are multiplied by a power of two, and scale_log2 is divided by it. An element
    loses bits below 2^-29 of its row's largest one, which changes no bit of the scores.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M  # Triton 3.6 does not support fields of a constexpr in a list
    row_scale = tl.zeros([BLOCK_M], tl.float32) + scale_log2
    if TILE.ROPE_PAIRS:
        row_scale *= unit_of_pairs(TILE.FLOAT8[0], TILE.FLOAT8[1])
    if q[0].dtype != tl.float16:
        most = _largest(q, tl.zeros([BLOCK_M], tl.float32))
        most = _largest(q_pe, most)
        # 2^14 / 2^floor(log2(most)), from 2^-64 to 2^64, as the bits of its exponent
        exponent = tl.minimum(tl.maximum(268 - (most.to(tl.int32, bitcast=True) >> 23), 63), 191)
        factor = (exponent << 23).to(tl.float32, bitcast=True)
        row_scale *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        q = _scale_rows_as(q, factor, tl.float16)
        q_pe = _scale_rows_as(q_pe, factor, tl.float16 if TILE.ROPE_PAIRS else tl.bfloat16)
    return q, q_pe, row_scale


@triton.jit
def _scale_rows_as(tile, factor, dtype: tl.constexpr):
    """The tile with each row multiplied by its factor (rows,), in dtype."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled += ((tile[i].to(tl.float32) * factor[:, None]).to(dtype),)
    return scaled


@triton.jit
def latent_scores(q, k, scales, TILE: tl.constexpr):
    """q @ k.T (BLOCK_M, BLOCK_N), times the scales of `load_latents`."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION  # Triton 3.6 does not pass on strings of a constexpr tuple
    s = tl.zeros([q[0].shape[0], k[0].shape[0]], tl.float32)
    if TILE.PAIR_SCALES:
        for i in tl.static_range(len(scales)):
            of_group = tl.dot(q[2 * i], k[2 * i].T)
            s += tl.dot(q[2 * i + 1], k[2 * i + 1].T, of_group) * scales[i][None, :]
    else:
        for i in tl.static_range(len(k)):
            s = tl.dot(q[i], k[i].T, s, input_precision=PRECISION)
    return s


@triton.jit
def latent_softmax(s, scales, m_i, l_i, scale_log2, dtype, TILE: tl.constexpr):
    """`softmax_step` of a tile of scores: (weights of each group of columns, alpha, m_i, l_i).

    If groups have one weight there is one. With scales m_i is the maximum of scores and the logarithms of scales, and
    weights are p = exp2(s - m_i) of that sum; l_i is the sum of p without the scales.
    """
    if not TILE.PAIRS:
        p, alpha, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, True)
        return (p.to(dtype),), alpha, m_i, l_i
    elif not TILE.PAIR_SCALES:
        p, alpha, m_i, l_i = softmax_step(s * scale_log2[:, None], m_i, l_i, 1.0, True)
        return ((p * WEIGHT).to(tl.float16),), alpha, m_i, l_i
    else:
        largest = tl.maximum(scales[0], LEAST_SCALE)
        for i in tl.static_range(1, len(scales)):
            largest = tl.maximum(largest, scales[i])
        s = s * scale_log2[:, None] + tl.math.log2(largest)[None, :]
        p, alpha, m_i, _ = softmax_step(s, m_i, l_i, 1.0, True)
        without = 1.0 / largest
        weights = ()
        for i in tl.static_range(len(scales)):
            weights += ((p * (scales[i] * (without * WEIGHT))[None, :]).to(tl.float16),)
        return weights, alpha, m_i, l_i * alpha + tl.sum(p * without[None, :], 1)


@triton.jit
def add_latents(weights, k, acc, TILE: tl.constexpr):
    """acc plus weights @ k, piece by piece, with the weights of a piece's group."""
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    added = ()
    for i in tl.static_range(len(k)):
        if TILE.PAIR_SCALES:
            added += (tl.dot(weights[i // 2], k[i], acc[i]),)
        else:
            added += (tl.dot(weights[0], k[i], acc[i], input_precision=PRECISION),)
    return added


@triton.jit
def undo_weights(norm, TILE: tl.constexpr):
    """The factor that normalises the output, without what WEIGHT and `unit_of_pairs` have added to weights."""
    if TILE.PAIRS:
        UNIT: tl.constexpr = 1.0 if TILE.PAIR_SCALES else unit_of_pairs(TILE.FLOAT8[0], TILE.FLOAT8[1])
        return norm * (UNIT / WEIGHT)
    else:
        return norm


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) in fp32."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def zero_outputs(TILE: tl.constexpr):
    """(BLOCK_M, KV_LORA_RANK) in the pieces of latent vectors."""
    GROUPS: tl.constexpr = TILE.GROUPS
    tile = ()
    for i in tl.static_range(len(GROUPS)):
        if TILE.PAIRS:
            half = _zeros(TILE.BLOCK_M, GROUPS[i][1] // 2)
            tile += (half, half)
        else:
            tile += (_zeros(TILE.BLOCK_M, GROUPS[i][1]),)
    return tile


@triton.jit
def store_outputs(ptrs, rows_mask, tile, TILE: tl.constexpr):
    """Store a tile in its pieces to the rows at ptrs (rows, 1) that are in rows_mask."""
    GROUPS: tl.constexpr = TILE.GROUPS
    for i in tl.static_range(len(GROUPS)):
        if TILE.PAIRS:
            group = tl.reshape(tl.join(tile[2 * i], tile[2 * i + 1]), (TILE.BLOCK_M, GROUPS[i][1]))
            store_piece(ptrs, rows_mask, group, GROUPS[i][0], TILE.KV_LORA_RANK)
        else:
            store_piece(ptrs, rows_mask, tile[i], GROUPS[i][0], TILE.KV_LORA_RANK)
