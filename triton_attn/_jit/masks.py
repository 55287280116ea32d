"""Which keys a query sees, and what is done to a score before the softmax.

Query i stands at key position i + offset, offset = seqlen_k - seqlen_q (aligned to the bottom right), and sees keys j
with i + offset - left <= j <= i + offset + right, where window = (left, right) and None is no limit and costs nothing.
"""

import triton
import triton.language as tl

from .softmax import LOG2_E


@triton.jit
def key_range(start_m, end_m, seqlen_k, offset, window, BLOCK_N: tl.constexpr):
    """Keys that the queries [start_m, end_m) see, as (lo, full_lo, full_hi, hi).

    [lo, hi) is seen by at least one row. [full_lo, full_hi), a whole number of tiles counted from lo, is seen by every
    row. The rest, [lo, full_lo) and [full_hi, hi), is crossed by a boundary and needs a mask.
    """
    left, right = window
    lo = 0
    hi = seqlen_k
    full_lo = 0
    full_hi = seqlen_k
    if left is not None:
        lo = tl.maximum(start_m + offset - left, 0)
        full_lo = tl.maximum(end_m - 1 + offset - left, 0)
    if right is not None:
        hi = tl.minimum(end_m + offset + right, seqlen_k)
        full_hi = tl.minimum(start_m + offset + right + 1, seqlen_k)
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(lo + tl.cdiv(full_lo - lo, BLOCK_N) * BLOCK_N, hi)
    full_hi = full_lo + tl.maximum(full_hi - full_lo, 0) // BLOCK_N * BLOCK_N
    return lo, full_lo, full_hi, hi


@triton.jit
def mask_scores(s, offs_m, start_n, seqlen_k, offset, window):
    """Scores s (BLOCK_M, BLOCK_N) of keys from start_n on, -inf where a query does not see a key.

    Columns counted from 0 are compared with a row's last and first visible column: constants against two registers.
    """
    left, right = window
    columns = tl.arange(0, s.shape[1])[None, :]
    last = tl.zeros_like(offs_m) + (seqlen_k - 1 - start_n)
    if right is not None:
        last = tl.minimum(offs_m + (offset + right - start_n), last)
    visible = columns <= last[:, None]
    if left is not None:
        visible &= columns >= (offs_m + (offset - left - start_n))[:, None]
    return tl.where(visible, s, float("-inf"))


@triton.jit
def modify_scores(s, offs_m, offs_n, offset, scale_log2, softcap, alibi_slope):
    """Scores in log2 units after scale, softcap * tanh(s / softcap) and - slope * |distance|; None is none."""
    s *= scale_log2
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1) saturates at both ends, and exp(2 x) is exp2(2 s / softcap).
        s = softcap * LOG2_E * (1.0 - 2.0 / (tl.math.exp2(s * (2.0 / softcap)) + 1.0))
    if alibi_slope is not None:
        distance = tl.abs(offs_n[None, :] - (offs_m[:, None] + offset)).to(tl.float32)
        s -= alibi_slope * LOG2_E * distance
    return s
