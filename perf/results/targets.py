"""Targets of the kernels on an H100 or H200 in bf16, and their measured values. Needs no pandas, since a GPU run
evaluates its own targets.
"""

from collections.abc import Callable
from dataclasses import dataclass

from perf.results import MEASURED, OURS

LENGTHS = (4096, 8192, 16384)
MIN_LATENT_CONTEXT = 8192
MIN_LATENT_TFLOPS, MIN_LATENT_SHARE = 450, 0.80


@dataclass(frozen=True)
class Target:
    """A ratio. `measure` computes it from rows of one GPU, or returns None if they lack some of its inputs."""

    what: str
    at_least: float
    measure: Callable

    def verdict(self, value):
        if value is None:
            return "not measured yet"
        return "met" if value >= self.at_least else "missed"


def judge(rows):
    """{name of an H100 or H200: [value of each target]} from objects with the attributes of a `results.Row`."""
    gpus = {}
    for row in rows:
        gpu = row.gpu or ""
        if row.source == MEASURED and row.dtype == "bfloat16" and ("H100" in gpu or "H200" in gpu):
            gpus.setdefault(row.gpu, []).append(row)
    return {gpu: [target.measure(of_gpu) for target in TARGETS] for gpu, of_gpu in gpus.items()}


def _ratio(direction, peer):
    """Our speed over a peer's: the least over LENGTHS, all of which must be present; head_dim 128, causal."""

    def measure(rows):
        speeds = {}
        for row in rows:
            shape = row.family, row.direction, row.head_dim, row.causal
            if shape == ("flash", direction, 128, True) and row.seqlen_q == row.seqlen_k and row.tflops is not None:
                speeds[row.provider, row.seqlen_k, row.batch, row.num_heads_q, row.num_heads_kv] = row.tflops
        ratios = {}
        for (provider, length, *shape), ours in speeds.items():
            theirs = speeds.get((peer, length, *shape))
            if provider == OURS and length in LENGTHS and theirs is not None:
                ratios[length] = min(ours / theirs, ratios.get(length, ours / theirs))
        return min(ratios.values()) if len(ratios) == len(LENGTHS) else None

    return measure


def _paged_share(rows):
    shares = [row.roof_share for row in _steps(rows, "paged") if (row.batch, row.seqlen_k) == (32, 8192)]
    return min(shares, default=None)


def _latent_share(rows):
    """The least over the steps. For each step the nearer of its two goals counts."""
    return min(
        (
            max(row.tflops / MIN_LATENT_TFLOPS, row.roof_share / MIN_LATENT_SHARE)
            for row in _steps(rows, "mla")
            if row.seqlen_k >= MIN_LATENT_CONTEXT
        ),
        default=None,
    )


def _steps(rows, family):
    """Our decode steps over a bf16 cache. Steps without a speed or a measured roof are left out, since they have no
    share.
    """
    kind = family, "decode", OURS
    return [
        row
        for row in rows
        if (row.family, row.direction, row.provider) == kind
        and row.cache_dtype in (None, "bfloat16")
        and row.tflops is not None
        and row.roof_share is not None
    ]


TARGETS = (
    Target("forward over SDPA cuDNN, head_dim 128, causal, 4k to 16k", 1.0, _ratio("forward", "SDPA cuDNN")),
    Target("forward over FlexAttention, head_dim 128, causal, 4k to 16k", 1.3, _ratio("forward", "FlexAttention")),
    Target("backward over SDPA cuDNN, head_dim 128, causal, 4k to 16k", 0.85, _ratio("backward", "SDPA cuDNN")),
    Target("paged decode over the measured copy, batch 32, 8k", 0.85, _paged_share),
    Target(
        f"MLA decode over {MIN_LATENT_TFLOPS} TFLOP/s or {MIN_LATENT_SHARE} of the measured copy, from 8k",
        1.0,
        _latent_share,
    ),
)
