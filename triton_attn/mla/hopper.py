"""Decode kernel for Hopper (sm_90) in Gluon, and its launcher: two groups of warps alternate over the tiles of keys.

The output of 64 rows, 512 elements each, fills the registers of two groups of four warps. Each group holds half of the
columns, and both need the weights of all keys. In plain Triton both groups compute all scores together, step by step.
Here a group computes the scores and weights of every second tile and passes the weights on through shared memory: one
group multiplies while the other computes its softmax. Other warps load pages; each latent vector is loaded once and is
both key and value. 16-bit pages are loaded by TMA. Rows of fp8 elements are decoded on the way, once for all heads.
Source: FlashMLA's "seesaw" schedule (2025), https://github.com/deepseek-ai/FlashMLA.

Supports fp16 and bf16, fp8 rows with scales of their own for bf16 queries, paged caches with 512 + 64 elements a row,
pages of a multiple of 64 keys, and multiples of 64 heads. The portable kernel (absorbed_kernel.py), which computes the
same, does the rest. Gluon has no interpreter.
"""

from typing import NamedTuple

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

from .._host.checks import MAX_ROWS
from .._host.descriptors import unchecked_descriptor
from .._host.device import launch
from .._host.gpu import gpu_of
from .._host.key_shard import num_ranks_of
from .._host.latent import SCALE_BLOCK, latent_parts
from .._host.layout import INDICES
from .._jit.args import View
from .._jit.heads import lse_offsets, row_pointer
from .._jit.shards import columns_of_rank
from .._jit.softmax import LN_2
from .._jit.tiles import PACKED_END
from ..dense.tma import strides_suit_tma
from ..merge.splits import choose_num_splits
from .configs import MlaDecodeCase, MlaHopperConfig, split_work

# Renamed in Triton 3.8.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

ROWS: gl.constexpr = gl.constexpr(MlaHopperConfig.block_m)  # heads of a query that one program takes
BLOCK_N: gl.constexpr = gl.constexpr(MlaHopperConfig.block_n)
HALF: gl.constexpr = gl.constexpr(256)  # columns of a group, half of a latent vector
ROPE: gl.constexpr = gl.constexpr(64)
PART: gl.constexpr = gl.constexpr(64)  # columns of fp8 rows that are loaded and decoded together
SCALED: gl.constexpr = gl.constexpr(SCALE_BLOCK)  # columns of fp8 rows that share a scale
MINUS_INF: gl.constexpr = gl.constexpr(float("-inf"))
# Four e4m3 elements ($4) times their scale ($5), in bf16.
DECODE: gl.constexpr = gl.constexpr("""{
    .reg .b16 pair<2>, half<4>;
    .reg .b32 halves<2>;
    .reg .f32 value<4>;
    mov.b32 {pair0, pair1}, $4;
    cvt.rn.f16x2.e4m3x2 halves0, pair0;
    cvt.rn.f16x2.e4m3x2 halves1, pair1;
    mov.b32 {half0, half1}, halves0;
    mov.b32 {half2, half3}, halves1;
    cvt.f32.f16 value0, half0;
    cvt.f32.f16 value1, half1;
    cvt.f32.f16 value2, half2;
    cvt.f32.f16 value3, half3;
    mul.f32 value0, value0, $5;
    mul.f32 value1, value1, $5;
    mul.f32 value2, value2, $5;
    mul.f32 value3, value3, $5;
    cvt.rn.bf16x2.f32 halves0, value1, value0;
    cvt.rn.bf16x2.f32 halves1, value3, value2;
    mov.b32 {$0, $1}, halves0;
    mov.b32 {$2, $3}, halves1;
}""")


class _Work(NamedTuple):
    """What one program computes: 64 heads of a query, from `head` on, over the keys [start, end) of one split, in
    num_tiles tiles. A split without keys has one empty tile."""

    batch: object
    query: object
    head: object
    split: object
    start: object
    end: object
    num_tiles: object


