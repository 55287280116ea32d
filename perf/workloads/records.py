"""The stage of `python -m perf gpu` that decides whether a kernel may replace a portable one on this GPU.

A case is a kernel of hopper.py with the config that calls take, and with its default config where that is another one:
an entry of earlier code does not keep a better default out. Each is also tried with 2 tiles of queries for a program.
Results are checked, and timed beside those of the portable kernel and peers. The tuned table gets a record of each,
with a digest of the kernel's code, as from a sweep.
"""

from dataclasses import replace

import torch

from perf.commands.sweep import providers_of, time_round
from perf.harness.device import gpu_arch, gpu_name, versions
from perf.harness.measure import compile_all
from perf.model.candidates import FAMILIES, Candidate
from perf.results import COLUMNS, MEASURED, OURS, winners
from perf.workloads.providers import COMPILED_PEERS

DTYPES = "bfloat16", "float16"


def record_cases():
    """Those that this GPU supports, the targets' first."""
    cases = [
        {"family": family, "dtype": dtype, "case": case}
        for dtype in DTYPES
        for family, kind in FAMILIES.items()
        if kind.portable is not None
        for case in kind.cases(dtype, kind.shapes)
        if kind.search_space(gpu_arch(), getattr(torch, dtype), **case)
    ]
    unique = [case for i, case in enumerate(cases) if case not in cases[:i]]  # models may have one shape
    return sorted(unique, key=lambda case: (DTYPES.index(case["dtype"]), case["case"].get("head_dim", 128) != 128))


def compile_record(case):
    """Compile what the case times, at its shortest length."""
    kind = FAMILIES[case["family"]]
    seqlen = kind.seqlens[0]
    peers = {name: provider for name, provider in kind.peers.items() if name in COMPILED_PEERS}
    problem = kind.problem(seqlen, **case["case"])
    compile_all(problem, case["dtype"], providers_of(candidates_of(case, seqlen)) | peers)


def run_record(case, table):
    """Rows of the kernel, the portable one and peers at each length. The record of each length goes to the table."""
    found = []
    for seqlen in FAMILIES[case["family"]].seqlens:
        candidates = candidates_of(case, seqlen)
        rows = time_round(candidates, seqlen, roof=None)
        if entries := winners.measured([(candidates, seqlen, rows)], time_passes=None):
            winners.begin(table)
            winners.update(table, gpu_arch(), entries)
        found += rows
    return found


def candidates_of(case, seqlen):
    """The kernel's Candidates and the portable kernel's; see above."""
    own = Candidate(case["family"], gpu_arch(), case["dtype"], case["case"], config=None)
    configs = [winners.as_called(own, seqlen).config, winners.default_of(own)]
    configs = dict.fromkeys([*configs, *(several for config in configs if (several := _with_tiles(own, config)))])
    return [*(replace(own, config=config) for config in configs), *winners.portable_of(own, seqlen)]


def _with_tiles(candidate, config):
    """The config with 2 tiles of queries for each program, None where there is none. It is faster in short sequences by
    a prediction alone (docs/design.md), so it is timed beside the other."""
    if getattr(config, "tiles", None) != 1:
        return None
    several = replace(config, tiles=2)
    kind = FAMILIES[candidate.family]
    return (
        None
        if several.obstacle(kind.case_of(candidate.arch, getattr(torch, candidate.dtype), **candidate.case))
        else several
    )


def failed_record(case, failure):
    """The row of a case without a result."""
    about = {"family": case["family"], "provider": OURS, "dtype": case["dtype"], "gpu": gpu_name(), "source": MEASURED}
    return dict.fromkeys(COLUMNS) | versions() | about | {"note": f"{case['case']}: {failure}"}
