"""The launcher of the backward pass of dense and varlen attention: which kernels, with which tiles and buffers.

backward_kernels.py says what they compute, and by which two schedules.
"""

import torch

from .._host.device import arch_of, input_precision, launch
from .._host.layout import (
    batch_head_strides,
    l2_section,
    lse_strides,
    row_strides,
    rows_are_wide,
    tiles_each,
    tma_operand,
    tma_ready,
    vector_elements,
)
from .._host.tuned import choose
from .._jit.args import Dropout, Strides, Window
from .backward_configs import BackwardConfig, may_hoist
from .backward_kernels import _flash_bwd_delta_kernel, _flash_bwd_dkdv_kernel, _flash_bwd_dq_kernel
from .configs import FlashCase


def launch_flash_bwd(
    dout,
    dlse,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqlen_q,
    seqlen_k,
    options,
    wanted=(True, True, True, True),
    deterministic=False,
    config=None,
):
    """Gradients of q, k, v and the sinks, None where not wanted. Nothing is read back.

    dout is as out; dlse as lse, or None. The rest as in launch_flash_fwd. Memory: the gradients, delta (fp32, as lse),
    and in the fused schedule dq in fp32.
    """
    num_heads, head_dim = q.shape[-2:]
    num_heads_kv, head_dim_v = v.shape[-2:]
    group_size = num_heads // num_heads_kv
    varlen = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0]
    softmax_scale, window, softcap, alibi_slopes, sinks, dropout = options
    causal = window[1] is not None
    arch = arch_of(q)
    inputs = q, k, v, dout
    vector = vector_elements(q.element_size(), *(x.stride() for x in inputs))
    if config is None:
        scalar = vector == 1 or any(x.data_ptr() % 16 for x in inputs)
        access = "scalar" if scalar else "tma" if all(map(tma_ready, inputs)) else "vector"
        plain = softcap is None and alibi_slopes is None and dropout is None
        shape = head_dim, head_dim_v, causal
        case = FlashCase(arch, q.dtype, *shape, access, is_plain=plain, seqlen_k=seqlen_k)
        config = choose(BackwardConfig, case)
    want_dq, want_dk, want_dv, want_dsinks = wanted

    minus_delta, dsinks = _minus_delta(
        dout, dlse, out, lse, cu_seqlens_q, batch, seqlen_q, sinks if want_dsinks else None
    )
    contiguous = torch.contiguous_format
    dk = torch.empty_like(k, memory_format=contiguous) if want_dk else None
    dv = torch.empty_like(v, memory_format=contiguous) if want_dv else None
    fused = want_dq and (want_dk or want_dv) and config.fused is not None and not deterministic
    dq_sum = torch.zeros_like(q, dtype=torch.float32, memory_format=contiguous) if fused else None
    dq = None
    if want_dq:
        dq = dq_sum if fused and q.dtype == torch.float32 else torch.empty_like(q, memory_format=contiguous)

    shared = dict(
        softmax_scale=softmax_scale,
        softcap=softcap,
        window=Window(*window),
        dropout=None if dropout is None else Dropout(*dropout),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        VECTOR=vector,
        INPUT_PRECISION=input_precision(q.dtype, arch),
    )
    alibi_strides = None if alibi_slopes is None else batch_head_strides(alibi_slopes)
    lengths = (q.shape[-3], k.shape[-3], lse.shape[-1])
    outputs = [gradient for gradient in (dq_sum, dq, dk, dv) if gradient is not None]
    if varlen and batch == 0:
        for gradient in outputs:
            gradient.zero_()

    if want_dk or want_dv:
        tile = config.fused if fused else config.dkdv
        num_tiles = tiles_each(seqlen_k, k.shape[-3], batch, tile.block_n)
        num_programs = num_tiles * num_heads_kv * batch
        use_tma = tile.use_tma and tma_ready(q) and tma_ready(dout) and (dq_sum is None or tma_ready(dq_sum))
        if num_programs > 0:
            launch(
                _flash_bwd_dkdv_kernel,
                (num_programs,),
                q.device,
                *tma_operand(q, tile.block_m if use_tma else None),
                k,
                v,
                *tma_operand(dout, tile.block_m if use_tma else None),
                lse,
                minus_delta,
                *tma_operand(dq_sum, tile.block_m if fused and use_tma else None),
                dk,
                dv,
                alibi_slopes,
                cu_seqlens_q,
                cu_seqlens_k,
                _strides(q),
                _strides(k),
                _strides(v),
                _strides(dout),
                _strides(dq_sum) if fused else None,
                _strides(dk) if want_dk else None,
                _strides(dv) if want_dv else None,
                alibi_strides,
                *lengths,
                num_tiles,
                num_heads_kv,
                group_size,
                l2_section(q, dout, seqlen_q, 1, num_heads_kv * batch) if causal else 1,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                USE_TMA=use_tma,
                HOIST=may_hoist("fused" if fused else "dkdv", arch, head_dim, head_dim_v),
                WIDE_ROWS=rows_are_wide(max(tile.block_m, tile.block_n), *inputs, *outputs),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **shared,
            )

    if want_dq and not fused:
        tile = config.dq
        num_tiles = tiles_each(seqlen_q, q.shape[-3], batch, tile.block_m)
        num_programs = num_tiles * num_heads * batch
        use_tma = tile.use_tma and tma_ready(k) and tma_ready(v)
        if num_programs > 0:
            launch(
                _flash_bwd_dq_kernel,
                (num_programs,),
                q.device,
                q,
                *tma_operand(k, tile.block_n if use_tma else None),
                *tma_operand(v, tile.block_n if use_tma else None),
                dout,
                lse,
                minus_delta,
                dq,
                alibi_slopes,
                cu_seqlens_q,
                cu_seqlens_k,
                _strides(q),
                _strides(k),
                _strides(v),
                _strides(dout),
                _strides(dq),
                alibi_strides,
                *lengths,
                num_tiles,
                num_heads,
                group_size,
                l2_section(k, v, seqlen_k, group_size, num_heads * batch) if causal else 1,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                USE_TMA=use_tma,
                HOIST=may_hoist("dq", arch, head_dim, head_dim_v),
                WIDE_ROWS=rows_are_wide(max(tile.block_m, tile.block_n), *inputs, *outputs),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **shared,
            )
    if fused:
        torch.mul(dq_sum, softmax_scale, out=dq)
    return dq, dk, dv, dsinks


