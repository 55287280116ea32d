"""The schedule of a prefill, chosen by a cost model from shapes alone, and the size of its chunks."""

import functools
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from .._host.checks import fail

MODES = ("fused", "absorbed", "materialized")
FLOP_PER_BYTE = 300  # of an H100 in bf16: 989 TFLOP/s over 3.35 TB/s
QUERIES_PER_TILE = 128
FEWEST_ROWS = 128  # least rows of a chunk that does not hold all keys


@dataclass(frozen=True)
class ProblemSizes:
    """Sizes of a call of `mla_prefill`. pairs counts (query, key) pairs that are not masked; element_size in bytes."""

    num_queries: int
    num_keys: int
    pairs: float
    num_heads: int
    nope: int
    rope: int
    v: int
    rank: int
    element_size: int

    @classmethod
    def of(cls, call):
        """Those of a PrefillCall."""
        return cls.of_shapes(
            [x.shape for x in call.tensors], call.lengths.batch(call.q_nope), call.causal, call.q_nope.dtype
        )

    @classmethod
    def of_shapes(cls, shapes, batch, causal, dtype):
        q_nope, q_pe, kv_latent, _, (num_heads, nope, rank), (_, v, _) = shapes
        num_queries, num_keys = prod(q_nope[:-2]), prod(kv_latent[:-1])
        pairs = causal_pairs(num_queries / max(batch, 1), num_keys / max(batch, 1), causal) * batch
        return cls(num_queries, num_keys, pairs, num_heads, nope, q_pe[-1], v, rank, dtype.itemsize)


class Schedule(NamedTuple):
    """A mode, and the heads and rows of latent vectors of a chunk."""

    mode: str
    heads_each: int
    rows_each: int


def causal_pairs(seqlen_q, seqlen_k, causal):
    """Number of (query, key) pairs that are not masked."""
    if not causal:
        return seqlen_q * seqlen_k
    seen = min(seqlen_q, seqlen_k)  # queries that see a key
    return seen * (seqlen_k - seen) + seen * (seen + 1) / 2


def cost(sizes, mode):
    """FLOP of one head by the formulas of `mla_prefill`; a byte counts as FLOP_PER_BYTE."""
    s = sizes
    up_projection = 2 * s.rank * (s.nope + s.v)
    byte_cost = FLOP_PER_BYTE * s.element_size
    if mode == "absorbed":
        per_query = up_projection + (4 * s.rank + 2 * s.rope) * byte_cost
        return 2 * (2 * s.rank + s.rope) * s.pairs + per_query * s.num_queries
    attention = 2 * (s.nope + s.rope + s.v) * s.pairs
    if mode == "fused":
        return attention + up_projection * s.pairs / QUERIES_PER_TILE
    return attention + (up_projection + 2 * (s.nope + s.v) * byte_cost) * s.num_keys


def workspace_bytes(sizes, mode):
    """Bytes of workspace for one head; "fused" needs none."""
    s = sizes
    if mode == "materialized":
        return s.num_keys * (s.nope + s.v) * s.element_size
    if mode == "absorbed":
        return s.num_queries * ((2 * s.rank + s.rope) * s.element_size + torch.float32.itemsize)
    return 0


def heads_of_backward(sizes, max_workspace_bytes):
    """Heads of a chunk of the backward pass, at least one."""
    return max(1, max_workspace_bytes // max(1, backward_bytes(sizes)))


def backward_bytes(sizes):
    """Bytes of a head's queries, keys, values and gradients. The gradient of queries exists in fp32 too."""
    s = sizes
    dim = s.nope + s.rope
    per_query = dim * (2 * s.element_size + torch.float32.itemsize)
    return s.num_queries * per_query + s.num_keys * 2 * (dim + s.v) * s.element_size


def choose_schedule(sizes, mode, max_workspace_bytes, wants_grad):
    """The schedule of a call.

    Raises: NotImplementedError, if the mode has no gradient; ValueError, if max_workspace_bytes is too small for it.
    """
    if mode == "absorbed" and wants_grad:
        raise NotImplementedError("mode: 'absorbed' does not support gradients; 'fused' and 'materialized' do")
    if mode != "auto":
        chunk = _chunk(sizes, mode, max_workspace_bytes)
        if chunk is None:
            fail("max_workspace_bytes", f"room for a chunk of {_fewest_bytes(sizes, mode)} bytes", max_workspace_bytes)
        return Schedule(mode, *chunk)
    modes = [m for m in MODES if m != "absorbed" or not wants_grad]
    chunks = {m: _chunk(sizes, m, max_workspace_bytes) for m in modes}
    best = None
    for m in modes:  # torch.compile does not trace min with a key
        if chunks[m] and (best is None or cost(sizes, m) < cost(sizes, best)):
            best = m
    return Schedule(best, *chunks[best])


def schedule_of(call, schedule):
    """`choose_schedule` of a PrefillCall, remembered; schedule is (mode, max_workspace_bytes, wants_grad)."""
    return _schedule(call.find_layouts(), call.causal, *schedule)


@functools.lru_cache(maxsize=1024)
def _schedule(layouts, causal, mode, max_workspace_bytes, wants_grad):
    q_nope, cu_seqlens = layouts.q_nope, layouts.cu_seqlens_q
    shapes = [x.shape for x in layouts.of(("q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv"))]
    batch = q_nope.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = ProblemSizes.of_shapes(shapes, batch, causal, q_nope.dtype)
    return choose_schedule(sizes, mode, max_workspace_bytes, wants_grad)


def _chunk(sizes, mode, max_workspace_bytes):
    """(heads, rows) of the largest chunk within max_workspace_bytes; None if none fits."""
    per_head = workspace_bytes(sizes, mode)
    heads = sizes.num_heads if per_head == 0 else min(sizes.num_heads, max_workspace_bytes // per_head)
    if 0 < heads < sizes.num_heads:
        # The number of heads is a constexpr. A power of two keeps the number of compilations small.
        heads = 1 << (heads.bit_length() - 1)
    if heads > 0 or sizes.num_heads == 0:
        return max(heads, 1), max(sizes.num_keys, 1)
    if mode == "absorbed" or max_workspace_bytes < _fewest_bytes(sizes, mode):
        return None
    per_row = (sizes.nope + sizes.v) * sizes.element_size
    return 1, (max_workspace_bytes - _sums_bytes(sizes)) // per_row


def _sums_bytes(sizes):
    """Bytes of the running results of one head if its keys are cut: fp32 outputs, and log-sum-exps of all heads."""
    return sizes.num_queries * (sizes.v + sizes.num_heads) * torch.float32.itemsize


def _fewest_bytes(sizes, mode):
    if mode == "absorbed":
        return workspace_bytes(sizes, mode)
    row_bytes = FEWEST_ROWS * (sizes.nope + sizes.v) * sizes.element_size
    return min(workspace_bytes(sizes, mode), _sums_bytes(sizes) + row_bytes)
