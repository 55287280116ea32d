"""Decode kernel for Hopper (sm_90) in Gluon, and its launcher: two groups of warps take turns at the tiles of keys.

The output of 64 rows, 512 numbers each, fills the registers of two groups of four warps: each has half of the columns,
and both need the weights of all keys. In plain Triton both make all scores together, step by step. Here a group makes
scores and weights of every second tile and hands the weights over through shared memory: while one group is at its
softmax the other multiplies. A warp loads pages by TMA, each key once, as keys and as values. After FlashMLA's "seesaw"
schedule (2025), https://github.com/deepseek-ai/FlashMLA.

Serves fp16 and bf16 in paged caches of 512 + 64 numbers, pages of a multiple of 64 keys, heads in multiples of 64. All
else is the portable kernel's (absorbed.py), which computes the same. Gluon has no interpreter.
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate  # triton.aggregate, once 3.6 need not be served

from .._host.descriptors import unchecked_descriptor
from .._host.device import launch_packed
from .._host.layout import INDICES, LSE, capacity_of, strides_suit_tma
from .._host.tuned import remember
from .._jit.softmax import LN_2
from .._jit.tiles import PACKED_END
from ..merge.splits import choose_num_splits
from .configs import MlaDecodeCase, MlaHopperConfig

# Renamed in Triton 3.8.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

ROWS: gl.constexpr = gl.constexpr(64)  # heads of a query that one program takes
BLOCK_N: gl.constexpr = gl.constexpr(64)
HALF: gl.constexpr = gl.constexpr(256)  # of a latent vector: the columns of a group
ROPE: gl.constexpr = gl.constexpr(64)
MINUS_INF: gl.constexpr = gl.constexpr(float("-inf"))


@aggregate
class _Work:
    """What one program computes: 64 heads of a query, from `head` on, over one split of the keys: num_tiles tiles, of
    which the last ends with key `end`. A split without keys has one tile, of none."""

    batch: gl.tensor
    query: gl.tensor
    head: gl.tensor
    split: gl.tensor
    start: gl.tensor
    end: gl.tensor
    num_tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, query, head, split, start, end, num_tiles):
        self.batch = batch
        self.query = query
        self.head = head
        self.split = split
        self.start = start
        self.end = end
        self.num_tiles = num_tiles


@aggregate
class _Shared:
    """Tiles in shared memory: queries and, for each stage, keys in three pieces, of which the first two are the values
    of group 0 and 1; weights and row maxima of the last tile; row sums of each group. Barriers say that a piece is
    there (full) and that it was read (free), that a group's weights are there, and its sums."""

    q_0: gl.shared_memory_descriptor
    q_1: gl.shared_memory_descriptor
    q_pe: gl.shared_memory_descriptor
    k_0: gl.shared_memory_descriptor
    k_1: gl.shared_memory_descriptor
    k_pe: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    maxima: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    full_0: gl.shared_memory_descriptor
    full_1: gl.shared_memory_descriptor
    full_pe: gl.shared_memory_descriptor
    free_0: gl.shared_memory_descriptor
    free_1: gl.shared_memory_descriptor
    free_pe: gl.shared_memory_descriptor
    weights_full: gl.shared_memory_descriptor
    sums_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self,
        q_0,
        q_1,
        q_pe,
        k_0,
        k_1,
        k_pe,
        weights,
        maxima,
        sums,
        q_full,
        full_0,
        full_1,
        full_pe,
        free_0,
        free_1,
        free_pe,
        weights_full,
        sums_full,
    ):
        self.q_0 = q_0
        self.q_1 = q_1
        self.q_pe = q_pe
        self.k_0 = k_0
        self.k_1 = k_1
        self.k_pe = k_pe
        self.weights = weights
        self.maxima = maxima
        self.sums = sums
        self.q_full = q_full
        self.full_0 = full_0
        self.full_1 = full_1
        self.full_pe = full_pe
        self.free_0 = free_0
        self.free_1 = free_1
        self.free_pe = free_pe
        self.weights_full = weights_full
        self.sums_full = sums_full


