"""Rotary embedding: the first dimensions of a row are rotated in pairs, by the angles of its position."""

from typing import NamedTuple

import triton
import triton.language as tl


class Rope(NamedTuple):
    """Tables (positions, rotary_dim / 2) of cosines and sines; the strides are from position to position."""

    cos_ptr: object
    sin_ptr: object
    cos_stride: object
    sin_stride: object


class Rotation(NamedTuple):
    """The rotation of a tile of rows: tables, positions of the rows, and the number of positions in the tables."""

    rope: Rope | None
    positions: object  # (rows,)
    num_positions: object


def rope_of(cos, sin):
    """The Rope of two tables, or None."""
    return None if cos is None else Rope(cos, sin, cos.stride(0), sin.stride(0))


@triton.jit
def _angles(table_ptr, stride, position, offs_a, mask, other):
    """Cosines or sines of the positions (rows, 1), fp32."""
    return tl.load(table_ptr + position * stride + offs_a[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def load_rotated(
    rows,
    rows_mask,
    offs_d,
    rotation,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of HEAD_DIM elements in fp32, whose first ROTARY_DIM elements are rotated by the angles of their positions.

    rows are pointers to the first elements, and offs_d are columns from 0. Rows outside rows_mask are neither read nor
    rotated. Positions are clamped to the tables.
    """
    mask = rows_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    x = tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)  # (rows, BLOCK_D)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        rope = rotation.rope
        position = tl.minimum(tl.maximum(rotation.positions, 0), rotation.num_positions - 1).to(tl.int64)[:, None]
        if INTERLEAVED:
            # The load of the row brings both elements of a pair. Separate loads would have a stride of two elements.
            offs_a = tl.arange(0, offs_d.shape[0] // 2)
            rotated = rows_mask[:, None] & (offs_a < HALF)[None, :]
            cos = _angles(rope.cos_ptr, rope.cos_stride, position, offs_a, rotated, 1.0)  # (rows, BLOCK_D / 2)
            sin = _angles(rope.sin_ptr, rope.sin_stride, position, offs_a, rotated, 0.0)
            first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            # Elements that are not rotated must not be multiplied by 0 with inf or NaN neighbours: that gives NaN.
            rotated_first = tl.where(rotated, first * cos - second * sin, first)
            rotated_second = tl.where(rotated, second * cos + first * sin, second)
            x = tl.reshape(tl.join(rotated_first, rotated_second), x.shape)
        else:
            rotated = rows_mask[:, None] & (offs_d < ROTARY_DIM)[None, :]
            is_first = offs_d < HALF
            partner = tl.where(is_first, offs_d + HALF, offs_d - HALF)
            angle = tl.where(is_first, offs_d, offs_d - HALF)
            cos = _angles(rope.cos_ptr, rope.cos_stride, position, angle, rotated, 1.0)  # (rows, BLOCK_D)
            sin = _angles(rope.sin_ptr, rope.sin_stride, position, angle, rotated, 0.0)
            x_partner = tl.load(rows[:, None] + partner[None, :], mask=rotated, other=0.0).to(tl.float32)
            x = x * cos + tl.where(is_first, -1.0, 1.0)[None, :] * x_partner * sin
    return x
