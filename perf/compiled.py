"""Our kernels at an explicit config, compiled for a GPU that need not be there or launched on one that is."""

import torch

from triton_attn import flash_attention, mla_decode, paged_attention
from triton_attn._host.latent import latent_storage
from triton_attn._host.options import AttentionOptions
from triton_attn.flash.backward import launch_flash_bwd
from triton_attn.flash.backward_configs import default_backward_config
from triton_attn.flash.configs import FlashConfig
from triton_attn.flash.forward import launch_flash_fwd, new_outputs
from triton_attn.mla.absorbed import launch_mla_decode
from triton_attn.mla.configs import MlaDecodeConfig, MlaPrefillConfig
from triton_attn.mla.prefill import launch_mla_fused, launch_mla_materialized
from triton_attn.paged.configs import PagedConfig
from triton_attn.paged.forward import launch_paged_fwd
from triton_attn.testing import compile_only

_SEQLEN = 1024  # no length is compiled in
# Which gradients (q, k, v, sinks) make a backward pass launch the kernel.
_WANTED = {
    "dkdv": (False, True, True, False),
    "dq": (True, False, False, False),
    "fused": (True, True, True, False),
}


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


def flash_backward_kernel(arch, dtype, kernel, head_dim, causal, config):
    """One compiled kernel of a backward pass, "dkdv", "dq" or "fused", at a config of one's own."""
    q, k, v, dout = (torch.empty(1, _SEQLEN, 8, head_dim, dtype=dtype) for _ in range(4))
    out, lse = new_outputs(q, v)
    options = _options(head_dim, causal)
    with compile_only(arch) as launches:
        tiles = backward_tiles(arch, dtype, head_dim, causal, kernel, config)
        launch_flash_bwd(
            dout, None, q, k, v, out, lse, None, None, _SEQLEN, _SEQLEN, options, _WANTED[kernel], config=tiles
        )
    return launches[-1]


