"""Ranks find out whether they make the same call, without a round of messages that they wait for.

Each call posts a digest of what all ranks must agree on, of 8 bytes, in an all-gather of host memory that runs beside
the call's own transfers. It is looked at before the next call or backward pass over the same group starts its own; for
CPU tensors, where the host waits for each transfer anyway, before this one does. A GPU is never waited for. Digests do
not depend on shapes, so they arrive where the call's own transfers do not fit each other. Where they differ, every rank
sends what its digest is of, and raises the same error.
"""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._host.checks import fail

Description = dict[str, Any]  # of a call: what all ranks must agree on, by name


class Agreement:
    """Of the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = _host_group(group)
        self._pending: Any = None  # (work, digests of all ranks, description of this rank's call)

    def post(self, description: Description, digest: int) -> None:
        """Send the digest of a call to all ranks. Raises if they differed at the call before."""
        self.settle()
        own = torch.tensor([digest], dtype=torch.int64)
        digests = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        work = dist.all_gather(digests, own, group=self._group, async_op=True)
        self._pending = work, digests, description

    def settle(self) -> None:
        """Raise on every rank if the digests of the last call differ."""
        if self._pending is None:
            return
        work, digests, description = self._pending
        self._pending = None
        work.wait()
        if len({digest.item() for digest in digests}) > 1:
            compare(description, self._group)


_AGREEMENTS: WeakKeyDictionary[dist.ProcessGroup, Agreement] = WeakKeyDictionary()


def agreement_of(group: dist.ProcessGroup) -> Agreement:
    """Where it is the first of a group without host memory, all ranks of the group make a gloo group."""
    if group not in _AGREEMENTS:
        _AGREEMENTS[group] = Agreement(group)
    return _AGREEMENTS[group]


def digest_of(description: Description) -> int:
    text = repr(sorted(description.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def refuse(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the ranks of the group that this one has raised an error for its arguments, so that none waits for it.

    Where all of them have, each goes on to raise its own.
    """
    if dist.get_world_size(group) == 1:
        return
    description = {"call": f"refused: {error}"}
    agreement = agreement_of(group)
    agreement.post(description, digest_of(description))
    agreement.settle()


def compare(description: Description, group: dist.ProcessGroup) -> None:
    """Raise on every rank for the first thing in which the ranks differ. A round of messages."""
    described: list[Description] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(described, description, group=group)
    names = dict.fromkeys(name for of_rank in described for name in of_rank)
    for name in sorted(names, key=lambda name: name != "call"):  # a refusal says what is wrong
        first = described[0].get(name)
        for rank, of_rank in enumerate(described):
            if of_rank.get(name) != first:
                fail(name, f"the same on all ranks, {first} as on rank 0", f"{of_rank.get(name)} on rank {rank}")


def kind_of(x: Tensor | None) -> Any:
    """What a description has of a tensor that all ranks hold whole."""
    return None if x is None else (tuple(x.shape), x.dtype)


def _host_group(group):
    """A group of the same ranks that sends tensors on CPUs."""
    if torch.device("cpu") in group._device_types:
        return group
    timeout = group._get_backend(group._device_types[0]).options._timeout
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
