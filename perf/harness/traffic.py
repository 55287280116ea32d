"""What collectives bring to a rank: bytes that it receives from the other ranks."""

import contextlib
from unittest import mock

import torch.distributed as dist


@contextlib.contextmanager
def counted():
    """A list, to which each collective of `triton_attn.parallel` adds the bytes that this rank receives from others."""
    received = []
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def count_exchange(output, x, output_sizes, *args, group, **options):
        whole, rank = sum(output_sizes), dist.get_rank(group)  # in elements or in rows
        received.append(output.nbytes * (whole - output_sizes[rank]) // whole if whole else 0)
        return all_to_all_single(output, x, output_sizes, *args, group=group, **options)

    def count_shift(operations):
        received.append(sum(op.tensor.nbytes for op in operations if op.op is dist.irecv))
        return batch_isend_irecv(operations)

    with (
        mock.patch.object(dist, "all_to_all_single", count_exchange),
        mock.patch.object(dist, "batch_isend_irecv", count_shift),
    ):
        yield received
