"""Style of all plots: colours, line styles, ticks."""

from itertools import count

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.results import BOUND, LOCK, OURS

# Okabe and Ito's palette, which is safe for colour-blind readers.
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
PROVIDER_STYLES = {  # colour, marker, label
    OURS: (VERMILION, "o", OURS),
    f"{OURS}, fused": (VERMILION, "o", "fused"),
    f"{OURS}, absorbed": (GREEN, "^", "absorbed"),
    f"{OURS}, materialized": (BLUE, "s", "materialized"),
    f"{OURS}, bf16 cache": (VERMILION, "o", f"{OURS}, bf16 cache"),
    f"{OURS}, fp8 cache": (BLUE, "s", f"{OURS}, fp8 cache"),
    "SDPA cuDNN": (BLUE, "s", "SDPA cuDNN"),
    "SDPA flash": (GREEN, "^", "SDPA flash"),
    "FlexAttention": (PURPLE, "D", "FlexAttention"),
    "Triton tutorial": (SKY, "h", "Triton tutorial"),
    "naive torch": (ORANGE, "v", "naive torch"),
    BOUND: (SKY, "s", "bound: matmuls and softmax overlap fully"),
    LOCK: (VERMILION, "o", "lock: they never overlap"),
}
# For providers without their own style. Tol's muted palette; seven and six have no common factor.
SPARE_COLOURS = ("#332288", "#88CCEE", "#882255", "#999933", "#44AA99", "#661100", "#AA4499")
SPARE_MARKERS = ("P", "X", "<", ">", "p", "*")


def styles_of(providers):
    """{provider: (colour, marker, label)}, all different for up to 42 unknown providers."""
    spare = count()

    def style(provider):
        i = next(spare)
        return SPARE_COLOURS[i % len(SPARE_COLOURS)], SPARE_MARKERS[i % len(SPARE_MARKERS)], provider

    return {name: PROVIDER_STYLES.get(name) or style(name) for name in providers}


def length_ticks(axes, lengths):
    """Ticks for at most seven lengths; for more, every second, and so on. 1024 is written 1k."""
    lengths = sorted(set(lengths))
    axes.xaxis.set_major_locator(FixedLocator(lengths[:: -(-len(lengths) // 7)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(short_length))


def short_length(length, _position=None):
    return f"{length:g}" if length < 1024 else f"{length / 1024:.4g}k"


def plain_ticks(axis):
    """Plain numbers on a logarithmic axis, and fractions below one."""
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}"))


def head(figure, *lines):
    figure.suptitle("\n".join(filter(None, lines)), x=0.01, ha="left", fontsize=11)


def legend_below(figure):
    """One legend for all panels, each label once, in as many columns as fit."""
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    for ncols in range(5, 0, -1):
        legend = figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=ncols, columnspacing=1.2
        )
        if ncols == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            break
        legend.remove()
