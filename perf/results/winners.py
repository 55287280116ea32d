"""The winners of a sweep: the best config of each case, as entries of a tuned table (triton_attn/_host/tuned.py).

The default stays unless another config is better by more than the noise of its figure. Among configs that are equal
within the noise, the one with the most stages wins, since stages hide a latency that the loop model does not include.

Predicted figures are the loop model's `expected`, or `lock` where it has none (`predicted_tflops`), capped by the
memory bandwidth of the GPU's data sheet. The model covers the innermost loop only, so a config that spills more than
the default outside of it has no prediction. A backward pass is predicted from its kernels: the split schedule does
seven matmuls, and five are counted.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import triton

from perf.harness.device import commit, gpu_name
from perf.model.candidates import FAMILIES, Candidate
from perf.model.gpus import RATES
from perf.results import MEASURED, PREDICTED
from triton_attn._host import tuned
from triton_attn._host.config import FAMILIES as FAMILIES_OF_TABLES
from triton_attn._host.sources import kernel_digest
from triton_attn.dense.backward_configs import BackwardConfig

NOISE = {PREDICTED: 0.05, MEASURED: 0.02}
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s"}


class Winner(NamedTuple):
    """The winning `config` for the case of `candidate` at a length, and the fields of its `record`."""

    candidate: Candidate
    seqlen: int
    config: object
    figure: float
    record: dict | None = None

    @property
    def problem(self):
        return FAMILIES[self.candidate.family].problem(self.seqlen, **self.candidate.case)


def predicted(cases, seqlen):
    """Entries for cases with a figure. A case is pairs of a candidate and the row of its compiled code."""
    winners = []
    for candidates, rows in cases:
        first = candidates[0]
        problem = FAMILIES[first.family].problem(seqlen, **first.case)
        size = getattr(torch, first.dtype).itemsize
        spills = {candidate.config: row["spills"] or 0 for candidate, row in zip(candidates, rows)}
        most_spills = spills.get(default_of(first), 0)
        figures = {
            candidate.config: predicted_figure(problem, predicted_tflops(row), first.arch, size)
            for candidate, row in zip(candidates, rows)
            if spills[candidate.config] <= most_spills
        }
        winners += _winner(first, seqlen, figures, PREDICTED)
    return _entries(winners, PREDICTED, _predict_passes)


def measured(cases, time_passes):
    """Entries for cases. A case is candidates, a length and the rows of their timing (`time_round` of a sweep). A
    candidate of another family is the portable kernel's, see `portable_of`; rows without a candidate are peers'.

    time_passes(problem, dtype, {name: BackwardConfig}) returns {name: TFLOP/s}.
    """
    winners = []
    for candidates, seqlen, rows in cases:
        first = candidates[0]
        column = FAMILIES[first.family].problem(seqlen, **first.case).figure
        figures = {c.config: row[column] for c, row in zip(candidates, rows) if c.family == first.family}
        found = _winner(first, seqlen, figures, MEASURED)
        winners += [winner._replace(record=_record(candidates, rows, winner.config, column)) for winner in found]

    def passes(configs, kernels):
        first = kernels["dq"]
        return time_passes(first.problem, first.candidate.dtype, configs)

    return _entries(winners, MEASURED, passes)


def _record(candidates, rows, config, column):
    """The fields of an entry that decide whether a kernel replaces a portable one; None for other kernels."""
    kind = FAMILIES[candidates[0].family]
    if kind.portable is None:
        return None
    own, *_ = (row for c, row in zip(candidates, rows) if (c.family, c.config) == (candidates[0].family, config))
    beside = {c.family: row[column] for c, row in zip(candidates, rows)}
    peers = {row["provider"]: row[column] for row in rows[len(candidates) :]}
    record = {
        "kernel": kernel_digest(kind.table.kernel),
        "date": own["date"],
        "error": _short(own["error"]),
        "bound": _short(own["bound"]),
        "peers": {name: _short(figure) for name, figure in peers.items() if figure is not None},
    }
    portable = beside.get(kind.portable)
    return record if portable is None else record | {"portable": _short(portable)}


def _short(figure):
    return float(f"{figure:.4g}")


def _winner(first, seqlen, figures, source):
    """[Winner], or [] if no config has a figure."""
    config = best(figures, default_of(first), NOISE[source], prefer=lambda config: config.num_stages)
    return [] if config is None else [Winner(first, seqlen, config, figures[config])]


def best(figures, default, noise, prefer=lambda config: 0):
    """The winner of {config: figure}. It is the default if no other is better by more than the noise, else the config
    that `prefer` ranks first among those within the noise. None if all figures are None.
    """
    figures = {config: figure for config, figure in figures.items() if figure is not None}
    least = max(figures.values(), default=0) * (1 - noise)
    near = [config for config, figure in figures.items() if figure >= least]
    return default if default in near else max(near, key=lambda x: (prefer(x), figures[x]), default=None)


def default_of(candidate):
    """The config of a call without a table. None for a kernel that the call does not run."""
    if candidate.family == "flash_backward":
        return getattr(_default_pass(candidate), candidate.case["kernel"])
    dtype = getattr(torch, candidate.dtype)
    return FAMILIES[candidate.family].search_space(candidate.arch, dtype, **candidate.case)[0]


def portable_of(candidate, seqlen):
    """[Candidate] of the portable kernel that the candidate's may replace, with the config that a call of this length
    takes; [] if there is none."""
    name = FAMILIES[candidate.family].portable
    return [] if name is None else [as_called(replace(candidate, family=name), seqlen, candidate.family)]


def as_called(candidate, seqlen, family=None):
    """The candidate with the config that a call of this length takes. family: whose case it is, None for its own."""
    case_of = FAMILIES[family or candidate.family].case_of
    case = case_of(candidate.arch, getattr(torch, candidate.dtype), **candidate.case)
    return replace(candidate, config=tuned.choose(FAMILIES[candidate.family].table, case._replace(seqlen_k=seqlen)))


def _default_pass(candidate):
    kind = FAMILIES[candidate.family]
    return kind.table.default(kind.case_of(candidate.arch, getattr(torch, candidate.dtype), **candidate.case))


def predicted_tflops(row):
    """The figure that ranks configs: `expected` of the loop model if it is known, which ranks much more like an H100's
    measurements than `lock` does (perf/commands/calibrate.py). None where the model does not apply.
    """
    expected = row.get("expected TFLOP/s")
    return row["lock TFLOP/s"] if expected is None else expected


def predicted_figure(problem, loop_tflops, arch, element_size):
    """TFLOP/s or GB/s of a problem. None where the loop model does not apply."""
    if loop_tflops is None:
        return None
    flops_per_byte = problem.flops / problem.bytes(element_size)
    tflops = min(loop_tflops, RATES[arch].memory_gbps * flops_per_byte / 1e3)
    return tflops if problem.figure == "tflops" else tflops / flops_per_byte * 1e3


def _entries(winners, source, figures_of_passes):
    """Entries of a tuned table. The winners for the kernels of one backward pass make one entry."""
    passes, entries = {}, []
    for winner in winners:
        if winner.candidate.family == "flash_backward":
            case = {name: value for name, value in winner.candidate.case.items() if name != "kernel"}
            passes.setdefault((*case.values(), winner.seqlen), {})[winner.candidate.case["kernel"]] = winner
        else:
            entries.append(_entry(winner, asdict(winner.config), source))
    for kernels in passes.values():
        if _is_whole(kernels) and (winner := _winning_pass(kernels, source, figures_of_passes)):
            entries.append(_entry(winner, asdict(winner.config), source))
    return entries


def _is_whole(kernels):
    """Whether both schedules can be compared. A sweep that ran out of minutes knows only some kernels."""
    if not {"dkdv", "dq"} <= kernels.keys():
        return False
    return "fused" in kernels or _default_pass(kernels["dq"].candidate).fused is None


def _winning_pass(kernels, source, figures_of_passes):
    """The winner with a BackwardConfig, split or fused, of {kernel: Winner}. None if both failed."""
    tiles = {kernel: winner.config for kernel, winner in kernels.items()}
    configs = {"split": BackwardConfig(tiles["dkdv"], tiles["dq"], None)}
    if "fused" in tiles:
        configs["fused"] = BackwardConfig(**tiles)
    figures = figures_of_passes(configs, kernels)
    default = "split" if _default_pass(kernels["dq"].candidate).fused is None else "fused"
    name = best(figures, default, NOISE[source])
    return name and kernels["dq"]._replace(config=configs[name], figure=figures[name])


def _predict_passes(configs, kernels):
    """The split schedule does four and three matmuls, and five are counted."""
    figures = {kernel: winner.figure for kernel, winner in kernels.items()}
    figures["split"] = 5 / (4 / figures["dkdv"] + 3 / figures["dq"])
    return {name: figures[name] for name in configs}


def _entry(winner, config, source):
    candidate = winner.candidate
    kind = FAMILIES[candidate.family]
    case = kind.case_of(candidate.arch, getattr(torch, candidate.dtype), **candidate.case)
    return tuned.describe(kind.table, case._replace(seqlen_k=winner.seqlen)) | {
        "config": config,
        "figure": _short(winner.figure),
        "unit": UNITS[winner.problem.figure],
        "source": source,
        "device": gpu_name() if source == MEASURED else RATES[candidate.arch].memory_gpu,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": commit(),
        **(winner.record or {}),
    }


def begin(path):
    """A table that does not exist begins as a copy of the package's of the same name."""
    shipped = tuned.SHIPPED / path.name
    if shipped.exists() and not path.exists():
        shutil.copy(shipped, path)


