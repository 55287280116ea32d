"""Plots of tables of speeds (`perf/results/__init__.py`), for any families, passes and providers."""

import re
import textwrap

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.results import BOUND, LOCK, MEASURED, OURS, SPEEDS
from perf.results.style import BLACK, PROVIDER_STYLES, SKY, head, legend_below, length_ticks, short_length, styles_of

APART = ["family", "pass", "dtype", "gpu", "source"]  # rows that differ in these go to different plots
WORDS = {  # how a title words a column
    "causal": lambda causal: "causal" if causal else "full",
    "window": lambda window: "no window" if pd.isna(window) else f"window {window:g}",
    "head_dim": "head_dim {}".format,
    "head_dim_v": "values of {}".format,
    "num_heads_q": "{} query heads".format,
    "num_heads_kv": lambda heads: f"{heads} KV head{'s' if heads > 1 else ''}",
    "batch": "batch {}".format,
    "queries": lambda queries: f"chunks of {queries} queries" if queries else "whole prompts",
    "page_size": lambda size: "contiguous" if pd.isna(size) else f"page size {size:g}",
    "cache_dtype": "{} cache".format,
}
NAMES = {"flash": "Attention", "paged": "Paged attention", "mla": "MLA"}
ROOFS = {  # roof of a speed: measured, for predictions
    "tflops": ("matmul, measured", ""),
    "gbps": ("copy, measured", "memory, data sheet"),
}
LEFT_OUT = "launches, latencies and DRAM efficiency left out"


def pictures(data, measured=None):
    """{end of the file name: (function that draws, its rows)} for a table of speeds, as `results.read` returns it.

    `measured` are our rows from other tables. A plot of predictions shows those for the same problems and GPU.
    """
    names = [column for column in APART if data[column].nunique() > 1]
    found = {}
    for _, rows in data.groupby(APART, sort=False):
        first = rows.iloc[0]
        name = "".join(f"-{_slug(first[column])}" for column in names)
        if measured is not None and first["source"] != MEASURED:
            rows.attrs["measured"] = measured[[_is_gpu_of(gpu, first["gpu"]) for gpu in measured["gpu"]]]
        found[name] = speeds, rows
        if _has_peers(rows):
            found[f"{name}_ratio"] = ratio, rows
    return found


def _is_gpu_of(gpu, predicted):
    """Whether a prediction is for a GPU. Their names, e.g. "NVIDIA H100 80GB HBM3" and "H100 or H200 SXM at 1.755 GHz",
    share the word of the model.
    """
    models = (set(re.findall(r"\b[A-Z]+\d+\b", name)) for name in (gpu, predicted))
    return bool(set.intersection(*models))


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.partition(",")[0].lower()).strip("-")


def _has_peers(data):
    """Whether we and a peer have a speed."""
    timed = data.dropna(subset=list(SPEEDS), how="all")["provider"]
    return timed.str.startswith(OURS).nunique() == 2


def speeds(data):
    """Rows of one family and pass in their kind of plot, with the providers that have no speed."""
    first = data.iloc[0]
    if first["pass"] == "decode":
        figure = latent_decode(data) if first["family"] == "mla" else decode(data)
    elif "schedule" in data and data["schedule"].notna().any():
        figure = latent_prefill(data)
    else:
        figure = throughput(data)
    _list_failures(figure, data)
    return figure


def throughput(data):
    """TFLOP/s against sequence length, and the measured roof: a panel per mask, head dimension and other varying
    column, a line per provider.
    """
    first = data.iloc[0]
    panels, same = _panels(data, ["causal", "head_dim"])
    figure, grid = _grid(len(panels), 3 if len(panels) % 3 == 0 else 2, "sequence length (tokens)", SPEEDS["tflops"])
    styles = styles_of(data["provider"].unique())
    for axes, (title, panel) in zip(grid, panels.items()):
        _speed_lines(axes, panel, "tflops", styles)
        _measured_points(axes, panel, data, "tflops")
        _draw_roof(axes, data, "tflops")
        length_ticks(axes, data["seqlen_k"])
        axes.set_title(title, fontsize=10)
    grid[0].set_ylim(bottom=0)
    legend_below(figure)
    head(figure, f"{_name(first)}, {', '.join([first['dtype'], *same])}", *_provenance(first))
    return figure


