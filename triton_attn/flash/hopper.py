"""Forward kernel for Hopper (sm_90) in Gluon, and its launcher: loads, matmuls and softmax overlap.

Plain Triton waits for each matmul before it goes on, so its softmax leaves the tensor cores idle. Here one warp of a
program only loads, by TMA, and groups of four warps compute 64 rows of queries each. A group issues the scores of the
next tile and the output of this one, waits only for the scores, and computes their softmax while the matmul of the
output runs. Source: FlashAttention-3 (2024), arXiv:2407.08608.

Supports fp16 and bf16, head dims 64, 128 and 256, causal or not, dense and varlen, GQA, and the log-sum-exp. The
portable kernel (forward.py), which computes the same, does the rest. Gluon has no interpreter.
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
from triton.language.core import _aggregate as aggregate  # triton.aggregate does not exist in Triton 3.6

from .._host.descriptors import unchecked_descriptor
from .._host.device import launch
from .._host.gpu import gpu_of
from .._host.layout import heads_in_l2, tiles_each
from .._jit.args import Sequences, View
from .._jit.blocks import visible_range
from .._jit.heads import assign_tile, sequence_bounds, slots_left_over
from .._jit.softmax import LN_2, LOG2_E
from .._jit.tiles import sequence_coords
from ..dense.tiles import FlashCase
from ..dense.tma import tma_geometry
from .configs import HopperConfig

# Renamed in Triton 3.8.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

GROUP_ROWS: gl.constexpr = gl.constexpr(64)
MINUS_INF: gl.constexpr = gl.constexpr(float("-inf"))


@aggregate
class _Work:
    """What one program computes: the rows of one head from start_m on. Of its num_tiles tiles of keys the first
    full_tiles need no mask."""

    batch: gl.tensor
    head: gl.tensor
    head_kv: gl.tensor
    first_q: gl.tensor
    first_k: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    start_m: gl.tensor
    full_tiles: gl.tensor
    num_tiles: gl.tensor
    CAUSAL: gl.constexpr
    VARLEN: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        batch,
        head,
        head_kv,
        first_q,
        first_k,
        seqlen_q,
        seqlen_k,
        start_m,
        full_tiles,
        num_tiles,
        CAUSAL,
        VARLEN,
    ):
        self.batch = batch
        self.head = head
        self.head_kv = head_kv
        self.first_q = first_q
        self.first_k = first_k
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.start_m = start_m
        self.full_tiles = full_tiles
        self.num_tiles = num_tiles
        self.CAUSAL = gl.constexpr(getattr(CAUSAL, "value", CAUSAL))
        self.VARLEN = gl.constexpr(getattr(VARLEN, "value", VARLEN))


@aggregate
class _Shared:
    """Tiles in shared memory: q one for each group, k and v one for each stage. A barrier `full` completes when a tile
    has arrived, a barrier `free` when all groups have read it."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, q_full, k_full, k_free, v_full, v_free):
        self.q = q
        self.k = k
        self.v = v
        self.q_full = q_full
        self.k_full = k_full
        self.k_free = k_free
        self.v_full = v_full
        self.v_free = v_free


class _Softmax(NamedTuple):
    """Running state of a group: maxima, sums and output of its rows, and the weights of the last tile, which the output
    does not contain yet."""

    m_i: object  # (64,), in log2 units
    l_i: object  # (64, 4)
    acc: object  # (64, HEAD_DIM)
    p: object  # (64, BLOCK_N)


@gluon.jit
def _barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """NUM barriers, each completed by ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _matrix(tiles, i):
    """Tile i of (tiles, 1, 1, 1, rows, dim) as a matrix (rows, dim)."""
    return tiles.index(i).reshape([tiles.shape[4], tiles.shape[5]])


@gluon.jit
def _stage(tiles, step):
    """Stage of a step's tile, and the parity of its barriers."""
    STAGES: gl.constexpr = tiles.shape[0]
    return step % STAGES, step // STAGES & 1


@gluon.jit
def _load(desc, coords, start, full, buffer):
    """Start the load of the tile at row start, counted from coords, into buffer; its arrival completes full."""
    outer, batch, head, row = coords
    mbarrier.expect(full, desc.block_type.nbytes)
    _tma_load(desc, [outer, batch, head, row + start, 0], full, buffer)


