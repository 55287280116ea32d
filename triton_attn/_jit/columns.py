"""Wide heads in fp32: matmuls load their operands in chunks of the head dimension.

Whole tiles would not fit in registers. Matmuls of few rows and many warps need all columns of a row in each warp, and
tf32x3 has two parts of each element: 512 registers a thread for 16 rows of 512.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import load_piece, load_tile, padded_size, row_pointers, store_piece, zeros_tile

# Columns of a chunk.
CHUNK: tl.constexpr = tl.constexpr(64)


class Chunks(NamedTuple):
    """Rows that stay throughout a loop, of which one chunk at a time is loaded."""

    ptrs: object  # (rows, 1)
    mask: object  # (rows,)


@triton.constexpr_function
def _width(head_dim):
    """Columns of a chunk of a head dimension."""
    return min(CHUNK.value, padded_size(head_dim))


@triton.jit
def _pointers(x, ROWS: tl.constexpr, WIDE_ROWS: tl.constexpr):
    """Pointers (ROWS, 1) to the rows of the Halves x."""
    ptr = x.rows.source + tl.cast(x.start, tl.int64) * x.rows.stride
    return row_pointers(ptr, tl.arange(0, ROWS), x.rows.stride, WIDE_ROWS)


@triton.jit
def scores_in_chunks(a, x, acc, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """acc + a @ b.T for the Chunks a and the Halves b.

    Without HOIST a is loaded at every tile. Triton 3.6 moves loads before a loop whose `disable_licm` is set. It does
    not move what depends on the tile: the offset is 0, but the compiler cannot know it.
    """
    ROWS: tl.constexpr = acc.shape[1]
    WIDTH: tl.constexpr = _width(HEAD_DIM)
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    ptrs = _pointers(x, ROWS, TILE.WIDE_ROWS)
    mask = None if x.end is None else x.start + tl.arange(0, ROWS) < x.end
    a_ptrs = a.ptrs
    if not TILE.HOIST:
        a_ptrs += (x.start >= x.rows.seqlen).to(tl.int32)
    for START in tl.static_range(0, HEAD_DIM, WIDTH):
        of_a = load_piece(a_ptrs, a.mask, START, WIDTH, HEAD_DIM)
        of_b = load_piece(ptrs, mask, START, WIDTH, HEAD_DIM)
        acc = tl.dot(of_a, of_b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_in_chunks(a, x, acc, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """acc + a @ b, of `zeros_of`, for the Halves b."""
    ROWS: tl.constexpr = a.shape[1]
    WIDTH: tl.constexpr = _width(HEAD_DIM)
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    ptrs = _pointers(x, ROWS, TILE.WIDE_ROWS)
    mask = None if x.end is None else x.start + tl.arange(0, ROWS) < x.end
    sums = ()
    for i in tl.static_range(len(acc)):
        of_b = load_piece(ptrs, mask, i * WIDTH, WIDTH, HEAD_DIM)
        sums += (tl.dot(a, of_b, acc[i], input_precision=PRECISION),)
    return sums


@triton.jit
def load_fixed(ptrs, mask, HEAD_DIM: tl.constexpr, WIDEST: tl.constexpr, TILE: tl.constexpr):
    """A tile that stays throughout a loop, in pieces of WIDEST columns at most, or its Chunks if CHUNKED."""
    return Chunks(ptrs, mask) if TILE.CHUNKED else load_tile(ptrs, mask, HEAD_DIM, WIDEST)


@triton.jit
def zeros_of(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDEST: tl.constexpr, TILE: tl.constexpr):
    """A tile (ROWS, HEAD_DIM) of zeros in fp32, in pieces of WIDEST columns at most, or one for each chunk."""
    WIDTH: tl.constexpr = _width(HEAD_DIM)
    if TILE.CHUNKED:
        zeros = ()
        for _ in tl.static_range(0, HEAD_DIM, WIDTH):
            zeros += (tl.zeros([ROWS, WIDTH], tl.float32),)
        return zeros
    else:
        return zeros_tile(ROWS, HEAD_DIM, WIDEST)


@triton.jit
def scale_pieces(tile, factor):
    """A tile of any number of pieces, multiplied by a scalar."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled += (tile[i] * factor,)
    return scaled


@triton.jit
def store_pieces(ptrs, rows_mask, tile, HEAD_DIM: tl.constexpr):
    """Store a tile, all of whose pieces but the last are equally wide, to the rows at ptrs that are in rows_mask."""
    for i in tl.static_range(len(tile)):
        store_piece(ptrs, rows_mask, tile[i], i * tile[0].shape[1], HEAD_DIM)