def decode(data):
    """GB/s of decode steps, a line per provider, the roof and the share of it. Against context in a panel per batch,
    then against the batch at the shortest and the longest context that all batches have.
    """
    first = data.iloc[0]
    panels, same = _panels(data, ["batch"])
    contexts = _common_contexts(data) if len(panels) == data["batch"].nunique() > 1 else []
    figure, grid = _grid(len(panels) + len(contexts), 2, "context (tokens)", SPEEDS["gbps"], sharex=False)
    styles = styles_of(data["provider"].unique())
    for axes, (title, panel) in zip(grid, panels.items()):
        _speed_lines(axes, panel, "gbps", styles)
        _measured_points(axes, panel, data, "gbps")
        length_ticks(axes, data["seqlen_k"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("context (tokens)")
    for axes, context in zip(grid[len(panels) :], contexts):
        _speed_lines(axes, data[data["seqlen_k"] == context], "gbps", styles, against="batch")
        length_ticks(axes, data["batch"])
        axes.set_title(f"context {short_length(context)}", fontsize=10)
        axes.set_xlabel("batch")
    for axes in grid:
        _draw_roof(axes, data, "gbps")
    _share_of_roof(grid, _roof(data, "gbps"))
    grid[0].set_ylim(bottom=0)
    legend_below(figure)
    note = "SDPA and FlexAttention over a contiguous cache" if first["source"] == MEASURED else LEFT_OUT
    head(figure, f"Decode step, {', '.join([first['dtype'], *same])}", *_provenance(first, note))
    return figure


def _common_contexts(data):
    batches = data.groupby("seqlen_k")["batch"].nunique()
    common = batches.index[batches == data["batch"].nunique()]
    return sorted({common.min(), common.max()}) if len(common) else []


def _share_of_roof(grid, roof):
    """A second scale at the right edge of the grid, in percent of the roof."""
    if pd.isna(roof):
        return
    for axes in grid:
        if axes.get_subplotspec().is_last_col():
            share = axes.secondary_yaxis("right", functions=(lambda y: 100 * y / roof, lambda y: y * roof / 100))
            share.set_ylabel("share of roof (%)")


def ratio(data):
    """Our speed over the best peer's, in the same panels. The colour says which peer it is."""
    first = data.iloc[0]
    speed = "gbps" if first["pass"] == "decode" else "tflops"
    panels, same = _panels(data, ["batch"] if first["pass"] == "decode" else ["causal", "head_dim"])
    figure, grid = _grid(len(panels), 3 if len(panels) % 3 == 0 else 2, "keys (tokens)", "ours / best peer")
    styles = styles_of(data["provider"].unique())
    for axes, (title, panel) in zip(grid, panels.items()):
        best = panel.dropna(subset=speed).groupby(["seqlen_k", "provider"])[speed].max().unstack()
        is_ours = best.columns.str.startswith(OURS)
        peers = best.loc[:, ~is_ours].dropna(how="all")
        line = (best.loc[:, is_ours].max(axis=1) / peers.max(axis=1)).dropna()
        axes.plot(line, color=BLACK, linewidth=1)
        for peer, points in line.groupby(peers.idxmax(axis=1)):
            colour, marker, label = styles[peer]
            axes.plot(points, color=colour, marker=marker, linestyle="", markersize=7, label=f"over {label}")
        axes.axhline(1, color=BLACK, linewidth=1, linestyle="--", label="the best peer")
        axes.set_xscale("log", base=2)
        length_ticks(axes, data["seqlen_k"])
        axes.set_title(title, fontsize=10)
    grid[0].set_ylim(0, 1.1 * grid[0].get_ylim()[1])
    legend_below(figure)
    what = f"{_name(first)}, {', '.join([first['dtype'], *same])}"
    head(figure, f"{OURS} over the best peer", what, *_provenance(first))
    return figure


CACHES = {"bfloat16": "bf16 cache", "float8_e4m3fn": "fp8 cache"}
FLASH_MLA_PUBLISHED = {"tflops": 660, "gbps": 3000}  # H800, bf16, at best; github.com/deepseek-ai/FlashMLA, README


def latent_decode(data):
    """TFLOP/s (top) and GB/s (bottom) of MLA decode steps against context: a column per number of heads, with
    FlashMLA's published figures.
    """
    first = data.iloc[0]
    measured = first["source"] == MEASURED
    caches = data["cache_dtype"].fillna(data["dtype"])
    data = data.assign(cache_dtype=caches, line=data["provider"] + ", " + caches.replace(CACHES))
    styles = styles_of(data["line"].unique())
    panels, same = _panels(data, ["num_heads_q"], lines=["cache_dtype"])
    figure, grid = plt.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, figsize=(8, 5.6))
    for line, (speed, published) in zip(grid, FLASH_MLA_PUBLISHED.items()):
        for axes, panel in zip(line, panels.values()):
            if measured:
                _speed_lines(axes, panel.assign(provider=panel["line"]), speed, styles)
            else:
                _latent_bands(axes, panel, data, speed)
            axes.axhline(published, color=BLACK, linewidth=1, linestyle=":", label="FlashMLA, published, H800")
        line[0].set_ylabel(SPEEDS[speed])
        line[0].set_ylim(bottom=0)
    for above, below, title in zip(*grid, panels):
        above.set_title(title, fontsize=10)
        _draw_roof(below, data, "gbps")
        below.set_xscale("log", base=2)
        length_ticks(below, data["seqlen_k"])
        below.set_xlabel("context (tokens)")
    legend_below(figure)
    note = "" if measured else LEFT_OUT
    head(figure, f"MLA decode step, {', '.join(same)}", *_provenance(first, note))
    return figure


def _latent_bands(axes, panel, data, speed):
    for cache, rows in panel.groupby("cache_dtype", sort=False):
        name = CACHES[cache]
        colour, marker, _ = PROVIDER_STYLES[f"{OURS}, {name}"]
        bound, lock = (rows[rows["provider"] == model].set_index("seqlen_k")[speed] for model in (BOUND, LOCK))
        axes.plot(lock, color=colour, marker=marker, label=f"{name}, lock: no overlap")
        band = {"color": colour, "alpha": 0.2, "linewidth": 0, "label": f"{name}, to bound: full overlap"}
        axes.fill_between(lock.index, lock, bound, **band)
        _measured_points(axes, rows, data, speed, colour, f"{name}, ")


def latent_prefill(data):
    """Schedules of MLA prefill against context: time, time over the least of ours, workspace. A column per kind of
    call.
    """
    first = data.iloc[0]
    calls = data[["seqlen_q", "seqlen_k"]].apply(tuple, axis=1)
    ours = data[data["schedule"].notna()]
    data = data.assign(relative=data["ms"] / calls.map(ours.groupby(["seqlen_q", "seqlen_k"])["ms"].min()))
    panels, same = _panels(data, ["queries"])
    figure, grid = plt.subplots(3, len(panels), sharex="col", sharey="row", squeeze=False, figsize=(8, 7.5))
    styles = styles_of(data["provider"].unique())
    for column, (title, panel) in zip(grid.T, panels.items()):
        _schedule_panels(column, panel, styles)
        column[0].set_title(title, fontsize=10)
        column[-1].set_xlabel("context (tokens)")
    time, relative, workspace = grid[:, 0]
    time.plot([], [], color=BLACK, linestyle=":", label="all heads at once")
    time.set_yscale("log")
    time.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    relative.set_yscale("log", base=2)
    relative.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    workspace.set_yscale("symlog", base=2, linthresh=1)
    workspace.yaxis.set_major_locator(FixedLocator([0, *(4**i for i in range(8))]))
    workspace.yaxis.set_minor_locator(NullLocator())
    workspace.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y < 1024 else f"{y / 1024:g}k"))
    workspace.set_ylim(bottom=-0.5)
    for axes, name in zip(grid[:, 0], ("ms", "time / least of ours", "workspace (MiB)")):
        axes.set_ylabel(name)
    figure.align_ylabels()
    legend_below(figure)
    note = "" if first["source"] == MEASURED else first["note"]
    head(figure, f"MLA prefill, {', '.join([first['dtype'], *same])}", *_provenance(first, note))
    return figure


