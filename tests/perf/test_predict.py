import pytest

from perf import predict
from perf.problems import Problem, grid


def problem(seqlen, causal, batch=1, num_heads=1, head_dim=128):
    return Problem(batch, seqlen, num_heads, head_dim, causal)


@pytest.mark.parametrize(
    ("seqlen", "causal", "tile", "trips"),
    [
        (256, False, (128, 128), [(2, 0), (2, 0)]),
        (256, False, (128, 64), [(4, 0), (4, 0)]),
        (300, False, (128, 128), [(2, 1)] * 3),
        (256, True, (128, 128), [(0, 1), (1, 1)]),
        (256, True, (128, 64), [(0, 2), (2, 2)]),
        (256, True, (64, 128), [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (200, True, (128, 64), [(0, 2), (2, 2)]),
    ],
)
def test_trips_of_each_query_tile(seqlen, causal, tile, trips):
    assert predict.tile_trips(problem(seqlen, causal), *tile) == trips


def test_longest_programs_are_dealt_first():
    assert predict.makespan([1, 1, 2, 2, 3], slots=2) == 5
    assert predict.makespan([4, 1], slots=132) == 4
    assert predict.makespan([1.0] * 133, slots=132) == 2


def test_a_full_wave_without_mask_runs_at_the_rate_of_the_loop():
    full = problem(4096, causal=False, num_heads=132)
    assert predict.tflops(full, 128, 128, 132, interior_rate=600, masked_rate=1) == pytest.approx(600)


def test_a_program_too_many_costs_a_wave():
    one_tile = problem(128, causal=False, num_heads=133)
    assert predict.tflops(one_tile, 128, 128, 132, 600, 600) == pytest.approx(600 * 133 / 264)


def test_masked_tiles_cost_whole_trips_at_their_own_rate():
    # one head, two tiles on one slot: three trips, two of them masked, for half of four trips' FLOP
    causal = problem(256, causal=True)
    assert predict.tflops(causal, 128, 128, 1, 600, 300) == pytest.approx(600 * 2 / (1 + 2 * 2))


def test_causal_approaches_the_rate_of_the_loop_with_length():
    rates = [predict.tflops(p, 128, 128, 132, 600, 600) for p in grid([128], causal=[True])]
    assert rates == sorted(rates)
    assert 0.95 * 600 < rates[-1] < 600


def test_flops_and_bytes_follow_the_convention():
    full, causal = problem(512, False, 2, 3, 64), problem(512, True, 2, 3, 64)
    assert full.flops == 4 * 2 * 3 * 512 * 512 * 64 == 2 * causal.flops
    assert full.bytes(element_size=2) == 4 * (2 * 512 * 3 * 64) * 2
    assert {(p.batch * p.seqlen, p.num_heads * p.head_dim) for p in grid()} == {(16384, 2048), (32768, 2048)}


def test_a_backward_pass_counts_two_and_a_half_forwards_and_its_kernels_add_up():
    forward, backward = (Problem(1, 4096, 132, 128, False, direction) for direction in ("forward", "backward"))
    assert backward.flops == 2.5 * forward.flops
    fused = predict.seconds(backward, 128, 64, 5, 132, 600, 600)
    assert backward.flops / fused / 1e12 == pytest.approx(600)
    split = predict.seconds(backward, 128, 64, 4, 132, 600, 600) + predict.seconds(backward, 64, 128, 3, 132, 600, 600)
    assert split == pytest.approx(fused * 7 / 5)
