"""`python -m perf peers`, with a small kernel in the place of vLLM's."""

import csv
import sys

import pytest
import torch
import unified_stand_in

from perf import results
from perf.commands import peers
from perf.model import compiled, loop_model
from perf.workloads import vllm_attention

pytestmark = pytest.mark.compiled


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of a vLLM that is forgotten afterwards."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]

    monkeypatch.setattr(sys, "path", [*sys.path])
    forget()
    yield unified_stand_in.install(tmp_path / "installed")
    forget()


@pytest.mark.ci
def test_both_kernels_are_compiled_for_the_same_calls(installed, tmp_path, capsys):
    (path,) = peers.run(tmp_path, installed, archs=["sm_80", "sm_90"], head_dims=[64])
    rows = list(csv.DictReader(path.open()))
    assert [(row["arch"], row["seqlen_q"]) for row in rows] == [
        (arch, seqlen) for arch in ("sm_80", "sm_90") for seqlen in ("1", "512")
    ]
    assert {row["source"] for row in rows} == {results.PREDICTED}
    assert {row["vllm"] for row in rows} == {"0.0.stand-in"}
    assert [row["vLLM config"] for row in rows] == ["16x16 w4 s3", "16x32 w2 s3"] * 2, "what the function chose"
    for row in rows:
        shape = dict(num_heads_q=32, num_heads_kv=8, head_dim=64, page_size=16, seqlen_q=int(row["seqlen_q"]))
        ours = loop_model.analyze(compiled.paged_decode(row["arch"], torch.bfloat16, **shape).kernel)
        assert float(row["ours lock"]) == pytest.approx(ours.lock)
        assert float(row["vLLM lock"]) != float(row["ours lock"])
        assert float(row["ratio"]) == pytest.approx(float(row["ours lock"]) / float(row["vLLM lock"]))
    printed = capsys.readouterr().out
    assert results.PREDICTED in printed
    assert "vLLM 0.0.stand-in" in printed
    assert "512 queries" in printed


def test_without_vllm_the_command_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=rf"vllm: expected .* in {tmp_path}, got none.*--vllm FOLDER"):
        peers.run(tmp_path, tmp_path)
    monkeypatch.setattr(vllm_attention, "ENGINES", tmp_path)
    monkeypatch.setattr(vllm_attention, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"vllm: expected .* installed, got none.*make .venv-engines/installed"):
        peers.run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_installed_vllm_comes_before_that_of_the_engines(installed, tmp_path, monkeypatch):
    engines = unified_stand_in.install(tmp_path / "lib/python3.11/site-packages")
    monkeypatch.setattr(vllm_attention, "ENGINES", tmp_path)
    assert vllm_attention.find() == engines
    sys.path.append(str(installed))
    assert vllm_attention.find() == installed


def test_another_vllm_than_the_given_one_is_not_compiled(installed, tmp_path):
    sys.path.append(str(installed))
    given = unified_stand_in.install(tmp_path / "given")
    with pytest.raises(SystemExit, match=rf"vllm: expected that of {given}, got {installed}"):
        peers.run(tmp_path, given)
