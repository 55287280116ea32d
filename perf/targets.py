"""What our kernels are to reach on an H100 or H200, and what they measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from perf.machine import COPY
from perf.results import OURS

CUDNN, FLEX = "SDPA cuDNN", "FlexAttention"
LENGTHS = (4096, 8192, 16384)
MLA_TFLOPS = 450
MLA_SHARE_OF_COPY = 0.8


@dataclass(frozen=True)
class Target:
    """`value(rows, roofs)` is to be `least` or more; None where a row that it needs was not measured."""

    name: str
    least: float
    value: Callable


def _of(rows, provider, figure, **columns):
    """The figure of a provider at a shape, None where it is not known."""
    for row in rows:
        if row["provider"] == provider and all(row[name] == value for name, value in columns.items()):
            return row[figure]
    return None


def _against(peer, rows, roofs, *, direction):
    """Our TFLOP/s over the peer's, the least of all lengths."""
    ratios = []
    for seqlen in LENGTHS:
        shape = {"family": "flash", "pass": direction, "seqlen_k": seqlen, "head_dim": 128, "causal": True}
        ours, theirs = (_of(rows, provider, "tflops", **shape) for provider in (OURS, peer))
        if ours is None or theirs is None:
            return None
        ratios.append(ours / theirs)
    return min(ratios)


def _decode(rows, roofs):
    return _of(rows, OURS, "roof_share", family="paged", batch=32, seqlen_k=8192)


def _latent_decode(rows, roofs):
    """Of its limit the share of what binds, the larger of the two: the other limit cannot be reached then."""
    shape = {"family": "mla", "pass": "decode", "batch": 32, "seqlen_k": 8192, "num_heads_q": 128, "note": "bfloat16"}
    tflops, gbps = (_of(rows, OURS, figure, **shape) for figure in ("tflops", "gbps"))
    if tflops is None or not roofs.get(COPY):
        return None
    return max(tflops / MLA_TFLOPS, gbps / (MLA_SHARE_OF_COPY * roofs[COPY]))


TARGETS = (
    Target("forward, D 128, causal, 4k to 16k, over SDPA cuDNN", 1.0, partial(_against, CUDNN, direction="forward")),
    Target("forward, D 128, causal, 4k to 16k, over FlexAttention", 1.3, partial(_against, FLEX, direction="forward")),
    Target("backward, D 128, causal, 4k to 16k, over SDPA cuDNN", 0.85, partial(_against, CUDNN, direction="backward")),
    Target("paged decode, batch 32, 8k, share of a copy's bandwidth", 0.85, _decode),
    Target("MLA decode, batch 32, 8k, over 450 TFLOP/s or 80 % of a copy's bandwidth", 1.0, _latent_decode),
)


def judge(rows, roofs):
    """[{"target", "least", "measured", "verdict"}]: met, missed or not measured.

    rows are dicts with the columns of perf/results.py, roofs what `perf.machine.describe` gives.
    """
    judged = []
    for target in TARGETS:
        value = target.value(rows, roofs)
        verdict = "not measured" if value is None else "met" if value >= target.least else "missed"
        judged.append({"target": target.name, "least": target.least, "measured": value, "verdict": verdict})
    return judged
