"""Caches whose keys are sharded over the ranks of a mesh."""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .._host.checks import check_length, check_size
from .._host.key_shard import KeyShard, check_interleave
from .._host.mesh import check_mesh, compare_ranks


def shard_pages(
    mesh: Any, interleave: Any, num_pages: int, page_size: int, **sizes: Any
) -> tuple[int, KeyShard | None, Any]:
    """(pages of a rank, what it holds, the ranks' process group) of a cache with these sizes, which must be the same on
    all ranks.

    All ranks have as many pages as the one with the fewest. So all of them do the same with the same calls, and run out
    of pages together. Without a mesh, or with one rank, there is nothing to share.
    """
    num_pages, page_size = check_length("num_pages", num_pages), check_size("page_size", page_size)
    interleave = check_interleave("interleave", interleave, page_size)
    if mesh is None:
        return num_pages, None, None
    rank, num_ranks = check_mesh(mesh)
    group = mesh.get_group()
    compare_ranks(dict(page_size=page_size, interleave=interleave, **sizes), group)
    fewest = torch.tensor(num_pages, device=mesh.device_type)
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group)
    if num_ranks == 1:
        return int(fewest), None, None
    return int(fewest), KeyShard(rank, num_ranks, interleave), group


def fetch_from_ranks(cache, read, written):
    """(which of the slots `written` this rank has, what comes to them from the slots `read`, in all layers, of each
    tensor of the cache).

    Slots are those of pages of all ranks, the same on each. One collective, if a token changes its rank.
    """
    shard, page_slots = cache.key_shard, cache._page_slots
    owners = [x % cache.page_size // shard.interleave % shard.num_ranks for x in (read, written)]
    sent, send_counts = _order_of(shard, *owners)
    received, receive_counts = _order_of(shard, *reversed(owners))
    pages, slots = map(cache._to_device, np.divmod(shard.slots_of(read[sent], page_slots), page_slots))
    tensors = bits_of_pages(cache)
    widths = [x.shape[0] * math.prod(x.shape[3:]) for x in tensors]
    rows = [
        x[:, pages, slots].transpose(0, 1).reshape(sent.size, width).view(torch.uint8)
        for x, width in zip(tensors, widths)
    ]
    rows = torch.cat(rows, dim=1)
    if (owners[0] != owners[1]).any():  # the same on all ranks
        arrived = rows.new_empty(received.size, rows.shape[1])
        dist.all_to_all_single(arrived, rows, receive_counts, send_counts, group=cache._group)
        rows = arrived
    of_tensors = rows.split([n * x.itemsize for n, x in zip(widths, tensors)], dim=1)
    return received, [
        own.contiguous().view(x.dtype).view(received.size, x.shape[0], *x.shape[3:]).transpose(0, 1)
        for x, own in zip(tensors, of_tensors)
    ]


def bits_of_pages(cache):
    """The memory of the pages, with bytes for elements of one."""
    return [x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in cache._page_tensors()]


def _order_of(shard, owners, others):
    """(moves that a rank has a side of, ordered by the ranks of the other side; how many there are for each rank)."""
    own = np.flatnonzero(owners == shard.rank)
    own = own[np.argsort(others[own], kind="stable")]
    return own, np.bincount(others[own], minlength=shard.num_ranks).tolist()
