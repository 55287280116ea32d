"""Arguments of the kernels of dense attention, forward and backward."""

from typing import NamedTuple

from .._host.descriptors import describe
from .._host.layout import batch_head_strides
from .._jit.args import Scores, Strides, View
from .._jit.softmax import LOG2_E

# Names of arguments that must not mean a new compilation: lengths and what follows from them.
LENGTHS = ["seqlen_q", "seqlen_k", "lse_stride", "num_tiles", "section_size"]


class FlashTile(NamedTuple):
    """What a kernel of flash attention is compiled for: its shape, its config, and how it loads."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    INPUT_PRECISION: str
    USE_TMA: bool
    VECTOR: int  # elements of a load, which divide all strides
    WIDE_ROWS: bool
    HOIST: bool  # see `may_hoist`


def operand(x, strides, geometry):
    """Three arguments of a kernel: a View; or None and the descriptors of a geometry, one for each piece."""
    return (View(x, strides), None, None) if geometry is None else (None, *describe(x, geometry))


def scores_of(options, window):
    """The Scores of an AttentionOptions."""
    alibi = options.alibi_slopes
    if alibi is not None:
        batch_stride, head_stride = batch_head_strides(alibi)
        alibi = View(alibi, Strides(batch_stride, 0, head_stride))
    return Scores(options.softmax_scale * LOG2_E.value, options.softcap, alibi, window)
