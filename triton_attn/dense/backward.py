"""Launch the backward pass of dense and varlen attention: choose the kernels, their tiles and buffers.

backward_kernels.py describes what they compute, and the two schedules.
"""

from typing import NamedTuple

import torch

from .._host.call import Call
from .._host.device import launch
from .._host.gpu import gpu_of, repeats_rows
from .._host.layout import lse_strides, strides_are_wide, vector_elements
from .._host.tuned import choose, remember
from .._jit.args import View, view_of
from .._jit.workarounds import may_hoist
from .arguments import CallKey, alike_of, common_arguments, key_of, plan_kernel
from .backward_configs import BackwardConfig, dk_apart_from_dv
from .backward_kernels import RowSums, _flash_bwd_delta_kernel, _flash_bwd_dkdv_kernel, _flash_bwd_dq_kernel
from .tiles import CHUNK, FlashCase, in_chunks, padded_head_dim
from .tma import strides_suit_tma


class _Problem(NamedTuple):
    """What the kernels of a call share."""

    key: CallKey
    call: Call
    dout: torch.Tensor
    sums: RowSums


def launch_flash_bwd(
    call, dout, dlse, out, lse, wanted=(True, True, True, True), deterministic=False, config=None, like_inputs=False
):
    """Gradients of q, k, v and the sinks of a Call, None where not wanted. No device-to-host sync.

    dout is as out; dlse as lse, or None. config is a BackwardConfig (None: the default). like_inputs: gradients have
    the strides of torch.empty_like of their inputs, and not those of contiguous tensors. The rest as in
    launch_flash_fwd. Memory: the gradients, delta (fp32, as lse), and in the fused schedule dq in fp32.
    """
    sinks = call.options.sinks if wanted[3] else None
    minus_delta, dsinks = launch_row_sums(dout, dlse, out, lse, call.lengths, sinks)
    sums = lse, minus_delta
    return *launch_flash_bwd_of_sums(call, dout, sums, wanted[:3], deterministic, config, like_inputs), dsinks


def launch_flash_bwd_of_sums(call, dout, sums, wanted, deterministic=False, config=None, like_inputs=False):
    """Gradients of q, k and v, as `launch_flash_bwd`, from sums: lse, and -delta of `launch_row_sums`."""
    q, k, v, lengths, options, _ = call
    want_dq, want_dk, want_dv = wanted
    key = key_of(call, dout)
    config = config or _config_of(key)
    has_factor = options.softcap is not None or options.dropout_p > 0
    apart, may_fuse = _schedule(key.arch, q.dtype, key.head_dims, config.dkdv, has_factor)
    fused = want_dq and (want_dk or want_dv) and config.fused is not None and may_fuse and not deterministic

    layout = torch.preserve_format if like_inputs else torch.contiguous_format
    dk = torch.empty_like(k, memory_format=layout) if want_dk else None
    dv = torch.empty_like(v, memory_format=layout) if want_dv else None
    dq_sum = torch.zeros_like(q, dtype=torch.float32, memory_format=layout) if fused else None
    dq = None
    if want_dq:
        dq = dq_sum if fused and q.dtype == torch.float32 else torch.empty_like(q, memory_format=layout)
    if lengths.batch(q) == 0:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
    problem = _Problem(key, call, dout, RowSums(*sums))
    for outputs in ((dk, None), (None, dv)) if apart else ((dk, dv),):
        if any(x is not None for x in outputs):
            _launch_dkdv(problem, config.fused if fused else config.dkdv, dq_sum, *outputs)
    if fused:
        torch.mul(dq_sum, options.softmax_scale, out=dq)
    elif want_dq:
        _launch_dq(problem, config.dq, dq)
    return dq, dk, dv


@remember
def _schedule(arch, dtype, head_dims, tile, has_factor):
    """(whether dk and dv have a launch each, whether a launch may compute dq with them)."""
    apart = dk_apart_from_dv(arch, head_dims, tile, has_factor)
    return apart, not apart and not in_chunks(dtype, head_dims)


@remember
def _config_of(key):
    """The BackwardConfig of a call."""
    aligned = key.q_aligned and key.kv_aligned
    access = "scalar" if key.vector == 1 or not aligned else "tma" if key.suits_tma(0, 1, 2, 3) else "vector"
    shape = key.problem.dtype, *key.head_dims, key.causal, access
    softcap, dropout = key.problem.softcap is not None, key.has_dropout
    case = FlashCase(key.arch, *shape, "ieee", softcap, dropout, key.is_plain, key.max_seqlen_k)
    return choose(BackwardConfig, case)


