"""What a call costs on the host, beside the bare launches that it makes."""

import statistics
import time


def median_microseconds(calls, batches=8, rounds=60):
    """{name: median of its CPU time}, all of them timed in turn.

    Of several batches the quietest counts, that with the lowest sum: other processes on the machine disturb the rest.
    """
    medians = [_medians(calls, rounds) for _ in range(1 + batches)][1:]  # the first fills the caches
    return min(medians, key=lambda batch: sum(batch.values()))


def _medians(calls, rounds):
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time_ns()
            call()
            times[name].append(time.thread_time_ns() - start)
    return {name: statistics.median(samples) / 1000 for name, samples in times.items()}
