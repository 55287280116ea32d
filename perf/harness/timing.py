"""GPU time: events around each call, a cold L2 cache, median and percentiles.

Before the first event the GPU sleeps longer than the host takes to launch the call. The whole call is then queued, and
the time between the events is GPU time alone, however short the kernels are.
"""

import statistics
import time
from dataclasses import dataclass

import torch

SETTLED_ROUNDS = 5  # after this many rounds, functions that are clearly behind are dropped
L2_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2 cache
CYCLES_PER_MS = 2_000_000  # above any GPU's clock, so that this many cycles take at least a millisecond
MIN_SLEEP_MS, MAX_SLEEP_MS = 0.05, 5.0  # a call that waits for the GPU makes the host's launch time look long


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def time_interleaved(functions, rounds=30, warmup=3, behind=None):
    """{name: Percentiles} of {name: function}. Every round calls each once, so that clock drift affects all alike.

    With `behind`, e.g. 1.2, a function whose p20 is above 1.2 times the least median is not called in further rounds.
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
    """Sleep for twice the time that the host takes to launch the call."""
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
