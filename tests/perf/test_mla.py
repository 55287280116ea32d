import csv
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from perf import results
from perf.commands import mla
from perf.harness import measure
from perf.harness.timing import Percentiles
from perf.model import predict
from perf.results import plot, style
from perf.workloads import models, providers
from perf.workloads.problems import LatentDecodeProblem, LatentPrefillProblem, latent_decode_grid, latent_prefill_grid
from triton_attn import mla_prefill, reference
from triton_attn._host.call import Lengths
from triton_attn.mla.api import PrefillCall
from triton_attn.mla.schedule import MODES, choose_schedule

STEP = LatentDecodeProblem(3, 37, 8, kv_lora_rank=128, qk_rope_head_dim=16, page_size=8)
FP8_STEP = replace(STEP, cache_dtype="float8_e4m3fn")
PREFILL = LatentPrefillProblem(24, 40, 3, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, kv_lora_rank=32)


@pytest.fixture(autouse=True)
def fake_times(monkeypatch):
    def time_interleaved(functions):
        for function in functions.values():
            function()
        return {name: Percentiles(1.0, 2.0, 4.0) for name in functions}

    monkeypatch.setattr(measure, "time_interleaved", time_interleaved)


def measured(problem, chosen, dtype="bfloat16"):
    rows = measure.throughput(problem, dtype, chosen, roof=1.0, device="cpu")
    return {row.provider: row for row in rows}


def test_decode_counts_the_bytes_of_either_cache():
    q_and_out = 3 * 8 * (144 + 128) * 2
    assert STEP.bytes(2) == 3 * 37 * 144 * 2 + q_and_out
    assert FP8_STEP.bytes(2) == 3 * 37 * (128 + 4 + 16 * 2) + q_and_out
    assert LatentDecodeProblem(1, 1, 1, "float8_e4m3fn").cache_bytes() == 656
    assert STEP.flops == FP8_STEP.flops == 2 * 3 * 8 * 37 * (144 + 128)


def test_prefill_counts_the_pairs_that_are_seen():
    assert PREFILL.flops == 2 * 3 * (16 + 8 + 16) * sum(range(17, 41))
    assert PREFILL.bytes(2) == 2 * (24 * 3 * 24 + 40 * 40 + 3 * 32 * 32 + 24 * 3 * 16)
    inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in PREFILL.shapes]
    sizes = PREFILL.sizes(2)
    assert sizes == type(sizes).of(PrefillCall(*inputs, Lengths(None, None, 24, 40), 1.0, causal=True))


def test_grids_have_both_caches_and_no_chunk_without_a_past():
    steps = latent_decode_grid(heads=[16], batch=2, seqlens=[1024])
    assert [(p.batch, p.cache_dtype) for p in steps] == [(2, "bfloat16"), (2, "float8_e4m3fn")]
    calls = latent_prefill_grid(prompts=[128], contexts=[128, 1024, 2048])
    assert [(p.seqlen_q, p.seqlen_k) for p in calls] == [(128, 128), (1024, 2048), (128, 1024), (128, 2048)]


def ours(problem, q, rows):
    return providers.LATENT_DECODE_PROVIDERS[results.OURS](problem, q, rows)


def misses_the_newest_token(problem, q, rows):
    return ours(replace(problem, seqlen_k=problem.seqlen_k - 1), q, rows[:, :-1])


@pytest.mark.parametrize("problem", [STEP, FP8_STEP])
def test_decode_steps_are_checked_before_they_are_timed(problem):
    rows = measured(
        problem,
        {
            "ours": ours,
            "short": misses_the_newest_token,
            "swapped": lambda problem, q, rows: ours(problem, q, rows.flip(0)),
            "heads": lambda problem, q, rows: ours(problem, q.flip(2), rows),
        },
    )
    right = rows.pop("ours")
    assert right.note == ""
    assert (right.family, right.direction, right.head_dim, right.head_dim_v) == ("mla", "decode", 144, 128)
    assert right.gbps == pytest.approx(problem.bytes(2) / 2e-3 / 1e9)
    assert right.tflops == pytest.approx(problem.flops / 2e-3 / 1e12)
    for row in rows.values():
        assert row.note.startswith("AssertionError: out")
        assert row.gbps is None


