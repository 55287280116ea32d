import csv

import pytest
import torch
import triton

import triton_attn
from perf.commands import verify
from perf.workloads.models import Model

SMALL = Model("small", 1, 2, 1, 32, head_dim_v=16, window=32, num_windowed_layers=1, sinks=True)
SMALL_MLA = Model("small MLA", 1, 2, 2, 24, head_dim_v=16, kv_lora_rank=128, qk_rope_head_dim=8)


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(verify, "map_in_processes", map)


def test_the_table_holds_errors_and_bounds_of_every_function(tmp_path, in_this_process, capsys):
    (path,) = verify.run(tmp_path, dtype="float32", models=(SMALL, SMALL_MLA))
    rows = list(csv.DictReader(path.open()))
    outputs = {"small": {}, "small MLA": {}}
    for row in rows:
        outputs[row["model"]].setdefault(row["function"], []).append(row["output"])
    results, gradients = ["out", "lse"], ["dq", "dk", "dv"]
    per_head, latent = ["k_cache", "v_cache"], ["latent_cache", "latent_cache_fp8"]
    read = {"small": ["k", "v"], "small MLA": ["kv_latent", "k_pe"]}
    assert outputs == {
        "small": {
            "flash_attention": [*results, *gradients, "dsinks"],
            "flash_attention_varlen": [*results, *gradients, "dsinks"],
            "paged_attention": results,
            "merge_attention": results,
            "append_kv_cache": per_head,
            "copy_kv_pages": per_head,
            "gather_kv_cache": read["small"],
        },
        "small MLA": {
            "flash_attention": [*results, *gradients],
            "flash_attention_varlen": [*results, *gradients],
            "paged_attention": results,
            "merge_attention": results,
            "append_latent_cache": latent,
            "gather_latent_cache": read["small MLA"],
            "mla_decode": ["out", "lse", "out, fp8 cache", "lse, fp8 cache"],
            "mla_prefill": [f"{x}, {mode}" for mode in ("fused", "absorbed", "materialized") for x in results]
            + ["dq_nope", "dq_pe", "dkv_latent", "dk_pe", "dw_uk", "dw_uv"],
        },
    }
    for row in rows:
        assert row["verdict"] == "ok"
        shape = ("2/1", "32/16") if row["model"] == "small" else ("2/2", "24/16")
        assert (row["heads"], row["head_dim"]) == shape
        if row["output"] in (*per_head, *latent, *read[row["model"]]):
            assert float(row["error"]) == float(row["bound"]) == 0
        else:
            assert 0 <= float(row["error"]) <= float(row["bound"]) < 1e-3
        assert row["device"]
        assert (row["torch"], row["triton"]) == (torch.__version__, triton.__version__)
    printed = capsys.readouterr().out
    assert all(function in printed for function in verify.CALLS)
    assert "all 56 results are within their bounds" in printed


def test_every_public_kernel_is_verified():
    """The functions with a reference: names in the package and in `reference`."""
    assert set(verify.CALLS) == set(triton_attn.__all__) & set(triton_attn.reference.__all__)


def test_a_wrong_result_is_recorded_and_ends_in_an_error(tmp_path, in_this_process, monkeypatch):
    right = triton_attn.flash_attention

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return out + 1, lse

    monkeypatch.setattr(triton_attn, "flash_attention", wrong)
    with pytest.raises(SystemExit, match="1 of 22 results") as failure:
        verify.run(tmp_path, seqlen=24, dtype="float32", models=(SMALL,))
    assert "small, flash_attention: out" in str(failure.value)
    rows = list(csv.DictReader((tmp_path / "errors-float32.csv").open()))
    assert [row["verdict"] for row in rows] == ["WRONG"] + ["ok"] * 21


def test_a_wrong_schedule_is_named(tmp_path, in_this_process, monkeypatch):
    right = triton_attn.mla_prefill

    def wrong(*args, mode="auto", **options):
        result = right(*args, mode=mode, **options)
        return (result[0] + 1, result[1]) if mode == "absorbed" else result

    monkeypatch.setattr(triton_attn, "mla_prefill", wrong)
    monkeypatch.setattr(verify, "CALLS", {"mla_prefill": verify.CALLS["mla_prefill"]})
    with pytest.raises(SystemExit, match="1 of 12 results") as failure:
        verify.run(tmp_path, seqlen=24, dtype="float32", models=(SMALL_MLA,))
    assert "small MLA, mla_prefill: out, absorbed" in str(failure.value)


def test_a_window_that_does_not_fit_is_cut():
    assert verify._options(SMALL, seqlen=100)["window_size"] == (31, -1)
    assert verify._options(SMALL, seqlen=32)["window_size"] == (7, -1)


def test_varlen_lengths_tile_the_tensors(monkeypatch):
    monkeypatch.setattr(verify, "_attention", lambda function, args, *_: args)
    about, (q, k, _, cu_q, cu_k, max_q, max_k) = verify._varlen(SMALL, 96, torch.float32)
    assert about.endswith("48x96, 32x32, 1x95")
    assert cu_q.tolist() == [0, 48, 80, 81]
    assert cu_k.tolist() == [0, 96, 128, 223]
    assert (q.shape[0], k.shape[0]) == (81, 223)
    assert (max_q, max_k) == (48, 96)
