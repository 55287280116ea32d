"""Throughput against sequence length, predicted from compiled code for a GPU that need not be there.

The loop model (`perf/loop_model.py`) says at what rate an SM runs the hot loop. A whole pass is slower for two
reasons that follow from the shape alone, and both are counted here:

    masked tiles   A query tile of block_m rows walks ceil(visible keys / block_n) key tiles, and tiles that a boundary
                   crosses cost a whole trip of the masked loop. Only visible pairs count as work.
    waves          Programs are dealt, longest first, to num_sms * ctas_per_sm slots; the last slot to finish ends it.

    TFLOP/s = visible FLOP / time of the last slot;   time of a trip = FLOP of a trip * slots / rate of its loop

Left out: memory, latency of copies, barriers, power, prologue and epilogue. A measurement comes out lower.
"""

import heapq
from dataclasses import dataclass

import torch
from tqdm import tqdm

from perf import compiled, loop_model
from perf.device import versions
from perf.gpus import RATES
from perf.results import OURS, PREDICTED, Row


def tile_trips(problem, block_m, block_n):
    """(interior, masked) trips of each query tile of one head."""
    trips = []
    for start in range(0, problem.seqlen, block_m):
        end = min(start + block_m, problem.seqlen)
        seen_by_last = end if problem.causal else problem.seqlen
        seen_by_all = start + 1 if problem.causal else problem.seqlen
        interior = seen_by_all // block_n
        trips.append((interior, -(-seen_by_last // block_n) - interior))
    return trips


def makespan(durations, slots):
    """When the last slot is done, if durations are dealt longest first, each to the slot that is free first."""
    free_at = [0.0] * min(slots, len(durations))
    for duration in sorted(durations, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def tflops(problem, block_m, block_n, slots, interior_rate, masked_rate):
    """TFLOP/s of a whole forward, from the rates (TFLOP/s) at which the two loops run with every slot busy."""
    return problem.flops / seconds(problem, block_m, block_n, 2, slots, interior_rate, masked_rate) / 1e12


def seconds(problem, own_rows, other_rows, products, slots, interior_rate, masked_rate):
    """Time of a kernel whose programs own tiles of own_rows and walk tiles of other_rows, some products at each."""
    flops_per_trip = 2 * products * own_rows * other_rows * problem.head_dim
    interior, masked = (flops_per_trip * slots / (rate * 1e12) for rate in (interior_rate, masked_rate))
    # Keys see their queries as queries their keys, from the other end: the trips are the same.
    durations = [a * interior + b * masked for a, b in tile_trips(problem, own_rows, other_rows)]
    return makespan(durations * (problem.num_heads * problem.batch), slots)


def loop_rates(report):
    """{"bound": (interior, masked), "lock": (interior, masked)} in TFLOP/s; a kernel with one loop has one rate."""
    warpgroups = report.mma_warpgroups_per_sm
    others = [loop for loop in report.loops if loop is not report.hot and loop.flops == report.hot.flops]
    masked = max(others, key=lambda loop: loop.instructions, default=report.hot)
    return {
        "bound": (report.hot.bound(), masked.bound()),
        "lock": (report.hot.lock(warpgroups), masked.lock(warpgroups)),
    }


def flash(problems, dtype, arch):
    """Rows of `bound` and `lock` for each problem, our default configs compiled for `arch`."""
    kernels = {}
    gpu = RATES[arch]
    for problem in tqdm(problems, desc=f"predicting for {arch}", unit="shape"):
        kind = problem.head_dim, problem.causal, problem.direction
        if kind not in kernels:
            kernels[kind] = _kernels(arch, getattr(torch, dtype), *kind)
        for model in ("bound", "lock"):
            time = sum(
                seconds(problem, *kernel.rows, kernel.products, gpu.num_sms * kernel.ctas_per_sm, *kernel.rates[model])
                for kernel in kernels[kind]
            )
            yield Row(
                **problem.columns(),
                dtype=dtype,
                provider=f"{OURS}, {model}",
                tflops=problem.flops / time / 1e12,
                gpu=f"{gpu.name} at {gpu.clock_ghz} GHz",
                **versions(),
                source=PREDICTED,
                note=", ".join(kernel.name for kernel in kernels[kind]),
            )


@dataclass(frozen=True)
class Kernel:
    """What the prediction needs of one compiled kernel; `rows` are those of its own tile and of the one it walks."""

    name: str
    rows: tuple[int, int]
    products: int
    ctas_per_sm: int
    rates: dict


def _kernels(arch, dtype, head_dim, causal, direction):
    forward = [compiled.flash_forward(arch, dtype, head_dim, causal=causal)] if direction != "backward" else []
    backward = compiled.flash_backward(arch, dtype, head_dim, causal=causal) if direction != "forward" else []
    dkdv_products = 5 if len(backward) == 1 else 4
    return [_kernel(launch, dkdv_products) for launch in forward + backward]


def _kernel(launch, dkdv_products):
    config, report = compiled.config_of(launch), loop_model.analyze(launch.kernel)
    rows, products = {
        "_flash_fwd_kernel": ((config.block_m, config.block_n), 2),
        "_flash_bwd_dq_kernel": ((config.block_m, config.block_n), 3),
        "_flash_bwd_dkdv_kernel": ((config.block_n, config.block_m), dkdv_products),
    }[launch.name]
    name = f"{launch.name.removeprefix('_flash_').removesuffix('_kernel')} {compiled.config_name(config)}"
    return Kernel(name, rows, products, report.ctas_per_sm, loop_rates(report))
