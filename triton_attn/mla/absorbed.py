"""Plans and launches of MLA in the absorbed form, for decode and for prefill."""

import math
from typing import NamedTuple

import torch

from .._host.checks import FLOAT8_MANTISSA_BITS, MAX_ROWS, check_rows
from .._host.device import arch_of, input_precision, launch
from .._host.gpu import count_sms, gpu_of, repeats_chains
from .._host.key_shard import KeyShard, num_ranks_of
from .._host.latent import SCALE_BLOCK, latent_layouts, latent_row
from .._host.layout import Layout, clear_outputs, outputs_of, tiles_each, vector_elements, without_dim
from .._host.options import wanted_kernels
from .._host.prefix_tree import TreeSizes
from .._host.tuned import choose, remember
from .._host.workspace import Memory, only_counts
from .._jit.args import Sequences, ShardWindow, Strides, View, Window, scale_of, window_of
from .._jit.rope import rope_of
from .._jit.softmax import LOG2_E
from .._jit.tiles import padded_size, piece_0, piece_1
from ..merge.kernel import Plan as MergePlan
from ..merge.kernel import launch_merge, plan_merge
from ..merge.splits import FIXED_KEYS, MAX_WORKSPACE_BYTES, choose_num_splits, resident_programs
from .absorbed_kernel import AbsorbedTile, _mla_absorbed_kernel
from .api import PREFILL_INPUTS
from .configs import MlaDecodeCase, MlaDecodeConfig, split_work
from .hopper import HopperPlan, launch_mla_decode_hopper, plan_hopper
from .latents import LatentCache, Pages
from .projections import AbsorbPlan, Positions, ProjectPlan, plan_absorb, plan_merge_project

# Columns of a piece of a latent vector. For gfx942 Triton 3.6.0 and 3.9.0 put a whole piece into shared memory, twice
# as much for 512 columns; on NVIDIA GPUs registers change by up to 27 either way, and neither form spills.
WIDEST = 256
# The same in fp32, whose whole pieces do not fit in registers: see _jit/columns.py.
CHUNK = 64


def launch_mla_decode(call, out, lse, config=None):
    """Launch the kernels of a DecodeCall: one, or more with weights, splits or a prefix tree. No device-to-host sync.

    out and lse are those that `mla_decode` returns; lse may be None: not wanted. config is an MlaDecodeConfig or an
    MlaHopperConfig, each for its kernel (None: the default).
    """
    q, q_pe, cache, rope_cache, tree = call.q_nope, call.q_pe, call.latent_cache, call.rope_cache, call.prefix_tree
    arch = arch_of(q)
    plan = _plan_decode(
        call.find_layouts(),
        (q.data_ptr() | q_pe.data_ptr()) % 16 == 0,
        (cache.data_ptr() | (0 if rope_cache is None else rope_cache.data_ptr())) % 16 == 0,
        call.max_seqlen_q,
        call.causal,
        call.rope_interleaved,
        call.k_scale is not None or call.k_pe_scale is not None,
        call.num_splits,
        call.batch_invariant,
        call.key_shard,
        None if tree is None else tree.sizes,
        arch,
        input_precision(q.dtype, arch),
        count_sms(q.device, arch),
        wanted_kernels(),
        config,
    )
    workspace = call.workspace
    if plan is None:
        if not only_counts(workspace):
            clear_outputs(out, lse)
        return
    # The memory of all launches comes before the first one: if the workspace is too small, nothing was launched.
    queries = None if plan.absorb is None else plan.queries.new(q, workspace)
    parts, lse_parts = plan.results(out, lse, workspace)
    if only_counts(workspace):
        return
    scale_log2 = call.softmax_scale * LOG2_E.value
    if plan.absorb is not None:
        rope = rope_of(call.rope_cos, call.rope_sin)
        plan.absorb.launch(q, q_pe, call.w_uk, queries, scale_log2, call.cache_seqlens, rope, plan.alike)
        (q, q_pe), scale_log2 = plan.absorb.parts(queries), 1.0
    sequences = call.cu_seqlens_q, None, call.cache_seqlens, call.block_table
    factors = _factors(call.k_scale, call.k_pe_scale, q_pe.shape[-1])
    tree = None if plan.tree is None else tree.memory
    attention = AbsorbedCall(q, q_pe, cache, rope_cache, *sequences, scale_log2, factors, call.tree_mask, tree)
    _attend(plan, attention, parts, lse_parts, call.w_uv, out, lse)


