"""Counter-based dropout: the random bits of an element depend only on the seed and on its position. Every tile size,
every schedule and the backward pass compute the same mask, so none is stored."""

import triton
import triton.language as tl

# Keys that share one Philox call; a tile of keys starts at a multiple of it.
KEYS_PER_CALL: tl.constexpr = tl.constexpr(4)


@triton.jit
def keep_mask(dropout, batch_head, offs_m, start_n, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: whether the weight of query offs_m and key start_n + column is kept.

    Philox-4x32-10 takes the seed as its key and (key // 4, query, batch * num_heads + head, 0) as its counter. The
    weight is kept if word key % 4, shifted right by one bit, is at least the threshold p * 2^31. start_n is a multiple
    of 4.
    """
    seed = tl.load(dropout.seed_ptr).to(tl.uint64)
    calls = start_n // KEYS_PER_CALL + tl.arange(0, BLOCK_N // KEYS_PER_CALL)
    zeros = tl.zeros([offs_m.shape[0], BLOCK_N // KEYS_PER_CALL], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zeros + calls[None, :], zeros + offs_m[:, None], zeros + batch_head, zeros)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(offs_m.shape[0], BLOCK_N)
    return (words >> 1).to(tl.int32) >= dropout.threshold
