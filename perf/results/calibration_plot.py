"""The plot of calibration.csv: predictions of configs against measurements."""

from matplotlib import pyplot as plt

from perf.results.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, head, legend_below

STAGES = {1: (VERMILION, "o"), 2: (ORANGE, "s"), 3: (BLUE, "^"), 4: (GREEN, "D")}
MORE_STAGES = PURPLE, "v"
PREDICTIONS = {"lock": "lock, no waits (TFLOP/s)", "expected": "expected, with waits (TFLOP/s)"}


def calibration(data):
    """Measured against predicted TFLOP/s: a column per family, `lock` in the top row, `expected` in the bottom row."""
    families = list(dict.fromkeys(data["family"]))
    size = {"figsize": (1.2 + 2.6 * len(families), 6.2)}
    figure, grid = plt.subplots(len(PREDICTIONS), len(families), squeeze=False, **size)
    for column, family in zip(grid.T, families):
        rows = data[data["family"] == family]
        end = 1.05 * rows[[*PREDICTIONS, "measured"]].max(axis=None)
        for axes, (name, label) in zip(column, PREDICTIONS.items()):
            _panel(axes, rows.dropna(subset=name), name, end)
            axes.set_xlabel(label)
        column[0].set_title(family, fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("measured (TFLOP/s)")
    legend_below(figure)
    gpu, triton = (", ".join(dict.fromkeys(data[name].dropna().astype(str))) for name in ("gpu", "triton"))
    head(figure, "Loop model and measurements", ", ".join(filter(None, [gpu, triton and f"Triton {triton}"])))
    return figure


def _panel(axes, rows, name, end):
    for stages, points in rows.groupby("stages"):
        colour, marker = STAGES.get(stages, MORE_STAGES)
        style = {"color": colour, "marker": marker, "s": 22, "alpha": 0.8, "linewidth": 0}
        axes.scatter(points[name], points["measured"], **style, label=f"{stages} stage{'s' if stages > 1 else ''}")
    axes.plot([0, end], [0, end], color=BLACK, linewidth=1, linestyle="--", label="measured = predicted")
    if len(rows):
        slope = (rows[name] * rows["measured"]).sum() / (rows[name] ** 2).sum()
        label = "least squares, measured = share × predicted"
        axes.plot([0, end], [0, slope * end], color=BLACK, linewidth=1, label=label)
        axes.text(0.05, 0.92, f"share {slope:.2f}", transform=axes.transAxes, va="top")
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