def _schedule_panels(column, data, styles):
    """Time, relative time and workspace of one kind of call."""
    time, relative, workspace = column
    for provider, rows in data.groupby("provider", sort=False):
        rows = rows.set_index("seqlen_k")
        colour, marker, label = styles[provider]
        style = {"color": colour, "marker": marker}
        time.plot(rows["ms"], **style, label=label)
        relative.plot(rows["relative"], **style)
        if rows["workspace_bytes"].notna().any():
            workspace.plot(rows["workspace_bytes"] / 2**20, **style)
            workspace.plot(rows["all_heads_bytes"] / 2**20, color=colour, linestyle=":")
    chosen = data[data["is_auto"]]
    ring = {"s": 90, "color": "none", "edgecolors": BLACK, "zorder": 3}
    time.scatter(chosen["seqlen_k"], chosen["ms"], **ring, label="chosen by auto")
    relative.scatter(chosen["seqlen_k"], chosen["relative"], **ring)
    time.set_xscale("log", base=2)
    length_ticks(time, data["seqlen_k"])


def _panels(data, keys, lines=()):
    """({title: rows}, what all rows have in common, in words).

    Panels are separated by the keys that vary, and by other columns in which rows of one length differ.
    """
    is_chunk = (data["seqlen_q"] != data["seqlen_k"]) & (data["pass"] != "decode")
    data = data.assign(queries=data["seqlen_q"].where(is_chunk, 0))
    keys = [key for key in keys if data[key].nunique() > 1]
    keys += [c for c in WORDS if c not in (*keys, *lines) and _tells_apart(data, c, [*keys, *lines])]
    same = [_say(data, column) for column in WORDS if column not in keys and data[column].nunique() == 1]
    if not keys:
        return {"": data}, list(filter(None, same))
    panels = {}
    for values, rows in data.groupby(keys, dropna=False):
        panels[", ".join(WORDS[key](value) for key, value in zip(keys, values))] = rows
    return panels, list(filter(None, same))


