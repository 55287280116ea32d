"""Checks, benchmarks, predictions and sizes of triton_attn.

Without PART, six parts run one after the other in a few minutes: machine, verify, bench of both families, mla, sizes.
Results go to perf/out/, which git ignores. With --publish they go to perf/results/, from which `python -m perf report`
writes docs/performance.md. Without a GPU, the kernels are verified in Triton's interpreter. Their speed is then
predicted from compiled code, and every such figure is labelled as a prediction.
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
    """A subcommand: `perf.commands.<name>` has `run(out_dir, **options)` and, for options, `add_arguments(parser)`.

    `folder` is the default folder of the results where a GPU does not name it. It may contain options in braces. With
    None the results go beside the input files. Without a GPU an `interpreted` part runs its kernels in Triton's
    interpreter, which is a choice for the whole process. Results of a `machine_free` part are the same on every
    machine. A `committed` part works on the results in git.
    """

    help: str
    folder: str | None
    interpreted: bool = False
    machine_free: bool = False
    committed: bool = False


PARTS = {
    "machine": Part("device and versions; on a GPU also its measured roofs", "interpreter"),
    "verify": Part("errors of every public function at real model shapes", "interpreter", interpreted=True),
    "bench": Part("throughput of attention, ours and the peers'", "predicted-{arch}"),
    "mla": Part("multi-head latent attention: decode, prefill schedules, cache bytes", "predicted-{arch}"),
    "sizes": Part("KV-cache bytes against context length", "sizes", machine_free=True),
    "cache": Part("host cost of page bookkeeping", "host"),
    "cold": Part("cost of imports and first calls, kernels compiled per call", "host"),
    "sweep": Part("the best config of a kernel", "predicted-{arch}"),
    "gpu": Part("every check and benchmark that needs a GPU, within a time budget", "gpu"),
    "inspect": Part(
        "registers, spills, occupancy and hot loops of compiled kernels", "predicted-{arch}", machine_free=True
    ),
    "counts": Part(
        "memory traffic, bank conflicts and FLOP of kernels, counted by the emulator",
        "predicted-{arch}",
        machine_free=True,
    ),
    "peers": Part("our paged kernel and vLLM's, compiled and compared", "peers", machine_free=True),
    "prefixes": Part("what prefix trees save by the model of trees", None, machine_free=True),
    "drafts": Part("what a tree of drafts costs beside a chain", None, machine_free=True),
    "invariance": Part("what batch_invariant costs by the model of splits", None, machine_free=True),
    "parallel": Part("context parallelism by method, on 8 to 512 GPUs", "predicted-sm_90"),
    "house": Part("size of the device code and the import law", None, machine_free=True),
    "doors": Part("functions of other libraries: what is supported and what raises", None, machine_free=True),
    "calibrate": Part("predictions of sweeps compared with their measurements", None, machine_free=True),
    "plot": Part("plots of result CSV files", None, machine_free=True),
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
    """The folder of a part's results if --out is not given. None puts results beside the input files."""
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
        print(f"\ninterrupted; finished results are kept{where}", file=sys.stderr)
        return INTERRUPTED


def run_all():
    """Run each part in its own process, since they differ in Triton's mode. The exit code is 0 if all succeeded."""
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
        except KeyboardInterrupt:  # the terminal also sends it to the part, which then ends by itself
            continue


def _set_mode(part):
    """Choose interpreter or compiler. This must happen before triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    if part.interpreted and not has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def _parser(chosen):
    """All parts, with the options of the chosen one only, so that no other module is imported."""
    parser = argparse.ArgumentParser(
        "python -m perf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", metavar="PART")
    for name, part in PARTS.items():
        sub = parts.add_parser(name, help=part.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        root = results.ROOT if part.committed else results.LOCAL
        where = "the folder of each file" if part.folder is None else f"perf/{root.name}/{part.folder}"
        if not part.machine_free:
            where += ", or named after the GPU"
        sub.add_argument("--out", type=Path, help=f"folder of the results (default: {where})")
        sub.add_argument("--publish", action="store_true", help="use a default under perf/results, for the docs")
        if name == chosen:
            module = import_module(f"perf.commands.{name}")
            sub.description = module.__doc__
            if hasattr(module, "add_arguments"):
                module.add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