def _strides(x):
    return Strides(*row_strides(x))


def _minus_delta(dout, dlse, out, lse, cu_seqlens_q, batch, seqlen_q, sinks):
    """-delta = dlse - rowsum(dout * out), fp32 as lse, and the gradient of the sinks where they are given."""
    num_heads, head_dim_v = out.shape[-2:]
    minus_delta = torch.empty_like(lse)
    block_m = 64
    num_tiles = -(-min(seqlen_q, out.shape[-3]) // block_m)
    dsinks = None if sinks is None else lse.new_empty((num_tiles * batch, num_heads))
    num_programs = num_tiles * batch * num_heads
    if num_programs > 0:
        launch(
            _flash_bwd_delta_kernel,
            (num_programs,),
            out.device,
            out,
            dout,
            lse,
            dlse,
            minus_delta,
            sinks,
            dsinks,
            cu_seqlens_q,
            _strides(out),
            _strides(dout),
            *((None, None, None) if dlse is None else lse_strides(dlse)),
            out.shape[-3],
            lse.shape[-1],
            num_tiles,
            num_heads,
            HEAD_DIM_V=head_dim_v,
            BLOCK_M=block_m,
            WIDE_ROWS=rows_are_wide(block_m, out, dout),
            num_warps=4,
        )
    return minus_delta, None if sinks is None else dsinks.sum(0).to(sinks.dtype)
