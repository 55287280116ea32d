"""Tiles of dense attention, forward and backward, and the case of a call by which they are chosen."""

from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from .._host.config import Config
from .._host.gpu import gpu_of

HALF = 256  # columns of a piece of `dot_halves`, as in _jit/tiles.py, which needs triton
CHUNK = 64  # as in _jit/columns.py


@dataclass(frozen=True, eq=False)
class Tile(Config):
    """block_m queries and block_n keys, num_warps warps, num_stages tiles in flight, loaded by TMA or by pointers.

    Two tiles are equal if their fields are, also if they belong to different kernels.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False

    def __eq__(self, other):
        return isinstance(other, Tile) and astuple(self) == astuple(other)

    def __hash__(self):
        return hash((self.block_m, self.block_n, self.num_warps, self.num_stages, self.use_tma))  # without copies


class FlashCase(NamedTuple):
    """What the configs of a call depend on.

    access: how k and v (and in the backward pass q and dout) can be loaded: "tma", 16 bytes at a time ("vector"), or
    element by element ("scalar"). precision: of fp32 matmuls, "ieee", "tf32" or "tf32x3". is_plain: no softcap, ALiBi
    or dropout; sweeps time only such calls. seqlen_k: keys of the longest sequence.
    """

    arch: str
    dtype: torch.dtype
    head_dim: int  # 1 to 512
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
    def in_chunks(self):
        return in_chunks(self.dtype, (self.head_dim, self.head_dim_v))

    @property
    def is_tuned(self):
        """Whether sweeps time such calls: plain ones whose tensors can be loaded in the fastest way."""
        return self.is_plain and (self.access == "tma" or (self.access == "vector" and not self.gpu.tma))

    @property
    def suits_tma(self):
        """Whether rows are multiples of 16 bytes. Strides and addresses are not known here."""
        return all(dim * self.dtype.itemsize % 16 == 0 for dim in (self.head_dim, self.head_dim_v))


def in_chunks(dtype, head_dims):
    """Whether matmuls load their operands in chunks of CHUNK columns, see _jit/columns.py."""
    return dtype == torch.float32 and max(head_dims) > HALF


def tma_obstacle(config, case):
    """Why a config cannot use TMA; None if it can, or does not use it."""
    if not config.use_tma:
        return None
    if not case.gpu.tma:
        return f"{case.arch} has no TMA"
    if case.in_chunks:
        return "TMA loads whole tiles, not chunks"
    return None if case.suits_tma else "TMA needs rows in units of 16 bytes"


def padded_head_dim(head_dim):
    """Columns that the kernel computes: the next power of two, or sum of two of them, of at least 16 each."""
    columns = max(16, -(-head_dim // 16) * 16)
    first = 1 << (columns.bit_length() - 1)
    rest = columns - first
    if 2 * rest > first:
        return 2 * first
    return first + (1 << (rest - 1).bit_length() if rest else 0)
