"""The best config of a kernel, from its family's search space.

Static stage, on any machine: every candidate is compiled for the target, on all cores. Those that do not fit, spill in
the hot loop, or lose wgmma or asynchronous copies are dropped with the reason. The rest are ranked by `lock` of the
loop model, in which products that several warps repeat count once, then by `bound` (perf/loop_model.py; differences
under 5 % are noise).
On a GPU the best of them are then timed in turn, each after its result was found right, and no longer once it is
clearly behind. Of flash_backward the whole pass is timed, its other kernels at their defaults.

What is finished is kept in a file beside the CSV, a JSON line each, and not done again: after Ctrl-C, a crash or the
end of --minutes the same command goes on. Another Triton or a change in the kernel makes it new work.
"""

import math
import sys
import time
from dataclasses import asdict, fields

import torch

from perf import compiled, results
from perf.candidates import CACHED_MODELS, FAMILIES, LATENT_MODELS, MODEL_COLUMNS, Candidate
from perf.device import driver_version, gpu_arch, gpu_name, has_gpu
from perf.inspect import ARCHS
from perf.journal import Journal
from perf.measure import throughput
from perf.parallel import map_in_processes
from perf.problems import HEAD_DIMS
from perf.progress import tqdm
from perf.results import OURS, Row
from perf.tables import print_table

FINALISTS = 10
BEHIND = 1.2  # times the median of the fastest, and a finalist is timed no further
FLAGS = {"head_dims": "--head-dim", "models": "--model"}


class Budget:
    """Minutes from now on, None for no end."""

    def __init__(self, minutes):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def seconds_left(self):
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    def is_over(self):
        return self.seconds_left() == 0


def add_arguments(parser):
    parser.add_argument("--family", choices=FAMILIES, default="flash")
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="what to compile for, without a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        FLAGS["head_dims"],
        dest="head_dims",
        type=int,
        nargs="+",
        metavar="D",
        help=f"flash and flash_backward; default: {' '.join(map(str, HEAD_DIMS))}",
    )
    parser.add_argument(
        FLAGS["models"],
        dest="models",
        nargs="+",
        metavar="M",
        help=f"paged: {', '.join(CACHED_MODELS)}; mla: {', '.join(LATENT_MODELS)}; default: all",
    )
    parser.add_argument("--minutes", type=float, help="end after as many, with what is finished")


def run(out_dir, family="flash", arch="sm_90", dtype="bfloat16", minutes=None, **shapes):
    """Write `sweep-<family>-<dtype>.csv` as candidates finish; on a GPU `sweep-<family>-<dtype>-measured.csv` too."""
    budget = Budget(minutes)
    if has_gpu():
        arch = gpu_arch()
    cases = FAMILIES[family].cases(dtype, _shapes(family, shapes))
    if not cases:
        sys.exit(f"nothing to do: {family} has none of these shapes")
    path = out_dir / f"sweep-{family}-{dtype}.csv"
    paths = [path]
    with Journal(path.with_suffix(".jsonl")) as journal:
        survivors, left = compile_all(path, family, arch, dtype, cases, journal, budget)
        shown = FAMILIES[family].config_columns + MODEL_COLUMNS
        for case in cases:
            rows = survivors[values_of(case)]
            if not rows and left:
                continue
            title = ", ".join(f"{name} {value}" for name, value in case.items())
            print(f"\n{title}: {f'the best of {len(rows)} survivors' if rows else 'every candidate was dropped'}")
            print_table([{name: row[name] for name in shown} for row in rows[:FINALISTS]])
        if has_gpu() and not left:
            finalists = [[_candidate(row, cases[0]) for row in rows[:FINALISTS]] for rows in survivors.values() if rows]
            paths.append(path.with_stem(path.stem + "-measured"))
            left = time_all(paths[-1], finalists, journal, budget)
    if left:
        print(f"\n{minutes:g} minutes are over and {left} candidates left: the same command goes on with them")
    return paths


