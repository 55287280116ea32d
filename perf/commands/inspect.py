"""Compiled code of the default configs: registers, spills, shared memory, occupancy, the hot loop and its cycle model.

Needs no GPU. `bound` and `lock` are explained in perf/model/loop_model.py. They rank kernels and do not predict time.
AMD kernels have counts only, no cycle model. --opcodes lists the instructions of a trip of the hot loop. --diff shows
what changed since another commit, whose triton_attn is compiled too. --update-baseline writes the figures that a test
compares (perf/results/baseline.py), for the installed Triton.
"""

import sys
from collections import Counter

from perf import results
from perf.harness.device import versions
from perf.harness.parallel import map_in_processes
from perf.harness.progress import tqdm
from perf.harness.revision import package_of
from perf.model.candidates import FAMILIES
from perf.model.defaults import Case
from perf.results.baseline import COMPILED
from perf.results.compare import NAME_COLUMNS, changes
from perf.results.tables import print_table
from perf.workloads.calls import CALLS
from perf.workloads.problems import HEAD_DIMS
from triton_attn._host.gpu import GPUS

ARCHS = tuple(GPUS)
DTYPES = ("bfloat16", "float16", "float32")
BASELINE_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
NOT_PRINTED = ("family", "arch", "dtype", "stack B", "limited by", "async copies")  # only in the CSV
WHICH_KERNEL = (*NAME_COLUMNS, "config")
COMPARED = ("config", "registers", "shared B", "CTAs/SM", "spills", "spills in loop", "loop instructions", "matmuls")
COMPARED += ("useful share", "bound TFLOP/s", "lock TFLOP/s")


def add_arguments(parser):
    parser.add_argument(
        "--family",
        dest="families",
        choices=CALLS,
        nargs="+",
        default=tuple(CALLS),
        metavar="F",
        help=f"of {', '.join(CALLS)}; default: all",
    )
    parser.add_argument("--arch", choices=ARCHS, default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--head-dim",
        dest="head_dims",
        type=int,
        nargs="+",
        default=HEAD_DIMS,
        metavar="D",
        help=f"flash and flash_backward only; default: {' '.join(map(str, HEAD_DIMS))}",
    )
    parser.add_argument("--opcodes", action="store_true", help="also print the instructions of the hot loop")
    parser.add_argument("--diff", metavar="REV", help="also print what changed since this commit")
    parser.add_argument(
        "--update-baseline",
        action="store_true",
        help="only write tests/perf/baseline.csv; other options are ignored",
    )


def run(
    out_dir,
    families=tuple(CALLS),
    arch="sm_90",
    dtype="bfloat16",
    head_dims=HEAD_DIMS,
    opcodes=False,
    diff=None,
    update_baseline=False,
):
    """Print the table and write `loop_model-<dtype>.csv`; with opcodes also `opcodes-<dtype>.csv`."""
    if update_baseline:
        return [write_baseline()]
    cases = [case for family in families for case in cases_of(family, arch, dtype, head_dims)]
    if not cases:
        sys.exit(f"nothing to do: {', '.join(families)} has none of these shapes")
    before = None if diff is None else compile_at(diff, cases)  # first, so that an unknown commit fails at once
    kernels = compile_all(cases, f"compiling for {arch}")
    paths = [show(kernels, out_dir / f"loop_model-{dtype}.csv")]
    if opcodes:
        paths.append(show_opcodes(kernels, out_dir / f"opcodes-{dtype}.csv"))
    if diff is not None:
        show_changes(before, kernels, diff)
    return paths


def cases_of(family, arch, dtype, head_dims=HEAD_DIMS):
    """The cases of a sweep, without the choice of a backward kernel, which a call makes itself."""
    return [Case(family, arch, dtype, shape) for shape in _SHAPES[family](dtype, head_dims)]


def _backward_shapes(dtype, head_dims):
    shapes = FAMILIES["flash_backward"].cases(dtype, head_dims)
    return [{"head_dim": x["head_dim"], "causal": x["causal"]} for x in shapes if x["kernel"] == "fused"]


