"""What a call costs on the host, beside the bare launches that it makes."""

import statistics
import time


def median_microseconds(calls, rounds=300):
    """{name: median of its CPU time}, all of them timed in turn: other processes on the machine change little."""
    times = {name: [] for name in calls}
    for round_number in range(-20, rounds):
        for name, call in calls.items():
            start = time.thread_time_ns()
            call()
            if round_number >= 0:
                times[name].append(time.thread_time_ns() - start)
    return {name: statistics.median(samples) / 1000 for name, samples in times.items()}
