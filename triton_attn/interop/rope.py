"""Rotary embedding in torch, for calls in which no kernel of ours rotates."""

import torch


def rotate(x, cos, sin, interleaved):
    """x (..., nheads, headdim), rotated by the angles (..., rotary_dim / 2) of each row in fp32.

    interleaved: dimensions (2 i, 2 i + 1) are rotated together; False: (i, i + rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    rotated = x[..., :rotary_dim].float()
    a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), -1)