def launch_mla_absorbed(call, out, lse, heads_each):
    """Launch the kernels of a PrefillCall for heads_each heads at a time, which limits the memory of absorbed queries.

    out and lse are those that `mla_prefill` returns; lse may be None: not wanted.
    """
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, lengths, softmax_scale, causal, _ = call
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, _ = lengths
    num_heads, arch, layouts = w_uk.shape[0], arch_of(q_pe), call.find_layouts()
    aligned = (kv_latent.data_ptr() | k_pe.data_ptr()) % 16 == 0
    target = arch, input_precision(q_pe.dtype, arch), count_sms(q_pe.device, arch)
    for first in range(0, num_heads, heads_each):
        count = min(heads_each, num_heads - first)
        plan = _plan_prefill(layouts, count, aligned, max_seqlen_q, causal, *target)
        if plan is None:
            clear_outputs(out, lse)
            return
        here = q_nope, q_pe, w_uk, w_uv, out, lse
        if count < num_heads:
            here = _heads_of(here, slice(first, first + count))
        q_nope_here, q_pe_here, w_uk_here, w_uv_here, out_here, lse_here = here
        queries = plan.queries.new(q_pe)
        parts, lse_parts = plan.results(out_here, lse_here, None)
        operands = q_nope_here, q_pe_here, w_uk_here, queries
        plan.absorb.launch(*operands, softmax_scale * LOG2_E.value, alike=plan.alike)
        sequences = cu_seqlens_q, cu_seqlens_k, None, None
        attention = AbsorbedCall(*plan.absorb.parts(queries), kv_latent, k_pe, *sequences, 1.0)
        _attend(plan, attention, parts, lse_parts, w_uv_here, out_here, lse_here)


def _heads_of(operands, heads):
    """Some heads of q_nope, q_pe, w_uk, w_uv, out and lse."""
    q_nope, q_pe, w_uk, w_uv, out, lse = operands
    of_rows = [x[..., heads, :] for x in (q_nope, q_pe)]
    return *of_rows, w_uk[heads], w_uv[heads], out[..., heads, :], None if lse is None else lse[..., heads, :]


class AbsorbedCall(NamedTuple):
    """Tensors and factors of attention with absorbed queries (batch, seqlen_q, num_heads, dim), or without batch."""

    q: torch.Tensor
    q_pe: torch.Tensor
    cache: torch.Tensor  # (pages or batch, slots or rows, dim), or (rows, dim)
    rope_cache: torch.Tensor | None  # None: rotary keys follow the latent vectors
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    block_table: torch.Tensor | None
    scale_log2: float
    factors: tuple = (None, None)  # Scales of latent vectors and of rotary keys
    tree_mask: torch.Tensor | None = None
    tree: torch.Tensor | None = None  # memory of a prefix tree


class AbsorbedKey(NamedTuple):
    """Everything of a call that the plan of its attention depends on."""

    layout: tuple  # (shape, strides) of q, q_pe and latent vectors; packed queries and rows have a batch of 1
    layout_scales: tuple | None  # None unless rows have scales of their own
    layout_rope: tuple
    dtype: torch.dtype
    cache_dtype: torch.dtype
    q_aligned: bool  # q and q_pe start at multiples of 16 bytes
    cache_aligned: bool  # latent vectors and rotary keys do
    table_width: int | None  # None: keys are rows of a tensor
    packed: bool
    batch: int
    max_seqlen_q: int
    causal: bool
    has_tree_mask: bool
    joined: bool  # rotary keys follow the latent vectors, in the same dtype
    has_factors: bool
    is_projected: bool  # a launch that multiplies with w_uv follows
    key_shard: KeyShard | None
    tree: TreeSizes | None
    num_splits: int
    batch_invariant: bool
    arch: str
    precision: str  # of fp32 matmuls
    num_sms: int


