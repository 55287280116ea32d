"""The arguments of the forward and backward kernels, and the plan of a launch, which holds all but the tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .._host.call import Call, Problem
from .._host.descriptors import unchecked_descriptor
from .._host.device import arch_of, input_precision
from .._host.gpu import repeats_chains
from .._host.layout import (
    batch_head_strides,
    heads_in_l2,
    strides_are_wide,
    tiles_each,
    vector_elements,
    without_dim,
)
from .._jit.args import Dropout, Heads, Scores, Sequences, Strides, View, Window
from .._jit.softmax import LOG2_E
from .._jit.tiles import HALF
from .tiles import Tile, in_chunks
from .tma import strides_suit_tma, tma_geometry

# Names of arguments whose values must not cause a compilation: lengths, and values computed from them.
LENGTHS = ["seqlen_q", "seqlen_k", "lse_stride", "num_tiles", "section_size"]
WHOLE_SEQUENCES = Sequences(None, None, None)  # of a dense batch


class FlashTile(NamedTuple):
    """What a kernel of flash attention is compiled for: its shape, its config, and how it loads."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    INPUT_PRECISION: str
    USE_TMA: bool
    VECTOR: int  # elements of a load, which divide all strides
    WIDE_ROWS: bool
    HOIST: bool  # see `may_hoist`
    CUT_CHAIN: bool  # see `dot_once`
    CHUNKED: bool  # see `in_chunks`


