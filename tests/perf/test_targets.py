import pytest
from speed_tables import row

from perf import results
from perf.results import targets
from perf.workloads.problems import DecodeProblem, LatentDecodeProblem


def measured(**columns):
    return row(**{"gpu": "a synthetic H200", "source": results.MEASURED, "provider": results.OURS} | columns)


def lengths(speed, **columns):
    return [measured(seqlen_q=n, seqlen_k=n, tflops=speed + n / 1e6, **columns) for n in targets.LENGTHS]


def value_of(rows, i):
    return targets.judge(rows)["a synthetic H200"][i]


def test_a_ratio_is_the_least_of_all_lengths():
    rows = [*lengths(600.0), *lengths(500.0, provider="SDPA cuDNN"), *lengths(100.0, direction="backward")]
    rows.append(measured(seqlen_q=8192, seqlen_k=8192, tflops=1000.0, provider="SDPA cuDNN", batch=2))
    assert value_of(rows, 0) == pytest.approx(600.016384 / 500.016384)
    assert value_of(rows, 1) is None, "no FlexAttention"
    assert value_of(rows[:-2], 2) is None, "no peer's backward"
    assert value_of(rows[1:], 0) is None, "a length is missing"
    slower = [*lengths(50.0, direction="backward", provider="SDPA cuDNN"), *rows]
    assert value_of(slower, 2) == pytest.approx(2, rel=1e-3)


def test_paged_decode_is_judged_at_its_batch_and_context():
    def step(batch, context, share, **columns):
        return measured(**DecodeProblem(batch, context).columns() | columns, tflops=1.0, roof_share=share)

    rows = [
        step(32, 8192, 0.9),
        step(32, 1024, 0.1),
        step(1, 8192, 0.1),
        step(32, 8192, 0.2, cache_dtype="float8_e4m3fn"),
    ]
    assert value_of(rows, 3) == 0.9
    assert targets.TARGETS[3].verdict(0.9) == "met"
    assert targets.TARGETS[3].verdict(0.8) == "missed"
    assert targets.TARGETS[3].verdict(None) == "not measured yet"


def test_mla_decode_meets_either_of_its_goals():
    def step(heads, context, speed, share):
        return measured(**LatentDecodeProblem(32, context, heads).columns(), tflops=speed, roof_share=share)

    by_memory, by_products = step(16, 8192, 90.0, 0.88), step(128, 8192, 495.0, 0.5)
    assert value_of([by_memory, by_products, step(16, 1024, 1.0, 0.1)], 4) == pytest.approx(1.1)
    assert value_of([by_memory, step(64, 32768, 225.0, 0.6)], 4) == pytest.approx(0.75)


def test_rows_without_figures_or_without_roofs_are_passed_over():
    steps = [DecodeProblem(32, 8192), LatentDecodeProblem(32, 8192, 128)]
    nothing = [measured(**step.columns()) for step in steps] + [measured(gpu=None)]
    nothing += [
        measured(seqlen_q=n, seqlen_k=n, provider=name) for n in targets.LENGTHS for name in (results.OURS, "x")
    ]
    without_roof = [measured(**step.columns(), tflops=500.0, gbps=1.0) for step in steps]
    for rows in (nothing, without_roof, nothing + without_roof):
        assert targets.judge(rows) == {"a synthetic H200": [None] * len(targets.TARGETS)}
    rows = [*nothing, *without_roof, measured(**steps[0].columns(), tflops=1.0, roof_share=0.9)]
    assert value_of(rows, 3) == 0.9


def test_other_gpus_and_predictions_are_not_judged():
    others = [{"gpu": "NVIDIA A100"}, {"source": results.PREDICTED}, {"dtype": "float16"}]
    assert targets.judge([measured(tflops=1.0, **columns) for columns in others]) == {}
