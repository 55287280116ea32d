import pytest
from test_results import row

from perf import bench, results


@pytest.fixture
def done(monkeypatch):
    """What was predicted: two lengths, one of which a peer could not do."""
    rows = [
        row(provider=results.OURS, seqlen_q=512, tflops=301.4),
        row(provider=results.OURS, seqlen_q=1024, tflops=402.6),
        row(provider="SDPA flash", seqlen_q=512, tflops=200.0),
        row(provider="SDPA flash", seqlen_q=1024, tflops=None, note="out of memory"),
    ]
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    monkeypatch.setattr(bench.predict, "flash", lambda problems, dtype, arch: rows)
    return rows


def test_a_line_per_provider_and_a_column_per_length(done):
    ours, theirs = bench._summary(done)
    assert (ours["provider"], ours[512], ours[1024]) == (results.OURS, 301, 403)
    assert (theirs["provider"], theirs[512], theirs[1024]) == ("SDPA flash", 200, None)


def test_what_is_printed_says_where_it_comes_from(done, tmp_path, capsys):
    paths = bench.run(tmp_path)
    assert all(path.exists() for path in paths)
    printed = capsys.readouterr().out
    assert done[0].source in printed
    assert "lock: they never do" in printed
    assert "SDPA flash, head_dim 128, seqlen 1024: out of memory" in printed
