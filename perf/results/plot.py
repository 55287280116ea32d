"""Plots of results, drawn from their CSV files alone.

The columns of a file decide what is plotted. A table of speeds gives a plot for each family and pass in it and, if it
has peers, one of our speed over the best peer's. Plots are saved beside their file, under its name.
"""

import contextlib
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

from perf import results
from perf.results import OURS, parallel_plots, speed_plots
from perf.results.calibration_plot import calibration
from perf.results.style import (
    BLACK,
    BLUE,
    GREEN,
    PURPLE,
    STYLE,
    VERMILION,
    head,
    length_ticks,
    plain_ticks,
)


def draw(csv_path, out_dir=None):
    """Paths of the plots of a CSV. ValueError if it is an invalid table of speeds or has no kind of plot."""
    if not results.has_rows(csv_path):
        raise ValueError(f"{csv_path}: expected a table with rows, got none")
    found = pictures(csv_path)
    if not found:
        raise ValueError(
            f"{csv_path}: there is no plot for a table with the columns {', '.join(pd.read_csv(csv_path).columns)}"
        )
    paths = [_path_of(csv_path, name, out_dir) for name in found]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for path, (picture, data) in zip(paths, found.values()):
            figure = picture(data)
            figure.savefig(path)
            plt.close(figure)
    return paths


def paths_of(csv_path):
    """The paths to which `draw` writes the plots of a CSV. Empty if it has no rows or no kind of plot."""
    return [_path_of(csv_path, name) for name in pictures(csv_path)]


def _path_of(csv_path, name, out_dir=None):
    csv_path = Path(csv_path)
    return (out_dir or csv_path.parent) / f"{csv_path.stem}{name}.png"


def pictures(csv_path):
    """{end of the file name: (function that draws, its data)}."""
    if not results.has_rows(csv_path):
        return {}
    if results.holds_speeds(csv_path):
        return speed_plots.pictures(results.read(csv_path), _measured_beside(csv_path))
    data = results.read_any(csv_path)
    found = next((found for column, found in PICTURES.items() if column in data), {})
    return {name: (picture, data) for name, picture in found.items()}


def _measured_beside(csv_path):
    """Our measured rows in the folders beside a table's, without configs that a sweep tried. None if there are none."""
    tables = []
    for path in sorted(Path(csv_path).resolve().parent.parent.glob("*/*.csv")):
        if results.holds_speeds(path) and not path.stem.startswith("sweep"):
            with contextlib.suppress(ValueError):  # an invalid file is left out of this plot
                tables.append(results.read(path))
    ours = [t[(t["source"] == results.MEASURED) & (t["provider"] == OURS)] for t in tables]
    return pd.concat(ours) if any(map(len, ours)) else None


ATTENTION_STYLES = {"MHA": (VERMILION, "s"), "GQA": (BLUE, "o"), "MQA": (GREEN, "^"), "MLA": (PURPLE, "D")}


def kv_cache(data):
    """KV-cache size against context length: a line per model, a colour per kind of attention."""
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
    """Label each line at its end, and stack labels whose lines end close together. `ends` is (y, text, colour)."""
    lowest = 0
    for y, text, colour in sorted(ends):
        at = max(y, lowest)
        axes.annotate(text, (x, y), (x * 1.12, at), color=colour, va="center", fontsize=9, annotation_clip=False)
        lowest = at * 1.42


OPERATION_STYLES = {
    "allocate": (VERMILION, "o"),
    "share": (BLUE, "s"),
    "release": (GREEN, "^"),
    "create, all cached": (PURPLE, "D"),
}


def pool_operations(data):
    """Cost per page against pool size. Bands are p20 to p80."""
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
    """Bookkeeping cost of a decode step against batch size. The band is p20 to p80."""
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


PICTURES = {  # {end of the file name: function}, keyed by a column that only this kind of table has
    "bytes_per_element": {"": kv_cache},
    "operation": {"": pool_operations},
    "sequences": {"": decode_step},
    "measured/lock": {"": calibration},
    "both_share": {"": parallel_plots.share, "_time": parallel_plots.time, "_memory": parallel_plots.memory},
}
