"""What batch_invariant costs, by the model of `triton_attn.merge.splits`. Needs no GPU, and nothing is measured.

With it the tile of a call does not follow from its shapes, and keys are split every 1024. `in turn`: one program
computes all splits of its rows; otherwise each has its own. The cost is that of sequences which fill the capacity. It
leaves out that all tiles of keys are masked, and the launches between the rounds of a latent step.
"""

import torch

from perf.model import predict
from perf.model.gpus import RATES
from perf.results.tables import print_table
from perf.workloads.problems import ChunkProblem, DecodeProblem, LatentDecodeProblem
from triton_attn.merge.splits import choose_num_splits, fixed_splits, resident_programs, split_cost
from triton_attn.mla.configs import MlaDecodeCase, MlaDecodeConfig
from triton_attn.paged.configs import PagedCase, PagedConfig, fixed_rows

CONTEXTS = (1024, 8192, 131072)
DTYPE = torch.bfloat16
ARCH = "sm_90"


def problems():
    for batch in (1, 8, 32, 256):
        yield from (DecodeProblem(batch, seqlen) for seqlen in CONTEXTS)
    yield from (ChunkProblem(4, seqlen) for seqlen in CONTEXTS)
    for batch in (1, 32, 256):
        yield from (LatentDecodeProblem(batch, seqlen, heads) for heads in (16, 128) for seqlen in CONTEXTS)


def prices(problem, arch=ARCH):
    """(splits, us) without and with batch_invariant."""
    free, fixed = (_work(problem, arch, invariant) for invariant in (False, True))
    num_splits = choose_num_splits(free)
    of_fixed, in_turn = fixed_splits(fixed, problem.seqlen_k)
    in_turn = in_turn and not isinstance(problem, LatentDecodeProblem)  # `mla_decode` takes rounds instead
    cost = split_cost(fixed, 1 if in_turn else of_fixed)
    return (num_splits, split_cost(free, num_splits) / 1e3), (f"{of_fixed}{' in turn' * in_turn}", cost / 1e3)


def _work(problem, arch, invariant):
    if isinstance(problem, LatentDecodeProblem):
        widths = problem.kv_lora_rank, problem.qk_rope_head_dim
        case = MlaDecodeCase(arch, DTYPE, *widths, problem.num_heads_q, page_size=problem.page_size)
        config = MlaDecodeConfig.default(case)
    else:
        dim = problem.head_dim
        rows = problem.seqlen_q * problem.num_heads_q // problem.num_heads_kv
        case = PagedCase(arch, DTYPE, DTYPE, dim, dim, fixed_rows(dim) if invariant else rows)
        config = PagedConfig.default(case)
    resident = resident_programs(config.shared_bytes(case), config, case.gpu)
    return predict.split_work(problem, config.block_m, config.block_n, RATES[arch].num_sms, resident, 2)


def run(out_dir):
    """Print the table."""
    rows = []
    for problem in problems():
        (splits, free), (fixed_splits_, fixed) = prices(problem)
        columns = problem.columns()
        shape = {
            name: columns[name] for name in ("family", "direction", "batch", "seqlen_q", "seqlen_k", "num_heads_q")
        }
        costs = {"splits": splits, "us": f"{free:.1f}", "fixed splits": fixed_splits_, "us, fixed": f"{fixed:.1f}"}
        rows.append(shape | costs | {"price": f"{fixed / free - 1:+.0%}"})
    print(f"us of a call on {RATES[ARCH].name}, predicted by the model of triton_attn.merge.splits, not measured")
    print_table(rows)


def add_arguments(parser):
    pass
