from dataclasses import replace
from functools import partial

import pytest
import torch
from small_problems import DECODE, PROBLEM, fake_times

from perf.harness import measure
from perf.harness.timing import Percentiles
from perf.results import MEASURED
from perf.workloads.providers import DECODE_PROVIDERS, PROVIDERS
from triton_attn import reference


@pytest.fixture
def rows(monkeypatch):
    def fake_times(functions):
        for function in functions.values():
            function()
        return {name: Percentiles(1.0, 2.0, 4.0) for name in functions}

    def out_of_memory(problem, device):
        raise MemoryError("no room for the scores\nand more")

    monkeypatch.setattr(measure, "time_interleaved", fake_times)
    providers = {
        "triton_attn": PROVIDERS["triton_attn"],
        "wrong": lambda problem, device: partial(reference.flash_attention, causal=False),
        "large": out_of_memory,
    }
    rows = measure.throughput(PROBLEM, "float32", providers, roof=1e-3, device="cpu")
    return {row.provider: row for row in rows}


def test_a_right_provider_is_timed(rows):
    row = rows["triton_attn"]
    flops = 4 * 2 * 64 * 64 * 16 / 2
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == (1.0, 2.0, 4.0)
    assert row.tflops == pytest.approx(flops / 2e-3 / 1e12)
    assert row.roof_share == pytest.approx(row.tflops / 1e-3)
    assert row.source == MEASURED
    assert row.note == ""


@pytest.mark.parametrize(
    ("name", "note"), [("wrong", "AssertionError: out"), ("large", "MemoryError: no room for the scores")]
)
def test_a_provider_that_fails_is_recorded_and_not_timed(rows, name, note):
    assert rows[name].note.startswith(note)
    assert "\n" not in rows[name].note
    assert rows[name].p50_ms is None
    assert rows[name].tflops is None


@pytest.mark.parametrize(("direction", "factor"), [("backward", 2.5), ("both", 3.5)])
def test_other_passes_run_and_count_their_flops(monkeypatch, direction, factor):
    gradients = []

    def fake_times(functions):
        gradients.extend(function() for function in functions.values())
        return dict.fromkeys(functions, Percentiles(1.0, 2.0, 4.0))

    monkeypatch.setattr(measure, "time_interleaved", fake_times)
    problem = replace(PROBLEM, direction=direction)
    providers = {"triton_attn": PROVIDERS["triton_attn"]}
    (row,) = measure.throughput(problem, "float32", providers, roof=1.0, device="cpu")
    assert row.note == ""
    assert row.direction == direction
    assert row.tflops == pytest.approx(factor * PROBLEM.flops / 2e-3 / 1e12)
    assert [x.shape for x in gradients[0]] == [(1, 64, 2, 16)] * 3


def misses_the_newest_token(problem, q, k_cache, v_cache):
    return DECODE_PROVIDERS["SDPA flash"](problem, q, k_cache[:, :-1], v_cache[:, :-1])


def swaps_sequences(problem, q, k_cache, v_cache):
    return DECODE_PROVIDERS["SDPA flash"](problem, q, k_cache.flip(0), v_cache)


def test_decode_steps_are_checked_and_count_the_bytes_of_the_cache(monkeypatch):
    monkeypatch.setattr(measure, "time_interleaved", fake_times)
    providers = DECODE_PROVIDERS | {"short": misses_the_newest_token, "swapped": swaps_sequences}
    del providers["FlexAttention"], providers["SDPA cuDNN"]
    rows = {row.provider: row for row in measure.throughput(DECODE, "bfloat16", providers, roof=0.01, device="cpu")}
    num_bytes = 2 * (2 * 3 * 37 * 2 * 16 + 2 * 3 * 4 * 16)
    for name in ("triton_attn", "SDPA flash"):
        row = rows[name]
        assert row.note == ""
        assert (row.family, row.direction, row.seqlen_q, row.seqlen_k, row.page_size) == ("paged", "decode", 1, 37, 8)
        assert row.gbps == pytest.approx(num_bytes / 2e-3 / 1e9)
        assert row.roof_share == pytest.approx(row.gbps / 0.01)
        assert row.tflops == pytest.approx(4 * 3 * 4 * 37 * 16 / 2e-3 / 1e12)
    for name in ("short", "swapped"):
        assert rows[name].note.startswith("AssertionError: out")
        assert rows[name].gbps is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", sorted(DECODE_PROVIDERS.keys() - {"SDPA cuDNN"}))
def test_decode_providers_agree(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = (torch.randn(shape) for shape in DECODE.shapes)
    out = DECODE_PROVIDERS[name](DECODE, q, k, v)()
    torch.testing.assert_close(out, reference.flash_attention(q, k, v), rtol=1e-4, atol=1e-5)