@gluon.jit
def _load_tiles(work, shared, q_desc, k_desc, v_desc):
    """The warp that loads: queries of all groups, then keys and values, from the last tile to the first."""
    GROUPS: gl.constexpr = shared.q.shape[0]
    BLOCK_N: gl.constexpr = shared.k.shape[4]
    if work.start_m < work.seqlen_q:
        coords_q = sequence_coords(work.batch, work.head, work.first_q, work.seqlen_q, work.VARLEN)
        coords_k = sequence_coords(work.batch, work.head_kv, work.first_k, work.seqlen_k, work.VARLEN)
        for group in gl.static_range(GROUPS):
            start = work.start_m + group * GROUP_ROWS
            _load(q_desc, coords_q, start, shared.q_full.index(group), shared.q.index(group))
        for step in range(work.num_tiles):
            start = (work.num_tiles - 1 - step) * BLOCK_N
            stage, parity = _stage(shared.k, step)
            mbarrier.wait(shared.k_free.index(stage), parity ^ 1)
            _load(k_desc, coords_k, start, shared.k_full.index(stage), shared.k.index(stage))
            mbarrier.wait(shared.v_free.index(stage), parity ^ 1)
            _load(v_desc, coords_k, start, shared.v_full.index(stage), shared.v.index(stage))


