"""Pictures of results, drawn from their CSV files and from nothing else.

The columns of a file say what it shows. A table of speeds gives a picture for each family and pass in it, and, where
peers are in it, one of our speed over that of the best of them. Pictures lie beside their file and are called like it.
"""

import contextlib
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator

from perf import results
from perf.results import OURS, speed_plots
from perf.results.calibration_plot import calibration
from perf.results.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    head,
    length_ticks,
    plain_ticks,
)


def draw(csv_path, out_dir=None):
    """Paths of the pictures of a CSV; ValueError if it is a broken table of speeds or of a kind that has no picture."""
    found = pictures(csv_path)
    if not found:
        raise ValueError(f"{csv_path}: no picture is known for a table of {', '.join(pd.read_csv(csv_path).columns)}")
    paths = [_path_of(csv_path, name, out_dir) for name in found]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for path, (picture, data) in zip(paths, found.values()):
            figure = picture(data)
            figure.savefig(path)
            plt.close(figure)
    return paths


def paths_of(csv_path):
    """Where `draw` leaves the pictures of a CSV, drawn or not; none of a kind that has no picture."""
    return [_path_of(csv_path, name) for name in pictures(csv_path)]


def _path_of(csv_path, name, out_dir=None):
    csv_path = Path(csv_path)
    return (out_dir or csv_path.parent) / f"{csv_path.stem}{name}.png"


def pictures(csv_path):
    """{end of the file's name: (function that draws, its data)}."""
    if results.holds_speeds(csv_path):
        return speed_plots.pictures(results.read(csv_path), _measured_beside(csv_path))
    data = pd.read_csv(csv_path)
    picture = next((picture for column, picture in PICTURES.items() if column in data), None)
    return {"": (picture, data)} if picture else {}


def _measured_beside(csv_path):
    """Our measured rows in the folders beside that of a table, configs that a sweep tried left out; None if none."""
    tables = []
    for path in sorted(Path(csv_path).resolve().parent.parent.glob("*/*.csv")):
        if results.holds_speeds(path) and not path.stem.startswith("sweep"):
            with contextlib.suppress(ValueError):  # a file that breaks the contract is no part of this picture
                tables.append(results.read(path))
    ours = [t[(t["source"] == results.MEASURED) & (t["provider"] == OURS)] for t in tables]
    return pd.concat(ours) if any(map(len, ours)) else None


ATTENTION_STYLES = {"MHA": (VERMILION, "s"), "GQA": (BLUE, "o"), "MQA": (GREEN, "^"), "MLA": (PURPLE, "D")}


def kv_cache(data):
    """KV-cache size against context length, a line per model, a colour per kind of attention."""
    figure, axes = plt.subplots()
    ends = []
    for name, rows in data.groupby("model", sort=False):
        colour, marker = ATTENTION_STYLES[rows["attention"].iloc[0]]
        gib = rows["bytes"] / 2**30
        axes.plot(rows["context"], gib, color=colour, marker=marker)
        ends.append((gib.iloc[-1], name, colour))
    _label_ends(axes, data["context"].max(), ends)
    for kind, (colour, marker) in ATTENTION_STYLES.items():
        axes.plot([], [], color=colour, marker=marker, label=kind)
    axes.legend(loc="upper left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    length_ticks(axes, data["context"].unique())
    plain_ticks(axes.yaxis)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("KV cache of one sequence (GiB)")
    bits = 8 * data["bytes_per_element"].iloc[0]
    axes.set_title(f"KV cache against context length, {bits} bits per element")
    return figure


def _label_ends(axes, x, ends):
    """Name each line at its end, a label above the last where lines end close together; `ends` is (y, text, colour)."""
    lowest = 0
    for y, text, colour in sorted(ends):
        at = max(y, lowest)
        axes.annotate(text, (x, y), (x * 1.12, at), color=colour, va="center", fontsize=9, annotation_clip=False)
        lowest = at * 1.42


def training(data):
    """Loss against step, ours on top of torch's; below, how far they are apart where they differ."""
    losses = {name: rows.set_index("step")["loss"] for name, rows in data.groupby("provider")}
    ours = losses.pop(OURS)
    ((name, theirs),) = losses.items()
    first = data.iloc[0]
    figure, (above, below) = plt.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(8, 5))
    above.plot(theirs, color=SKY, linewidth=6, label=name)
    above.plot(ours, color=VERMILION, linewidth=1.5, label=OURS)
    above.axhline(first["unigram_entropy"], color=BLACK, linewidth=1, linestyle="--", label="unigram entropy")
    above.legend()
    above.set_ylabel("loss (nats per character)")
    below.plot((ours - theirs).abs(), color=PURPLE, marker=".", linestyle="")
    below.axhline(first["bound"], color=BLACK, linewidth=1, linestyle="--", label="bound")
    below.legend()
    below.set_yscale("log")
    below.set_ylabel("difference (nats)")
    below.set_xlabel("step")
    figure.align_ylabels()
    title = "A small decoder learns six sonnets, with our attention and with torch's, from one seed"
    head(figure, title, f"{first['device']}, fp32")
    return figure


