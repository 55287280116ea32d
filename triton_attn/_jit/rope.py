"""Rotary embedding: rows whose first dimensions are rotated, in pairs, by the angles of a position."""

import triton
import triton.language as tl


@triton.jit
def _rope_partner(offs_d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each dimension the one it is rotated with, the index of their angle, and the sign of the partner's sine."""
    if INTERLEAVED:
        is_first = offs_d % 2 == 0
        partner = offs_d ^ 1
        angle = offs_d // 2
    else:
        is_first = offs_d < HALF
        partner = tl.where(is_first, offs_d + HALF, offs_d - HALF)
        angle = tl.where(is_first, offs_d, offs_d - HALF)
    return partner, angle, tl.where(is_first, -1.0, 1.0)


@triton.jit
def load_rotated(
    rows,
    offs_d,
    mask,
    positions,
    rotated,
    cos_ptr,
    sin_ptr,
    rope_strides,
    num_positions,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows in fp32, their first ROTARY_DIM dimensions rotated by the angles of their positions, those of the nearest
    one where there are none for a position.

    rows point to the first dimension of each; mask says what is read of them, and only what is `rotated` is.
    """
    x = tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        partner, angle, sign = _rope_partner(offs_d, ROTARY_DIM // 2, INTERLEAVED)
        rotary = rotated[:, None] & (offs_d < ROTARY_DIM)[None, :]
        position = tl.minimum(tl.maximum(positions, 0), num_positions - 1).to(tl.int64)[:, None]
        cos = tl.load(cos_ptr + position * rope_strides[0] + angle[None, :], mask=rotary, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * rope_strides[1] + angle[None, :], mask=rotary, other=0.0).to(tl.float32)
        x_partner = tl.load(rows[:, None] + partner[None, :], mask=rotary, other=0.0).to(tl.float32)
        x = x * cos + sign[None, :] * x_partner * sin
    return x