def _say(data, column):
    """The value that all rows share in a column, in words; nothing if it is the usual value."""
    first = data.iloc[0]
    is_plain = {
        "causal": first["pass"] == "decode",
        "head_dim_v": first["head_dim_v"] == first["head_dim"],
        "num_heads_kv": (data["num_heads_kv"] == data["num_heads_q"]).all(),
        "queries": True,
    }
    return None if is_plain.get(column) else WORDS[column](first[column])


def _tells_apart(data, column, keys):
    """Whether rows of one provider and length differ in a column."""
    groups = data.groupby([*keys, "provider", "seqlen_k"], dropna=False)[column]
    return groups.nunique(dropna=False).max() > 1


def _grid(num_panels, num_columns, x, y, sharex=True):
    """(figure, its panels) with axis labels at the edges."""
    num_columns = min(num_columns, num_panels)
    num_rows = -(-num_panels // num_columns)
    size = (8, 1.6 + 2.1 * num_rows)
    figure, grid = plt.subplots(num_rows, num_columns, sharex=sharex, sharey=True, squeeze=False, figsize=size)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for axes in grid.flat[max(0, num_panels - num_columns) : num_panels]:
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel(x)
    for axes in grid.flat[num_panels:]:
        axes.remove()
    return figure, list(grid.flat[:num_panels])


def _speed_lines(axes, data, speed, styles, against="seqlen_k"):
    """A line per provider, with the best of several configs."""
    lines = {name: rows.groupby(against)[speed].max() for name, rows in data.groupby("provider", sort=False)}
    for provider, line in lines.items():
        colour, marker, label = styles[provider]
        axes.plot(line, color=colour, marker=marker, label=label if line.notna().any() else None)
    if LOCK in lines:
        axes.fill_between(lines[LOCK].index, lines[LOCK], lines[BOUND], color=SKY, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)


SHAPE = ["family", "pass", "batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v"]
SHAPE += ["causal", "window", "page_size", "cache_dtype", "dtype"]  # speeds are comparable only if these are equal


def _measured_points(axes, panel, data, speed, colour=BLACK, name=""):
    """The measurements of the problems in a panel of predictions, see `pictures`."""
    measured = data.attrs.get("measured")
    if measured is None:
        return
    for (gpu, triton), rows in measured.groupby(["gpu", "triton"]):
        shapes = set(_shapes(panel))
        points = rows[[shape in shapes for shape in _shapes(rows)]].dropna(subset=speed)
        style = {"s": 90, "color": colour, "edgecolors": BLACK, "marker": "*", "zorder": 4}
        where = f"{gpu.removeprefix('NVIDIA ')}, Triton {triton}"
        label = f"{name}measured:\n{where}" if name else f"measured: {where}"
        if len(points):
            axes.scatter(points["seqlen_k"], points[speed], **style, label=label)


def _shapes(data):
    """The problems of rows, as tuples. A cache without a dtype of its own has that of the inputs."""
    caches = data["cache_dtype"].fillna(data["dtype"])
    columns = data.assign(cache_dtype=caches)[SHAPE].astype(object)
    return columns.where(columns.notna(), None).itertuples(index=False, name=None)


def _draw_roof(axes, data, speed):
    roof = _roof(data, speed)
    if not pd.isna(roof):
        label = ROOFS[speed][data["source"].iloc[0] != MEASURED]
        axes.axhline(roof, color=BLACK, linewidth=1, linestyle="--", label=label)


def _roof(data, speed):
    """The value of the roof, from a speed and its roof_share. NaN if no row has one."""
    return (data[speed] / data["roof_share"]).median()


def _provenance(first, note=""):
    """Lines of a title: the device, and for predictions that they are predicted."""
    source = "" if first["source"] == MEASURED else first["source"]
    return f"{first['gpu']}, Triton {first['triton']}", "; ".join(filter(None, [source, note]))


def _name(first):
    return f"{NAMES.get(first['family'], first['family'])} {first['pass']}"


def _list_failures(figure, data):
    """The lines above the legend: providers without speeds, the number of shapes, and the reason."""
    failed = data[data[list(SPEEDS)].isna().all(axis=1)]
    lines = [f"{name}, {len(rows)} shapes: {note}" for (name, note), rows in failed.groupby(["provider", "note"])]
    if lines:
        (legend,) = figure.legends
        legend.set_title("\n".join(textwrap.shorten(line, 120) for line in ["Without a result:", *lines]), {"size": 8})
        legend.set_alignment("left")
