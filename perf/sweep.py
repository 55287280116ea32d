"""The best config of a kernel, from its family's search space.

Static stage, on any machine: every candidate is compiled for the target, on all cores. Those that do not fit, spill in
the hot loop, or lose wgmma or asynchronous copies are dropped with the reason. The rest are ranked by `lock` of the
loop model, then by `bound` (perf/loop_model.py; differences under 5 % are noise).
On a GPU the best of them are then timed in turn, each after its result was found right.
"""

from dataclasses import asdict, astuple, fields, replace
from functools import partial

import torch
import triton
from tqdm import tqdm

from perf import amdgcn, compiled, loop_model, results
from perf.device import gpu_arch, has_gpu
from perf.inspect import ARCHS
from perf.machine import matmul_rate
from perf.measure import throughput
from perf.parallel import map_in_processes
from perf.problems import HEAD_DIMS, HIDDEN, Problem
from perf.tables import print_table
from triton_attn.flash import configs

FAMILIES = ("flash",)
CONFIG_COLUMNS = [field.name for field in fields(configs.FlashConfig)]
MODEL_COLUMNS = ["registers", "shared B", "spills", "spills in loop", "loop instructions"]
MODEL_COLUMNS += ["bound TFLOP/s", "lock TFLOP/s"]
COLUMNS = ["family", "arch", "dtype", "head_dim", "causal", *CONFIG_COLUMNS, *MODEL_COLUMNS, "dropped"]
FINALISTS = 10


def add_arguments(parser):
    parser.add_argument("--family", choices=FAMILIES, default="flash")
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="what to compile for, without a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dim", dest="head_dims", type=int, nargs="+", default=HEAD_DIMS, metavar="D")


def run(out_dir, family="flash", arch="sm_90", dtype="bfloat16", head_dims=HEAD_DIMS):
    """Write `sweep-<family>-<dtype>.csv` as candidates finish; on a GPU `sweep-<family>-<dtype>-measured.csv` too."""
    if has_gpu():
        arch = gpu_arch()
    path = out_dir / f"sweep-{family}-{dtype}.csv"
    survivors = _compile_all(
        path, arch, dtype, [(head_dim, causal) for head_dim in head_dims for causal in (False, True)]
    )
    for (head_dim, causal), rows in survivors.items():
        print(f"\nhead_dim {head_dim}, {'causal' if causal else 'full'}: the best of {len(rows)} survivors")
        print_table([{name: row[name] for name in CONFIG_COLUMNS + MODEL_COLUMNS} for row in rows[:FINALISTS]])
    if not has_gpu():
        return [path]
    finalists = {case: [_config(row) for row in rows[:FINALISTS]] for case, rows in survivors.items()}
    return [path, _measure(path.with_stem(path.stem + "-measured"), dtype, finalists)]


def _compile_all(path, arch, dtype, cases):
    """{(head_dim, causal): rows of the candidates that were not dropped, best first}; all rows go to the file."""
    candidates = [
        (arch, dtype, *case, config)
        for case in cases
        for config in configs.search_space(arch, getattr(torch, dtype), case[0], case[0], case[1])
    ]
    survivors = {case: [] for case in cases}
    outcomes = map_in_processes(compile_candidate, candidates)
    with results.Table(path, COLUMNS) as table:
        for row in tqdm(outcomes, total=len(candidates), desc=f"compiling for {arch}", unit="config"):
            table.append(row[name] for name in COLUMNS)
            if not row["dropped"]:
                survivors[row["head_dim"], row["causal"]].append(row)
    return {case: sorted(rows, key=_rank) for case, rows in survivors.items()}


def _rank(row):
    """Best first; where the loop model does not apply, the order of the search space stays."""
    return -(row["lock TFLOP/s"] or 0), -(row["bound TFLOP/s"] or 0)


def _config(row):
    return configs.FlashConfig(**{name: row[name] for name in CONFIG_COLUMNS})


def compile_candidate(candidate):
    """The row of (arch, dtype, head_dim, causal, config): what it compiles to, and why it is dropped if it is."""
    arch, dtype, head_dim, causal, config = candidate
    try:
        launch = compiled.flash_forward(arch, getattr(torch, dtype), head_dim, causal=causal, config=config)
        report = loop_model.analyze(launch.kernel)
        made_of, dropped = report.row(), _why_dropped(launch, report)
    except triton.runtime.errors.OutOfResources as error:
        made_of, dropped = {}, str(error)
    row = dict(zip(COLUMNS, ("flash", arch, dtype, head_dim, causal))) | asdict(config)
    return row | {name: made_of.get(name) for name in MODEL_COLUMNS} | {"dropped": dropped}


def _why_dropped(launch, report):
    if isinstance(report, amdgcn.Report):
        return f"{report.vgpr_spills} registers spilled" if report.vgpr_spills else ""
    hot = report.hot
    if hot is None:  # fp32 without tensor cores
        return f"{report.static_spills} spills" if report.static_spills else ""
    if hot.spills:
        return f"{hot.spills} spills in the hot loop"
    if not hot.async_copies:
        return "no asynchronous copies in the hot loop"
    if report.arch == "sm_90" and not launch.uses_wgmma:
        return "no wgmma"
    return ""


def _measure(path, dtype, finalists):
    """Time the finalists of each case; the rows say in the note which config they are."""
    roof = matmul_rate()
    with results.Table(path, results.COLUMNS) as table:
        for (head_dim, causal), case in tqdm(finalists.items(), desc="measuring", unit="case"):
            problem = Problem(batch=4, seqlen=4096, num_heads=HIDDEN // head_dim, head_dim=head_dim, causal=causal)
            rows = throughput(problem, dtype, {compiled.config_name(c): _with_config(c) for c in case}, roof)
            for row in rows:
                table.append(astuple(replace(row, provider=results.OURS, note=f"{row.provider} {row.note}".strip())))
            print_table([{"config": row.provider, "ms": row.p50_ms, "TFLOP/s": row.tflops} for row in rows])
    return path


def _with_config(config):
    return lambda problem, device: partial(compiled.launch_config, causal=problem.causal, config=config)
