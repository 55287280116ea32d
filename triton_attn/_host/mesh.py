"""The ranks of a DeviceMesh: which this is, and whether all were called alike."""

from typing import Any

import torch
import torch.distributed as dist

from .checks import fail


def check_mesh(mesh: Any, most_dims: int = 1) -> tuple[int, int]:
    """(rank, number of ranks) of a mesh of one dimension, or of two, whose ranks are counted row by row."""
    from torch.distributed.device_mesh import DeviceMesh  # the import takes time that few calls need

    if not isinstance(mesh, DeviceMesh):
        fail("mesh", "a DeviceMesh", type(mesh).__name__, TypeError)
    if mesh.ndim > most_dims:
        fail("mesh", "one dimension, such as mesh['cp']" if most_dims == 1 else "one or two dimensions", f"{mesh.ndim}")
    if mesh.ndim == 1:
        return mesh.get_local_rank(), mesh.size()
    if not torch.compiler.is_compiling() and not _are_regular(mesh.mesh.tolist()):
        fail("mesh", "ranks in ascending order, row by row, as far apart in each row", mesh.mesh.tolist())
    return mesh.get_local_rank(0) * mesh.size(1) + mesh.get_local_rank(1), mesh.size()


def _are_regular(rows):
    ranks = [rank for row in rows for rank in row]
    steps = {tuple(rank - row[0] for rank in row) for row in rows}
    return len(steps) == 1 and ranks == sorted(ranks)


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
            if of_rank[name] != value:
                fail(name, f"the same on all ranks, {value} as on rank 0", f"{of_rank[name]} on rank {rank}")
