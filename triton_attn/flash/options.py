"""What all flash kernels need to know of a call, checked and in one shape."""

from typing import NamedTuple


class AttentionOptions(NamedTuple):
    softmax_scale: float
    window: tuple  # (left, right), None: unlimited; causal sets right to 0
    softcap: float | None
    alibi_slopes: object  # tensor (num_heads_q,) or (batch, num_heads_q), or None
    sinks: object  # tensor (num_heads_q,), or None
    dropout: tuple | None = None  # (seed tensor, threshold, 1 / (1 - p)) as the kernels take it
