from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from speed_tables import MEASURED, failed, grid_of, row, steps_of, write

from perf import results
from perf.commands import plot as command
from perf.results import plot, speed_plots, style
from perf.workloads.problems import LatentDecodeProblem, LatentPrefillProblem
from perf.workloads.providers import DECODE_PROVIDERS, PROVIDERS

PREDICTIONS = [results.BOUND, results.LOCK]


@pytest.fixture
def draw(tmp_path):
    """The plots of rows, by the end of their file name."""
    figures = []

    def figures_of(rows):
        found = speed_plots.pictures(results.read(write(tmp_path / "speed.csv", rows)))
        with plot.plt.rc_context(style.STYLE):
            drawn = {name: picture(data) for name, (picture, data) in found.items()}
        figures.extend(drawn.values())
        return drawn

    yield figures_of
    for figure in figures:
        plot.plt.close(figure)


def text_of(figure):
    (legend,) = figure.legends
    return "\n".join([figure.get_suptitle(), *(text.get_text() for text in legend.get_texts())])


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def without_a_result(figure):
    return figure.legends[0].get_title().get_text()


def test_a_prediction_says_so_and_has_no_roof(draw):
    (figure,) = draw(grid_of(PREDICTIONS)).values()
    assert titles(figure) == ["full, head_dim 64", "full, head_dim 128", "causal, head_dim 64", "causal, head_dim 128"]
    assert results.PREDICTED in text_of(figure)
    assert "measured" not in text_of(figure).replace(results.PREDICTED, "")


def test_a_measurement_has_every_provider_and_its_roof(draw):
    rows = grid_of(PROVIDERS, **MEASURED)
    figure = draw([failed(rows[1]), rows[0], *rows[2:]])[""]
    text = text_of(figure)
    assert all(provider in text for provider in PROVIDERS)
    assert "predicted" not in text
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert dashed[0].get_ydata()[0] == pytest.approx(640.0, rel=0.1)
    assert without_a_result(figure) == f"Without a result:\n{rows[1].provider}, 1 shapes: out of memory"


def test_lengths_are_written_as_people_say_them(draw):
    (figure,) = draw(grid_of(PREDICTIONS)).values()
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["512", "1k"]


def test_providers_that_nobody_knows_have_colours_of_their_own(draw):
    strangers = ["flash_attn 4", "flashinfer", "yet another"]
    figure = draw(grid_of([results.OURS, *strangers], **MEASURED))[""]
    assert set(strangers) <= set(text_of(figure).split("\n"))
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert len({line.get_color() for line in lines}) == 4
    assert len({style.styles_of(map(str, range(42)))[str(i)][:2] for i in range(42)}) == 42


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 1024}, ["window 1024", "no window"]),
        ({"num_heads_kv": 4}, ["4 KV heads", "16 KV heads"]),
        ({"seqlen_q": 256}, ["whole prompts", "chunks of 256 queries"]),
    ],
)
def test_what_else_varies_has_a_panel_of_its_own(draw, changes, said):
    (figure,) = draw([row(tflops=300.0), row(tflops=200.0, **changes)]).values()
    assert titles(figure) == said
    assert "causal, head_dim 128" in figure.get_suptitle(), "what does not vary"


def test_of_several_configs_of_a_shape_the_best_is_drawn(draw):
    (figure,) = draw([row(provider=results.OURS, tflops=speed, note=str(speed)) for speed in (300.0, 400.0)]).values()
    (line,) = figure.axes[0].lines
    assert line.get_ydata() == [400.0]


def test_the_ratio_is_to_the_best_peer_of_each_length(draw):
    speeds = {results.OURS: (300.0, 300.0), "SDPA cuDNN": (400.0, 200.0), "FlexAttention": (100.0, 250.0)}
    rows = [
        row(provider=provider, seqlen_q=length, seqlen_k=length, tflops=speed, **MEASURED)
        for provider, both in speeds.items()
        for length, speed in zip((1024, 2048), both)
    ]
    figure = draw(rows)["_ratio"]
    ratio, *_ = figure.axes[0].lines
    assert ratio.get_ydata().tolist() == [0.75, 1.2]
    assert {"over SDPA cuDNN", "over FlexAttention", "the best peer"} <= set(text_of(figure).split("\n"))
    assert draw(rows[:2]).keys() == {""}, "no peers"
    assert draw([rows[0], failed(rows[2])]).keys() == {""}, "no peer that works"


def test_a_panel_in_which_all_failed_has_no_ratio(draw):
    rows = grid_of([results.OURS, "SDPA cuDNN"], **MEASURED)
    figure = draw([failed(each) if each.head_dim == 64 else each for each in rows])["_ratio"]
    assert len(figure.axes) == 4


