"""The best config of a kernel, from its family's search space.

Static stage, on any machine: every candidate is compiled for the target, on all cores. Candidates that do not fit,
spill in the hot loop, or lose wgmma or asynchronous copies are dropped with the reason. The others are ranked by the
`expected` rate of the loop model, or by `lock` if the waits of the architecture were not measured, then by `bound`
(perf/model/loop_model.py; differences under 5 % are noise). Matmuls that several warps repeat count once.

On a GPU the best candidates are then timed in turn, for kernels of hopper.py together with the portable kernel and
peers. Each is
timed only after its result was found right, and no longer once it is clearly behind. For flash_backward the whole pass
is timed with the other kernels at their defaults, and then the schedules that combine the winners.

--table writes the winners (perf/results/winners.py) to a tuned table that calls use: measured winners on a GPU,
otherwise predicted ones. The package's own tables hold measured winners only.

Finished work is kept in a file beside the CSV, one JSON line each, and is not repeated. After Ctrl-C, a crash or the
end of --minutes the same command continues. Another Triton or a changed kernel makes it new work.
"""

import math
import sys
import time
from dataclasses import asdict, fields
from datetime import date
from functools import partial
from pathlib import Path

import torch
import triton

from perf import results
from perf.commands.inspect import ARCHS
from perf.harness.device import driver_version, gpu_arch, gpu_name, has_gpu
from perf.harness.journal import Journal
from perf.harness.measure import throughput
from perf.harness.parallel import map_in_processes
from perf.harness.progress import tqdm
from perf.model import compiled
from perf.model.candidates import (
    CACHED_MODELS,
    FAMILIES,
    LATENT_MODELS,
    MODEL_COLUMNS,
    WIDEST_HEADS,
    Candidate,
    backward_pass,
    cached_shape,
    source_hash,
)
from perf.results import OURS, Row, winners
from perf.results.tables import print_table
from perf.workloads.problems import HEAD_DIMS
from triton_attn._host.checks import fail
from triton_attn._host.tuned import SHIPPED, read_table
from triton_attn.paged.configs import PagedConfig

FINALISTS = 10
BEHIND = 1.2  # a finalist above this multiple of the fastest median is timed no further
FLAGS = {"head_dims": "--head-dim", "models": "--model"}


class Budget:
    """A budget of minutes from now on. None has no end."""

    def __init__(self, minutes):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def seconds_left(self):
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    def is_over(self):
        return self.seconds_left() == 0


def add_arguments(parser):
    parser.add_argument("--family", choices=FAMILIES, default="flash")
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="compilation target, without a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        FLAGS["head_dims"],
        dest="head_dims",
        type=int,
        nargs="+",
        metavar="D",
        help=f"flash and flash_backward only; default: {' '.join(map(str, HEAD_DIMS))}",
    )
    parser.add_argument(
        FLAGS["models"],
        dest="models",
        nargs="+",
        metavar="M",
        help=f"paged*: {', '.join(CACHED_MODELS)}, or heads/KV heads/head dim, such as {WIDEST_HEADS}; "
        f"mla*: {', '.join(LATENT_MODELS)}; default: all",
    )
    parser.add_argument(
        "--seqlen",
        dest="seqlens",
        type=int,
        nargs="+",
        metavar="S",
        help="lengths at which to time; default: the family's",
    )
    parser.add_argument("--minutes", type=float, help="time budget in minutes")
    parser.add_argument(
        "--journal",
        dest="journal_path",
        type=Path,
        metavar="PATH",
        help="file for finished work, which sweeps may share; default: beside the CSV",
    )
    parser.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=SHIPPED,
        metavar="PATH",
        help="write the winners to this tuned table; without PATH, on a GPU, to the package's table",
    )