class AbsorbedPlan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int  # of a split
    num_splits: int
    strides: tuple  # Strides of q and q_pe
    page_strides: LatentCache
    counts: tuple  # seqlen_q, seqlen_k and num_tiles
    window: Window | ShardWindow
    constants: dict
    nodes: tuple | None  # (number of programs, constants) of the launch over a tree's nodes


class CallPlan(NamedTuple):
    """The launches of a call, or of some heads of a prefill, but for their tensors: queries are absorbed if there is
    w_uk, attention stores a result for each split, and these are merged, and projected if there is w_uv."""

    alike: object  # of this plan alone: its launches differ in addresses and floats, and in whether lse is wanted
    attention: AbsorbedPlan | HopperPlan
    absorb: AbsorbPlan | None
    finish: MergePlan | ProjectPlan | None
    queries: Memory | None  # that are absorbed
    parts: Memory | None  # results (places, batch, seqlen_q, num_heads, dim); None: there is one, which is out
    lse_parts: Memory  # (places, batch, num_heads, seqlen_q)
    in_rounds: bool  # fixed splits, see `_merge_in_rounds`
    part_strides: tuple  # from result to result, and the Strides of one
    batch: int
    table_stride: int | None
    mask_stride: int  # of tree_mask
    is_float8: bool  # bytes: not every GPU has the dtypes of fp8
    tree: TreeSizes | None
    key_shard: KeyShard | None

    def results(self, out, lse, workspace):
        """Where attention stores: memory for the results, or out and lse. It always stores lse. Without the store the
        loop is the same, and there would be one more variant."""
        if self.parts is not None:
            return self.parts.new(out, workspace), self.lse_parts.new(out, workspace)
        return out, self.lse_parts.new(out, workspace) if lse is None else lse


def _attend(plan, call, parts, lse_parts, w_uv, out, lse):
    """Attention of an AbsorbedCall, and what follows it."""
    if plan.in_rounds:
        merged = (out, lse) if w_uv is None else (parts[0], lse_parts[0])
        _merge_in_rounds(plan, call, parts, lse_parts, merged)
    elif type(plan.attention) is HopperPlan:
        launch_mla_decode_hopper(plan, call, parts, lse_parts)
    else:
        _launch(plan, call, parts, lse_parts, plan.attention.num_splits)
    alike = plan.alike, lse is None
    if w_uv is not None:
        plan.finish.launch(parts, lse_parts, w_uv, out, lse, alike)
    elif plan.finish is not None:
        plan.finish.launch(parts, lse_parts, out, lse, alike)


def _merge_in_rounds(plan, call, parts, lses, merged):
    """Attention merged over fixed splits, one after the other, into merged, (out, lse).

    The capacity of the cache decides how many splits there are. A round computes those for which parts has room, and
    merges them with the result of the rounds before, which is parts[0].
    """
    each, num_splits = len(parts) - 1, plan.attention.num_splits
    for first in range(0, num_splits, each):
        count = min(each, num_splits - first)
        end = 1 + count
        _launch(plan, call, parts[1:end], lses[1:end], count, first)
        rounds = slice(1 if first == 0 else 0, end)
        target = merged if first + each >= num_splits else (parts[0], lses[0])
        launch_merge(parts[rounds], lses[rounds], *target, in_order=True)


def _launch(plan, call, parts, lse_parts, num_splits, first_split=None):
    """Launch the portable kernel for a tree's nodes, and for num_splits splits from first_split on, if these are
    fixed, otherwise for all."""
    attention, tree, cache, rope_cache = plan.attention, plan.tree, call.cache, call.rope_cache
    if plan.is_float8:
        cache, rope_cache = cache.view(torch.uint8), None if rope_cache is None else rope_cache.view(torch.uint8)
    (of_q, of_q_pe), (split_stride, of_parts), of_pages = attention.strides, plan.part_strides, attention.page_strides
    num_nodes, num_slots = (0, 0) if tree is None else (tree.num_nodes, tree.num_slots)
    args = (
        View(call.q, of_q),
        View(call.q_pe, of_q_pe),
        LatentCache(
            Pages(cache, of_pages.latents),
            None if of_pages.scales is None else Pages(None, of_pages.scales),
            Pages(rope_cache, of_pages.rope_keys),
        ),
        View(parts, of_parts),
        split_stride,
        lse_parts,
        call.cache_seqlens,
        call.block_table,
        plan.table_stride,
        Sequences(call.cu_seqlens_q, call.cu_seqlens_k, None),
        call.tree_mask,
        plan.mask_stride,
        *attention.counts,
        num_splits,
        plan.batch,
        first_split,
        max(plan.batch, num_nodes).bit_length(),
        call.tree,
        num_nodes,
        num_slots,
        call.scale_log2,
        *call.factors,
        attention.window,
    )
    device, alike = call.q.device, (plan.alike, num_splits, first_split)
    if attention.nodes is not None:
        num_programs, constants = attention.nodes
        launch(_mla_absorbed_kernel, (num_programs,), device, args, constants, (alike, "nodes"))
    grid = (attention.num_programs * num_splits,)
    launch(_mla_absorbed_kernel, grid, device, args, attention.constants, alike)


