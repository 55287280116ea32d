"""The collectives of this package, each of them one of torch.distributed's."""

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(parts: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup) -> list[Tensor]:
    """Send parts[r] to rank r, and receive from rank r a tensor of shapes[r] in the same dtype.

    All ranks of the group call it. Parts may be empty, and several may be one tensor.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([part.flatten() for part in parts])  # gloo takes no list of tensors with different sizes
    received = exchange_rows(flat, [part.numel() for part in parts], sizes, group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]


def exchange_rows(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send sent[r] rows of x to rank r, in the order of the ranks, and receive received[r] rows like them from it."""
    result = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result


class Shift:
    """A tensor on its way to the next rank of a ring, and the previous rank's on its way here."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup):
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._sent = x  # is in use until it has arrived
        self._received = x if num_ranks == 1 else torch.empty_like(x)
        self._works = []
        if num_ranks > 1:
            to, source = (dist.get_global_rank(group, (rank + step) % num_ranks) for step in (1, -1))
            operations = dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, self._received, source, group)
            self._works = dist.batch_isend_irecv(list(operations))

    def wait(self) -> Tensor:
        """The previous rank's tensor. On a GPU the current stream waits for it, and not the host."""
        for work in self._works:
            work.wait()
        return self._received
