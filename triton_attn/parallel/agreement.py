"""Ranks find out whether they make the same call, without a round of messages that they wait for.

Each call posts a digest of what all ranks must agree on, of 8 bytes, in an all-gather of host memory that runs beside
the call's own transfers. It is looked at before the next call or backward pass over the same group starts its own; for
CPU tensors, where the host waits for each transfer anyway, before this one does. A GPU is never waited for. Digests do
not depend on shapes, so they arrive where the call's own transfers do not fit each other. Where they differ, every rank
sends what its digest is of, and raises the same error.
"""

import hashlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._host.mesh import check_same, gather_objects

MOST_LISTED = 4096  # elements of a tensor whose values are sent

Description = dict[str, Any]  # of a call: what all ranks must agree on, by name


class _Posted(NamedTuple):
    """A digest that has been sent."""

    work: Any
    digests: list[Tensor]  # of all ranks, when the work is done
    description: Description  # of this rank's call


_HOST_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = WeakKeyDictionary()
_WHOLE: WeakKeyDictionary[dist.ProcessGroup, WeakKeyDictionary[dist.ProcessGroup, Any]] = WeakKeyDictionary()
_POSTED: WeakKeyDictionary[dist.ProcessGroup, _Posted] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, description: Description, digest: int, device: torch.device) -> None:
    """Post the digest of a call with tensors on a device, and look at the others' where the host waits anyway."""
    post(group, description, digest)
    if waits_for_transfers(device):
        settle(group)


def post(group: dist.ProcessGroup, description: Description, digest: int) -> None:
    """Send the digest of a call to all ranks of a group. Raises if they differed at the call before."""
    settle(group)
    own = torch.tensor([digest], dtype=torch.int64)
    digests = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(digests, own, group=_host_group(group), async_op=True)
    _POSTED[group] = _Posted(work, digests, description)


def settle(group: dist.ProcessGroup) -> None:
    """Raise on every rank if the digests of the last call differ."""
    posted = _POSTED.pop(group, None)
    if posted is None:
        return
    posted.work.wait()
    if len({digest.item() for digest in posted.digests}) > 1:
        compare(posted.description, _host_group(group))


def digest_of(description: Description) -> int:
    text = repr(sorted(description.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def refuse(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the ranks of the group that this one has raised an error for its arguments, so that none waits for it.

    Where all of them have, each goes on to raise its own.
    """
    if dist.get_world_size(group) == 1:
        return
    description = dict(refused=str(error))
    post(group, description, digest_of(description))
    settle(group)


def compare(description: Description, group: dist.ProcessGroup) -> None:
    """Raise on every rank for the first thing in which the ranks differ. A round of messages."""
    described = gather_objects(description, group)
    for rank, of_rank in enumerate(described):
        if "refused" in of_rank:
            raise ValueError(f"{of_rank['refused']} (on rank {rank})")
    check_same(described)


def kind_of(x: Any) -> Any:
    """What a description has of an argument that is the same on all ranks: of a tensor no values."""
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def values_of(x: Tensor) -> Any:
    """What ranks compare of a tensor's values: a list, or for a large one a digest. A device-to-host sync."""
    if x.numel() <= MOST_LISTED:
        return x.tolist()
    content = x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return f"values with digest {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def waits_for_transfers(device: torch.device) -> bool:
    """Whether the host waits for the transfers of tensors on the device."""
    return device.type == "cpu"


def group_of_mesh(outer: dist.ProcessGroup, inner: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group of all ranks of a mesh, from this rank's groups by its dimensions, for what is sent from host memory.

    The ranks of each row are as far apart as in this rank's, see `check_mesh_dims`.
    """
    if inner is None:
        return outer
    known = _WHOLE.get(outer)
    if known is None:
        known = _WHOLE[outer] = WeakKeyDictionary()
    if inner not in known:
        rows, columns = map(dist.get_process_group_ranks, (outer, inner))
        ranks = sorted(row + column - dist.get_rank() for row in rows for column in columns)
        is_all = len(ranks) == dist.get_world_size()
        known[inner] = dist.group.WORLD if is_all else _gloo_group(ranks, outer)
    return known[inner]


def _host_group(group):
    """A group of the same ranks that sends tensors on CPUs. All ranks make one, over gloo, where the group does not."""
    if group not in _HOST_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _HOST_GROUPS[group] = None if _sends_from_host(group) else _gloo_group(ranks, group)
    return _HOST_GROUPS[group] or group


def _sends_from_host(group):
    return torch.device("cpu") in group._device_types


def _gloo_group(ranks, like):
    """With the timeout of another group."""
    timeout = like._get_backend(like._device_types[0]).options._timeout
    return dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