def _factors(k_scale, k_pe_scale, rope_dim):
    """The Scales of the kernel."""
    if k_pe_scale is None or rope_dim == 0:
        return scale_of(k_scale), None
    return scale_of(1.0 if k_scale is None else k_scale), scale_of(k_pe_scale)


@remember
def _plan_decode(
    layouts,
    q_aligned,
    cache_aligned,
    max_seqlen_q,
    causal,
    interleaved,
    has_factors,
    num_splits,
    batch_invariant,
    key_shard,
    tree,
    arch,
    precision,
    num_sms,
    wanted,
    config,
):
    """The CallPlan of a DecodeCall with these Layouts; None if there is no query."""
    q, q_pe, cache, table = layouts.q_nope, layouts.q_pe, layouts.latent_cache, layouts.block_table
    (batch,), packed, w_uk, w_uv = (
        layouts.cache_seqlens.shape,
        layouts.cu_seqlens_q is not None,
        layouts.w_uk,
        layouts.w_uv,
    )
    if math.prod(q.shape) == 0 or batch == 0:
        return None
    rope_dim, tree_mask = q_pe.shape[-1], layouts.tree_mask
    tree = tree if tree is not None and tree.num_slots > 0 else None
    absorb = queries = None
    if w_uk is not None:
        capacity = min(cache.shape[1] * table.shape[1] * num_ranks_of(key_shard), MAX_ROWS)
        cos = layouts.rope_cos
        positions = Positions(capacity, *((0, 0) if cos is None else (cos.shape[0], 2 * cos.shape[1])), interleaved)
        absorb = plan_absorb((q[:2], q_pe[:2], w_uk[:2]), positions, q.dtype, precision, batch_invariant)
        queries, q, q_pe, q_aligned = _absorbed(absorb, q.dtype)
    kv_lora_rank = q.shape[-1]
    if layouts.rope_cache is None:
        of_latents, of_scales, of_rope, rope_start = latent_layouts(*cache, kv_lora_rank, rope_dim)
        cache_aligned = cache_aligned and (rope_dim == 0 or rope_start % 16 == 0)
    else:
        of_latents, of_scales, of_rope = cache[:2], None, layouts.rope_cache[:2]
    key = AbsorbedKey(
        layout=(*(_with_batch(x.shape, x.strides, 4) for x in (q, q_pe)), of_latents),
        layout_scales=of_scales,
        layout_rope=of_rope,
        dtype=q.dtype,
        cache_dtype=cache.dtype,
        q_aligned=q_aligned,
        cache_aligned=cache_aligned,
        table_width=table.shape[1],
        packed=packed,
        batch=batch,
        max_seqlen_q=max_seqlen_q if packed else q.shape[1],
        causal=causal and tree_mask is None,
        has_tree_mask=tree_mask is not None,
        joined=layouts.rope_cache is None and of_scales is None,
        has_factors=has_factors,
        is_projected=w_uv is not None,
        key_shard=key_shard,
        tree=tree,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        arch=arch,
        precision=precision,
        num_sms=num_sms,
    )
    of_out = outputs_of(layouts.q_nope.shape, kv_lora_rank if w_uv is None else w_uv.shape[1], key.dtype).out
    plan = _plan_call(key, _plan(key, wanted, config), w_uv, of_out[1])
    mask_stride = 0 if tree_mask is None or len(tree_mask.shape) == 1 else tree_mask.strides[0]
    return plan._replace(absorb=absorb, queries=queries, table_stride=table.strides[0], mask_stride=mask_stride)