def run(
    out_dir,
    family="flash",
    arch="sm_90",
    dtype="bfloat16",
    seqlens=None,
    minutes=None,
    table=None,
    journal_path=None,
    **shapes,
):
    """Write `sweep-<family>-<dtype>.csv` as candidates finish; on a GPU `sweep-<family>-<dtype>-measured.csv` too."""
    budget = Budget(minutes)
    if has_gpu():
        arch = gpu_arch()
    if table is not None:
        if table == SHIPPED and not has_gpu():
            fail("--table", "a PATH for predicted winners: the package's tables are measured", "none, without a GPU")
        table = _writable(table / f"{arch}.json" if table == SHIPPED else table, arch, dtype)
    cases = FAMILIES[family].cases(dtype, _shapes(family, shapes))
    if not cases:
        sys.exit(f"nothing to do: {family} has none of these shapes")
    seqlens = seqlens or FAMILIES[family].seqlens
    path = out_dir / f"sweep-{family}-{dtype}.csv"
    paths, found = [path], []
    with Journal(journal_path or path.with_suffix(".jsonl")) as journal:
        survivors, left = compile_all(path, family, arch, dtype, cases, journal, budget)
        _print_survivors(cases, survivors, left)
        compiled_cases = [
            ([_candidate(row, cases[0]) for row in rows], rows) for rows in survivors.values() if rows and not left
        ]
        if not has_gpu():
            found = winners.predicted(compiled_cases, seqlens[-1])
        elif not left:
            finalists = [_finalists(candidates) for candidates, _ in compiled_cases]
            paths.append(path.with_stem(path.stem + "-measured"))
            with results.Table(paths[-1], results.COLUMNS) as measured:
                found, left = time_all(measured, finalists, seqlens, journal, budget)
    if table is not None and found:
        winners.update(table, arch, found)
        print(f"\n{len(found)} winners of {family} are in {table}")
    if left:
        print(f"\n{minutes:g} minutes are over and {left} candidates are left: run the same command to continue")
    return paths


def _writable(path, arch, dtype):
    """A tuned table for the winners. It is checked before the sweep starts."""
    if dtype == "float32":
        fail("--table", "--dtype bfloat16 or float16, which tables are for", dtype)
    if path.exists() and (other := read_table(path)["arch"]) != arch:
        fail(f"--table {path}", f"a table of {arch}", other)
    return path


def _print_survivors(cases, survivors, left):
    for case in cases:
        rows = survivors[values_of(case)]
        if not rows and left:
            continue
        title = ", ".join(f"{name} {value}" for name, value in case.items())
        print(f"\n{title}: {f'the best of {len(rows)} survivors' if rows else 'every candidate was dropped'}")
        shown = [*FAMILIES[rows[0]["family"]].config_columns, *MODEL_COLUMNS] if rows else []
        print_table([{name: row[name] for name in shown} for row in rows[:FINALISTS]])


def _shapes(family, shapes):
    """The user's choice, or the family's default. Options that the family lacks and unknown models are refused."""
    kind = FAMILIES[family]
    shapes = {name: values for name, values in shapes.items() if values is not None}
    if others := shapes.keys() - {kind.option}:
        sys.exit(f"--family {family} has no {' '.join(FLAGS[name] for name in others)}")
    chosen = shapes.get(kind.option, kind.shapes)
    if kind.option == "models" and (unknown := [name for name in chosen if not _is_shape_of(kind, name)]):
        sys.exit(f"--family {family} has no {', '.join(unknown)}; it has {', '.join(kind.shapes)}")
    return chosen


def _is_shape_of(kind, name):
    """Whether it is one of the family's shapes, or, for paged attention, numbers of a shape that it can have."""
    if name in kind.shapes:
        return True
    shape = cached_shape(name) if kind.config is PagedConfig else None
    return shape is not None and 0 not in shape and shape[0] % shape[1] == 0 and shape[2] <= 512


def values_of(case):
    return tuple(case.values())


