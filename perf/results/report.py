"""The figures of docs/performance.md and the status line of the README, written from the results alone. Every figure
comes from a CSV file or a tuned table, and says where it was measured, or that it is predicted.

Plots that are missing or older than their CSV are drawn first.
"""

import json
from operator import itemgetter
from os.path import relpath
from pathlib import Path
from textwrap import fill

import pandas as pd
from tabulate import tabulate

from perf import results
from perf.results import BOUND, LOCK, MEASURED, OURS, PUBLISHED, SOURCES, VERSIONS, plot, speed_plots
from perf.results.speed_plots import WORDS
from perf.results.style import short_length
from perf.results.targets import TARGETS, judge
from perf.workloads.gpu_cases import KNOWN, NOT_AVAILABLE
from perf.workloads.problems import DecodeProblem

README = Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "docs" / "performance.md"
TUNED = README.parent / "triton_attn" / "tuned"
STATUS = "> **Status**: "  # the beginning of the README's third line
BEGIN, END = "<!-- from here on written by `python -m perf report` -->", "<!-- up to here -->"
NONE = pd.Series(dtype=str)


def draw(root, redraw):
    """Draw the plots of every CSV that has none or is newer than its plots."""
    drawn = []
    for path in _files(root, "*.csv"):
        pictures = plot.paths_of(path)
        if pictures and (redraw or any(_is_stale(picture, path) for picture in pictures)):
            drawn += plot.draw(path)
    return drawn


def _is_stale(picture, csv_path):
    return not picture.exists() or picture.stat().st_mtime < csv_path.stat().st_mtime


