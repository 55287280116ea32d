"""`context_parallel_attention` on DTensors whose sequences are sharded over the mesh of the call."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._host.checks import fail
from .._host.dtensors import DENSE, attend_shards, has_dtensor, is_dtensor
from .balance import check_load_balance, check_mesh

Function = TypeVar("Function", bound=Callable[..., Any])


def on_dtensors(attend: Function) -> Function:
    """A decorator: DTensors are attended to by their local rows, and the results are DTensors placed like q."""

    @functools.wraps(attend)
    def attend_any(q, k, v, *, mesh, seqlen=None, load_balance="head_tail", **options):
        if has_dtensor(q, k, v):
            mesh_dim = _mesh_dim(q, mesh)
            seqlen = _check_rows(q, mesh, seqlen, load_balance)
            options = options | {"mesh": mesh, "seqlen": seqlen, "load_balance": load_balance}
            return attend_shards(attend, DENSE, (q, k, v), (), options, mesh_dim)
        return attend(q, k, v, mesh=mesh, seqlen=seqlen, load_balance=load_balance, **options)

    return attend_any  # type: ignore[return-value]


def _mesh_dim(q, mesh):
    """The dimension of q's mesh that is the mesh of the call."""
    if not is_dtensor(q):
        fail("q", "a DTensor, as others of q, k and v are", type(q).__name__, TypeError)
    check_mesh(mesh)
    whole = q.device_mesh
    names = whole.mesh_dim_names or ()
    found = [0] if whole == mesh else [i for i, name in enumerate(names) if whole.ndim > 1 and whole[name] == mesh]
    if not found:
        fail("mesh", f"a dimension of q's mesh {whole}, such as mesh['cp']", mesh)
    return found[0]


def _check_rows(q, mesh, seqlen, load_balance):
    """The length of the whole sequence, of which DTensor gives each rank as many rows as `shard_sequence`."""
    if q.ndim != DENSE.ndim:
        fail("q", "4 dimensions (batch, rows, heads, dim)", f"shape {tuple(q.shape)}")
    whole, number = q.shape[DENSE.sequence], mesh.size()
    if seqlen not in (None, whole):
        fail("seqlen", f"None, or {whole} as of the DTensors", seqlen)
    check_load_balance(load_balance, is_packed=False)
    if whole % number:
        fail("q", f"a sequence in multiples of {number} rows, as many as ranks", whole)
    return whole
