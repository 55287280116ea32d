"""What verifying a tree of 64 drafts costs beside a chain, by the cycle model of loops. Needs no GPU.

Both calls are compiled at their defaults, and the trips of all tiles of rows of a sequence are added up: a full tile of
keys takes a trip of the loop that does not mask, every other tile one that does. A trip takes the cycles of `lock` in
perf/model/loop_model.py. Memory traffic, which is the same, is not in it and would bring the ratio closer to 1.
"""

import torch

from perf.model import loop_model
from perf.results.tables import print_table
from triton_attn import mla_decode, paged_attention
from triton_attn.toolchain import compile_only

ARCHS = "sm_90", "sm_80"
CONTEXTS = 1024, 8192, 131072
NUM_DRAFTS, BATCH, MAX_PAGES, PAGE_SIZE = 64, 2, 8, 64
WINDOW = 1023  # to the left
HEADS = 32, 8  # of Llama-3-8B
OPTIONS = {
    "plain": {},
    "window": {"window_size": (WINDOW, -1)},
    "alibi": {"alibi_slopes": torch.ones(HEADS[0])},
}


def _shared(dim, *more):
    """The cache (pages, slots, ..., dim), lengths and table of a call."""
    cache = torch.empty(BATCH * MAX_PAGES, PAGE_SIZE, *more, dim, dtype=torch.bfloat16)
    return cache, torch.empty(BATCH, dtype=torch.int32), torch.empty(BATCH, MAX_PAGES, dtype=torch.int32)


def _paged(options):
    q = torch.empty(BATCH, NUM_DRAFTS, HEADS[0], 128, dtype=torch.bfloat16)
    cache, *rest = _shared(128, HEADS[1])
    return lambda **tree: paged_attention(q, cache, cache, *rest, num_splits=1, **options, **tree)


def _latent(num_heads):
    q_nope, q_pe = (torch.empty(BATCH, NUM_DRAFTS, num_heads, dim, dtype=torch.bfloat16) for dim in (512, 64))
    return lambda **tree: mla_decode(q_nope, q_pe, *_shared(576), softmax_scale=0.1, num_splits=1, **tree)


CALLS = {f"paged, {name}": (_paged(options), HEADS[0] // HEADS[1]) for name, options in OPTIONS.items()}
CALLS |= {f"mla, {heads} heads": (_latent(heads), heads) for heads in (16, 128)}


def compile_both(call, arch):
    """The launches of the attention of a chain and of a tree."""
    with compile_only(arch) as launches:
        call()
        call(tree_mask=torch.empty(BATCH, NUM_DRAFTS, dtype=torch.int64))
    chain, tree = launches
    return chain, tree


def trip_cycles(launch):
    """Cycles of a trip over a full tile of keys, and over another one."""
    report = loop_model.analyze(launch.kernel)
    warpgroups = report.mma_warpgroups_per_sm
    trips = [_cycles(loop, loop.loop.always, warpgroups) for loop in report.loops if loop.flops == report.hot.flops]
    if len(trips) == 1:  # one loop, which masks in a branch
        trips.append(_cycles(report.hot, report.hot.loop.always + report.hot.loop.conditional, warpgroups))
    return min(trips), max(trips)


def _cycles(loop, instructions, warpgroups):
    busy = loop_model.unit_cycles(instructions, loop.rates, loop.conflicts)
    others = max(busy[unit] for unit in ("mufu", "alu", "fma", "issue"))
    return max(busy["tensor"], busy["smem"]) + max(busy["stall"] / warpgroups, others)


def cycles(launch, context, group_size, is_tree, left=None):
    """Of all tiles of rows over a context and the drafts. At the left side of a window one more tile is masked."""
    edge = left is not None and left < context
    context = left if edge else context
    block_m, block_n = (launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N"))
    full_trip, other_trip = trip_cycles(launch)
    rows, total = NUM_DRAFTS * group_size, 0
    for start in range(0, rows, block_m):
        first, last = start // group_size, (min(start + block_m, rows) - 1) // group_size
        seen_by_all = context if is_tree else context + first + 1
        seen_by_any = context + (NUM_DRAFTS if is_tree else last + 1)
        full = seen_by_all // block_n
        total += full * full_trip + (-(-seen_by_any // block_n) - full + edge) * other_trip
    return total


def prices(name, arch):
    """{context: cycles of a tree over those of a chain}."""
    left = WINDOW if name == "paged, window" else None
    call, group_size = CALLS[name]
    launches = compile_both(call, arch)
    shares = {}
    for context in CONTEXTS:
        chain, tree = (cycles(x, context, group_size, i == 1, left) for i, x in enumerate(launches))
        shares[context] = tree / chain
    return shares


def run(out_dir):
    """Print the table."""
    rows = []
    for arch in ARCHS:
        for name in CALLS:
            shares = {f"context {context}": f"{share:.3f}" for context, share in prices(name, arch).items()}
            rows.append({"arch": arch, "call": name} | shares)
    print(
        f"cycles of a tree of {NUM_DRAFTS} drafts over those of a chain, predicted by the model of loops, not measured"
    )
    print_table(rows)


def add_arguments(parser):
    pass