def test_a_cache_in_fp8_is_not_judged_by_what_was_written():
    """An exact step over the unrounded rows is outside of the bounds."""

    def unrounded(problem, q, rows):
        return lambda: reference.flash_attention(q, rows[:, :, None], rows[:, :, None, :128])

    rows = [measured(problem, {"exact": unrounded})["exact"] for problem in (STEP, FP8_STEP)]
    assert rows[0].note == ""
    assert rows[1].note.startswith("AssertionError: out")


def test_flash_mla_is_called_as_it_asks_to_be(monkeypatch):
    """Through its documented interface; here the reference computes."""

    def get_mla_metadata(cache_seqlens, rows_per_kv_head, num_heads_kv):
        assert (cache_seqlens.tolist(), rows_per_kv_head, num_heads_kv) == ([37] * 3, 8, 1)
        return "metadata", None

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, metadata, num_splits, softmax_scale=None
    ):
        assert (k_cache.shape, metadata, num_splits) == ((15, 8, 1, 144), "metadata", None)
        parts = q[..., :head_dim_v], q[..., head_dim_v:], k_cache[:, :, 0], cache_seqlens, block_table
        return reference.mla_decode(*parts, softmax_scale=softmax_scale, return_lse=True)

    module = SimpleNamespace(get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    right, refused = (measured(p, {"FlashMLA": providers._flash_mla})["FlashMLA"] for p in (STEP, FP8_STEP))
    assert (right.note, right.p50_ms) == ("", 2.0)
    assert refused.note.startswith("NotImplementedError")


@pytest.mark.parametrize("problem", [PREFILL, replace(PREFILL, seqlen_q=40)])
def test_every_schedule_and_peer_of_prefill_agrees(problem):
    rows = measured(problem, providers.LATENT_PREFILL_PROVIDERS)
    assert {row.note for row in rows.values()} == {""}
    assert {row.seqlen_q for row in rows.values()} == {problem.seqlen_q}
    assert providers.SCHEDULES.keys() < rows.keys()


def test_a_wrong_prefill_is_not_timed():
    def swaps_heads(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv):
        return mla_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv.flip(0))

    rows = measured(PREFILL, {"full": partial(mla_prefill, causal=False), "heads": swaps_heads})
    for row in rows.values():
        assert row.note.startswith("AssertionError: out")
        assert row.tflops is None


def test_a_head_more_than_a_tile_holds_makes_programs():
    step = LatentDecodeProblem(batch=1, seqlen_k=128, num_heads_q=128)
    assert predict.split_trips(step, 64, 64, num_sms=2, resident=1, element_size=2) == (1, [2, 2])


def test_splits_of_a_step_are_as_wide_as_its_values():
    time, _ = predict.decode_seconds(STEP, 2, 2, loop_seconds=0, bytes_per_second=1)
    assert time == STEP.bytes(2) + 2 * (2 * 3 * 8 * (128 + 1) * 4)


def test_the_time_of_a_schedule_is_its_stated_cost():
    problem = LatentPrefillProblem(1024, 1024)
    rows = {row.provider: row for row in predict.latent_prefill(problem, "bfloat16", "sm_90")}
    pairs, weights = 1024 * 1025 / 2, 2 * 512 * 256
    cost = {
        "fused": 640 * pairs + weights * pairs / 128,
        "absorbed": 2176 * pairs + (weights + (4 * 512 + 2 * 64) * 600) * 1024,
        "materialized": 640 * pairs + (weights + 2 * 256 * 600) * 1024,
    }
    rate = 132 * 1.755e9 * 4096
    for mode, flops in cost.items():
        row = rows[f"{results.OURS}, {mode}"]
        assert problem.flops / row.tflops / 1e12 == pytest.approx(128 * flops / rate)
        assert row.source == results.MODELLED
        assert "300 FLOP" in row.note


def schedules_of(problem):
    rows = predict.latent_prefill(problem, "bfloat16", "sm_90")
    return {providers.SCHEDULES[row.provider]: mla._of_schedule(problem, row) for row in rows}


