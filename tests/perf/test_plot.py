from dataclasses import astuple, replace

import pytest
from test_results import row

from perf import plot, results
from perf.providers import PROVIDERS


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
        row(provider=provider, head_dim=head_dim, causal=causal, seqlen_q=seqlen, tflops=300.0 + 10 * i, **changes)
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
