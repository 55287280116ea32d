"""Throughput of attention, ours and the peers'. flash: TFLOP/s of training and prefill against sequence length. paged:
GB/s of a decode step over a KV cache, against context and batch.

On a GPU the throughput is measured with CUDA events and a cold L2 cache. Providers take turns; the median and the 20th
and 80th percentile are reported. Each provider must give the right result before it is timed; one that cannot is
recorded with the reason. Without a GPU the throughput is predicted from the compiled code of our default configs
(perf/model/predict.py), twice: `bound` assumes that all units overlap, `lock` that matmuls and softmax never do. Plot
and CSV say that it is a prediction.

flash: FLOP by the usual convention, 4 B H S^2 D forward, 2.5 times that backward, half of it with a causal mask. paged:
bytes of K and V of all tokens, of q and of out, and their share of the measured copy bandwidth (predicted: of the data
sheet's bandwidth). 32 query heads, 8 KV heads, head_dim 128, pages of 16 tokens in random order; peers may use a
contiguous cache.
"""

import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass

from tqdm import tqdm

from perf import results
from perf.harness.device import has_gpu
from perf.harness.machine import copy_bandwidth, matmul_rate
from perf.harness.measure import throughput
from perf.model import predict
from perf.model.gpus import RATES
from perf.results import plot
from perf.results.tables import print_table
from perf.workloads.problems import (
    BATCHES,
    CONTEXTS,
    FLOP_FACTORS,
    HEAD_DIMS,
    MAX_CACHE_GIB,
    SEQLENS,
    decode_grid,
    grid,
)
from perf.workloads.providers import DECODE_PROVIDERS, PROVIDERS


@dataclass(frozen=True)
class Family:
    """A kernel family for `run`. `shapes` are the options of its grid; `line` gives the row headings of the table."""

    title: str
    shapes: tuple[str, ...]
    grid: Callable
    providers: dict
    roof: Callable
    predict: Callable
    left_out: str
    line: Callable


FAMILIES = {
    "flash": Family(
        title="TFLOP/s against sequence length",
        shapes=("direction", "head_dims", "seqlens"),
        grid=grid,
        providers=PROVIDERS,
        roof=matmul_rate,
        predict=predict.flash,
        left_out="latency, power, and memory below its data sheet",
        line=lambda row: {"head_dim": row.head_dim, "mask": "causal" if row.causal else "full"},
    ),
    "paged": Family(
        title="GB/s against context",
        shapes=("batches", "seqlens"),
        grid=decode_grid,
        providers=DECODE_PROVIDERS,
        roof=copy_bandwidth,
        predict=predict.paged,
        left_out="launches (which dominate short contexts), latency, and memory below its data sheet",
        line=lambda row: {"batch": row.batch},
    ),
}
FLAGS = {"direction": "--pass", "head_dims": "--head-dim", "batches": "--batch", "seqlens": "--seqlen"}


def add_arguments(parser):
    parser.add_argument("--family", choices=FAMILIES, default="flash")
    shape = {"nargs": "+", "type": int}
    parser.add_argument(FLAGS["direction"], dest="direction", choices=FLOP_FACTORS, help="flash; default: forward")
    parser.add_argument(
        FLAGS["head_dims"], dest="head_dims", metavar="D", **shape, help=f"flash; default: {_words(HEAD_DIMS)}"
    )
    parser.add_argument(
        FLAGS["batches"],
        dest="batches",
        metavar="B",
        **shape,
        help=f"paged; default: {_words(BATCHES)}; caches above {MAX_CACHE_GIB} GiB are left out",
    )
    parser.add_argument(
        FLAGS["seqlens"],
        dest="seqlens",
        metavar="S",
        **shape,
        help=f"default: powers of two, {SEQLENS[0]} to {SEQLENS[-1]}; paged: {CONTEXTS[0]} to {CONTEXTS[-1]}",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--arch", choices=RATES, default="sm_90", help="target of predictions, without a GPU")


def run(out_dir, family="flash", dtype="bfloat16", arch="sm_90", **shapes):
    """Write `<family>_<pass>.csv` row by row, then plot it. A shape that is None takes its default."""
    kind = FAMILIES[family]
    shapes = {name: value for name, value in shapes.items() if value is not None}
    if others := shapes.keys() - kind.shapes:
        sys.exit(f"--family {family} has no {_words(FLAGS[name] for name in others)}")
    problems = kind.grid(**shapes)
    if not problems:
        sys.exit(f"nothing to do: every cache is above {MAX_CACHE_GIB} GiB")
    rows = _measured(problems, dtype, kind) if has_gpu() else kind.predict(problems, dtype, arch)
    direction, figure = problems[0].columns()["direction"], problems[0].figure
    path = out_dir / f"{family}_{direction}.csv"
    done = []
    with results.Table(path, results.COLUMNS) as table:
        for row in rows:
            table.append(astuple(row))
            done.append(row)
    print(f"{kind.title}, {direction}, {dtype}, {done[0].gpu}, {done[0].source}")
    print_table(_summary(done, kind.line, figure))
    if done[0].source == results.PREDICTED:
        print(
            "bound: matmuls and softmax overlap fully. lock: they never overlap. "
            f"Measurements are lower: the model leaves out {kind.left_out}."
        )
    failed = [row for row in done if getattr(row, figure) is None]
    for row in failed:
        print(f"{row.provider}, batch {row.batch}, head_dim {row.head_dim}, seqlen {row.seqlen_k}: {row.note}")
    pictures = plot.draw(path)
    if any(row.provider == results.OURS for row in failed):
        sys.exit("our kernel failed, see above")
    return [path, *pictures]


def _measured(problems, dtype, kind):
    roof = kind.roof()
    for problem in tqdm(problems, desc="measuring", unit="shape"):
        yield from throughput(problem, dtype, kind.providers, roof)


def _summary(rows, line, figure):
    """A row per kind of attention and provider, a column per number of keys."""
    lines = {}
    for row in rows:
        head = line(row) | {"provider": row.provider}
        value = getattr(row, figure)
        lines.setdefault(tuple(head.values()), head)[row.seqlen_k] = None if value is None else round(value)
    return list(lines.values())


def _words(values):
    return " ".join(map(str, values))
