"""Multi-head latent attention over sequences that are sharded over a mesh: the latent vectors of all keys are gathered.

A token has one latent vector and one rotary key for all heads: 576 elements in DeepSeek's models, whose keys and values
of 128 heads have 40960. They are fetched again in the backward pass. Between the passes a rank holds only its own rows.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.backend import should_check_values
from .._host.checks import check_bool, check_int, fail
from .._host.mesh import compare_ranks
from .._host.observers import autocast
from .._host.options import check_softmax_scale
from ..mla import mla_prefill
from ..mla.api import check_differentiable, check_prefill
from ..mla.passes import backward_pass
from .balance import (
    Pieces,
    Sharding,
    check_load_balance,
    check_mesh,
    check_num_rows,
    check_seqlen,
    in_teams,
    sharding_of,
)
from .exchange import exchange


@torch.compiler.disable
def context_parallel_mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    mesh: DeviceMesh,
    load_balance: Any = "head_tail",
    seqlen: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    mode: str = "auto",
    max_workspace_bytes: int = 2**28,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mla_prefill` of sequences whose rows are sharded over the ranks of a mesh: the same results and gradients.

    Every rank calls it with its own rows, as `shard_sequence` gives them, and with the same options. The latent vectors
    and rotary keys of all keys are gathered, and each rank attends with its queries to those that they see. With
    D = batch * (kv_lora_rank + qk_rope_head_dim), S the length of the whole sequence, and e the bytes of an element, a
    rank receives about

        forward: (1 - 1/R) S D e bytes        backward: (1 - 1/R) S D (e + 4) bytes

    of R ranks (the rows of the others, exactly), and holds S D (e + 4) bytes besides its rows for as long as a pass
    takes.

    Args:
        q_nope, q_pe, kv_latent, k_pe: this rank's rows, (batch, rows, ...) as in `mla_prefill`. Queries and keys have
            the same positions.
        w_uk, w_uv: of all heads that q_nope has, the same on all ranks. Heads can be sharded over another dimension of
            the mesh, with no change here.
        mesh: a DeviceMesh of one dimension, such as mesh["cp"].
        load_balance: how `shard_sequence` has sharded the rows: "head_tail" or None.
        seqlen: the length of the whole sequence. None: all ranks hold the same number of rows.
        check_values: compare the call with that of the other ranks first, which costs a collective of its own and a
            device-to-host sync. None follows the environment variable TRITON_ATTN_CHECK=1.
        The rest as in `mla_prefill`. max_workspace_bytes does not count what was gathered.

    Returns:
        out and lse of this rank's rows, as `mla_prefill`. The gradients of w_uk and w_uv are this rank's part; sum them
        over the mesh, as of any parameter that all ranks have.

    Raises: as `mla_prefill`; ValueError: the rows are not those of `shard_sequence`; with check_values, on every rank:
        ranks differ in a shape, a dtype or an option. Without check_values the results of such ranks are undefined.

    torch.compile breaks the graph here.

    Example:
        >>> from triton_attn.parallel import context_parallel_mla_prefill, shard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> shapes = (1, 40, 4, 32), (1, 40, 4, 16), (1, 40, 64), (1, 40, 16)
        >>> rows = [shard_sequence(torch.randn(shape), mesh) for shape in shapes]
        >>> context_parallel_mla_prefill(*rows, *torch.randn(2, 4, 32, 64), mesh=mesh, seqlen=40).shape
        torch.Size([1, 40, 4, 32])
    """
    tensors = autocast(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv)
    rank, num_ranks = check_mesh(mesh)
    check_prefill(tensors, (None, None, None, None), mode)
    num_rows = tensors[0].shape[1]
    if tensors[2].shape[1] != num_rows:
        fail("kv_latent", f"q_nope's {num_rows} rows", tensors[2].shape[1])
    load_balance = check_load_balance(load_balance, False)
    seqlen = check_seqlen(seqlen, num_rows, num_ranks)
    sharding = sharding_of((0, seqlen), seqlen, num_ranks, load_balance)
    check_num_rows(sharding, rank, num_rows)
    causal, return_lse = check_bool("causal", causal), check_bool("return_lse", return_lse)
    softmax_scale = check_softmax_scale(softmax_scale, tensors[0].shape[-1] + tensors[1].shape[-1])
    max_workspace_bytes = check_int("max_workspace_bytes", max_workspace_bytes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        check_differentiable(tensors[0], tensors[1], tensors[5])
        if mode == "absorbed":
            raise NotImplementedError("mode: 'absorbed' does not support gradients; 'fused' and 'materialized' do")
    problem = _Problem(sharding, mesh.get_group(), rank, causal, softmax_scale, mode, max_workspace_bytes)
    if should_check_values(check_values):
        _compare(problem, load_balance, tensors)
    out, lse = _Prefill.apply(*tensors, problem)
    return (out, lse) if return_lse else out


class _Problem(NamedTuple):
    """A call as all ranks know it, and which of them this is."""

    sharding: Sharding
    group: dist.ProcessGroup
    rank: int
    causal: bool
    softmax_scale: float
    mode: str
    max_workspace_bytes: int

    @property
    def parts(self) -> list[tuple[slice, int]]:
        """(rows of queries, number of keys from the first on that they see): the masks of these are bottom-right."""
        segments = self.sharding.segments[self.rank]
        if self.causal:
            return [(segment.rows.rows, segment.chunk.end) for segment in segments]
        return [(slice(None), self.sharding.seqlen)] if segments else []

    def gather(self, kv_latent: Tensor, k_pe: Tensor) -> tuple[Tensor, ...]:
        """Latent vectors and rotary keys of all keys, from this rank's."""
        own = torch.cat([kv_latent, k_pe], dim=2)
        shapes = [(own.shape[0], num_rows, own.shape[2]) for num_rows in self.sharding.num_rows]
        parts = exchange([own for _ in shapes], shapes, self.group)
        _, (all_ranks,) = in_teams(self.sharding, 1)
        return all_ranks.order.take(torch.cat(parts, 1), 1).split([kv_latent.shape[2], k_pe.shape[2]], dim=2)

    def sum_of_own_rows(self, gradients: Tensor) -> Tensor:
        """This rank's rows of the sum, over the ranks and in their order, of gradients (batch, seqlen, dim)."""
        sent = [Pieces(place.chunks).take(gradients, 1) for place in self.sharding.places]
        own = sent[self.rank]
        return sum(exchange(sent, [own.shape] * len(sent), self.group), start=torch.zeros_like(own))


class _Prefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, problem: _Problem) -> Any:
        latents, rope_keys = problem.gather(kv_latent, k_pe)
        batch, num_rows, num_heads, _ = q_nope.shape
        out = q_nope.new_empty((batch, num_rows, num_heads, w_uv.shape[1]))
        lse = out.new_empty((batch, num_heads, num_rows), dtype=torch.promote_types(out.dtype, torch.float32))
        options = dict(causal=problem.causal, softmax_scale=problem.softmax_scale, mode=problem.mode)
        for rows, num_keys in problem.parts:
            keys = latents[:, :num_keys], rope_keys[:, :num_keys]
            given = q_nope[:, rows], q_pe[:, rows], *keys, w_uk, w_uv
            results = mla_prefill(
                *given, **options, max_workspace_bytes=problem.max_workspace_bytes, return_lse=True, check_values=False
            )
            out[:, rows], lse[:, :, rows] = results
        ctx.save_for_backward(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, lse = ctx.saved_tensors
        problem = ctx.problem
        dout = torch.zeros_like(out) if dout is None else dout
        latents, rope_keys = problem.gather(kv_latent, k_pe)
        dtype = torch.promote_types(out.dtype, torch.float32)
        # Of kv_latent and k_pe side by side, and of the weights.
        shape = *latents.shape[:2], latents.shape[2] + rope_keys.shape[2]
        totals = [torch.zeros(shape, dtype=dtype, device=out.device)]
        totals += [torch.zeros_like(w, dtype=dtype) for w in (w_uk, w_uv)]
        of_queries = torch.empty_like(q_nope), torch.empty_like(q_pe)
        for rows, num_keys in problem.parts:
            given = q_nope[:, rows], q_pe[:, rows], latents[:, :num_keys], rope_keys[:, :num_keys], w_uk, w_uv
            results = dout[:, rows], None if dlse is None else dlse[:, :, rows], out[:, rows], lse[:, :, rows]
            options = dict(causal=problem.causal, softmax_scale=problem.softmax_scale)
            found = backward_pass(*results, given, **options, max_workspace_bytes=problem.max_workspace_bytes)
            for total, gradient in zip(of_queries, found):
                total[:, rows] = gradient
            parts = torch.cat(found[2:4], dim=2), *found[4:]
            for total, part in zip((totals[0][:, :num_keys], *totals[1:]), parts):
                total += part
        own = problem.sum_of_own_rows(totals[0]).split([kv_latent.shape[2], k_pe.shape[2]], dim=2)
        gradients = *own, *totals[1:]
        return *of_queries, *(x.to(out.dtype) for x in gradients), None


def _compare(problem, load_balance, tensors):
    """Raise on every rank if the calls of the ranks differ."""
    names = "q_nope", "q_pe", "kv_latent", "k_pe"
    own = {name: ((x.shape[0], *x.shape[2:]), x.dtype) for name, x in zip(names, tensors)}
    own |= {name: (tuple(x.shape), x.dtype) for name, x in zip(("w_uk", "w_uv"), tensors[4:])}
    own |= dict(load_balance=load_balance, seqlen=problem.sharding.seqlen)
    names = "causal", "softmax_scale", "mode", "max_workspace_bytes"
    compare_ranks(own | {name: getattr(problem, name) for name in names}, problem.group)
