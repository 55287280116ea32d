"""A trip on its timeline: the cost of each wait, and what overlaps with it."""

import pytest
from sass_listing import listing

from perf.model import sass, timeline
from perf.model.gpus import RATES
from perf.model.loop_model import LoopModel
from perf.model.timeline import Waits, sm_cycles, trip_cycles

WAITS = Waits(latency=500, barrier=50, stretch=1.0)
LOAD = "UTMALDG.5D [UR8], [UR16] | 1"
HERE = "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR4+0x10000], RZ | 1"
MATMUL = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 | 1"  # 64 cycles
DONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0 | 1"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0 | 1"
WORK = "FADD R1, R1, R2 | 10"


def steps_of(*body):
    text = "\n".join([".L_x_1:", *body, "@P0 BRA `(.L_x_1) | 1"])
    instructions, labels = sass.parse(listing(text))["kernel"]
    (loop,) = sass.find_mma_loops(instructions, labels)
    return LoopModel(loop, RATES["sm_90"]).steps


def trip(*body, num_stages=2, warpgroups=1, waits=WAITS):
    return trip_cycles(steps_of(*body), warpgroups, num_stages, waits)


def test_the_time_of_a_trip_is_that_of_its_stalls_and_matmuls():
    assert trip(MATMUL, DONE) == 1 + 64 + 1, "the wait's own issue hides behind the matmul"
    assert trip(MATMUL, DONE, *5 * [WORK]) == 1 + 64 + 50 + 1


def test_a_matmul_without_a_wait_hides_behind_work():
    assert trip(MATMUL, *10 * [WORK]) == 1 + 100 + 1


@pytest.mark.parametrize(("pending", "cycles"), [("0x0", 66), ("0x1", 64)])
def test_a_wait_lets_the_last_groups_be(pending, cycles):
    assert trip(MATMUL, f"WARPGROUP.DEPBAR.LE gsb0, {pending} | 1") == cycles


def test_a_load_is_waited_for_the_less_the_more_stages_there_are():
    body = [HERE, MATMUL, DONE, *20 * [WORK], LOAD]
    one, two, three = (trip(*body, num_stages=stages) for stages in (1, 2, 3))
    without = trip(MATMUL, DONE, *20 * [WORK])
    assert two == pytest.approx(500 + without, abs=5), "issued at the end, waited for at once"
    assert three < two
    assert three == pytest.approx(max(without, (500 + without) / 2), abs=5), "twice the latency is spread over two"
    early = trip(LOAD, HERE, MATMUL, DONE, num_stages=1)
    assert early == pytest.approx(500 + 66, abs=5), "one stage waits from issue to arrival"
    assert one >= without


def test_groups_of_cp_async_are_counted():
    body = ["LDGSTS.E.128 [R1], [R2] | 1", "LDGDEPBAR | 1", "DEPBAR.LE SB0, {} | 1", MATMUL, DONE]
    at_once, later = (trip(*[line.format(pending) for line in body]) for pending in ("0x0", "0x1"))
    assert at_once == pytest.approx(500 + 66, abs=5)
    assert later == pytest.approx(500 / 2 + 66 / 2, abs=40)
    assert later < at_once


def test_a_barrier_costs_its_cycles():
    assert trip(MATMUL, DONE, BARRIER) - trip(MATMUL, DONE) == 50 + 1


def test_warpgroups_of_a_cta_share_the_tensor_cores():
    assert trip(MATMUL, DONE, warpgroups=2) == 1 + 128 + 2, "and the issue slots"


def test_other_ctas_fill_waits_but_not_units():
    waiting = steps_of(LOAD, HERE, MATMUL, DONE)
    one, two = (sm_cycles(waiting, 1, ctas, 1, WAITS) for ctas in (1, 2))
    assert one < two < 1.05 * one, "each waits 500 of 570 cycles"
    busy = steps_of(*10 * [MATMUL], DONE)
    assert sm_cycles(busy, 1, 2, 1, WAITS) >= 2 * 640


def test_one_cta_is_as_fast_as_its_trip():
    steps = steps_of(LOAD, HERE, MATMUL, DONE)
    assert sm_cycles(steps, 1, 1, 1, WAITS) == trip_cycles(steps, 1, 1, WAITS)


def test_constants_are_of_architectures_whose_rates_are_known():
    assert set(timeline.WAITS) <= set(RATES)
