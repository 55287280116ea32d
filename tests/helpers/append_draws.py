"""Random draws for calls of both append functions."""

import torch
from append_cases import DEVICE, LAYOUTS, strided
from hypothesis import strategies as st


def draw_slots(draw, num_tokens, num_slots, generator):
    """A slot for each token, and which tokens are skipped (slots below 0)."""
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    skipped = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    slots[skipped] = -1 - slots[skipped]
    return slots.to(DEVICE), skipped


def draw_rope(draw, skipped, head_dim, dtype, generator):
    """Options of a rotation. The positions of skipped tokens have no angle."""
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
