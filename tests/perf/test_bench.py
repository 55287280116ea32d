from argparse import ArgumentParser
from dataclasses import replace

import pytest
from speed_tables import row

from perf import results
from perf.commands import bench
from perf.workloads.problems import DecodeProblem


def predict_with(monkeypatch, family, predict):
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    monkeypatch.setitem(bench.FAMILIES, family, replace(bench.FAMILIES[family], predict=predict))


def parse(*arguments):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return vars(parser.parse_args(arguments))


@pytest.fixture
def done(monkeypatch):
    """Predictions for two lengths; a peer failed at one of them."""
    rows = [
        row(provider=results.OURS, seqlen_q=512, seqlen_k=512, tflops=301.4),
        row(provider=results.OURS, seqlen_q=1024, seqlen_k=1024, tflops=402.6),
        row(provider="SDPA flash", seqlen_q=512, seqlen_k=512, tflops=200.0),
        row(provider="SDPA flash", seqlen_q=1024, seqlen_k=1024, tflops=None, note="out of memory"),
    ]
    predict_with(monkeypatch, "flash", lambda problems, dtype, arch: rows)
    return rows


def test_a_line_per_provider_and_a_column_per_length(done):
    ours, theirs = bench._summary(done, bench.FAMILIES["flash"].line, "tflops")
    assert (ours["provider"], ours[512], ours[1024]) == (results.OURS, 301, 403)
    assert (theirs["provider"], theirs[512], theirs[1024]) == ("SDPA flash", 200, None)


def test_what_is_printed_says_where_it_comes_from(done, tmp_path, capsys):
    paths = bench.run(tmp_path)
    assert all(path.exists() for path in paths)
    printed = capsys.readouterr().out
    assert done[0].source in printed
    assert "lock: they never overlap" in printed
    assert "SDPA flash, batch 1, head_dim 128, seqlen 1024: out of memory" in printed


def test_flash_forward_is_what_runs_by_default(done, tmp_path):
    paths = bench.run(tmp_path, **parse())
    assert [path.name for path in paths] == ["flash_forward.csv", "flash_forward.png", "flash_forward_ratio.png"]


def test_a_family_runs_its_own_grid(monkeypatch, tmp_path, capsys):
    asked = []

    def predict(problems, dtype, arch):
        asked.extend(problems)
        for problem in problems:
            columns = problem.columns() | {"provider": f"{results.OURS}, bound", "gbps": 2345.6, "roof_share": 0.7}
            yield row(**columns)
            yield row(**columns | {"provider": f"{results.OURS}, lock"})

    predict_with(monkeypatch, "paged", predict)
    paths = bench.run(tmp_path, **parse("--family", "paged", "--batch", "2", "3", "--seqlen", "1000"))
    assert asked == [DecodeProblem(2, 1000), DecodeProblem(3, 1000)]
    assert {path.name for path in paths} == {"paged_decode.csv", "paged_decode.png"}
    assert all(path.exists() for path in paths)
    printed = capsys.readouterr().out
    assert "GB/s against context, decode" in printed
    assert "2,346" in printed
    assert "launches" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--family", "paged", "--pass", "backward"], "--family paged has no --pass"),
        (["--batch", "8"], "--family flash has no --batch"),
        (["--family", "paged", "--batch", "128", "--seqlen", "131072"], "above 8 GiB"),
    ],
)
def test_what_a_family_does_not_have_is_refused(tmp_path, arguments, said):
    with pytest.raises(SystemExit, match=said):
        bench.run(tmp_path, **parse(*arguments))
    assert list(tmp_path.iterdir()) == []