@gluon.jit
def _by_thread(x):
    """(rows, columns) as (rows, j, t, e), column 8 j + 2 t + e: in a wgmma's result a thread holds one t of a row."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _mask_scores(work, s, start_m, start_n):
    """-inf where a row does not see a column. Each thread compares constants, 8 j + e, with limits of its own."""
    x = _by_thread(s)
    OF_E: gl.constexpr = gl.SliceLayout(3, x.type.layout)
    OF_T: gl.constexpr = gl.SliceLayout(2, OF_E)
    ROWS: gl.constexpr = gl.SliceLayout(1, OF_T)
    last = gl.zeros([x.shape[0]], gl.int32, ROWS) + (work.seqlen_k - start_n)
    if work.CAUSAL:
        rows = start_m + gl.arange(0, x.shape[0], ROWS)
        last = gl.minimum(last, rows + (work.seqlen_k - work.seqlen_q + 1 - start_n))
    j = gl.arange(0, x.shape[1], gl.SliceLayout(0, OF_T)) * 8
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, OF_E))) * 2
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout))))
    last = gl.expand_dims(gl.expand_dims(gl.expand_dims(last, 1), 2), 3)
    j = gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 2), 3)
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 3)
    e = gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 0), 1), 2)
    visible = gl.where(j + e < last - t, x, MINUS_INF)
    return gl.convert_layout(visible.reshape(s.shape), s.type.layout)


@gluon.jit
def _softmax_step(s, m_i, scale_log2, MASKED: gl.constexpr):
    """p = exp2(s * scale_log2 - m), the new maximum m (log2 units), and the factor that rescales earlier sums.

    The maximum is stored scaled. Scaled inside the exponent of the factor it would be rounded differently, and the
    factor of an unchanged maximum would not be 1.
    """
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    m_sub = gl.where(m_new == MINUS_INF, 0.0, m_new) if MASKED else m_new
    return gl.exp2(s * scale_log2 - gl.expand_dims(m_sub, 1)), m_new, gl.exp2(m_i - m_sub)


@gluon.jit
def _partial_sums(p):
    """Row sums (rows, 4), one for each of the four threads that hold a row. They are added up after the last tile."""
    return gl.sum(gl.sum(_by_thread(p), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    """x with each row multiplied by its factor (rows,)."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _end_of_block():
    """End a basic block, by a loop that never repeats. Otherwise ptxas waits for the output before the softmax, which
    must overlap it."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; AGAIN: activemask.b32 $0; setp.eq.u32 p, $0, $1; @p bra AGAIN; }",
        "=&r,r",
        [gl.program_id(2)],  # 0: never a mask of active threads
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _issue_scores(GROUP: gl.constexpr, shared, step):
    """Issue the matmul of the scores (64, BLOCK_N) of this step's tile; nothing waits for it here."""
    BLOCK_N: gl.constexpr = shared.k.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage, parity = _stage(shared.k, step)
    mbarrier.wait(shared.k_full.index(stage), parity)
    keys = _matrix(shared.k, stage).permute([1, 0])
    zeros = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(_matrix(shared.q, GROUP), keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_output(shared, step, state):
    """Issue the matmul that adds this step's tile to the output (64, HEAD_DIM); nothing waits for it here."""
    stage, parity = _stage(shared.v, step)
    mbarrier.wait(shared.v_full.index(stage), parity)
    return warpgroup_mma(state.p, _matrix(shared.v, stage), state.acc, is_async=True)


@gluon.jit
def _step(GROUP: gl.constexpr, work, shared, step, state, scale_log2, MASKED: gl.constexpr):
    """Scores of this step's tile; their softmax overlaps the matmul of the output of the tile before."""
    DTYPE: gl.constexpr = state.p.dtype
    P_LAYOUT: gl.constexpr = state.p.type.layout
    EARLY: gl.constexpr = shared.q.shape[0] == 2  # with three groups there are no registers for two P
    scores = _issue_scores(GROUP, shared, step)
    output = _issue_output(shared, step - 1, state)
    s = warpgroup_mma_wait(1, [scores])
    stage, _ = _stage(shared.k, step)
    mbarrier.arrive(shared.k_free.index(stage), count=1)
    if MASKED:
        start_n = (work.num_tiles - 1 - step) * shared.k.shape[4]
        s = _mask_scores(work, s, work.start_m + GROUP * GROUP_ROWS, start_n)
    weights, m_i, alpha = _softmax_step(s, state.m_i, scale_log2, MASKED)
    l_i = _scale_rows(state.l_i, alpha) + _partial_sums(weights)
    if EARLY:
        p = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
        _end_of_block()
        acc, p = warpgroup_mma_wait(0, [output, p])
    else:
        _end_of_block()
        acc = warpgroup_mma_wait(0, [output])
        p = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
    stage, _ = _stage(shared.v, step - 1)
    mbarrier.arrive(shared.v_free.index(stage), count=1)
    return _Softmax(m_i, l_i, _scale_rows(acc, alpha), p)


@gluon.jit
def _attend(GROUP: gl.constexpr, work, shared, out_desc, lse, num_heads, scale_log2):
    """A group of four warps computes 64 rows of out and lse. lse is a View with the stride between heads."""
    BLOCK_N: gl.constexpr = shared.k.shape[4]
    HEAD_DIM: gl.constexpr = shared.k.shape[5]
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    if work.start_m < work.seqlen_q:
        start_m = work.start_m + GROUP * GROUP_ROWS

        # The last tile; some rows may see none of its keys.
        mbarrier.wait(shared.q_full.index(GROUP), 0)
        s = warpgroup_mma_wait(0, [_issue_scores(GROUP, shared, 0)])
        mbarrier.arrive(shared.k_free.index(0), count=1)
        s = _mask_scores(work, s, start_m, (work.num_tiles - 1) * BLOCK_N)
        m_i = gl.full([GROUP_ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, s.type.layout))
        weights, m_i, _ = _softmax_step(s, m_i, scale_log2, True)
        p = gl.convert_layout(weights.to(out_desc.dtype), P_LAYOUT)
        acc = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, OUTPUT)
        state = _Softmax(m_i, _partial_sums(weights), acc, p)
        masked_tiles = gl.maximum(1, work.num_tiles - work.full_tiles)
        if work.CAUSAL:
            for step in range(1, masked_tiles):
                state = _step(GROUP, work, shared, step, state, scale_log2, True)
        for step in range(masked_tiles, work.num_tiles):
            state = _step(GROUP, work, shared, step, state, scale_log2, False)
        output = _issue_output(shared, work.num_tiles - 1, state)

        l_i = gl.convert_layout(gl.sum(state.l_i, 1), gl.SliceLayout(1, OUTPUT))
        empty = l_i == 0.0
        norm = 1.0 / gl.where(empty, 1.0, l_i)
        if lse.ptr is not None:
            m_i = gl.convert_layout(state.m_i, gl.SliceLayout(1, OUTPUT))
            log_sums = gl.where(empty, MINUS_INF, (m_i + gl.log2(gl.where(empty, 1.0, l_i))) * LN_2)
            rows = start_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, OUTPUT))
            lse_row = work.head if work.VARLEN else work.batch * num_heads + work.head
            lse_ptr = lse.ptr + (lse_row.to(gl.int64) * lse.strides + work.first_q)
            gl.store(lse_ptr + rows, log_sums, mask=rows < work.seqlen_q)
        acc = warpgroup_mma_wait(0, [output])
        # The queries' buffer is free now. TMA does not store rows past the sequence's end.
        _matrix(shared.q, GROUP).store((acc * gl.expand_dims(norm, 1)).to(out_desc.dtype))
        fence_async_shared()
        outer, batch, head, row = sequence_coords(work.batch, work.head, work.first_q, work.seqlen_q, work.VARLEN)
        _tma_store(out_desc, [outer, batch, head, row + start_m, 0], shared.q.index(GROUP))
        tma.store_wait(0)


