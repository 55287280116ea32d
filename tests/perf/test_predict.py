import pytest

from perf.model import predict
from perf.model.gpus import L2_BYTES_PER_CLOCK, RATES
from perf.results import baseline
from perf.workloads.problems import BATCHES, DecodeProblem, Problem, decode_grid, grid


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
    assert predict.tflops(full, 128, 128, 132, full_rate=600, masked_rate=1) == pytest.approx(600)


def test_a_program_too_many_costs_a_wave():
    one_tile = problem(128, causal=False, num_heads=133)
    assert predict.tflops(one_tile, 128, 128, 132, 600, 600) == pytest.approx(600 * 133 / 264)


def test_masked_tiles_cost_whole_trips_at_their_own_rate():
    # one head, two tiles on one slot: three trips, two of them masked, for half of the FLOP of four trips
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


def kernel(rows=(128, 128), tensors=4, sums=False, **counts):
    return predict.Kernel("", rows, matmuls=2, ctas_per_sm=1, rates={}, tensors=tensors, sums=sums, counts=counts)


def test_a_kernel_takes_no_less_time_than_its_memory():
    gpu, full = RATES["sm_90"], problem(256, causal=False, num_heads=3)
    tensor = 3 * 256 * 128 * 2
    memory, l2 = gpu.memory_gbps * 1e9, L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e9
    seconds = predict.memory_seconds(full, kernel(), 2, gpu)
    assert seconds == pytest.approx(4 * tensor / memory), "DRAM: every tensor once"
    assert predict.memory_seconds(full, kernel(read=1.5), 2, gpu) == pytest.approx(1.5 * seconds)
    assert predict.memory_seconds(full, kernel(tensors=6, sums=True), 2, gpu) == pytest.approx(10 * tensor / memory)
    tiles = 16 * 2 * tensor  # of 16 rows: each visits all keys and values
    assert predict.memory_seconds(full, kernel((16, 128)), 2, gpu) == pytest.approx(tiles / l2), "L2: all trips' tiles"
    assert predict.memory_seconds(full, kernel((16, 128), sectors=2.0), 2, gpu) == pytest.approx(2 * tiles / l2)


def test_counts_are_those_of_the_kernel_and_its_config():
    rows = [row for row in baseline.COUNTED.read() if row["family"] == "mla"]
    if not rows:
        pytest.skip("no counts of this triton")
    (row,) = (x for x in rows if x["arch"] == "sm_90" and "num_heads=128 cache_dtype=float8" in x["case"])
    shape = {"num_heads": 128, "cache_dtype": "float8_e4m3fn", "page_size": 64}
    which = row["arch"], row["dtype"], row["kernel"]
    assert baseline.counts_of(*which, row["config"], shape) == row
    assert row["wavefronts"] > 1
    assert baseline.counts_of(*which, "16x16 w1 s1", shape) == {}
    assert baseline.counts_of(*which, row["config"], shape | {"page_size": 1}) == {}


def test_decode_counts_the_bytes_of_the_cache_and_leaves_out_what_is_too_large():
    step = DecodeProblem(batch=3, seqlen_k=1024)
    assert step.bytes(element_size=2) == 2 * (2 * 3 * 1024 * 8 * 128 + 2 * 3 * 32 * 128)
    assert step.bytes(element_size=1) == step.bytes(element_size=2) // 2
    contexts = {batch: max(p.seqlen_k for p in decode_grid() if p.batch == batch) // 1024 for batch in BATCHES}
    assert contexts == {1: 128, 8: 128, 32: 64, 128: 16}, "up to 8 GiB of 4 KiB per token"


ON_16_SMS = dict(block_m=16, block_n=64, num_sms=16, resident=1, element_size=2)


@pytest.mark.parametrize(
    ("batch", "seqlen_k", "num_splits", "trips"),
    [
        (2, 640, 1, [10] * 16),  # 16 programs fill 16 SMs
        (1, 640, 2, [5] * 16),
        (1, 600, 2, [5] * 16),  # the tenth tile is partial, and counts as one
        (1, 576, 2, [5, 4] * 8),
        (1, 64, 1, [1] * 8),  # one tile cannot be split
    ],
)
def test_splits_and_their_trips(batch, seqlen_k, num_splits, trips):
    step = DecodeProblem(batch, seqlen_k)
    assert predict.split_trips(step, **ON_16_SMS) == (num_splits, trips)


@pytest.mark.parametrize("seqlen_k", [1, 64, 1000, 1024, 2048, 4096, 5000, 2**17])
def test_no_split_is_without_keys(seqlen_k):
    for batch in (1, 2, 5, 32):
        _, trips = predict.split_trips(DecodeProblem(batch, seqlen_k), **ON_16_SMS | {"num_sms": 132, "resident": 3})
        assert min(trips) >= 1
        assert sum(trips) == batch * 8 * -(-seqlen_k // 64)


def test_more_rows_than_a_tile_make_more_programs():
    _, trips = predict.split_trips(DecodeProblem(1, 64, num_heads_kv=1), **ON_16_SMS)
    assert trips == [1, 1]


def test_a_decode_step_waits_for_memory_or_for_the_loop():
    step = DecodeProblem(batch=1, seqlen_k=1024)
    num_bytes = 2 * (2 * 1024 * 8 * 128 + 2 * 32 * 128)
    assert predict.decode_seconds(step, 2, 1, loop_seconds=1e-6, bytes_per_second=1e12) == (num_bytes / 1e12, "memory")
    assert predict.decode_seconds(step, 2, 1, loop_seconds=1e-3, bytes_per_second=1e12) == (1e-3, "the loop")


def test_splits_are_written_and_read_again():
    step = DecodeProblem(batch=1, seqlen_k=1024)
    parts = 10 * 32 * (128 + 1) * 4 / 1e12
    whole, _ = predict.decode_seconds(step, 2, 1, loop_seconds=0, bytes_per_second=1e12)
    time, limit = predict.decode_seconds(step, 2, 10, loop_seconds=0, bytes_per_second=1e12)
    assert (time, limit) == (pytest.approx(whole + 2 * parts), "memory")
    time, limit = predict.decode_seconds(step, 2, 10, loop_seconds=1e-3, bytes_per_second=1e12)
    assert (time, limit) == (pytest.approx(1e-3 + parts), "the loop")


@pytest.mark.compiled
@pytest.mark.parametrize("arch", RATES)
def test_long_contexts_are_predicted_to_wait_for_memory(arch):
    rows = list(predict.paged([DecodeProblem(8, 1024), DecodeProblem(8, 131072)], "bfloat16", arch))
    assert [row.provider for row in rows] == ["triton_attn, bound", "triton_attn, lock"] * 2
    short, _, *long = rows
    for row in long:
        assert "limited by memory" in row.note
        assert 0.99 < row.roof_share < 1
        assert row.gbps == pytest.approx(row.roof_share * RATES[arch].memory_gbps)
        assert RATES[arch].memory_gpu in row.gpu
    assert short.roof_share < long[0].roof_share, "splits weigh more there"
