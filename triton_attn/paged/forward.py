"""Plans and launches of attention over a cache, paged or contiguous: decode, prefill chunks, mixed batches."""

import dataclasses
import math
from typing import NamedTuple

import torch

from .._host.checks import FLOAT8_MANTISSA_BITS, MAX_ROWS, QUANTIZED_BITS, check_rows, largest_of
from .._host.device import arch_of, input_precision, launch
from .._host.gpu import count_sms, gpu_of, repeats_chains
from .._host.key_shard import KeyShard, num_ranks_of
from .._host.layout import (
    Outputs,
    aligned_elements,
    batch_head_strides,
    clear_outputs,
    known_outputs,
    tiles_each,
    vector_elements,
    without_dim,
)
from .._host.prefix_tree import TreeSizes
from .._host.tuned import choose, remember
from .._host.workspace import Memory, only_counts
from .._jit.args import NO_SCALES, Scores, Splits, Strides, View, scales_of, window_of
from .._jit.softmax import LOG2_E
from .._jit.tiles import padded_size
from ..merge.kernel import Plan as MergePlan
from ..merge.kernel import plan_merge
from ..merge.splits import FIXED_KEYS, PROGRAM_RATE, SplitWork, choose_num_splits, fixed_splits, resident_programs
from .configs import PagedCase, PagedConfig, fixed_rows
from .kernel import Tile, _paged_fwd_kernel

ASYNC_BYTES = 4  # that a thread can copy to shared memory while others compute


class Problem(NamedTuple):
    """Everything of a call that the plan of its launches depends on; plans are cached by it."""

    layout: tuple  # (shape, strides) of q, k_cache and v_cache
    strides_out: tuple
    dtype: torch.dtype
    cache_dtype: torch.dtype
    batch: int
    max_seqlen_q: int
    table_width: int | None  # None: a contiguous cache
    num_splits: int
    batch_invariant: bool
    tree: TreeSizes | None
    softmax_scale: float
    window: tuple
    softcap: float | None
    has_alibi: bool
    has_tree_mask: bool
    key_shard: KeyShard | None
    base: int  # up to 16 bytes of which k_cache and v_cache start at multiples
    arch: str
    precision: str  # of fp32 matmuls
    num_sms: int
    config: PagedConfig | None

    @property
    def fold_scale(self):
        """Whether the exponential can apply the scale, since nothing comes between."""
        return self.softcap is None and not self.has_alibi

    @property
    def pack(self):
        """Elements of a key that lie side by side in a packed cache, or 0."""
        shape_k, _ = self.layout[1]
        return shape_k[4] if len(shape_k) == 5 else 0

    @property
    def capacity(self):
        """Keys of the longest sequence that the cache can hold."""
        slots = self.layout[1][0][1]
        return min(slots if self.table_width is None else slots * self.table_width, MAX_ROWS)

    @property
    def capacity_of_all(self):
        """The same of the caches of all ranks."""
        return min(self.capacity * num_ranks_of(self.key_shard), MAX_ROWS)


class Pass(NamedTuple):
    """A launch over the nodes of a tree, or over the keys that no node has."""

    num_programs: int
    num_tiles: int
    num_splits: int
    num_results: int  # of a row
    constants: dict


class Plan(NamedTuple):
    """The launches of a call but for its tensors and the scales of its cache."""

    passes: tuple  # none where there is nothing to compute
    num_splits: int  # of all passes
    strides: tuple  # Strides of q, k_cache, v_cache, and of out or a split of it
    capacity: int  # of all ranks
    scores: Scores  # without ALiBi
    has_nodes: bool  # of a tree


