from dataclasses import astuple, replace

import pytest
from test_results import row

from perf import plot, results
from perf.problems import DecodeProblem
from perf.providers import DECODE_PROVIDERS, PROVIDERS


def write(path, rows):
    with results.Table(path, results.COLUMNS) as table:
        for each in rows:
            table.append(astuple(each))
    return path


def grid_of(providers, **changes):
    shapes = [
        (head_dim, causal, seqlen) for head_dim in (64, 128) for causal in (False, True) for seqlen in (512, 1024)
    ]
    return [
        row(provider=provider, head_dim=head_dim, causal=causal, seqlen_k=seqlen, tflops=300.0 + 10 * i, **changes)
        for head_dim, causal, seqlen in shapes
        for i, provider in enumerate(providers)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figure instead of its file."""
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    yield figures
    for figure in figures:
        plot.plt.close(figure)


def text_of(figure):
    return figure.get_suptitle() + " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_a_prediction_says_so_and_has_no_roof(tmp_path, drawn):
    plot.throughput(write(tmp_path / "speed.csv", grid_of([plot.BOUND, plot.LOCK])))
    (figure,) = drawn
    assert len(figure.axes) == 4
    assert results.PREDICTED in text_of(figure)
    assert "measured" not in text_of(figure).replace(results.PREDICTED, "")


def test_a_measurement_has_every_provider_and_its_roof(tmp_path, drawn):
    rows = grid_of(PROVIDERS, source=results.MEASURED, roof_share=0.5)
    failed = replace(rows[0], tflops=None, roof_share=None, note="out of memory")
    plot.throughput(write(tmp_path / "speed.csv", [failed, *rows[1:]]))
    (figure,) = drawn
    text = text_of(figure)
    assert all(provider in text for provider in PROVIDERS)
    assert "predicted" not in text
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert dashed[0].get_ydata()[0] == pytest.approx(640.0, rel=0.1)


def test_lengths_are_written_as_people_say_them(tmp_path, drawn):
    plot.throughput(write(tmp_path / "speed.csv", grid_of([plot.BOUND, plot.LOCK])))
    drawn[0].canvas.draw()
    assert [label.get_text() for label in drawn[0].axes[-1].get_xticklabels()] == ["512", "1k"]


def steps_of(providers, batches=(1, 8), **changes):
    return [
        row(
            **DecodeProblem(batch, context).columns(),
            provider=provider,
            gbps=1000.0 + 100 * i,
            roof_share=(1000.0 + 100 * i) / 2500,
            **changes,
        )
        for batch in batches
        for context in (1024, 2048)
        for i, provider in enumerate(providers)
    ]


@pytest.mark.parametrize("batches", [(1,), (1, 8), (1, 8, 32), (1, 8, 32, 128)])
def test_decode_has_a_panel_per_batch_and_its_roof(tmp_path, drawn, batches):
    plot.decode(write(tmp_path / "decode.csv", steps_of(DECODE_PROVIDERS, batches, source=results.MEASURED)))
    (figure,) = drawn
    figure.canvas.draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"batch {batch}" for batch in batches]
    text = text_of(figure)
    assert all(provider in text for provider in DECODE_PROVIDERS)
    assert "copy, measured" in text
    assert "predicted" not in text
    assert "32 query and 8 KV heads, head_dim 128, page size 16" in text
    for axes in figure.axes:
        (roof,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert roof.get_ydata()[0] == pytest.approx(2500)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["1k", "2k"]
    (share,) = figure.axes[-1].child_axes
    assert share.get_ylim()[1] == pytest.approx(100 * figure.axes[-1].get_ylim()[1] / 2500)


def test_a_predicted_decode_says_so(tmp_path, drawn):
    plot.decode(write(tmp_path / "decode.csv", steps_of([plot.BOUND, plot.LOCK])))
    text = text_of(drawn[0])
    assert results.PREDICTED in text
    assert "launches" in text
    assert "memory, data sheet" in text
    assert "measured" not in text.replace(results.PREDICTED, "")


def test_a_decode_that_every_provider_failed_is_drawn_empty(tmp_path, drawn):
    rows = [replace(each, gbps=None, roof_share=None) for each in steps_of(DECODE_PROVIDERS, source=results.MEASURED)]
    plot.decode(write(tmp_path / "decode.csv", rows))
    drawn[0].canvas.draw()
    assert all(not axes.child_axes for axes in drawn[0].axes)