def update(path, arch, entries):
    """Write the entries to the table at path, which need not exist. The rest of the table stays.

    A new entry replaces one for the same case, buckets and Triton, of the same GPU. A measured one also replaces all
    predictions for its case, and no prediction is added beside it.
    """
    table = tuned.read_table(path)["entries"] if path.exists() else []
    for new in entries:
        same = [old for old in table if _of_case(old) == _of_case(new)]
        if new["source"] != MEASURED and any(old["source"] == MEASURED for old in same):
            continue
        replaced = [old for old in same if _where(old) == _where(new) or old["source"] != new["source"]]
        table = [old for old in table if old not in replaced] + [new]
    _write(path, {"format": tuned.FORMAT, "arch": arch, "entries": sorted(table, key=_order)})


def _of_case(entry):
    """A prediction holds at any length and page size."""
    return entry["family"], entry["dtype"], entry["case"], entry["triton"].split(".")[:2]


def _where(entry):
    return entry["buckets"], entry["device"]


def _order(entry):
    kind = FAMILIES_OF_TABLES[entry["family"]]
    case = [entry["case"][name] for name in kind.case_types]
    buckets = [entry["buckets"][name] for name in kind.buckets]
    return (
        list(FAMILIES_OF_TABLES).index(entry["family"]),
        entry["dtype"],
        case,
        buckets,
        entry["triton"],
        entry["device"],
    )


def _write(path, table):
    """One line per entry. The file is replaced atomically."""
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = ",\n  ".join(map(json.dumps, table["entries"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(f'{json.dumps(head)[:-1]}, "entries": [\n  {lines}\n]}}\n')
    tuned.read_table(draft)
    os.replace(draft, path)
