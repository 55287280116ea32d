"""Error of the loop model: predictions of sweeps compared with their measurements on a GPU.

Reads `sweep-*.csv` and `sweep-*-measured.csv` of a results folder. Writes calibration.csv, a plot of it and
calibration.md, a summary in words. Kernels of hopper.py are left out, because their loops run concurrently and the
model has no such case.

A candidate without predictions in its static row is compiled here with the installed Triton, which should be the one
that was measured. A sweep of the backward pass varies one kernel and keeps the others at their defaults. The prediction
includes their time: 5 / (4 / dkdv + 3 / dq), since the split pass does seven matmuls and five are counted.
"""

import sys
from functools import partial
from pathlib import Path

import pandas as pd
import triton
from matplotlib import pyplot as plt

from perf import results
from perf.commands.sweep import in_words
from perf.harness.parallel import map_in_processes
from perf.harness.progress import tqdm
from perf.model import compiled
from perf.model.candidates import FAMILIES, Candidate
from perf.model.timeline import WAITS
from perf.results.calibration_plot import calibration
from perf.results.style import STYLE
from perf.results.tables import format_table, print_table

FIGURES = {"lock": "lock TFLOP/s", "bound": "bound TFLOP/s", "expected": "expected TFLOP/s"}
RANKED = ("lock", "expected")
UNSTEADY = 1.2  # above this p80/p20 ratio a timing is discarded as noise
PROBLEM = ["family", "case", "length"]  # configs are compared within one problem
MATMULS = {
    "dkdv": 4,
    "dq": 3,
    "fused": 5,
}  # matmuls of each backward kernel; the FLOP convention counts five for the pass
LEAST_RANKED = 3  # least number of configs of a problem for a rank correlation


def add_arguments(parser):
    parser.add_argument("folder", type=Path, help="results of a GPU, with measured sweeps")


def run(out_dir, folder):
    """Write calibration.csv, .png and .md into out_dir, or into the folder if that is None. Print the tables."""
    out_dir = out_dir or folder
    try:
        data = calibrate(folder)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"calibration.{kind}" for kind in ("csv", "png", "md")]
    data.to_csv(paths[0], index=False, float_format="%.6g")
    with plt.rc_context(STYLE):
        figure = calibration(data)
        figure.savefig(paths[1])
        plt.close(figure)
    paths[2].write_text(page(data))
    print_table(by_stages(data).to_dict("records"))
    print()
    print_table(by_problem(data).to_dict("records"))
    return paths


def calibrate(folder):
    """A row per steady timing: family, case, length, config, stages, predictions, measurement, and their ratios."""
    timings = list(_sweeps(folder))
    if not timings:
        raise ValueError(f"{folder}: expected sweep-*-measured.csv beside their sweep-*.csv")
    _predict(timings)
    rows = [row for timing in timings if (row := timing.row())["lock"] is not None]
    data = pd.DataFrame(rows)
    for name in RANKED:
        data[f"measured/{name}"] = data["measured"] / pd.to_numeric(data[name])
    return data


class Timing:
    """The measurement of a candidate. `others` are the candidates of the other kernels of its backward pass.

    `figures` maps the key of each candidate to its values of FIGURES.
    """

    def __init__(self, candidate, row, tflops, length, others=()):
        self.candidate, self.others = candidate, others
        self.tflops, self.length = tflops, length
        self.figures = {}
        self._provenance = {name: row.get(name, "") for name in ("gpu", "triton")}

    @property
    def candidates(self):
        return [self.candidate, *self.others]

    def row(self):
        case = self.candidate.case
        family = self.candidate.family.replace("flash_backward", f"backward {case.get('kernel')}")
        words = [f"{name} {value}" for name, value in case.items() if name != "kernel"]
        return {
            "family": family,
            "case": ", ".join(words),
            "length": self.length,
            "config": compiled.config_name(self.candidate.config),
            "stages": self.candidate.config.num_stages,
            **{name: self._prediction(name) for name in FIGURES},
            "measured": self.tflops,
            **self._provenance,
            "compiled by": self.figures[_key(self.candidate)]["triton"],
        }

    def _prediction(self, name):
        rates = {c.case.get("kernel"): self.figures[_key(c)][name] for c in self.candidates}
        if None in rates.values():
            return None
        if not self.others:
            return next(iter(rates.values()))
        return 5 / sum(MATMULS[kernel] / rate for kernel, rate in rates.items())


