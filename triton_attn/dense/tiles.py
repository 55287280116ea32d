"""Tiles of dense attention, of its forward and its backward pass, and what of a call they are chosen by."""

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from .._host.config import Config
from .._host.gpu import gpu_of


@dataclass(frozen=True, eq=False)
class Tile(Config):
    """block_m queries and block_n keys, num_warps warps, num_stages tiles in flight, TMA or pointers.

    Two are equal if their fields are, whichever kernel's they are.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False

    def __eq__(self, other):
        return isinstance(other, Tile) and astuple(self) == astuple(other)

    def __hash__(self):
        return hash(astuple(self))


class FlashCase(NamedTuple):
    """What of a call the configs of its kernels depend on.

    access: how k and v (in the backward pass q and dout too) can be loaded: "tma", 16 bytes at a time ("vector"), or
    element by element ("scalar"). precision: of fp32 matmuls, "ieee", "tf32" or "tf32x3". is_plain: without softcap,
    ALiBi and dropout, as sweeps time it. seqlen_k: of the longest sequence.
    """

    arch: str
    dtype: torch.dtype
    head_dim: int  # 1 to 512, in the backward pass to 256
    head_dim_v: int
    causal: bool
    access: str = "tma"
    precision: str = "ieee"
    softcap: bool = False
    dropout: bool = False
    is_plain: bool = True
    seqlen_k: int = 1

    @property
    def gpu(self):
        return gpu_of(self.arch)

    @property
    def is_half(self):
        return self.dtype != torch.float32

    @property
    def is_tuned(self):
        """Whether a sweep times such calls: plain ones of tensors that can be loaded in the fastest way."""
        return self.is_plain and (self.access == "tma" or (self.access == "vector" and not self.gpu.tma))

    @property
    def suits_tma(self):
        """Whether rows are multiples of 16 bytes, where nothing else is known of the tensors."""
        return all(dim * self.dtype.itemsize % 16 == 0 for dim in (self.head_dim, self.head_dim_v))


def tma_obstacle(config, case):
    """Why a config cannot load with TMA; None if it can or does not."""
    if config.use_tma and not case.gpu.tma:
        return f"{case.arch} has no TMA"
    return "TMA needs rows in units of 16 bytes" if config.use_tma and not case.suits_tma else None


def padded_head_dim(head_dim):
    """Columns that the kernel computes: a multiple of 16 that is a power of two or, in two pieces, the sum of two."""
    padded = -(-head_dim // 16) * 16
    rest = padded - (1 << (padded.bit_length() - 1))
    return padded if rest & (rest - 1) == 0 else 1 << padded.bit_length()