def _launch_dkdv(problem, tiles, dq_sum, dk, dv):
    """dk and dv, None: not wanted; and with dq_sum, fp32 and 0, the fused schedule, which adds dq / softmax_scale."""
    key, call, dout, sums = problem
    plan = _plan_dkdv(key, tiles, *[None if x is None else x.stride() for x in (dq_sum, dk, dv)])
    if plan.num_programs == 0:
        return
    of_q, of_k, of_v, of_dout, of_dq, of_dk, of_dv = plan.operands
    args = (
        *of_q.arguments(call.q),
        View(call.k, of_k.strides),
        View(call.v, of_v.strides),
        *of_dout.arguments(dout),
        sums,
        sums.lse_ptr.shape[-1],
        *((None, None, None) if dq_sum is None else of_dq.arguments(dq_sum)),
        None if dk is None else View(dk, of_dk.strides),
        None if dv is None else View(dv, of_dv.strides),
        *common_arguments(call, plan),
    )
    alike = alike_of(call, plan, sums.lse_ptr)
    launch(_flash_bwd_dkdv_kernel, (plan.num_programs,), dout.device, args, plan.constants, alike)


@remember
def _plan_dkdv(key, tiles, dq_sum, dk, dv):
    """The Plan of a launch; dq_sum, dk and dv are their strides, or None."""
    fused = dq_sum is not None
    (shape_q, _), (shape_k, _), (shape_v, _) = key.problem.layout
    use_tma = tiles.use_tma and key.q_aligned and key.suits_tma(0, 3)
    use_tma = use_tma and (not fused or strides_suit_tma(shape_q, dq_sum, torch.float32.itemsize))
    hoist = _may_hoist(key, "fused" if fused else "dkdv", tiles.block_n)
    outputs = (shape_q, dq_sum), (shape_k, dk), (shape_v, dv)
    return plan_kernel(
        key,
        tiles,
        use_tma,
        hoist,
        over_keys=True,
        outputs=outputs,
        repeats=repeats_rows,
        halved=(0, 3) if dv is None else (),
    )


def _may_hoist(key, kernel, rows):
    """As `may_hoist`. With tf32x3, chunks of the rows that stay are split once where shared memory holds both parts.
    Other chunks are loaded again at each tile, which leaves registers and shared memory for a second program."""
    gpu = gpu_of(key.arch)
    if in_chunks(key.problem.dtype, key.head_dims):
        columns = sum(map(padded_head_dim, key.head_dims))
        lacks = gpu.lacks((2 * columns + CHUNK) * rows * torch.float32.itemsize)
        return key.precision == "tf32x3" and lacks is None
    return may_hoist(kernel, gpu.multiplies_shared_memory, *key.head_dims)


def _launch_dq(problem, tiles, dq):
    key, call, dout, sums = problem
    plan = _plan_dq(key, tiles, dq.stride())
    if plan.num_programs == 0:
        return
    of_q, of_k, of_v, of_dout, of_dq = plan.operands
    args = (
        View(call.q, of_q.strides),
        *of_k.arguments(call.k),
        *of_v.arguments(call.v),
        View(dout, of_dout.strides),
        sums,
        sums.lse_ptr.shape[-1],
        View(dq, of_dq.strides),
        *common_arguments(call, plan),
    )
    alike = alike_of(call, plan, sums.lse_ptr)
    launch(_flash_bwd_dq_kernel, (plan.num_programs,), dout.device, args, plan.constants, alike)


@remember
def _plan_dq(key, tiles, dq):
    """The Plan of a launch; dq is its strides."""
    use_tma = tiles.use_tma and key.kv_aligned and key.suits_tma(1, 2)
    hoist = _may_hoist(key, "dq", tiles.block_m)
    return plan_kernel(
        key, tiles, use_tma, hoist, outputs=((key.problem.layout[0][0], dq),), repeats=repeats_rows, halved=(1, 2)
    )


def launch_row_sums(dout, dlse, out, lse, lengths, sinks):
    """-delta = dlse - rowsum(dout * out), fp32 as lse, and the gradient of the sinks where they are given."""
    batch = lengths.batch(out)
    num_heads, head_dim_v = out.shape[-2:]
    minus_delta = torch.empty_like(lse)
    constants = _constants_of_row_sums(out.dtype, head_dim_v, out.stride(), dout.stride())
    num_tiles = -(-min(lengths.max_seqlen_q, out.shape[-3]) // constants["BLOCK_M"])
    dsinks = None if sinks is None else lse.new_empty((num_tiles * batch, num_heads))
    num_programs = num_tiles * batch * num_heads
    if num_programs > 0:
        args = (
            view_of(out),
            view_of(dout),
            RowSums(lse, minus_delta),
            lse.shape[-1],
            dlse,
            *((None, None, None) if dlse is None else lse_strides(dlse)),
            sinks,
            dsinks,
            lengths.cu_seqlens_q,
            out.shape[-3],
            num_tiles,
            num_heads,
        )
        launch(_flash_bwd_delta_kernel, (num_programs,), out.device, args, constants)
    return minus_delta, None if sinks is None else dsinks.sum(0).to(sinks.dtype)


@remember
def _constants_of_row_sums(dtype, head_dim, *strides):
    """Of the kernel for out and dout with these strides, whose rows are in registers as a whole."""
    block_m = 64 if head_dim * dtype.itemsize <= 1024 else 32
    vector, wide_rows = vector_elements(dtype.itemsize, *strides), strides_are_wide(block_m, *strides)
    return dict(HEAD_DIM_V=head_dim, BLOCK_M=block_m, VECTOR=vector, WIDE_ROWS=wide_rows, num_warps=4)
