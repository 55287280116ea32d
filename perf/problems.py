"""The shapes that throughput is given for."""

from dataclasses import dataclass

SEQLENS = tuple(512 * 2**i for i in range(7))
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384
HIDDEN = 2048


@dataclass(frozen=True)
class Problem:
    """Self-attention over `batch` sequences of `seqlen` tokens."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    causal: bool

    @property
    def flops(self):
        """The field's convention: 4 B H S^2 D, half of it with a causal mask."""
        return 4 * self.batch * self.num_heads * self.seqlen**2 * self.head_dim // (2 if self.causal else 1)

    def columns(self):
        """What a results row says of it."""
        return {
            "family": "flash",
            "direction": "forward",
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
        """q, k and v read once, out written once."""
        return 4 * self.batch * self.seqlen * self.num_heads * self.head_dim * element_size


def grid(head_dims=HEAD_DIMS, seqlens=SEQLENS, causal=(False, True)):
    """FlashAttention's convention: 16k tokens (one sequence if it is longer) of 2048 channels, cut into heads."""
    return [
        Problem(max(1, TOKENS // seqlen), seqlen, HIDDEN // head_dim, head_dim, mask)
        for head_dim in head_dims
        for mask in causal
        for seqlen in seqlens
    ]
