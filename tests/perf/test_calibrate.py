import csv
from dataclasses import asdict

import pandas as pd
import pytest

from perf import results
from perf.commands import calibrate
from perf.model.candidates import FAMILIES, MODEL_COLUMNS, Candidate
from perf.results import MEASURED, OURS, plot
from triton_attn.flash.configs import FlashConfig

CASES = {"flash": {"head_dim": 128, "causal": True}}
CASES["flash_backward"] = {"kernel": "dkdv"} | CASES["flash"]
CONFIGS = [FlashConfig(64, 64, 4, stages, True) for stages in (2, 1, 3)]


def static_rows(family, case, predictions, columns=MODEL_COLUMNS):
    """Rows for the CONFIGS, with (lock, expected) of each."""
    for config, (lock, expected) in zip(CONFIGS, predictions):
        made_of = {name: 0 for name in columns} | {"bound TFLOP/s": 900.0, "lock TFLOP/s": lock}
        if "expected TFLOP/s" in columns:
            made_of["expected TFLOP/s"] = expected
        yield Candidate(family, "sm_90", "bfloat16", case, config).columns | made_of | {"dropped": ""}


def measured_rows(family, case, speeds, length=4096, spread=1.0):
    for config, tflops in zip(CONFIGS, speeds):
        candidate = Candidate(family, "sm_90", "bfloat16", case, config)
        times = {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": spread, "tflops": tflops}
        machine = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3.6.0", "commit": "c", "source": MEASURED}
        problem = FAMILIES[family].problem(length, **case).columns()
        row = results.Row(
            **problem, dtype="bfloat16", provider=OURS, note=calibrate._note(candidate), **times, **machine
        )
        yield dict(zip(results.COLUMNS, asdict(row).values()))


def write(path, rows):
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def folder_of(path, predictions, speeds, **options):
    write(path / "sweep-flash-bfloat16.csv", static_rows("flash", CASES["flash"], predictions))
    write(path / "sweep-flash-bfloat16-measured.csv", measured_rows("flash", CASES["flash"], speeds, **options))
    return path


def test_a_model_that_is_right_has_ratio_one_and_no_regret(tmp_path):
    speeds = [400.0, 300.0, 500.0]
    data = calibrate.calibrate(folder_of(tmp_path, [(speed, speed) for speed in speeds], speeds))
    assert list(data["measured/lock"]) == list(data["measured/expected"]) == [1.0, 1.0, 1.0]
    (row,) = calibrate.by_problem(data).to_dict("records")
    assert row["regret lock (%)"] == row["regret expected (%)"] == 0
    assert row["rank corr. lock"] == row["rank corr. expected"] == pytest.approx(1)


def test_a_model_that_is_wrong_is_found_out(tmp_path):
    predictions = [(500.0, 400.0), (600.0, 300.0), (400.0, 600.0)]
    data = calibrate.calibrate(folder_of(tmp_path, predictions, [400.0, 300.0, 500.0]))
    assert list(data["measured/lock"]) == [0.8, 0.5, 1.25]
    (row,) = calibrate.by_problem(data).to_dict("records")
    assert row["rank corr. lock"] == pytest.approx(-1)
    assert row["rank corr. expected"] == pytest.approx(1)
    assert row["regret lock (%)"] == pytest.approx(40)
    assert row["regret expected (%)"] == 0
    stages = calibrate.by_stages(data).set_index("stages")
    assert stages["measured/lock"].to_dict() == {1: 0.5, 2: 0.8, 3: 1.25}


def test_an_unsteady_timing_says_nothing(tmp_path):
    folder_of(tmp_path, [(500.0, 500.0)] * 3, [400.0] * 3, spread=1.5)
    with pytest.raises(ValueError, match="expected sweep-"):
        calibrate.calibrate(tmp_path)


def test_tiles_loaded_with_and_without_descriptors_are_told_apart(tmp_path, monkeypatch):
    without = FlashConfig(64, 64, 4, 2, False)
    monkeypatch.setitem(globals(), "CONFIGS", [without, CONFIGS[0]])
    data = calibrate.calibrate(folder_of(tmp_path, [(100.0, 100.0), (200.0, 200.0)], [50.0, 150.0]))
    assert dict(zip(data["config"], data["measured/lock"])) == {"64x64 w4 s2": 0.5, "64x64 w4 s2 tma": 0.75}


def test_a_prediction_that_a_sweep_lacks_is_compiled_once(tmp_path, monkeypatch):
    compiled = []

    def compile_one(candidate):
        compiled.append(candidate.config)
        (row,) = [r for r in static_rows("flash", CASES["flash"], [(500.0, 400.0)] * 3) if is_of(r, candidate)]
        return row

    def is_of(row, candidate):
        return all(row[name] == value for name, value in asdict(candidate.config).items())

    monkeypatch.setattr(Candidate, "compile", compile_one)
    monkeypatch.setattr(calibrate, "map_in_processes", map)
    folder_of(tmp_path, [(500.0, None)] * 3, [400.0] * 3)
    old = [name for name in MODEL_COLUMNS if name != "expected TFLOP/s"]
    write(tmp_path / "sweep-flash-bfloat16.csv", static_rows("flash", CASES["flash"], [(500.0, None)] * 3, columns=old))
    data = calibrate.calibrate(tmp_path)
    assert compiled == CONFIGS
    assert list(data["measured/expected"]) == [1.0, 1.0, 1.0]
    assert set(data["compiled by"]) == {calibrate.triton.__version__}


def test_a_backward_pass_takes_both_of_its_kernels(tmp_path):
    """The dkdv kernel varies, and dq is the first of its space: 4 / 400 + 3 / 300 is the time of 5 matmuls."""
    dkdv, dq = CASES["flash_backward"], CASES["flash_backward"] | {"kernel": "dq"}
    static = [
        *static_rows("flash_backward", dkdv, [(400.0, 200.0)] * 3),
        *static_rows("flash_backward", dq, [(300.0, 150.0), (1.0, 1.0), (1.0, 1.0)]),
    ]
    write(tmp_path / "sweep-flash_backward-bfloat16.csv", static)
    measured = measured_rows("flash_backward", dkdv, [250.0] * 3)
    write(tmp_path / "sweep-flash_backward-bfloat16-measured.csv", measured)
    data = calibrate.calibrate(tmp_path)
    assert list(data["measured/lock"]) == pytest.approx([1.0] * 3)
    assert list(data["measured/expected"]) == pytest.approx([2.0] * 3)
    assert set(data["family"]) == {"backward dkdv"}


def test_the_page_has_its_figures_from_the_table(tmp_path, capsys):
    folder = folder_of(tmp_path, [(500.0, 400.0), (600.0, 300.0), (400.0, 600.0)], [400.0, 300.0, 500.0])
    out = tmp_path / "out"
    paths = calibrate.run(out, folder)
    assert [path.name for path in paths] == ["calibration.csv", "calibration.png", "calibration.md"]
    text = (out / "calibration.md").read_text()
    assert "3 timings of 3 kernels at 1 problems" in text
    assert "40 % slower than the best on average" in text
    assert "flash reaches 0.50 with 1, 0.80 with 2, 1.25 with 3" in text
    assert "regret lock (%)" in capsys.readouterr().out
    assert list(pd.read_csv(out / "calibration.csv")["measured/lock"]) == [0.8, 0.5, 1.25]
    (paths[1]).unlink()
    assert plot.draw(paths[0]) == [paths[1]]


def test_a_folder_without_measurements_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected sweep-"):
        calibrate.run(None, tmp_path)
