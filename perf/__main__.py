"""What runs here, whether it is right, how fast it is, how large its caches are.

Without a part: machine, verify, bench (both families), mla and sizes, one after the other, in a few minutes.
Figures go to perf/out/, which git ignores; with --publish to perf/results/, from which `python -m perf report` writes
docs/performance.md. Without a GPU, kernels are verified in Triton's interpreter, and their speed is predicted from
compiled code and labelled so: nothing is called measured that was not.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from perf import results
from perf.harness.device import folder_name, has_gpu
from perf.results.tables import print_table


@dataclass(frozen=True)
class Part:
    """A subcommand: `perf.commands.<name>`, with `run(out_dir, **options)` and, for options, `add_arguments(parser)`.

    `folder` holds its results where no GPU gives them a name; options may stand in it in braces. None: results lie
    beside what the part is given. Without a GPU,
    Triton's interpreter runs the kernels of an `interpreted` part: a choice for the whole process. `machine_free`
    results are the same everywhere. A `committed` part works on those that are in git.
    """

    help: str
    folder: str | None
    interpreted: bool = False
    machine_free: bool = False
    committed: bool = False


PARTS = {
    "machine": Part("what runs here, and the roofs of a GPU", "interpreter"),
    "verify": Part("every public function against its reference at real model shapes", "interpreter", interpreted=True),
    "bench": Part("throughput of attention, ours and the peers'", "predicted-{arch}"),
    "mla": Part("multi-head latent attention: decode, schedules of prefill, bytes of cache", "predicted-{arch}"),
    "sizes": Part("KV-cache bytes against context length", "sizes", machine_free=True),
    "cache": Part("what the bookkeeping of pages costs on the host", "host"),
    "cold": Part("imports, first calls, kernels compiled per call", "host"),
    "sweep": Part("the best config of a kernel", "predicted-{arch}"),
    "gpu": Part("all that only a GPU can tell, within a budget of minutes", "gpu"),
    "inspect": Part("what compiled kernels are made of", "predicted-{arch}", machine_free=True),
    "counts": Part("what compiled kernels do when they run, emulated", "predicted-{arch}", machine_free=True),
    "house": Part("how the package is built: sizes of its device code, who imports whom", None, machine_free=True),
    "calibrate": Part("what sweeps predicted beside what they measured", None, machine_free=True),
    "plot": Part("pictures of CSV files of results", None, machine_free=True),
    "report": Part("the figures of docs/performance.md, from all results", "", machine_free=True, committed=True),
}
MAIN_JOB = ("machine", "verify", "bench", "bench --family paged", "mla", "sizes")
INTERRUPTED = 130


def main(argv):
    chosen = argv[0] if argv and argv[0] in PARTS else None
    if chosen:
        _set_mode(PARTS[chosen])
    options = vars(_parser(chosen).parse_args(argv))
    if options.pop("part") is None:
        return run_all()
    out_dir, publish = options.pop("out"), options.pop("publish")
    return run_part(chosen, out_dir or default_folder(chosen, options, publish), options)


def default_folder(name, options, publish=False):
    """Where a part's results go if nobody says; None: beside what it is given."""
    part = PARTS[name]
    if part.folder is None:
        return None
    named_by_gpu = has_gpu() and not part.machine_free
    folder = folder_name() if named_by_gpu else part.folder.format(**options)
    return (results.ROOT if publish or part.committed else results.LOCAL) / folder


def run_part(name, out_dir, options):
    try:
        for path in import_module(f"perf.commands.{name}").run(out_dir, **options) or ():
            print(f"wrote {os.path.relpath(path)}")
    except KeyboardInterrupt:
        where = f" in {os.path.relpath(out_dir)}" if out_dir else ""
        print(f"\ninterrupted; what was finished is kept{where}", file=sys.stderr)
        return INTERRUPTED


def run_all():
    """Each part in a process of its own, since they differ in Triton's mode; the exit code is 0 if all were done."""
    outcomes = []
    for call in MAIN_JOB:
        name, *options = call.split()
        print(f"\n== {call}: {PARTS[name].help}\n", flush=True)
        start = time.monotonic()
        code = _run_process([sys.executable, "-m", "perf", name, *options])
        outcome = {0: "done", INTERRUPTED: "interrupted"}.get(code, f"failed, exit code {code}")
        outcomes.append({"part": call, "seconds": time.monotonic() - start, "outcome": outcome})
        if code == INTERRUPTED:
            break
    print()
    print_table(outcomes)
    return 0 if all(row["outcome"] == "done" for row in outcomes) else 1


def _run_process(command):
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends it to the part too, which then ends by itself
            continue


def _set_mode(part):
    """Before anything imports triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    if part.interpreted and not has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def _parser(chosen):
    """All parts, but the options only of the chosen one: no other module is imported."""
    parser = argparse.ArgumentParser(
        "python -m perf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", metavar="PART")
    for name, part in PARTS.items():
        sub = parts.add_parser(name, help=part.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        root = results.ROOT if part.committed else results.LOCAL
        where = "that of each file" if part.folder is None else f"perf/{root.name}/{part.folder}"
        if not part.machine_free:
            where += ", or the name of the GPU"
        sub.add_argument("--out", type=Path, help=f"folder of the results (default: {where})")
        sub.add_argument("--publish", action="store_true", help="the default is under perf/results, for the docs")
        if name == chosen:
            module = import_module(f"perf.commands.{name}")
            sub.description = module.__doc__
            if hasattr(module, "add_arguments"):
                module.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
