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
                panel = data[(data["head_dim"] == head_dim) & (data["causal"] == mask)]
                _speed_panel(axes, panel, "tflops", "matrix product, measured")
                axes.set_title(f"{'causal' if mask else 'full'}, head_dim {head_dim}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("sequence length (tokens)")
        grid[0][0].set_ylim(bottom=0)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(_throughput_title(data), x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


def decode(csv_path):
    """GB/s of decode steps against context: a panel per batch, a line per provider, the roof and the share of it."""
    data = pd.read_csv(csv_path)
    batches = sorted(data["batch"].unique())
    measured = data["source"].iloc[0] == MEASURED
    num_columns = 1 if len(batches) % 2 else 2
    num_rows = len(batches) // num_columns
    with plt.rc_context(STYLE | {"figure.figsize": (8, 1.6 + 2.1 * num_rows)}):
        figure, grid = plt.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes, batch in zip(grid.flat, batches):
            roof_label = "copy, measured" if measured else "memory, data sheet"
            _speed_panel(axes, data[data["batch"] == batch], "gbps", roof_label)
            axes.set_title(f"batch {batch}", fontsize=10)
        _length_ticks(grid[0][0], data["seqlen_k"].unique())
        roof = _roof(data, "gbps")
        if not pd.isna(roof):
            for axes in grid[:, -1]:
                share = axes.secondary_yaxis("right", functions=(lambda y: 100 * y / roof, lambda y: y * roof / 100))
                share.set_ylabel("share of roof (%)")
        for axes in grid[:, 0]:
            axes.set_ylabel("GB/s")
        for axes in grid[-1]:
            axes.set_xlabel("context (tokens)")
        grid[0][0].set_ylim(bottom=0)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5 if measured else 3)
        figure.suptitle(_decode_title(data), x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


CACHE_STYLES = {"bfloat16": (VERMILION, "o", "bf16"), "float8_e4m3fn": (BLUE, "s", "fp8")}
FLASH_MLA_PUBLISHED = {"tflops": 660, "gbps": 3000}  # H800, bf16, at best; github.com/deepseek-ai/FlashMLA, README


def latent_decode(csv_path):
    """TFLOP/s above GB/s of MLA's decode steps against context, a column per number of heads; with what FlashMLA says
    of itself."""
    data = pd.read_csv(csv_path)
    first = data.iloc[0]
    heads = sorted(data["num_heads_q"].unique())
    measured = first["source"] == MEASURED
    with plt.rc_context(STYLE | {"figure.figsize": (8, 5.6)}):
        figure, grid = plt.subplots(2, len(heads), sharex=True, sharey="row", squeeze=False)
        for line, (speed, published), unit in zip(grid, FLASH_MLA_PUBLISHED.items(), ("TFLOP/s", "GB/s")):
            for axes, num_heads in zip(line, heads):
                for cache, panel in data[data["num_heads_q"] == num_heads].groupby("cache_dtype", sort=False):
                    (_latent_lines if measured else _latent_band)(axes, panel, speed, *CACHE_STYLES[cache])
                axes.axhline(published, color=BLACK, linewidth=1, linestyle=":", label="FlashMLA on H800, published")
                if speed == "gbps" and not pd.isna(roof := _roof(data, "gbps")):
                    label = "copy, measured" if measured else "memory, data sheet"
                    axes.axhline(roof, color=BLACK, linewidth=1, linestyle="--", label=label)
            line[0].set_ylabel(unit)
            line[0].set_ylim(bottom=0)
        for axes, num_heads in zip(grid[0], heads):
            axes.set_title(f"{num_heads} heads", fontsize=10)
        for axes in grid[1]:
            axes.set_xlabel("context (tokens)")
        grid[0][0].set_xscale("log", base=2)
        _length_ticks(grid[0][0], sorted(data["seqlen_k"].unique())[::2])
        figure.legend(*grid[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        widths = f"{first['head_dim_v']} + {first['head_dim'] - first['head_dim_v']} wide"
        title = f"MLA decode step, batch {first['batch']}, latent cache {widths}, page size {first['page_size']:.0f}"
        note = "" if measured else f"\n{first['source']}; launches, latencies and DRAM efficiency left out"
        figure.suptitle(f"{title}\n{first['gpu']}, Triton {first['triton']}{note}", x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


def _latent_lines(axes, data, speed, colour, marker, cache):
    for provider, rows in data.dropna(subset=speed).groupby("provider", sort=False):
        colour_here = colour if provider == OURS else GREEN
        axes.plot(rows["seqlen_k"], rows[speed], color=colour_here, marker=marker, label=f"{provider}, {cache} cache")


def _latent_band(axes, data, speed, colour, marker, cache):
    bound, lock = (data[data["provider"] == provider].set_index("seqlen_k")[speed] for provider in (BOUND, LOCK))
    axes.plot(lock, color=colour, marker=marker, label=f"{cache} cache, lock: no overlap")
    axes.fill_between(lock.index, lock, bound, color=colour, alpha=0.2, linewidth=0, label="to bound: full overlap")


SCHEDULE_STYLES = {"fused": (VERMILION, "o"), "absorbed": (GREEN, "^"), "materialized": (BLUE, "s")}


def latent_prefill(csv_path):
    """Schedules of MLA's prefill against context: time, time over the least of them, workspace; a column per kind of
    call."""
    data = pd.read_csv(csv_path)
    first = data.iloc[0]
    ours = data[data["schedule"].notna()]
    data["relative"] = data["ms"] / data[["seqlen_q", "seqlen_k"]].apply(tuple, axis=1).map(
        ours.groupby(["seqlen_q", "seqlen_k"])["ms"].min()
    )
    whole = data["seqlen_q"] == data["seqlen_k"]
    panels = {"whole prompts": data[whole]}
    for queries, rows in data[~whole].groupby("seqlen_q", sort=False):
        panels[f"chunks of {queries} queries"] = rows
    with plt.rc_context(STYLE | {"figure.figsize": (8, 7.5)}):
        figure, grid = plt.subplots(3, len(panels), sharex="col", sharey="row", squeeze=False)
        for column, (title, panel) in zip(grid.T, panels.items()):
            _schedule_panels(column, panel)
            column[0].set_title(title, fontsize=10)
            column[-1].set_xlabel("context (tokens)")
        time, relative, workspace = grid[:, 0]
        time.plot([], [], color=BLACK, linestyle=":", label="all heads at once")
        time.set_yscale("log")
        time.set_ylabel("ms")
        time.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        relative.set_yscale("log", base=2)
        relative.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        relative.set_ylabel("time / least of ours")
        workspace.set_yscale("symlog", base=2, linthresh=1)
        workspace.yaxis.set_major_locator(FixedLocator([0, *(4**i for i in range(8))]))
        workspace.yaxis.set_minor_locator(NullLocator())
        workspace.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y < 1024 else f"{y / 1024:g}k"))
        workspace.set_ylim(bottom=-0.5)
        workspace.set_ylabel("workspace (MiB)")
        figure.align_ylabels()
        measured = first["source"] == MEASURED
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3 if measured else 5)
        title = f"MLA prefill, causal, {first['dtype']}, {first['num_heads_q']} heads of {first['head_dim']}, "
        title += f"values of {first['head_dim_v']}\n{first['gpu']}, Triton {first['triton']}"
        note = "" if measured else f", {first['note']}\n{first['source']}"
        figure.suptitle(f"{title}{note}", x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


def _schedule_panels(column, data):
    """Time, relative time and workspace of one kind of call."""
    time, relative, workspace = column
    for provider, rows in data.groupby("provider", sort=False):
        rows = rows.set_index("seqlen_k")
        schedule = rows["schedule"].iloc[0]
        colour, marker = SCHEDULE_STYLES.get(schedule, (PURPLE, "D"))
        style = {"color": colour, "marker": marker}
        time.plot(rows["ms"], **style, label=provider.removeprefix(f"{OURS}, "))
        relative.plot(rows["relative"], **style)
        if schedule in SCHEDULE_STYLES:
            workspace.plot(rows["workspace_bytes"] / 2**20, **style)
            workspace.plot(rows["all_heads_bytes"] / 2**20, color=colour, linestyle=":")
    chosen = data[data["is_auto"]]
    ring = {"s": 90, "color": "none", "edgecolors": BLACK, "zorder": 3}
    time.scatter(chosen["seqlen_k"], chosen["ms"], **ring, label="chosen by auto")
    relative.scatter(chosen["seqlen_k"], chosen["relative"], **ring)
    time.set_xscale("log", base=2)
    _length_ticks(time, sorted(data["seqlen_k"].unique())[::-2])


def training(csv_path):
    """Loss against step, ours on top of torch's; below, how far they are apart where they differ."""
    data = pd.read_csv(csv_path)
    losses = {name: rows.set_index("step")["loss"] for name, rows in data.groupby("provider")}
    ours = losses.pop(OURS)
    ((name, theirs),) = losses.items()
    first = data.iloc[0]
    with plt.rc_context(STYLE | {"figure.figsize": (8, 5)}):
        figure, (above, below) = plt.subplots(2, sharex=True, height_ratios=(3, 1))
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
        figure.suptitle(f"{title}\n{first['device']}, fp32", x=0.01, ha="left", fontsize=11)
        return _save(figure, csv_path)


OPERATION_STYLES = {
    "allocate": (VERMILION, "o"),
    "share": (BLUE, "s"),
    "release": (GREEN, "^"),
    "create, all cached": (PURPLE, "D"),
}


def bookkeeping(pool_csv, step_csv):
    """Cost per page against the size of the pool, and of a decode step against the batch; bands are p20 to p80."""
    pool, steps = pd.read_csv(pool_csv), pd.read_csv(step_csv)
    with plt.rc_context(STYLE | {"figure.figsize": (9, 4)}):
        figure, (left, right) = plt.subplots(1, 2)
        for operation, rows in pool.groupby("operation"):
            colour, marker = OPERATION_STYLES[operation]
            left.fill_between(rows["num_pages"], rows["p20_ns"], rows["p80_ns"], color=colour, alpha=0.2, linewidth=0)
            left.plot(rows["num_pages"], rows["p50_ns"], color=colour, marker=marker, label=operation)
        left.set_xscale("log")
        left.set_ylim(0, 1.5 * pool["p80_ns"].max())
        left.set_xlabel("pages in the pool")
        left.set_ylabel("ns per page")
        left.set_title(f"Operations on {pool['pages_per_call'].iloc[0]} pages")
        left.legend(ncols=2, loc="upper left")
        right.fill_between(
            steps["sequences"], steps["p20_ms"], steps["p80_ms"], color=VERMILION, alpha=0.2, linewidth=0
        )
        right.plot(steps["sequences"], steps["p50_ms"], color=VERMILION, marker="o")
        right.axhline(1, color=BLACK, linewidth=1, linestyle="--")
        right.set_xscale("log", base=2)
        right.set_ylim(bottom=0)
        _length_ticks(right, steps["sequences"])
        right.set_xlabel("sequences")
        right.set_ylabel("ms per decode step")
        right.set_title(f"A decode step at {steps['context'].iloc[0]} tokens")
        figure.suptitle(f"Page bookkeeping, CPU time on {pool['cpu'].iloc[0]}", x=0.01, ha="left", fontsize=11)
        return _save(figure, pool_csv)


WORKLOAD_STYLES = {
    "Alpaca-like": (BLUE, "s"),
    "ShareGPT-like": (VERMILION, "o"),
    "translation-like": (GREEN, "^"),
}


def sharing(csv_path):
    """Pages saved against samples or beams; hollow marks are the paper's figures of the workload of their colour."""
    data = pd.read_csv(csv_path)
    with plt.rc_context(STYLE | {"figure.figsize": (8, 4)}):
        figure, panels = plt.subplots(1, 2, sharey=True)
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
        return _save(figure, csv_path)


def bytes_held(csv_path):
    """GiB held against running requests, a panel per workload."""
    data = pd.read_csv(csv_path)
    lines = {
        "reserved_2048_gib": ("2048 tokens reserved", BLACK, "v"),
        "reserved_pow2_gib": ("power of two reserved", ORANGE, "s"),
        "pages_gib": ("pages", BLUE, "^"),
        "shared_pages_gib": ("pages, system prompt shared", VERMILION, "o"),
    }
    with plt.rc_context(STYLE | {"figure.figsize": (9, 4)}):
        figure, panels = plt.subplots(1, 2, sharey=True)
        for axes, (workload, rows) in zip(panels, data.groupby("workload")):
            for column, (label, colour, marker) in lines.items():
                axes.plot(rows["requests"], rows[column], color=colour, marker=marker, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            _length_ticks(axes, rows["requests"])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}"))
            axes.set_xlabel("running requests")
            axes.set_title(f"{workload}, system prompt of {rows['system_prompt'].iloc[0]} tokens")
        panels[0].set_ylabel("KV cache of OPT-13B held (GiB)")
        panels[0].legend()
        return _save(figure, csv_path)


def page_waste(csv_path):
    """Slots of held pages without a token against the page size."""
    data = pd.read_csv(csv_path)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        for workload, rows in data.groupby("workload"):
            colour, marker = WORKLOAD_STYLES[workload]
            axes.plot(rows["page_size"], rows["waste_percent"], color=colour, marker=marker, label=workload)
        axes.axhline(4, color=BLACK, linewidth=1, linestyle="--", label="4 %, the paper's bound")
        axes.set_xscale("log", base=2)
        _length_ticks(axes, data["page_size"].unique())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("page size (tokens)")
        axes.set_ylabel("slots without a token (%)")
        axes.set_title("Internal waste of pages, one sequence per request")
        axes.legend()
        return _save(figure, csv_path)


def _speed_panel(axes, data, figure, roof_label):
    """A column of a results CSV against the number of keys, and its roof where there is one."""
    lines = {provider: rows.set_index("seqlen_k")[figure] for provider, rows in data.groupby("provider", sort=False)}
    for provider, line in lines.items():
        colour, marker, label = PROVIDER_STYLES[provider]
        axes.plot(line.index, line, color=colour, marker=marker, label=label)
    if LOCK in lines:
        axes.fill_between(lines[LOCK].index, lines[LOCK], lines[BOUND], color=SKY, alpha=0.15, linewidth=0)
    roof = _roof(data, figure)
    if not pd.isna(roof):
        axes.axhline(roof, color=BLACK, linewidth=1, linestyle="--", label=roof_label)
    axes.set_xscale("log", base=2)
    _length_ticks(axes, data["seqlen_k"].unique())


def _roof(data, figure):
    """What roof_share is the share of; NaN where nothing has one."""
    return (data[figure] / data["roof_share"]).median()


def _throughput_title(data):
    first = data.iloc[0]
    note = "" if first["source"] == MEASURED else f"\n{first['source']}"
    return f"Attention {first['pass']}, {first['dtype']}, {first['gpu']}{note}"


def _decode_title(data):
    first = data.iloc[0]
    heads = f"{first['num_heads_q']} query and {first['num_heads_kv']} KV heads, head_dim {first['head_dim']}"
    predicted = f"{first['source']}; launches, latencies and DRAM efficiency left out"
    note = "peers over a contiguous cache" if first["source"] == MEASURED else predicted
    return f"Decode step, {first['dtype']}, {heads}, page size {first['page_size']}\n{first['gpu']}\n{note}"


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