def _key(candidate):
    return repr((candidate.family, candidate.dtype, candidate.case, candidate.config))


def _sweeps(folder):
    """The timings of all sweeps in a folder."""
    for path in sorted(folder.glob("sweep-*-measured.csv")):
        static_path = path.with_stem(path.stem.removesuffix("-measured"))
        measured = results.read(path)
        static = _records(pd.read_csv(static_path))
        kind = FAMILIES[static[0]["family"]]
        if kind.config in compiled.HOPPER_CONFIGS:
            continue
        candidates = [_candidate(row, kind) for row in static]
        known = {_key(c): _figures(row, measured["triton"].iloc[0]) for c, row in zip(candidates, static)}
        for timing in _timings(kind, candidates, _records(measured)):
            timing.figures |= {_key(c): known[_key(c)] for c in timing.candidates if known[_key(c)]}
            yield timing


def _records(data):
    """Rows as dicts, with None for an empty cell."""
    return data.astype(object).where(data.notna(), None).to_dict("records")


def _candidate(row, kind):
    names = list(row)
    case = {name: row[name] for name in names[names.index("dtype") + 1 : names.index("block_m")]}
    config = kind.config(**{name: row[name] for name in kind.config_columns})
    return Candidate(row["family"], row["arch"], row["dtype"], case, config)


def _figures(row, triton_version):
    """The figures of a row, or None if the sweep did not predict all of them."""
    if any(column not in row for column in FIGURES.values()):
        return None
    return {name: row[column] for name, column in FIGURES.items()} | {"triton": triton_version}


def _timings(kind, candidates, measured):
    by_problem = {}  # (columns of the problem, name of the candidate in notes): candidate
    for length in {row["seqlen_k"] for row in measured}:
        for candidate in candidates:
            columns = kind.problem(length, **candidate.case).columns()
            by_problem[_shape(columns, columns), _note(candidate)] = candidate
    for row in measured:
        is_steady = row["p50_ms"] is not None and row["p80_ms"] <= UNSTEADY * row["p20_ms"]
        found = [c for (shape, note), c in by_problem.items() if _is_of(row, shape, note)]
        if is_steady and found:
            candidate = max(found, key=lambda c: len(_note(c)))  # "w8 s2" is a prefix of "w8 s2 tma"
            yield Timing(candidate, row, row["tflops"], row["seqlen_k"], _beside(candidate, candidates))


def _shape(names, values):
    return tuple((name, values["pass" if name == "direction" and "pass" in values else name]) for name in names)


def _is_of(row, shape, note):
    names = [name for name, _ in shape]
    return f"{row['note']} ".startswith(f"{note} ") and _shape(names, row) == shape


def _note(candidate):
    """The name of a candidate in the note of a measured row."""
    beside = [in_words(candidate.case, name) for name in ("kernel", "fused") if name in candidate.case]
    return " ".join([*beside, compiled.config_name(candidate.config)])


def _beside(candidate, candidates):
    """The default of the other kernel of a split pass, which is the first config of its search space."""
    other = {"dkdv": "dq", "dq": "dkdv"}.get(candidate.case.get("kernel"))
    case = candidate.case | {"kernel": other}
    return [next(c for c in candidates if c.case == case)] if other else []


def _predict(timings):
    """Compile every candidate without figures, each one once."""
    missing = {_key(c): c for timing in timings for c in timing.candidates if _key(c) not in timing.figures}
    rows = map_in_processes(Candidate.compile, list(missing.values())) if missing else ()
    figures = {}
    for key, row in zip(missing, tqdm(rows, total=len(missing), desc="compiling", unit="config")):
        figures[key] = _figures(row, triton.__version__)
    for timing in timings:
        timing.figures |= {key: figures[key] for key in map(_key, timing.candidates) if key not in timing.figures}


def by_stages(data):
    """Per family and number of stages: measured over `lock` and over `expected`, and rank correlations."""
    return _summary(data, ["family", "stages"], ratios=RANKED)


def by_problem(data):
    """Per problem: rank correlations, and the regret of the config that a prediction ranks first."""
    return _summary(data, PROBLEM, ratios=())