def compile_all(path, family, arch, dtype, cases, journal, budget):
    """({values of the case: rows of the surviving candidates, best first}, how many candidates the budget left).

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
    """Best first. Without a loop model the order of the search space stays."""
    return -(winners.predicted_tflops(row) or 0), -(row["bound TFLOP/s"] or 0)


def _candidate(row, columns):
    kind = FAMILIES[row["family"]]
    config = kind.config(**{name: row[name] for name in kind.config_columns})
    return Candidate(row["family"], row["arch"], row["dtype"], {name: row[name] for name in columns}, config)


def _finalists(candidates):
    """The best candidates and the default, which a winner has to beat."""
    default = winners.default_of(candidates[0])
    return candidates[:FINALISTS] + [c for c in candidates[FINALISTS:] if c.config == default]


def time_all(table, finalists, seqlens, journal, budget, device="cuda"):
    """Time the candidates of each case (a list of lists) in turn. The note of a row names its config.

    Returns the winners as entries of a tuned table, and how many candidates the budget left.
    """
    left = 0
    timed = []  # (candidates of a case, seqlen, their rows)
    names = [field.name for field in fields(Row)]
    rounds = [
        (candidates + winners.portable_of(candidates[0], seqlen), seqlen)
        for seqlen in seqlens
        for candidates in finalists
    ]
    roof = None
    with tqdm(total=sum(len(candidates) for candidates, _ in rounds), desc="timing", unit="config") as bar:
        for candidates, seqlen in rounds:
            first = candidates[0]
            keys = _timing_keys(candidates, seqlen)
            rows = [journal.get(key) for key in keys]
            if None in rows:
                if budget.is_over():
                    left += len(candidates)
                    continue
                roof = roof or FAMILIES[first.family].roof()
                rows = time_round(candidates, seqlen, roof, device)
                for key, row in zip(keys, rows):
                    journal.add(key, row)
            bar.update(len(candidates))
            for row in rows:
                table.append(row[name] for name in names)
            figure = FAMILIES[first.family].problem(seqlen, **first.case).figure
            names_of = [row["note"] if row["provider"] == OURS else row["provider"] for row in rows]
            print_table([{"": name, "ms": row["p50_ms"], figure: row[figure]} for name, row in zip(names_of, rows)])
            timed.append((candidates, seqlen, rows))
    return winners.measured(timed, partial(_time_passes, journal=journal, device=device)), left


def time_round(candidates, seqlen, roof, device="cuda"):
    """Time the candidates in turn, and the peers of their family, since only timings of one round are comparable.

    Returns rows as dicts, which also have the date, the error of the output with its bound, and the traceback of a
    failure. For a record all are timed to the end.
    """
    first = candidates[0]
    kind = FAMILIES[first.family]
    ours, errors, tracebacks = providers_of(candidates), {}, {}
    rows = throughput(
        kind.problem(seqlen, **first.case),
        first.dtype,
        ours | kind.peers,
        roof,
        device,
        tracebacks=tracebacks,
        errors=errors,
        behind=BEHIND if kind.portable is None else None,
    )
    beside = [in_words(first.case, name) for name in ("kernel", "fused") if name in first.case]
    found = []
    for row in rows:
        closeness = errors.get(row.provider)
        about = {"date": date.today().isoformat(), "log": tracebacks.get(row.provider, "")}
        about |= {name: closeness and getattr(closeness, name) for name in ("error", "bound")}
        if row.provider in ours:
            about |= {"provider": OURS, "note": " ".join([*beside, row.provider, row.note]).strip()}
        found.append(asdict(row) | about)
    return found


def providers_of(candidates):
    """{name of the config: provider}. Candidates of one family share the tensors of its provider."""
    first = candidates[0]
    makers = {family: FAMILIES[family].provider(first.dtype, **first.case) for family in {c.family for c in candidates}}
    return {compiled.config_name(c.config): makers[c.family](c.config) for c in candidates}


def in_words(case, name):
    """The values of a case that no column of a row has."""
    return {True: "fused", False: "materialized"}.get(case[name], str(case[name]))


def _timing_keys(candidates, seqlen):
    """A key for each row of `time_round`."""
    first = candidates[0]
    kind = FAMILIES[first.family]
    about = {"problem": kind.problem(seqlen, **first.case).columns(), "gpu": gpu_name(), "driver": driver_version()}
    versions = {"dtype": first.dtype, "triton": triton.__version__, "torch": torch.__version__}
    return [c.key | about for c in candidates] + [{"peer": name} | versions | about for name in kind.peers]


def _time_passes(problem, dtype, configs, journal, device):
    """{name: TFLOP/s} of {name: BackwardConfig}; None for one that failed."""
    key = {"problem": problem.columns(), "dtype": dtype, "passes": {name: repr(x) for name, x in configs.items()}}
    key |= {"gpu": gpu_name(), "driver": driver_version(), "triton": triton.__version__}
    key |= {"source": source_hash(FAMILIES["flash_backward"].folder)}
    figures = journal.get(key)
    if figures is None:
        providers = {name: backward_pass(problem.causal, config) for name, config in configs.items()}
        rows = throughput(problem, dtype, providers, roof=1.0, device=device)
        figures = {row.provider: row.tflops for row in rows}
        journal.add(key, figures)
    return figures
