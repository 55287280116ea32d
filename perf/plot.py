"""The pictures, drawn from the CSV files of `perf/results.py` and from nothing else."""

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.results import MEASURED, OURS

# Okabe and Ito's palette: told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
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


BOUND, LOCK = f"{OURS}, bound", f"{OURS}, lock"
PROVIDER_STYLES = {
    OURS: (VERMILION, "o", OURS),
    "SDPA cuDNN": (BLUE, "s", "SDPA cuDNN"),
    "SDPA flash": (GREEN, "^", "SDPA flash"),
    "FlexAttention": (PURPLE, "D", "FlexAttention"),
    "naive torch": (ORANGE, "v", "naive torch"),
    BOUND: (SKY, "s", "bound: products and softmax overlap fully"),
    LOCK: (VERMILION, "o", "lock: they never overlap"),
}


def throughput(csv_path):
    """TFLOP/s against sequence length: a panel per mask and head dimension, a line per provider, the measured roof."""
    data = pd.read_csv(csv_path)
    head_dims, masks = sorted(data["head_dim"].unique()), sorted(data["causal"].unique())
    with plt.rc_context(STYLE | {"figure.figsize": (8, 1.4 + 2.1 * len(masks))}):
        figure, grid = plt.subplots(len(masks), len(head_dims), sharex=True, sharey=True, squeeze=False)
        for line, mask in zip(grid, masks):
            line[0].set_ylabel("TFLOP/s")
            for axes, head_dim in zip(line, head_dims):
                _throughput_panel(axes, data[(data["head_dim"] == head_dim) & (data["causal"] == mask)])
                axes.set_title(f"{'causal' if mask else 'full'}, head_dim {head_dim}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("sequence length")
        grid[0][0].set_ylim(bottom=0)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(_throughput_title(data), x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


def training(csv_path):
    """Loss against step: ours over torch's, which it hides where they agree, and the unigram entropy."""
    data = pd.read_csv(csv_path)
    (ours, losses), *others = sorted(data.groupby("provider"), key=lambda item: item[0] != OURS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        for name, rows in others:
            axes.plot(rows["step"], rows["loss"], color=SKY, linewidth=6, label=name)
        axes.plot(losses["step"], losses["loss"], color=VERMILION, linewidth=1.5, label=ours)
        entropy = data["unigram_entropy"].iloc[0]
        axes.axhline(entropy, color=BLACK, linewidth=1, linestyle="--", label="unigram entropy of the text")
        axes.legend()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per character)")
        axes.set_title("A small decoder learns six sonnets: our attention and torch's, from one seed")
        return _save(figure, csv_path)


def _throughput_panel(axes, data):
    lines = {provider: rows.set_index("seqlen_q")["tflops"] for provider, rows in data.groupby("provider", sort=False)}
    for provider, line in lines.items():
        colour, marker, label = PROVIDER_STYLES[provider]
        axes.plot(line.index, line, color=colour, marker=marker, label=label)
    if LOCK in lines:
        axes.fill_between(lines[LOCK].index, lines[LOCK], lines[BOUND], color=SKY, alpha=0.15, linewidth=0)
    roof = (data["tflops"] / data["roof_share"]).median()
    if not pd.isna(roof):
        axes.axhline(roof, color=BLACK, linewidth=1, linestyle="--", label="matrix product, measured")
    axes.set_xscale("log", base=2)
    _length_ticks(axes, data["seqlen_q"].unique())


def _throughput_title(data):
    first = data.iloc[0]
    note = "" if first["source"] == MEASURED else f"\n{first['source']}"
    return f"Attention {first['pass']}, {first['dtype']}, {first['gpu']}{note}"


def _label_ends(axes, x, ends):
    """Name each line at its end, a label above the last where lines end close together; `ends` is (y, text, colour)."""
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
