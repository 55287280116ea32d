"""The shapes of throughput figures.

A problem's `figure` is the results column that its roof bounds: TFLOP/s in training and prefill, GB/s in a decode step.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from triton_attn.cache import kv_cache_bytes_per_token
from triton_attn.mla.schedule import ProblemSizes, causal_pairs

SEQLENS = tuple(512 * 2**i for i in range(7))
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
HIDDEN = 2048
# FLOP of a pass over FLOP of the forward: two matmuls per tile forward, five backward.
FLOP_FACTORS = {"forward": 1.0, "backward": 2.5, "both": 3.5}

CONTEXTS = tuple(1024 * 2**i for i in range(8))
BATCHES = (1, 8, 32, 128)
MAX_CACHE_GIB = 8  # of K and V in 2 bytes; a GPU holds two, paged for us and contiguous for the peers


@dataclass(frozen=True)
class Problem:
    """Self-attention over `batch` sequences of `seqlen` tokens."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    causal: bool
    direction: str = "forward"  # forward, backward, or both in sequence
    value_dim: int | None = None  # None: head_dim

    family: ClassVar[str] = "flash"
    figure: ClassVar[str] = "tflops"

    @property
    def head_dim_v(self):
        return self.value_dim or self.head_dim

    @property
    def shapes(self):
        """Shapes of q, k and v."""
        dims = self.head_dim, self.head_dim, self.head_dim_v
        return [(self.batch, self.seqlen, self.num_heads, dim) for dim in dims]

    @property
    def flops(self):
        """FLOP by the usual convention: 2 B H S^2 (D + D_v) forward, 2.5 times that backward, half of it with a causal
        mask."""
        widths = self.head_dim + self.head_dim_v
        forward = 2 * self.batch * self.num_heads * self.seqlen**2 * widths // (2 if self.causal else 1)
        return int(forward * FLOP_FACTORS[self.direction])

    def columns(self):
        """Its columns in a results row."""
        return {
            "family": self.family,
            "direction": self.direction,
            "batch": self.batch,
            "seqlen_q": self.seqlen,
            "seqlen_k": self.seqlen,
            "num_heads_q": self.num_heads,
            "num_heads_kv": self.num_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "causal": self.causal,
        }

    def bytes(self, element_size):
        """Forward: q, k and v are read once, out is written once. Backward: these and dout are read, dq, dk and dv
        written.
        """
        of_each_width = {"forward": 2, "backward": 4, "both": 6}[self.direction]
        widths = self.head_dim + self.head_dim_v
        return of_each_width * self.batch * self.seqlen * self.num_heads * widths * element_size


