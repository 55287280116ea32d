"""What merging computes, in plain torch: every dtype up to fp64, any device."""

import torch
from torch import Tensor


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `triton_attn.merge_attention`; arguments are taken as right."""
    dtype = torch.promote_types(outs.dtype, torch.float32)
    lses = lses.to(dtype).masked_fill(lses == float("inf"), float("-inf"))
    lse = torch.logsumexp(lses, dim=0)
    # If no split has a key, a shift by 0 keeps the weights at exp(-inf) = 0.
    weights = torch.exp(lses - torch.where(lse == float("-inf"), 0.0, lse)).transpose(2, 3)[..., None]
    scaled = torch.where(weights == 0, 0.0, outs.to(dtype) * weights)
    return scaled.sum(0).to(outs.dtype), lse
