"""Kernel that merges partial results of attention, and its launcher."""

import triton
import triton.language as tl

from .._host.device import launch
from .._host.layout import LSE
from .._jit.softmax import LOG2_E, softmax_finish

# Parts that are loaded at once, and elements of the tile that they make.
MAX_PARTS = 32
TILE_ELEMENTS = 4096


# Lengths and what follows from them: a new length must not mean a new compilation.
LENGTHS = [
    "num_parts",
    "num_rows",
    "seqlen_q",
    "lses_ptr",
    "lses_part_stride",
    "lses_batch_stride",
    "lses_row_stride",
    "lses_head_stride",
    *LSE,
]


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    outs_strides,
    out_strides,
    lses_part_stride,
    lses_batch_stride,
    lses_row_stride,
    lses_head_stride,
    lse_batch_stride,
    lse_row_stride,
    lse_head_stride,
    num_parts,
    num_rows,
    seqlen_q,
    num_heads,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program merges the parts of BLOCK_ROWS rows; a row is one head of one query.

    Grid: num_rows / BLOCK_ROWS, rounded up. Strides are of (part,) batch, row, head.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_mask = rows < num_rows
    head = rows % num_heads
    query = rows // num_heads % seqlen_q
    batch = rows // num_heads // seqlen_q
    # Tiles are (row, part), flattened to rows where they are loaded: a batch of small loads, all on their way together.
    parts = tl.arange(0, BLOCK_PARTS).to(tl.int64)
    outs_rows = batch * outs_strides[1] + query * outs_strides[2] + head * outs_strides[3]
    lses_rows = batch * lses_batch_stride + query * lses_row_stride + head * lses_head_stride
    offs_d = tl.arange(0, BLOCK_D)

    m_i = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        mask = rows_mask[:, None] & (first + parts < num_parts)[None, :]
        ptrs = lses_ptr + lses_rows[:, None] + (first + parts)[None, :] * lses_part_stride
        lse = tl.load(ptrs, mask=mask, other=float("-inf")) * LOG2_E
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # how others write that there is no key
        m_new = tl.maximum(m_i, tl.max(lse, 1))
        m_sub = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.math.exp2(lse - m_sub[:, None])
        alpha = tl.math.exp2(m_i - m_sub)
        offsets = (outs_rows[:, None] + (first + parts)[None, :] * outs_strides[0])[:, :, None] + offs_d[None, None, :]
        seen = (lse > float("-inf"))[:, :, None] & (offs_d < HEAD_DIM_V)[None, None, :]
        outs = tl.load(outs_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
        acc = acc * alpha[:, None] + tl.sum(outs * weights[:, :, None], 1)
        l_i = l_i * alpha + tl.sum(weights, 1)
        m_i = m_new

    norm, lse = softmax_finish(m_i, l_i)
    if lse_ptr is not None:
        offsets = batch * lse_batch_stride + query * lse_row_stride + head * lse_head_stride
        tl.store(lse_ptr + offsets, lse, mask=rows_mask)
    offsets = batch * out_strides[0] + query * out_strides[1] + head * out_strides[2]
    mask = rows_mask[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    out = (acc * norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets[:, None] + offs_d[None, :], out, mask=mask)


def launch_merge(outs, lses, out, lse):
    """Launch the merge kernel: one launch.

    outs is (num_parts, batch, seqlen_q, num_heads_q, head_dim_v), lses (num_parts, batch, seqlen_q, num_heads_q), out
    and lse as one part of them; lse may be None: not wanted.
    """
    num_parts, batch, seqlen_q, num_heads, head_dim_v = outs.shape
    num_rows = batch * seqlen_q * num_heads
    if num_rows == 0:
        return
    # In plain Python: Triton's own functions of these names take longer than all else here.
    block_d = 1 << (head_dim_v - 1).bit_length()
    block_parts = min(MAX_PARTS, 1 << max(0, num_parts - 1).bit_length())
    block_rows = max(1, TILE_ELEMENTS // (block_d * block_parts))
    launch(
        _merge_kernel,
        (-(-num_rows // block_rows),),
        outs.device,
        outs,
        lses,
        out,
        lse,
        outs.stride()[:4],
        out.stride()[:3],
        *lses.stride(),
        *((None, None, None) if lse is None else lse.stride()),
        num_parts,
        num_rows,
        seqlen_q,
        num_heads,
        HEAD_DIM_V=head_dim_v,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTS=block_parts,
        BLOCK_D=block_d,
        num_warps=4,
    )
