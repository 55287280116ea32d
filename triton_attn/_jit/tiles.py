"""Tiles of rows: loads, stores and matmuls.

A tile is a tuple of one or two tensors (rows, piece): a head dimension that is no power of two is split into two
pieces where that saves work, such as 96 = 64 + 32.

The address of a tile is computed in 64 bits. Offsets inside a tile are 32-bit, or 64-bit with WIDE_ROWS, for rows that
span 2^31 elements or more.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import row_pointer
from .workarounds import apart, computed_again, dot_once, fence_copies

# The row at which every sequence of a packed tensor ends in its TMA descriptors. No packed tensor has as many rows.
PACKED_END: tl.constexpr = tl.constexpr(2**30)
# Columns of a piece where two pieces of a tile take the same shared memory, one after the other.
HALF: tl.constexpr = tl.constexpr(256)


@triton.constexpr_function
def _in_multiples(head_dim):
    """The next multiple of 16."""
    return max(16, -(-head_dim // 16) * 16)


@triton.constexpr_function
def piece_0(head_dim, widest=512):
    """First piece: the largest power of two up to head_dim, or the next one if a second piece would be as wide; at most
    `widest`, a power of two that is at least half of the padded head_dim."""
    columns = _in_multiples(head_dim)
    first = 1 << (columns.bit_length() - 1)
    return min(first if columns <= 3 * first // 2 else 2 * first, widest)


@triton.constexpr_function
def piece_1(head_dim, widest=512):
    """Second piece, a power of two, or 0."""
    rest = _in_multiples(head_dim) - piece_0(head_dim, widest)
    return 1 << (rest - 1).bit_length() if rest > 0 else 0


@triton.constexpr_function
def padded_size(size):
    """The next power of two, at least 16, as tl.dot needs it."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def row_pointers(ptr, rows, stride, WIDE_ROWS: tl.constexpr):
    """Pointers (rows, 1) to the first elements of rows."""
    offsets = rows.to(tl.int64) * stride if WIDE_ROWS else rows * stride
    return ptr + offsets[:, None]


@triton.jit
def tile_pointers(view, batch, row, head, ROWS: tl.constexpr, WIDE_ROWS: tl.constexpr):
    """`row_pointers` of [row, row + ROWS)."""
    return row_pointers(row_pointer(view, batch, row, head), tl.arange(0, ROWS), view.strides.row, WIDE_ROWS)


@triton.jit
def _columns(START: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr = 0, PACK_STRIDE: tl.constexpr = 0):
    """(1, BLOCK) offsets of the columns from START on. PACK of them lie side by side, the next PACK_STRIDE further on;
    PACK 0: all of them."""
    columns = tl.arange(0, BLOCK) + START
    if PACK > 0:
        columns = columns // PACK * PACK_STRIDE + columns % PACK
    return columns[None, :]