class _Queries(NamedTuple):
    """Queries in shared memory: the two halves that are multiplied with latent vectors, the rotary part, and a barrier
    for their arrival."""

    q_0: object
    q_1: object
    q_pe: object
    full: object


class _Ring(NamedTuple):
    """One piece of the keys in shared memory, a tile for each stage. The barrier `full` completes when a tile has
    arrived, `free` when it was read."""

    tiles: object
    full: object
    free: object


class _Exchange(NamedTuple):
    """What the groups exchange through shared memory: weights and row maxima of the last tile, row sums of each group.
    Each group has a barrier for its weights and one for its sums."""

    weights: object
    maxima: object
    sums: object
    weights_full: object
    sums_full: object


class _Shared(NamedTuple):
    """Shared memory. The halves of the latent vectors are keys of both groups; latents_0 are also the values of group
    0, latents_1 those of group 1."""

    queries: object
    latents_0: object
    latents_1: object
    rope_keys: object
    exchange: object


class _Softmax(NamedTuple):
    """A group's running state: maxima (log2 units) and sums of the rows, and its half of the output."""

    m_i: object  # (ROWS,)
    l_i: object  # (ROWS, 4): of each thread that holds the row
    acc: object  # (ROWS, HALF)


class Float8Rows(NamedTuple):
    """Rows of e4m3 elements and their scales, from the first row of a cache or of a tile on."""

    ptr: object
    scales_ptr: object
    page_stride: object  # in bytes


class _Part(NamedTuple):
    """PART columns of a tile of Float8Rows, in words of four elements (BLOCK_N, PART / 4), and their scales
    (BLOCK_N,)."""

    words: object
    scales: object


class _Sources(NamedTuple):
    """TMA descriptors of the loads, and the block table: View(pointer, stride)."""

    q: object
    q_pe: object
    latents: object  # Float8Rows of an fp8 cache
    rope_keys: object
    block_table: object


@gluon.constexpr_function
def _scores_layout():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N.value, 16])


@gluon.constexpr_function
def _output_layout():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF.value, 16])


@gluon.jit
def _barriers(NUM: gl.constexpr):
    """NUM barriers that one arrival completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _allocate_queries(q_desc, q_pe_desc):
    """Shared memory for the _Queries."""
    dtype: gl.constexpr = q_desc.dtype
    return _Queries(
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, HALF], q_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, HALF], q_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, ROPE], q_pe_desc.layout),
        _barriers(1),
    )


@gluon.jit
def _allocate_ring(desc, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for a _Ring of STAGES tiles (BLOCK_N, COLUMNS), in the dtype and layout of a descriptor."""
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, COLUMNS], desc.layout)
    return _Ring(tiles, _barriers(STAGES), _barriers(STAGES))


@gluon.jit
def _allocate_exchange(dtype: gl.constexpr):
    """Shared memory for the _Exchange, with weights 0 and maxima -inf, those of a tile before the first."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SCORES: gl.constexpr = _scores_layout()
    weights = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_N], WEIGHTS)
    maxima = gl.allocate_shared_memory(gl.float32, [ROWS], FLAT)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    exchange = _Exchange(weights, maxima, sums, _barriers(2), _barriers(2))
    weights.store(gl.zeros([ROWS, BLOCK_N], dtype, SCORES))
    maxima.store(gl.full([ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, SCORES)))
    fence_async_shared()
    return exchange


@gluon.jit
def _matrix(tiles, i):
    """Tile i of (tiles, 1, ..., rows, columns) as a matrix."""
    RANK: gl.constexpr = len(tiles.shape)
    return tiles.index(i).reshape([tiles.shape[RANK - 2], tiles.shape[RANK - 1]])


@gluon.jit
def _stage(step):
    """Stage of a step's tile, and the parity of its barriers. The stage of weights is the group that computes them."""
    return step & 1, (step >> 1) & 1


@gluon.jit
def _load_next(desc, coords, ring, step):
    """Start the load of a step's tile, after the tile before it in the same stage was read."""
    stage, parity = _stage(step)
    full = ring.full.index(stage)
    mbarrier.wait(ring.free.index(stage), parity ^ 1)
    mbarrier.expect(full, desc.block_type.nbytes)
    _tma_load(desc, coords, full, ring.tiles.index(stage))


