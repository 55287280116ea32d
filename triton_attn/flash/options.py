"""What all flash kernels need to know of a call, checked and in one shape."""

from typing import NamedTuple


class AttentionOptions(NamedTuple):
    softmax_scale: float
    window: tuple  # (left, right), None: unlimited; causal sets right to 0
    softcap: float | None
    alibi_slopes: object  # tensor (num_heads_q,) or (batch, num_heads_q), or None
    sinks: object  # tensor (num_heads_q,), or None
    dropout: tuple | None = None  # as dropout_arguments gives it


def dropout_arguments(dropout_p, dropout_seed):
    """Dropout as the kernels take it: (seed tensor, threshold of 31 random bits, factor of kept weights), or None."""
    return (dropout_seed, int(dropout_p * 2**31), 1 / (1 - dropout_p)) if dropout_p > 0 else None