@remember
def _plan_prefill(layouts, num_heads, cache_aligned, max_seqlen_q, causal, arch, precision, num_sms):
    """The CallPlan for num_heads heads of a PrefillCall with these Layouts; None if there is no query."""
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, cu_seqlens_q, _ = layouts.of(PREFILL_INPUTS)
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q_pe.shape[0]
    if math.prod(q_pe.shape) == 0 or batch == 0:
        return None
    whole = outputs_of(q_nope.shape, w_uv.shape[1], q_nope.dtype).out
    q_nope, q_pe = (((*x.shape[:-2], num_heads, x.shape[-1]), x.strides) for x in (q_nope, q_pe))
    w_uk, w_uv = (((num_heads, *x.shape[1:]), x.strides) for x in (w_uk, w_uv))
    absorb = plan_absorb((q_nope, q_pe, w_uk), Positions(0, 0, 0, False), kv_latent.dtype, precision)
    queries, q, q_pe, q_aligned = _absorbed(absorb, kv_latent.dtype)
    key = AbsorbedKey(
        layout=(*(_with_batch(x.shape, x.strides, 4) for x in (q, q_pe)), _with_batch(*kv_latent[:2], 3)),
        layout_scales=None,
        layout_rope=_with_batch(*k_pe[:2], 3),
        dtype=q.dtype,
        cache_dtype=kv_latent.dtype,
        q_aligned=q_aligned,
        cache_aligned=cache_aligned,
        table_width=None,
        packed=packed,
        batch=batch,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        has_tree_mask=False,
        joined=False,
        has_factors=False,
        is_projected=True,
        key_shard=None,
        tree=None,
        num_splits=1,
        batch_invariant=False,
        arch=arch,
        precision=precision,
        num_sms=num_sms,
    )
    plan = _plan_call(key, _plan(key, "portable", None), Layout(*w_uv, key.dtype), whole[1])
    return plan._replace(absorb=absorb, queries=queries)


def _absorbed(absorb, dtype):
    """What an AbsorbPlan stores: its Memory, the Layouts of both parts, and whether these start at multiples of 16
    bytes."""
    queries, rank = Memory.of(absorb.shape, dtype), absorb.kv_lora_rank
    *rows, width = absorb.shape
    q, q_pe = (Layout((*rows, size), queries.strides, dtype) for size in (rank, width - rank))
    return queries, q, q_pe, width == rank or rank * dtype.itemsize % 16 == 0


def _with_batch(shape, strides, ndim):
    """(shape, strides) with a batch of 1 if there is none, as in a packed tensor."""
    return (shape, strides) if len(shape) == ndim else ((1, *shape), (0, *strides))


