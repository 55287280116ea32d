"""Our kernel and its peers behind one signature.

A provider takes a `Problem` and a device and gives a function of q, k and v; all tensors are (batch, seqlen, heads,
head_dim).
"""

import math
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf.results import OURS
from triton_attn import flash_attention


def _ours(problem, device):
    return partial(flash_attention, causal=problem.causal)


def _sdpa(backend):
    def provider(problem, device):
        def attention(q, k, v):
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*_heads_first(q, k, v), is_causal=problem.causal)
            return out.transpose(1, 2)

        return attention

    return provider


def _flex(problem, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # dynamo keeps only a few shapes of one function
    length = problem.seqlen
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device) if problem.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*_heads_first(q, k, v), block_mask=mask).transpose(1, 2)


def _naive(problem, device):
    """Scores in memory, in the dtype of the input."""
    shape = problem.seqlen, problem.seqlen
    hidden = torch.ones(shape, dtype=torch.bool, device=device).triu(1) if problem.causal else None

    def attention(q, k, v):
        q, k, v = _heads_first(q, k, v)
        scores = q @ k.transpose(2, 3) / math.sqrt(problem.head_dim)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    return attention


def _heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


PROVIDERS = {
    OURS: _ours,
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": _flex,
    "naive torch": _naive,
}