def replace_section(text, new):
    """ValueError unless each mark is there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page needs the marks {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def replace_status(text, new):
    """ValueError unless the third line is a status line."""
    lines = text.splitlines(keepends=True)
    if len(lines) < 3 or not lines[2].startswith(STATUS):
        raise ValueError(f"expected a third line that begins with {STATUS!r}")
    return "".join([*lines[:2], new + "\n", *lines[3:]])


def status(root):
    """A line of Markdown: the GPUs on which the package has run, and the outcome."""
    runs = [_run(path.parent) for path in _files(root, "smoke.csv")]
    ran = f"has run on {'; '.join(runs)}. No other GPU has run it yet." if runs else "no GPU has run it yet."
    return (
        f"{STATUS}{ran} Everything else is tested without a GPU: in Triton's interpreter, compiled for NVIDIA and AMD, "
        "and as compiled code for sm_80 and sm_90 in an emulator."
    )


def _run(folder):
    """The status of one GPU, from its smoke checks, its tests and the report of the run."""
    machine = pd.read_csv(folder / "machine.csv", index_col="what")["value"]
    said = [f"{_passed(folder / 'smoke.csv')} smoke checks"]
    if (folder / "tests.csv").exists():
        said.append(f"{_passed(folder / 'tests.csv')} tests")
    report = json.loads((folder / "report.json").read_text())
    left = sum(stage["left"] for stage in report["stages"] if stage["stage"] == "tests")
    about = f"Triton {machine['triton']}, torch {machine['torch']}, commit {machine['commit']}"
    not_reached = f", {left} tests not reached" if left else ""
    return f"an {machine['device']} ({about}): {' and '.join(said)} passed{not_reached}"


def _passed(path):
    outcomes = pd.read_csv(path)["outcome"]
    outcomes = outcomes[~outcomes.isin([KNOWN, NOT_AVAILABLE])]  # of a sanitizer that cannot tell
    return f"{(outcomes == 'passed').sum()} of {len(outcomes)}"


def section(root, base=PAGE.parent, tuned=TUNED):
    """Markdown of the results under `root`, with links relative to `base`. Sections without results are left out."""
    found = Results(root, base)
    blocks = [where_measured, targets, prefill, decode, beside_vllm, latent_decode, latent_prefill, cold_start]
    blocks += [errors, sizes, many_gpus_measured, many_gpus]
    return "\n\n".join(filter(None, [*(block(found) for block in blocks), tuned_tables(tuned)]))


def _files(root, pattern):
    """CSV files in the folders under root, sorted, without those that have a header alone."""
    return [path for path in sorted(root.glob(f"*/{pattern}")) if results.has_rows(path)]


class Results:
    """The CSV files with rows under `root`: all tables of speeds as one, measured rows first, and the other files by
    name.
    """

    def __init__(self, root, base):
        self.root, self.base = root, base
        paths = [path for path in _files(root, "*.csv") if not path.name.startswith("sweep")]
        self.paths = [path for path in paths if results.holds_speeds(path)]
        tables = [results.read(path) for path in self.paths] or [pd.DataFrame(columns=results.COLUMNS, dtype=object)]
        speeds = pd.concat(tables)
        origins = ("measured, " + speeds["gpu"]).where(speeds["source"] == MEASURED, "predicted")
        speeds = speeds.assign(order=speeds["source"].map(SOURCES.index), origin=origins)
        self.speeds = speeds.sort_values("order", kind="stable", ignore_index=True)

    def of(self, family, direction):
        rows = self.speeds[(self.speeds["family"] == family) & (self.speeds["pass"] == direction)]
        return rows[rows["dtype"] == "bfloat16"]

    def table(self, pattern):
        """(path, DataFrame) of the first file with a name, a GPU's before the interpreter's. (None, None) if there is
        none.
        """
        paths = sorted(_files(self.root, pattern), key=lambda path: (path.parent.name == "interpreter", path))
        return (paths[0], results.read_any(paths[0])) if paths else (None, None)

    def pictures(self, family, direction):
        """[(caption, path)] of the plots that exist, measured ones first."""
        shown = []
        for path in self.paths:
            for picture, (draw_it, rows) in zip(plot.paths_of(path), plot.pictures(path).values()):
                first = rows.iloc[0]
                if (first["family"], first["pass"]) == (family, direction) and picture.exists():
                    over = " over the best peer" if draw_it is speed_plots.ratio else ""
                    origin = f"measured on {first['gpu']}" if first["source"] == MEASURED else "predicted"
                    shown.append((SOURCES.index(first["source"]), f"{direction}{over}, {origin}", picture))
        return [(text, picture) for _, text, picture in sorted(shown, key=itemgetter(0))]

    def image(self, pictures):
        return "".join(f"![{text}]({relpath(path, self.base)})" for text, path in pictures[:1])

    def links(self, pictures):
        links = ", ".join(f"[{text}]({relpath(path, self.base)})" for text, path in pictures)
        return f"Plot{'s' * (len(pictures) > 1)}: {links}." if links else ""


def where_measured(found):
    gpus = found.speeds.loc[found.speeds["source"] == MEASURED, "gpu"].unique()
    return f"Measured on {', '.join(gpus)}." if len(gpus) else "No GPU has measured these kernels yet."


def targets(found):
    """The targets, beside the values measured on each GPU that they are for."""
    rows = found.speeds.rename(columns={"pass": "direction"}).astype(object)
    judged = judge(rows.where(rows.notna(), None).itertuples(index=False)) or {"measured": [None] * len(TARGETS)}
    lines = []
    for i, target in enumerate(TARGETS):
        line = {"target on an H100 or H200, bf16": target.what, "at least": f"{target.at_least:.2f}"}
        for gpu, values in judged.items():
            line[gpu] = ("" if values[i] is None else f"{values[i]:.3f}, ") + target.verdict(values[i])
        lines.append(line)
    return f"## Targets\n\n{_markdown(lines)}"


def prefill(found):
    lines, used = [], []
    for direction in ("forward", "backward"):
        rows = found.of("flash", direction)
        rows = rows[rows["causal"].eq(True) & rows["head_dim"].isin([64, 128]) & rows["seqlen_k"].isin([4096, 16384])]
        rows = rows[(rows["seqlen_q"] == rows["seqlen_k"]) & (rows["num_heads_q"] == rows["num_heads_kv"])]
        rows = rows[rows["window"].isna()]
        lines += _lines(rows, direction, ["head_dim", "seqlen_k"], ["tflops"])
        used.append(rows)
    forward, backward = (found.pictures("flash", direction) for direction in ("forward", "backward"))
    about = "`python -m perf bench`: TFLOP/s of causal attention in bf16."
    pictures = found.image(forward), found.links(forward[1:] + backward)
    return _block("Training and prefill", about, lines, pd.concat(used), *pictures)


def decode(found):
    heads = DecodeProblem(1, 1)
    rows = found.of("paged", "decode")
    rows = rows[rows["batch"].isin([1, 8, 32]) & rows["seqlen_k"].isin([1024, 8192])]
    rows = rows[rows["cache_dtype"].fillna("bfloat16") == "bfloat16"]
    for column in ("num_heads_q", "num_heads_kv", "head_dim", "page_size"):
        rows = rows[rows[column] == getattr(heads, column)]
    about = "`python -m perf bench --family paged`: GB/s of a decode step over a paged bf16 KV cache, "
    about += f"{heads.num_heads_q} query heads, {heads.num_heads_kv} KV heads, head_dim {heads.head_dim}, "
    about += "by batch and context."
    lines = _lines(rows, "", ["batch", "seqlen_k"], ["gbps"])
    return _block("Decode", about, lines, rows, found.links(found.pictures("paged", "decode")))


def latent_decode(found):
    rows = found.of("mla", "decode")
    rows = rows[rows["seqlen_k"].isin([8192, 131072])]
    lines = []
    for (heads, cache), of_kind in rows.groupby(["num_heads_q", rows["cache_dtype"].fillna("bfloat16")]):
        lines += _lines(of_kind, f"{heads} heads, {cache} cache", ["seqlen_k"], ["tflops", "gbps"])
    about = "`python -m perf mla`: a decode step at DeepSeek's widths, by context."
    pictures = found.pictures("mla", "decode")
    return _block("MLA decode", about, lines, rows, found.image(pictures), found.links(pictures[1:]))


def latent_prefill(found):
    """The fastest schedule. For predictions, the one that "auto" chooses, since it uses the same costs."""
    rows = found.of("mla", "prefill")
    rows = rows[rows["provider"].str.startswith(OURS) & rows["seqlen_k"].isin([512, 2048, 8192, 32768])]
    rows = rows.assign(time=rows["p50_ms"].fillna(rows.get("ms")).astype(float)).dropna(subset="time")
    queries = rows["seqlen_q"].where(rows["seqlen_q"] != rows["seqlen_k"], 0)
    lines = []
    for (of_call, _, origin), group in rows.groupby([queries, "order", "origin"]):
        fastest = group.loc[group.groupby("seqlen_k")["time"].idxmin()]
        cells = {
            short_length(row["seqlen_k"]): f"{row['provider'].removeprefix(f'{OURS}, ')}, {row['time']:.2g} ms"
            for _, row in fastest.iterrows()
        }
        lines.append({"": f"{WORDS['queries'](of_call)}, {origin}"} | cells)
    about = "`python -m perf mla`: the fastest schedule by context. `auto` chooses by the predictions."
    return _block("MLA prefill", about, lines, rows, found.links(found.pictures("mla", "prefill")))


def beside_vllm(found):
    """A line per kind of call, and our `lock` over vLLM's for each device and Triton version."""
    paths = _files(found.root, "peers-*.csv")
    if not paths:
        return ""
    rows = pd.concat([results.read_any(path) for path in paths])
    lines = []
    for (seqlen_q, head_dim), of_call in rows.groupby(["seqlen_q", "head_dim"], sort=False):
        line = {"": f"{'decode' if seqlen_q == 1 else f'{seqlen_q} queries'}, head_dim {head_dim}"}
        for _, row in of_call.sort_values(["device", "triton"], ascending=[False, True], kind="stable").iterrows():
            speeds = f"{row['ours lock']:.0f} / {row['vLLM lock']:.0f}"
            line[f"{row['device']}, triton {row['triton']}"] = f"{speeds} = {row['ratio']:.2f}"
        lines.append(line)
    first = rows.iloc[0]
    about = (
        f"`python -m perf peers`: *lock* of our kernel / that of vLLM {first['vllm']}'s `unified_attention`, "
        "in TFLOP/s of the loop over full tiles, and the ratio. Both are compiled for the same calls, each with the "
        f"config that its library chooses: {first['num_heads_q']} query heads, {first['num_heads_kv']} KV heads, pages "
        f"of {first['page_size']} tokens. Memory is not in it."
    )
    return _block("Paged attention beside vLLM", about, lines, rows.drop(columns="device"))


