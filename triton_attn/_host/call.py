"""A checked call of flash attention as one object, which operators, launchers and references take.

MLA's prefill takes its Lengths too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_cu_seqlens, check_cu_seqlens_values, check_max_seqlen, fail, layout_of, read_length
from .options import AttentionOptions, check_shard_values


class Lengths(NamedTuple):
    """Lengths of the sequences of a batch.

    A packed batch has cu_seqlens, and its longest sequences have max_seqlen_q queries and max_seqlen_k keys. In a dense
    batch cu_seqlens are None, and all sequences have these lengths.
    """

    cu_seqlens_q: Tensor | None  # (batch + 1,)
    cu_seqlens_k: Tensor | None  # (batch + 1,)
    max_seqlen_q: Any  # an int; in a traced call it may be a tensor of one element
    max_seqlen_k: Any

    def batch(self, q: Tensor) -> int:
        """The number of sequences, of which q holds the queries."""
        return q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def check_values(self, total_q: int, total_k: int) -> None:
        """Raise unless the cu_seqlens of a packed batch fit its rows and longest lengths. A device-to-host sync."""
        check_cu_seqlens_values("cu_seqlens_q", self.cu_seqlens_q, total_q, self.max_seqlen_q)
        check_cu_seqlens_values("cu_seqlens_k", self.cu_seqlens_k, total_k, self.max_seqlen_k)


def check_packed(cu_seqlens_q: Any, cu_seqlens_k: Any, device: Any) -> None:
    """Check the cu_seqlens of a packed batch but for their values."""
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        fail("cu_seqlens_k", f"cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape))


def packed_lengths(cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any) -> Lengths:
    """The Lengths of a packed batch, whose longest lengths are checked here and its cu_seqlens by `check_packed`."""
    max_seqlen_q = check_max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check_max_seqlen("max_seqlen_k", max_seqlen_k)
    return Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


# Lengths as arguments of a torch operator. A longest length is passed as max_seqlen, a number, or as longest, a tensor
# that tracing could not read. The other of the two is None.
LENGTHS_SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? longest_q, Tensor? longest_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)


def lengths_as_arguments(lengths: Lengths) -> tuple[Any, ...]:
    """Arguments of an operator, see LENGTHS_SCHEMA."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    longest_q = longest_k = None
    if isinstance(max_seqlen_q, Tensor):
        max_seqlen_q, longest_q = None, max_seqlen_q
    if isinstance(max_seqlen_k, Tensor):
        max_seqlen_k, longest_k = None, max_seqlen_k
    return cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, max_seqlen_q, max_seqlen_k


def lengths_of_arguments(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, max_seqlen_q, max_seqlen_k) -> Lengths:
    """The Lengths that an operator was called with. Each longest length in a tensor costs a device-to-host sync."""
    if longest_q is not None:
        max_seqlen_q = read_length("max_seqlen_q", longest_q)
    if longest_k is not None:
        max_seqlen_k = read_length("max_seqlen_k", longest_k)
    return Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


class Problem(NamedTuple):
    """What the plans of all kernels of a call depend on, but for lengths, the seed of dropout and addresses."""

    layout: tuple  # (shape, strides) of q, k and v
    dtype: torch.dtype
    packed_batch: int | None  # None: dense
    softmax_scale: float
    window: tuple
    softcap: float | None
    has_alibi: bool
    has_sinks: bool
    has_shard: bool


class Call(NamedTuple):
    """A checked call of flash attention. torch.autocast has already cast q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Lengths
    options: AttentionOptions
    problem: Problem

    def check_values(self) -> None:
        """`Lengths.check_values` of a packed batch, and the values of a shard. A device-to-host sync."""
        if self.lengths.cu_seqlens_q is not None:
            self.lengths.check_values(self.q.shape[0], self.k.shape[0])
        if self.options.shard is not None:
            check_shard_values(self.options.shard)


def call_of(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, lengths: Lengths | None = None) -> Call:
    """The Call of arguments that need no check. Without lengths the batch is dense."""
    if lengths is None:
        lengths = Lengths(None, None, q.shape[1], k.shape[1])
    batch = None if lengths.cu_seqlens_q is None else lengths.batch(q)
    return Call(q, k, v, lengths, options, problem_of((q, k, v), batch, options))


def problem_of(qkv: tuple[Tensor, Tensor, Tensor], packed_batch: int | None, options: AttentionOptions) -> Problem:
    softmax_scale, window, softcap, alibi_slopes, sinks, _, _, shard, _ = options
    given = alibi_slopes is not None, sinks is not None, shard is not None
    return Problem(layout_of(*qkv), qkv[0].dtype, packed_batch, softmax_scale, window, softcap, *given)
