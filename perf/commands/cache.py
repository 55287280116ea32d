"""Host cost of page bookkeeping: per page against pool size, and per decode step against batch size.

`cache.csv` has the nanoseconds per page of `BlockPool.allocate`, `share` and `release`, and of a `PagedKVCache.create`
whose whole prompt is cached (hashing included). The pools are half full and fragmented by random use. The mean includes
the rare call that tidies the free list. `decode_step.csv` has the milliseconds of `extend` by one token, `block_table`
and `cache_seqlens` for a whole batch. `prefix_groups.csv` has the microseconds of `PrefixGroups.tree` in such a step,
for beams over one prompt: where nothing is new but a token of each, and where one sequence gives way to a fork of
another. Times are CPU time of one thread, so other processes do not count.

With --peer, in an environment with vLLM (`make test-engines` makes one), `cache_peer.csv` compares with vLLM's own
manager: rounds of ours and of the peer's alternate in one process, and the least of the rounds' medians counts. Each
ratio has a bar, and `met` says whether it is reached.
"""

import gc
import platform
import random
import re
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from perf import results
from perf.harness.device import commit
from perf.harness.timing import percentiles
from perf.results.tables import print_table
from perf.workloads import bookkeeping
from triton_attn import BlockPool, PagedKVCache

POOL_SIZES = (10**3, 10**4, 10**5, 10**6)
BATCH_SIZES = (1, 16, 64, 256, 1024)
PAGES_PER_CALL = 64
PAGE_SIZE = 16
MIN_CALLS = 500
DECODE_STEPS = 128
DECODE_CONTEXT = 1024
TREE_STEPS, HEADS_OF_TREE = 64, 32
MACHINE = ["cpu", "python", "torch", "commit"]
POOL_COLUMNS = ["operation", "num_pages", "pages_per_call", "calls", "mean_ns", "p20_ns", "p50_ns", "p80_ns", *MACHINE]
PEER_COLUMNS = ["operation", "num_pages", "ours_us", "vllm_us", "vllm_over_ours", "bar", "met", *MACHINE]
PEER_ROUNDS = 60
TREE_COLUMNS = ["sequences", "context", "change", "steps", "p20_us", "p50_us", "p80_us", *MACHINE]
STEP_COLUMNS = ["sequences", "context", "steps", "p20_ms", "p50_ms", "p80_ms", *MACHINE]


def run(out_dir, max_pages=POOL_SIZES[-1], peer=False):
    """Print the tables and write them as CSV files, with plots; or the comparison with a peer."""
    torch.set_num_threads(1)
    if peer:
        return [compare(out_dir / "cache_peer.csv", max_pages)]
    from perf.results import plot  # an environment with vLLM need not have matplotlib

    machine = [cpu_name(), platform.python_version(), torch.__version__, commit()]
    sizes = [size for size in POOL_SIZES if size <= max_pages]
    progress = tqdm(total=2 * len(sizes) + 2 * len(BATCH_SIZES), desc="page bookkeeping")
    pool_path, step_path = out_dir / "cache.csv", out_dir / "decode_step.csv"
    tree_path = out_dir / "prefix_groups.csv"
    per_page, per_step, per_tree = [], [], []
    with results.Table(pool_path, POOL_COLUMNS) as table:
        for num_pages in sizes:
            for measure in (pool_times, create_times):
                for operation, nanoseconds in measure(num_pages).items():
                    row = [operation, num_pages, PAGES_PER_CALL, len(nanoseconds), *_summary(nanoseconds)]
                    table.append(row + machine)
                    per_page.append(row)
                progress.update()
    with results.Table(step_path, STEP_COLUMNS) as table:
        for num_sequences in BATCH_SIZES:
            _, *spread = _summary(decode_step_times(num_sequences))
            row = [num_sequences, DECODE_CONTEXT, DECODE_STEPS, *spread]
            table.append(row + machine)
            per_step.append(row)
            progress.update()
    with results.Table(tree_path, TREE_COLUMNS) as table:
        for num_sequences in BATCH_SIZES:
            for change, microseconds in tree_times(num_sequences).items():
                _, *spread = _summary(microseconds)
                row = [num_sequences, DECODE_CONTEXT, change, len(microseconds), *spread]
                table.append(row + machine)
                per_tree.append(row)
            progress.update()
    progress.close()
    print_table([dict(zip(POOL_COLUMNS, row)) for row in sorted(per_page, key=lambda row: (row[0], row[1]))])
    print_table([dict(zip(STEP_COLUMNS, row)) for row in per_step])
    print_table([dict(zip(TREE_COLUMNS, row)) for row in per_tree])
    return [pool_path, *plot.draw(pool_path), step_path, *plot.draw(step_path), tree_path]