def _shapes(family, shapes):
    """What the user chose, or the family's default; an option of another family or a model that it lacks is refused."""
    kind = FAMILIES[family]
    shapes = {name: values for name, values in shapes.items() if values is not None}
    if others := shapes.keys() - {kind.option}:
        sys.exit(f"--family {family} has no {' '.join(FLAGS[name] for name in others)}")
    chosen = shapes.get(kind.option, kind.shapes)
    if kind.option == "models" and (unknown := [name for name in chosen if name not in kind.shapes]):
        sys.exit(f"--family {family} has no {', '.join(unknown)}; it has {', '.join(kind.shapes)}")
    return chosen


def values_of(case):
    return tuple(case.values())


def compile_all(path, family, arch, dtype, cases, journal, budget):
    """({values of the case: rows of the candidates that were not dropped, best first}, how many the budget left).

    All rows go to the file.
    """
    kind = FAMILIES[family]
    candidates = [
        Candidate(family, arch, dtype, case, config)
        for case in cases
        for config in kind.search_space(arch, getattr(torch, dtype), **case)
    ]
    known = [journal.get(candidate.key) for candidate in candidates]
    missing = [candidate for candidate, row in zip(candidates, known) if row is None]
    compiling = iter(map_in_processes(Candidate.compile, missing))
    progress = {"total": len(candidates), "initial": len(candidates) - len(missing), "unit": "config"}
    columns = ["family", "arch", "dtype", *cases[0], *kind.config_columns, *MODEL_COLUMNS, "dropped"]
    survivors = {values_of(case): [] for case in cases}
    left = 0
    with results.Table(path, columns) as table, tqdm(**progress, desc=f"compiling for {arch}") as bar:
        for candidate, row in zip(candidates, known):
            if row is None:
                if budget.is_over():
                    left += 1
                    continue
                row = next(compiling)
                journal.add(candidate.key, row)
                bar.update()
            table.append(row[name] for name in columns)
            if not row["dropped"]:
                survivors[values_of(candidate.case)].append(row)
    return {values: sorted(rows, key=_rank) for values, rows in survivors.items()}, left


def _rank(row):
    """Best first; where the loop model does not apply, the order of the search space stays."""
    return -(row["lock TFLOP/s"] or 0), -(row["bound TFLOP/s"] or 0)


def _candidate(row, columns):
    kind = FAMILIES[row["family"]]
    config = kind.config(**{name: row[name] for name in kind.config_columns})
    return Candidate(row["family"], row["arch"], row["dtype"], {name: row[name] for name in columns}, config)


def time_all(path, finalists, journal, budget, device="cuda"):
    """Time the candidates of each case (a list of lists) in turn; rows say in the note which config they are. Returns
    how many the budget left."""
    left = 0
    roof = None
    total = sum(map(len, finalists))
    names = [field.name for field in fields(Row)]
    with results.Table(path, results.COLUMNS) as table, tqdm(total=total, desc="timing", unit="config") as bar:
        for candidates in finalists:
            kind, case = FAMILIES[candidates[0].family], candidates[0].case
            rows = [journal.get(_timing_key(candidate)) for candidate in candidates]
            if None in rows:
                if budget.is_over():
                    left += len(candidates)
                    continue
                roof = roof or kind.roof()
                rows = _time(kind, case, candidates, roof, device)
                for candidate, row in zip(candidates, rows):
                    journal.add(_timing_key(candidate), row)
            bar.update(len(candidates))
            for row in rows:
                table.append(row[name] for name in names)
            figure = kind.problem(**case).figure
            print_table([{"config": row["note"], "ms": row["p50_ms"], figure: row[figure]} for row in rows])
    return left


def _time(kind, case, candidates, roof, device):
    """In turn, since only those of a round compare: rows as dicts."""
    provider = kind.provider(**case)
    providers = {compiled.config_name(c.config): provider(c.config) for c in candidates}
    rows = throughput(kind.problem(**case), candidates[0].dtype, providers, roof, device, behind=BEHIND)
    beside = [str(value) for name, value in case.items() if name in ("kernel", "cache_dtype")]  # Row has no column
    return [
        asdict(row) | {"provider": OURS, "note": " ".join([*beside, row.provider, row.note]).strip()} for row in rows
    ]


def _timing_key(candidate):
    problem = FAMILIES[candidate.family].problem(**candidate.case).columns()
    return candidate.key | {"problem": problem, "gpu": gpu_name(), "driver": driver_version()}
