"""Process groups of ranks that are processes of this machine."""

import torch.distributed as dist


def join_group(store, rank, num_ranks, timeout):
    """Returns when all ranks are connected.

    init_process_group returns when its own rank is. One that ended then, with nothing to exchange, would close the
    connections that others still make.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timeout)
    dist.barrier()
