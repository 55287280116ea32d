"""What TMA descriptors of dense and packed tensors say, and which tensors can have one."""

from .._jit.tiles import PACKED_END, piece_0, piece_1


def tma_ready(x):
    """Whether TMA can address x: base and strides in 16-byte units, nothing empty, broadcast or out of range."""
    return x.data_ptr() % 16 == 0 and strides_suit_tma(x.shape, x.stride(), x.element_size())


def strides_suit_tma(shape, strides, element_size):
    unit = 16 // element_size
    return 0 not in shape and shape[-3] < PACKED_END.value and all(s > 0 and s % unit == 0 for s in strides[:-1])


def tma_geometry(shape, strides, block_rows):
    """(shape, strides, block shape) of descriptors over (outer, batch, head, row, dim), zero past a sequence's end.

    TMA checks each coordinate against a bound, and a packed tensor has one for all its rows. There the row counts from
    E - seqlen to E = PACKED_END, the bound of every sequence. The address is brought back by batch = first row +
    seqlen, with the stride of a row, and by outer = E, with stride 2^34 less that of a row: E 2^34 elements are a
    multiple of 2^64 bytes, nothing, and the rest adds up to first row + row. `triton.tools.ragged_tma` does the same.
    """
    *batch, rows, heads, dim = shape
    *batch_stride, row, head, _ = strides
    if batch:
        shape, strides = [1, *batch, heads, rows, dim], [*batch_stride, *batch_stride, head, row, 1]
    else:
        end = PACKED_END.value
        shape, strides = [end + 1, end, heads, end, dim], [2**34 - row, row, head, row, 1]
    pieces = (piece_0(dim), piece_1(dim)) if piece_1(dim) else (piece_0(dim),)
    return [(shape, strides, [1, 1, 1, block_rows, piece]) for piece in pieces]
