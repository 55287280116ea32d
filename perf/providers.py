"""Our kernels and their peers behind one signature per family.

A provider of `PROVIDERS` takes a `Problem` and a device and gives a function of q, k and v; all tensors are (batch,
seqlen, heads, head_dim). One of `DECODE_PROVIDERS` takes a `DecodeProblem`, q and the caches, contiguous, and gives a
decode step: a function without arguments, for which all that a serving loop has at hand is made beforehand.
"""

import math
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf.results import OURS
from triton_attn import append_kv_cache, flash_attention, paged_attention


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


def _ours_decode(problem, q, k_cache, v_cache):
    """Over pages in random order, all sequences' mixed."""
    pages_each = -(-problem.seqlen_k // problem.page_size)
    block_table = torch.randperm(problem.batch * pages_each, device=q.device).view(problem.batch, pages_each)
    tokens = torch.arange(problem.seqlen_k, device=q.device)
    slots = block_table[:, tokens // problem.page_size] * problem.page_size + tokens % problem.page_size
    pages = [x.new_empty(block_table.numel(), problem.page_size, *x.shape[2:]) for x in (k_cache, v_cache)]
    append_kv_cache(k_cache.flatten(0, 1), v_cache.flatten(0, 1), *pages, slots.flatten())
    cache_seqlens = torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32, device=q.device)
    return partial(paged_attention, q, *pages, cache_seqlens, block_table.int(), out=torch.empty_like(q))


def _sdpa_decode(backend):
    def provider(problem, q, k_cache, v_cache):
        q, k, v = _heads_first(q, k_cache, v_cache)

        def step():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return step

    return provider


def _flex_decode(problem, q, k_cache, v_cache):
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    q, k, v = _heads_first(q, k_cache, v_cache)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, enable_gqa=True).transpose(1, 2)


DECODE_PROVIDERS = {
    OURS: _ours_decode,
    "SDPA flash": _sdpa_decode(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa_decode(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": _flex_decode,
}
