"""What context parallelism has to know of multi-head latent attention: latent vectors and rotary keys travel.

A token has one of each for all heads: 576 elements in DeepSeek's models, whose keys and values of 128 heads have 40960.
"""

import itertools
import math
from typing import Any, NamedTuple

from torch import Tensor

from ..mla.passes import forward_pass, gradients_pass
from ..mla.schedule import ProblemSizes, choose_schedule
from .balance import Sharding, in_teams
from .cost import HeadDims
from .gather import keys_seen
from .local import Gradients, Mask, Part, Results, Rows, Wanted
from .operators import Kind, Settings, register
from .ulysses import check_heads


class Inputs(NamedTuple):
    """The tensors of a call."""

    q_nope: Tensor  # (rows, heads, dim), and so q_pe
    q_pe: Tensor
    kv_latent: Tensor  # (rows, dim), and so k_pe
    k_pe: Tensor
    w_uk: Tensor
    w_uv: Tensor
    cu_seqlens: Tensor | None


class Options(NamedTuple):
    """The other arguments of a call, checked."""

    softmax_scale: float
    causal: bool
    mode: str
    max_workspace_bytes: int


class LatentAttention(NamedTuple):
    """An `Attention` that computes the keys and values of latent vectors itself."""

    wanted: Wanted
    parameters: tuple[Tensor, Tensor]  # w_uk, w_uv
    softmax_scale: float
    mode: str
    max_workspace_bytes: int
    sinks: None = None
    num_heads_kv: int = 1  # a latent vector is exchanged like a key that all heads share

    @property
    def num_heads(self) -> int:
        return self.parameters[0].shape[0]

    @property
    def head_dim_v(self) -> int:
        return self.parameters[1].shape[1]

    @property
    def of_each_head(self) -> tuple[Tensor, ...]:
        return self.parameters

    def of_heads(self, heads: slice) -> "LatentAttention":
        w_uk, w_uv = self.parameters
        return self._replace(parameters=(w_uk[heads], w_uv[heads]))

    def forward(self, part: Part, rows: Rows, out: Tensor | None = None, with_sinks: bool = True) -> Any:
        tensors = [*part.take(rows), *self.parameters]
        q = tensors[0]
        out = q.new_empty((*q.shape[:-1], self.head_dim_v)) if out is None else out[None] if part.is_dense else out
        schedule = self.mode, self.max_workspace_bytes, any(map(any, self.wanted))
        return part.give((out, forward_pass(tensors, **self._options(part, q), schedule=schedule, out=out)))

    def gradients(self, part: Part, results: Results, rows: Rows) -> Gradients:
        tensors = [*part.take(rows), *self.parameters]
        options = self._options(part, tensors[0]) | dict(max_workspace_bytes=self.max_workspace_bytes)
        options["wanted"] = list(itertools.chain(*self.wanted))
        found = gradients_pass(*part.results(results), tensors, **options)
        of_queries, of_keys, of_parameters = self.wanted.pick(found[:2], found[2:4], found[4:])
        return part.give(of_queries), part.give(of_keys), of_parameters

    def _options(self, part, q):
        """Queries of a part see all of its keys, or those to the bottom right: no position is needed."""
        lengths, causal = part.lengths(q.device), part.window != (-1, -1)
        return dict(lengths=lengths, causal=causal, softmax_scale=self.softmax_scale)


class _Latents(Kind):
    name = "context_parallel_mla_prefill"
    inputs, options = Inputs, Options
    num_queries, num_rows, num_parameters = 2, 4, 2

    def head_dims(self, inputs: Inputs) -> tuple[int, ...]:
        """(num_heads, qk_nope_head_dim, qk_rope_head_dim, kv_lora_rank, v_head_dim)"""
        num_heads, nope, rank = inputs.w_uk.shape
        return num_heads, nope, inputs.q_pe.shape[2], rank, inputs.w_uv.shape[1]

    def shapes_of_rows(self, head_dims: tuple[int, ...]) -> list[tuple[int, ...]]:
        heads, nope, rope, rank, _ = head_dims
        return [(heads, nope), (heads, rope), (rank,), (rope,)]

    def costs_of(self, head_dims: tuple[int, ...]) -> HeadDims:
        heads, nope, rope, rank, dim_v = head_dims
        return HeadDims(heads, heads, nope + rope, dim_v, rank + rope, 2 * rank * heads * (nope + dim_v))

    def mask(self, others: Any, options: Options) -> Mask:
        return Mask(-1, 0 if options.causal else -1, has_alibi=False, has_dropout=False)

    def attention(self, wanted: Wanted, others: Any, options: Options, head_dims: tuple[int, ...]) -> LatentAttention:
        w_uk, w_uv, _ = others
        schedule = options.mode, options.max_workspace_bytes
        return LatentAttention(wanted, (w_uk, w_uv), options.softmax_scale, *schedule)

    def check(self, sharding: Sharding, inputs: Inputs, settings: Settings, mesh_shape: tuple[int, ...]) -> None:
        """Whether max_workspace_bytes is enough for the largest call of any rank: a ring that stops halfway would leave
        the others waiting."""
        mask, (heads, nope, rope, rank, dim_v) = self.mask((), settings.options), self.head_dims(inputs)
        if settings.method == "ulysses" or settings.inner is not None:
            check_heads(heads, 1, mesh_shape[-1], "q_nope")
            heads //= mesh_shape[-1]
            sharding, _ = in_teams(sharding, math.prod(mesh_shape) // mesh_shape[-1])
        num_keys = max(place.num_rows for place in keys_seen(sharding, mask))
        dims = heads, nope, rope, dim_v, rank, inputs.q_nope.element_size()
        sizes = ProblemSizes(max(sharding.num_rows), num_keys, 0.0, *dims)
        choose_schedule(sizes, settings.options.mode, settings.options.max_workspace_bytes, any(settings.wanted))

    def described(self, options: Options) -> dict[str, Any]:
        return options._asdict()


LATENTS = register(_Latents())