def cold_start(found):
    path, calls = found.table("cold_calls.csv")
    _, imports = found.table("cold_import.csv")
    if path is None or imports is None:
        return ""
    seconds = imports.set_index("imports")["seconds"]
    launched = "" if (calls["launched"] == "yes").all() else f", compiled for {calls['arch'].iloc[0]} and not launched"
    said = (
        f"`python -m perf cold`, on the host{launched}: `import triton_attn` takes "
        f"{seconds['torch, triton_attn']:.1f} s, of which torch takes {seconds['torch']:.1f} s. The first call of a "
        f"function takes {_span(calls['empty_cache_s'])} s, or {_span(calls['warm_cache_s'])} s with its kernels in "
        f"Triton's disk cache. Later forward calls take {_span(_forward(calls)['later_call_us'], 0)} us. "
        f"[Times by function]({relpath(path, found.base)})."
    )
    return f"## Cold start\n\n{_wrap(said)}\n\n{_provenance(calls)}"


def _forward(calls):
    return calls[~calls["function"].str.contains("both passes")]


def _span(values, digits=1):
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}"


def errors(found):
    path, data = found.table("errors-*.csv")
    if path is None:
        return ""
    lines = []
    for function, rows in data.groupby("function"):
        inexact = rows[rows["bound"] > 0]
        line = {"": f"`{function}`", "checks": len(rows), "failed": (rows["verdict"] != "ok").sum()}
        for name, column in (("of torch's error", "torch_error"), ("of the bound", "bound")):
            line[name] = _percent((inexact["error"] / inexact[column]).max()) if len(inexact) else "exact"
        lines.append(line)
    about = (
        "`python -m perf verify`: errors of outputs and gradients against fp64, at shapes of real models in "
        f"{data['dtype'].iloc[0]}. The table has the largest error relative to torch's own error and to the bound. "
    )
    return _block("Errors", f"{about}[All errors]({relpath(path, found.base)}).", lines, data)