class CallKey(NamedTuple):
    """Everything of a call that the plans of its kernels depend on; they are cached by it.

    out is the output or, in the backward pass, its gradient.
    """

    problem: Problem
    strides_out: tuple
    max_seqlen_q: int
    max_seqlen_k: int
    has_dropout: bool
    q_aligned: bool  # q and out start at multiples of 16 bytes
    kv_aligned: bool  # k and v do
    arch: str
    precision: str  # of fp32 matmuls

    @property
    def batch(self) -> int:
        problem = self.problem
        return problem.layout[0][0][0] if problem.packed_batch is None else problem.packed_batch

    @property
    def causal(self) -> bool:
        return self.problem.window[1] is not None

    @property
    def is_plain(self) -> bool:
        """Without softcap, ALiBi and dropout."""
        return self.problem.softcap is None and not self.problem.has_alibi and not self.has_dropout

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of queries and keys, and of values."""
        (shape_q, _), _, (shape_v, _) = self.problem.layout
        return shape_q[-1], shape_v[-1]

    @property
    def layouts(self) -> tuple:
        """(shape, strides) of q, k, v and out."""
        *rows, _ = self.problem.layout[0][0]
        return *self.problem.layout, ((*rows, self.head_dims[1]), self.strides_out)

    @property
    def vector(self) -> int:
        return vector_elements(self.problem.dtype.itemsize, *(strides for _, strides in self.layouts))

    def suits_tma(self, *positions: int) -> bool:
        """Whether TMA can address the strides of these of the layouts."""
        layouts = self.layouts
        return all(strides_suit_tma(*layouts[i], self.problem.dtype.itemsize) for i in positions)


def key_of(call: Call, out: torch.Tensor) -> CallKey:
    q, k, v, (_, _, max_seqlen_q, max_seqlen_k), options, problem = call
    arch = arch_of(q)
    # By position: keywords take twice as long.
    return CallKey(
        problem,
        out.stride(),
        max_seqlen_q,
        max_seqlen_k,
        options.dropout_p > 0,
        (q.data_ptr() | out.data_ptr()) % 16 == 0,
        (k.data_ptr() | v.data_ptr()) % 16 == 0,
        arch,
        input_precision(problem.dtype, arch),
    )


class Operand(NamedTuple):
    """How a kernel addresses a tensor: with TMA by the descriptors of a geometry, otherwise by strides."""

    strides: Strides
    geometry: list | None

    def arguments(self, x: torch.Tensor) -> tuple:
        """Three arguments of a kernel: a View; or None and descriptors, one for each piece of the head dimension.

        They are separate arguments, because launchers before Triton 3.8 do not expand descriptors in a tuple.
        """
        if self.geometry is None:
            return View(x, self.strides), None, None
        first = unchecked_descriptor(TensorDescriptor, x, self.geometry[0])
        if len(self.geometry) == 1:
            return None, first, None
        return None, first, unchecked_descriptor(TensorDescriptor, x, self.geometry[1])


class Plan(NamedTuple):
    """A launch of a kernel but for its tensors."""

    num_programs: int
    operands: tuple[Operand | None, ...]  # of q, k, v, out and further outputs
    counts: tuple  # arguments from seqlen_q to heads
    scores: Scores  # without ALiBi
    constants: dict
    alike: object  # of this plan alone, see `alike_of`


def plan_kernel(
    key: CallKey,
    config: Tile,
    use_tma: bool,
    hoist: bool,
    over_keys: bool = False,
    outputs: tuple = (),
    repeats: Callable = repeats_chains,
    halved: tuple[int, ...] = (),
) -> Plan:
    """The Plan of a kernel whose programs take a tile of queries and loop over keys; with over_keys the reverse.

    use_tma: TMA loads the tensors of the loop, k and v or q and out, and adds to the first of outputs. outputs are
    (shape, strides) of what the kernel writes besides out, with strides None for one that is not wanted. repeats
    says for which tiles to cut the chain of matmuls, and halved which of the layouts are then loaded in halves.
    """
    layouts = *key.layouts, *outputs
    all_strides = [strides for _, strides in layouts if strides is not None]
    (shape_q, _), (shape_k, _), *_ = layouts
    head_dim, head_dim_v = key.head_dims
    num_heads_q, num_heads_kv = shape_q[-2], shape_k[-2]
    group_size = num_heads_q // num_heads_kv
    of_q = shape_q[-3], key.max_seqlen_q, config.block_m
    of_k = shape_k[-3], key.max_seqlen_k, config.block_n
    (num_rows, longest, block), (_, longest_walked, block_walked) = (of_k, of_q) if over_keys else (of_q, of_k)
    num_heads, num_sharing = (num_heads_kv, 1) if over_keys else (num_heads_q, group_size)
    chunked = in_chunks(key.problem.dtype, key.head_dims)
    use_tma = use_tma and not chunked  # it would load whole tiles
    by_tma = () if not use_tma else (0, 3, 4) if over_keys else (1, 2)
    # Tiles of narrower heads have more rows.
    cut_chain = not chunked and max(key.head_dims) > HALF.value and repeats(key.arch, block, config.num_warps)
    num_tiles = tiles_each(longest, num_rows, key.batch, block)
    section_size = 1
    if key.causal:
        bytes_per_head = longest_walked * (head_dim + head_dim_v) * key.problem.dtype.itemsize
        section_size = heads_in_l2(bytes_per_head, num_sharing, num_heads * key.batch)
    tile = FlashTile(
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        INPUT_PRECISION=key.precision,
        USE_TMA=use_tma,
        VECTOR=key.vector,
        WIDE_ROWS=strides_are_wide(max(config.block_m, config.block_n), *all_strides),
        HOIST=hoist and not cut_chain,
        CUT_CHAIN=cut_chain,
        CHUNKED=chunked,
    )
    operands = [
        strides
        and Operand(
            Strides(*without_dim(strides)),
            tma_geometry(shape, strides, block_walked, cut_chain and i in halved) if i in by_tma else None,
        )
        for i, (shape, strides) in enumerate(layouts)
    ]
    return Plan(
        num_tiles * num_heads * key.batch,
        tuple(operands),
        (shape_q[-3], shape_k[-3], num_tiles, section_size, Heads(num_heads, group_size)),
        Scores(key.problem.softmax_scale * LOG2_E.value, key.problem.softcap, None, Window(*key.problem.window)),
        dict(TILE=tile, num_warps=config.num_warps, num_stages=config.num_stages),
        object(),
    )


def common_arguments(call: Call, plan: Plan) -> tuple:
    """The last arguments of each kernel before its TILE."""
    (cu_seqlens_q, cu_seqlens_k, *_), options, scores = call.lengths, call.options, plan.scores
    sequences, alibi, dropout = WHOLE_SEQUENCES, options.alibi_slopes, None
    if cu_seqlens_q is not None or options.shard is not None:
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, options.shard)
    if alibi is not None:
        batch_stride, head_stride = batch_head_strides(alibi)
        scores = scores._replace(alibi=View(alibi, Strides(batch_stride, 0, head_stride)))
    if options.dropout_p > 0:
        dropout = Dropout(options.dropout_seed, int(options.dropout_p * 2**31), 1 / (1 - options.dropout_p))
    return sequences, *plan.counts, scores, dropout


def alike_of(call: Call, plan: Plan, lse: torch.Tensor | None) -> tuple:
    """What launches of a plan share that differ in addresses and floats alone: `alike` of `launch`."""
    alibi, sinks, dropout_p = call.options.alibi_slopes, call.options.sinks, call.options.dropout_p
    lse_stride = None if lse is None else lse.shape[-1]
    of_tensors = None if alibi is None else alibi.stride(), None if sinks is None else sinks.dtype
    return plan.alike, lse_stride, dropout_p, *of_tensors