OPERATION_STYLES = {
    "allocate": (VERMILION, "o"),
    "share": (BLUE, "s"),
    "release": (GREEN, "^"),
    "create, all cached": (PURPLE, "D"),
}


def pool_operations(data):
    """Cost per page against the size of the pool; bands are p20 to p80."""
    figure, axes = plt.subplots()
    for operation, rows in data.groupby("operation"):
        colour, marker = OPERATION_STYLES[operation]
        axes.fill_between(rows["num_pages"], rows["p20_ns"], rows["p80_ns"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(rows["num_pages"], rows["p50_ns"], color=colour, marker=marker, label=operation)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.5 * data["p80_ns"].max())
    axes.set_xlabel("pages in the pool")
    axes.set_ylabel("ns per page")
    axes.legend(ncols=2, loc="upper left")
    head(figure, f"Page bookkeeping, operations on {data['pages_per_call'].iloc[0]} pages", data["cpu"].iloc[0])
    return figure


def decode_step(data):
    """Cost of the bookkeeping of a decode step against the batch; the band is p20 to p80."""
    figure, axes = plt.subplots()
    band = {"color": VERMILION, "alpha": 0.2, "linewidth": 0}
    axes.fill_between(data["sequences"], data["p20_ms"], data["p80_ms"], **band)
    axes.plot(data["sequences"], data["p50_ms"], color=VERMILION, marker="o")
    axes.axhline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    length_ticks(axes, data["sequences"])
    axes.set_xlabel("sequences")
    axes.set_ylabel("ms per decode step")
    head(figure, f"Page bookkeeping, a decode step at {data['context'].iloc[0]} tokens", data["cpu"].iloc[0])
    return figure


WORKLOAD_STYLES = {
    "Alpaca-like": (BLUE, "s"),
    "ShareGPT-like": (VERMILION, "o"),
    "translation-like": (GREEN, "^"),
}


def sharing(data):
    """Pages saved against samples or beams; hollow marks are the paper's figures of the workload of their colour."""
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(8, 4))
    for axes, (method, panel) in zip(panels, sorted(data.groupby("method"), reverse=True)):
        for workload, rows in panel.groupby("workload"):
            colour, marker = WORKLOAD_STYLES[workload]
            axes.plot(rows["width"], rows["saving_percent"], color=colour, marker=marker, label=workload)
            hollow = {"s": 50, "marker": marker, "color": "none", "edgecolors": colour, "zorder": 3}
            axes.scatter(rows["width"], rows["paper_percent"], **hollow)
        axes.scatter([], [], s=50, color="none", edgecolors=BLACK, label="the paper's")
        axes.xaxis.set_major_locator(FixedLocator(sorted(panel["width"].unique())))
        axes.set_title(method)
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel("pages saved by sharing (%)")
    panels[0].set_xlabel("samples per request")
    panels[1].set_xlabel("beams per request")
    panels[0].legend()
    return figure


def bytes_held(data):
    """GiB held against running requests, a panel per workload."""
    lines = {
        "reserved_2048_gib": ("2048 tokens reserved", BLACK, "v"),
        "reserved_pow2_gib": ("power of two reserved", ORANGE, "s"),
        "pages_gib": ("pages", BLUE, "^"),
        "shared_pages_gib": ("pages, system prompt shared", VERMILION, "o"),
    }
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(9, 4))
    for axes, (workload, rows) in zip(panels, data.groupby("workload")):
        for column, (label, colour, marker) in lines.items():
            axes.plot(rows["requests"], rows[column], color=colour, marker=marker, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        length_ticks(axes, rows["requests"])
        plain_ticks(axes.yaxis)
        axes.set_xlabel("running requests")
        axes.set_title(f"{workload}, system prompt of {rows['system_prompt'].iloc[0]} tokens")
    panels[0].set_ylabel("KV cache of OPT-13B held (GiB)")
    panels[0].legend()
    return figure


def page_waste(data):
    """Slots of held pages without a token against the page size."""
    figure, axes = plt.subplots()
    for workload, rows in data.groupby("workload"):
        colour, marker = WORKLOAD_STYLES[workload]
        axes.plot(rows["page_size"], rows["waste_percent"], color=colour, marker=marker, label=workload)
    axes.axhline(4, color=BLACK, linewidth=1, linestyle="--", label="4 %, the paper's bound")
    axes.set_xscale("log", base=2)
    length_ticks(axes, data["page_size"].unique())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("page size (tokens)")
    axes.set_ylabel("slots without a token (%)")
    axes.set_title("Internal waste of pages, one sequence per request")
    axes.legend()
    return figure


PICTURES = {  # by a column that no other kind of table has
    "bytes_per_element": kv_cache,
    "unigram_entropy": training,
    "operation": pool_operations,
    "sequences": decode_step,
    "paper_percent": sharing,
    "shared_pages_gib": bytes_held,
    "waste_percent": page_waste,
    "measured/lock": calibration,
}
