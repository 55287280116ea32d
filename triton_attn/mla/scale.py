"""The scale of MLA's scores."""

import math

from .._host.checks import check_length, check_number, fail


def mla_softmax_scale(
    qk_nope_head_dim: int, qk_rope_head_dim: int, rope_factor: float = 1.0, mscale_all_dim: float = 0.0
) -> float:
    """The factor on scores of multi-head latent attention, with the correction that comes with YaRN.

        (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * m ** 2,   m = 1 + 0.1 * mscale_all_dim * ln(rope_factor)

    m is 1 for a rope_factor of 1 or less. DeepSeek-V3 (128, 64, 40, 1) has 0.135234, V2-Lite (128, 64, 40, 0.707) has
    0.114721. What was absorbed changes nothing: it is never the width of the latent vectors.

    Args:
        qk_nope_head_dim, qk_rope_head_dim: of the model's queries and keys.
        rope_factor: `factor` of the model's YaRN scaling, 1 for none.
        mscale_all_dim: of the same, 0 for none.

    Raises:
        TypeError, ValueError: an argument is no number, or no head dimension.

    Example:
        >>> round(triton_attn.mla_softmax_scale(128, 64), 6)
        0.072169
        >>> round(triton_attn.mla_softmax_scale(128, 64, rope_factor=40, mscale_all_dim=1), 6)  # DeepSeek-V3
        0.135234

    Source: Peng et al., YaRN (2023), arXiv:2309.00071; DeepSeek-V2 (2024), arXiv:2405.04434.
    """
    qk_nope_head_dim = check_length("qk_nope_head_dim", qk_nope_head_dim)
    qk_rope_head_dim = check_length("qk_rope_head_dim", qk_rope_head_dim)
    if qk_nope_head_dim + qk_rope_head_dim == 0:
        fail("qk_nope_head_dim", "1 or more, with qk_rope_head_dim", 0)
    rope_factor = check_number("rope_factor", rope_factor)
    mscale_all_dim = check_number("mscale_all_dim", mscale_all_dim)
    mscale = 1 + 0.1 * mscale_all_dim * math.log(rope_factor) if rope_factor > 1 else 1.0
    return (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * mscale**2
