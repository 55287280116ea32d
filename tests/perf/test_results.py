import csv
from dataclasses import astuple

from perf import results


def row(**changes):
    values = dict(
        family="flash",
        provider="triton_attn",
        direction="forward",
        batch=1,
        seqlen_q=512,
        seqlen_k=512,
        num_heads_q=16,
        num_heads_kv=16,
        head_dim=128,
        head_dim_v=128,
        causal=True,
        dtype="bfloat16",
        gpu="some GPU",
        driver=None,
        torch="2.13.0",
        triton="3.9.0",
        commit="0123456",
        source=results.PREDICTED,
    )
    return results.Row(**values | changes)


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