@gluon.jit
def _load_part(rows, count, INDEX: gl.constexpr, SLOT_STRIDE: gl.constexpr):
    """A _Part of a tile of rows, 0 from row `count` on. The columns of the first start at INDEX * PART."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])  # stores of 16 bytes without conflicts
    offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)) * (SLOT_STRIDE // 4)
    columns = INDEX * (PART // 4) + gl.arange(0, PART // 4, gl.SliceLayout(0, LAYOUT))
    is_key = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)) < count
    words_ptr = rows.ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    offsets_of_words = gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    words = gl.load(words_ptr + offsets_of_words, mask=gl.expand_dims(is_key, 1), other=0)
    scales = gl.load(rows.scales_ptr + offsets + INDEX * PART // SCALED, mask=is_key, other=0.0)
    return _Part(words, scales)


@gluon.jit
def _decode(part, tile, INDEX: gl.constexpr):
    """Store a _Part, times its scales, to the columns of a tile from INDEX * PART on.

    Carried through the loop as words: a tensor of fp8 elements would take a register for each."""
    e0, e1, e2, e3 = gl.inline_asm_elementwise(
        DECODE,
        "=h,=h,=h,=h,r,f",
        [part.words, gl.expand_dims(part.scales, 1)],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    values = gl.join(gl.join(e0, e2), gl.join(e1, e3))  # (BLOCK_N, PART / 4, 2, 2)
    tile.slice(INDEX * PART, PART, dim=1).store(values.reshape([BLOCK_N, PART]))


@gluon.jit
def _in_order(x):
    """x, which a warp has once it executed all before. Otherwise ptxas decodes several parts at a time, and spills."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _decode_half(ring, step, parts, rows, count, NEXT: gl.constexpr, SLOT_STRIDE: gl.constexpr):
    """Decode four _Parts to a step's tile in a ring. Returns the four from NEXT on of the first `count` rows, whose
    loads are under way."""
    stage, parity = _stage(step)
    mbarrier.wait(ring.free.index(stage), parity ^ 1)
    tile = _matrix(ring.tiles, stage)  # (BLOCK_N, HALF)
    _decode(parts[0], tile, 0)
    count = _in_order(count)
    part_0 = _load_part(rows, count, NEXT, SLOT_STRIDE)
    _decode(parts[1], tile, 1)
    count = _in_order(count)
    part_1 = _load_part(rows, count, NEXT + 1, SLOT_STRIDE)
    _decode(parts[2], tile, 2)
    count = _in_order(count)
    part_2 = _load_part(rows, count, NEXT + 2, SLOT_STRIDE)
    _decode(parts[3], tile, 3)
    count = _in_order(count)
    part_3 = _load_part(rows, count, NEXT + 3, SLOT_STRIDE)
    fence_async_shared()
    mbarrier.arrive(ring.full.index(stage), count=1)
    return part_0, part_1, part_2, part_3


