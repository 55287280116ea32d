"""Arguments that all kinds of attention over a mesh have: which rows a rank has, and how ranks exchange them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.backend import should_check_values
from .._host.checks import MAX_ROWS, check_cu_seqlens, fail
from .agreement import group_of_mesh, refuse
from .balance import check_load_balance, check_mesh_dims, check_seqlen
from .operators import Settings

METHODS = {  # by the number of dimensions of the mesh
    1: ("auto", "all_gather", "ring", "ulysses"),
    2: ("auto", ("all_gather", "ulysses"), ("ring", "ulysses")),
}


@contextlib.contextmanager
def errors_for_all(mesh: Any) -> Iterator[None]:
    """An error that this rank raises for its arguments is told to the other ranks. One for the mesh, which does not say
    who they are, is not."""
    check_mesh_dims(mesh)
    try:
        yield
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_compiling():
            refuse(group_of_mesh(*_groups(mesh)), error)
        raise


def check_method(mesh: DeviceMesh, method: Any) -> None:
    methods = METHODS[mesh.ndim]
    if method not in methods:
        fail("method", " or ".join(map(repr, methods)), repr(method))


def settings_of(
    tensors: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    *,
    mesh: DeviceMesh,
    method: str | tuple[str, str],
    load_balance: Any,
    seqlen: Any,
    check_values: Any,
    part: tuple[int, ...] | None = None,
) -> Settings:
    """Settings without options. tensors are those that may have gradients; the first is (batch, rows, ...), or
    (rows, ...) with cu_seqlens."""
    x, is_packed, is_on = tensors[0], cu_seqlens is not None, torch.is_grad_enabled()
    assert x is not None
    load_balance = check_load_balance(load_balance, is_packed)
    if is_packed:
        _check_cu_seqlens(cu_seqlens, x.device)
    seqlen = check_seqlen(seqlen, x.shape[0 if is_packed else 1], mesh.size())
    if seqlen > MAX_ROWS:
        fail("seqlen", "at most 10**9", seqlen)
    group, inner = _groups(mesh)
    return Settings(
        batch=None if is_packed else x.shape[0],
        seqlen=seqlen,
        load_balance=load_balance,
        group=group.group_name,
        inner=None if inner is None else inner.group_name,
        method=method if isinstance(method, str) else method[0],
        check_values=should_check_values(check_values),
        part=part,
        wanted=tuple(is_on and x is not None and x.requires_grad for x in tensors),
        options=None,
    )


def _groups(mesh):
    """Of the first dimension of a mesh, and of the second or None."""
    return mesh.get_group(0), mesh.get_group(1) if mesh.ndim == 2 else None


def _check_cu_seqlens(cu_seqlens, device):
    check_cu_seqlens("cu_seqlens", cu_seqlens, getattr(cu_seqlens, "device", None))
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        fail("cu_seqlens", f"the CPU or q's device {device}", cu_seqlens.device)
