"""What the default configs compile to: registers, spills, shared memory, occupancy, the hot loop and its cycle model.

Needs no GPU. `bound` and `lock` are explained in perf/loop_model.py; they rank kernels and do not predict time.
"""

import torch

from perf import compiled, loop_model, results
from perf.problems import HEAD_DIMS
from perf.progress import tqdm
from perf.tables import print_table

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
NOT_PRINTED = ("kernel", "arch", "stack B", "limited by", "async copies")  # in the CSV they are


def add_arguments(parser):
    parser.add_argument("--arch", choices=ARCHS, default="sm_90")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dim", dest="head_dims", type=int, nargs="+", default=HEAD_DIMS, metavar="D")


def run(out_dir, arch="sm_90", dtype="bfloat16", head_dims=HEAD_DIMS):
    """Print the table and keep it as `loop_model-<dtype>.csv`."""
    cases = [(head_dim, causal) for head_dim in head_dims for causal in (False, True)]
    rows = []
    for head_dim, causal in tqdm(cases, desc=f"compiling for {arch}", unit="kernel"):
        launch = compiled.flash_forward(arch, getattr(torch, dtype), head_dim, causal=causal)
        rows.append(describe(launch, head_dim, causal))
    print_table([{name: value for name, value in row.items() if name not in NOT_PRINTED} for row in rows])
    path = out_dir / f"loop_model-{dtype}.csv"
    with results.Table(path, rows[0]) as table:
        for row in rows:
            table.append(row.values())
    return [path]


def describe(launch, head_dim, causal):
    """One row: which kernel it is, and what the machine code says of it."""
    report = loop_model.analyze(launch.kernel)
    return {
        "head_dim": head_dim,
        "causal": causal,
        "config": compiled.config_name(compiled.config_of(launch)),
    } | report.row()
