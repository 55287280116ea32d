"""Compiling what jobs launch, kernel by kernel, in this process or in several."""

import concurrent.futures
import contextlib
import multiprocessing

import torch
import triton

from .._host.tuned import settings, take_settings
from ..toolchain import record_specializations

KERNELS_PER_TASK = 4


def compile_all(jobs, arch, num_workers, report):
    """(kernels compiled, kernels that the cache had). A job is (function, workload): it calls one for the other."""
    tasks = _tasks(jobs, arch)
    total = sum(len(kernels) for *_, kernels in tasks)
    num_done = num_cached = 0
    with contextlib.ExitStack() as stack:
        run = map
        if num_workers > 1:
            pool = concurrent.futures.ProcessPoolExecutor(
                num_workers,
                multiprocessing.get_context("spawn"),
                initializer=_choose_as_here,
                initargs=(torch.get_float32_matmul_precision(), *settings()),
            )
            run = stack.enter_context(pool).map
        for outcomes in run(_compile_task, tasks):
            for name, seconds, was_cached in outcomes:
                num_done += 1
                num_cached += was_cached
                if report is not None:
                    report(f"{num_done}/{total} {name}: {'in the cache' if was_cached else f'{seconds:.1f} s'}")
    if num_done != total:
        raise RuntimeError(f"{total - num_done} of {total} kernels were not met again, and not compiled")
    return num_done - num_cached, num_cached


def _choose_as_here(matmul_precision, *tables_and_overrides):
    """What of the state of the first process decides which kernels a call takes."""
    take_settings(*tables_and_overrides)
    torch.set_float32_matmul_precision(matmul_precision)


def _tasks(jobs, arch):
    """[(arch, job, a few kernels that its calls launch)]: every kernel of all jobs once."""
    tasks, known = [], set()
    for job in jobs:
        with record_specializations(arch) as met:
            call, work = job
            call(work)
        kernels = [kernel for kernel in met if kernel not in known]
        known.update(kernels)
        starts = range(0, len(kernels), KERNELS_PER_TASK)
        tasks += [(arch, job, kernels[start : start + KERNELS_PER_TASK]) for start in starts]
    return tasks


def _compile_task(task):
    """[(name of a kernel, seconds, whether the cache had it)]."""
    arch, (call, work), kernels = task
    outcomes = []

    def listen(*, src, times, cache_hit, **_):
        outcomes.append((src.name, times.total / 1e6, cache_hit))

    config = triton.knobs.compilation
    previous = config.listener
    config.listener = listen
    try:
        with record_specializations(arch, compiled=set(kernels)):
            call(work)
            launches = triton.runtime.driver.active.launches
    finally:
        config.listener = previous
    _build_launchers({launch.kernel.hash: launch.kernel for launch in launches}.values())
    return outcomes


def _build_launchers(kernels):
    """What Triton before 3.8 has a C compiler make at the first launch of a kernel, and keeps in its cache on disk.

    It is linked with the GPU's driver, and so left to the first launch where there is none.
    """
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:  # no GPU
        return
    for kernel in kernels:
        if kernel.metadata.target.backend == driver.get_current_target().backend:
            driver.launcher_cls(kernel.src, kernel.metadata)