def sizes(found):
    """This section needs no device: it is computed from formulas."""
    _, kinds = found.table("mla_sizes.csv")
    path, _ = found.table("kv_cache.csv")
    blocks = ["## KV-cache sizes\n\n`python -m perf sizes`, computed from the formulas; d_h is the width of a head."]
    if kinds is not None:
        shown = ["attention", "elements/token/layer", "model", "in d_h", "bytes/token in bf16"]
        blocks.append(_markdown(kinds[shown].to_dict("records")))
    if path is not None:
        blocks.append(found.image([("KV cache against context length", path.with_suffix(".png"))]))
    return "\n\n".join(blocks) if len(blocks) > 1 else ""


def many_gpus_measured(found):
    """A line per model, number of GPUs and method, a column per length."""
    paths = _files(found.root, "parallel-measured.csv")
    if not paths:
        return ""
    rows = pd.concat([results.read_any(path) for path in paths])
    lines = []
    for (gpu, model, number, method), of_line in rows.groupby(["gpu", "model", "num_gpus", "method"], sort=False):
        cells = {
            f"{short_length(row['seqlen'])} tokens": f"{_duration(row['both_ms'])}, {_percent(row['both_share'])}"
            + " *" * row["is_auto"]
            for _, row in of_line.sort_values("seqlen").iterrows()
        }
        lines.append({"": f"{model}, {number} {gpu}, {method}"} | cells)
    about = (
        "`torchrun -m perf parallel`: attention of one layer, forward and backward, of one causal sequence in bf16, by "
        "method: its time, and the share of a GPU's speed, which is that of one GPU with the rows of a rank alone. "
        "* is the method that the cost model chooses."
    )
    plots = [
        (f"{what}, measured on {path.parent.name}", path.with_name(f"{path.stem}{end}.png"))
        for path in paths
        for what, end in MANY_GPUS
    ]
    pictures = found.image(plots), found.links(plots[1:])
    return _block("Many GPUs, measured", about, lines, rows.rename(columns={"gpu": "device"}), *pictures)


def many_gpus(found):
    """What the cost model chooses, by model, number of GPUs and length; then what others have measured."""
    path, data = found.table("parallel.csv")
    if path is None:
        return ""
    published = data["source"] == PUBLISHED
    rows = data[data["gpu"] == data["gpu"].iloc[0]]
    shown = rows[rows["is_auto"] & rows["num_gpus"].isin([8, 64, 512]) & rows["seqlen"].isin([2**15, 2**17, 2**20])]
    lines = []
    of_nodes = shown["method"].str.contains("+", regex=False)
    for (model, gpus, is_of_nodes), of_line in shown.groupby(["model", "num_gpus", of_nodes], sort=False):
        cells = {
            f"{short_length(row['seqlen'])} tokens": f"{row['method']}, {_duration(row['both_ms'])}, "
            f"{_percent(row['both_share'])}"
            for _, row in of_line.iterrows()
        }
        lines.append({"": f"{model}, {gpus} GPUs{' by node' if is_of_nodes else ''}"} | cells)
    about = (
        "`python -m perf parallel`: attention of one layer, forward and backward, of one causal sequence in bf16 over "
        "the GPUs. The table has the method that the cost model chooses, its time, and the share of a GPU's speed: the "
        "time that one GPU would take for its part of the FLOPs, over the time of the call. By node: the mesh has two "
        "dimensions, and the GPUs of a node exchange rows for heads."
    )
    anchors = [_anchor(row, data[~published & (data["gpu"] == row["gpu"])]) for _, row in data[published].iterrows()]
    plots = [(f"{what}, predicted", path.with_name(f"parallel{end}.png")) for what, end in MANY_GPUS]
    pictures = found.image(plots), found.links(plots[1:])
    provenance = rows.rename(columns={"gpu": "device"}).drop(columns="driver")
    return _block("Many GPUs", about, lines, provenance, *pictures, _wrap(*anchors))


