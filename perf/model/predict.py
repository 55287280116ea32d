"""Throughput on a GPU that need not be present, predicted from compiled code.

The loop model (`perf/model/loop_model.py`) gives the rate at which an SM runs the hot loop. A whole pass of prefill or
training is slower for two reasons that follow from the shape alone. Both are counted here:

    masked tiles   A query tile of block_m rows visits ceil(visible keys / block_n) key tiles. Partial tiles cost a
                   whole trip of the masked loop. Only visible pairs count as work.
    waves          Programs are assigned, longest first, to num_sms * ctas_per_sm slots. The last slot sets the time.

    TFLOP/s = visible FLOP / time of the last slot;   time of a trip = FLOP of a trip * slots / rate of its loop

A kernel takes at least the time of its memory traffic: DRAM for its tensors once, L2 for the tiles of all trips,

    time >= max(bytes of tensors * read / bandwidth, bytes of tiles * sectors / (5120 B * clock))

where `read` and `sectors` are the emulator's counts over the minimum (perf/commands/counts.py). Shared memory has the
bank conflicts that the emulator counted. For the defaults of flash attention `read` and `sectors` are 1. The effects
are then: DRAM limits causal attention of 512 tokens on an H100 to 429 TFLOP/s, where the loop alone allows up to 755.
The L2 cache limits nothing. The conflicts of a fused backward pass, at the store of dQ, cost 6 % (`lock`) to 9 %
(`bound`) at head dim 64. A decode step over an fp8 latent cache loses 7 to 12 % with 128 heads and 18 to 30 % with 16
on sm_90.

The prediction leaves out latency of copies, barriers, power, prologue and epilogue. Measurements are lower.

A decode step reads its cache once. It ends with its memory traffic or with its loop, whichever is slower. Splits are
written, and read again to be merged:

    time = max((bytes + splits) / bandwidth, time of the last slot) + splits / bandwidth

with the default number of splits and the bandwidth of the data sheet. A partial tile counts as a full one. A small
grid leaves fewer programs on an SM than fit on it, and `lock` counts only these.

The decode prediction leaves out launches (which dominate short contexts), all latencies, memory below its data sheet,
and the L2 cache, which holds small splits. Measurements are lower.

The schedules of MLA prefill are not compiled. Their time is the cost by which `triton_attn.mla_prefill` chooses, at the
dense rate of the GPU.
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
from perf.workloads.problems import LatentDecodeProblem
from perf.workloads.providers import SCHEDULES
from triton_attn.merge import splits
from triton_attn.merge.splits import SplitWork, choose_num_splits, resident_programs
from triton_attn.mla import configs as mla_configs
from triton_attn.mla.configs import MlaDecodeCase, MlaDecodeConfig
from triton_attn.mla.schedule import FLOP_PER_BYTE, cost
from triton_attn.paged.configs import PagedCase


def tile_trips(problem, block_m, block_n):
    """(full, masked) trips of each query tile of one head."""
    trips = []
    for start in range(0, problem.seqlen, block_m):
        end = min(start + block_m, problem.seqlen)
        seen_by_last = end if problem.causal else problem.seqlen
        seen_by_all = start + 1 if problem.causal else problem.seqlen
        full = seen_by_all // block_n
        trips.append((full, -(-seen_by_last // block_n) - full))
    return trips


def makespan(durations, slots):
    """When the last slot finishes, if durations are assigned longest first to the slot that is free first."""
    free_at = [0.0] * min(slots, len(durations))
    for duration in sorted(durations, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def tflops(problem, block_m, block_n, slots, full_rate, masked_rate):
    """TFLOP/s of a whole forward, from the rates (TFLOP/s) of the two loops with every slot busy."""
    return problem.flops / seconds(problem, block_m, block_n, 2, slots, full_rate, masked_rate) / 1e12


def seconds(problem, own_rows, other_rows, matmuls, slots, full_rate, masked_rate):
    """Time of a kernel whose programs own tiles of own_rows and visit tiles of other_rows, with `matmuls` at each."""
    flops_per_trip = 2 * matmuls * own_rows * other_rows * problem.head_dim
    full, masked = (flops_per_trip * slots / (rate * 1e12) for rate in (full_rate, masked_rate))
    # Seen from the keys, the mask is the same in reverse, so the trips are the same.
    durations = [a * full + b * masked for a, b in tile_trips(problem, own_rows, other_rows)]
    return makespan(durations * (problem.num_heads * problem.batch), slots)


def loop_rates(report):
    """{"bound": (full, masked), "lock": (full, masked)} in TFLOP/s. A kernel with one loop has one rate."""
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
                loops = seconds(problem, *kernel.rows, kernel.matmuls, slots, *kernel.rates[model])
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
    """One compiled kernel of a prediction.

    `rows` are the rows of its own tile and of the tile that it visits. It reads or writes `tensors` tensors of the size
    of q once. Per visited row it reads two tensors, and with `sums` it adds to a third, in fp32. `counts` are from the
    emulator.
    """

    name: str
    rows: tuple[int, int]
    matmuls: int
    ctas_per_sm: int
    rates: dict
    tensors: int
    sums: bool
    counts: dict


def memory_seconds(problem, kernel, element_size, gpu):
    """The least time of a kernel's memory traffic, in DRAM or in the L2 cache."""
    elements = problem.batch * problem.seqlen * problem.num_heads * problem.head_dim
    sums = 4 if kernel.sums else 0  # bytes of an element; read and written once
    from_dram = elements * (kernel.tensors * element_size + 2 * sums) * (kernel.counts.get("read") or 1)
    trips = sum(map(sum, tile_trips(problem, *kernel.rows))) * problem.batch * problem.num_heads
    of_row = problem.head_dim * (2 * element_size + sums)
    from_l2 = trips * kernel.rows[1] * of_row * (kernel.counts.get("sectors") or 1)
    l2_bytes_per_second = L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e9
    return max(from_dram / (gpu.memory_gbps * 1e9), from_l2 / l2_bytes_per_second)


