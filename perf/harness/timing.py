"""Time on a GPU: events around each call, a cold L2 cache, median with the spread around it.

The GPU sleeps before the first event for longer than the host takes to launch the call: all of it is queued by then,
and what lies between the events is the GPU's time alone, however short the kernels are.
"""

import statistics
import time
from dataclasses import dataclass

import torch

SETTLED_ROUNDS = 5  # after as many, who is clearly behind is
L2_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2 cache
CYCLES_PER_MS = 2_000_000  # no GPU's clock is much faster: so many take a millisecond or more
MIN_SLEEP_MS, MAX_SLEEP_MS = 0.05, 5.0  # a call that waits for the GPU seems to take the host as long


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def time_interleaved(functions, rounds=30, warmup=3, behind=None):
    """{name: Percentiles} of {name: function}: every round calls each once, so that a drifting clock hits all alike.

    With `behind`, say 1.2, a function whose p20 is above 1.2 times the least median is not called in further rounds.
    """
    scratch = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    cycles = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        cycles[name] = round(CYCLES_PER_MS * _sleep_ms(function))
    times = {name: [] for name in functions}
    racing = list(functions)
    for done in range(1, rounds + 1):
        events = {}
        for name in racing:
            scratch.zero_()
            start, end = events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(cycles[name])
            start.record()
            functions[name]()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end))
        if behind is not None and done >= SETTLED_ROUNDS and racing:
            so_far = {name: percentiles(times[name]) for name in racing}
            limit = behind * min(taken.p50 for taken in so_far.values())
            racing = [name for name in racing if so_far[name].p20 <= limit]
    return {name: percentiles(values) for name, values in times.items()}


def _sleep_ms(function):
    """Twice as long as the host takes to launch the call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    launched = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(max(2 * launched, MIN_SLEEP_MS), MAX_SLEEP_MS)


def time_one(function, rounds=30):
    return time_interleaved({"": function}, rounds)[""]


def percentiles(values):
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Percentiles(cuts[1], cuts[4], cuts[7])
