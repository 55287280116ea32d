"""Attention on DTensors whose sequences are sharded over the mesh of the call."""

import functools
from collections.abc import Callable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from .._host.checks import fail
from .._host.dtensors import OTHER_MESH, Layout, attend_shards, check_dtensors
from .._host.observers import constant_if_traced
from .balance import check_load_balance, check_mesh


def attend_rows(
    attend: Callable[..., Any],
    layout: Layout,
    tensors: tuple[Any, ...],
    lengths: tuple[Any, ...],
    mesh: DeviceMesh,
    seqlen: Any,
    load_balance: Any,
    **options: Any,
) -> Any:
    """`attend` of this rank's rows, and the results as DTensors placed like the queries.

    DTensors on another mesh, whose ranks share the heads or the batch of the same rows, have the rows of this rank.
    """
    check_dtensors(layout, tensors)
    mesh_dim = _mesh_dim(tensors[0], mesh)
    if mesh_dim != OTHER_MESH:
        seqlen = _check_rows(layout, tensors[0], mesh, seqlen, load_balance)
    options |= dict(mesh=mesh, seqlen=seqlen, load_balance=load_balance)
    return attend_shards(attend, layout._replace(of_sequences=None), tensors, lengths, options, mesh_dim)


def _mesh_dim(q, mesh):
    """The dimension of q's mesh that is the mesh of the call, or OTHER_MESH."""
    check_mesh(mesh)
    found = _place_of(mesh, q.device_mesh)
    if found is None:
        fail("mesh", f"a dimension of the DTensors' mesh {q.device_mesh}, or one without its other ranks", mesh)
    return found


@constant_if_traced
def _place_of(mesh, of_q):
    """What `_mesh_dim` returns; None: the meshes cross."""
    return _search(mesh, of_q)


@functools.lru_cache(maxsize=64)  # torch takes long to make a dimension's mesh, and does so each time
def _search(mesh, of_q):
    names = of_q.mesh_dim_names or ()
    found = [0] if of_q == mesh else [i for i, name in enumerate(names) if of_q.ndim > 1 and of_q[name] == mesh]
    if found:
        return found[0]
    ranks, of_others = (set(each.mesh.flatten().tolist()) for each in (mesh, of_q))
    return OTHER_MESH if len(ranks & of_others) <= 1 else None


def _check_rows(layout, q, mesh, seqlen, load_balance):
    """The length of the whole sequence, of which DTensor gives each rank as many rows as `shard_sequence`."""
    dim, number = layout.of_q.sequence, mesh.size()
    whole = q.shape[dim]
    if seqlen not in (None, whole):
        fail("seqlen", f"None, or {whole} as of the DTensors", seqlen)
    check_load_balance(load_balance, is_packed=False)
    if whole % number:
        fail(layout.of_q.name, f"a sequence in multiples of {number} rows, as many as ranks", whole)
    return whole
