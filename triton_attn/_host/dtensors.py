"""Attention on DTensors: each rank attends for its own sequences and heads, and returns DTensors.

Nothing is redistributed: placements that would need another rank's values raise. (torch's `register_sharding` is not
used, since it gathers inputs whose placements it does not find.)
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import check_number, check_qkv_layout, check_same_kind, fail, layout_of


class Layout(NamedTuple):
    """Dimensions of q, k, v and out, and those of lse that correspond to them; batch is None in packed batches."""

    batch: int | None
    sequence: int
    heads: int
    of_lse: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return self.heads + 2


DENSE = Layout(batch=0, sequence=1, heads=2, of_lse=(0, 2, 1))
PACKED = Layout(batch=None, sequence=0, heads=1, of_lse=(1, 0))


def is_dtensor(x: Any) -> bool:
    """Without an import of torch.distributed.tensor, which takes long and which few processes need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def has_dtensor(q: Any, k: Any, v: Any) -> bool:
    return is_dtensor(q) or is_dtensor(k) or is_dtensor(v)


class Share(NamedTuple):
    """The sequences or heads of this rank: those from `first` on, by a dimension of the mesh; None: by no dimension."""

    mesh_dim: int | None
    first: int
    number: int

    def of(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, self.first, self.number)


def attend_shards(
    attend: Callable[..., Any],
    layout: Layout,
    qkv: tuple[Any, Any, Any],
    lengths: tuple[Any, ...],
    options: dict[str, Any],
    sequence_mesh_dim: int | None = None,
) -> Any:
    """`attend(q, k, v, *lengths, **options)` of this rank's parts of DTensors, and DTensors placed like q.

    On each dimension of the mesh q, k and v are Shard(batch), Shard(heads) or Replicate(), and on sequence_mesh_dim
    Shard(sequence). Beside queries with Shard(heads), keys and values may be Replicate().
    """
    _check_tensors(layout, *qkv)
    q, k, v = qkv
    placed = [_check_placements(layout, i, qkv, sequence_mesh_dim) for i in range(q.device_mesh.ndim)]
    batch, heads = (_share(layout, q, placed, kind) for kind in ("batch", "heads"))
    options = options | {
        name: _own_of_heads(name, options[name], q, batch, heads, placed)
        for name in ("alibi_slopes", "sinks")
        if options.get(name) is not None
    }
    if options.get("shard") is not None:
        fail("shard", "None with DTensors", type(options["shard"]).__name__)
    if check_number("dropout_p", options.get("dropout_p", 0.0)) > 0:
        if options.get("dropout_seed") is None:
            fail("dropout_seed", "an int or a tensor, the same on all ranks, with dropout", None)
        if "batch" in placed or "heads" in placed:
            if sequence_mesh_dim is not None:
                fail("dropout_p", "0 where sequences and heads, or batches, are sharded", options["dropout_p"])
            options["shard"] = _positions(layout, q, k, lengths, batch, heads)
    found = attend(*_own_rows(layout, qkv, heads), *lengths, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    out = _whole(out, q, range(layout.ndim), (*q.shape[:-1], v.shape[-1]))
    if lse is None:
        return out
    shape = [q.shape[layout.of_lse.index(dim)] for dim in range(len(layout.of_lse))]
    return out, _whole(lse, q, layout.of_lse, tuple(shape))


def _check_tensors(layout, q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_dtensor(x):
            fail(name, "a DTensor, as others of q, k and v are", type(x).__name__, TypeError)
        if x.device_mesh != q.device_mesh:
            fail(name, f"q's mesh {q.device_mesh}", x.device_mesh)
    check_same_kind(q, k, v)
    check_qkv_layout(layout.ndim, *layout_of(q, k, v))


def _check_placements(layout, mesh_dim, qkv, sequence_mesh_dim):
    """What a dimension of the mesh shards: "batch", "heads", "sequence", or "" for Replicate()."""
    kinds = {layout.batch: "batch", layout.heads: "heads"}
    if mesh_dim == sequence_mesh_dim:
        kinds = {layout.sequence: "sequence"}
    names = [f"Shard({dim})" for dim in kinds if dim is not None]
    expected, hint = ", ".join(names) + ("" if mesh_dim == sequence_mesh_dim else " or Replicate()"), ""
    found = []
    for name, x in zip("qkv", qkv):
        placement = x.placements[mesh_dim]
        dim = placement.dim if _is_shard(placement) else None
        if dim is not None and dim in kinds:
            found.append(kinds[dim])
        elif placement.is_replicate() and mesh_dim != sequence_mesh_dim:
            found.append("")
        else:
            if dim == layout.sequence:
                hint = ", or triton_attn.parallel.context_parallel_attention for shards of sequences"
            fail(name, f"{expected} on dimension {mesh_dim} of the mesh{hint}", placement)
    of_q, *of_keys = found
    allowed = {"heads", ""} if of_q == "heads" else {of_q}
    if of_keys[0] not in allowed:
        _fail_placement("k", "q", mesh_dim, qkv)
    if of_keys[1] != of_keys[0]:
        _fail_placement("v", "k", mesh_dim, qkv)
    return of_q


def _fail_placement(name, other, mesh_dim, qkv):
    expected, got = (qkv["qkv".index(x)].placements[mesh_dim] for x in (other, name))
    fail(name, f"{other}'s {expected} on dimension {mesh_dim} of the mesh", got)


def _is_shard(placement):
    """A plain one: those of strided shards are not next to each other."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def _share(layout, q, placed, kind):
    """The Share of this rank in the batch or the heads."""
    dim = getattr(layout, kind)
    mesh_dims = [i for i, of_dim in enumerate(placed) if of_dim == kind]
    if not mesh_dims:
        return Share(None, 0, 1 if dim is None else q.shape[dim])
    if len(mesh_dims) > 1:
        fail("q", f"{q.placements[mesh_dims[0]]} on one dimension of the mesh", q.placements)
    size, rank = q.device_mesh.size(mesh_dims[0]), q.device_mesh.get_local_rank(mesh_dims[0])
    if kind == "heads" and q.shape[dim] % size:
        fail("q", f"query heads in multiples of {size} ranks", q.shape[dim])
    each = -(-q.shape[dim] // size)
    first = min(rank * each, q.shape[dim])
    return Share(mesh_dims[0], first, min(each, q.shape[dim] - first))


def _own_rows(layout, qkv, heads):
    """This rank's q, k and v. Of keys that are the same on all ranks, it takes the heads of its query heads."""
    from torch.distributed.tensor import Partial

    q, *keys = qkv
    if heads.mesh_dim is None:
        return [x.to_local() for x in qkv]
    size, num_heads_kv = q.device_mesh.size(heads.mesh_dim), keys[0].shape[layout.heads]
    if _is_shard(keys[0].placements[heads.mesh_dim]):
        if num_heads_kv % size:
            fail("k", f"KV heads in multiples of {size} ranks, or Replicate()", num_heads_kv)
        return [x.to_local() for x in qkv]
    group = q.shape[layout.heads] // num_heads_kv
    if heads.number % group and group % heads.number:
        fail("k", f"KV heads that divide {size} ranks or are a multiple of them", num_heads_kv)
    own = Share(None, heads.first // group, max(heads.number // group, 1))
    rows = [q.to_local()]
    for x in keys:
        gradients = [Partial() if i == heads.mesh_dim else place for i, place in enumerate(x.placements)]
        rows.append(own.of(x.to_local(grad_placements=gradients), layout.heads))
    return rows


def _positions(layout, q, k, lengths, batch, heads):
    """`shard` of flash_attention, with which weights are dropped as on one rank."""
    cu_seqlens_q, cu_seqlens_k = lengths[:2] if lengths else (None, None)
    if q.shape[layout.sequence] != k.shape[layout.sequence] or cu_seqlens_q is not cu_seqlens_k:
        fail("dropout_p", "0 for DTensors whose queries and keys have different lengths", "dropout")
    number = batch.number if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    sequences = torch.arange(number, dtype=torch.int32, device=q.device) + batch.first
    return pad((sequences * q.shape[layout.heads] + heads.first)[:, None], (2, 0))


def _own_of_heads(name, x, q, batch, heads, placed):
    """This rank's part of a tensor (heads,) or (batch, heads), plain or a DTensor."""
    from torch.distributed.tensor import Partial

    is_own = False
    if is_dtensor(x):
        if x.device_mesh != q.device_mesh:
            fail(name, f"q's mesh {q.device_mesh}", x.device_mesh)
        gradients = []
        for i, placement in enumerate(x.placements):
            of_heads = placed[i] == "heads" and _is_shard(placement) and placement.dim % x.ndim == x.ndim - 1
            if not of_heads and not placement.is_replicate():
                fail(name, f"Replicate() on dimension {i} of the mesh, or q's heads", placement)
            is_own = is_own or of_heads
            gradients.append(placement if of_heads or not placed[i] else Partial())
        x = x.to_local(grad_placements=gradients)
    elif x.requires_grad:
        fail(name, "a DTensor, since gradients are wanted", "a plain tensor that requires one", TypeError)
    if not is_own and heads.mesh_dim is not None:
        x = heads.of(x, -1)
    return batch.of(x, 0) if x.ndim == 2 and batch.mesh_dim is not None else x


def _whole(x, q, dims, shape):
    """A DTensor of the shape, placed like q, whose dimension i is dims[i] of x."""
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(dims[place.dim]) if _is_shard(place) else place for place in q.placements]
    sizes = {}
    if any(_is_shard(p) and shape[p.dim] % q.device_mesh.size(i) for i, p in enumerate(placements)):
        sizes = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}  # needs constants
    return DTensor.from_local(x, q.device_mesh, placements, run_check=False, **sizes)
