"""Caches that are sharded over ranks: which keys of a sequence a rank holds."""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from .checks import check_length, check_size, fail


class KeyShard(NamedTuple):
    """Ranks take turns: position p is on rank p // interleave % num_ranks. A rank holds its keys in their order."""

    rank: int
    num_ranks: int
    interleave: int = 1  # keys of a turn

    def slots_of(self, slots: NDArray[Any], page_size: int) -> NDArray[Any]:
        """The rank's slots, with page_size keys on a page, of those of pages that hold the keys of all ranks; -1 where
        another rank has the key. page_size is a multiple of interleave.
        """
        pages, offsets = divmod(slots, page_size * self.num_ranks)
        turns, first = divmod(offsets, self.interleave)
        own = pages * page_size + turns // self.num_ranks * self.interleave + first
        own[turns % self.num_ranks != self.rank] = -1
        return own

    def num_keys(self, seqlen: int) -> int:
        """How many of the first seqlen keys the rank holds."""
        turns, rest = divmod(seqlen, self.num_ranks * self.interleave)
        return turns * self.interleave + min(max(rest - self.rank * self.interleave, 0), self.interleave)

    def places(self, seqlen: int, num_queries: int, device: torch.device) -> dict[str, Any]:
        """offset and key_positions of `attend` for the rank's keys of a sequence and its last queries."""
        keys = torch.arange(self.num_keys(seqlen), device=device)
        turns, first = keys // self.interleave, keys % self.interleave
        positions = (turns * self.num_ranks + self.rank) * self.interleave + first
        return dict(offset=seqlen - num_queries, key_positions=positions)


def check_key_shard(key_shard: Any, page_size: int) -> KeyShard | None:
    """key_shard of a cache with page_size keys on a page, or in a row of a contiguous cache; None for all keys."""
    if key_shard is None:
        return None
    if not isinstance(key_shard, (tuple, list)) or len(key_shard) != 3:
        fail("key_shard", "(rank, num_ranks, interleave) or None", key_shard, TypeError)
    rank, num_ranks, interleave = key_shard
    rank = check_length("key_shard", rank)
    shard = KeyShard(rank, check_size("key_shard", num_ranks), check_size("key_shard", interleave))
    if rank >= shard.num_ranks:
        fail("key_shard", f"a rank of 0 to {shard.num_ranks - 1}", rank)
    check_interleave("key_shard", shard.interleave, page_size)
    # A turn of all ranks fits in 32 bits, which kernels count positions in.
    if shard.num_ranks * shard.interleave >= 2**30:
        fail("key_shard", "num_ranks * interleave below 2**30", shard.num_ranks * shard.interleave)
    return None if shard.num_ranks == 1 else shard


def num_ranks_of(key_shard: KeyShard | None) -> int:
    return 1 if key_shard is None else key_shard.num_ranks


def check_interleave(name: str, interleave: Any, page_size: int) -> int:
    """The keys of a turn. Turns do not go on on another page, so that pages of all ranks hold the same tokens."""
    interleave = check_size(name, interleave)
    if page_size % interleave:
        fail(name, f"an interleave that divides the {page_size} keys of a page", interleave)
    return interleave