def paged_decode(arch, dtype, num_heads_q, num_heads_kv, head_dim, page_size, seqlen_q=1, config=None):
    """The compiled kernel of a decode step, or of a chunk of a prompt; `config` None is the default, as a user gets
    it."""
    q = torch.empty(1, seqlen_q, num_heads_q, head_dim, dtype=dtype)
    block_table = torch.empty(1, _SEQLEN // page_size, dtype=torch.int32)
    cache = torch.empty(block_table.shape[1], page_size, num_heads_kv, head_dim, dtype=dtype)
    cache_seqlens = torch.empty(1, dtype=torch.int32)
    with compile_only(arch) as launches:
        if config is None:
            paged_attention(q, cache, cache, cache_seqlens, block_table)
        else:
            launch_paged(q, cache, cache, cache_seqlens, block_table, torch.empty_like(q), config)
    return launches[0]


def latent_decode(arch, dtype, num_heads, cache_dtype, page_size, kv_lora_rank=512, qk_rope_head_dim=64, config=None):
    """The compiled kernel of a decode step over a latent cache, absorbed queries in and latent vectors out; `config`
    None is the default, as a user gets it."""
    q_nope, q_pe = (torch.empty(1, 1, num_heads, dim, dtype=dtype) for dim in (kv_lora_rank, qk_rope_head_dim))
    block_table = torch.empty(1, _SEQLEN // page_size, dtype=torch.int32)
    is_fp8 = cache_dtype == "float8_e4m3fn"
    held, width = latent_storage(kv_lora_rank, qk_rope_head_dim, torch.float8_e4m3fn if is_fp8 else dtype)
    cache = torch.empty(block_table.shape[1], page_size, width, dtype=held)
    cache_seqlens = torch.empty(1, dtype=torch.int32)
    with compile_only(arch) as launches:
        if config is None:
            mla_decode(q_nope, q_pe, cache, cache_seqlens, block_table, softmax_scale=1.0)
        else:
            launch_latent(q_nope, q_pe, cache, cache_seqlens, block_table, 1.0, config)
    return launches[0]


def latent_prefill(
    arch, dtype, num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank, fused, config=None
):
    """The compiled kernel of a prefill that makes keys and values of latent vectors, or finds them in memory; `config`
    None is the default, as a user gets it."""
    dims = qk_nope_head_dim, qk_rope_head_dim
    q_nope, q_pe = (torch.empty(1, _SEQLEN, num_heads, dim, dtype=dtype) for dim in dims)
    kv_latent, k_pe = (torch.empty(1, _SEQLEN, dim, dtype=dtype) for dim in (kv_lora_rank, qk_rope_head_dim))
    w_uk, w_uv = (torch.empty(num_heads, dim, kv_lora_rank, dtype=dtype) for dim in (qk_nope_head_dim, v_head_dim))
    with compile_only(arch) as launches:
        launch_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, fused, config)
    return launches[-1]


def config_of(launch):
    """The config that a launch of an attention kernel ran with."""
    values = launch.constexprs
    config = values["BLOCK_M"], values["BLOCK_N"], launch.num_warps, launch.num_stages
    if "NOPE_HEAD_DIM" in values:
        return MlaPrefillConfig(*config, *filter(None, [values["BLOCK_C"]]))
    if "USE_TMA" in values:
        return FlashConfig(*config, values["USE_TMA"])
    return MlaDecodeConfig(*config) if "KV_LORA_RANK" in values else PagedConfig(*config)


def config_name(config):
    """128x128 w8 s2: query rows x keys of a tile, warps, stages; tma if descriptors load the tiles, c64 for numbers of
    latent vectors at a time."""
    name = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    if isinstance(config, MlaPrefillConfig):
        return f"{name} c{config.block_c}"
    return f"{name} tma" if isinstance(config, FlashConfig) and config.use_tma else name


def launch_config(q, k, v, causal, config):
    """`flash_attention(q, k, v, causal=causal)` with a config of one's own."""
    out, lse = new_outputs(q, v, wants_lse=False)
    launch_flash_fwd(q, k, v, out, lse, None, None, q.shape[1], k.shape[1], _options(q.shape[3], causal), config)
    return out


def launch_backward_config(q, k, v, causal, config):
    """The same at its default config, with a BackwardConfig of one's own."""
    return _Attention.apply(q, k, v, causal, config)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, config):
        out, lse = new_outputs(q, v)
        options = _options(q.shape[3], causal)
        launch_flash_fwd(q, k, v, out, lse, None, None, q.shape[1], k.shape[1], options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.config = options, config
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        lengths = q.shape[1], k.shape[1]
        dq, dk, dv, _ = launch_flash_bwd(
            dout, None, q, k, v, out, lse, None, None, *lengths, ctx.options, _WANTED["fused"], config=ctx.config
        )
        return dq, dk, dv, None, None


def backward_tiles(arch, dtype, head_dim, causal, kernel, config):
    """The default configs of a backward pass, but for one kernel, and in the schedule that this kernel belongs to."""
    default = default_backward_config(arch, dtype, head_dim, head_dim, causal)
    return default._replace(**{"fused": None} | {kernel: config})


def launch_paged(q, k_cache, v_cache, cache_seqlens, block_table, out, config):
    """`paged_attention(q, k_cache, v_cache, cache_seqlens, block_table, out=out)` with a config of one's own."""
    options = _options(q.shape[3], causal=True)
    tensors = q, k_cache, v_cache, out, None, cache_seqlens, block_table
    launch_paged_fwd(*tensors, None, q.shape[1], options, config=config)
    return out


def launch_latent(q_nope, q_pe, latent_cache, cache_seqlens, block_table, softmax_scale, config):
    """`mla_decode` of absorbed queries, latent vectors out, with a config of one's own."""
    out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    tensors = q_nope, q_pe, latent_cache, out, None, cache_seqlens, block_table
    launch_mla_decode(*tensors, None, None, (None, None, False), softmax_scale, True, config=config)
    return out


def launch_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, fused, config):
    """`mla_prefill` with mode "fused", or "materialized" with all heads at once, and a config of one's own."""
    out = q_nope.new_empty(*q_nope.shape[:3], w_uv.shape[1])
    lengths = None, None, q_nope.shape[1], kv_latent.shape[1]
    scale = (q_nope.shape[3] + q_pe.shape[3]) ** -0.5
    args = q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, out, None, lengths, scale, True
    if fused:
        launch_mla_fused(*args, config)
    else:
        launch_mla_materialized(*args, (len(w_uk), kv_latent.shape[0] * kv_latent.shape[1]), config)
    return out


def _options(head_dim, causal):
    return AttentionOptions(head_dim**-0.5, (None, 0 if causal else None), None, None, None)
