"""The launcher of the backward pass of dense and varlen attention: which kernels, with which tiles and buffers.

backward_kernels.py says what they compute, and by which two schedules.
"""

from typing import NamedTuple

import torch

from .._host.device import arch_of, input_precision, launch
from .._host.gpu import gpu_of
from .._host.layout import l2_section, lse_strides, row_strides, rows_are_wide, tiles_each, vector_elements
from .._host.tuned import choose
from .._jit.args import Dropout, Heads, Scores, Sequences, Strides, View, Window
from .._jit.workarounds import may_hoist
from .arguments import FlashTile, operand, scores_of
from .backward_configs import BackwardConfig
from .backward_kernels import RowSums, _flash_bwd_delta_kernel, _flash_bwd_dkdv_kernel, _flash_bwd_dq_kernel
from .tiles import FlashCase
from .tma import tma_geometry, tma_ready


class _Problem(NamedTuple):
    """What the kernels of a call share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    sums: RowSums
    seqs: Sequences
    batch: int
    seqlen_q: int  # of the longest sequence
    seqlen_k: int
    scores: Scores
    dropout: Dropout | None
    arch: str
    vector: int

    @property
    def causal(self):
        return self.scores.window.right is not None

    @property
    def lengths(self):
        return self.q.shape[-3], self.k.shape[-3]

    def constants(self, kernel, tiles, use_tma, outputs):
        """Constants of a kernel, "dkdv", "dq" or "fused", with tiles (a FlashConfig) and outputs."""
        head_dims = self.q.shape[-1], self.v.shape[-1]
        inputs = self.q, self.k, self.v, self.dout
        tile = FlashTile(
            *head_dims,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            INPUT_PRECISION=input_precision(self.q.dtype, self.arch),
            USE_TMA=use_tma,
            VECTOR=self.vector,
            WIDE_ROWS=rows_are_wide(max(tiles.block_m, tiles.block_n), *inputs, *outputs),
            HOIST=may_hoist(kernel, gpu_of(self.arch).multiplies_shared_memory, *head_dims),
        )
        return dict(TILE=tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


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
    like_inputs=False,
):
    """Gradients of q, k, v and the sinks, None where not wanted. No device-to-host sync.

    dout is as out; dlse as lse, or None. like_inputs: gradients have the strides of torch.empty_like of their inputs,
    and not those of contiguous tensors. The rest as in launch_flash_fwd. Memory: the gradients, delta (fp32, as lse),
    and in the fused schedule dq in fp32.
    """
    want_dq, want_dk, want_dv, want_dsinks = wanted
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    sinks = options.sinks if want_dsinks else None
    minus_delta, dsinks = _minus_delta(dout, dlse, out, lse, cu_seqlens_q, batch, seqlen_q, sinks)
    problem = _Problem(
        q,
        k,
        v,
        dout,
        RowSums(lse, minus_delta),
        Sequences(cu_seqlens_q, cu_seqlens_k),
        batch,
        seqlen_q,
        seqlen_k,
        scores_of(options, Window(*options.window)),
        None if options.dropout is None else Dropout(*options.dropout),
        arch_of(q),
        vector_elements(q.element_size(), *(x.stride() for x in (q, k, v, dout))),
    )
    config = config or _choose_config(problem)
    fused = want_dq and (want_dk or want_dv) and config.fused is not None and not deterministic

    layout = torch.preserve_format if like_inputs else torch.contiguous_format
    dk = torch.empty_like(k, memory_format=layout) if want_dk else None
    dv = torch.empty_like(v, memory_format=layout) if want_dv else None
    dq_sum = torch.zeros_like(q, dtype=torch.float32, memory_format=layout) if fused else None
    dq = None
    if want_dq:
        dq = dq_sum if fused and q.dtype == torch.float32 else torch.empty_like(q, memory_format=layout)
    if packed and batch == 0:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
    if want_dk or want_dv:
        _launch_dkdv(problem, config.fused if fused else config.dkdv, dq_sum, dk, dv)
    if fused:
        torch.mul(dq_sum, options.softmax_scale, out=dq)
    elif want_dq:
        _launch_dq(problem, config.dq, dq)
    return dq, dk, dv, dsinks


def _choose_config(problem):
    """The BackwardConfig of a call that brings none."""
    inputs = problem.q, problem.k, problem.v, problem.dout
    scalar = problem.vector == 1 or any(x.data_ptr() % 16 for x in inputs)
    access = "scalar" if scalar else "tma" if all(map(tma_ready, inputs)) else "vector"
    scores = problem.scores
    plain = scores.softcap is None and scores.alibi is None and problem.dropout is None
    head_dims = problem.q.shape[-1], problem.v.shape[-1]
    shape = problem.q.dtype, *head_dims, problem.causal, access
    return choose(BackwardConfig, FlashCase(problem.arch, *shape, is_plain=plain, seqlen_k=problem.seqlen_k))


def _launch_dkdv(problem, tiles, dq_sum, dk, dv):
    """dk and dv, None: not wanted; and with dq_sum, fp32 and 0, the fused schedule, which adds dq / softmax_scale."""
    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    *_, num_rows, num_heads_kv, _ = k.shape
    num_heads = num_heads_kv * problem.batch
    num_tiles = tiles_each(problem.seqlen_k, num_rows, problem.batch, tiles.block_n)
    if num_tiles * num_heads == 0:
        return
    use_tma = tiles.use_tma and tma_ready(q) and tma_ready(dout) and (dq_sum is None or tma_ready(dq_sum))
    outputs = [x for x in (dq_sum, dk, dv) if x is not None]
    launch(
        _flash_bwd_dkdv_kernel,
        (num_tiles * num_heads,),
        q.device,
        *_operand(q, tiles.block_m if use_tma else None),
        _view(k),
        _view(v),
        *_operand(dout, tiles.block_m if use_tma else None),
        problem.sums,
        problem.sums.lse_ptr.shape[-1],
        *((None, None, None) if dq_sum is None else _operand(dq_sum, tiles.block_m if use_tma else None)),
        None if dk is None else _view(dk),
        None if dv is None else _view(dv),
        problem.seqs,
        *problem.lengths,
        num_tiles,
        l2_section(q, dout, problem.seqlen_q, 1, num_heads) if problem.causal else 1,
        Heads(num_heads_kv, q.shape[-2] // num_heads_kv),
        problem.scores,
        problem.dropout,
        **problem.constants("dkdv" if dq_sum is None else "fused", tiles, use_tma, outputs),
    )


def _launch_dq(problem, tiles, dq):
    q, k, v = problem.q, problem.k, problem.v
    *_, num_rows, num_heads_q, _ = q.shape
    num_heads = num_heads_q * problem.batch
    group_size = num_heads_q // k.shape[-2]
    num_tiles = tiles_each(problem.seqlen_q, num_rows, problem.batch, tiles.block_m)
    if num_tiles * num_heads == 0:
        return
    use_tma = tiles.use_tma and tma_ready(k) and tma_ready(v)
    launch(
        _flash_bwd_dq_kernel,
        (num_tiles * num_heads,),
        q.device,
        _view(q),
        *_operand(k, tiles.block_n if use_tma else None),
        *_operand(v, tiles.block_n if use_tma else None),
        _view(problem.dout),
        problem.sums,
        problem.sums.lse_ptr.shape[-1],
        _view(dq),
        problem.seqs,
        *problem.lengths,
        num_tiles,
        l2_section(k, v, problem.seqlen_k, group_size, num_heads) if problem.causal else 1,
        Heads(num_heads_q, group_size),
        problem.scores,
        problem.dropout,
        **problem.constants("dq", tiles, use_tma, [dq]),
    )


def _view(x):
    return View(x, Strides(*row_strides(x)))


def _operand(x, block_rows):
    """`operand` of a tensor that is tma_ready, in tiles of block_rows; None: a View."""
    geometry = None if block_rows is None else tma_geometry(x.shape, x.stride(), block_rows)
    return operand(x, Strides(*row_strides(x)), geometry)


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
            _view(out),
            _view(dout),
            RowSums(lse, minus_delta),
            lse.shape[-1],
            dlse,
            *((None, None, None) if dlse is None else lse_strides(dlse)),
            sinks,
            dsinks,
            cu_seqlens_q,
            out.shape[-3],
            num_tiles,
            num_heads,
            HEAD_DIM_V=head_dim_v,
            BLOCK_M=block_m,
            WIDE_ROWS=rows_are_wide(block_m, out, dout),
            num_warps=4,
        )
    return minus_delta, None if sinks is None else dsinks.sum(0).to(sinks.dtype)