def _summary(data, keys, ratios):
    rows = []
    for values, group in data.groupby(keys, sort=True):
        row = dict(zip(keys, values)) | {"timings": len(group)}
        for name in ratios:
            ratio = group[f"measured/{name}"]
            row |= {f"measured/{name}": ratio.median(), f"{name}, range": f"{ratio.min():.2f} to {ratio.max():.2f}"}
        row |= {f"rank corr. {name}": rank_correlation(group, name) for name in RANKED}
        if "length" in keys:
            row |= {f"regret {name} (%)": 100 * regret(group, name) for name in RANKED}
        rows.append(row)
    return pd.DataFrame(rows)


def rank_correlation(group, name):
    """Spearman's rank correlation of a prediction with the measurement. None for too few values or all equal ones."""
    ranks = group[[name, "measured"]].astype(float).rank()
    if len(group) < LEAST_RANKED or (ranks.nunique() < 2).any():
        return None
    return float(ranks.corr().iloc[0, 1])


def regret(group, name):
    """By what share the config that the prediction ranks first is slower than the best measured one."""
    first = group["measured"].loc[group[name].astype(float).idxmax()]
    return 1 - first / group["measured"].max()


def page(data):
    """calibration.md."""
    stages, problems = by_stages(data), by_problem(data)
    ranked = problems[problems["timings"] >= LEAST_RANKED]
    mean = partial(_mean, ranked)
    waits = WAITS["sm_90"]
    lock, expected = (_error(data[f"measured/{name}"]) for name in RANKED)
    return f"""# Calibration

{len(data)} timings of {data.groupby([*PROBLEM[:2], "config"]).ngroups} kernels at {len(problems)} problems compared \
with the predictions of the loop model. Measured on {_all(data["gpu"])} with Triton {_all(data["triton"])}; compiled \
for the model by Triton {_all(data["compiled by"])}. Written by `python -m perf calibrate`.

![predicted and measured](calibration.png)

**How far off.** `lock`, the loop without its waits, is {lock}. Ranking configs by it has a mean rank correlation of \
{mean("rank corr. lock"):.2f} with the measurements, and the config that it ranks first is \
{mean("regret lock (%)"):.0f} % slower than the best on average, {ranked["regret lock (%)"].max():.0f} % at worst.

**Where.** {_where(data)}

**Why.** A trip has waits that `lock` does not count. The machine code shows them. With one stage the trip waits for \
each load from issue to arrival. With two stages the loads of the next trip are issued at the end of the current one. \
With three or more a load has a whole trip to arrive. CTA barriers and matmuls that nothing overlaps add waits. CTAs \
on the same SM fill each other's waits.

**What was corrected.** `expected` walks a trip on a timeline (perf/model/timeline.py) with three constants: a load \
takes {waits.latency:g} cycles, a barrier {waits.barrier:g}, and instructions between two waits {waits.stretch:g} \
times their static stall counts. It is {expected}; mean rank correlation {mean("rank corr. expected"):.2f}, regret \
{mean("regret expected (%)"):.0f} % on average and {ranked["regret expected (%)"].max():.0f} % at worst. `bound` and \
`lock` are unchanged. The source code names the timings to which the constants were fitted. If they are the timings \
of this page, these errors are fit errors and not forecast errors.

**What is left.** {_where(data, "expected")} `expected` is the rate of a loop. Prologue, masked tiles and the last \
wave make a pass slower, short passes most. Where a number of stages is below the others, its loops have waits that \
the timeline does not model.

{_markdown(stages)}

{_markdown(problems)}
"""


def _mean(table, column):
    return pd.to_numeric(table[column]).mean()


def _all(column):
    return ", ".join(sorted({str(value) for value in column if value})) or "an unknown one"


def _error(ratio):
    """In words, how far predictions are from measured/predicted = 1."""
    off = (1 / ratio - 1).abs()
    side = "too high" if ratio.median() < 1 else "too low"
    return f"off by {100 * off.median():.0f} % in the median ({side}) and by {100 * off.max():.0f} % at worst"


def _where(data, name="lock"):
    """Per family, the median of measured/predicted by number of stages."""
    sentences = []
    for family, rows in data.groupby("family"):
        reached = rows.groupby("stages")[f"measured/{name}"].median()
        each = ", ".join(f"{share:.2f} with {stages}" for stages, share in reached.items())
        sentences.append(f"{family} reaches {each}")
    return f"Median of measured/{name} by the number of stages: {'; '.join(sentences)}."


def _markdown(table):
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return format_table(rows, "github")
