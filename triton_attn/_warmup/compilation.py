"""Compile the kernels that jobs launch, one by one, in this process or in several."""

import concurrent.futures
import contextlib
import multiprocessing

import torch
import triton

from .._host.tuned import settings, take_settings
from ..toolchain import record_specializations

KERNELS_PER_TASK = 4


def compile_all(jobs, arch, num_workers, report):
    """(kernels compiled, kernels found in the cache). A job is (function, workload), and runs function(workload)."""
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
        raise RuntimeError(
            f"{total - num_done} of {total} kernels were not found again in the worker processes and not compiled"
        )
    return num_done - num_cached, num_cached


def _choose_as_here(matmul_precision, *tables_and_overrides):
    """The state of the first process that decides which kernels a call uses."""
    take_settings(*tables_and_overrides)
    torch.set_float32_matmul_precision(matmul_precision)


def _tasks(jobs, arch):
    """[(arch, job, some kernels of its calls)]. Every kernel of all jobs occurs once."""
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
    """[(name of the kernel, seconds, whether it was in the cache)]."""
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
    """Build the C launcher of a kernel, which Triton before 3.8 builds at the first launch and keeps in its disk cache.

    It is linked with the GPU's driver. Without a GPU it is left to the first launch.
    """
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:  # no GPU
        return
    for kernel in kernels:
        if kernel.metadata.target.backend == driver.get_current_target().backend:
            driver.launcher_cls(kernel.src, kernel.metadata)