@gluon.jit
def _barriers(NUM: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _matrix(tiles, i):
    """Tile i of (tiles, 1, ..., rows, columns) as a matrix."""
    RANK: gl.constexpr = len(tiles.shape)
    return tiles.index(i).reshape([tiles.shape[RANK - 2], tiles.shape[RANK - 1]])


@gluon.jit
def _stage(step):
    """Where the tile of a step lies, and the parity of its barriers then; of weights, whose group is the stage, too."""
    return step & 1, (step >> 1) & 1


@gluon.jit
def _load(desc, coords, full, buffer):
    mbarrier.expect(full, desc.block_type.nbytes)
    _tma_load(desc, coords, full, buffer)


@gluon.jit
def _load_tiles(work, shared, q_desc, q_pe_desc, latent_desc, rope_desc, block_table_ptr, table_stride, PAGE_SIZE):
    """The warps that load: queries, then keys. Slots past the end may hold anything, NaN too: TMA gives zeros."""
    q_full = shared.q_full.index(0)
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes + q_pe_desc.block_type.nbytes)
    _tma_load(q_desc, [work.batch, work.query, work.head, 0], q_full, shared.q_0.index(0))
    _tma_load(q_desc, [work.batch, work.query, work.head, HALF], q_full, shared.q_1.index(0))
    _tma_load(q_pe_desc, [work.batch, work.query, work.head, 0], q_full, shared.q_pe.index(0))
    block_table_ptr += work.batch.to(gl.int64) * table_stride
    # Without keys no page: the table may have no entry. Elsewhere a step ahead, as the load takes its time.
    page = gl.load(block_table_ptr + work.start // PAGE_SIZE, mask=work.start < work.end, other=0)
    last = work.start + (work.num_tiles - 1) * BLOCK_N
    for step in range(work.num_tiles):
        start = work.start + step * BLOCK_N
        following = gl.minimum(start + BLOCK_N, last)
        following = gl.load(block_table_ptr + following // PAGE_SIZE, mask=following < work.end, other=0)
        stage, parity = _stage(step)
        count = gl.minimum(work.end - start, BLOCK_N)
        slot = start % PAGE_SIZE + count
        row = -count + PACKED_END  # in this order: Triton 3.6 cannot subtract from a constant
        mbarrier.wait(shared.free_0.index(stage), parity ^ 1)
        _load(latent_desc, [PACKED_END, page, slot, row, 0], shared.full_0.index(stage), shared.k_0.index(stage))
        mbarrier.wait(shared.free_1.index(stage), parity ^ 1)
        _load(latent_desc, [PACKED_END, page, slot, row, HALF], shared.full_1.index(stage), shared.k_1.index(stage))
        mbarrier.wait(shared.free_pe.index(stage), parity ^ 1)
        _load(rope_desc, [PACKED_END, page, slot, row, 0], shared.full_pe.index(stage), shared.k_pe.index(stage))
        page = following


@gluon.jit
def _by_thread(x):
    """(rows, columns) as (rows, j, t, e), column 8 j + 2 t + e: in a product's result a thread has one t of a row."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _mask_columns(s, count):
    """-inf from column `count` on: numbers that all threads share against a limit of the thread's own. As columns of
    the thread's own they would be held in registers through the loop."""
    x = _by_thread(s)
    j = gl.arange(0, x.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, x.type.layout)))) * 8
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout)))) * 2
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout))))
    j = gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 2), 3)
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 3)
    e = gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 0), 1), 2)
    visible = gl.where(j + e < count - t, x, MINUS_INF)
    return gl.convert_layout(visible.reshape(s.shape), s.type.layout)


