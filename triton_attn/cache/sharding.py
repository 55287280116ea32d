"""Caches whose keys are sharded over the ranks of a mesh."""

from typing import Any

import torch
import torch.distributed as dist

from .._host.checks import check_length, check_size
from .._host.key_shard import KeyShard, check_interleave
from .._host.mesh import check_mesh, compare_ranks


def shard_pages(
    mesh: Any, interleave: Any, num_pages: int, page_size: int, **sizes: Any
) -> tuple[int, KeyShard | None]:
    """(pages of a rank, what it holds) of a cache with these sizes, which must be the same on all ranks.

    All ranks have as many pages as the one with the fewest. So all of them do the same with the same calls, and run out
    of pages together. Without a mesh, or with one rank, there is nothing to share.
    """
    num_pages, page_size = check_length("num_pages", num_pages), check_size("page_size", page_size)
    interleave = check_interleave("interleave", interleave, page_size)
    if mesh is None:
        return num_pages, None
    rank, num_ranks = check_mesh(mesh)
    group = mesh.get_group()
    compare_ranks(dict(page_size=page_size, interleave=interleave, **sizes), group)
    fewest = torch.tensor(num_pages, device=mesh.device_type)
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group)
    return int(fewest), None if num_ranks == 1 else KeyShard(rank, num_ranks, interleave)