@gluon.jit
def _attend_0(work, shared, out_desc, lse, num_heads, scale_log2):
    """Group 0, as a function for warp_specialize."""
    _attend(0, work, shared, out_desc, lse, num_heads, scale_log2)


@gluon.jit
def _attend_1(work, shared, out_desc, lse, num_heads, scale_log2):
    """Group 1, as a function for warp_specialize."""
    _attend(1, work, shared, out_desc, lse, num_heads, scale_log2)


@gluon.jit
def _attend_2(work, shared, out_desc, lse, num_heads, scale_log2):
    """Group 2, as a function for warp_specialize."""
    _attend(2, work, shared, out_desc, lse, num_heads, scale_log2)


@gluon.jit
def _clear_spare_rows(shared, out_desc, lse, head, first, start, end):
    """Clear a program's rows [start, end), at most 64 * GROUPS, counted from `first`, the first row after a packed
    batch's last sequence."""
    GROUPS: gl.constexpr = shared.q.shape[0]
    HEAD_DIM: gl.constexpr = shared.q.shape[5]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    start = gl.minimum(gl.maximum(start, 0), end).to(gl.int32)
    end = end.to(gl.int32)
    if start < end:
        zeros = gl.zeros([GROUP_ROWS, HEAD_DIM], out_desc.dtype, ROWS)
        for group in gl.static_range(GROUPS):
            _matrix(shared.q, group).store(zeros)
        fence_async_shared()
        # TMA does not store rows past the end.
        outer, batch, head_there, row = sequence_coords(0, head, first, end, True)
        for group in gl.static_range(GROUPS):
            start_m = start + group * GROUP_ROWS
            _tma_store(out_desc, [outer, batch, head_there, row + start_m, 0], shared.q.index(group))
            if lse.ptr is not None:
                rows = start_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ROWS))
                minus_inf = gl.full([GROUP_ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, ROWS))
                lse_ptrs = lse.ptr + head.to(gl.int64) * lse.strides + first + rows
                gl.store(lse_ptrs, minus_inf, mask=rows < end)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "lse_stride", "num_tiles", "section_size"])