@dataclasses.dataclass(frozen=True, eq=False)  # to compare it takes no time
class Launches:
    """The launches of calls that are alike: they differ in addresses, and in scales that are numbers."""

    target: tuple  # `target_of` the calls
    plan: Plan
    outputs: Outputs
    splits: tuple  # Memory of the splits' results and log-sum-exps; none of one split
    merge: MergePlan | None
    counts: tuple  # of each pass the arguments from num_rows to search_steps, and those from num_nodes to num_splits
    table_stride: int | None
    mask_stride: int  # of tree_mask

    def launch(self, tensors, out, lse, workspace=None):
        """Launch the kernels.

        tensors: q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, alibi_slopes, sinks, tree_mask, k_scale
        and v_scale, which may be numbers, and the memory of a PrefixTree.
        """
        q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, alibi, sinks, tree_mask, *scales, tree = tensors
        plan, outs, lses, split_stride = self.plan, out, lse, 0
        if self.splits:
            outs, lses = [memory.new(q, workspace) for memory in self.splits]
            split_stride = self.splits[0].strides[0]
        if workspace is not None and only_counts(workspace):
            return
        if not plan.passes:
            clear_outputs(out, lse)
            return
        if k_cache.dtype in FLOAT8_MANTISSA_BITS:  # not every GPU has these dtypes
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        strides_q, strides_k, strides_v, strides_out = plan.strides
        operands = View(q, strides_q), View(k_cache, strides_k), View(v_cache, strides_v)
        results = Splits(View(outs, strides_out), split_stride)
        scales, scores, out_factor = _scales_and_scores(plan.scores, alibi, *scales)
        tree = tree if plan.has_nodes else None
        for one, (before, after) in zip(plan.passes, self.counts):
            shared = one.constants["TILE"].SHARED
            args = (
                *operands,
                results,
                lses,
                cache_seqlens,
                block_table,
                self.table_stride,
                cu_seqlens_q,
                tree_mask,
                self.mask_stride,
                None if shared else sinks,  # they count once
                scales,
                scores,
                *before,
                tree,
                *after,
                out_factor,
            )
            launch(_paged_fwd_kernel, (one.num_programs,), q.device, args, one.constants, (self, shared))
        if self.merge is not None:
            self.merge.launch(outs, lses, out, lse, self)


def launch_paged_fwd(call, out, lse, config=None):
    """Launch the kernels of a PagedCall: attention over the nodes of its tree if there is one, over the rest, and the
    merge if there is more than one split. No device-to-host sync. Returns the Launches.

    out is (batch, seqlen_q, num_heads_q, head_dim_v), or (total_q, num_heads_q, head_dim_v) with cu_seqlens_q; lse as
    `flash_attention` returns it, or None: not wanted. config is a PagedConfig (None: the default).
    """
    tensors, options, tree = call[:6], call.options, call.prefix_tree
    more = options.alibi_slopes, options.sinks, options.tree_mask, call.k_scale, call.v_scale
    launches = _launches_of(call, out, config)
    tensors = *tensors, *more, None if tree is None else tree.memory
    launches.launch(tensors, out, lse, call.workspace)
    return launches


def _launches_of(call, out, config):
    q, k_cache, v_cache, cache_seqlens, block_table, *_ = call
    target = target_of(q, k_cache, v_cache)
    plan = _plan(_problem_of(call, out, config, target))
    *batch, num_rows, num_heads, _ = q.shape
    head_dim_v, num_heads_kv, (num_sequences,) = v_cache.shape[3], v_cache.shape[2], cache_seqlens.shape
    splits, merge = (), None
    if plan.num_splits > 1:
        dense = plan.num_splits, *(batch or [1])
        shapes = (*dense, num_rows, num_heads, head_dim_v), (*dense, num_heads, num_rows)
        splits = tuple(Memory.of(shape, torch.float32) for shape in shapes)
        merge = plan_merge(*splits[0][:2], out.stride(), call.batch_invariant)
    num_nodes, num_slots = call.prefix_tree.sizes[:2] if plan.has_nodes else (0, 0)
    search_steps = max(num_sequences, num_nodes).bit_length()
    counts = tuple(
        (
            (num_rows, plan.capacity, num_sequences, one.num_tiles, search_steps),
            (num_nodes, num_slots, num_heads_kv, one.num_splits),
        )
        for one in plan.passes
    )
    table_stride = None if block_table is None else block_table.stride(0)
    tree_mask = call.options.tree_mask
    mask_stride = tree_mask.stride(0) if tree_mask is not None and tree_mask.ndim == 2 else 0
    outputs = known_outputs(q.shape, head_dim_v, q.dtype)
    return Launches(target, plan, outputs, splits, merge, counts, table_stride, mask_stride)


def _scales_and_scores(scores, alibi, k_scale, v_scale):
    """Scales, Scores and a factor of out. A scale that is a number multiplies softmax_scale or out."""
    out_factor = 1.0
    if alibi is not None:
        batch_stride, head_stride = batch_head_strides(alibi)
        scores = scores._replace(alibi=View(alibi, Strides(batch_stride, 0, head_stride)))
    if k_scale is None and v_scale is None:
        return NO_SCALES, scores, out_factor
    if isinstance(k_scale, float):
        scores, k_scale = Scores(scores.scale_log2 * k_scale, *scores[1:]), None
    if isinstance(v_scale, float):
        out_factor, v_scale = v_scale, None
    return scales_of(k_scale, v_scale), scores, out_factor


