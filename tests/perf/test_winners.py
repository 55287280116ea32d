"""Which config of a sweep wins, and what of it a tuned table keeps."""

import json

import pytest

from perf.commands import sweep
from perf.model.candidates import Candidate
from perf.model.gpus import RATES
from perf.results import MEASURED, PREDICTED, winners
from perf.workloads.problems import DecodeProblem, Problem
from triton_attn._host import tuned
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig

FLASH = {"head_dim": 64, "causal": True}  # the default of its backward pass is the fused schedule
SLOW, FAST, DEEP = FlashConfig(64, 64, 4, 1), FlashConfig(64, 128, 4, 1), FlashConfig(128, 64, 4, 4)


def test_the_default_stays_within_the_noise():
    assert winners.best({SLOW: 96.0, FAST: 100.0}, SLOW, 0.05) == SLOW
    assert winners.best({SLOW: 94.0, FAST: 100.0}, SLOW, 0.05) == FAST
    assert winners.best({SLOW: None, FAST: 100.0}, SLOW, 0.05) == FAST


def test_of_equals_the_preferred_wins():
    figures = {SLOW: 50.0, FAST: 100.0, DEEP: 97.0}
    assert winners.best(figures, SLOW, 0.05, prefer=lambda config: config.num_stages) == DEEP
    assert winners.best(figures, SLOW, 0.02, prefer=lambda config: config.num_stages) == FAST


def test_nothing_wins_where_all_failed():
    assert winners.best({SLOW: None}, SLOW, 0.05) is None
    assert winners.best({}, SLOW, 0.05) is None


def test_a_prediction_knows_memory():
    step = DecodeProblem(32, 8192)
    assert winners.predicted_figure(step, 500.0, "sm_90", 2) == pytest.approx(RATES["sm_90"].memory_gbps)
    slow = winners.predicted_figure(step, 1.0, "sm_90", 2)
    assert slow == pytest.approx(step.bytes(2) / step.flops * 1e3)
    assert winners.predicted_figure(Problem(1, 4096, 16, 128, True), 500.0, "sm_90", 2) == 500.0
    assert winners.predicted_figure(step, None, "sm_100", 2) is None


def candidate(config, family="flash", case=FLASH):
    return Candidate(family, "sm_90", "bfloat16", case, config)


def rows_of(figures, column="lock TFLOP/s", spills=0):
    return [{column: figure, "spills": spills} for figure in figures]


def default_of(kernel=None):
    case = FlashCase("sm_90", winners.torch.bfloat16, 64, 64, True)
    return FlashConfig.default(case) if kernel is None else getattr(BackwardConfig.default(case), kernel)


@pytest.mark.parametrize(("figure", "winner"), [(610.0, FAST), (590.0, FAST), (585.0, "default")])
def test_entries_say_where_they_are_from(figure, winner):
    figures = {default_of(): 560.0, FAST: figure}
    case = [candidate(config) for config in figures], rows_of(figures.values())
    (entry,) = winners.predicted([case], 4096)
    config = default_of() if winner == "default" else winner
    assert FlashConfig(**entry["config"]) == config
    assert entry["figure"] == figures[config]
    assert entry["case"] == {"head_dim": 64, "head_dim_v": 64, "causal": True}
    assert entry["buckets"] == {"seqlen_k": 4096}
    assert (entry["source"], entry["unit"], entry["device"]) == (PREDICTED, "TFLOP/s", "H100 SXM")
    assert entry["triton"] == winners.triton.__version__


@pytest.mark.parametrize(("spills", "of_default", "wins"), [(0, 0, True), (1, 0, False), (4, 4, True), (5, 4, False)])
def test_a_prediction_wins_by_no_spills_outside_the_loop_that_is_modelled(spills, of_default, wins):
    case = (
        [candidate(default_of()), candidate(FAST)],
        rows_of([500.0], spills=of_default) + rows_of([700.0], spills=spills),
    )
    (entry,) = winners.predicted([case], 4096)
    assert FlashConfig(**entry["config"]) == (FAST if wins else default_of())


def backward_cases(dkdv, dq, fused):
    """A case per kernel with one candidate, of the given `lock`."""
    return [
        ([candidate(default_of(kernel), "flash_backward", {"kernel": kernel} | FLASH)], rows_of([lock]))
        for kernel, lock in (("dkdv", dkdv), ("dq", dq), ("fused", fused))
        if lock is not None
    ]