def _kernels(arch, dtype, head_dim, causal, direction):
    forward = [compiled.flash_forward(arch, dtype, head_dim, causal=causal)] if direction != "backward" else []
    backward = compiled.flash_backward(arch, dtype, head_dim, causal=causal) if direction != "forward" else []
    dkdv_matmuls = 5 if len(backward) == 1 else 4
    return [_kernel(launch, dtype, dkdv_matmuls) for launch in forward + backward]


def _kernel(launch, dtype, dkdv_matmuls):
    config = compiled.config_of(launch)
    name = compiled.config_name(config)
    fused = launch.name == "_flash_bwd_dkdv_kernel" and dkdv_matmuls == 5
    # Causal and full attention run the same loop; a deterministic backward pass is never fused.
    shape = {"head_dim": launch.constexprs["HEAD_DIM"]} | ({"deterministic": False} if fused else {})
    counts = counts_of(launch.arch, str(dtype).removeprefix("torch."), launch.name, name, shape)
    report = loop_model.analyze(launch.kernel, conflicts=counts.get("wavefronts") or 1.0)
    rows, matmuls, tensors = {
        "_flash_fwd_kernel": ((config.block_m, config.block_n), 2, 4),
        "_flash_bwd_dq_kernel": ((config.block_m, config.block_n), 3, 5),
        "_flash_bwd_dkdv_kernel": ((config.block_n, config.block_m), dkdv_matmuls, 6),
    }[launch.name]
    name = f"{launch.name.removeprefix('_flash_').removesuffix('_kernel')} {name}"
    return Kernel(name, rows, matmuls, report.ctas_per_sm, loop_rates(report), tensors, fused, counts)


def paged(problems, dtype, arch):
    """Rows of `bound` and `lock` for each decode step, our default config compiled for `arch`."""
    for problem in tqdm(problems, desc=f"predicting for {arch}", unit="shape"):
        shape = {name: getattr(problem, name) for name in ("num_heads_q", "num_heads_kv", "head_dim", "page_size")}
        yield from _decode_step(problem, dtype, arch, *_analyzed(compiled.paged_decode, arch, dtype, **shape))


def latent_decode(problem, dtype, arch):
    """The same for a step over a latent cache. Its bytes count once for all tiles of heads, since these run
    concurrently and all but the first hit the L2 cache.
    """
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
    case = _case_of(problem, getattr(torch, dtype), arch, config)
    resident = resident_programs(config.shared_bytes(case), config, case.gpu)
    element_size = case.cache_dtype.itemsize
    num_splits, trips = split_trips(problem, config.block_m, config.block_n, gpu.num_sms, resident, element_size)
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


def _case_of(problem, dtype, arch, config):
    """The case of the launcher's config."""
    if isinstance(config, MlaDecodeConfig):
        widths = problem.kv_lora_rank, problem.qk_rope_head_dim
        is_fp8 = getattr(torch, problem.cache_dtype).itemsize == 1
        return MlaDecodeCase(arch, dtype, *widths, problem.num_heads_q, is_fp8, page_size=problem.page_size)
    rows = problem.num_heads_q // problem.num_heads_kv
    return PagedCase(arch, dtype, dtype, problem.head_dim, problem.head_dim_v, rows)


def split_work(problem, block_m, block_n, num_sms, resident, element_size):
    """The SplitWork of a step over a cache."""
    key_tiles = -(-problem.seqlen_k // block_n)
    seqlen_q = getattr(problem, "seqlen_q", 1)
    row_tiles = -(-seqlen_q * problem.num_heads_q // problem.num_heads_kv // block_m)
    values_are_keys = isinstance(problem, LatentDecodeProblem)
    return SplitWork(
        problem.batch * problem.num_heads_kv * row_tiles,
        key_tiles,
        tile_elements=block_n * (problem.head_dim + (0 if values_are_keys else problem.head_dim_v)),
        element_size=element_size,
        program_rate=(mla_configs if values_are_keys else splits).PROGRAM_RATE,
        tile_flops=2 * block_m * block_n * (problem.head_dim + problem.head_dim_v),
        num_rows=problem.batch * seqlen_q * problem.num_heads_q,
        row_elements=problem.head_dim_v,
        num_sms=num_sms,
        resident=resident,
    )


def split_trips(problem, *tiles, **others):
    """(num_splits, trips of each program) of a decode step with the default number of splits. Each split has an equal
    share of tiles, the last one the rest. Arguments are those of `split_work`.
    """
    work = split_work(problem, *tiles, **others)
    num_splits = choose_num_splits(work)
    share = -(-work.num_key_tiles // num_splits)
    return num_splits, [min(share, work.num_key_tiles - i * share) for i in range(num_splits)] * work.num_programs


def decode_seconds(problem, element_size, num_splits, loop_seconds, bytes_per_second):
    """(time of a decode step, its limit: memory or the loop). Splits are outputs and log-sum-exps in fp32."""
    rows = problem.batch * problem.num_heads_q
    split_bytes = num_splits * rows * (problem.head_dim_v + 1) * 4 if num_splits > 1 else 0
    memory_seconds = (problem.bytes(element_size) + split_bytes) / bytes_per_second
    limit = "memory" if memory_seconds >= loop_seconds else "the loop"
    return max(memory_seconds, loop_seconds) + split_bytes / bytes_per_second, limit


def latent_prefill(problem, dtype, arch):
    """A row of every schedule, without compiled code: the cost by which `mla_prefill` chooses, at the dense rate of
    `arch`.
    """
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
