"""Splits for merge_attention, and their fp64 merge."""

import math

import torch
import triton

from triton_attn import reference

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def parts_of(seed, num_parts, batch, seqlen_q, num_heads, head_dim_v, dtype, share_empty, spread):
    """outs and lses. Those without a key (lse = -inf or +inf) are NaN."""
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(num_parts, batch, seqlen_q, num_heads, head_dim_v, generator=generator)
    lses = spread * torch.randn(num_parts, batch, num_heads, seqlen_q, generator=generator)
    empty = torch.rand(lses.shape, generator=generator) < share_empty
    lses[empty] = torch.where(torch.rand(lses.shape, generator=generator) < 0.5, -math.inf, math.inf)[empty]
    outs[empty.transpose(2, 3)] = math.nan
    return outs.to(DEVICE, dtype), lses.to(DEVICE)


def in_float64(outs, lses):
    return reference.merge_attention(outs.double(), lses.double())