def _plan_call(key, attention, w_uv, strides_out):
    """The CallPlan but for queries, block_table and tree_mask; w_uv is a Layout, strides_out that of out."""
    shape_q, num_splits = key.layout[0][0], attention.num_splits
    batch, seqlen_q, num_heads, rank = shape_q
    in_rounds = key.batch_invariant and num_splits > 1
    places = num_splits + (0 if key.tree is None else key.tree.num_slots)
    if in_rounds:  # merged results of fixed splits, then as many splits as MAX_WORKSPACE_BYTES hold
        split_bytes = torch.float32.itemsize * (rank + 1) * batch * seqlen_q * num_heads
        places = 1 + max(1, min(num_splits, MAX_WORKSPACE_BYTES // split_bytes))
    parts = finish = None
    if places > 1 or w_uv is not None:
        # A single split is rounded before the projection anyway.
        parts = Memory.of((places, *shape_q), torch.float32 if places > 1 else key.dtype)
    if w_uv is not None:
        shape = (1 if in_rounds else places, *shape_q)
        finish = plan_merge_project(shape, w_uv[:2], strides_out, key.dtype, key.precision, key.batch_invariant)
    elif places > 1 and not in_rounds:
        finish = plan_merge(parts.shape, parts.strides, strides_out)
    split_stride, *strides = (0, *without_dim(strides_out), 1) if parts is None else parts.strides
    return CallPlan(
        object(),
        attention,
        absorb=None,
        finish=finish,
        queries=None,
        parts=parts,
        lse_parts=Memory.of((places, batch, num_heads, seqlen_q), torch.float32),
        in_rounds=in_rounds,
        part_strides=(split_stride, Strides(*strides[:3])),
        batch=key.batch,
        table_stride=None,
        mask_stride=0,
        is_float8=key.cache_dtype in FLOAT8_MANTISSA_BITS,
        tree=key.tree,
        key_shard=key.key_shard,
    )


def _groups(width, widest, pairs, scale_block=0):
    """(first column, columns) of the groups of a row: those that share a scale, chunks, or those of tiles.py."""
    if pairs and scale_block > 0:
        return tuple((start, scale_block) for start in range(0, width, scale_block))
    if widest < padded_size(width) // 2:
        return tuple((start, widest) for start in range(0, width, widest))
    each = 2 if pairs else 1
    first, second = (each * piece(width // each, widest) for piece in (piece_0, piece_1))
    return ((0, first), (first, second)) if second > 0 else ((0, first),)


@remember
def _plan(key, wanted, config):
    """The AbsorbedPlan of a call, or the HopperPlan where hopper.py's kernel supports it and is wanted."""
    has_tree = key.tree is not None or key.has_tree_mask
    portable = has_tree or isinstance(config, MlaDecodeConfig)
    if not portable and (plan := plan_hopper(key, wanted, config)) is not None:
        return plan
    plan = _plan_portable(key, config, None)
    if key.tree is None:
        return plan
    check_rows("prefix_tree", key.tree.num_queries * key.layout[0][0][2])
    of_nodes = _plan_portable(key, config, key.tree)
    return plan._replace(nodes=(of_nodes.num_programs, of_nodes.constants))


def _strides_of_cache(key):
    """LatentCaches of the strides of pages, of the strides of slots, and of the elements that are loaded at a time.

    Latent vectors and rotary keys are loaded 16 bytes at a time if rows and pages of both are multiples of that;
    otherwise the last is None.
    """
    of_latents, has_scales = key.layout[2], key.layout_scales is not None
    has_rope = key.layout_rope[0][-1] > 0  # the strides of empty tensors mean nothing
    cache = of_latents, key.layout_scales, key.layout_rope if has_rope else of_latents
    page_strides, slot_strides = (LatentCache._make([x and x[1][i] for x in cache]) for i in (0, 1))
    sizes = LatentCache(*[key.cache_dtype.itemsize] * 3)
    if has_scales:
        sizes = LatentCache(1, torch.float32.itemsize, torch.bfloat16.itemsize)
    aligned = key.cache_aligned and all(
        stride is None or stride * size % 16 == 0
        for strides in (page_strides, slot_strides)
        for stride, size in zip(strides, sizes)
    )
    vectors = LatentCache(16 // sizes.latents, None, 16 // sizes.rope_keys) if aligned else None
    return page_strides, slot_strides, vectors


def _rope_start(key):
    """Elements of a row before its rotary key, None if another tensor has rotary keys."""
    kv_lora_rank, rope_dim = key.layout[0][0][3], key.layout[1][0][3]
    if key.layout_scales is not None:
        return latent_row(kv_lora_rank, rope_dim)[1]
    return kv_lora_rank if key.joined else None


def _plan_portable(key, config, nodes):
    """The AbsorbedPlan of a launch over the keys of sequences, or of the launch over a tree's nodes, its TreeSizes."""
    (shape_q, strides_q), (shape_pe, strides_pe), of_latents = key.layout
    num_heads, kv_lora_rank = shape_q[2:]
    if shape_pe[3] == 0:  # the strides of empty tensors mean nothing
        strides_pe = strides_q
    is_fp8, has_scales = key.cache_dtype.itemsize == 1, key.layout_scales is not None
    paged = key.table_width is not None
    num_slots = of_latents[0][1]
    page_strides, slot_strides, vectors = _strides_of_cache(key)
    aligned = vectors is not None
    num_rows = (key.max_seqlen_q if nodes is None else nodes.longest) * num_heads
    seqlen_k = min(num_slots * key.table_width, MAX_ROWS) if paged else num_slots  # of the longest sequence, at most
    widths = kv_lora_rank, shape_pe[3]
    tile_rows, longest = (num_heads, 1) if key.batch_invariant else (num_rows, seqlen_k)
    case = MlaDecodeCase(key.arch, key.dtype, *widths, tile_rows, is_fp8, paged, longest, num_slots, has_scales)
    tiles = config or choose(MlaDecodeConfig, case)
    num_tiles = tiles_each(num_rows, shape_q[1] * num_heads, key.batch, tiles.block_m)  # of a sequence
    num_searched = shape_q[1] * num_heads // tiles.block_m + key.batch  # of all
    search = key.packed and paged and num_searched < key.batch * num_tiles
    num_programs = num_searched if search else key.batch * num_tiles
    if nodes is not None:
        search, num_programs = False, nodes.num_queries * num_heads // tiles.block_m + nodes.num_nodes
    one_page = paged and num_slots % tiles.block_n == 0
    cut_chain = repeats_chains(key.arch, tiles.block_m, tiles.num_warps)
    mantissa_bits = FLOAT8_MANTISSA_BITS.get(key.cache_dtype, 3)  # rows with scales are uint8, and e4m3
    # wgmma reads keys from shared memory, where each element has to be decoded anyway.
    pairs = is_fp8 and key.dtype.itemsize == 2 and aligned and tiles.block_m < 64 and kv_lora_rank % 2 == 0
    pairs = pairs and (has_scales or shape_pe[3] % 2 == 0)
    # dot_in_ifs takes two pieces at most.
    in_chunks = key.dtype == torch.float32 and not (is_fp8 or cut_chain or case.gpu.is_amd)
    widest = CHUNK if in_chunks else 512 if cut_chain and one_page else WIDEST
    tile = AbsorbedTile(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        NUM_HEADS=num_heads,
        KV_LORA_RANK=kv_lora_rank,
        GROUPS=_groups(kv_lora_rank, widest, pairs, SCALE_BLOCK if has_scales else 0),
        ROPE_HEAD_DIM=shape_pe[3],
        ROPE_GROUPS=_groups(shape_pe[3], 512, pairs and not has_scales),
        PAGE_SIZE=num_slots if paged else 1,
        ONE_PAGE=one_page,
        PAGES_AHEAD=tiles.num_stages > 2,
        SLOT_STRIDES=slot_strides,
        ROPE_START=_rope_start(key),
        FLOAT8=(mantissa_bits, mantissa_bits in gpu_of(key.arch).native_fp8) if is_fp8 else None,
        SCALE_BLOCK=SCALE_BLOCK if has_scales else 0,
        PAIRS=pairs,
        PAIR_SCALES=pairs and has_scales,
        ROPE_PAIRS=pairs and not has_scales,
        VECTOR=vector_elements(key.dtype.itemsize, strides_q, strides_pe),
        VECTORS=vectors or LatentCache(1, None, 1),
        CUT_CHAIN=cut_chain,
        SHARDED=key.key_shard is not None,
        TREE=key.has_tree_mask and nodes is None,
        SEARCH=search,
        SPLIT_KEYS=FIXED_KEYS if key.batch_invariant else 0,
        SHARED=nodes is not None,
        INPUT_PRECISION=key.precision,
    )
    num_splits = key.num_splits
    if key.batch_invariant:
        num_splits = max(1, -(-seqlen_k // FIXED_KEYS))
    elif num_splits == 0:
        resident = resident_programs(tiles.shared_bytes(case), tiles, case.gpu)
        num_splits = choose_num_splits(split_work(key, tiles.block_m, tiles.block_n, num_programs, seqlen_k, resident))
    return AbsorbedPlan(
        num_programs,
        num_splits,
        (Strides(*strides_q[:3]), Strides(*strides_pe[:3])),
        page_strides,
        (shape_q[1], min(seqlen_k * num_ranks_of(key.key_shard), MAX_ROWS), num_searched if search else num_tiles),
        window_of((None, 0 if key.causal else None), key.key_shard),
        dict(TILE=tile, num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        None,
    )
