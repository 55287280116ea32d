"""Our kernels at an explicit config, compiled for a GPU that need not be there or launched on one that is."""

import torch

from triton_attn import flash_attention, mla_decode, paged_attention
from triton_attn._host.latent import latent_storage
from triton_attn._host.options import AttentionOptions
from triton_attn.flash.configs import FlashConfig
from triton_attn.flash.forward import launch_flash_fwd
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.paged.configs import PagedConfig
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
            launch_config(q, k, v, causal, config)
    return launches[-1]


def flash_backward(arch, dtype, head_dim, causal=False):
    """The compiled kernels of a backward pass that have products, as a user gets them: one fused, or dkdv and dq."""
    q, k, v, dout = (torch.empty(1, _SEQLEN, 8, head_dim, dtype=dtype) for _ in range(4))
    with compile_only(arch) as launches:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(flash_attention(*inputs, causal=causal), inputs, dout)
    return [launch for launch in launches if launch.name in ("_flash_bwd_dkdv_kernel", "_flash_bwd_dq_kernel")]


def paged_decode(arch, dtype, num_heads_q, num_heads_kv, head_dim, page_size):
    """The compiled kernel of a decode step at its default config, as a user gets it; no length is compiled in."""
    q = torch.empty(1, 1, num_heads_q, head_dim, dtype=dtype)
    block_table = torch.empty(1, _SEQLEN // page_size, dtype=torch.int32)
    cache = torch.empty(block_table.shape[1], page_size, num_heads_kv, head_dim, dtype=dtype)
    with compile_only(arch) as launches:
        paged_attention(q, cache, cache, torch.empty(1, dtype=torch.int32), block_table)
    return launches[0]


def latent_decode(arch, dtype, num_heads, cache_dtype, page_size, kv_lora_rank=512, qk_rope_head_dim=64):
    """The compiled kernel of a decode step over a latent cache, absorbed queries in and latent vectors out."""
    q_nope, q_pe = (torch.empty(1, 1, num_heads, dim, dtype=dtype) for dim in (kv_lora_rank, qk_rope_head_dim))
    block_table = torch.empty(1, _SEQLEN // page_size, dtype=torch.int32)
    is_fp8 = cache_dtype == "float8_e4m3fn"
    held, width = latent_storage(kv_lora_rank, qk_rope_head_dim, torch.float8_e4m3fn if is_fp8 else dtype)
    cache = torch.empty(block_table.shape[1], page_size, width, dtype=held)
    with compile_only(arch) as launches:
        mla_decode(q_nope, q_pe, cache, torch.empty(1, dtype=torch.int32), block_table, softmax_scale=1.0)
    return launches[0]


def config_of(launch):
    """The config that a launch of an attention kernel ran with."""
    values = launch.constexprs
    config = values["BLOCK_M"], values["BLOCK_N"], launch.num_warps, launch.num_stages
    if "USE_TMA" in values:
        return FlashConfig(*config, values["USE_TMA"])
    return MlaDecodeConfig(*config) if "KV_LORA_RANK" in values else PagedConfig(*config)


def config_name(config):
    """128x128 w8 s2: query rows x keys of a tile, warps, stages; tma if descriptors load the tiles."""
    tile = f"{config.block_m}x{config.block_n}"
    tma = isinstance(config, FlashConfig) and config.use_tma
    return f"{tile} w{config.num_warps} s{config.num_stages}{' tma' if tma else ''}"


def launch_config(q, k, v, causal, config):
    """`flash_attention(q, k, v, causal=causal)` with a config of one's own."""
    batch, seqlen_q, num_heads, head_dim = q.shape
    out = q.new_empty(batch, seqlen_q, num_heads, v.shape[3])
    lse = q.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    options = AttentionOptions(head_dim**-0.5, (None, 0 if causal else None), None, None, None)
    launch_flash_fwd(q, k, v, out, lse, None, None, seqlen_q, k.shape[1], options, config)
    return out
