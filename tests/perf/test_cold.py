"""The tables of cold starts, for a few functions."""

import csv

import pytest

from perf.commands import cold
from triton_attn.toolchain import record_specializations


@pytest.mark.ci
@pytest.mark.compiled
def test_first_calls_compile_and_warm_ones_do_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cold, "IMPORTS", ("json",))
    monkeypatch.setattr(cold, "CALLS", {"append_kv_cache": None})
    paths = cold.run(tmp_path, arch="sm_80", processes=1)
    (row,) = csv.DictReader(paths[0].open())
    assert 0 < float(row["seconds"]) < 10
    assert row["source"] == "measured"
    (row,) = csv.DictReader(paths[1].open())
    assert (row["kernels"], row["compiled_empty"], row["compiled_warm"]) == ("1", "1", "0")
    assert float(row["empty_cache_s"]) > float(row["warm_cache_s"]) > float(row["later_call_us"]) / 1e6 > 0
    assert "append_kv_cache" in capsys.readouterr().out


@pytest.mark.compiled
def test_every_function_can_be_called():
    """The kernels that each function launches, without compiling them."""
    for name, make in cold.CALLS.items():
        with record_specializations("sm_90") as met:
            make()()
        assert met, name
