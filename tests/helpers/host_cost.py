"""Host cost of a call, beside its bare launches."""

import contextlib
import statistics
import sys
import time
from unittest import mock


def median_microseconds(calls, batches=100, rounds=30):
    """{name: the least median of its CPU time over the batches}, all of them timed in turn.

    Other processes slow the machine down temporarily, hence many short batches.
    """
    medians = [_medians(calls, rounds) for _ in range(batches)]
    return {name: min(batch[name] for batch in medians) for name in calls}


def python_calls(call):
    """Calls of Python functions in a call: a measure of host cost that repeats exactly."""
    count = 0

    def count_calls(frame, event, argument):
        nonlocal count
        count += event == "call"

    call()  # what the first call caches
    sys.setprofile(count_calls)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def bare_launches(call, modules):
    """A function that repeats the launches of a call from these modules, with prepared arguments."""
    launches = []

    def record(kernel, grid, device, args, constants):
        launches.append((kernel[grid], args, constants))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", record))
        call()

    def repeat():
        for kernel, args, constants in launches:
            kernel(*args, enable_fp_fusion=True, **constants)

    return repeat


def _medians(calls, rounds):
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time_ns()
            call()
            times[name].append(time.thread_time_ns() - start)
    return {name: statistics.median(samples) / 1000 for name, samples in times.items()}
