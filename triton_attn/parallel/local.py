"""What one rank computes: attention of some of its queries over some keys, from wherever they came."""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..flash import backward_pass, forward_pass
from .balance import Chunk, Sharding, keys_seen_by, split_rows


class Rows(NamedTuple):
    """A rank's rows, (batch, rows, heads, dim), and the sinks."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


class Results(NamedTuple):
    """out and lse of queries over all keys that they see, and their gradients; dlse may be None."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None

    def split(self, chunks: tuple[Chunk, ...]) -> list["Results"]:
        """Of each chunk of a rank's rows."""
        dlses = [None] * len(chunks) if self.dlse is None else split_rows(self.dlse, chunks, 2)
        outs, lses, douts = (split_rows(x, chunks, dim) for x, dim in ((self.out, 1), (self.lse, 2), (self.dout, 1)))
        return [Results(*results) for results in zip(outs, lses, douts, dlses)]


class Problem(NamedTuple):
    """A call as all ranks know it, and which of them this is."""

    sharding: Sharding
    window: tuple[int, int]  # (left, right); causal sets right to 0, and -1 is unlimited
    options: dict[str, Any]  # of flash_attention, without its mask and sinks
    deterministic: bool
    group: dist.ProcessGroup
    rank: int

    @property
    def ranks(self) -> range:
        return range(self.sharding.num_ranks)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Of this rank."""
        return self.sharding.chunks[self.rank]

    def keys_of(self, queries: Chunk) -> Chunk:
        """The keys that some of the queries see."""
        return keys_seen_by(queries, self.window, self.sharding.seqlen)

    def forward(self, rows: Rows, queries: Chunk, keys: Chunk) -> tuple[Tensor, Tensor]:
        """out and lse of queries over keys, whose rows these are."""
        q, k, v, sinks = rows
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        lengths = None, None, q.shape[1], k.shape[1]
        return out, forward_pass(q, k, v, lengths, out=out, sinks=sinks, **self._options(queries, keys, q))

    def backward(self, results: Results, rows: Rows, queries: Chunk, keys: Chunk) -> tuple[Tensor | None, ...]:
        """The share of these keys in the gradients of the rows; dsinks is None without sinks."""
        out, lse, dout, dlse = results
        q, k, v, sinks = rows
        lengths = None, None, q.shape[1], k.shape[1]
        options = self._options(queries, keys, q) | dict(sinks=sinks, deterministic=self.deterministic)
        return backward_pass(dout, dlse, out, lse, q, k, v, lengths, **options)

    def _options(self, queries, keys, q):
        options = self.options | dict(window_size=self.window)
        if queries.end == keys.end and not options["dropout_p"]:
            return options  # aligned to the bottom right
        batch, _, num_heads, _ = q.shape
        return options | dict(shard=shard_of(queries.start, keys.start, 0, num_heads, batch, q.device))


@functools.lru_cache(maxsize=1024)
def shard_of(
    query_start: int, key_start: int, first_head: int, num_heads: int, batch: int, device: torch.device
) -> Tensor:
    """The `shard` of flash_attention; num_heads are those of the whole. Cached, since a copy to a GPU waits for it."""
    rows = [(query_start, key_start, i * num_heads + first_head) for i in range(batch)]
    with torch.inference_mode(False):  # a later call may save it for its backward pass
        return torch.tensor(rows, dtype=torch.int32, device=device).reshape(batch, 3)


def zeros_in_fp32(x: Tensor, num_rows: int | None = None) -> Tensor:
    """Sums of parts of a tensor like x (batch, rows, ...), fp64 for fp64; with as many rows as x, or num_rows."""
    shape = (x.shape[0], x.shape[1] if num_rows is None else num_rows, *x.shape[2:])
    return torch.zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
