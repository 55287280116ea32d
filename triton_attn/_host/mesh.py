"""The ranks of a DeviceMesh: which this is, and whether all were called alike."""

import functools
from typing import Any

import torch.distributed as dist

from .checks import fail
from .observers import constant_if_traced


def check_mesh(mesh: Any) -> tuple[int, int]:
    """(rank, number of ranks) of a mesh of one dimension."""
    from torch.distributed.device_mesh import DeviceMesh  # the import takes time that few calls need

    if not isinstance(mesh, DeviceMesh):
        fail("mesh", "a DeviceMesh", type(mesh).__name__, TypeError)
    if mesh.ndim != 1:
        fail("mesh", "one dimension, such as mesh['cp']", f"{mesh.ndim}")
    if not ascends(mesh):
        fail("mesh", "ranks in ascending order", mesh.mesh.tolist())
    return mesh.get_local_rank(), mesh.size()


@constant_if_traced
def ascends(mesh: Any) -> bool:
    """Whether ranks ascend along each dimension of a mesh.

    torch.distributed sorts the ranks of a group. Of a mesh in another order some functions of torch take a rank for the
    one of its place in the mesh, and others for the one of its place in the group.
    """
    return _ascends(mesh)


@functools.lru_cache(maxsize=64)
def _ascends(mesh):
    return all(bool((mesh.mesh.diff(dim=dim) > 0).all()) for dim in range(mesh.ndim))


def compare_ranks(own: dict[str, Any], group: Any) -> None:
    """Raise a ValueError on every rank of a process group that names the first thing in which its ranks differ.

    A collective, with a device-to-host sync.
    """
    check_same(gather_objects(own, group))


def gather_objects(own: dict[str, Any], group: Any) -> list[dict[str, Any]]:
    """Those of all ranks, in a collective with a device-to-host sync."""
    given: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(given, own, group=group)
    return given


def check_same(given: list[dict[str, Any]]) -> None:
    """Raise for the first thing that is not the same on all ranks."""
    for name, value in given[0].items():
        for rank, of_rank in enumerate(given):
            if of_rank.get(name) != value:  # of another function a rank may have none
                fail(name, f"the same on all ranks, {value} as on rank 0", f"{of_rank.get(name)} on rank {rank}")
