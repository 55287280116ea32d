"""The number of splits of the keys of a sequence. Splits are computed in parallel and merged."""

from typing import NamedTuple

from .._host.backend import is_batch_invariant
from .._host.checks import check_length, fail

MAX_SPLITS = 256
FIXED_KEYS = 1024  # keys of a split whose place follows from the sequence alone; tiles of keys divide it
MAX_WORKSPACE_BYTES = 2**28  # of the partial results of such splits

# Rates of an SM and costs of a launch, of an H100. Their ratios decide, and on other GPUs these are similar.
BYTES_PER_NS = 22.0  # an SM's share of 2.9 TB/s, which decode of a full GPU was measured to reach (data sheet: 3.35)
FLOP_PER_NS = 3700.0  # an SM's share of 489 TFLOP/s, measured in the forward pass (data sheet: 989)
PROGRAM_RATE = 15.0  # bytes in a ns that one program of paged attention alone on an SM loads: measured at batch 1
FLOAT8_BYTES = 2.6  # an fp8 element takes a program as long as so many bytes, since it is decoded: measured for MLA
PROGRAM_NS = 1500.0  # a program before its first and after its last tile; an estimate
LAUNCH_NS = 4000.0  # a launch that waits for the one before it; an estimate
RESIDENT_WARPS = 12  # with 168 registers a thread, they fill the register file of an SM
TOLERANCE = 1.05  # the model is not better than that


def check_num_splits(num_splits):
    num_splits = check_length("num_splits", num_splits)
    if num_splits > MAX_SPLITS:
        fail("num_splits", f"0 (chosen) to {MAX_SPLITS}", num_splits)
    return num_splits


def check_batch_invariant(batch_invariant, **splits):
    """Whether a call is batch-invariant. Raises if the caller also says how its keys are split."""
    batch_invariant = is_batch_invariant(batch_invariant)
    if batch_invariant:
        for name, value in splits.items():
            if value:
                fail(name, "0 with batch_invariant, which splits keys by their positions", value)
    return batch_invariant


class SplitWork(NamedTuple):
    """What the number of splits depends on."""

    num_programs: int  # of a split
    num_key_tiles: int  # of the longest sequence
    tile_elements: int  # keys and values that a program loads for one tile
    element_size: int
    program_rate: float  # bytes that one program alone on an SM loads in a nanosecond
    tile_flops: int
    num_rows: int  # of the results
    row_elements: int  # of a row of the results
    num_sms: int
    resident: int  # programs that fit on an SM
    has_merge: bool = False  # a launch follows even with one split


def resident_programs(shared_bytes, config, gpu):
    """Programs of a config that fit on an SM, if one takes so many bytes of shared memory."""
    return max(1, min(gpu.shared_bytes // max(shared_bytes, 1), RESIDENT_WARPS // config.num_warps))


def choose_num_splits(work):
    """The fewest splits whose `split_cost` is within 5 % of the least.

    num_key_tiles is computed from the capacity of the cache, not from cache_seqlens: no device-to-host sync, and a
    captured graph stays right as sequences grow.
    """
    if work.num_programs == 0 or work.num_key_tiles == 0:
        return 1
    costs = {}
    longest = None
    for num_splits in range(1, min(MAX_SPLITS, work.num_key_tiles) + 1):
        shorter = -(-work.num_key_tiles // num_splits)
        if shorter != longest:  # otherwise only more splits without keys
            longest = shorter
            costs[num_splits] = split_cost(work, num_splits)
    enough = TOLERANCE * min(costs.values())
    return next(num_splits for num_splits, cost in costs.items() if cost <= enough)


def fixed_splits(work, num_keys):
    """(number of splits of FIXED_KEYS keys, whether one program computes all splits of its rows, in order).

    Both ways give the same bits. The first has one program for every split, and a merge. The number grows with the
    capacity: the second is chosen where it costs less, or where partial results would need too much memory.
    """
    num_splits = max(1, -(-num_keys // FIXED_KEYS))
    if num_splits == 1:  # of a cache without room for a key there is no cost
        return 1, False
    in_turn = split_cost(work, 1) <= split_cost(work, num_splits)
    num_bytes = num_splits * work.num_rows * 4 * (work.row_elements + 1)
    return num_splits, in_turn or num_bytes > MAX_WORKSPACE_BYTES


def split_cost(work, num_splits):
    """Nanoseconds of a call with so many splits.

        cost     = sum of waves + merge
        wave     = PROGRAM_NS + tiles of the longest split * max(its loads, its matmuls)
        loads    = max(bytes of a tile * programs / bandwidth, bytes of a tile / rate of one program)
        matmuls  = FLOP of a tile * programs on the fullest SM / rate of an SM
        merge    = LAUNCH_NS + max(2 * bytes of the partial results / bandwidth, those of a row / rate of one program)

    A wave has as many programs as fit on the GPU, the last one the rest. Without splits there is no merge. Partial
    results are a row of outputs and a log-sum-exp in fp32 for every row and split, written and read. They are not in
    the dtype of q: the partial outputs of splits may cancel, and their rounding errors would not. A split has whole
    tiles, so that the last splits may have no keys. The cost leaves out the L2 cache, and that sequences may be shorter
    than the capacity.
    """
    longest = -(-work.num_key_tiles // num_splits)
    num_programs = work.num_programs * -(-work.num_key_tiles // longest)
    full, rest = divmod(num_programs, work.num_sms * work.resident)
    cost = full * _wave(work, work.num_sms * work.resident, longest)
    if rest:
        cost += _wave(work, rest, longest)
    return cost + _merge(work, num_splits)


def _wave(work, num_programs, num_tiles):
    elements, bandwidth = work.tile_elements, BYTES_PER_NS * work.num_sms
    loads = max(
        elements * work.element_size * num_programs / bandwidth,
        elements * (FLOAT8_BYTES if work.element_size == 1 else work.element_size) / work.program_rate,
    )
    matmuls = work.tile_flops * -(-num_programs // work.num_sms) / FLOP_PER_NS
    return PROGRAM_NS + num_tiles * max(loads, matmuls)


def _merge(work, num_splits):
    if num_splits == 1:
        return LAUNCH_NS if work.has_merge else 0.0
    of_row = num_splits * 4 * (work.row_elements + 1)
    return LAUNCH_NS + max(2 * of_row * work.num_rows / (BYTES_PER_NS * work.num_sms), of_row / work.program_rate)