@pytest.mark.parametrize(
    ("locks", "schedule", "figure"),
    [
        ((660.0, 700.0, 640.0), "fused", 640.0),
        ((990.0, 990.0, 680.0), "fused", 680.0),  # split 707, within the noise of the default's schedule
        ((990.0, 990.0, 600.0), "split", 5 / 7 * 990),
    ],
)
def test_kernels_of_a_backward_pass_make_one_entry(locks, schedule, figure):
    assert default_of("fused") is not None
    (entry,) = winners.predicted(backward_cases(*locks), 4096)
    assert entry["figure"] == pytest.approx(figure, rel=1e-3)
    assert (entry["config"]["fused"] is None) == (schedule == "split")
    assert FlashConfig(**entry["config"]["dq"]) == default_of("dq")


def test_a_measured_backward_pass_is_timed_as_a_whole():
    timed = []

    def time_passes(problem, dtype, configs):
        timed.append((problem.seqlen, problem.direction, dtype, sorted(configs)))
        return {"split": 300.0, "fused": 290.0}

    cases = [(candidates, 1024, rows_of([1.0], "tflops")) for candidates, _ in backward_cases(1.0, 1.0, 1.0)]
    (entry,) = winners.measured(cases, time_passes)
    assert timed == [(1024, "backward", "bfloat16", ["fused", "split"])]
    assert (entry["figure"], entry["config"]["fused"], entry["source"]) == (300.0, None, MEASURED)
    assert winners.measured(cases, lambda *_: {"split": None, "fused": None}) == []
    assert winners.measured(cases[:1], time_passes) == [], "dq is missing"
    assert winners.measured(cases[:2], time_passes) == [], "the default is fused, and not among them"


@pytest.fixture
def entry():
    (entry,) = winners.predicted([([candidate(default_of())], rows_of([560.0]))], 4096)
    return entry


def entries(path):
    return tuned.read_table(path)["entries"]


def test_measurements_take_the_place_of_predictions(entry, tmp_path):
    path = tmp_path / "folder" / "sm_90.json"
    winners.update(path, "sm_90", [entry])
    assert entries(path) == [entry]
    measured = [entry | {"source": MEASURED, "buckets": {"seqlen_k": n}} for n in (1024, 16384)]
    other_case = entry | {"case": entry["case"] | {"causal": False}}
    other_triton = entry | {"triton": "2.0.0"}
    winners.update(path, "sm_90", [other_triton, other_case, *measured])
    assert sorted(map(json.dumps, entries(path))) == sorted(map(json.dumps, [other_triton, other_case, *measured]))
    before = path.read_text()
    winners.update(path, "sm_90", [entry])
    assert path.read_text() == before, "a prediction takes no measurement's place"
    better = measured[0] | {"figure": 700.0}
    winners.update(path, "sm_90", [better])
    assert better in entries(path)
    assert measured[0] not in entries(path)
    of_another_gpu = better | {"device": "another GPU", "figure": 800.0}
    winners.update(path, "sm_90", [of_another_gpu])
    assert better in entries(path)
    assert of_another_gpu in entries(path)
    assert [*tmp_path.rglob("*.part")] == []


def test_a_table_that_would_be_broken_is_not_written(entry, tmp_path):
    path = tmp_path / "sm_90.json"
    winners.update(path, "sm_90", [entry])
    before = path.read_text()
    with pytest.raises(ValueError, match="num_warps"):
        winners.update(path, "sm_90", [entry | {"config": entry["config"] | {"num_warps": 3}}])
    assert path.read_text() == before


def test_a_table_of_another_gpu_is_refused_before_anything_is_compiled(entry, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    winners.update(path, "sm_90", [entry])
    monkeypatch.setattr(sweep, "compile_all", None)
    with pytest.raises(ValueError, match=r"--table .*t\.json: expected a table of sm_80, got sm_90"):
        sweep.run(tmp_path, arch="sm_80", table=path)
    with pytest.raises(ValueError, match="--table: expected --dtype bfloat16 or float16"):
        sweep.run(tmp_path, dtype="float32", table=path)
    with pytest.raises(ValueError, match=r"--table: expected a PATH for predicted winners.*, got none, without a GPU"):
        sweep.run(tmp_path, table=sweep.SHIPPED)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json: expected an object with format"):
        sweep.run(tmp_path, table=path)
