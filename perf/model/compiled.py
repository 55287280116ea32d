"""Our kernels at an explicit config, compiled for any GPU or launched on the present one."""

import os
from dataclasses import replace
from unittest import mock

import torch

import triton_attn
from perf.results.tables import tile_name
from perf.workloads import calls
from triton_attn._host.call import Lengths, call_of
from triton_attn._host.checks import layout_of
from triton_attn._host.layout import new_outputs
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.arguments import key_of
from triton_attn.dense.backward import launch_flash_bwd
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.dense.tiles import FlashCase, Tile
from triton_attn.flash.configs import HOPPER_HEAD_DIMS, FlashConfig, HopperConfig
from triton_attn.flash.forward import launch_flash_fwd
from triton_attn.flash.hopper import launch_flash_fwd_hopper, plan_hopper
from triton_attn.mla.absorbed import launch_mla_decode
from triton_attn.mla.api import DecodeCall, PrefillCall
from triton_attn.mla.configs import MlaDecodeConfig, MlaHopperConfig, MlaPrefillConfig
from triton_attn.mla.prefill import launch_mla_fused, launch_mla_materialized
from triton_attn.paged.api import PagedCall
from triton_attn.paged.configs import PagedConfig
from triton_attn.paged.forward import launch_paged_fwd
from triton_attn.toolchain import compile_only

# Of kernels in which warps of their own load, while others multiply.
HOPPER_CONFIGS = HopperConfig, MlaHopperConfig
# The gradients (q, k, v, sinks) that make a backward pass launch the kernel.
_WANTED = {
    "dkdv": (False, True, True, False),
    "dq": (True, False, False, False),
    "fused": (True, True, True, False),
}


def flash_forward(arch, dtype, head_dim, head_dim_v=None, causal=False, config=None, kernels="portable"):
    """The compiled forward kernel (a `triton_attn.toolchain.Launch`). With `config` None it has the default config
    under TRITON_ATTN_KERNELS=`kernels`.
    """
    with mock.patch.dict(os.environ, TRITON_ATTN_KERNELS=kernels), compile_only(arch) as launches:
        if config is None:
            calls.flash(triton_attn, dtype, head_dim, causal, head_dim_v)
        else:
            launch_config(*calls.flash_inputs(dtype, head_dim, head_dim_v), causal, config)
    return launches[-1]


def flash_hopper(arch, dtype, head_dim, causal, config):
    """The compiled forward kernel of hopper.py at a given config."""
    with compile_only(arch) as launches:
        launch_hopper(*calls.flash_inputs(dtype, head_dim, HOPPER_HEAD_DIMS[head_dim]), causal, config)
    return launches[-1]


def flash_backward(arch, dtype, head_dim, causal=False):
    """The compiled kernels with matmuls of a default backward pass: one fused kernel, or dkdv and dq."""
    with compile_only(arch) as launches:
        calls.flash_backward(triton_attn, dtype, head_dim, causal)
    return [launch for launch in launches if launch.name in calls.CALLS["flash_backward"].kernels]


def flash_backward_kernel(arch, dtype, kernel, head_dim, causal, config):
    """The launches of one kernel of a backward pass, "dkdv", "dq" or "fused", at a given config: two with dk apart from
    dv."""
    q, k, v = calls.flash_inputs(dtype, head_dim)
    out, lse = new_outputs(q, v)
    with compile_only(arch) as launches:
        tiles = backward_tiles(arch, dtype, head_dim, causal, kernel, config)
        launch_flash_bwd(_call(q, k, v, causal), torch.empty_like(out), None, out, lse, _WANTED[kernel], config=tiles)
    return [launch for launch in launches if launch.name in calls.CALLS["flash_backward"].kernels]


def paged_decode(arch, dtype, num_heads_q, num_heads_kv, head_dim, page_size, seqlen_q=1, config=None):
    """The compiled kernel of a decode step, or of a chunk of a prompt. With `config` None it has the default config."""
    case = dict(num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim, page_size=page_size)
    case |= dict(seqlen_q=seqlen_q)
    with compile_only(arch) as launches:
        if config is None:
            calls.paged(triton_attn, dtype, **case)
        else:
            q, *cached = calls.paged_inputs(dtype, **case)
            launch_paged(q, *cached, torch.empty_like(q), config)
    return launches[0]


def unified_attention(function, arch, dtype, **case):
    """The compiled kernel of vLLM's `unified_attention`, with the config that this function chooses."""
    with compile_only(arch) as launches:
        calls.unified(function, dtype, **case)
    return launches[0]


def latent_decode(arch, dtype, num_heads, cache_dtype, page_size, kv_lora_rank=512, qk_rope_head_dim=64, config=None):
    """The compiled kernel of a decode step over a latent cache, from absorbed queries to latent outputs. With `config`
    None it has the default config.
    """
    case = dict(num_heads=num_heads, cache_dtype=cache_dtype, page_size=page_size)
    case |= dict(kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)
    with compile_only(arch) as launches:
        if config is None:
            calls.mla(triton_attn, dtype, **case)
        else:
            launch_latent(*calls.latent_inputs(triton_attn, dtype, **case), 1.0, config)
    return launches[0]


