"""Compile our kernels for a GPU that need not be there, at any config."""

import torch

from triton_attn import flash_attention
from triton_attn.flash.forward import launch_flash_fwd
from triton_attn.flash.options import AttentionOptions
from triton_attn.testing import compile_only

_SEQLEN = 1024  # no length is compiled in


def flash_forward(arch, dtype, head_dim, head_dim_v=None, causal=False, config=None):
    """The compiled forward kernel (a `triton_attn.testing.Launch`); `config` None is the default, as a user gets it."""
    q, k = (torch.empty(1, _SEQLEN, 8, head_dim, dtype=dtype) for _ in range(2))
    v = torch.empty(1, _SEQLEN, 8, head_dim_v or head_dim, dtype=dtype)
    with compile_only(arch) as launches:
        if config is None:
            flash_attention(q, k, v, causal=causal)
        else:
            out = torch.empty_like(v)
            lse = torch.empty(1, 8, _SEQLEN)
            options = AttentionOptions(head_dim**-0.5, (None, 0 if causal else None), None, None, None)
            launch_flash_fwd(q, k, v, out, lse, None, None, _SEQLEN, _SEQLEN, options, config)
    return launches[-1]