def _flash_fwd_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqlen_q,
    seqlen_k,
    lse_stride,
    num_tiles,
    num_heads,
    group_size,
    section_size,
    scale_log2,
    CAUSAL: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program computes 64 GROUPS rows of out and lse for one query head of one sequence.

    Grid: num_tiles * num_heads * batch, in the order of the portable kernel. Descriptors are those of `tma_geometry`.
    lse_ptr None: not wanted. seqlen_q and seqlen_k of a varlen batch are all its rows.
    """
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    num_batch_heads = gl.num_programs(0) // num_tiles
    tile, batch_head = assign_tile(gl.program_id(0), num_tiles, num_batch_heads, section_size, CAUSAL)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    num_rows = seqlen_q
    first_q, first_k, seqlen_q, seqlen_k, offset = sequence_bounds(
        Sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr, None), batch, seqlen_q, seqlen_k
    )
    start_m = tile * (GROUPS * GROUP_ROWS)
    end_m = gl.minimum(start_m + GROUPS * GROUP_ROWS, seqlen_q)
    window = None, 0 if CAUSAL else None
    blocks = visible_range(start_m + offset, end_m + offset, seqlen_k, window, BLOCK_N)
    work = _Work(
        batch,
        head,
        head // group_size,
        gl.to_tensor(first_q),
        gl.to_tensor(first_k),
        seqlen_q,
        seqlen_k,
        start_m,
        blocks.full_hi // BLOCK_N,
        gl.maximum(1, gl.cdiv(blocks.hi, BLOCK_N)),  # rows that see no key have one tile, all of it masked
        CAUSAL,
        VARLEN,
    )
    shared = _Shared(
        gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 1, GROUP_ROWS, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout),
        _barriers(GROUPS, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1),
        _barriers(STAGES, GROUPS),
    )
    lse = View(lse_ptr, lse_stride)
    if VARLEN and start_m + GROUPS * GROUP_ROWS > seqlen_q:
        # The program's part of them, see `spare_rows`.
        first = gl.minimum(gl.load(cu_seqlens_q_ptr + num_batch_heads // num_heads), num_rows)
        slot = slots_left_over(batch * num_tiles + tile, first_q + seqlen_q, GROUPS * GROUP_ROWS)
        start = slot + gl.maximum(seqlen_q - start_m, 0)
        end = gl.minimum(slot + GROUPS * GROUP_ROWS, num_rows - first)
        _clear_spare_rows(shared, out_desc, lse, head, first, start, end)
    loads = work, shared, q_desc, k_desc, v_desc
    sums = work, shared, out_desc, lse, num_heads, scale_log2
    if GROUPS == 2:
        # Warps and registers of all functions but the first. The threads of a program have 65536 registers.
        gl.warp_specialize([(_attend_0, sums), (_attend_1, sums), (_load_tiles, loads)], [4, 1], [240, 24])
    else:
        gl.warp_specialize(
            [(_attend_0, sums), (_attend_1, sums), (_attend_2, sums), (_load_tiles, loads)], [4, 4, 1], [160, 160, 32]
        )


class HopperPlan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int
    geometries: list  # fields of the descriptors of q, k, v and out
    numbers: tuple  # arguments from num_tiles to scale_log2
    constants: dict


def launch_flash_fwd_hopper(plan, call, out, lse):
    """Launch the kernel of a HopperPlan; the rest as in launch_flash_fwd."""
    q, k, v, (cu_seqlens_q, cu_seqlens_k, *_), *_ = call
    args = (
        *(unchecked_descriptor(TensorDescriptor, x, fields) for x, fields in zip((q, k, v, out), plan.geometries)),
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[-3],
        k.shape[-3],
        0 if lse is None else lse.shape[-1],
        *plan.numbers,
    )
    launch(_flash_fwd_hopper_kernel, (plan.num_programs,), q.device, args, plan.constants)


def plan_hopper(key, wanted, config=None):
    """The HopperPlan of a CallKey, None where the portable kernel runs. Of the options the kernel supports causal.

    wanted as in `HopperConfig.choose`, which chooses config if it is None.
    """
    has_more = (
        not key.is_plain
        or key.problem.has_sinks
        or key.problem.has_shard
        or key.problem.window not in ((None, None), (None, 0))
    )
    if has_more or not gpu_of(key.arch).wgmma or not (key.q_aligned and key.kv_aligned and key.suits_tma(0, 1, 2, 3)):
        return None
    case = FlashCase(key.arch, key.problem.dtype, *key.head_dims, key.causal, seqlen_k=key.max_seqlen_k)
    config = config or HopperConfig.choose(case, wanted)
    if config is None:
        return None
    (shape_q, _), (shape_k, _), *_ = key.problem.layout
    *_, num_rows, num_heads, head_dim = shape_q
    group_size = num_heads // shape_k[-2]
    num_tiles = tiles_each(key.max_seqlen_q, num_rows, key.batch, config.block_m)
    section_size = 1
    if key.causal:
        bytes_per_head = 2 * key.max_seqlen_k * head_dim * key.problem.dtype.itemsize
        section_size = heads_in_l2(bytes_per_head, group_size, num_heads * key.batch)
    rows = GROUP_ROWS.value, config.block_n, config.block_n, GROUP_ROWS.value
    layout = {"layout": gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)}
    geometries = [tma_geometry(*of_tensor, count)[0] | layout for of_tensor, count in zip(key.layouts, rows)]
    constants = dict(
        CAUSAL=key.causal,
        HEAD_DIM=head_dim,
        BLOCK_N=config.block_n,
        GROUPS=config.groups,
        STAGES=config.num_stages,
        num_warps=4,
    )
    numbers = num_tiles, num_heads, group_size, section_size, key.problem.softmax_scale * LOG2_E.value
    return HopperPlan(num_tiles * num_heads * key.batch, geometries, numbers, constants)
