"""Counter-based dropout: the random bits of an element depend only on the seed and on its position. Every tile size,
every schedule and the backward pass compute the same mask, so none is stored."""

from typing import NamedTuple

import triton
import triton.language as tl

from .heads import load_shard

# Keys that share one Philox call; a tile of keys starts at a multiple of it.
KEYS_PER_CALL: tl.constexpr = tl.constexpr(4)


class Origin(NamedTuple):
    """The element of the whole mask at which the mask of a program's head begins."""

    row: object  # batch * num_heads + head
    query: object
    key: object


@triton.jit
def mask_origin(shard_ptr, batch, head, batch_head):
    """The Origin of a head's mask."""
    row = batch_head
    query = batch_head * 0
    key = query
    if shard_ptr is not None:
        query, key, row = load_shard(shard_ptr, batch)
        row += head
    return Origin(row, query, key)


@triton.jit
def keep_mask(dropout, origin, queries, start_n, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: whether the weight of a query and of key start_n + column is kept.

    Both are counted from the Origin. Philox-4x32-10 takes the seed as its key and (key // 4, query, row, 0) as its
    counter. The weight is kept if word key % 4, shifted right by one bit, is at least the threshold p * 2^31. A WHOLE
    sequence starts at key 0, and start_n is a multiple of 4: four keys share a call. A shard may start anywhere, and
    each key makes a call.
    """
    BLOCK_M: tl.constexpr = queries.shape[0]
    CALLS: tl.constexpr = BLOCK_N // KEYS_PER_CALL if WHOLE else BLOCK_N
    seed = tl.load(dropout.seed_ptr).to(tl.uint64)
    zeros = tl.zeros([BLOCK_M, CALLS], tl.int32)
    rows = zeros + origin.row
    if WHOLE:
        calls = start_n // KEYS_PER_CALL + tl.arange(0, CALLS)
        w0, w1, w2, w3 = tl.philox(seed, zeros + calls[None, :], zeros + queries[:, None], rows, zeros)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    else:
        keys = (origin.key + start_n + tl.arange(0, CALLS))[None, :]
        queries = (origin.query + queries)[:, None]
        w0, w1, w2, w3 = tl.philox(seed, zeros + keys // KEYS_PER_CALL, zeros + queries, rows, zeros)
        word = keys % KEYS_PER_CALL
        words = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return (words >> 1).to(tl.int32) >= dropout.threshold


@triton.jit
def drop_weights(p, dropout, origin, queries, start_n, one, WHOLE: tl.constexpr):
    """Weights p (BLOCK_M, BLOCK_N), 0 where `keep_mask` does not keep them; with `one`, see `one_trip`, in a loop of
    one trip.

    The loop keeps the instructions of the mask together. Where sums fill the registers, Triton 3.6.0 otherwise copies
    the output between registers at every tile and spills; so does Triton 3.9.0 in the backward pass.
    """
    BLOCK_N: tl.constexpr = p.shape[1]
    if one is None:
        return tl.where(keep_mask(dropout, origin, queries, start_n, BLOCK_N, WHOLE), p, 0.0)
    else:
        for _ in tl.range(0, one, num_stages=1):
            p = tl.where(keep_mask(dropout, origin, queries, start_n, BLOCK_N, WHOLE), p, 0.0)
        return p