@pytest.mark.parametrize("batches", [(1,), (1, 8), (1, 8, 32), (1, 8, 32, 128)])
def test_decode_has_a_panel_per_batch_and_its_roof(draw, batches):
    figure = draw(steps_of(DECODE_PROVIDERS, batches, **MEASURED))[""]
    figure.canvas.draw()
    against_batch = ["context 1k", "context 2k"]
    assert titles(figure) == ([f"batch {batch}" for batch in batches] + against_batch if len(batches) > 1 else [""])
    text = text_of(figure)
    assert all(provider in text for provider in DECODE_PROVIDERS)
    assert "copy, measured" in text
    assert "predicted" not in text
    assert "head_dim 128, 32 query heads, 8 KV heads" in text
    assert "page size 16" in text
    for axes in figure.axes:
        (roof,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert roof.get_ydata()[0] == pytest.approx(2500)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1k", "2k"]
    right = figure.axes[min(len(figure.axes) - 1, 1)]
    (share,) = right.child_axes
    assert share.get_ylim()[1] == pytest.approx(100 * right.get_ylim()[1] / 2500)
    if len(batches) > 1:
        assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == [str(batch) for batch in batches]


def test_a_predicted_decode_says_so(draw):
    (figure,) = draw(steps_of(PREDICTIONS)).values()
    text = text_of(figure)
    assert results.PREDICTED in text
    assert "launches" in text
    assert "memory, data sheet" in text
    assert "measured" not in text.replace(results.PREDICTED, "")


def test_a_decode_that_every_provider_failed_is_drawn_empty(draw):
    (figure,) = draw([failed(each) for each in steps_of(DECODE_PROVIDERS, **MEASURED)]).values()
    figure.canvas.draw()
    assert all(not axes.child_axes for axes in figure.axes)
    assert all(f"{provider}, 4 shapes" in without_a_result(figure) for provider in DECODE_PROVIDERS)


@pytest.mark.ci
def test_one_file_of_all_families_gives_all_their_pictures(tmp_path):
    def measured(problem, provider):
        return row(**problem.columns(), provider=provider, tflops=400.0, gbps=2000.0, **MEASURED)

    latent = [
        measured(LatentDecodeProblem(32, context, 128, cache), provider)
        for context in (1024, 2048)
        for cache in ("bfloat16", "float8_e4m3fn", "float16")
        for provider in (results.OURS, "FlashMLA")
    ]
    prompts = [measured(LatentPrefillProblem(queries, 4096), f"{results.OURS}, fused") for queries in (1024, 4096)]
    flash = grid_of([results.OURS, "SDPA cuDNN"], **MEASURED)
    backward = [replace(each, direction="backward") for each in flash]
    path = write(tmp_path / "bench.csv", [*flash, *backward, *steps_of([results.OURS], **MEASURED), *latent, *prompts])
    drawn = plot.draw(path)
    assert [path.name for path in drawn] == [
        "bench-flash-forward.png",
        "bench-flash-forward_ratio.png",
        "bench-flash-backward.png",
        "bench-flash-backward_ratio.png",
        "bench-paged-decode.png",
        "bench-mla-decode.png",
        "bench-mla-decode_ratio.png",
        "bench-mla-prefill.png",
    ]
    assert drawn == plot.paths_of(path)
    assert all(path.exists() for path in drawn)


@pytest.mark.parametrize(
    "path", sorted(results.ROOT.glob("*/*.csv")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_the_pictures_of_the_results_are_there(path):
    assert all(picture.exists() for picture in plot.paths_of(path))


def test_a_file_without_a_picture_is_refused(tmp_path):
    path = tmp_path / "machine.csv"
    path.write_text("what,value\ngpu,a GPU\n")
    with pytest.raises(SystemExit, match=r"machine.csv: there is no plot for a table with the columns what, value"):
        command.run(None, [path])
    with pytest.raises(SystemExit, match=r"missing.csv"):
        command.run(None, [tmp_path / "missing.csv"])


def test_pictures_lie_beside_their_file_or_where_they_are_asked_to(tmp_path):
    path = write(tmp_path / "speed.csv", grid_of(PREDICTIONS, head_dims=(64,)))
    assert command.run(None, [path]) == [tmp_path / "speed.png"]
    assert command.run(tmp_path / "elsewhere", [path]) == [tmp_path / "elsewhere" / "speed.png"]


def test_a_prediction_shows_what_was_measured_of_its_problems(tmp_path, monkeypatch):
    """Measured rows beside it, of its GPU and ours, from any config: one of four lengths here."""
    h100 = {"gpu": "NVIDIA H100 80GB HBM3"}
    predictions = grid_of(PREDICTIONS, head_dims=(64,), gpu="H100 or H200 SXM at 1.755 GHz", source=results.PREDICTED)
    path = write(tmp_path / "predicted" / "flash.csv", predictions)
    measured = grid_of([results.OURS, "SDPA cuDNN"], head_dims=(64, 128), **MEASURED | h100)
    ours = next(each for each in measured if each.provider == results.OURS)
    write(tmp_path / "h100" / "bench.csv", [ours, *(each for each in measured if each.provider != results.OURS)])
    write(tmp_path / "h100" / "sweep-flash-measured.csv", [replace(each, tflops=1.0) for each in measured])
    write(tmp_path / "b200" / "bench.csv", [replace(each, gpu="NVIDIA B200") for each in measured])
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.scatter", lambda axes, x, y, **style: drawn.append((list(x), list(y))))
    plot.draw(path)
    assert drawn == [([ours.seqlen_k], [ours.tflops])]
    drawn.clear()
    plot.draw(tmp_path / "h100" / "bench.csv")
    assert drawn == [], "a measurement is no prediction"


@pytest.mark.parametrize("letters", [5, 20, 40])
def test_a_legend_fits_its_figure(letters):
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i in range(8):
        axes.plot([0, 1], [0, i], label=f"{i}{'m' * letters}")
    style.legend_below(figure)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 8
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    plt.close(figure)
