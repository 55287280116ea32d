"""Random calls of MLA over a mesh."""

import random

import torch
from mla_over_ranks import Case, Inputs
from parallel_draws import METHODS, METHODS_OF_TWO, frozen, rows


def draw(seed, num_ranks):
    """A random Case."""
    rng = random.Random(seed)
    options = dict(causal=rng.random() < 0.7, mode=rng.choice(["auto", "fused", "materialized"]))
    if rng.random() < 0.2:
        options["softmax_scale"] = rng.choice([0.07, 1.3])
    if rng.random() < 0.3:
        options["max_workspace_bytes"] = 2**16  # a chunk of heads, or of keys
    dims = rng.choice([(16, 8, 32, 12), (32, 16, 48, 32), (8, 4, 24, 40), (33, 16, 64, 16)])
    method, inner, heads = rng.choice(METHODS), None, rng.choice([1, 2, 3, 8])
    if rng.random() < 0.3:
        method, inner = rng.choice(METHODS_OF_TWO), rng.choice([n for n in (1, 2, 2, 4) if num_ranks % n == 0])
    if method == "ulysses" or inner is not None:
        heads = rng.choice([1, 2]) * num_ranks
    return Case(
        method=method,
        inner=inner,
        **rows(rng, num_ranks),
        num_heads_q=heads,
        **dict(zip(("head_dim", "rope", "rank", "head_dim_v"), dims)),
        dtype=rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        options=options,
        dlse=rng.random() < 0.7,
        seed=seed,
        frozen=frozen(rng, Inputs.names[2:]),
    )
