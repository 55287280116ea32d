import csv
import json
import os
import shutil
from dataclasses import replace

import pytest
from speed_tables import MEASURED, failed, grid_of, steps_of, write

from perf import results
from perf.commands import report as command
from perf.results import plot, report

SHAPES = {"seqlen_q": 4096, "seqlen_k": 4096}


def measured(speeds, **columns):
    """Measured forward at 4k with head_dim 128, causal: {provider: TFLOP/s}."""
    template = grid_of([results.OURS], head_dims=(128,), **MEASURED)[-1]
    return [replace(template, provider=name, tflops=speed, **SHAPES | columns) for name, speed in speeds.items()]


@pytest.fixture
def section(tmp_path):
    """The report on results under tmp_path, without tuned tables."""
    return lambda: report.section(tmp_path, tmp_path, tmp_path / "tuned")


@pytest.fixture
def predicted(tmp_path):
    folder = tmp_path / "predicted-sm_90"
    shutil.copytree(results.ROOT / folder.name, folder)
    return folder


def test_the_page_is_what_the_results_say():
    text = report.PAGE.read_text()
    assert report.replace_section(text, report.section(results.ROOT)) == text, "python -m perf report writes it anew"


def test_the_readmes_status_is_what_the_results_say():
    text = report.README.read_text()
    assert report.replace_status(text, report.status(results.ROOT)) == text, "python -m perf report writes it anew"


def test_a_changed_result_changes_the_status(tmp_path):
    assert "no GPU has run it yet" in report.status(tmp_path)
    h100 = next(results.ROOT.glob("*/smoke.csv")).parent
    shutil.copytree(h100, tmp_path / h100.name)
    assert report.status(tmp_path) == report.status(results.ROOT)
    checks = tmp_path / h100.name / "smoke.csv"
    checks.write_text(checks.read_text().replace(",passed,", ",failed,", 1))
    assert "103 of 104 smoke checks and 75 of 75 tests passed, 234 tests not reached" in report.status(tmp_path)


def test_a_changed_result_changes_it(predicted, section):
    before = section()
    path = predicted / "flash_forward.csv"
    rows = list(csv.DictReader(path.open()))
    chosen = [row for row in rows if (row["head_dim"], row["seqlen_k"], row["causal"]) == ("128", "4096", "True")]
    for row in chosen:
        row["tflops"] = "123.4"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert "| 123 " not in before
    assert "| 123 " in section(), "lock and bound are the same now"


@pytest.mark.ci
def test_what_was_measured_comes_before_what_was_predicted(predicted, section, tmp_path):
    assert "No GPU has measured" in section()
    rows = measured({results.OURS: 512.0, "SDPA cuDNN": 480.0})
    bench = write(tmp_path / "a-gpu" / "bench.csv", rows)
    plot.draw(bench)
    text = section()
    assert "Measured on synthetic." in text
    assert "No GPU has measured" not in text
    assert "512 (50 % of the roof)" in text
    assert text.index("forward, measured, synthetic") < text.index("forward, predicted")
    assert "*measured: synthetic, torch 2.13.0, triton 3.9.0, commit 0123456*" in text
    assert "![forward, measured on synthetic](a-gpu/bench.png)" in text
    assert "[forward over the best peer, measured on synthetic](a-gpu/bench_ratio.png)" in text


def test_a_target_has_its_value_and_verdict(section, tmp_path):
    speeds = {results.OURS: 600.0, "SDPA cuDNN": 500.0, "FlexAttention": 500.0}
    rows = [
        row
        for length in (4096, 8192, 16384)
        for row in measured(speeds, gpu="synthetic H100", seqlen_q=length, seqlen_k=length)
    ]
    write(tmp_path / "h100" / "bench.csv", rows)
    lines = [line for line in section().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[:7]]
    assert cells[0] == ["at least", "synthetic H100"]
    assert cells[2] == ["1.00", "1.200, met"]
    assert cells[3] == ["1.30", "1.200, missed"]
    assert cells[4] == ["0.85", "not measured yet"]


def test_candidates_of_a_sweep_and_failures_are_no_headlines(section, tmp_path):
    write(tmp_path / "a-gpu" / "sweep-flash-bfloat16-measured.csv", measured({results.OURS: 777.0}))
    write(tmp_path / "a-gpu" / "bench.csv", [failed(row) for row in measured({results.OURS: 512.0})])
    assert "777" not in section()
    assert "failed" in section()


def test_decode_is_told_by_batch_and_context(section, tmp_path):
    write(tmp_path / "a-gpu" / "bench.csv", steps_of([results.OURS], **MEASURED))
    text = section()
    assert "batch 1, 1k" in text
    assert "1000 (40 % of the roof)" in text


