"""Inputs of calls of both append functions."""

import math
import os

import torch

from triton_attn._host.definition import rotate

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
QUANTIZED = [*FLOAT8, torch.int8]
LAYOUTS = ["contiguous", "sparse", "slice"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# (shape of the memory around a cache, the cache in it), from the cache's (num_pages, page_size, width).
CACHE_LAYOUTS = {
    "contiguous": lambda pages, size, width: ((pages, size, width), lambda memory: memory),
    "one layer": lambda pages, size, width: ((3, pages, size, width), lambda memory: memory[1]),
    "every other page": lambda pages, size, width: ((2 * pages, size, width), lambda memory: memory[::2]),
    "slot by slot": lambda pages, size, width: ((size, pages, width), lambda memory: memory.transpose(0, 1)),
    "inside of rows": lambda pages, size, width: ((pages, size, width + 12), lambda memory: memory[..., 4:-8]),
}


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def strided(shape, dtype, layout, generator):
    """Random values: contiguous, in every other entry of the first dimension, or in a slice of longer rows."""
    if dtype == torch.int8:
        return (40 * strided(shape, torch.float32, layout, generator)).to(dtype)
    if layout == "contiguous":
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)
    if layout == "sparse":
        return torch.randn(2 * shape[0], *shape[1:], generator=generator).to(DEVICE, dtype)[::2]
    return torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(DEVICE, dtype)[..., 1:-2]


class Cache:
    """A latent cache inside poisoned memory, whose bytes are all 0xFF."""

    def __init__(self, layout, dtype, *sizes):
        shape, cache_in = CACHE_LAYOUTS[layout](*sizes)
        self.memory = torch.full((math.prod(shape) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.cache = cache_in(self.memory.view(dtype).view(shape))


def rounded(x, dtype):
    if dtype == torch.int8:
        return x.round().clamp(-128, 127)
    limit = torch.finfo(dtype).max if dtype in FLOAT8 else math.inf
    return x.clamp(-limit, limit).to(dtype).float()


def assert_rotated(actual, x, scale, dtype, rope_cos, rope_sin, positions, rope_interleaved):
    """The rotated dimensions of rows (n, num_heads, dim), with the fp32 error whether or not the compiler fuses
    multiplications and additions, and then rounded once to dtype.
    """
    cos, sin = (table[positions].double().unsqueeze(1) for table in (rope_cos, rope_sin))
    x = x[..., : 2 * cos.shape[2]].double()
    truth = rotate(x, cos, sin, rope_interleaved) / scale
    sums = (rotate(x.abs(), cos.abs(), sign * sin.abs(), rope_interleaved) for sign in (1, -1))
    error = 2**-22 * torch.maximum(*sums) / scale  # two multiplications, their sum, a quotient off by 2 ulp
    actual = actual[..., : x.shape[2]].float()
    assert (actual >= rounded(truth - error, dtype)).all()
    assert (actual <= rounded(truth + error, dtype)).all()
