"""Attention over many GPUs: time, memory and bytes of a layer by method, for one causal sequence in bf16.

    python -m perf parallel                                   predictions, for 8 to 512 H100s
    torchrun --nproc-per-node 8 -m perf parallel              measurements, on the GPUs that are there

The predictions are those of the cost model by which `method="auto"` chooses (triton_attn/parallel/cost.py). A share is
the time that one GPU would take for its part of the FLOPs, over the time of the call; measured, at the speed of one GPU
with a rank's rows alone. Of DeepSeek-V3 latent vectors travel; its predictions are without the memory of the keys that
each rank computes from them.
"""

import os
import sys
from dataclasses import astuple, replace

from perf import results
from perf.harness.device import commit, has_gpu
from perf.harness.progress import tqdm
from perf.model.context_parallel import GPUS, MODELS, PUBLISHED, SEQLENS, predict
from perf.results.style import short_length
from perf.results.tables import print_table

PRINTED_GPUS = (8, 64, 512)


def add_arguments(parser):
    names = [model.name.lower() for model in MODELS]
    parser.add_argument("--model", dest="models", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--seqlen", dest="seqlens", nargs="+", type=int, metavar="S", default=SEQLENS, help="default: 8k to 1M"
    )


def run(out_dir, models=None, seqlens=SEQLENS):
    """Write `parallel.csv` with its plots, or under torchrun `parallel-measured.csv`."""
    models = [model for model in MODELS if models is None or model.name.lower() in models]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _measure(out_dir, models, seqlens)
    from perf.results import plot  # here, since a GPU machine may lack matplotlib

    rows = [row for model in models for gpus in GPUS for seqlen in seqlens for row in predict(model, gpus, seqlen)]
    anchors = [row for each in PUBLISHED for row in each.rows()]
    path = out_dir / "parallel.csv"
    _write(
        path, [replace(row, commit=(row.source != results.PUBLISHED and commit()) or None) for row in rows + anchors]
    )
    _print([row for row in rows if row.num_gpus in PRINTED_GPUS])
    print("zigzag ring of ring-flash-attention, 8 H800, and our cost model with the speed of one of these")
    print_table([_anchor(row) for row in anchors])
    return [path, *plot.draw(path)]


def _measure(out_dir, models, seqlens):
    """All ranks measure, and the first writes."""
    from perf.harness.ranks import measure, process_group

    if not has_gpu() and out_dir.is_relative_to(results.ROOT):
        sys.exit("publish: expected GPUs, got processes on a CPU, whose times say nothing")
    with process_group() as mesh:
        is_first = mesh.get_local_rank() == 0
        grid = [(model, seqlen) for model in models for seqlen in seqlens]
        rows = []
        for model, seqlen in tqdm(grid, "measuring", len(grid), unit="shape") if is_first else grid:
            rows += measure(model, seqlen, mesh)
    if not is_first:
        return []
    path = out_dir / "parallel-measured.csv"
    _write(path, rows)
    _print(rows)
    return [path]


def _write(path, rows):
    with results.Table(path, results.columns_of(results.ParallelRow)) as table:
        for row in rows:
            table.append(astuple(row))


def _print(rows):
    """A line per model, number of GPUs and method, a column per length."""
    lines = {}
    for row in rows:
        key = row.model, row.num_gpus, row.method
        line = lines.setdefault(key, dict(zip(("model", "GPUs", "method"), key)))
        line[short_length(row.seqlen)] = f"{row.both_ms:.3g}, {row.both_share:.0%}{'*' if row.is_auto else ''}"
    print(f"forward and backward of a layer: ms, and share of a GPU's speed; * auto. {rows[0].gpu}, {rows[0].source}")
    print_table(list(lines.values()))
    print()


def _anchor(row):
    shares = {name: f"{share:.1%}" for name, share in (("forward", row.forward_share), ("both", row.both_share))}
    return {"model": row.model, "tokens": short_length(row.seqlen), "source": row.source} | shares