def test_nothing_is_said_of_what_is_not_there(section):
    text = section()
    assert "not measured yet" in text
    assert text.count("## ") == 1, "the targets"


def test_a_header_alone_is_not_there(section, tmp_path):
    """As an interrupted run leaves it."""
    said = section(), report.status(tmp_path)
    paths = [*results.ROOT.glob("*/*.csv")]
    for path in paths:
        header_alone = tmp_path / path.relative_to(results.ROOT)
        header_alone.parent.mkdir(exist_ok=True)
        header_alone.write_text(path.read_text().splitlines()[0] + "\n")
        with pytest.raises(ValueError, match="expected a table with rows, got none"):
            plot.draw(header_alone)
    assert paths
    assert (section(), report.status(tmp_path)) == said
    assert report.draw(tmp_path, redraw=True) == []


def test_cold_starts_and_tuned_configs_are_told(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "cold_import.csv").write_text('imports,seconds\ntorch,2.04\n"torch, triton_attn",2.16\n')
    (tmp_path / "host" / "cold_calls.csv").write_text(
        "function,arch,launched,empty_cache_s,warm_cache_s,later_call_us,cpu,torch,source\n"
        "merge_attention,sm_90,no,1.25,0.51,31.4,a CPU,2.13.0,measured\n"
        '"flash_attention, both passes",sm_90,no,9.91,3.14,6700.0,a CPU,2.13.0,measured\n'
    )
    entry = {"family": "flash", "source": results.MEASURED, "device": "a GPU", "triton": "3.9.0"}
    (tmp_path / "sm_90.json").write_text(json.dumps({"entries": [entry, entry | {"family": "mla"}, entry]}))
    text = report.section(tmp_path, tmp_path, tmp_path)
    said = " ".join(text.split())
    for part in ("compiled for sm_90 and not launched", "2.2 s, of which torch takes 2.0 s", "1.2 to 9.9 s"):
        assert part in said
    for part in ("0.5 to 3.1 s", "forward calls take 31 to 31 us", "*measured: a CPU, torch 2.13.0*"):
        assert part in said
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| sm_90")
    ]
    assert [row[:3] for row in rows] == [["sm_90", "flash", "2"], ["sm_90", "mla", "1"]]


@pytest.fixture
def files(tmp_path):
    """(page, readme) in their present state."""
    page, readme = tmp_path / "performance.md", tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    readme.write_text(f"# name\nWhat it is.\n{report.STATUS}old\n\nMore.\n")
    return page, readme


def test_a_run_draws_what_is_missing_or_old_and_writes_both_files(tmp_path, files):
    page, readme = files
    path = write(tmp_path / "a-gpu" / "bench.csv", grid_of([results.BOUND, results.LOCK], head_dims=(64,)))
    picture = path.with_suffix(".png")
    assert command.run(tmp_path, *files) == [picture, *files]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert readme.read_text() == f"# name\nWhat it is.\n{report.status(tmp_path)}\n\nMore.\n"
    assert command.run(tmp_path, *files) == [*files], "nothing is drawn twice"
    assert page.read_text() == text
    os.utime(picture, (0, 0))
    assert command.run(tmp_path, *files) == [picture, *files]
    assert command.run(tmp_path, *files, redraw=True) == [picture, *files]


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)])
def test_a_page_without_a_place_for_it_is_left_alone(tmp_path, files, text):
    page, readme = files
    page.write_text(text)
    said = readme.read_text()
    with pytest.raises(SystemExit, match="needs the marks"):
        command.run(tmp_path / "results", *files)
    assert page.read_text() == text
    assert readme.read_text() == said


@pytest.mark.parametrize("text", ["", "# name\n", f"{report.STATUS}\n\n\n", f"\n\nNot {report.STATUS}\n"])
def test_a_readme_without_a_status_is_left_alone(tmp_path, files, text):
    page, readme = files
    figures = page.read_text()
    readme.write_text(text)
    with pytest.raises(SystemExit, match="expected a third line"):
        command.run(tmp_path / "results", *files)
    assert readme.read_text() == text
    assert page.read_text() == figures


def test_a_broken_table_is_named(tmp_path):
    path = write(tmp_path / "a-gpu" / "bench.csv", measured({results.OURS: 512.0}, source="guessed"))
    with pytest.raises(SystemExit, match=rf"{path.name}: column source"):
        command.run(tmp_path, tmp_path / "performance.md", tmp_path / "README.md")