def test_workspace_is_that_of_a_chunk_of_heads():
    columns = schedules_of(LatentPrefillProblem(1024, 8192))
    assert columns["fused"]["workspace_bytes"] == columns["fused"]["all_heads_bytes"] == 0
    assert columns["materialized"]["all_heads_bytes"] == 128 * 8192 * 256 * 2 == 2**29
    assert columns["materialized"]["workspace_bytes"] == 2**28
    per_head = 1024 * (1088 * 2 + 4)
    assert columns["absorbed"]["all_heads_bytes"] == 128 * per_head
    assert columns["absorbed"]["workspace_bytes"] == 64 * per_head  # there is room for 120


@pytest.mark.parametrize("problem", latent_prefill_grid())
def test_what_auto_chooses_is_marked_and_is_the_fastest(problem):
    columns = schedules_of(problem)
    (chosen,) = (mode for mode in MODES if columns[mode]["is_auto"])
    assert chosen == choose_schedule(problem.sizes(2), "auto", 2**28, False).mode
    assert columns[chosen]["ms"] == min(columns[mode]["ms"] for mode in MODES)


def test_sizes_are_those_of_the_paper():
    kinds = {row["attention"]: row for row in mla.kinds()}
    assert list(kinds) == ["MHA", "GQA", "MQA", "MLA"]
    assert {kind: row["in d_h"] for kind, row in kinds.items()} == {"MHA": "64", "GQA": "16", "MQA": "2", "MLA": "9/2"}
    assert kinds["MLA"]["elements"] == 4 * 128 + 128 // 2
    assert kinds["MLA"]["bytes/token in bf16"] == 70272
    assert kinds["MHA"]["elements"] == 2 * models.LLAMA_2_7B.num_heads_q * 128


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mla, "latent_decode_grid", lambda *_: [STEP, FP8_STEP])
    monkeypatch.setattr(mla, "latent_prefill_grid", lambda *_: [PREFILL, replace(PREFILL, seqlen_q=40)])


@pytest.fixture
def on_a_gpu(monkeypatch, small):
    """Kernels run here, and the clock is made up."""
    monkeypatch.setattr(mla, "has_gpu", lambda: True)
    monkeypatch.setattr(mla, "throughput", partial(measure.throughput, device="cpu"))
    monkeypatch.setattr(mla, "copy_bandwidth", lambda: 0.5)
    monkeypatch.setattr(mla, "matmul_rate", lambda: 0.25)
    monkeypatch.setattr(measure, "gpu_name", lambda: "a GPU")


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.ci
def test_on_a_gpu_all_is_measured(on_a_gpu, tmp_path, capsys):
    paths = mla.run(tmp_path)
    assert [path.name for path in paths] == [
        "mla_decode.csv",
        "mla_decode.png",
        "mla_prefill.csv",
        "mla_prefill.png",
        "mla_prefill_ratio.png",
        "mla_sizes.csv",
    ]
    assert all(path.exists() for path in paths)
    steps, calls = read(paths[0]), read(paths[2])
    assert {row["source"] for row in steps + calls} == {results.MEASURED}
    assert [row["cache_dtype"] for row in steps] == ["bfloat16", "float8_e4m3fn"]
    assert float(steps[0]["roof_share"]) == pytest.approx(float(steps[0]["gbps"]) / 0.5)
    assert float(calls[0]["roof_share"]) == pytest.approx(float(calls[0]["tflops"]) / 0.25)
    assert [float(row["ms"]) for row in calls] == pytest.approx([2.0] * 8)
    peer = calls[3]
    assert (peer["provider"], peer["schedule"], peer["workspace_bytes"]) == ("SDPA flash, expanded heads", "", "")
    assert "predicted" not in capsys.readouterr().out