def _model_shapes(family):
    return lambda dtype, head_dims: FAMILIES[family].cases(dtype, FAMILIES[family].shapes)


_SHAPES = {
    "flash": FAMILIES["flash"].cases,
    "flash_backward": _backward_shapes,
    **{family: _model_shapes(family) for family in ("paged", "paged_prefill", "mla", "mla_prefill")},
}


def compile_all(cases, description):
    """The results of `Case.compile` for all cases, computed on all cores."""
    compiled = map_in_processes(Case.compile, cases)
    return [kernel for kernels in tqdm(compiled, description, len(cases), unit="case") for kernel in kernels]


def compile_at(revision, cases):
    """The same, compiled by the triton_attn of another commit."""
    try:
        with package_of(revision):
            return compile_all(cases, f"compiling {revision}")
    except ValueError as error:
        sys.exit(f"--diff: {error}")


def show(kernels, path):
    """Print the table and the compilation errors, and write the file. Only the file has all columns."""
    rows = [kernel.row for kernel in kernels if not kernel.error]
    print_table([{name: value for name, value in row.items() if name not in NOT_PRINTED} for row in rows])
    _print_errors(kernels)
    return write(path, rows)


def show_opcodes(kernels, path):
    """Print a table per family, most frequent opcode first. In the file each opcode of a kernel has a row."""
    kernels = [kernel for kernel in kernels if not kernel.error]
    for family in dict.fromkeys(kernel.row["family"] for kernel in kernels):
        print(f"\n{family}: instructions of a trip of the hot loop")
        _print_opcodes({_heading(x.row): x.opcodes for x in kernels if x.row["family"] == family})
    rows = [
        {name: kernel.row[name] for name in WHICH_KERNEL} | {"opcode": opcode, "instructions": n}
        for kernel in kernels
        for opcode, n in kernel.opcodes.most_common()
    ]
    return write(path, rows)


def _print_opcodes(loops):
    """A table of opcodes by loop. `loops` is {heading: instructions by opcode}."""
    total = sum(loops.values(), Counter())
    print_table([{"opcode": x} | {name: loop.get(x) for name, loop in loops.items()} for x, _ in total.most_common()])


def _heading(row):
    """A narrow heading, since tables have many columns."""
    return "\n".join([row["kernel"], *row["case"].split()])


def show_changes(before, now, revision):
    """Print what changed since `revision`, and the cases that do not compile there."""
    print(f"\nsince {revision}:")
    found = changes(*([kernel.row for kernel in side if not kernel.error] for side in (before, now)), COMPARED)
    if found:
        print_table([change.row(before=revision) for change in found])
    else:
        print("no figures of these kernels changed")
    _print_errors(before, f" at {revision}")


def write_baseline():
    """Compile the cases of the baseline, and replace the figures of the installed Triton."""
    kernels = [
        kernel for arch in BASELINE_ARCHS for kernel in compile_all(baseline_cases(arch), f"compiling for {arch}")
    ]
    if any(kernel.error for kernel in kernels):
        _print_errors(kernels)
        sys.exit("the baseline is as it was")
    COMPILED.update([kernel.row for kernel in kernels])
    return COMPILED.path


def baseline_cases(arch):
    """All families. Causal or not, flash attention's loop over full tiles is the same."""
    cases = [case for family in CALLS for case in cases_of(family, arch, "bfloat16", (*HEAD_DIMS, 512))]
    return [case for case in cases if case.shape.get("causal", True)]


def _print_errors(kernels, where=""):
    for kernel in kernels:
        if kernel.error:
            print(f"{kernel.row['family']} {kernel.row['case']} does not compile{where}: {kernel.error}")


def write(path, rows):
    """Print a table of rows, each with its versions."""
    about = versions() | {"source": results.PREDICTED}
    with results.Table(path, [*(rows[0] if rows else ()), *about]) as table:
        for row in rows:
            table.append([*row.values(), *about.values()])
    return path
