"""Context-parallel attention of real models, by the cost model with which `method="auto"` chooses."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from perf import results
from perf.results import ParallelRow
from perf.workloads.models import DEEPSEEK_V3, LLAMA_3_8B, LLAMA_3_70B, Model
from triton_attn.parallel import cost
from triton_attn.parallel.balance import sharding_of_batch
from triton_attn.parallel.heads import HEADS
from triton_attn.parallel.latent import LATENTS
from triton_attn.parallel.local import Mask
from triton_attn.parallel.operators import Kind

MODELS = (LLAMA_3_8B, LLAMA_3_70B, DEEPSEEK_V3)
SEQLENS = tuple(8192 * 2**i for i in range(8))
GPUS = tuple(8 * 2**i for i in range(7))
CAUSAL = Mask(-1, 0, has_alibi=False, has_dropout=False)
BF16 = 2


H100S = "H100 in nodes of 8, 400 Gb/s each between nodes"
H800S = "H800"


@dataclass(frozen=True)
class Published:
    """A ring with the load balance "head_tail" on 8 H800, one causal sequence in bf16, head_dim 128, as its authors
    measured it: calls a second and shares of a GPU's speed, each forward and of both passes. alone: calls a second of
    flash-attn on one GPU, with 1/64 of the FLOPs.
    """

    model: Model
    rates: tuple[float, float]
    shares: tuple[float, float]
    alone: tuple[float, float]
    num_gpus: int = 8
    seqlen: int = 65536

    def rows(self):
        """What was published, and what the cost model says of a GPU with that speed alone."""
        measured = ParallelRow(
            model=self.model.name,
            num_gpus=self.num_gpus,
            seqlen=self.seqlen,
            method="ring",
            is_auto=False,
            forward_ms=1e3 / self.rates[0],
            both_ms=1e3 / self.rates[1],
            forward_share=self.shares[0],
            both_share=self.shares[1],
            gpu=H800S,
            source=results.PUBLISHED,
        )
        rows = predict(self.model, self.num_gpus, self.seqlen, self._cluster())
        return [measured, *(replace(row, gpu=H800S) for row in rows if row.method == "ring")]

    def _cluster(self):
        """An H800, whose NVLink has 200 GB/s in one direction instead of 450, at the speeds of attention alone."""
        pairs = self.seqlen**2 / 2 / self.num_gpus**2
        flops = 4 * self.model.num_heads_q * self.model.head_dim * pairs
        forward, both = self.alone
        rates = {"forward_flops": flops * forward, "backward_flops": 2.5 * flops / (1 / both - 1 / forward)}
        return cost.H100._replace(**rates, node_bytes=cost.H100.node_bytes * 200 / 450)


# The tables of github.com/zhuzilin/ring-flash-attention, "batch api": since October 2024, and before, with other heads.
PUBLISHED = (
    Published(LLAMA_3_8B, (63.0, 17.4), (0.852, 0.902), (591.5, 154.7)),
    Published(Model("5 heads, MHA", 1, 5, 5, 128), (283.0, 75.7), (0.936, 0.859), (2418.4, 705.2)),
)


@cache
def sizes_of(model: Model, num_gpus: int, seqlen: int, by_node: bool = False) -> cost.Sizes:
    """One causal sequence in bf16, load balance "head_tail", nodes of 8 GPUs; by_node: over a mesh of two dimensions,
    whose second is a node."""
    sharding, per_node = sharding_of_batch(1, seqlen, num_gpus, "head_tail"), cost.GPUS_PER_NODE
    ranks = [cost.Ranks(num_gpus, min(num_gpus, per_node))]
    if by_node:
        ranks = [cost.Ranks(num_gpus // per_node, 1), cost.Ranks(per_node, per_node)]
    kind, head_dims = kind_of(model)
    return cost.sizes_of(kind.costs_of(head_dims), torch.bfloat16, sharding, CAUSAL, *ranks)


def kind_of(model: Model) -> tuple[Kind, tuple[int, ...]]:
    """What the model's attention is to context parallelism, and its sizes of a row."""
    dim, dim_v = model.head_dim, model.head_dim_v or model.head_dim
    if model.kv_lora_rank is None:
        return HEADS, (model.num_heads_q, model.num_heads_kv, dim, dim_v)
    rope = model.qk_rope_head_dim
    return LATENTS, (model.num_heads_q, dim - rope, rope, model.kv_lora_rank, dim_v)


def predict(model: Model, num_gpus: int, seqlen: int, cluster: cost.Cluster = cost.H100) -> list[ParallelRow]:
    """A row for each method that can take the call; over several nodes also with Ulysses inside them, such as
    "ring+ulysses"."""
    sizes = sizes_of(model, num_gpus, seqlen)
    found, chosen = cost.costs(sizes, cluster), [cost.choose(sizes, cluster)]
    if num_gpus > cost.GPUS_PER_NODE:
        of_nodes = sizes_of(model, num_gpus, seqlen, by_node=True)
        found |= {f"{method}+ulysses": each for method, each in cost.costs(of_nodes, cluster).items()}
        chosen.append(f"{cost.choose(of_nodes, cluster)}+ulysses")
    alone = _of_one_gpu(sizes, cluster)
    rows = sizes.rows * (sizes.queries + sizes.keys + sizes.outputs) * BF16
    saved = rows + sizes.rows * model.num_heads_q * cost.SUMS  # lse
    return [
        ParallelRow(
            model=model.name,
            num_gpus=num_gpus,
            seqlen=seqlen,
            method=method,
            is_auto=method in chosen,
            forward_ms=1e3 * forward.seconds,
            both_ms=1e3 * (forward.seconds + backward.seconds),
            forward_share=alone[0] / forward.seconds,
            both_share=sum(alone) / (forward.seconds + backward.seconds),
            forward_received=forward.bytes,
            both_received=forward.bytes + backward.bytes,
            forward_memory=saved + forward.workspace,
            both_memory=saved + max(forward.workspace, rows + backward.workspace),
            gpu=H100S,
            source=results.MODELLED_PARALLEL,
        )
        for method, (forward, backward) in found.items()
    ]


def _of_one_gpu(sizes, cluster):
    """Seconds of one GPU's share of the FLOPs, forward and backward, with nothing to wait for."""
    forward, backward = flops_of(sizes)
    return forward / sizes.num_ranks / cluster.forward_flops, backward / sizes.num_ranks / cluster.backward_flops


def flops_of(sizes: cost.Sizes) -> tuple[int, int]:
    """Of the whole call, forward and backward; keys and values of a latent vector are computed once."""
    flops_of_pair = 2 * sizes.num_heads_q
    of_keys = sizes.key_flops * sizes.seqlen
    forward = flops_of_pair * (sizes.head_dim + sizes.head_dim_v) * sizes.all_pairs + of_keys
    backward = flops_of_pair * (3 * sizes.head_dim + 2 * sizes.head_dim_v) * sizes.all_pairs + 3 * of_keys
    return forward, backward
