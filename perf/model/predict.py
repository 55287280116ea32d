"""Throughput, predicted from compiled code for a GPU that need not be there.

The loop model (`perf/model/loop_model.py`) says at what rate an SM runs the hot loop. A whole pass of prefill or
training is slower for two reasons that follow from the shape alone, and both are counted here:

    masked tiles   A query tile of block_m rows walks ceil(visible keys / block_n) key tiles, and tiles that a boundary
                   crosses cost a whole trip of the masked loop. Only visible pairs count as work.
    waves          Programs are dealt, longest first, to num_sms * ctas_per_sm slots; the last slot to finish ends it.

    TFLOP/s = visible FLOP / time of the last slot;   time of a trip = FLOP of a trip * slots / rate of its loop

A kernel takes no less time than its memory does: DRAM for its tensors once, L2 for the tiles of all trips,

    time >= max(bytes of tensors * read / bandwidth, bytes of tiles * sectors / (5120 B * clock))

where `read` and `sectors` are what the emulator counted of the kernel over what it must (perf/commands/counts.py), and
shared memory has the bank conflicts that it counted. Of flash attention's defaults `read` and `sectors` are 1, so that
what is new is: DRAM limits causal attention of 512 tokens on an H100 to 429 TFLOP/s, where the loop alone had up to
755; the L2 cache limits nothing; the conflicts of a fused backward pass, at the store of dQ, cost 6 % (`lock`) to 9 %
(`bound`) at head dim 64. A decode step over an fp8 latent cache loses 7 to 12 % with 128 heads and 18 to 30 % with 16
on sm_90.

Left out: latency of copies, barriers, power, prologue and epilogue. A measurement comes out lower.

A decode step reads its cache once and ends when memory or the loop does, whichever is slower; parts of split keys are
written, and read again to be merged:

    time = max((bytes + parts) / bandwidth, time of the last slot) + parts / bandwidth

with the number of splits that a user gets, and the bandwidth of the data sheet. A tile that is not full counts as one.
A program that is alone on its SM has it for itself: as many are resident as share the SM.

Left out: launches, which decide short contexts, every latency, what memory reaches of its data sheet, and the L2
cache, where small parts stay. A measurement comes out lower.

The schedules of MLA's prefill are not compiled: their time is the cost that `triton_attn.mla_prefill` chooses by, at
the dense rate of the GPU.
"""

import heapq
from dataclasses import dataclass
from functools import cache

import torch
from tqdm import tqdm

from perf.harness.device import versions
from perf.model import compiled, loop_model
from perf.model.gpus import L2_BYTES_PER_CLOCK, RATES
from perf.results import MODELLED, OURS, PREDICTED, Row
from perf.results.baseline import counts_of
from perf.workloads.providers import SCHEDULES
from triton_attn.merge.splits import choose_num_splits
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.mla.schedule import FLOP_PER_BYTE, cost


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
            time = 0
            for kernel in kernels[kind]:
                slots = gpu.num_sms * kernel.ctas_per_sm
                loops = seconds(problem, *kernel.rows, kernel.products, slots, *kernel.rates[model])
                time += max(loops, memory_seconds(problem, kernel, getattr(torch, dtype).itemsize, gpu))
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
    """What the prediction needs of one compiled kernel.

    `rows` are those of its own tile and of the one it walks. `tensors`, as large as q, it reads or writes once; of the
    rows that it walks it reads two, and with `sums` it adds to a third, in fp32. `counts` are those of the emulator.
    """

    name: str
    rows: tuple[int, int]
    products: int
    ctas_per_sm: int
    rates: dict
    tensors: int
    sums: bool
    counts: dict


def memory_seconds(problem, kernel, element_size, gpu):
    """The least time of a kernel's memory, of DRAM or of the L2 cache."""
    numbers = problem.batch * problem.seqlen * problem.num_heads * problem.head_dim
    sums = 4 if kernel.sums else 0  # bytes of a number; read and written once
    from_dram = numbers * (kernel.tensors * element_size + 2 * sums) * (kernel.counts.get("read") or 1)
    trips = sum(map(sum, tile_trips(problem, *kernel.rows))) * problem.batch * problem.num_heads
    of_row = problem.head_dim * (2 * element_size + sums)
    from_l2 = trips * kernel.rows[1] * of_row * (kernel.counts.get("sectors") or 1)
    l2_bytes_per_second = L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e9
    return max(from_dram / (gpu.memory_gbps * 1e9), from_l2 / l2_bytes_per_second)


def _kernels(arch, dtype, head_dim, causal, direction):
    forward = [compiled.flash_forward(arch, dtype, head_dim, causal=causal)] if direction != "backward" else []
    backward = compiled.flash_backward(arch, dtype, head_dim, causal=causal) if direction != "forward" else []
    dkdv_products = 5 if len(backward) == 1 else 4
    return [_kernel(launch, dtype, dkdv_products) for launch in forward + backward]


def _kernel(launch, dtype, dkdv_products):
    config = compiled.config_of(launch)
    name = compiled.config_name(config)
    fused = launch.name == "_flash_bwd_dkdv_kernel" and dkdv_products == 5
    # Causal and full attention walk the same loop; a deterministic backward pass is never fused.
    shape = {"head_dim": launch.constexprs["HEAD_DIM"]} | ({"deterministic": False} if fused else {})
    counts = counts_of(launch.arch, str(dtype).removeprefix("torch."), launch.name, name, shape)
    report = loop_model.analyze(launch.kernel, conflicts=counts.get("wavefronts") or 1.0)
    rows, products, tensors = {
        "_flash_fwd_kernel": ((config.block_m, config.block_n), 2, 4),
        "_flash_bwd_dq_kernel": ((config.block_m, config.block_n), 3, 5),
        "_flash_bwd_dkdv_kernel": ((config.block_n, config.block_m), dkdv_products, 6),
    }[launch.name]
    name = f"{launch.name.removeprefix('_flash_').removesuffix('_kernel')} {name}"
    return Kernel(name, rows, products, report.ctas_per_sm, loop_rates(report), tensors, fused, counts)


