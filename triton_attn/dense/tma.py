"""TMA descriptors of dense and packed tensors, and which tensors can have one."""

from .._jit.tiles import HALF, PACKED_END, piece_0, piece_1


def strides_suit_tma(shape, strides, element_size):
    """Whether TMA can address a tensor that starts at a multiple of 16 bytes: strides in units of these, nothing empty,
    broadcast or out of range."""
    unit = 16 // element_size
    return 0 not in shape and shape[-3] < PACKED_END.value and all(s > 0 and s % unit == 0 for s in strides[:-1])


def tma_geometry(shape, strides, block_rows, halved=False):
    """Fields of descriptors over (outer, batch, head, row, dim), one for each piece, zero past a sequence's end.
    halved: the pieces of `dot_halves` and `dot_add_halves`.

    TMA compares each coordinate with one bound, which in a packed tensor is the same for all sequences. Row coordinates
    of a sequence therefore run from E - seqlen to the bound E = PACKED_END. Two other coordinates correct the address:
    batch = first row + seqlen, with the stride of a row, and outer = E, with the stride 2^34 - row stride. E * 2^34
    elements are a multiple of 2^64 bytes, which is 0, and the rest adds up to first row + row. Source:
    `triton.tools.ragged_tma`.
    """
    *batch, rows, heads, dim = shape
    *batch_stride, row, head, _ = strides
    if batch:
        shape, strides = [1, *batch, heads, rows, dim], [*batch_stride, *batch_stride, head, row, 1]
    else:
        end = PACKED_END.value
        shape, strides = [end + 1, end, heads, end, dim], [2**34 - row, row, head, row, 1]
    widest = HALF.value if halved else 512
    pieces = [piece for piece in (piece_0(dim, widest), piece_1(dim, widest)) if piece]
    return [dict(shape=shape, strides=strides, block_shape=[1, 1, 1, block_rows, piece]) for piece in pieces]