def compare(path, num_pages):
    """Microseconds of the same bookkeeping by each of `bookkeeping.MANAGERS`, in pools of `num_pages`."""
    versions = [cpu_name(), platform.python_version(), torch.__version__, commit()]
    managers = {name: manager(num_pages) for name, manager in bookkeeping.MANAGERS.items()}
    rows = []
    gc.disable()  # a collection of vLLM's objects would count for whoever is measured
    with results.Table(path, PEER_COLUMNS) as table:
        for workload in bookkeeping.WORKLOADS:
            rounds = {name: workload(manager) for name, manager in managers.items()}
            medians = {name: [] for name in managers}
            for _ in range(PEER_ROUNDS):
                for name, round_of_calls in rounds.items():
                    medians[name].append(statistics.median(round_of_calls()))
                gc.collect(0)
            ours, peers = (1e6 * min(values) for values in medians.values())
            row = [workload.name, num_pages, ours, peers, peers / ours, workload.bar, peers / ours >= workload.bar]
            table.append(row + versions)
            rows.append(row)
    gc.enable()
    print_table([dict(zip(PEER_COLUMNS, row)) for row in rows])
    return path


def pool_times(num_pages):
    """{operation: nanoseconds per page of each call}, over enough calls to cycle through the free list twice."""
    rng = random.Random(0)
    pool = BlockPool(num_pages)
    shuffled = pool.allocate(num_pages)[torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))]
    pool.release(shuffled)
    held = [pool.allocate(PAGES_PER_CALL) for _ in range(num_pages // PAGES_PER_CALL // 2)]
    times = {"allocate": [], "share": [], "release": []}

    def timed(operation, *args):
        start = time.thread_time_ns()
        result = getattr(pool, operation)(*args)
        times[operation].append((time.thread_time_ns() - start) / PAGES_PER_CALL)
        return result

    for _ in range(max(MIN_CALLS, 2 * num_pages // PAGES_PER_CALL)):
        i = rng.randrange(len(held))
        timed("share", held[i])
        pool.release(held[i])
        timed("release", held[i])
        held[i] = timed("allocate", PAGES_PER_CALL)
    return times


def create_times(num_pages):
    """Nanoseconds per cached page of `create`. The cached prompts fill half of the pool."""
    rng = random.Random(0)
    cache = small_cache(num_pages)
    length = PAGES_PER_CALL * PAGE_SIZE
    prompts = [range(i * length, (i + 1) * length + 1) for i in range(max(1, num_pages // PAGES_PER_CALL // 2))]
    for prompt in prompts:
        seq, _ = cache.create([])
        cache.extend([seq], [prompt[:length]])
        cache.commit([seq])
        cache.free(seq)
    times = []
    for _ in range(MIN_CALLS):
        prompt = list(rng.choice(prompts))
        start = time.thread_time_ns()
        seq, cached = cache.create(prompt)
        times.append((time.thread_time_ns() - start) / PAGES_PER_CALL)
        if cached != length:
            raise RuntimeError(f"{cached} of {length} tokens were cached: expected all")
        cache.free(seq)
    return {"create, all cached": times}


def decode_step_times(num_sequences):
    """Milliseconds of each step. The sequences end at different positions in their pages."""
    cache = small_cache(num_sequences * 2 * DECODE_CONTEXT // PAGE_SIZE)
    seqs = [cache.create([])[0] for _ in range(num_sequences)]
    cache.extend(seqs, [range(i, i + DECODE_CONTEXT - i % PAGE_SIZE) for i in range(num_sequences)])
    cache.commit(seqs)
    times = []
    for step in range(DECODE_STEPS):
        token_ids = [[step]] * num_sequences
        start = time.thread_time()
        cache.extend(seqs, token_ids)
        cache.block_table(seqs)
        cache.cache_seqlens(seqs)
        times.append(1e3 * (time.thread_time() - start))
    return times


def tree_times(num_sequences):
    """{what changed since the step before: microseconds of each `PrefixGroups.tree`}."""
    cache = small_cache(num_sequences * 2 * DECODE_CONTEXT // PAGE_SIZE)
    prompt, _ = cache.create([])
    cache.extend([prompt], [range(DECODE_CONTEXT)])
    seqs, groups = cache.fork([prompt] * num_sequences), cache.prefix_groups(num_heads_q=HEADS_OF_TREE)
    times = {"none": [], "one fork": []}
    cache.extend(seqs, 1)
    groups.tree(seqs)
    for step in range(TREE_STEPS):
        for change, own in times.items():
            if change == "one fork":
                cache.free(seqs.pop(step % num_sequences))
                seqs.append(cache.fork(prompt))
            cache.extend(seqs, 1)
            start = time.thread_time_ns()
            groups.tree(seqs)
            own.append((time.thread_time_ns() - start) / 1000)
    return times


def small_cache(num_pages):
    """A cache on the host with one element per token."""
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1}
    return PagedKVCache(num_pages, PAGE_SIZE, **shape, dtype=torch.float16, device="cpu")


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return match.group(1) if match else platform.machine()


def _summary(values):
    spread = percentiles(values)
    return [statistics.fmean(values), spread.p20, spread.p50, spread.p80]


def add_arguments(parser):
    parser.add_argument("--peer", action="store_true", help="compare with vLLM's manager, which must be installed")
    parser.add_argument(
        "--max-pages", type=int, default=POOL_SIZES[-1], help="largest pool (default: %(default)s; 1000000 needs 1 GB)"
    )
