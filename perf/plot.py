"""The pictures, drawn from the CSV files of `perf/results.py` and from nothing else."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Okabe and Ito's palette: told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
STYLE = {
    "figure.figsize": (8, 4.5),
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E0E0E0",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
}
ATTENTION_STYLES = {"MHA": (VERMILION, "s"), "GQA": (BLUE, "o"), "MQA": (GREEN, "^"), "MLA": (PURPLE, "D")}


def kv_cache(csv_path):
    """KV-cache size against context length, a line per model, a colour per kind of attention."""
    data = pd.read_csv(csv_path)
    with plt.rc_context(STYLE):
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
        _length_ticks(axes, data["context"].unique())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}"))
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("KV cache of one sequence (GiB)")
        bits = 8 * data["bytes_per_element"].iloc[0]
        axes.set_title(f"KV cache against context length, {bits} bits per element")
        return _save(figure, csv_path)


def _label_ends(axes, x, ends):
    """Name each line at its end, moving labels apart where lines end close together; `ends` is (y, text, colour)."""
    lowest = 0
    for y, text, colour in sorted(ends):
        at = max(y, lowest)
        axes.annotate(text, (x, y), (x * 1.12, at), color=colour, va="center", fontsize=9, annotation_clip=False)
        lowest = at * 1.42


def _length_ticks(axes, lengths):
    axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k"))


def _save(figure, csv_path):
    path = Path(csv_path).with_suffix(".png")
    figure.savefig(path)
    plt.close(figure)
    return path