@gluon.jit
def _rows_of_tile(rows, page, slot, SLOT_STRIDE: gl.constexpr):
    """Float8Rows from a slot of a page on."""
    offset = page.to(gl.int64) * rows.page_stride + slot * SLOT_STRIDE
    return Float8Rows(rows.ptr + offset, rows.scales_ptr + offset // 4, rows.page_stride)


@gluon.jit
def _load_float8_tiles(work, shared, sources, PAGE_SIZE: gl.constexpr, SLOT_STRIDE: gl.constexpr):
    """The warps that load a cache of fp8 rows, which have SLOT_STRIDE bytes, and decode them.

    While one half of a tile is decoded the next half is on its way to registers: beside the decoded tiles shared memory
    has no room. Slots past the end may hold anything, even NaN; they are not loaded."""
    _load_queries(work, shared.queries, sources)
    pages_ptr = sources.block_table.ptr + work.batch.to(gl.int64) * sources.block_table.strides
    page = gl.load(pages_ptr + work.start // PAGE_SIZE, mask=work.start < work.end, other=0)
    last = work.start + (work.num_tiles - 1) * BLOCK_N
    rows = _rows_of_tile(sources.latents, page, work.start % PAGE_SIZE, SLOT_STRIDE)
    count = work.end - work.start
    parts = (
        _load_part(rows, count, 0, SLOT_STRIDE),
        _load_part(rows, count, 1, SLOT_STRIDE),
        _load_part(rows, count, 2, SLOT_STRIDE),
        _load_part(rows, count, 3, SLOT_STRIDE),
    )
    for step in range(work.num_tiles):
        start = work.start + step * BLOCK_N
        following = gl.minimum(start + BLOCK_N, last)
        next_page = gl.load(pages_ptr + following // PAGE_SIZE, mask=following < work.end, other=0)
        _load_next(sources.rope_keys, _coordinates(page, start, work.end, PAGE_SIZE, 0), shared.rope_keys, step)
        parts = _decode_half(shared.latents_0, step, parts, rows, work.end - start, 4, SLOT_STRIDE)
        page = next_page
        rows = _rows_of_tile(sources.latents, page, following % PAGE_SIZE, SLOT_STRIDE)
        parts = _decode_half(shared.latents_1, step, parts, rows, work.end - start - BLOCK_N, 0, SLOT_STRIDE)


@gluon.jit
def _load_queries(work, queries, sources):
    """Start the loads of the _Queries."""
    q_full = queries.full.index(0)
    mbarrier.expect(q_full, 2 * sources.q.block_type.nbytes + sources.q_pe.block_type.nbytes)
    _tma_load(sources.q, [work.batch, work.query, work.head, 0], q_full, queries.q_0.index(0))
    _tma_load(sources.q, [work.batch, work.query, work.head, HALF], q_full, queries.q_1.index(0))
    _tma_load(sources.q_pe, [work.batch, work.query, work.head, 0], q_full, queries.q_pe.index(0))


@gluon.jit
def _coordinates(page, start, end, PAGE_SIZE: gl.constexpr, COLUMN: gl.constexpr):
    """Coordinates of the tile of keys at `start` in `_paged_geometry`, from a column on, with zeros from `end` on."""
    count = gl.minimum(end - start, BLOCK_N)
    # In this order: Triton 3.6 cannot subtract from a constant.
    return [PACKED_END, page, start % PAGE_SIZE + count, -count + PACKED_END, COLUMN]


@gluon.jit
def _load_tiles(work, shared, sources, PAGE_SIZE: gl.constexpr):
    """The warps that load: queries, then keys. Slots past the end may hold anything, even NaN; TMA loads 0 there."""
    _load_queries(work, shared.queries, sources)
    pages_ptr = sources.block_table.ptr + work.batch.to(gl.int64) * sources.block_table.strides
    # Page numbers are loaded a step ahead, to hide the latency. Without keys none is: the table may have no entry.
    page = gl.load(pages_ptr + work.start // PAGE_SIZE, mask=work.start < work.end, other=0)
    last = work.start + (work.num_tiles - 1) * BLOCK_N
    for step in range(work.num_tiles):
        start = work.start + step * BLOCK_N
        following = gl.minimum(start + BLOCK_N, last)
        following = gl.load(pages_ptr + following // PAGE_SIZE, mask=following < work.end, other=0)
        _load_next(sources.latents, _coordinates(page, start, work.end, PAGE_SIZE, 0), shared.latents_0, step)
        _load_next(sources.latents, _coordinates(page, start, work.end, PAGE_SIZE, HALF), shared.latents_1, step)
        _load_next(sources.rope_keys, _coordinates(page, start, work.end, PAGE_SIZE, 0), shared.rope_keys, step)
        page = following


@gluon.jit
def _by_thread(x):
    """(rows, columns) as (rows, j, t, e), column 8 j + 2 t + e: in a wgmma's result a thread holds one t of a row."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _mask_columns(s, count):
    """-inf from column `count` on. Each thread compares constants, 8 j + e, with a limit of its own, count - 2 t.
    Column indices of its own would stay in registers throughout the loop."""
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
    """Row sums (rows, 4), one for each of the four threads that hold a row. They are added up after the last tile."""
    return gl.sum(gl.sum(_by_thread(p), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    """x with each row multiplied by its factor (rows,)."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _shift(m):
    """The maximum to subtract: m, or 0 where m is -inf because the row has seen no key."""
    return gl.where(m == MINUS_INF, 0.0, m)


@gluon.jit
def _issue_scores(FLOAT8: gl.constexpr, shared, step):
    """Issue the matmul of the scores (ROWS, BLOCK_N) of a step's tile; nothing waits for it here."""
    queries = shared.queries
    stage, parity = _stage(step)
    # 0, hidden from the compiler: it would keep the addresses of all parts of q in registers, and spill them.
    zero = gl.inline_asm_elementwise("shr.u32 $0, $1, 31;", "=r,r", [step], dtype=gl.int32, is_pure=False, pack=1)
    if FLOAT8:  # so are those of a group's keys, which are always in the same stage: the loader needs the registers
        stage += zero
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, _scores_layout())
    q_0 = _matrix(queries.q_0, zero)  # (ROWS, HALF)
    q_1 = _matrix(queries.q_1, zero)
    mbarrier.wait(shared.latents_0.full.index(stage), parity)
    k_0 = _matrix(shared.latents_0.tiles, stage)  # (BLOCK_N, HALF)
    s = warpgroup_mma(q_0, k_0.permute([1, 0]), s, use_acc=False, is_async=True)
    mbarrier.wait(shared.latents_1.full.index(stage), parity)
    k_1 = _matrix(shared.latents_1.tiles, stage)
    s = warpgroup_mma(q_1, k_1.permute([1, 0]), s, is_async=True)
    mbarrier.wait(shared.rope_keys.full.index(stage), parity)
    q_pe = _matrix(queries.q_pe, zero)  # (ROWS, ROPE)
    k_pe = _matrix(shared.rope_keys.tiles, stage)  # (BLOCK_N, ROPE)
    return warpgroup_mma(q_pe, k_pe.permute([1, 0]), s, is_async=True)


@gluon.jit
def _issue_output_of_other(GROUP: gl.constexpr, shared, step, state):
    """Rescale sums and output by the other group's maximum, and issue the output of its tile from its weights."""
    values = shared.latents_0 if GROUP == 0 else shared.latents_1
    exchange = shared.exchange
    # Step -1 has weights 0 and takes the values of step 0; the parity makes its barrier count as complete.
    stage, parity = _stage(gl.maximum(step, 0))
    mbarrier.wait(values.full.index(stage), parity)
    _, parity = _stage(step)
    mbarrier.wait(exchange.weights_full.index(1 - GROUP), parity)
    m_new = exchange.maxima.load(state.m_i.type.layout)
    alpha = gl.exp2(state.m_i - _shift(m_new))
    acc = _scale_rows(state.acc, alpha)
    acc = warpgroup_mma(exchange.weights, _matrix(values.tiles, stage), acc, is_async=True)
    return _Softmax(m_new, _scale_rows(state.l_i, alpha), acc)


@gluon.jit
def _step(GROUP: gl.constexpr, FLOAT8: gl.constexpr, work, shared, step, state, scale_log2):
    """Output of the other group's tile, which is the one before; then scores, weights and output of this group's tile.

    There is one buffer for weights. It can be overwritten once the other group's output is complete."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _output_layout(), 2)
    values = shared.latents_0 if GROUP == 0 else shared.latents_1
    exchange = shared.exchange
    stage, _ = _stage(step)
    other = _issue_output_of_other(GROUP, shared, step - 1, state)
    scores = _issue_scores(FLOAT8, shared, step)
    acc = warpgroup_mma_wait(1, [other.acc])
    # The other group read that tile for its scores before it passed on the weights.
    mbarrier.arrive(values.free.index(stage ^ 1), count=1, pred=step > 0)
    s = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(shared.rope_keys.free.index(stage), count=1)
    count = work.end - (work.start + step * BLOCK_N)
    if count < BLOCK_N:
        s = _mask_columns(s, count)
    m_new = gl.maximum(other.m_i, gl.max(s, 1) * scale_log2)
    alpha = gl.exp2(other.m_i - _shift(m_new))
    weights = gl.exp2(s * scale_log2 - gl.expand_dims(_shift(m_new), 1))  # (ROWS, BLOCK_N)
    l_i = _scale_rows(other.l_i, alpha) + _partial_sums(weights)
    weights = weights.to(exchange.weights.dtype)
    p = gl.convert_layout(weights, P_LAYOUT)
    exchange.weights.store(weights)
    exchange.maxima.store(m_new)
    fence_async_shared()
    mbarrier.arrive(exchange.weights_full.index(GROUP), count=1)
    output = warpgroup_mma(p, _matrix(values.tiles, stage), _scale_rows(acc, alpha), is_async=True)
    acc, p = warpgroup_mma_wait(0, [output, p])
    mbarrier.arrive(values.free.index(stage), count=1)
    return _Softmax(m_new, l_i, acc)


@gluon.jit
def _attend(GROUP: gl.constexpr, work, shared, out, lse, scale_log2, FLOAT8: gl.constexpr):
    """A group of four warps computes half of the columns of 64 rows of out; group 0 also stores their log-sum-exp."""
    SCORES: gl.constexpr = _scores_layout()
    state = _Softmax(
        gl.full([ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, SCORES)),
        _partial_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)),
        gl.zeros([ROWS, HALF], gl.float32, _output_layout()),
    )
    mbarrier.wait(shared.queries.full.index(0), 0)
    # Hidden from the compiler: if ptxas knows that the loop runs, it waits for scores before it scales the output.
    num_tiles = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [work.num_tiles], dtype=gl.int32, is_pure=False, pack=1
    )
    for step in range(GROUP, num_tiles, 2):
        state = _step(GROUP, FLOAT8, work, shared, step, state, scale_log2)
    if (num_tiles - 1) % 2 != GROUP:
        other = _issue_output_of_other(GROUP, shared, num_tiles - 1, state)
        state = _Softmax(other.m_i, other.l_i, warpgroup_mma_wait(0, [other.acc]))
    _store(GROUP, work, shared.exchange, out, lse, state)


@gluon.jit
def _store(GROUP: gl.constexpr, work, exchange, out, lse, state):
    """Store a group's part of out, and lse, from the sums of both groups. lse is a View of the query's, with the stride
    between heads."""
    OUTPUT: gl.constexpr = _output_layout()
    m_i = state.m_i
    total = gl.convert_layout(gl.sum(state.l_i, 1), m_i.type.layout)
    exchange.sums.index(GROUP).store(total)
    mbarrier.arrive(exchange.sums_full.index(GROUP), count=1)
    mbarrier.wait(exchange.sums_full.index(1 - GROUP), 0)
    total += exchange.sums.index(1 - GROUP).load(m_i.type.layout)
    total = gl.where(total == 0.0, 1.0, total)  # a row without keys; its maximum is -inf
    rows = work.head + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    columns = GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(0, OUTPUT))
    out_ptr = row_pointer(out, work.batch, work.query, 0)
    offsets = gl.expand_dims(rows.to(gl.int64) * out.strides.head, 1) + gl.expand_dims(columns, 0)  # (ROWS, HALF)
    gl.store(out_ptr + offsets, _scale_rows(state.acc, 1.0 / total).to(out.ptr.dtype.element_ty))
    if GROUP == 0:
        rows = work.head + gl.arange(0, ROWS, m_i.type.layout)
        gl.store(lse.ptr + rows.to(gl.int64) * lse.strides, (m_i + gl.log2(total)) * LN_2)


@gluon.jit
def _attend_0(work, shared, out, lse, scale_log2, FLOAT8: gl.constexpr):
    """Group 0, as a function for warp_specialize."""
    _attend(0, work, shared, out, lse, scale_log2, FLOAT8)


@gluon.jit
def _attend_1(work, shared, out, lse, scale_log2, FLOAT8: gl.constexpr):
    """Group 1, as a function for warp_specialize."""
    _attend(1, work, shared, out, lse, scale_log2, FLOAT8)


@gluon.jit(do_not_specialize=["seqlen_q", "capacity", "num_splits", *INDICES, "lse_ptr"])
def _mla_decode_hopper_kernel(
    q_desc,
    q_pe_desc,
    latents,
    rope_desc,
    out,
    out_split_stride,
    lse_ptr,
    cache_seqlens_ptr,
    block_table_ptr,
    table_stride,
    seqlen_q,
    capacity,
    num_splits,
    scale_log2,
    key_shard,
    NUM_HEADS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    SLOT_STRIDE: gl.constexpr,
):
    """One program computes 64 heads of a query in out and lse, over one split of the keys of a sequence.

    Grid: tiles of heads * seqlen_q * num_splits * batch, in the order of the portable kernel. Descriptors are those of
    `plan_hopper`. latents are a descriptor, or the Float8Rows of a cache whose rows have SLOT_STRIDE bytes. lse is
    (num_splits, batch, NUM_HEADS, seqlen_q). A sequence has no more than capacity keys, of which the cache holds those
    of key_shard, a KeyShard, or all.
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
    if key_shard is not None:
        seqlen_k = columns_of_rank(seqlen_k, key_shard[0], key_shard[1], key_shard[2])
    share = gl.cdiv(gl.cdiv(seqlen_k, BLOCK_N), num_splits) * BLOCK_N
    start = gl.minimum(split * share, seqlen_k)
    end = gl.minimum(start + share, seqlen_k)
    num_tiles = gl.maximum(gl.cdiv(end - start, BLOCK_N), 1)
    work = _Work(batch, query, tile % TILES * ROWS, split, start, end, num_tiles)

    shared = _Shared(
        _allocate_queries(q_desc, q_pe_desc),
        _allocate_ring(rope_desc, HALF, STAGES),
        _allocate_ring(rope_desc, HALF, STAGES),
        _allocate_ring(rope_desc, ROPE, STAGES),
        _allocate_exchange(q_desc.dtype),
    )
    sources = _Sources(q_desc, q_pe_desc, latents, rope_desc, View(block_table_ptr, table_stride))
    num_sequences = gl.num_programs(0) // (TILES * seqlen_q) // num_splits
    lse_ptr += lse_offsets(split * num_sequences + batch, 0, query, NUM_HEADS, seqlen_q)
    lse = View(lse_ptr, seqlen_q)
    out = View(out.ptr + split.to(gl.int64) * out_split_stride, out.strides)
    sums = work, shared, out, lse, scale_log2, SLOT_STRIDE is not None
    # Warps and registers of all functions but the first, for which 24 registers a thread remain, or 72 to decode.
    if SLOT_STRIDE is None:
        loads = work, shared, sources, PAGE_SIZE
        gl.warp_specialize([(_load_tiles, loads), (_attend_0, sums), (_attend_1, sums)], [4, 4], [240, 240])
    else:
        loads = work, shared, sources, PAGE_SIZE, SLOT_STRIDE
        gl.warp_specialize([(_load_float8_tiles, loads), (_attend_0, sums), (_attend_1, sums)], [4, 4], [216, 216])


class HopperPlan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int  # of a split
    num_splits: int
    geometries: list  # fields of the descriptors of q, q_pe, latent vectors (None: Float8Rows) and rotary keys
    counts: tuple  # seqlen_q and capacity of all ranks
    constants: dict


def launch_mla_decode_hopper(plan, call, parts, lse_parts):
    """Launch the kernel for an AbsorbedCall by its CallPlan, of which the attention is a HopperPlan.

    parts are the outputs of the splits (num_splits, *q.shape), lse_parts (num_splits, batch, num_heads, seqlen_q).
    """
    attention = plan.attention
    latents, scales, rope_keys = latent_parts(call.cache, parts.shape[-1], call.q_pe.shape[-1])
    tensors = call.q, call.q_pe, latents, rope_keys
    q, q_pe, latents_desc, rope_keys = (
        fields and unchecked_descriptor(TensorDescriptor, x, fields) for x, fields in zip(tensors, attention.geometries)
    )
    split_stride, of_parts = plan.part_strides
    args = (
        q,
        q_pe,
        latents_desc or Float8Rows(latents, scales, latents.stride(0)),
        rope_keys,
        View(parts, of_parts),
        split_stride,
        lse_parts,
        call.cache_seqlens,
        call.block_table,
        plan.table_stride,
        *attention.counts,
        attention.num_splits,
        call.scale_log2,
        plan.key_shard,
    )
    grid = (attention.num_programs * attention.num_splits,)
    launch(_mla_decode_hopper_kernel, grid, call.q.device, args, attention.constants, plan.alike)


def plan_hopper(key, wanted, config=None):
    """The HopperPlan of a call with this AbsorbedKey, None where the portable kernel runs.

    wanted as in `MlaHopperConfig.choose`, which chooses config if it is None.
    """
    (shape_q, _), (shape_pe, _), (shape_k, strides_k) = key.layout
    batch, seqlen_q, num_heads, kv_lora_rank = shape_q
    num_pages, page_size, _ = shape_k
    is_fp8 = key.layout_scales is not None
    if not (gpu_of(key.arch).wgmma and key.q_aligned and key.cache_aligned and (key.joined or is_fp8)):
        return None
    if key.packed or key.has_factors or key.batch_invariant:
        return None
    if key.cache_dtype != key.dtype and not is_fp8:
        return None
    if num_heads % ROWS.value or page_size % BLOCK_N.value or key.table_width == 0:
        return None
    of_tensors = *key.layout[:2], key.layout_rope
    if not all(strides_suit_tma(*of_tensor, key.dtype.itemsize) for of_tensor in of_tensors):
        return None
    capacity = key.table_width * page_size
    rows = seqlen_q * num_heads
    case = MlaDecodeCase(key.arch, key.dtype, kv_lora_rank, shape_pe[3], rows, is_fp8, True, capacity, page_size)
    config = config or MlaHopperConfig.choose(case, wanted)
    if config is None:
        return None
    num_programs = batch * seqlen_q * (num_heads // ROWS.value)
    num_splits = key.num_splits
    if num_splits == 0:
        num_splits = choose_num_splits(split_work(key, ROWS.value, BLOCK_N.value, num_programs, capacity))
    geometries = [
        *(_fields(*of, [1, 1, ROWS.value, columns.value]) for of, columns in zip(key.layout, (HALF, ROPE))),
        None if is_fp8 else _paged_geometry(num_pages, kv_lora_rank, *strides_k[:2], HALF.value),
        _paged_geometry(num_pages, shape_pe[3], *key.layout_rope[1][:2], ROPE.value),
    ]
    constants = dict(NUM_HEADS=num_heads, PAGE_SIZE=page_size, CAUSAL=key.causal, STAGES=config.num_stages, num_warps=4)
    constants["SLOT_STRIDE"] = strides_k[1] if is_fp8 else None
    counts = seqlen_q, min(capacity * num_ranks_of(key.key_shard), MAX_ROWS)
    return HopperPlan(num_programs, num_splits, geometries, counts, constants)


def _paged_geometry(num_pages, width, page, row, columns):
    """Fields of a descriptor over (outer, page, slot, row, column), with zeros past any end.

    Rows work as those of a packed tensor in `tma_geometry`; slots take the place of a sequence's first row."""
    end = PACKED_END.value
    shape, strides = [end + 1, num_pages, end, end, width], [2**34 - row, page, row, row, 1]
    return _fields(shape, strides, [1, 1, 1, BLOCK_N.value, columns])


def _fields(shape, strides, block_shape):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block_shape))
    return dict(shape=shape, strides=strides, block_shape=block_shape, layout=layout)