def paged(problems, dtype, arch):
    """Rows of `bound` and `lock` for each decode step, our default config compiled for `arch`."""
    for problem in tqdm(problems, desc=f"predicting for {arch}", unit="shape"):
        shape = {name: getattr(problem, name) for name in ("num_heads_q", "num_heads_kv", "head_dim", "page_size")}
        yield from _decode_step(problem, dtype, arch, *_analyzed(compiled.paged_decode, arch, dtype, **shape))


def latent_decode(problem, dtype, arch):
    """The same of one step over a latent cache, whose bytes count once for all tiles of heads: these run side by side,
    so that all but the first find them in the L2 cache."""
    shape = {"num_heads": problem.num_heads_q, "cache_dtype": problem.cache_dtype, "page_size": problem.page_size}
    return _decode_step(problem, dtype, arch, *_analyzed(compiled.latent_decode, arch, dtype, **shape))


@cache
def _analyzed(compile_kernel, arch, dtype, **shape):
    launch = compile_kernel(arch, getattr(torch, dtype), **shape)
    config = compiled.config_of(launch)
    counts = counts_of(arch, dtype, launch.name, compiled.config_name(config), shape)
    return config, loop_model.analyze(launch.kernel, conflicts=counts.get("wavefronts") or 1.0)


def _decode_step(problem, dtype, arch, config, report):
    gpu = RATES[arch]
    dtype_bytes = getattr(torch, dtype).itemsize
    programs = 1
    if isinstance(config, MlaDecodeConfig):
        programs = config.programs_per_sm(problem.cache_dtype == "float8_e4m3fn")
    num_splits, trips = split_trips(problem, config.block_m, config.block_n, gpu.num_sms * programs)
    resident = min(report.ctas_per_sm, -(-len(trips) // gpu.num_sms))
    warpgroups = resident * report.mma_warpgroups_per_sm // report.ctas_per_sm
    slots = gpu.num_sms * resident
    flops_per_trip = 2 * config.block_m * config.block_n * (problem.head_dim + problem.head_dim_v)
    for model, rate in (("bound", report.hot.bound()), ("lock", report.hot.lock(warpgroups))):
        loop = makespan(trips, slots) * flops_per_trip * slots / (rate * 1e12)
        time, limit = decode_seconds(problem, dtype_bytes, num_splits, loop, gpu.memory_gbps * 1e9)
        gbps = problem.bytes(dtype_bytes) / time / 1e9
        yield Row(
            **problem.columns(),
            dtype=dtype,
            provider=f"{OURS}, {model}",
            tflops=problem.flops / time / 1e12,
            gbps=gbps,
            roof_share=gbps / gpu.memory_gbps,
            gpu=f"{gpu.memory_gpu}, {gpu.memory_gbps} GB/s, at {gpu.clock_ghz} GHz",
            **versions(),
            source=PREDICTED,
            note=f"fwd {compiled.config_name(config)}, num_splits {num_splits}, limited by {limit}",
        )


def split_trips(problem, block_m, block_n, num_slots):
    """(num_splits, trips of each program) of a decode step: the default number of splits, each an equal share of tiles,
    the last what is left."""
    key_tiles = -(-problem.seqlen_k // block_n)
    row_tiles = -(-problem.num_heads_q // problem.num_heads_kv // block_m)
    programs = problem.batch * problem.num_heads_kv * row_tiles
    num_splits = choose_num_splits(programs, key_tiles, num_slots)
    share = -(-key_tiles // num_splits)
    return num_splits, [min(share, key_tiles - i * share) for i in range(num_splits)] * programs


def decode_seconds(problem, element_size, num_splits, loop_seconds, bytes_per_second):
    """(time of a decode step, what limits it: memory or the loop); parts are outputs and log-sum-exps in fp32."""
    rows = problem.batch * problem.num_heads_q
    parts = num_splits * rows * (problem.head_dim_v + 1) * 4 if num_splits > 1 else 0
    memory_seconds = (problem.bytes(element_size) + parts) / bytes_per_second
    limit = "memory" if memory_seconds >= loop_seconds else "the loop"
    return max(memory_seconds, loop_seconds) + parts / bytes_per_second, limit


def latent_prefill(problem, dtype, arch):
    """A row of every schedule, without code: the cost that `mla_prefill` chooses by, at the dense rate of `arch`."""
    gpu = RATES[arch]
    flops_per_second = gpu.num_sms * gpu.clock_ghz * 1e9 * gpu.mma_flops
    sizes = problem.sizes(getattr(torch, dtype).itemsize)
    for provider, mode in SCHEDULES.items():
        time = sizes.num_heads * cost(sizes, mode) / flops_per_second
        yield Row(
            **problem.columns(),
            dtype=dtype,
            provider=provider,
            tflops=problem.flops / time / 1e12,
            gpu=f"{gpu.name} at {gpu.clock_ghz} GHz",
            **versions(),
            source=MODELLED,
            note=f"{flops_per_second / 1e12:.0f} TFLOP/s, a byte counts as {FLOP_PER_BYTE} FLOP",
        )
