"""The shapes that throughput is given for.

A problem's `figure` is the column of a results row that its roof bounds: products in training and prefill, memory in
a decode step.
"""

from dataclasses import dataclass
from typing import ClassVar

SEQLENS = tuple(512 * 2**i for i in range(7))
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
HIDDEN = 2048
# FLOP of a pass over those of the forward: two products a tile forward, five backward.
FLOP_FACTORS = {"forward": 1.0, "backward": 2.5, "both": 3.5}

CONTEXTS = tuple(1024 * 2**i for i in range(8))
BATCHES = (1, 8, 32, 128)
MAX_CACHE_GIB = 8  # of K and V in 2 bytes; on a GPU there are two of them, paged for us and contiguous for the peers


@dataclass(frozen=True)
class Problem:
    """Self-attention over `batch` sequences of `seqlen` tokens."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    causal: bool
    direction: str = "forward"  # or backward, or both: one after the other

    family: ClassVar[str] = "flash"
    figure: ClassVar[str] = "tflops"

    @property
    def shapes(self):
        """Of q, k and v."""
        return [(self.batch, self.seqlen, self.num_heads, self.head_dim)] * 3

    @property
    def flops(self):
        """The field's convention: 4 B H S^2 D forward, 2.5 times that backward, half of it with a causal mask."""
        forward = 4 * self.batch * self.num_heads * self.seqlen**2 * self.head_dim // (2 if self.causal else 1)
        return int(forward * FLOP_FACTORS[self.direction])

    def columns(self):
        """What a results row says of it."""
        return {
            "family": self.family,
            "direction": self.direction,
            "batch": self.batch,
            "seqlen_q": self.seqlen,
            "seqlen_k": self.seqlen,
            "num_heads_q": self.num_heads,
            "num_heads_kv": self.num_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim,
            "causal": self.causal,
        }

    def bytes(self, element_size):
        """Forward: q, k and v read once, out written once. Backward: those and dout read, dq, dk and dv written."""
        tensors = {"forward": 4, "backward": 8, "both": 12}[self.direction]
        return tensors * self.batch * self.seqlen * self.num_heads * self.head_dim * element_size


def grid(head_dims=HEAD_DIMS, seqlens=SEQLENS, causal=(False, True), direction="forward"):
    """FlashAttention's convention: 16k tokens (one sequence if it is longer) of 2048 channels, cut into heads."""
    return [
        Problem(max(1, TOKENS // seqlen), seqlen, HIDDEN // head_dim, head_dim, mask, direction)
        for head_dim in head_dims
        for mask in causal
        for seqlen in seqlens
    ]


@dataclass(frozen=True)
class DecodeProblem:
    """One new token in each of `batch` sequences, over a cache of `seqlen_k` tokens each, its own included.

    The default heads are those of Llama-3-8B, Qwen3-8B and many others.
    """

    batch: int
    seqlen_k: int
    num_heads_q: int = 32
    num_heads_kv: int = 8
    head_dim: int = 128
    page_size: int = 16

    family: ClassVar[str] = "paged"
    figure: ClassVar[str] = "gbps"

    @property
    def shapes(self):
        """Of q, and of k and v in a contiguous cache."""
        cache = (self.batch, self.seqlen_k, self.num_heads_kv, self.head_dim)
        return [(self.batch, 1, self.num_heads_q, self.head_dim), cache, cache]

    @property
    def flops(self):
        return 4 * self.batch * self.num_heads_q * self.seqlen_k * self.head_dim

    def columns(self):
        """What a results row says of it."""
        return {
            "family": self.family,
            "direction": "decode",
            "batch": self.batch,
            "seqlen_q": 1,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim,
            "causal": True,
            "page_size": self.page_size,
        }

    def cache_bytes(self, element_size):
        """K and V of all tokens."""
        return 2 * self.batch * self.seqlen_k * self.num_heads_kv * self.head_dim * element_size

    def bytes(self, element_size):
        """K, V and q read once, out written once."""
        return self.cache_bytes(element_size) + 2 * self.batch * self.num_heads_q * self.head_dim * element_size


def decode_grid(batches=BATCHES, seqlens=CONTEXTS):
    """Every batch at every context whose cache has at most MAX_CACHE_GIB."""
    problems = [DecodeProblem(batch, seqlen) for batch in batches for seqlen in seqlens]
    return [problem for problem in problems if problem.cache_bytes(element_size=2) <= MAX_CACHE_GIB * 2**30]
