"""Attention on DTensors: each rank attends for its own sequences and heads, and returns DTensors.

Nothing is redistributed: placements that would need another rank's values raise. (torch's `register_sharding` is not
used, since it gathers inputs whose placements it does not find.)
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import check_number, check_qkv_layout, check_same_kind, fail, layout_of
from .mesh import ascends


class Operand(NamedTuple):
    """A tensor of a call: its name, and its dimensions of the batch, the sequence and the heads; None: it has none."""

    name: str
    batch: int | None = None
    sequence: int | None = None
    heads: int | None = None


class Layout(NamedTuple):
    """The tensors of a call, queries first, and the dimensions of out that correspond to those of lse. All tensors that
    are no queries and have heads have the same number, which divides that of the queries."""

    operands: tuple[Operand, ...]
    num_queries: int
    of_lse: tuple[int, ...]
    check: Callable[[Any], None]  # of the tensors, without values
    of_sequences: str | None  # the function for sharded sequences

    @property
    def of_q(self) -> Operand:
        """Of the first tensor of queries, whose dimensions out has too."""
        return self.operands[0]

    @property
    def names(self) -> str:
        *names, last = (operand.name for operand in self.operands)
        return f"{', '.join(names)} and {last}"


def of_rows(names: Iterable[str], is_packed: bool, has_heads: bool = True) -> tuple[Operand, ...]:
    """Tensors (batch, rows, heads, dim), (rows, heads, dim) if they are packed, or without heads."""
    dims = (None, 0, 1) if is_packed else (0, 1, 2)
    return tuple(Operand(name, *dims) if has_heads else Operand(name, *dims[:2]) for name in names)


def lse_dims(is_packed: bool) -> tuple[int, ...]:
    return (1, 0) if is_packed else (0, 2, 1)


def _of_heads(is_packed):
    def check(tensors):
        check_same_kind(*tensors)
        check_qkv_layout(3 if is_packed else 4, *layout_of(*tensors))

    return Layout(of_rows("qkv", is_packed), 1, lse_dims(is_packed), check, "context_parallel_attention")


DENSE, PACKED = _of_heads(False), _of_heads(True)
OTHER_MESH = -1  # the dimension, among those of the DTensors' mesh, of a mesh that is none of them


def is_dtensor(x: Any) -> bool:
    """Without an import of torch.distributed.tensor, which takes long and which few processes need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def has_dtensor(*tensors: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None:
        for x in tensors:  # faster than any()
            if isinstance(x, module.DTensor):
                return True
    return False


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
    tensors: tuple[Any, ...],
    lengths: tuple[Any, ...],
    options: dict[str, Any],
    sequence_mesh_dim: int | None = None,
) -> Any:
    """`attend(*tensors, *lengths, **options)` of this rank's parts of DTensors, and DTensors placed like the queries.

    On each dimension of the mesh queries are Shard(batch), Shard(heads) or Replicate(), and on sequence_mesh_dim
    Shard(sequence). So are the other tensors, or Replicate() if they have no such dimension. Beside queries with
    Shard(heads), all of them may be Replicate(). With OTHER_MESH their rows are those of a rank of another mesh. With a
    sequence_mesh_dim, `attend` is given which sequences and heads the part has, as `part`.
    """
    check_dtensors(layout, tensors)
    layout.check(tensors)
    q = tensors[0]
    placed = [_check_placements(layout, i, tensors, sequence_mesh_dim) for i in range(q.device_mesh.ndim)]
    batch, heads = (_share(layout, q, placed, kind) for kind in ("batch", "heads"))
    options = options | {
        name: _own_of_heads(name, options[name], q, batch, heads, placed)
        for name in ("alibi_slopes", "sinks")
        if options.get(name) is not None
    }
    for name in ("shard", "out"):
        if options.get(name) is not None:
            fail(name, "None with DTensors", type(options[name]).__name__)
    if check_number("dropout_p", options.get("dropout_p", 0.0)) > 0:
        if options.get("dropout_seed") is None:
            fail("dropout_seed", "an int or a tensor, the same on all ranks, with dropout", None)
        if "batch" in placed or "heads" in placed:
            if sequence_mesh_dim is not None:
                fail("dropout_p", "0 where sequences and heads, or batches, are sharded", options["dropout_p"])
            options["shard"] = _positions(layout, q, tensors[1], lengths, batch, heads)
    if sequence_mesh_dim is not None:  # ranks that share sequences compare it
        options["part"] = (batch.first, batch.number, heads.first, heads.number)
    found = attend(*_own_parts(layout, tensors, placed, heads), *lengths, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    out = _whole(out, q, range(q.ndim), (*q.shape[:-1], out.shape[-1]))
    if lse is None:
        return out
    shape = [q.shape[layout.of_lse.index(dim)] for dim in range(len(layout.of_lse))]
    return out, _whole(lse, q, layout.of_lse, tuple(shape))


def check_dtensors(layout: Layout, tensors: tuple[Any, ...]) -> None:
    """All of one mesh, which says which rank has which shard."""
    meshes = [(operand.name, x.device_mesh) for operand, x in zip(layout.operands, tensors) if is_dtensor(x)]
    for operand, x in zip(layout.operands, tensors):
        if not is_dtensor(x):
            fail(operand.name, f"a DTensor, as others of {layout.names} are", type(x).__name__, TypeError)
        first, mesh = meshes[0]
        if x.device_mesh != mesh:
            fail(operand.name, f"{first}'s mesh {mesh}", x.device_mesh)
    first, mesh = meshes[0]
    if not ascends(mesh):
        fail(first, "a mesh whose ranks ascend along each of its dimensions", mesh.mesh.tolist())


def on_each_rank(name: str, x: Any) -> Any:
    """A tensor that is the same on all ranks, plain or a DTensor, as a plain one."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        fail(name, "a plain tensor, or Replicate() on all dimensions of the mesh", x.placements)
    return x.to_local()


def _check_placements(layout, mesh_dim, tensors, sequence_mesh_dim):
    """What a dimension of the mesh shards: "batch", "heads", "sequence", or "" for Replicate()."""
    of_q, where = tensors[0].placements[mesh_dim], f"on dimension {mesh_dim} of the mesh"
    kind = _kind_of_queries(layout, of_q, where, mesh_dim == sequence_mesh_dim)
    of_keys = None  # (name, placement) of the first of those that may be Replicate() beside sharded heads
    for i, (operand, x) in enumerate(zip(layout.operands, tensors)):
        placement, dim = x.placements[mesh_dim], getattr(operand, kind) if kind else None
        is_found = placement.is_replicate() if dim is None else _is_shard(placement) and placement.dim == dim
        if kind == "heads" and dim is not None and i >= layout.num_queries:
            of_keys = of_keys or (operand.name, placement)
            if placement != of_keys[1]:
                fail(operand.name, f"{of_keys[0]}'s {of_keys[1]} {where}", placement)
            is_found = is_found or placement.is_replicate()
        if not is_found:
            expected = f"S({dim})" if kind and dim is not None else "R"
            expected += " or R" if of_keys and kind == "heads" else ""
            fail(operand.name, f"{expected} {where}, where {layout.of_q.name} has {of_q}", placement)
    return kind


def _kind_of_queries(layout, placement, where, is_of_sequence):
    of_q, dim = layout.of_q, placement.dim if _is_shard(placement) else None
    kinds = {of_q.sequence: "sequence"} if is_of_sequence else {of_q.batch: "batch", of_q.heads: "heads"}
    kinds.pop(None, None)
    if dim in kinds:
        return kinds[dim]
    if placement.is_replicate() and not is_of_sequence:
        return ""
    expected = ", ".join(f"Shard({dim})" for dim in kinds) + ("" if is_of_sequence else " or Replicate()")
    hint = ""
    if dim is not None and dim == of_q.sequence and layout.of_sequences is not None:
        hint = f", or triton_attn.parallel.{layout.of_sequences} for shards of sequences"
    fail(of_q.name, f"{expected} {where}{hint}", placement)


def _is_shard(placement):
    """A plain one: those of strided shards are not next to each other."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def _share(layout, q, placed, kind):
    """The Share of this rank in the batch or the heads."""
    name, dim = layout.of_q.name, getattr(layout.of_q, kind)
    mesh_dims = [i for i, of_dim in enumerate(placed) if of_dim == kind]
    if not mesh_dims:
        return Share(None, 0, 1 if dim is None else q.shape[dim])
    if len(mesh_dims) > 1:
        fail(name, f"{q.placements[mesh_dims[0]]} on one dimension of the mesh", q.placements)
    size, rank = q.device_mesh.size(mesh_dims[0]), q.device_mesh.get_local_rank(mesh_dims[0])
    if kind == "heads" and q.shape[dim] % size:
        fail(name, f"query heads in multiples of {size} ranks", q.shape[dim])
    each = -(-q.shape[dim] // size)
    first = min(rank * each, q.shape[dim])
    return Share(mesh_dims[0], first, min(each, q.shape[dim] - first))


def _own_parts(layout, tensors, placed, heads):
    """This rank's part of each tensor. Of keys that are the same on all ranks, it takes the heads of its query heads.

    A tensor that is the same on ranks with other rows or heads of the queries has a part of its gradient on each.
    """
    from torch.distributed.tensor import Partial

    parts = []
    for operand, x in zip(layout.operands, tensors):
        gradients = [place if _is_shard(place) or not kind else Partial() for place, kind in zip(x.placements, placed)]
        part = x.to_local(grad_placements=gradients)
        if heads.mesh_dim is not None and operand.heads is not None:
            own = _own_heads(layout, tensors[0], operand, x, heads)
            part = part if own is None else own.of(part, operand.heads)
        parts.append(part)
    return parts


def _own_heads(layout, q, operand, x, heads):
    """The Share of the heads of x that a rank takes of its part; None: all."""
    size, num_heads = q.device_mesh.size(heads.mesh_dim), x.shape[operand.heads]
    if _is_shard(x.placements[heads.mesh_dim]):
        if num_heads % size:
            fail(operand.name, f"KV heads in multiples of {size} ranks, or Replicate()", num_heads)
        return None
    group = q.shape[layout.of_q.heads] // num_heads
    if heads.number % group and group % heads.number:
        fail(operand.name, f"KV heads that divide {size} ranks or are a multiple of them", num_heads)
    return Share(None, heads.first // group, max(heads.number // group, 1))


def _positions(layout, q, k, lengths, batch, heads):
    """`shard` of flash_attention, with which weights are dropped as on one rank."""
    of_q, (cu_seqlens_q, cu_seqlens_k) = layout.of_q, lengths[:2] or (None, None)
    if q.shape[of_q.sequence] != k.shape[of_q.sequence] or cu_seqlens_q is not cu_seqlens_k:
        fail("dropout_p", "0 for DTensors whose queries and keys have different lengths", "dropout")
    number = batch.number if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    sequences = torch.arange(number, dtype=torch.int32, device=q.device) + batch.first
    return pad((sequences * q.shape[of_q.heads] + heads.first)[:, None], (2, 0))


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
