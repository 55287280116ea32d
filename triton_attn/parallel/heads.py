"""What context parallelism has to know of attention over heads of keys and values: flash attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flash import forward_pass, gradients_pass
from .balance import Sharding
from .cost import HeadDims
from .local import Gradients, Mask, Part, Results, Rows, Wanted
from .operators import Kind, Settings, register
from .ulysses import check_heads


class Inputs(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # (rows, heads, dim), and so k and v
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens: Tensor | None


class Options(NamedTuple):
    """The other arguments of a call, checked."""

    seed: int | None  # of dropout, if it was not given as a tensor: for ranks to compare
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    deterministic: bool


class HeadAttention(NamedTuple):
    """An `Attention` with this rank's heads, from first_head on among num_heads."""

    wanted: Wanted
    options: dict[str, Any]  # softmax_scale, softcap, alibi_slopes, dropout_p and dropout_seed of flash_attention
    sinks: Tensor | None
    deterministic: bool
    num_heads: int  # of the queries
    num_heads_kv: int
    head_dim_v: int
    first_head: int = 0
    parameters: tuple[Tensor, ...] = ()

    @property
    def of_each_head(self) -> tuple[Tensor, ...]:
        return () if self.sinks is None else (self.sinks,)

    def of_heads(self, heads: slice) -> "HeadAttention":
        """With some of the query heads. What belongs to them is copied, and so is aligned as whole tensors are."""
        slopes, sinks = self.options["alibi_slopes"], self.sinks
        slopes = None if slopes is None else slopes[..., heads].clone(memory_format=torch.contiguous_format)
        sinks = None if sinks is None else sinks[heads].clone()
        return self._replace(options=self.options | dict(alibi_slopes=slopes), sinks=sinks, first_head=heads.start)

    def forward(self, part: Part, rows: Rows, out: Tensor | None = None, with_sinks: bool = True) -> Any:
        q, k, v = part.take(rows)
        out = q.new_empty((*q.shape[:-1], self.head_dim_v)) if out is None else out[None] if part.is_dense else out
        sinks = self.sinks if with_sinks else None
        lse = forward_pass(q, k, v, part.lengths(q.device), out=out, sinks=sinks, **self._options(part, q.device))
        return part.give((out, lse))

    def gradients(self, part: Part, results: Results, rows: Rows) -> Gradients:
        q, k, v = part.take(rows)
        options = self._options(part, q.device) | dict(deterministic=self.deterministic)
        options["wanted"] = self.wanted.queries + self.wanted.keys
        dq, dk, dv = gradients_pass(*part.results(results), q, k, v, part.lengths(q.device), **options)
        of_queries, of_keys, _ = self.wanted.pick([dq], [dk, dv], [])
        return part.give(of_queries), part.give(of_keys), []

    def _options(self, part, device):
        options = self.options | dict(window_size=part.window)
        if part.needs_positions:
            options["shard"] = part.shard(device, self.num_heads, self.first_head)
        slopes = options["alibi_slopes"]
        if slopes is not None and slopes.ndim == 2:
            options["alibi_slopes"] = slopes.index_select(0, part.documents(device))
        return options


class _Heads(Kind):
    name = "context_parallel_attention"
    inputs, options = Inputs, Options
    num_queries, num_rows, num_parameters = 1, 3, 1

    def head_dims(self, inputs: Inputs) -> tuple[int, ...]:
        """(num_heads_q, num_heads_kv, head_dim, head_dim_v)"""
        return inputs.q.shape[1], *inputs.k.shape[1:], inputs.v.shape[2]

    def shapes_of_rows(self, head_dims: tuple[int, ...]) -> list[tuple[int, ...]]:
        heads, heads_kv, dim, dim_v = head_dims
        return [(heads, dim), (heads_kv, dim), (heads_kv, dim_v)]

    def costs_of(self, head_dims: tuple[int, ...]) -> HeadDims:
        return HeadDims(*head_dims)

    def mask(self, others: Any, options: Options) -> Mask:
        has_alibi = others[1] is not None
        return Mask(options.window_left, options.window_right, has_alibi, options.dropout_p > 0)

    def attention(self, wanted: Wanted, others: Any, options: Options, head_dims: tuple[int, ...]) -> HeadAttention:
        sinks, slopes, seed, _ = others
        of_call = dict(
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            alibi_slopes=slopes,
            dropout_p=options.dropout_p,
            dropout_seed=seed,
        )
        num_heads, num_heads_kv, _, head_dim_v = head_dims
        return HeadAttention(wanted, of_call, sinks, options.deterministic, num_heads, num_heads_kv, head_dim_v)

    def check(self, sharding: Sharding, inputs: Inputs, settings: Settings, mesh_shape: tuple[int, ...]) -> None:
        if settings.method == "ulysses" or settings.inner is not None:
            check_heads(inputs.q.shape[1], inputs.k.shape[1], mesh_shape[-1])

    def described(self, options: Options) -> dict[str, Any]:
        found = options._asdict()
        return found | dict(window_size=(found.pop("window_left"), found.pop("window_right")))


HEADS = register(_Heads())
