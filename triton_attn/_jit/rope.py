"""Rotary embedding: rows whose first dimensions are rotated, in pairs, by the angles of a position."""

import triton
import triton.language as tl


@triton.jit
def _angles(angle_ptr, stride, position, offs_a, mask, other):
    return tl.load(angle_ptr + position * stride + offs_a[None, :], mask=mask, other=other).to(tl.float32)


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

    rows point to the first dimension of each; mask says what is read of them, and only what is `rotated` is. offs_d
    counts from 0.
    """
    x = tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        position = tl.minimum(tl.maximum(positions, 0), num_positions - 1).to(tl.int64)[:, None]
        if INTERLEAVED:
            # A pair's numbers come in the load of the row: loads of partners would be of single elements.
            offs_a = tl.arange(0, offs_d.shape[0] // 2)
            turned = rotated[:, None] & (offs_a < HALF)[None, :]
            cos = _angles(cos_ptr, rope_strides[0], position, offs_a, turned, 1.0)
            sin = _angles(sin_ptr, rope_strides[1], position, offs_a, turned, 0.0)
            first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            # What is not rotated must not meet its neighbour: an infinite or NaN one, times 0, is NaN.
            turned_first = tl.where(turned, first * cos - second * sin, first)
            turned_second = tl.where(turned, second * cos + first * sin, second)
            x = tl.reshape(tl.join(turned_first, turned_second), x.shape)
        else:
            rotary = rotated[:, None] & (offs_d < ROTARY_DIM)[None, :]
            is_first = offs_d < HALF
            partner = tl.where(is_first, offs_d + HALF, offs_d - HALF)
            angle = tl.where(is_first, offs_d, offs_d - HALF)
            cos = _angles(cos_ptr, rope_strides[0], position, angle, rotary, 1.0)
            sin = _angles(sin_ptr, rope_strides[1], position, angle, rotary, 0.0)
            x_partner = tl.load(rows[:, None] + partner[None, :], mask=rotary, other=0.0).to(tl.float32)
            x = x * cos + tl.where(is_first, -1.0, 1.0)[None, :] * x_partner * sin
    return x
