"""Public calls on empty tensors for compilation, one function per family.

`package` is triton_attn, of this commit or of another. Only its public names are used.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

SEQLEN = 1024  # compiled code does not depend on it
RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128  # the widths of MLA in DeepSeek-V2 and V3
# What vLLM's backend chooses: keys are split into segments where a grid has fewer programs.
SEGMENTS, GRID_OF_SEGMENTS = 16, 128


def flash_inputs(dtype, head_dim, head_dim_v=None):
    q, k = (torch.empty(1, SEQLEN, 8, head_dim, dtype=dtype) for _ in range(2))
    return q, k, torch.empty(1, SEQLEN, 8, head_dim_v or head_dim, dtype=dtype)


def flash(package, dtype, head_dim, causal=False, head_dim_v=None):
    package.flash_attention(*flash_inputs(dtype, head_dim, head_dim_v), causal=causal)


def flash_backward(package, dtype, head_dim, causal=False):
    """A backward pass, with its forward."""
    inputs = [x.requires_grad_() for x in flash_inputs(dtype, head_dim)]
    out = package.flash_attention(*inputs, causal=causal)
    torch.autograd.grad(out, inputs, torch.empty_like(out))


def paged_inputs(dtype, num_heads_q, num_heads_kv, head_dim, page_size, seqlen_q=1):
    q = torch.empty(1, seqlen_q, num_heads_q, head_dim, dtype=dtype)
    cache = torch.empty(SEQLEN // page_size, page_size, num_heads_kv, head_dim, dtype=dtype)
    return q, cache, cache, *_lengths_and_pages(page_size)


def paged(package, dtype, **case):
    package.paged_attention(*paged_inputs(dtype, **case))


def unified(unified_attention, dtype, **case):
    """The same call of vLLM's function, as its attention backend makes it."""
    q, k_cache, v_cache, cache_seqlens, block_table = paged_inputs(dtype, **case)
    _, seqlen_q, num_heads_q, head_dim = q.shape
    parts = seqlen_q, num_heads_q, SEGMENTS
    unified_attention(
        q=q[0],
        k=k_cache,
        v=v_cache,
        out=torch.empty_like(q[0]),
        cu_seqlens_q=torch.empty(2, dtype=torch.int32),
        max_seqlen_q=seqlen_q,
        seqused_k=cache_seqlens,
        max_seqlen_k=SEQLEN,
        softmax_scale=head_dim**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=block_table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=GRID_OF_SEGMENTS // k_cache.shape[2],
        num_par_softmax_segments=SEGMENTS,
        softmax_segm_output=torch.empty(*parts, head_dim),
        softmax_segm_max=torch.empty(parts),
        softmax_segm_expsum=torch.empty(parts),
    )


def latent_inputs(package, dtype, num_heads, cache_dtype, page_size, kv_lora_rank=RANK, qk_rope_head_dim=ROPE):
    """A decode step with absorbed queries. An fp8 cache consists of bytes."""
    q_nope, q_pe = (torch.empty(1, 1, num_heads, dim, dtype=dtype) for dim in (kv_lora_rank, qk_rope_head_dim))
    is_fp8 = cache_dtype == "float8_e4m3fn"
    row_bytes = package.kv_cache_bytes_per_token(
        num_layers=1,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        dtype=torch.float8_e4m3fn if is_fp8 else dtype,
    )
    held = torch.uint8 if is_fp8 else dtype
    cache = torch.empty(SEQLEN // page_size, page_size, row_bytes // held.itemsize, dtype=held)
    return q_nope, q_pe, cache, *_lengths_and_pages(page_size)


def mla(package, dtype, **case):
    package.mla_decode(*latent_inputs(package, dtype, **case), softmax_scale=1.0)


def prefill_inputs(dtype, num_heads, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, kv_lora_rank=RANK):
    rows = (num_heads, qk_nope_head_dim), (num_heads, qk_rope_head_dim), (kv_lora_rank,), (qk_rope_head_dim,)
    weights = (num_heads, qk_nope_head_dim, kv_lora_rank), (num_heads, v_head_dim, kv_lora_rank)
    return [torch.empty(shape, dtype=dtype) for shape in (*((1, SEQLEN, *row) for row in rows), *weights)]


def mla_prefill(package, dtype, fused, **shape):
    package.mla_prefill(*prefill_inputs(dtype, **shape), mode="fused" if fused else "materialized")


def _lengths_and_pages(page_size):
    return torch.empty(1, dtype=torch.int32), torch.empty(1, SEQLEN // page_size, dtype=torch.int32)


class Call(NamedTuple):
    """`make(package, dtype, **case)` launches `kernels`, which compute the attention matmuls, and others."""

    make: Callable
    kernels: tuple[str, ...]


CALLS = {
    "flash": Call(flash, ("_flash_fwd_kernel",)),
    "flash_backward": Call(flash_backward, ("_flash_bwd_dkdv_kernel", "_flash_bwd_dq_kernel")),
    "paged": Call(paged, ("_paged_fwd_kernel",)),
    "paged_prefill": Call(paged, ("_paged_fwd_kernel",)),
    "mla": Call(mla, ("_mla_absorbed_kernel",)),
    "mla_prefill": Call(mla_prefill, ("_mla_prefill_kernel",)),
}