@triton.jit
def _piece_mask(ptrs, rows_mask, START: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(rows, BLOCK) bool: which elements of the piece exist. The compiler drops it where all do."""
    mask = tl.full([ptrs.shape[0], BLOCK], True, tl.int1)
    if rows_mask is not None:
        mask &= rows_mask[:, None]
    if START + BLOCK > HEAD_DIM:
        mask &= (tl.arange(0, BLOCK) + START < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_piece(
    ptrs,
    rows_mask,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACK: tl.constexpr = 0,
    PACK_STRIDE: tl.constexpr = 0,
):
    """Columns [START, START + BLOCK) of the rows of `load_tile`."""
    mask = _piece_mask(ptrs, rows_mask, START, BLOCK, HEAD_DIM)
    return tl.load(ptrs + _columns(START, BLOCK, PACK, PACK_STRIDE), mask=mask, other=0.0)


@triton.jit
def load_tile(
    ptrs,
    rows_mask,
    HEAD_DIM: tl.constexpr,
    WIDEST: tl.constexpr = 512,
    PACK: tl.constexpr = 0,
    PACK_STRIDE: tl.constexpr = 0,
):
    """Load the rows at ptrs (rows, 1); 0 outside rows_mask (None: all rows exist) and past the head dimension.

    No piece has more than WIDEST columns: with pieces of 256, fewer registers are live than with one of 512. PACK and
    PACK_STRIDE: see `_columns`.
    """
    FIRST: tl.constexpr = piece_0(HEAD_DIM, WIDEST)
    SECOND: tl.constexpr = piece_1(HEAD_DIM, WIDEST)
    first = load_piece(ptrs, rows_mask, 0, FIRST, HEAD_DIM, PACK, PACK_STRIDE)
    if SECOND > 0:
        return first, load_piece(ptrs, rows_mask, FIRST, SECOND, HEAD_DIM, PACK, PACK_STRIDE)
    else:
        return (first,)


@triton.jit
def sequence_coords(batch, head, first_row, seqlen, VARLEN: tl.constexpr):
    """Coordinates (outer, batch, head, row) of a sequence's first row in its TMA descriptors, see `tma_geometry`."""
    if VARLEN:
        return PACKED_END, first_row + seqlen, head, -seqlen + PACKED_END
    else:
        return 0, batch, head, 0


@triton.jit
def _load_piece_tma(desc, coords, start, ROWS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    """load_piece through a descriptor: the ROWS rows from start on, counted from coords."""
    outer, batch, head, row = coords
    return desc.load([outer, batch, head, row + start, START]).reshape(ROWS, BLOCK)


@triton.jit
def _load_tile_tma(descs, coords, start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """load_tile through descriptors, one per piece."""
    FIRST: tl.constexpr = piece_0(HEAD_DIM)
    SECOND: tl.constexpr = piece_1(HEAD_DIM)
    first = _load_piece_tma(descs[0], coords, start, ROWS, 0, FIRST)
    if SECOND > 0:
        return first, _load_piece_tma(descs[1], coords, start, ROWS, FIRST, SECOND)
    else:
        return (first,)


class Rows(NamedTuple):
    """The rows of one sequence and head, which a loop loads tile by tile.

    With pointers, source points to the first row, stride is from row to row, and coords is None. With TMA, source holds
    one descriptor per piece of the head dimension, and coords are those of the first row, see `sequence_coords`.
    """

    source: object
    stride: object
    coords: object
    seqlen: object


@triton.jit
def _pointers_from(x, start, ROWS: tl.constexpr, WIDE_ROWS: tl.constexpr):
    """Pointers (ROWS, 1) to the rows from start on of the Rows x."""
    ptr = x.source + tl.cast(start, tl.int64) * x.stride
    return row_pointers(ptr, tl.arange(0, ROWS), x.stride, WIDE_ROWS)


@triton.jit
def load_rows(x, start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, WIDE_ROWS: tl.constexpr):
    """The tile [start, start + ROWS) of the Rows x; 0 past their end, which only a MASKED tile may reach."""
    if x.coords is not None:
        return _load_tile_tma(x.source, x.coords, start, ROWS, HEAD_DIM)
    else:
        rows_mask = start + tl.arange(0, ROWS) < x.seqlen if MASKED else None
        tile = load_tile(_pointers_from(x, start, ROWS, WIDE_ROWS), rows_mask, HEAD_DIM)
        fence_copies()
        return tile


class Halves(NamedTuple):
    """A tile whose pieces, of HALF columns at most, are loaded where `dot_halves` and `dot_add_halves` use them."""

    rows: object  # Rows; with pointers they are HEAD_DIM_V wide
    start: object  # the tile's first row
    end: object  # of the rows; None if the tile does not reach past it


@triton.jit
def _load_half(x, ROWS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Columns [START, START + BLOCK) of the Halves x."""
    if x.rows.coords is not None:
        return _load_piece_tma(x.rows.source[0 if START == 0 else 1], x.rows.coords, x.start, ROWS, START, BLOCK)
    else:
        rows_mask = None if x.end is None else x.start + tl.arange(0, ROWS) < x.end
        ptrs = _pointers_from(x.rows, x.start, ROWS, TILE.WIDE_ROWS)
        piece = load_piece(ptrs, rows_mask, START, BLOCK, TILE.HEAD_DIM_V)
        fence_copies()
        return piece


@triton.jit
def dot_halves(a, x, acc, one, TILE: tl.constexpr):
    """acc + a @ b.T for the Halves b, each piece in a `dot_once`.

    A piece is loaded when the last one has been read: both take the same shared memory.
    """
    ROWS: tl.constexpr = acc.shape[1]
    FIRST: tl.constexpr = a[0].shape[1]
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    acc = dot_once(a[0], _load_half(x, ROWS, 0, FIRST, TILE), acc, one, PRECISION)
    if len(a) > 1:
        acc = dot_once(a[1], _load_half(x, ROWS, FIRST, a[1].shape[1], TILE), acc, one, PRECISION)
    return acc


@triton.jit
def dot_add_halves(a, x, acc, TILE: tl.constexpr):
    """acc + a @ b for the Halves b, loaded piece by piece as in `dot_halves`.

    The compiler would keep pieces that it knows to be those of `dot_halves`: start is `computed_again`.
    """
    ROWS: tl.constexpr = a.shape[1]
    FIRST: tl.constexpr = acc[0].shape[1]
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    x = Halves(x.rows, computed_again(x.start), x.end)
    first = tl.dot(a, _load_half(x, ROWS, 0, FIRST, TILE), acc[0], input_precision=PRECISION)
    if len(acc) > 1:
        half = _load_half(x, ROWS, FIRST, acc[1].shape[1], TILE)
        return first, tl.dot(a, half, acc[1], input_precision=PRECISION)
    else:
        return (first,)


@triton.jit
def _load_fenced(ptrs, rows_mask, START: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """load_piece for a matmul of a loop."""
    piece = load_piece(ptrs, rows_mask, START, BLOCK, HEAD_DIM)
    fence_copies()
    return piece


@triton.jit
def dot_pieces(a, x, start, one, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """a @ b.T for the BLOCK_N rows b from start on of the Rows x, with pointers, each piece of a in a `dot_once`.

    A piece is loaded when the last one has been read: fewer registers than for all columns take it to shared memory.
    """
    ROWS: tl.constexpr = TILE.BLOCK_N
    FIRST: tl.constexpr = a[0].shape[1]
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    ptrs = _pointers_from(x, start, ROWS, TILE.WIDE_ROWS)
    rows_mask = start + tl.arange(0, ROWS) < x.seqlen if MASKED else None
    c = apart(tl.zeros([a[0].shape[0], ROWS], tl.float32), one)
    c = dot_once(a[0], _load_fenced(ptrs, rows_mask, 0, FIRST, HEAD_DIM), c, one, PRECISION)
    if len(a) > 1:
        c = dot_once(a[1], _load_fenced(ptrs, rows_mask, FIRST, a[1].shape[1], HEAD_DIM), c, one, PRECISION)
    return c


@triton.jit
def dot_add_pieces(a, x, start, acc, MASKED: tl.constexpr, TILE: tl.constexpr):
    """acc + a @ b for the BLOCK_N rows b from start on of the Rows x, loaded as in `dot_pieces`."""
    ROWS: tl.constexpr = TILE.BLOCK_N
    FIRST: tl.constexpr = acc[0].shape[1]
    PRECISION: tl.constexpr = TILE.INPUT_PRECISION
    ptrs = _pointers_from(x, start, ROWS, TILE.WIDE_ROWS)
    rows_mask = start + tl.arange(0, ROWS) < x.seqlen if MASKED else None
    b = _load_fenced(ptrs, rows_mask, 0, FIRST, TILE.HEAD_DIM_V)
    first = tl.dot(a, b, acc[0], input_precision=PRECISION)
    if len(acc) > 1:
        b = _load_fenced(ptrs, rows_mask, FIRST, acc[1].shape[1], TILE.HEAD_DIM_V)
        return first, tl.dot(a, b, acc[1], input_precision=PRECISION)
    else:
        return (first,)


@triton.jit
def store_piece(ptrs, rows_mask, piece, START: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the columns from START on of the rows of `store_tile`."""
    BLOCK: tl.constexpr = piece.shape[1]
    mask = _piece_mask(ptrs, rows_mask, START, BLOCK, HEAD_DIM)
    tl.store(ptrs + _columns(START, BLOCK), piece.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(ptrs, rows_mask, tile, HEAD_DIM: tl.constexpr):
    """Store a tile to the rows at ptrs (rows, 1) that are in rows_mask."""
    store_piece(ptrs, rows_mask, tile[0], 0, HEAD_DIM)
    if len(tile) > 1:
        store_piece(ptrs, rows_mask, tile[1], tile[0].shape[1], HEAD_DIM)


@triton.jit
def clear_rows(view, head, spare, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store 0 in the Spare rows of a packed tensor, a View; None: there is none."""
    if view is not None:
        ptr = view.ptr + tl.cast(head, tl.int64) * view.strides.head
        ptrs = row_pointers(ptr, spare.rows, view.strides.row, True)
        store_tile(ptrs, spare.mask, zeros_tile(ROWS, HEAD_DIM), HEAD_DIM)


@triton.jit
def add_tile(ptrs, rows_mask, tile, HEAD_DIM: tl.constexpr):
    """Add a tile atomically to the rows at ptrs (rows, 1) that are in rows_mask; the order is not fixed."""
    FIRST: tl.constexpr = piece_0(HEAD_DIM)
    SECOND: tl.constexpr = piece_1(HEAD_DIM)
    mask = _piece_mask(ptrs, rows_mask, 0, FIRST, HEAD_DIM)
    tl.atomic_add(ptrs + _columns(0, FIRST), tile[0], mask=mask, sem="relaxed")
    if SECOND > 0:
        mask = _piece_mask(ptrs, rows_mask, FIRST, SECOND, HEAD_DIM)
        tl.atomic_add(ptrs + _columns(FIRST, SECOND), tile[1], mask=mask, sem="relaxed")


@triton.jit
def add_tile_tma(descs, coords, start, tile, HEAD_DIM: tl.constexpr):
    """add_tile through descriptors."""
    FIRST: tl.constexpr = piece_0(HEAD_DIM)
    SECOND: tl.constexpr = piece_1(HEAD_DIM)
    ROWS: tl.constexpr = tile[0].shape[0]
    outer, batch, head, row = coords
    descs[0].atomic_add([outer, batch, head, row + start, 0], tile[0].reshape(1, 1, 1, ROWS, FIRST))
    if SECOND > 0:
        descs[1].atomic_add([outer, batch, head, row + start, FIRST], tile[1].reshape(1, 1, 1, ROWS, SECOND))


@triton.jit
def zeros_tile(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDEST: tl.constexpr = 512):
    """A tile (ROWS, HEAD_DIM) of zeros in fp32."""
    first = tl.zeros([ROWS, piece_0(HEAD_DIM, WIDEST)], tl.float32)
    if piece_1(HEAD_DIM, WIDEST) > 0:
        return first, tl.zeros([ROWS, piece_1(HEAD_DIM, WIDEST)], tl.float32)
    else:
        return (first,)


@triton.jit
def cast_tile(tile, dtype: tl.constexpr):
    """The tile in another dtype."""
    cast = ()
    for i in tl.static_range(len(tile)):
        cast += (tile[i].to(dtype),)
    return cast


@triton.jit
def scale_rows(tile, factor):
    """The tile with each row multiplied by its factor (rows,)."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled += (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def merge_rows(a, weights_a, b, weights_b):
    """Two tiles in fp32, each row times its weight (rows,), and added; see `merge_weights`."""
    first = tl.fma(b[0], tl.broadcast_to(weights_b[:, None], b[0].shape), a[0] * weights_a[:, None])
    if len(a) > 1:
        return first, tl.fma(b[1], tl.broadcast_to(weights_b[:, None], b[1].shape), a[1] * weights_a[:, None])
    else:
        return (first,)


@triton.jit
def scale_tile(tile, factor):
    """The tile multiplied by a scalar."""
    if len(tile) > 1:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def row_dot(a, b):
    """Dot product of each row of a with the same row of b, (rows,) in fp32."""
    c = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        c += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return c


@triton.jit
def dot_transposed(a, b, INPUT_PRECISION: tl.constexpr, start=None, one=None):
    """start + a @ b.T, summed over the pieces of the head dimension. start broadcasts; None is 0. With one each matmul
    is a `dot_once`."""
    if start is not None:
        start = tl.broadcast_to(start, [a[0].shape[0], b[0].shape[0]])
    if one is None:
        c = tl.dot(a[0], b[0].T, start, input_precision=INPUT_PRECISION)
        if len(a) > 1:
            c = tl.dot(a[1], b[1].T, c, input_precision=INPUT_PRECISION)
        return c
    else:
        c = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32) if start is None else start
        c = dot_once(a[0], b[0], apart(c, one), one, INPUT_PRECISION)
        if len(a) > 1:
            c = dot_once(a[1], b[1], c, one, INPUT_PRECISION)
        return c


@triton.jit
def dot_add(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b, piece by piece."""
    first = tl.dot(a, b[0], acc[0], input_precision=INPUT_PRECISION)
    if len(b) > 1:
        return first, tl.dot(a, b[1], acc[1], input_precision=INPUT_PRECISION)
    else:
        return (first,)


@triton.jit
def dot_add_computed(a, b, acc, one, INPUT_PRECISION: tl.constexpr):
    """`dot_add` of a computed a in the dtype of b; with the `one` of `dot_once`, wgmma reads a from shared memory.

    Triton keeps a computed operand in registers: 16 of a thread for 64 x 64 elements and eight warps. It does not see
    that what a loop hands to its next trip was computed. Where the sums of dK and dV fill the registers, `lock` gains
    up to 2 %, and ALiBi spills nothing; softcap has its peak elsewhere, and spills more.
    """
    a = a.to(b[0].dtype)
    if one is None:
        acc = dot_add(a, b, acc, INPUT_PRECISION)
    else:
        for _ in tl.range(0, one, num_stages=1):
            acc = dot_add(a, b, acc, INPUT_PRECISION)
            a = tl.zeros_like(a)
    return acc
