"""Random calls over a mesh of one dimension or two."""

import random
from dataclasses import replace

import torch
from parallel_ranks import Case, Inputs

METHODS = ("all_gather", "ring", "ulysses", "auto")
METHODS_OF_TWO = (("all_gather", "ulysses"), ("ring", "ulysses"), "auto")


def draw(seed, num_ranks):
    """A Case."""
    rng = random.Random(seed)
    method, inner = rng.choice(METHODS), None
    if rng.random() < 0.3:
        method, inner = rng.choice(METHODS_OF_TWO), rng.choice([n for n in (1, 2, 2, 4) if num_ranks % n == 0])
    heads = rng.choice([(4, 4), (4, 2), (4, 1), (8, 2), (6, 3), (3, 1)])
    if method == "ulysses" or inner is not None:
        heads = rng.choice([(4, 4), (4, 2), (4, 1), (8, 2), (8, 4)])
    dims = rng.choice([(16, 16), (24, 24), (8, 40), (33, 16), (64, 64)])
    case = Case(
        method=method,
        inner=inner,
        **rows(rng, num_ranks),
        num_heads_q=heads[0],
        num_heads_kv=heads[1],
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        options=_options(rng),
        alibi=rng.random() < 0.25,
        slopes_each=rng.random() < 0.5,
        sinks=rng.random() < 0.3,
        dlse=rng.random() < 0.7,
        seed=seed,
    )
    return replace(case, frozen=frozen(rng, Inputs.names[2:] if case.sinks else Inputs.names[2:5]))


def frozen(rng, names):
    """Some of the gradients, but never all."""
    return tuple(rng.sample(names, rng.randint(1, len(names) - 1))) if rng.random() < 0.3 else ()


def rows(rng, num_ranks):
    """Of a batch, or of packed documents. No number of ranks divides most of the lengths."""
    if rng.random() < 0.35:
        seqlen = rng.choice([0, 1, num_ranks - 1, rng.randint(2, 90), rng.randint(2, 90)])
        return dict(batch=rng.choice([1, 2, 3]), seqlen=seqlen, load_balance=rng.choice(["head_tail", None]))
    documents = rng.choice(
        [
            [rng.randint(0, 40) for _ in range(rng.randint(1, 5))],
            [rng.randint(0, 7) for _ in range(rng.randint(18, 24))],
            [rng.randint(60, 100), 0, rng.randint(0, 9)],
            [rng.randint(0, 2) for _ in range(rng.randint(1, 3))],  # fewer rows than ranks
        ]
    )
    return dict(
        documents=tuple(documents),
        rows_of_none=rng.choice([0, 0, rng.randint(1, 20)]),
        load_balance=rng.choice(["head_tail", "per_document", None]),
    )


def _options(rng):
    options = dict(causal=rng.random() < 0.7)
    if rng.random() < 0.4:
        options["window_size"] = rng.choice([(rng.randint(0, 30), rng.randint(-1, 10)), (-1, rng.randint(0, 9))])
    if rng.random() < 0.2:
        options["softcap"] = rng.choice([2.0, 30.0])
    if rng.random() < 0.2:
        options |= dict(dropout_p=rng.choice([0.1, 0.5]), dropout_seed=rng.randint(-(2**63), 2**63 - 1))
    if rng.random() < 0.3:
        options["deterministic"] = True
    if rng.random() < 0.2:
        options["softmax_scale"] = rng.choice([0.07, 1.3])
    return options
