"""The shapes that throughput is given for."""

from dataclasses import dataclass

SEQLENS = tuple(512 * 2**i for i in range(7))
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
HIDDEN = 2048
# FLOP of a pass over those of the forward: two products a tile forward, five backward.
FLOP_FACTORS = {"forward": 1.0, "backward": 2.5, "both": 3.5}


@dataclass(frozen=True)
class Problem:
    """Self-attention over `batch` sequences of `seqlen` tokens."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    causal: bool
    direction: str = "forward"  # or backward, or both: one after the other

    @property
    def flops(self):
        """The field's convention: 4 B H S^2 D forward, 2.5 times that backward, half of it with a causal mask."""
        forward = 4 * self.batch * self.num_heads * self.seqlen**2 * self.head_dim // (2 if self.causal else 1)
        return int(forward * FLOP_FACTORS[self.direction])

    def columns(self):
        """What a results row says of it."""
        return {
            "family": "flash",
            "direction": self.direction,
            "batch": self.batch,
            "seqlen_q": self.seqlen,
            "seqlen_k": self.seqlen,
            "num_heads_q": self.num_heads,
            "num_heads_kv": self.num_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim,
            "causal": self.causal,
        }

    def bytes(self, element_size):
        """Forward: q, k and v read once, out written once. Backward: those and dout read, dq, dk and dv written."""
        tensors = {"forward": 4, "backward": 8, "both": 12}[self.direction]
        return tensors * self.batch * self.seqlen * self.num_heads * self.head_dim * element_size


def grid(head_dims=HEAD_DIMS, seqlens=SEQLENS, causal=(False, True), direction="forward"):
    """FlashAttention's convention: 16k tokens (one sequence if it is longer) of 2048 channels, cut into heads."""
    return [
        Problem(max(1, TOKENS // seqlen), seqlen, HIDDEN // head_dim, head_dim, mask, direction)
        for head_dim in head_dims
        for mask in causal
        for seqlen in seqlens
    ]
