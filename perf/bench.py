"""Throughput of attention against sequence length, for our kernel and its peers.

On a GPU it is measured: CUDA events, a cold L2 cache, providers in turn, median with the 20th and 80th percentile; each
provider must give the right result before it is timed, and one that cannot is recorded with the reason.
Without a GPU it is predicted from the code of our default configs, compiled on the spot (perf/predict.py), twice:
`bound`, where everything overlaps, and `lock`, where products and softmax never do. Picture and CSV say that it is a
prediction.

FLOP by the field's convention: 4 B H S^2 D, half of it with a causal mask.
"""

from dataclasses import astuple

from tqdm import tqdm

from perf import plot, results
from perf.device import has_gpu
from perf.gpus import RATES
from perf.problems import HEAD_DIMS, SEQLENS, grid
from perf.tables import print_table


def add_arguments(parser):
    parser.add_argument("--head-dim", dest="head_dims", type=int, nargs="+", default=HEAD_DIMS, metavar="D")
    parser.add_argument("--seqlen", dest="seqlens", type=int, nargs="+", default=SEQLENS, metavar="S")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--arch", choices=RATES, default="sm_90", help="what to predict for, without a GPU")


def run(out_dir, head_dims=HEAD_DIMS, seqlens=SEQLENS, dtype="bfloat16", arch="sm_90"):
    """Write `flash_forward.csv` row by row, then its picture."""
    problems = grid(head_dims, seqlens)
    rows = _measured(problems, dtype) if has_gpu() else _predicted(problems, dtype, arch)
    path = out_dir / "flash_forward.csv"
    done = []
    with results.Table(path, results.COLUMNS) as table:
        for row in rows:
            table.append(astuple(row))
            done.append(row)
    print_table(_summary(done))
    return [path, plot.throughput(path)]


def _predicted(problems, dtype, arch):
    from perf.predict import flash_forward

    return flash_forward(problems, dtype, arch)


def _measured(problems, dtype):
    from perf.machine import matmul_rate
    from perf.measure import throughput
    from perf.providers import PROVIDERS

    roof = matmul_rate()
    for problem in tqdm(problems, desc="measuring", unit="shape"):
        yield from throughput(problem, dtype, PROVIDERS, roof)


def _summary(rows):
    """TFLOP/s, a line per shape and a column per provider."""
    lines = {}
    for row in rows:
        shape = {"head_dim": row.head_dim, "causal": row.causal, "batch": row.batch, "seqlen": row.seqlen_q}
        lines.setdefault(tuple(shape.values()), shape)[row.provider] = row.tflops
    return list(lines.values())