@pytest.mark.ci
def test_on_a_gpu_a_peer_may_fail_and_we_may_not(on_a_gpu, monkeypatch, tmp_path, capsys):
    def fails(*tensors):
        raise MemoryError("no room for the heads")

    schedules = mla.LATENT_PREFILL_PROVIDERS
    monkeypatch.setattr(mla, "LATENT_PREFILL_PROVIDERS", schedules | {"SDPA flash, expanded heads": fails})
    mla.run(tmp_path)
    said = "SDPA flash, expanded heads, prefill, 3 heads, 24x40: MemoryError: no room for the heads"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(mla, "LATENT_PREFILL_PROVIDERS", schedules | {f"{results.OURS}, fused": fails})
    with pytest.raises(SystemExit, match="our kernel failed"):
        mla.run(tmp_path)
    assert read(tmp_path / "mla_prefill.csv")[0]["tflops"] == ""


@pytest.mark.ci
@pytest.mark.compiled
def test_without_a_gpu_all_is_predicted_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mla, "has_gpu", lambda: False)
    decode, _, prefill, *_ = mla.run(tmp_path, heads=[16, 128], seqlen=2048)
    steps, calls = read(decode), read(prefill)
    assert {row["source"] for row in steps} == {results.PREDICTED}
    assert {row["source"] for row in calls} == {results.MODELLED}
    assert {row["p50_ms"] for row in steps + calls} == {""}
    printed = capsys.readouterr().out
    assert results.PREDICTED in printed
    assert results.MODELLED in printed
    assert "lock: they never overlap" in printed
    assert "300 FLOP" in printed


@pytest.mark.compiled
@pytest.mark.parametrize(("heads", "limit"), [(16, "memory"), (64, "memory"), (128, "the loop")])
def test_few_heads_are_predicted_to_wait_for_memory_and_many_for_the_loop(heads, limit):
    bound, lock = predict.latent_decode(LatentDecodeProblem(32, 131072, heads), "bfloat16", "sm_90")
    assert [bound.provider, lock.provider] == [results.BOUND, results.LOCK]
    assert f"limited by {limit}" in lock.note
    assert (lock.roof_share > 0.99) == (limit == "memory")
    assert lock.roof_share <= bound.roof_share < 1
    assert lock.tflops / lock.gbps == pytest.approx(heads * 1088 / 576 / 1e3, rel=0.01)


@pytest.fixture
def draw():
    """The figure of a CSV among the results."""
    figures = []

    def figure_of(name):
        ((picture, data),) = plot.pictures(results.ROOT / "predicted-sm_90" / name).values()
        with plot.plt.rc_context(style.STYLE):
            figures.append(picture(data))
        return figures[-1]

    yield figure_of
    for figure in figures:
        plot.plt.close(figure)


def text_of(figure):
    return figure.get_suptitle() + " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_a_predicted_decode_is_drawn_beside_what_is_published(draw):
    figure = draw("mla_decode.csv")
    heads = ["16 query heads", "64 query heads", "128 query heads"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [*heads, "", "", ""]
    text = text_of(figure)
    assert all(said in text for said in (results.PREDICTED, "Triton 3.", "FlashMLA, published, H800", "lock", "bound"))
    for axes, published in zip(figure.axes, [660] * 3 + [3000] * 3):
        (line,) = (line for line in axes.lines if line.get_linestyle() == ":")
        assert line.get_ydata()[0] == published
    (roof,) = (line for line in figure.axes[-1].lines if line.get_linestyle() == "--")
    assert roof.get_ydata()[0] == pytest.approx(3350)


def test_the_chosen_schedule_is_ringed(draw):
    path = results.ROOT / "predicted-sm_90" / "mla_prefill.csv"
    figure = draw(path.name)
    titles = ["whole prompts", "chunks of 128 queries", "chunks of 1024 queries"]
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == titles
    text = text_of(figure)
    assert all(said in text for said in (results.MODELLED, "300 FLOP", "chosen by auto", *MODES))
    chosen = [row for row in read(path) if row["is_auto"] == "True" and row["seqlen_q"] == row["seqlen_k"]]
    (rings,) = figure.axes[0].collections
    assert rings.get_offsets().tolist() == [[int(row["seqlen_k"]), float(row["ms"])] for row in chosen]
    relative = figure.axes[3].collections[0].get_offsets()[:, 1]
    assert relative.tolist() == pytest.approx([1] * len(chosen)), "auto chooses the least cost"
