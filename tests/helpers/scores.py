"""What is done to scores before the softmax. A new option is a field of Scores, a line of draw_scores and of ALONE.

Cases of the families that take these options inherit from Scores. So the option is in their random draws, and
tests/test_contract.py tries it alone and beside each other option against the definition.
"""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Scores:
    causal: bool = True
    window_size: tuple = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None  # None, "per head" or "per sequence"
    sinks: torch.dtype | None = None

    @property
    def options(self):
        """Those that a call and `attend` take as they stand; slopes and sinks are tensors, which `Inputs` draw."""
        return {name: getattr(self, name) for name in ("causal", "window_size", "softmax_scale", "softcap")}


ALONE = [
    {"causal": False},
    {"window_size": (7, 3)},
    {"softmax_scale": 0.07},
    {"softcap": 0.7},
    {"alibi": "per head"},
    {"alibi": "per sequence"},
    {"sinks": torch.float32},
]
PAIRS = [a | b for a, b in itertools.combinations(ALONE, 2) if not a.keys() & b.keys()]


def draw_scores(draw, dtype):
    from hypothesis import strategies as st  # random tests alone need it

    side = st.just(-1) | st.sampled_from([0, 1, 5, 17, 64, 10**6])
    return {
        "causal": draw(st.booleans()),
        "window_size": draw(st.tuples(side, side)),
        "softmax_scale": draw(st.none() | st.sampled_from([1e-9, 0.07, 0.2])),
        "softcap": draw(st.just(0.0) | st.sampled_from([0.7, 30.0])),
        "alibi": draw(st.sampled_from([None, None, "per head", "per sequence"])),
        "sinks": draw(st.sampled_from([None, None, torch.float32, dtype])),
    }


def draw_key_shard(draw, page_size):
    """(rank, num_ranks, interleave) of a cache, or None."""
    from hypothesis import strategies as st

    num_ranks = draw(st.sampled_from([1, 1, 2, 3, 8]))
    if num_ranks == 1:
        return None
    interleave = draw(st.sampled_from([n for n in range(1, page_size + 1) if page_size % n == 0]))
    return draw(st.integers(0, num_ranks - 1)), num_ranks, interleave
