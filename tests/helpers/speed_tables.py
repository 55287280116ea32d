"""Invented tables of speeds: rows, and files of them."""

from dataclasses import astuple, replace

from perf import results
from perf.workloads.problems import DecodeProblem

MEASURED = {
    "gpu": "synthetic",
    "source": results.MEASURED,
    "p20_ms": 0.9,
    "p50_ms": 1.0,
    "p80_ms": 1.1,
    "roof_share": 0.5,
}


def row(**changes):
    values = dict(
        family="flash",
        provider="triton_attn",
        direction="forward",
        batch=1,
        seqlen_q=512,
        seqlen_k=512,
        num_heads_q=16,
        num_heads_kv=16,
        head_dim=128,
        head_dim_v=128,
        causal=True,
        dtype="bfloat16",
        gpu="some GPU",
        driver=None,
        torch="2.13.0",
        triton="3.9.0",
        commit="0123456",
        source=results.PREDICTED,
    )
    return results.Row(**values | changes)


def write(path, rows):
    with results.Table(path, results.COLUMNS) as table:
        for each in rows:
            table.append(astuple(each))
    return path


def grid_of(providers, head_dims=(64, 128), **changes):
    shapes = [
        (head_dim, causal, seqlen) for head_dim in head_dims for causal in (False, True) for seqlen in (512, 1024)
    ]
    return [
        row(
            provider=provider,
            head_dim=head_dim,
            head_dim_v=head_dim,
            causal=causal,
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            tflops=300.0 + 10 * i,
            **changes,
        )
        for head_dim, causal, seqlen in shapes
        for i, provider in enumerate(providers)
    ]


def steps_of(providers, batches=(1, 8), **changes):
    return [
        row(
            **DecodeProblem(batch, context).columns(),
            **changes | {"provider": provider, "gbps": 1000.0 + 100 * i, "roof_share": (1000.0 + 100 * i) / 2500},
        )
        for batch in batches
        for context in (1024, 2048)
        for i, provider in enumerate(providers)
    ]


def failed(each, note="out of memory"):
    return replace(each, **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "tflops", "gbps", "roof_share")), note=note)