def latent_prefill(arch, dtype, fused, config=None, **shape):
    """The compiled kernel of a prefill that computes keys and values from latent vectors ("fused"), or reads them from
    memory. With `config` None it has the default config.
    """
    with compile_only(arch) as launches:
        if config is None:
            calls.mla_prefill(triton_attn, dtype, fused, **shape)
        else:
            launch_prefill(*calls.prefill_inputs(dtype, **shape), fused, config)
    return launches[-1]


def config_of(launch):
    """The config with which an attention kernel was launched."""
    values = launch.constexprs
    config = values["BLOCK_M"], values["BLOCK_N"], launch.num_warps, launch.num_stages
    if "NOPE_HEAD_DIM" in values:
        return MlaPrefillConfig(*config, *filter(None, [values["BLOCK_C"]]))
    if "USE_TMA" in values:
        return FlashConfig(*config, values["USE_TMA"])
    return MlaDecodeConfig(*config) if "KV_LORA_RANK" in values else PagedConfig(*config)


def config_name(config):
    """See `tile_name`. c64 is the number of latent elements per step, hopper is for HOPPER_CONFIGS, x2 for programs of
    two tiles of queries."""
    if isinstance(config, HOPPER_CONFIGS):
        name = f"{tile_name(config.block_m, config.block_n, 4 * config.groups, config.num_stages)} hopper"
        name = f"{name} lazy" if getattr(config, "lazy", False) else name
        return f"{name} x{config.tiles}" if getattr(config, "tiles", 1) > 1 else name
    tma = isinstance(config, Tile) and config.use_tma
    name = tile_name(config.block_m, config.block_n, config.num_warps, config.num_stages, tma)
    return f"{name} c{config.block_c}" if isinstance(config, MlaPrefillConfig) else name


def launch_config(q, k, v, causal, config):
    """`flash_attention(q, k, v, causal=causal)` with a given config."""
    out, lse = new_outputs(q, v, wants_lse=False)
    launch_flash_fwd(_call(q, k, v, causal), out, lse, config)
    return out


def launch_hopper(q, k, v, causal, config):
    """The same with the kernel of hopper.py and a HopperConfig."""
    out, lse = new_outputs(q, v, wants_lse=False)
    call = _call(q, k, v, causal)
    launch_flash_fwd_hopper(plan_hopper(key_of(call, out), "hopper", config), call, out, lse)
    return out


def launch_backward_config(q, k, v, causal, config):
    """The same at its default config, with a BackwardConfig for the backward pass."""
    return _Attention.apply(q, k, v, causal, config)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, config):
        out, lse = new_outputs(q, v)
        launch_flash_fwd(_call(q, k, v, causal), out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.config = causal, config
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        call = _call(q, k, v, ctx.causal)
        dq, dk, dv, _ = launch_flash_bwd(call, dout, None, out, lse, _WANTED["fused"], config=ctx.config)
        return dq, dk, dv, None, None


def backward_tiles(arch, dtype, head_dim, causal, kernel, config):
    """The default configs of a backward pass with one kernel replaced, in the schedule of that kernel."""
    default = BackwardConfig.default(FlashCase(arch, dtype, head_dim, head_dim, causal))
    return replace(default, **{"fused": None} | {kernel: config})


def launch_paged(q, k_cache, v_cache, cache_seqlens, block_table, out, config):
    """`paged_attention(q, k_cache, v_cache, cache_seqlens, block_table, out=out)` with a given config."""
    options = _options(q.shape[3], causal=True)
    layout = layout_of(q, k_cache, v_cache)
    call = PagedCall(q, k_cache, v_cache, cache_seqlens, block_table, None, q.shape[1], options, layout)
    launch_paged_fwd(call, out, None, config)
    return out


def launch_latent(q_nope, q_pe, latent_cache, cache_seqlens, block_table, softmax_scale, config):
    """`mla_decode` from absorbed queries to latent outputs, with a given config, of either kernel."""
    out = torch.empty_like(q_nope, memory_format=torch.contiguous_format)
    call = DecodeCall(q_nope, q_pe, latent_cache, cache_seqlens, block_table, softmax_scale)
    launch_mla_decode(call, out, None, config)
    return out


def launch_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, fused, config):
    """`mla_prefill` with mode "fused", or "materialized" with all heads at once, and a given config."""
    out = q_nope.new_empty(*q_nope.shape[:3], w_uv.shape[1])
    lengths = Lengths(None, None, q_nope.shape[1], kv_latent.shape[1])
    scale = (q_nope.shape[3] + q_pe.shape[3]) ** -0.5
    call = PrefillCall(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, lengths, scale, causal=True)
    if fused:
        launch_mla_fused(call, out, None, config)
    else:
        launch_mla_materialized(call, out, None, (len(w_uk), kv_latent.shape[0] * kv_latent.shape[1]), config)
    return out


def _call(q, k, v, causal):
    return call_of(q, k, v, _options(q.shape[3], causal))


def _options(head_dim, causal):
    return AttentionOptions(head_dim**-0.5, (None, 0 if causal else None), None, None, None)
