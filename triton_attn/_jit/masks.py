"""Masks, and the other changes to a score before the softmax.

Query i has key position i + offset, where offset = seqlen_k - seqlen_q (bottom-right alignment). With window = (left,
right) it sees the keys j with i + offset - left <= j <= i + offset + right. None is no limit.

The rule is symmetric: key j is seen by the queries i with j - offset - right <= i <= j - offset + left. So rows can be
queries and columns keys, or rows keys and columns queries, with -offset and (right, left).
"""

import triton
import triton.language as tl

from .softmax import LN_2, LOG2_E
from .workarounds import reciprocal


@triton.jit
def mask_scores(s, rows, start_column, num_columns, offset, window):
    """Scores s (rows, columns), -inf where a row does not see a column; the columns start at start_column.

    The limits of a row are shifted by start_column, not the columns: columns stay constants, and a row needs two
    registers.
    """
    left, right = window
    columns = tl.arange(0, s.shape[1])[None, :]
    last = tl.zeros_like(rows) + last_column(rows, start_column, num_columns, offset, right)
    visible = columns <= last[:, None]
    if left is not None:
        visible &= columns >= first_column(rows, start_column, offset, left)[:, None]
    return tl.where(visible, s, float("-inf"))


@triton.jit
def first_column(rows, start_column, offset, left):
    """The first column that each row sees, counted from start_column."""
    return rows + (offset - left - start_column)


@triton.jit
def last_column(rows, start_column, num_columns, offset, right):
    """The last column that each row sees, counted from start_column; a scalar where right is None."""
    last = num_columns - 1 - start_column
    if right is not None:
        last = tl.minimum(rows + (offset + right - start_column), last)
    return last


@triton.jit
def scale_scores(s, scores, slope, rows, start_column, offset, EXACT: tl.constexpr):
    """Scores in log2 units, not yet masked, from s = q . k; see Scores. slope is None without ALiBi."""
    s = scale_and_cap(s, scores, EXACT)
    if slope is not None:
        s = add_alibi(s, rows, start_column, offset, slope)
    return s


@triton.jit
def scale_and_cap(s, scores, EXACT: tl.constexpr):
    """scale_scores without ALiBi."""
    if scores.softcap is not None:
        s, _ = cap_scores(s, scores, EXACT)
    else:
        s *= scores.scale_log2
    return s


@triton.jit
def cap_scores(s, scores, EXACT: tl.constexpr):
    """softcap * tanh(scale * s / softcap) in log2 units, and its derivative by scale * s; softcap is in natural units.

    tanh computed from exp2 has an error of softcap * 1e-7, which is small beside the error of 16-bit scores. With EXACT
    the error is a few units in the last place of fp32.
    """
    # tanh(x) = 1 - u and tanh'(x) = u (2 - u), with u = 2 / (exp(2 x) + 1) and exp(2 x) = exp2(2 x / LN_2).
    # Both saturate at both ends, the derivative at exactly 0.
    softcap = scores.softcap
    u = reciprocal(0.5 * tl.math.exp2(s * (scores.scale_log2 * (2.0 / softcap))) + 0.5)
    tanh = 1.0 - u
    if EXACT:
        x = s * (scores.scale_log2 * (LN_2 / softcap))
        tanh = tl.where(tl.abs(x) < 0.625, _tanh_near_0(x), tanh)
    return tanh * (softcap * LOG2_E), u * (2.0 - u)


@triton.jit
def _tanh_near_0(x):
    """tanh(x) = x + x^3 p(x^2) with a minimax p: relative error 4e-9 for |x| < 0.625. 1 - u cancels for small x."""
    z = x * x
    p = -5.7049785e-3 * z + 2.0639079e-2
    p = p * z - 5.3739712e-2
    p = p * z + 1.3331442e-1
    p = p * z - 3.3333281e-1
    return x + x * (z * p)


@triton.jit
def add_alibi(s, rows, start_column, offset, slope):
    """s - slope * |column - position of the row|, in log2 units."""
    columns = tl.arange(0, s.shape[1])[None, :]
    return subtract_distance(s, columns - (rows + (offset - start_column))[:, None], slope)


@triton.jit
def subtract_distance(s, distance, slope):
    """s - slope * |distance|, in log2 units."""
    return s - slope * LOG2_E * tl.abs(distance).to(tl.float32)
