"""Plots of context-parallel attention: a row of panels per model, a column per number of GPUs, a line per method."""

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, PercentFormatter

from perf.results import PUBLISHED
from perf.results.style import BLACK, BLUE, GREEN, SPARE_COLOURS, VERMILION, head, legend_below, length_ticks

METHODS = {"all_gather": (BLUE, "s"), "ring": (VERMILION, "o"), "ulysses": (GREEN, "^")}
METHODS |= {"all_gather+ulysses": (SPARE_COLOURS[1], "D"), "ring+ulysses": (SPARE_COLOURS[3], "v")}
MOST_COLUMNS = 3  # of numbers of GPUs: the first, the middle and the last


def share(data):
    """Share of a GPU's speed, forward and backward, and what others have published."""
    figure, panels = _panels(
        data, "both_share", "share of a GPU's speed", "Attention, forward and backward: share of a GPU's speed"
    )
    for (model, gpus), axes in panels.items():
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        published = data[(data["source"] == PUBLISHED) & (data["model"] == model) & (data["num_gpus"] == gpus)]
        if len(published):
            style = {"color": BLACK, "marker": "*", "s": 70, "zorder": 3}
            label = "zigzag ring of ring-flash-attention on 8 H800, measured by its authors"
            axes.scatter(published["seqlen"], published["both_share"], **style, label=label)
    legend_below(figure)
    return figure


def time(data):
    """Milliseconds of a layer, forward and backward."""
    data = data.assign(seconds=data["both_ms"] / 1e3)
    figure, panels = _panels(data, "seconds", "seconds", "Attention of a layer, forward and backward: seconds")
    for axes in panels.values():
        axes.set_yscale("log")
    legend_below(figure)
    return figure


def memory(data):
    """Memory of a GPU for a layer, forward and backward."""
    what = "Attention of a layer, forward and backward: memory on a GPU, its rows and their gradients included"
    figure, panels = _panels(data, "both_memory", "memory of a GPU", what)
    for axes in panels.values():
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(_short_size))
    legend_below(figure)
    return figure


def _short_size(size, _position):
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"


def _panels(data, column, label, title):
    """(figure, {(model, number of GPUs): axes}), with the lines of a column drawn."""
    rows = data[(data["source"] != PUBLISHED) & (data["gpu"] == data["gpu"].iloc[0])]
    models, gpus = list(dict.fromkeys(rows["model"])), sorted(rows["num_gpus"].unique())
    if len(gpus) > MOST_COLUMNS:
        gpus = [gpus[0], gpus[len(gpus) // 2], gpus[-1]]
    size = {"figsize": (1.2 + 3.0 * len(gpus), 1.3 + 2.0 * len(models))}
    figure, grid = plt.subplots(len(models), len(gpus), squeeze=False, sharex=True, sharey="row", **size)
    panels = {(model, number): axes for model, line in zip(models, grid) for number, axes in zip(gpus, line)}
    for (model, number), axes in panels.items():
        of_panel = rows[(rows["model"] == model) & (rows["num_gpus"] == number)]
        for method, line in of_panel.groupby("method"):
            colour, marker = METHODS[method]
            axes.plot(line["seqlen"], line[column], color=colour, marker=marker, label=method)
        axes.set_xscale("log", base=2)
        length_ticks(axes, rows["seqlen"].unique()[1::2] if rows["seqlen"].nunique() > 4 else rows["seqlen"])
        axes.set_title(f"{model}, {number} GPUs", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("tokens of the sequence")
    first = rows.iloc[0]
    head(figure, title, f"{first['gpu']}, {first['source']}")
    return figure, panels
