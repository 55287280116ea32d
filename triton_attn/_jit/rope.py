"""Rotary embedding: rows whose first dimensions are rotated, in pairs, by the angles of a position."""

from typing import NamedTuple

import triton
import triton.language as tl


class Rope(NamedTuple):
    """Tables (positions, rotary_dim / 2) of cosines and sines; strides are a position's."""

    cos_ptr: object
    sin_ptr: object
    cos_stride: object
    sin_stride: object


class Rotation(NamedTuple):
    """What rotates a tile of rows: the tables, the rows' positions, and how many positions the tables have."""

    rope: Rope | None
    positions: object  # (rows,)
    num_positions: object


def rope_of(cos, sin):
    """The kernel argument of two tables, None where there are none."""
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
    """Rows of HEAD_DIM elements in fp32, the first ROTARY_DIM rotated by the angles of their positions.

    rows point to the first element of each; offs_d counts from 0. What is not in rows_mask is neither read nor
    rotated. A position without angles has those of the nearest one that has some.
    """
    mask = rows_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    x = tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)  # (rows, BLOCK_D)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        rope = rotation.rope
        position = tl.minimum(tl.maximum(rotation.positions, 0), rotation.num_positions - 1).to(tl.int64)[:, None]
        if INTERLEAVED:
            # A pair's elements come in the load of the row: loads of partners would be of single elements.
            offs_a = tl.arange(0, offs_d.shape[0] // 2)
            rotated = rows_mask[:, None] & (offs_a < HALF)[None, :]
            cos = _angles(rope.cos_ptr, rope.cos_stride, position, offs_a, rotated, 1.0)  # (rows, BLOCK_D / 2)
            sin = _angles(rope.sin_ptr, rope.sin_stride, position, offs_a, rotated, 0.0)
            first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            # What is not rotated must not meet its neighbour: an infinite or NaN one, times 0, is NaN.
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