@gluon.jit
def _partial_sums(p):
    """Of each row one for each of the four threads that hold it: they are added up at the end alone."""
    return gl.sum(gl.sum(_by_thread(p), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _shift(m):
    """What to subtract for a maximum of -inf, that of a row which saw nothing yet, too."""
    return gl.where(m == MINUS_INF, 0.0, m)


@gluon.jit
def _issue_scores(shared, step, zeros):
    stage, parity = _stage(step)
    # 0, which the compiler must not know: it would hold the addresses of all parts of q in registers that it spills.
    zero = gl.inline_asm_elementwise("shr.u32 $0, $1, 31;", "=r,r", [step], dtype=gl.int32, is_pure=False, pack=1)
    q_0 = _matrix(shared.q_0, zero)
    q_1 = _matrix(shared.q_1, zero)
    mbarrier.wait(shared.full_0.index(stage), parity)
    s = warpgroup_mma(q_0, _matrix(shared.k_0, stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(shared.full_1.index(stage), parity)
    s = warpgroup_mma(q_1, _matrix(shared.k_1, stage).permute([1, 0]), s, is_async=True)
    mbarrier.wait(shared.full_pe.index(stage), parity)
    q_pe = _matrix(shared.q_pe, zero)
    return warpgroup_mma(q_pe, _matrix(shared.k_pe, stage).permute([1, 0]), s, is_async=True)


@gluon.jit
def _issue_output_of_other(GROUP: gl.constexpr, shared, values, full, step, m_i, l_i, acc):
    """The other group's tile: its weights, and what its maximum does to the sums."""
    # Step -1 has weights of 0, for values that are there; its barrier counts as passed.
    stage, parity = _stage(gl.maximum(step, 0))
    mbarrier.wait(full.index(stage), parity)
    _, parity = _stage(step)
    mbarrier.wait(shared.weights_full.index(1 - GROUP), parity)
    m_new = shared.maxima.load(m_i.type.layout)
    alpha = gl.exp2(m_i - _shift(m_new))
    acc = warpgroup_mma(shared.weights, _matrix(values, stage), _scale_rows(acc, alpha), is_async=True)
    return m_new, _scale_rows(l_i, alpha), acc


@gluon.jit
def _step(GROUP: gl.constexpr, work, shared, values, full, free, step, m_i, l_i, acc, zeros, scale_log2):
    """Output of the other group's tile, the one before; then scores, weights and output of one's own.

    The weights' one buffer is free to write once that output is there."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    stage, _ = _stage(step)
    m_i, l_i, output = _issue_output_of_other(GROUP, shared, values, full, step - 1, m_i, l_i, acc)
    scores = _issue_scores(shared, step, zeros)
    acc = warpgroup_mma_wait(1, [output])
    mbarrier.arrive(free.index(stage ^ 1), count=1, pred=step > 0)
    s = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(shared.free_pe.index(stage), count=1)
    count = work.end - (work.start + step * BLOCK_N)
    if count < BLOCK_N:
        s = _mask_columns(s, count)
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    alpha = gl.exp2(m_i - _shift(m_new))
    weights = gl.exp2(s * scale_log2 - gl.expand_dims(_shift(m_new), 1))
    l_i = _scale_rows(l_i, alpha) + _partial_sums(weights)
    weights = weights.to(shared.weights.dtype)
    p = gl.convert_layout(weights, P_LAYOUT)
    shared.weights.store(weights)
    shared.maxima.store(m_new)
    fence_async_shared()
    mbarrier.arrive(shared.weights_full.index(GROUP), count=1)
    output = warpgroup_mma(p, _matrix(values, stage), _scale_rows(acc, alpha), is_async=True)
    acc, p = warpgroup_mma_wait(0, [output, p])
    # The other group's scores, of which these weights came, were read before.
    mbarrier.arrive(free.index(stage), count=1)
    return m_new, l_i, acc


@gluon.jit
def _attend(GROUP: gl.constexpr, work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2):
    """A group of four warps: 64 rows of out, half of the columns; group 0 the log-sum-exp too."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    if GROUP == 0:
        values = shared.k_0
        full = shared.full_0
        free = shared.free_0
    else:
        values = shared.k_1
        full = shared.full_1
        free = shared.free_1
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    acc = gl.zeros([ROWS, HALF], gl.float32, OUTPUT)
    m_i = gl.full([ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, SCORES))
    l_i = _partial_sums(zeros)
    mbarrier.wait(shared.q_full.index(0), 0)
    # Hidden from the compiler: where ptxas knows that the loop runs it waits for scores before it scales the output.
    num_tiles = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [work.num_tiles], dtype=gl.int32, is_pure=False, pack=1
    )
    for step in range(GROUP, num_tiles, 2):
        m_i, l_i, acc = _step(GROUP, work, shared, values, full, free, step, m_i, l_i, acc, zeros, scale_log2)
    if (num_tiles - 1) % 2 != GROUP:
        m_i, l_i, acc = _issue_output_of_other(GROUP, shared, values, full, num_tiles - 1, m_i, l_i, acc)
        acc = warpgroup_mma_wait(0, [acc])

    total = gl.convert_layout(gl.sum(l_i, 1), m_i.type.layout)
    shared.sums.index(GROUP).store(total)
    mbarrier.arrive(shared.sums_full.index(GROUP), count=1)
    mbarrier.wait(shared.sums_full.index(1 - GROUP), 0)
    total += shared.sums.index(1 - GROUP).load(m_i.type.layout)
    total = gl.where(total == 0.0, 1.0, total)  # of a row without keys, whose maximum is -inf
    rows = work.head + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    columns = GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(0, OUTPUT))
    out_ptr += work.split.to(gl.int64) * out_strides[0] + work.batch.to(gl.int64) * out_strides[1]
    out_ptr += work.query.to(gl.int64) * out_strides[2]
    offsets = gl.expand_dims(rows.to(gl.int64) * out_strides[3], 1) + gl.expand_dims(columns, 0)
    gl.store(out_ptr + offsets, _scale_rows(acc, 1.0 / total).to(out_ptr.dtype.element_ty))
    if GROUP == 0:
        rows = work.head + gl.arange(0, ROWS, m_i.type.layout)
        lse_ptr += work.split.to(gl.int64) * lse_strides[0] + work.batch.to(gl.int64) * lse_strides[1]
        lse_ptr += work.query.to(gl.int64) * lse_strides[2]
        gl.store(lse_ptr + rows.to(gl.int64) * lse_strides[3], (m_i + gl.log2(total)) * LN_2)


@gluon.jit
def _attend_0(work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2):
    _attend(0, work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2)


@gluon.jit
def _attend_1(work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2):
    _attend(1, work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2)


@gluon.jit(do_not_specialize=["seqlen_q", "capacity", "num_splits", *INDICES, *LSE])
def _mla_decode_hopper_kernel(
    q_desc,
    q_pe_desc,
    latent_desc,
    rope_desc,
    out_ptr,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    out_strides,
    lse_split_stride,
    lse_batch_stride,
    lse_row_stride,
    lse_head_stride,
    table_stride,
    seqlen_q,
    capacity,
    num_splits,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program computes 64 heads of a query in out and lse, over one split of the keys of a sequence.

    Grid: tiles of heads * seqlen_q * num_splits * batch, in the order of the portable kernel. Descriptors are those of
    `plan_hopper`; strides are (split, batch, row, head). A sequence has no more than capacity keys.
    """
    gl.static_assert(STAGES == 2, "groups and buffers take turns alike")
    TILES: gl.constexpr = NUM_HEADS // ROWS
    tile = gl.program_id(0) % (TILES * seqlen_q)
    split = gl.program_id(0) // (TILES * seqlen_q) % num_splits
    batch = gl.program_id(0) // (TILES * seqlen_q) // num_splits
    query = tile // TILES
    seqlen_k = gl.minimum(gl.load(cache_seqlens_ptr + batch), capacity)
    if CAUSAL:  # all rows of a program see the same keys
        seqlen_k = gl.maximum(seqlen_k - seqlen_q + query + 1, 0)
    share = gl.cdiv(gl.cdiv(seqlen_k, BLOCK_N), num_splits) * BLOCK_N
    start = gl.minimum(split * share, seqlen_k)
    end = gl.minimum(start + share, seqlen_k)
    num_tiles = gl.maximum(gl.cdiv(end - start, BLOCK_N), 1)
    work = _Work(batch, query, tile % TILES * ROWS, split, start, end, num_tiles)

    dtype: gl.constexpr = q_desc.dtype
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    shared = _Shared(
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, HALF], q_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, HALF], q_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, ROPE], q_pe_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BLOCK_N, HALF], latent_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BLOCK_N, HALF], latent_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, BLOCK_N, ROPE], rope_desc.layout),
        gl.allocate_shared_memory(dtype, [ROWS, BLOCK_N], WEIGHTS),
        gl.allocate_shared_memory(gl.float32, [ROWS], FLAT),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT),
        _barriers(1),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(2),
        _barriers(2),
    )
    # Of the tile before the first.
    shared.weights.store(gl.zeros([ROWS, BLOCK_N], dtype, SCORES))
    shared.maxima.store(gl.full([ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, SCORES)))
    fence_async_shared()
    loads = work, shared, q_desc, q_pe_desc, latent_desc, rope_desc, block_table_ptr, table_stride, PAGE_SIZE
    lse_strides = lse_split_stride, lse_batch_stride, lse_row_stride, lse_head_stride
    sums = work, shared, out_ptr, lse_ptr, out_strides, lse_strides, scale_log2
    # Warps and registers of all but the first, which is left 24 registers a thread of 65536.
    gl.warp_specialize([(_load_tiles, loads), (_attend_0, sums), (_attend_1, sums)], [4, 4], [240, 240])


def launch_mla_decode_hopper(
    plan, q, q_pe, latents, rope_keys, parts, lse_parts, cache_seqlens, block_table, seqlen_q, scale_log2
):
    """Launch the kernel by what `plan_hopper` found; parts are (num_splits, *q.shape), lse_parts that without the last
    dimension, latents and rope_keys the two parts of the rows of one cache, block_table its pages."""
    num_programs, num_splits, geometries, constants = plan
    args = (
        *(_describe(x, *geometry) for x, geometry in zip((q, q_pe, latents, rope_keys), geometries)),
        parts,
        lse_parts,
        cache_seqlens,
        block_table,
        parts.stride()[:4],
        *lse_parts.stride(),
        block_table.stride(0),
        seqlen_q,
        capacity_of(latents, block_table),
        num_splits,
        scale_log2,
    )
    launch_packed(_mla_decode_hopper_kernel, (num_programs * num_splits,), q.device, args, constants)


@remember
def plan_hopper(layout, dtype, cache_dtype, table_width, causal, num_splits, num_sms, wanted):
    """(programs of a split, splits, geometries of q, q_pe, latent vectors and rotary keys, constants) of a decode step
    with a positive scale, or None where the portable kernel serves it.

    layout is that of q, q_pe and latent vectors, whose bases are aligned to 16 bytes, as that of the rotary keys, which
    lie behind the latent vectors; wanted as in `MlaHopperConfig.choose`.
    """
    (shape_q, strides_q), (shape_pe, strides_pe), (shape_k, strides_k) = layout
    batch, seqlen_q, num_heads, kv_lora_rank = shape_q
    num_pages, page_size, _ = shape_k
    if cache_dtype != dtype or num_heads % ROWS.value or page_size % BLOCK_N.value or table_width == 0:
        return None
    if not all(strides_suit_tma(*of_tensor, dtype.itemsize) for of_tensor in layout):
        return None
    capacity = table_width * page_size
    rows = seqlen_q * num_heads
    case = MlaDecodeCase("sm_90", dtype, kv_lora_rank, shape_pe[3], rows, seqlen_k=capacity, page_size=page_size)
    config = MlaHopperConfig.choose(case, wanted)
    if config is None:
        return None
    num_programs = batch * seqlen_q * (num_heads // ROWS.value)
    num_splits = num_splits or choose_num_splits(num_programs, -(-capacity // BLOCK_N.value), num_sms)
    constants = dict(NUM_HEADS=num_heads, PAGE_SIZE=page_size, CAUSAL=causal, STAGES=config.num_stages, num_warps=4)
    geometries = [
        (shape_q, strides_q, [1, 1, ROWS.value, HALF.value]),
        (shape_pe, strides_pe, [1, 1, ROWS.value, ROPE.value]),
        _paged_geometry(num_pages, kv_lora_rank, *strides_k[:2], HALF.value),
        _paged_geometry(num_pages, shape_pe[3], *strides_k[:2], ROPE.value),
    ]
    return num_programs, num_splits, geometries, constants


def _paged_geometry(num_pages, width, page, row, columns):
    """(shape, strides, block shape) of a descriptor over (outer, page, slot, row, column), zero past any end: rows
    count as those of a packed tensor in `tma_geometry`, and slots take the place of a sequence's first row."""
    end = PACKED_END.value
    shape, strides = [end + 1, num_pages, end, end, width], [2**34 - row, page, row, row, 1]
    return shape, strides, [1, 1, 1, BLOCK_N.value, columns]


@functools.cache
def _tile_layout(rank):
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _describe(x, shape, strides, block_shape):
    return unchecked_descriptor(TensorDescriptor, x, shape, strides, block_shape, layout=_tile_layout(len(block_shape)))
