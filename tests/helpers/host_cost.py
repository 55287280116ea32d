"""Host cost of a call, beside its bare launches."""

import contextlib
import ctypes
import os
import statistics
import sys
import time
from unittest import mock

from triton_attn.toolchain import compilation, compile_only
from triton_attn.toolchain.emulator import stub

# How much larger a ratio of times may be than where it was measured: under load, and on other processors, the same call
# was found up to 1.15 times as long beside the same launches. What a change adds is seen by `python_calls`, exactly.
ELSEWHERE = 1.4


def median_microseconds(calls, batches=100, rounds=30):
    """{name: the least median of its CPU time over the batches}, all of them timed in turn.

    Other processes slow the machine down temporarily, hence many short batches.
    """
    medians = [_medians(calls, rounds) for _ in range(batches)]
    return {name: min(batch[name] for batch in medians) for name in calls}


def compare(call, other, batches=20, rounds=30):
    """(microseconds of a call, those of another, their ratio): medians over batches in which the two take turns.

    The ratio is that of times in one batch, which ran at one speed of the machine.
    """
    medians = [_medians({"call": call, "other": other}, rounds) for _ in range(batches)]
    ratio = statistics.median(batch["call"] / batch["other"] for batch in medians)
    return *(statistics.median(batch[name] for batch in medians) for name in ("call", "other")), ratio


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

    def record(kernel, grid, device, args, constants, alike=None):
        launches.append((kernel[grid], args, constants))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", record))
        call()

    def repeat():
        for kernel, args, constants in launches:
            kernel(*args, enable_fp_fusion=True, **constants)

    return repeat


@contextlib.contextmanager
def real_launcher(arch):
    """`compile_only` with Triton's own launcher, over a stub of libcuda whose launches do nothing."""
    library = stub.library()
    slot = ctypes.c_void_p.in_dll(library, "stub_launch")
    nothing = ctypes.cast(library.cuInit, ctypes.c_void_p).value  # returns 0, as a launch without a fault does
    with mock.patch.dict(os.environ, STUB_ARCH=arch.removeprefix("sm_")), compile_only(arch, driver=_RealLauncher):
        slot.value = nothing
        try:
            yield
        finally:
            slot.value = None


class _RealLauncher(compilation._Driver):
    def __init__(self, arch, every_launch):
        super().__init__(arch, every_launch)
        self.nvidia = stub.nvidia_driver()
        self.cuda, self.names = self.nvidia.CudaUtils(), []

    def __getattr__(self, name):
        if name == "cuda":  # not there yet
            raise AttributeError(name)
        return getattr(self.cuda, name)

    def load_binary(self, name, binary, shared, device):
        self.names.append(ctypes.create_string_buffer(name.encode()))  # the stub's functions are their names
        return 1, ctypes.addressof(self.names[-1]), 0, 0, 1024

    def launcher_cls(self, src, metadata):
        compiled = src.fn.device_caches[self.device][0].values()
        self.kernels.append(next(kernel for kernel in compiled if kernel.src is src))
        return self.nvidia.CudaLauncher(src, metadata)


def _medians(calls, rounds):
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time_ns()
            call()
            times[name].append(time.thread_time_ns() - start)
    return {name: statistics.median(samples) / 1000 for name, samples in times.items()}