def target_of(q, k_cache, v_cache):
    """What decides the launches of a call besides the kinds of its arguments: up to 16 bytes of which k_cache and
    v_cache start at multiples, the GPU's architecture and SMs, and the precision of fp32 matmuls."""
    arch, base = arch_of(q), math.gcd(k_cache.data_ptr(), v_cache.data_ptr(), 16)
    return base, arch, input_precision(q.dtype, arch), count_sms(q.device, arch)


def _problem_of(call, out, config, target):
    q, k_cache, _, cache_seqlens, block_table, _, max_seqlen_q, options, layout, *_ = call
    softmax_scale, window, softcap, alibi_slopes, *_ = options
    # By position: keywords take twice as long.
    return Problem(
        layout,
        out.stride(),
        q.dtype,
        k_cache.dtype,
        cache_seqlens.shape[0],
        max_seqlen_q,
        None if block_table is None else block_table.shape[1],
        call.num_splits,
        call.batch_invariant,
        None if call.prefix_tree is None else call.prefix_tree.sizes,
        softmax_scale,
        window,
        softcap,
        alibi_slopes is not None,
        options.tree_mask is not None,
        call.key_shard,
        *target,
        config,
    )


@remember
def _plan(problem):
    """The Plan of a call."""
    (shape_q, _), _, (shape_v, _) = problem.layout
    window = window_of(problem.window, problem.key_shard)
    scores = Scores(problem.softmax_scale * LOG2_E.value, problem.softcap, None, window)
    passes, has_nodes = (), problem.tree is not None and problem.tree.num_slots > 0
    if math.prod(shape_q[:-1]) > 0 and problem.max_seqlen_q > 0 and problem.batch > 0:
        check_rows("q", math.prod(shape_q[:-1]) // shape_v[2])
        passes = tuple(_plan_pass(problem, shared) for shared in ((True, False) if has_nodes else (False,)))
    num_splits = sum(one.num_results for one in passes)
    strides_out = problem.strides_out
    if num_splits > 1:  # splits are contiguous
        rows, heads, dim = *shape_q[-3:-1], shape_v[-1]
        strides_out = (rows * heads * dim, heads * dim, dim, 1)[-len(shape_q) :]
    strides_q, strides_out = (Strides(*without_dim(one)) for one in (problem.layout[0][1], strides_out))
    strides = strides_q, *_cache_strides(problem), strides_out
    return Plan(passes, num_splits, strides, problem.capacity_of_all, scores, has_nodes)


def _cache_strides(problem):
    """Strides of k_cache and v_cache. In a packed cache a page of a head is a contiguous matrix (dim / PACK, slots *
    PACK), of values with a PACK of 1, and rows are those of the matrix."""
    (_, strides_k), (_, strides_v) = problem.layout[1:]
    if problem.pack == 0:
        return Strides(*strides_k[:-1]), Strides(*strides_v[:-1])
    return tuple(Strides(batch, row, head) for batch, _, head, row, *_ in (strides_k, strides_v))


def _plan_pass(problem, shared):
    (shape_q, strides_q), _, (shape_v, _) = problem.layout
    *_, num_heads_q, head_dim = shape_q
    _, slots, num_heads_kv, head_dim_v = shape_v
    group_size = num_heads_q // num_heads_kv
    num_rows = math.prod(shape_q[:-2]) * group_size  # of a KV head
    longest = (problem.tree.longest if shared else problem.max_seqlen_q) * group_size
    is_paged = problem.table_width is not None
    vector_cache = aligned_elements(
        problem.cache_dtype.itemsize, problem.base, *((*one, 1) for one in _cache_strides(problem))
    )
    case = PagedCase(
        arch=problem.arch,
        dtype=problem.dtype,
        cache_dtype=problem.cache_dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        rows=fixed_rows(max(head_dim, head_dim_v)) if problem.batch_invariant else longest,
        loads_vectors=vector_cache * problem.cache_dtype.itemsize >= ASYNC_BYTES,
        is_plain=problem.fold_scale and is_paged,
        seqlen_k=1 if problem.batch_invariant else problem.capacity,
        page_size=slots,
    )
    config = problem.config or choose(PagedConfig, case)
    search = len(shape_q) == 3 and not shared and longest > config.block_m
    if shared:
        check_rows("prefix_tree", problem.tree.num_queries * group_size)
        num_tiles = problem.tree.num_queries * group_size // config.block_m + problem.tree.num_nodes
    elif search:
        num_tiles = num_rows // config.block_m + problem.batch
    else:
        num_tiles = tiles_each(longest, num_rows, problem.batch, config.block_m) * problem.batch
    num_splits, in_turn = problem.num_splits, False
    if shared:
        num_splits = 1
    elif num_splits == 0:
        work = _work_of(problem, case, config, num_tiles * num_heads_kv)
        if problem.batch_invariant:
            num_splits, in_turn = fixed_splits(work, problem.capacity)
        else:
            num_splits = choose_num_splits(work)
    if in_turn:
        num_splits = 1
    mantissa_bits = QUANTIZED_BITS.get(problem.cache_dtype, 0)
    one_page = is_paged and slots % config.block_n == 0
    tile = Tile(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        WIDEST=_widest_piece(case, config),
        PAGE_SIZE=slots if is_paged else 0,
        PACK=problem.pack,
        ONE_PAGE=one_page,
        ALIGN=config.block_n if one_page else math.gcd(config.block_n, slots) if problem.pack else 1,
        SHARED=shared,
        SHARDED=problem.key_shard is not None,
        TREE=problem.has_tree_mask and not shared,
        SEARCH=search,
        FOLD_SCALE=problem.fold_scale,
        SPLIT_KEYS=FIXED_KEYS if problem.batch_invariant else 0,
        FOLD=in_turn,
        MANTISSA_BITS=mantissa_bits,
        V_UNIT=_unit_of(problem.cache_dtype),
        NATIVE_FLOAT8=mantissa_bits in gpu_of(problem.arch).native_fp8,
        CUT_CHAIN=repeats_chains(problem.arch, config.block_m, config.num_warps),
        VECTOR=vector_elements(problem.dtype.itemsize, strides_q),
        VECTOR_CACHE=vector_cache,
        INPUT_PRECISION=problem.precision,
    )
    constants = dict(TILE=tile, num_warps=config.num_warps, num_stages=config.num_stages)
    num_results = problem.tree.num_slots if shared else num_splits
    return Pass(num_tiles * num_splits * num_heads_kv, num_tiles, num_splits, num_results, constants)


def _widest_piece(case, config):
    """Columns of a piece of a tile.

    Where one mma.sync feeds the next, Triton 3.6 to 3.9 place the warps along the rows if no piece has more columns
    than the tile has rows. Otherwise each warp has the queries of all rows in its registers. Tiles with pieces of 256
    columns and fewer rows have few enough.
    """
    width = padded_size(max(case.head_dim, case.head_dim_v))
    by_rows = case.gpu.uses_mma_sync and 64 <= config.block_m < width <= 2 * config.block_m
    return config.block_m if by_rows else 256


def _unit_of(cache_dtype):
    """The power of two by which weights are larger in the matmul with values that have a scale per token.

    Such a scale is the largest of its elements over the largest number of the dtype, so that with this factor a weight
    times its scale is about as large as that element. Without it fp16 has no bits for the weights of small values.
    """
    if cache_dtype not in QUANTIZED_BITS:
        return 1
    return 1 << (int(largest_of(cache_dtype)).bit_length() - 1)


def _work_of(problem, case, config, num_programs):
    """The SplitWork of a pass over the sequences, of which a window shows the last keys."""
    num_keys, left = problem.capacity, problem.window[0]
    if left is not None:
        num_keys = min(num_keys, left + 1 + problem.max_seqlen_q)
    dims = case.head_dim + case.head_dim_v
    (shape_q, _), *_ = problem.layout
    return SplitWork(
        num_programs,
        num_key_tiles=-(-num_keys // config.block_n),
        tile_elements=config.block_n * dims,
        element_size=problem.cache_dtype.itemsize,
        program_rate=PROGRAM_RATE,
        tile_flops=2 * config.block_m * config.block_n * dims,
        num_rows=math.prod(shape_q[:-1]),
        row_elements=case.head_dim_v,
        num_sms=problem.num_sms,
        resident=resident_programs(config.shared_bytes(case), config, case.gpu),
        has_merge=problem.tree is not None,
    )
