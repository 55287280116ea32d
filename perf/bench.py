"""Throughput of attention against sequence length, for our kernel and its peers.

On a GPU it is measured: CUDA events, a cold L2 cache, providers in turn, median with the 20th and 80th percentile; each
provider must give the right result before it is timed, and one that cannot is recorded with the reason.
Without a GPU it is predicted from the code of our default configs, compiled on the spot (perf/predict.py), twice:
`bound`, where everything overlaps, and `lock`, where products and softmax never do. Picture and CSV say that it is a
prediction.

FLOP by the field's convention: 4 B H S^2 D forward, 2.5 times that backward, half of it with a causal mask.
"""

import sys
from dataclasses import astuple

from tqdm import tqdm

from perf import plot, predict, results
from perf.device import has_gpu
from perf.gpus import RATES
from perf.machine import matmul_rate
from perf.measure import throughput
from perf.problems import FLOP_FACTORS, HEAD_DIMS, SEQLENS, grid
from perf.providers import PROVIDERS
from perf.tables import print_table


def add_arguments(parser):
    parser.add_argument("--pass", dest="direction", choices=FLOP_FACTORS, default="forward")
    parser.add_argument("--head-dim", dest="head_dims", type=int, nargs="+", default=HEAD_DIMS, metavar="D")
    parser.add_argument("--seqlen", dest="seqlens", type=int, nargs="+", default=SEQLENS, metavar="S")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--arch", choices=RATES, default="sm_90", help="what to predict for, without a GPU")


def run(out_dir, direction="forward", head_dims=HEAD_DIMS, seqlens=SEQLENS, dtype="bfloat16", arch="sm_90"):
    """Write `flash_<pass>.csv` row by row, then its picture."""
    problems = grid(head_dims, seqlens, direction=direction)
    rows = _measured(problems, dtype) if has_gpu() else predict.flash(problems, dtype, arch)
    path = out_dir / f"flash_{direction}.csv"
    done = []
    with results.Table(path, results.COLUMNS) as table:
        for row in rows:
            table.append(astuple(row))
            done.append(row)
    print(f"TFLOP/s against sequence length, {direction}, {dtype}, {done[0].gpu}, {done[0].source}")
    print_table(_summary(done))
    if done[0].source == results.PREDICTED:
        print("bound: matrix products and softmax overlap fully. lock: they never do. A measurement comes out lower.")
    for row in done:
        if row.tflops is None:
            print(f"{row.provider}, head_dim {row.head_dim}, seqlen {row.seqlen_q}: {row.note}")
    picture = plot.throughput(path)
    if any(row.provider == results.OURS and row.tflops is None for row in done):
        sys.exit("our kernel failed, see above")
    return [path, picture]


def _measured(problems, dtype):
    roof = matmul_rate()
    for problem in tqdm(problems, desc="measuring", unit="shape"):
        yield from throughput(problem, dtype, PROVIDERS, roof)


def _summary(rows):
    """TFLOP/s, a line per kind of attention and provider, a column per sequence length."""
    lines = {}
    for row in rows:
        kind = {"head_dim": row.head_dim, "mask": "causal" if row.causal else "full", "provider": row.provider}
        tflops = None if row.tflops is None else round(row.tflops)
        lines.setdefault(tuple(kind.values()), kind)[row.seqlen_q] = tflops
    return list(lines.values())