def grid(head_dims=HEAD_DIMS, seqlens=SEQLENS, causal=(False, True), direction="forward"):
    """FlashAttention's convention: 16k tokens (one sequence if it is longer) of 2048 channels, divided into heads."""
    return [
        Problem(max(1, TOKENS // seqlen), seqlen, HIDDEN // head_dim, head_dim, mask, direction)
        for head_dim in head_dims
        for mask in causal
        for seqlen in seqlens
    ]


@dataclass(frozen=True)
class DecodeProblem:
    """One new token in each of `batch` sequences, over a cache of `seqlen_k` tokens each, with the new token in it.

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
    direction: ClassVar[str] = "decode"
    seqlen_q: ClassVar[int] = 1

    @property
    def head_dim_v(self):
        return self.head_dim

    @property
    def shapes(self):
        """Shapes of q, and of k and v in a contiguous cache."""
        cache = (self.batch, self.seqlen_k, self.num_heads_kv, self.head_dim)
        return [(self.batch, self.seqlen_q, self.num_heads_q, self.head_dim), cache, cache]

    @property
    def flops(self):
        pairs = causal_pairs(self.seqlen_q, self.seqlen_k, causal=True)
        return int(4 * self.batch * self.num_heads_q * pairs * self.head_dim)

    def columns(self):
        """Its columns in a results row."""
        return {
            "family": self.family,
            "direction": self.direction,
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim,
            "causal": True,
            "page_size": self.page_size,
        }

    def cache_bytes(self, element_size):
        """Bytes of K and V of all tokens."""
        return 2 * self.batch * self.seqlen_k * self.num_heads_kv * self.head_dim * element_size

    def bytes(self, element_size):
        """K, V and q are read once, out is written once."""
        rows = self.batch * self.seqlen_q * self.num_heads_q
        return self.cache_bytes(element_size) + 2 * rows * self.head_dim * element_size


@dataclass(frozen=True)
class ChunkProblem(DecodeProblem):
    """`seqlen_q` new tokens at the end of each sequence: chunks of prompts."""

    seqlen_q: int = 512

    figure: ClassVar[str] = "tflops"
    direction: ClassVar[str] = "prefill"


def decode_grid(batches=BATCHES, seqlens=CONTEXTS):
    """Every batch at every context whose cache has at most MAX_CACHE_GIB."""
    problems = [DecodeProblem(batch, seqlen) for batch in batches for seqlen in seqlens]
    return [problem for problem in problems if problem.cache_bytes(element_size=2) <= MAX_CACHE_GIB * 2**30]


LATENT_HEADS = (16, 64, 128)
LATENT_BATCH = 32
CACHE_DTYPES = ("bfloat16", "float8_e4m3fn")


@dataclass(frozen=True)
class LatentDecodeProblem:
    """One new token in each of `batch` sequences over a paged latent cache of `seqlen_k` tokens each, with the new
    token.

    Queries are absorbed and outputs are latent vectors, as in FlashMLA, so weights are not involved. The default widths
    are those of DeepSeek-V2 and V3.
    """

    batch: int
    seqlen_k: int
    num_heads_q: int
    cache_dtype: str = "bfloat16"
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    page_size: int = 64

    family: ClassVar[str] = "mla"
    figure: ClassVar[str] = "gbps"
    num_heads_kv: ClassVar[int] = 1

    @property
    def head_dim(self):
        """Widths of queries and keys; values are the latent part of the keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def head_dim_v(self):
        return self.kv_lora_rank

    @property
    def shapes(self):
        """Shapes of q, and of the latent vectors with their rotary keys, contiguous."""
        return [(self.batch, 1, self.num_heads_q, self.head_dim), (self.batch, self.seqlen_k, self.head_dim)]

    @property
    def flops(self):
        return 2 * self.batch * self.num_heads_q * self.seqlen_k * (self.head_dim + self.head_dim_v)

    def columns(self):
        """Its columns in a results row."""
        return {
            "family": self.family,
            "direction": "decode",
            "batch": self.batch,
            "seqlen_q": 1,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "causal": True,
            "page_size": self.page_size,
            "cache_dtype": self.cache_dtype,
        }

    def cache_bytes(self):
        """Bytes of the latent vectors (with scales if they are fp8) and rotary keys of all tokens."""
        widths = {"kv_lora_rank": self.kv_lora_rank, "qk_rope_head_dim": self.qk_rope_head_dim}
        per_token = kv_cache_bytes_per_token(num_layers=1, **widths, dtype=getattr(torch, self.cache_dtype))
        return self.batch * self.seqlen_k * per_token

    def bytes(self, element_size):
        """The cache and q are read once, out is written once. element_size is that of q and out."""
        return self.cache_bytes() + self.batch * self.num_heads_q * (self.head_dim + self.head_dim_v) * element_size


def latent_decode_grid(heads=LATENT_HEADS, batch=LATENT_BATCH, seqlens=CONTEXTS):
    return [
        LatentDecodeProblem(batch, seqlen, num_heads, cache_dtype)
        for num_heads in heads
        for cache_dtype in CACHE_DTYPES
        for seqlen in seqlens
    ]


@dataclass(frozen=True)
class LatentPrefillProblem:
    """`seqlen_q` queries at the end of a sequence of `seqlen_k` tokens, from latent vectors to outputs; causal.

    The default sizes are those of DeepSeek-V3. The projection of hidden states to queries and latent vectors is not
    included.
    """

    seqlen_q: int
    seqlen_k: int
    num_heads: int = 128
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_lora_rank: int = 512

    family: ClassVar[str] = "mla"
    figure: ClassVar[str] = "tflops"

    @property
    def shapes(self):
        """Shapes of q_nope, q_pe, kv_latent, k_pe, w_uk and w_uv."""
        return [
            (1, self.seqlen_q, self.num_heads, self.qk_nope_head_dim),
            (1, self.seqlen_q, self.num_heads, self.qk_rope_head_dim),
            (1, self.seqlen_k, self.kv_lora_rank),
            (1, self.seqlen_k, self.qk_rope_head_dim),
            (self.num_heads, self.qk_nope_head_dim, self.kv_lora_rank),
            (self.num_heads, self.v_head_dim, self.kv_lora_rank),
        ]

    @property
    def flops(self):
        """FLOP of attention over keys and values of every head. Other work of a schedule does not count."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return int(2 * width * self.num_heads * causal_pairs(self.seqlen_q, self.seqlen_k, causal=True))

    def sizes(self, element_size):
        """The sizes in the form that the choice of a schedule takes."""
        pairs = causal_pairs(self.seqlen_q, self.seqlen_k, causal=True)
        widths = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank
        return ProblemSizes(self.seqlen_q, self.seqlen_k, pairs, self.num_heads, *widths, element_size)

    def columns(self):
        """Its columns in a results row."""
        return {
            "family": self.family,
            "direction": "prefill",
            "batch": 1,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads,
            "num_heads_kv": self.num_heads,
            "head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "head_dim_v": self.v_head_dim,
            "causal": True,
        }

    def bytes(self, element_size):
        """Inputs are read once, out is written once."""
        out = self.seqlen_q * self.num_heads * self.v_head_dim
        return (sum(map(prod, self.shapes)) + out) * element_size


PROMPTS = tuple(128 * 2**i for i in range(9))
CHUNKS = (1024, 128)  # queries: a chunk of a prompt, and a short turn after a long context


def latent_prefill_grid(prompts=PROMPTS, contexts=CONTEXTS, chunks=CHUNKS):
    """Whole prompts, then chunks of a prompt at every longer context."""
    whole = [LatentPrefillProblem(seqlen, seqlen) for seqlen in prompts]
    return whole + [LatentPrefillProblem(chunk, context) for chunk in chunks for context in contexts if context > chunk]
