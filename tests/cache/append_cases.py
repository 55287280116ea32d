"""What random calls of both append functions are made of."""

import os

import torch
from hypothesis import strategies as st

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = ["contiguous", "sparse", "slice"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def strided(shape, dtype, layout, generator):
    """Random numbers: contiguous, in every other entry of the first dimension, or in a slice of longer rows."""
    if layout == "contiguous":
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)
    if layout == "sparse":
        return torch.randn(2 * shape[0], *shape[1:], generator=generator).to(DEVICE, dtype)[::2]
    return torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(DEVICE, dtype)[..., 1:-2]


def draw_slots(draw, num_tokens, num_slots, generator):
    """A slot of its own for each token, and which tokens are skipped: their slots are below 0."""
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    skipped = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    slots[skipped] = -1 - slots[skipped]
    return slots.to(DEVICE), skipped


def draw_rope(draw, skipped, head_dim, dtype, generator):
    """Options of a rotation; the positions of skipped tokens have no angle."""
    num_positions, half = draw(st.integers(1, 50)), draw(st.integers(1, head_dim // 2))
    table_dtype = draw(st.sampled_from([dtype, torch.float32]))
    rope_cos, rope_sin = (
        strided((num_positions, half), table_dtype, draw(st.sampled_from(LAYOUTS)), generator) for _ in range(2)
    )
    positions = torch.randint(num_positions, (len(skipped),), generator=generator)
    positions[skipped] = 2**31 - 1
    return {
        "rope_cos": rope_cos,
        "rope_sin": rope_sin,
        "positions": positions.to(DEVICE, draw(st.sampled_from([torch.int32, torch.int64]))),
        "rope_interleaved": draw(st.booleans()),
    }
