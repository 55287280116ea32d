"""Online softmax: the running maximum and sum of a tile of query rows, in base 2 and fp32."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_init(sinks_ptr, head, BLOCK_M: tl.constexpr):
    """Running maximum (log2 units) and sum before the first key: those of the sink logit, or of nothing."""
    m_i = tl.zeros([BLOCK_M], tl.float32) + load_sink(sinks_ptr, head)
    l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    return m_i, l_i


@triton.jit
def load_sink(sinks_ptr, head):
    """The sink logit in log2 units; -inf without sinks."""
    sink = float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    return sink


@triton.jit
def softmax_step(s, m_i, l_i, scale_log2, MASKED: tl.constexpr):
    """Add a tile of scores to the running softmax.

    The scores s (BLOCK_M, BLOCK_N) are not yet multiplied by scale_log2: in the exponent this takes one fused
    multiply-add. Returns p = exp2(s * scale_log2 - m), the factor alpha that rescales earlier sums and outputs, and the
    new m_i and l_i. After a MASKED tile a row may not have seen a key: its maximum is -inf, and p must be 0.
    """
    p, alpha, m_i = softmax_weights(s, m_i, scale_log2, MASKED)
    l_i = l_i * alpha + tl.sum(p, 1)
    return p, alpha, m_i, l_i


@triton.jit
def softmax_weights(s, m_i, scale_log2, MASKED: tl.constexpr, SLACK: tl.constexpr = 0):
    """p, alpha and the new m_i of `softmax_step`.

    With SLACK the running maximum stays where no score exceeds it by more than SLACK (log2 units). Weights are then up
    to 2^SLACK, alpha is exactly 1, and the result is the same but for rounding: sums and outputs have the same factor.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    if SLACK > 0:
        m_new = tl.where(m_new - m_i > SLACK, m_new, m_i)
    m_sub = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    return tl.math.exp2(s * scale_log2 - m_sub[:, None]), tl.math.exp2(m_i - m_sub), m_new


@triton.jit
def softmax_finish(m_i, l_i, ROUNDED: tl.constexpr = False):
    """The factor that normalises the output, and the natural log-sum-exp. Without keys: output 0, lse -inf.

    ROUNDED: lse has the bits that a store would give it, since the compiler cannot fuse its product with what follows.
    """
    empty = l_i == 0.0
    norm = 1.0 / tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, m_i, m_i + tl.math.log2(tl.where(empty, 1.0, l_i)))
    if ROUNDED:
        return norm, tl.fma(lse, tl.full(lse.shape, LN_2, tl.float32), tl.zeros_like(lse))
    else:
        return norm, lse * LN_2


@triton.jit
def merge_weights(lse_a, lse_b):
    """Weights of two results of the same rows over different keys, and the natural log-sum-exp over both.

    A result without keys changes no bit of the other. So results that are merged one after the other, with `merge_rows`
    for outputs, are the same however many without keys are among them. No operation is left for the compiler to fuse.
    """
    m = tl.maximum(lse_a, lse_b)
    m_sub = tl.where(m == float("-inf"), 0.0, m)
    a = tl.math.exp2((lse_a - m_sub) * LOG2_E)
    b = tl.math.exp2((lse_b - m_sub) * LOG2_E)
    total = a + b
    alone = (total == 1.0) | (total == 0.0)
    norm = tl.where(alone, 1.0, 1.0 / tl.where(alone, 1.0, total))
    lse = tl.where(alone, m, tl.fma(tl.math.log2(total), tl.zeros_like(m) + LN_2, m_sub))
    return a * norm, b * norm, lse
