import csv
from dataclasses import astuple

import pytest
from speed_tables import row

from perf import results


def test_a_row_is_on_the_disk_before_the_next_one(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    with results.Table(path, results.COLUMNS) as table:
        table.append(astuple(row(tflops=600.5)))
        (line,) = csv.DictReader(path.open())
    assert line["pass"] == "forward"
    assert line["tflops"] == "600.5"
    assert line["p50_ms"] == ""
    assert line["source"] == "predicted from compiled code, not measured"


def test_a_table_replaces_the_one_before(tmp_path):
    for value in "12":
        with results.Table(tmp_path / "table.csv", ["value"]) as table:
            table.append([value])
    assert (tmp_path / "table.csv").read_text() == "value\n2\n"


@pytest.mark.parametrize("commit", ["7789948", "77899e4", "0012345", "1bc2d3e+"])
def test_versions_are_text_in_every_table(tmp_path, commit):
    (tmp_path / "table.csv").write_text(f"driver,triton,commit,ms\n,3.10,,1\n580.10,3.10,{commit},2\n")
    rows = results.read_any(tmp_path / "table.csv")
    assert rows.iloc[1].tolist() == ["580.10", "3.10", commit, 2]
    assert rows.iloc[0][["driver", "commit"]].isna().all()


def write(path, *rows):
    with results.Table(path, results.COLUMNS) as table:
        for each in rows:
            table.append(astuple(each))
    return path


MEASURED = {"source": results.MEASURED, "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "tflops": 600.5}


def test_what_is_written_is_read(tmp_path):
    data = results.read(
        write(tmp_path / "speed.csv", row(**MEASURED, commit="0012345"), row(source=results.MEASURED, note="no room"))
    )
    assert data["tflops"].tolist()[0] == 600.5
    assert data["tflops"].isna().tolist() == [False, True]
    assert data["commit"].tolist() == ["0012345", "0123456"]
    assert data["note"].tolist() == ["", "no room"]
    assert data["causal"].dtype == bool


@pytest.mark.parametrize(
    "path", sorted(results.ROOT.glob("*/*.csv")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_the_speeds_among_the_results_keep_the_contract(path):
    if results.holds_speeds(path):
        assert len(results.read(path))
    else:
        assert not {"tflops", "gbps", "p50_ms"} & set(path.read_text().partition("\n")[0].split(","))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": ""}, "column gpu, line 3: expected str"),
        ({"batch": "many"}, "column batch, line 3: expected int, got 'many'"),
        ({"head_dim": 0.5}, "column head_dim, line 3: expected int"),
        ({"window": "wide"}, "column window, line 3: expected int"),
        ({"tflops": "fast"}, "column tflops, line 3: expected float"),
        ({"causal": "maybe"}, "column causal, line 3: expected True or False"),
        ({"source": "guessed"}, "column source, line 3: expected one of measured"),
        ({"p50_ms": None}, "column p50_ms, line 3: expected the time"),
        ({"tflops": None}, "column note, line 3: expected the reason"),
    ],
)
def test_a_table_that_breaks_the_contract_names_file_column_and_line(tmp_path, changes, said):
    path = write(tmp_path / "speed.csv", row(**MEASURED), row(**MEASURED | changes))
    with pytest.raises(ValueError, match=f"speed.csv: {said}"):
        results.read(path)


def test_a_table_that_lacks_a_column_names_it(tmp_path):
    path = tmp_path / "speed.csv"
    path.write_text("family,provider,pass\nflash,triton_attn,forward\n")
    assert results.holds_speeds(path)
    with pytest.raises(ValueError, match=r"speed.csv: expected the columns batch, .*, note in a table of speeds"):
        results.read(path)