def _duration(ms):
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


MANY_GPUS = (("share of a GPU's speed", ""), ("time", "_time"), ("memory", "_memory"))


def _anchor(row, predicted):
    """A sentence about a measurement of others, and what the cost model says of it."""
    ours = predicted[predicted["model"] == row["model"]].iloc[0]
    return (
        f"The zigzag ring of ring-flash-attention at {row['model']}, {short_length(row['seqlen'])} tokens, on "
        f"{row['num_gpus']} {row['gpu']}, measured by its authors: {row['forward_share']:.1%} forward and "
        f"{row['both_share']:.1%} of both passes; the cost model, given the speed of one of these GPUs: "
        f"{ours['forward_share']:.1%} and {ours['both_share']:.1%}."
    )


def tuned_tables(folder):
    """The contents of `triton_attn/tuned/`: a line per architecture, family and source."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        entries = pd.DataFrame(json.loads(path.read_text())["entries"])
        for (family, source, device), rows in entries.groupby(["family", "source", "device"]):
            made = {"source": source, "device": device, "triton": ", ".join(sorted(rows["triton"].unique()))}
            lines.append({"arch": path.stem, "family": family, "configs": len(rows)} | made)
    about = "`python -m perf sweep` found these configs. They take precedence over the defaults."
    return f"## Tuned configs\n\n{about}\n\n{_markdown(lines)}" if lines else ""


def _lines(rows, label, by, speeds):
    """Lines of a table, one per source: our speeds for each value of the columns `by`."""
    rows = rows[rows["provider"].isin([OURS, BOUND, LOCK])]
    lines = []
    for (_, origin), of_origin in rows.groupby(["order", "origin"]):
        line = {"": ", ".join(filter(None, [label, origin]))}
        for values, cell in of_origin.groupby(by):
            name = ", ".join(_say(column, value) for column, value in zip(by, values))
            for speed in speeds:
                unit = f", {results.SPEEDS[speed]}" if len(speeds) > 1 else ""
                line[name + unit] = _cell(cell, speed)
        lines.append(line)
    return lines


def _say(column, value):
    return short_length(value) if column == "seqlen_k" else WORDS[column](value)


def _cell(rows, speed):
    """lock to bound, or the measured speed and its share of the roof."""
    speeds = rows.groupby("provider")[speed].max()
    if LOCK in speeds:
        lock, bound = (f"{speeds[model]:.0f}" for model in (LOCK, BOUND))
        return lock if lock == bound else f"{lock} to {bound}"
    if speeds.isna().all():
        return "failed"
    best = rows.loc[rows[speed].idxmax()]
    return f"{best[speed]:.0f} ({_percent(best['roof_share'])} of the roof)"


def _block(title, about, lines, rows, *pictures):
    """A section, or nothing if it has no lines."""
    if not lines:
        return ""
    return "\n\n".join(filter(None, [f"## {title}", _wrap(about), _markdown(lines), _provenance(rows), *pictures]))


def _provenance(rows):
    """How, on what and with which versions rows were obtained: a line per combination."""
    columns = [column for column in ("source", "cpu", "gpu", "device", *VERSIONS[:-1]) if column in rows]
    said = []
    for values, alike in rows.groupby(columns, dropna=False, sort=False):
        about = dict(zip(columns, values), commit=", ".join(alike.get("commit", NONE).dropna().unique()))
        about = {column: value for column, value in about.items() if pd.notna(value) and value}
        source = f"{about.pop('source')}: " if "source" in about else ""
        said.append(
            source + ", ".join(f"{name} {value}" if name in VERSIONS else value for name, value in about.items())
        )
    return "\n\n".join(_wrap(f"*{each}*") for each in said)


def _wrap(*sentences):
    return fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def _percent(share):
    return f"{100 * share:.0f} %"


def _markdown(lines):
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True, missingval="")
