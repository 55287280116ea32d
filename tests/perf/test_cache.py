import csv

from perf.commands import cache
from perf.workloads import bookkeeping


def test_run_measures_every_operation_and_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "BATCH_SIZES", (1, 5))
    monkeypatch.setattr(cache, "MIN_CALLS", 10)
    monkeypatch.setattr(cache, "DECODE_STEPS", 20)
    monkeypatch.setattr(cache, "TREE_STEPS", 8)
    pool_csv, pool_png, step_csv, step_png, tree_csv = cache.run(tmp_path, max_pages=10**3)
    rows = list(csv.DictReader(pool_csv.open()))
    assert {row["operation"] for row in rows} == {"allocate", "share", "release", "create, all cached"}
    assert all(0 < float(row["p20_ns"]) <= float(row["p50_ns"]) <= float(row["p80_ns"]) for row in rows)
    assert int(next(row["calls"] for row in rows if row["operation"] == "release")) >= 2 * 1000 // 64
    assert [row["sequences"] for row in csv.DictReader(step_csv.open())] == ["1", "5"]
    trees = [(row["sequences"], row["change"]) for row in csv.DictReader(tree_csv.open())]
    assert trees == [(n, change) for n in ("1", "5") for change in ("none", "one fork")]
    assert all(picture.stat().st_size > 10_000 for picture in (pool_png, step_png))
    assert "create, all cached" in capsys.readouterr().out


def test_a_peer_does_the_same_work(tmp_path, monkeypatch):
    """Ours stands in for vLLM, which no test of CI has."""
    monkeypatch.setattr(bookkeeping, "MANAGERS", {"triton_attn": bookkeeping.Ours, "vllm": bookkeeping.Ours})
    monkeypatch.setattr(
        bookkeeping, "WORKLOADS", [bookkeeping.Decode(3, bar=1.0, context=40), *bookkeeping.WORKLOADS[4:]]
    )
    monkeypatch.setattr(cache, "PEER_ROUNDS", 2)
    (path,) = cache.run(tmp_path, max_pages=2000, peer=True)
    rows = list(csv.DictReader(path.open()))
    assert [row["operation"] for row in rows] == [workload.name for workload in bookkeeping.WORKLOADS]
    assert all(0.2 < float(row["vllm_over_ours"]) < 5 for row in rows)
