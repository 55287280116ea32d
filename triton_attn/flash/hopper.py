"""Forward kernel for Hopper (sm_90) in Gluon, and its launcher: loads, matmuls and softmax overlap.

Plain Triton waits for each matmul before it goes on, so its softmax leaves the tensor cores idle. Here one warp of a
program only loads, by TMA, and groups of four warps compute 64 rows of queries each. A group issues the scores of the
next tile and the output of this one, waits only for the scores, and computes their softmax while the matmul of the
output runs. Source: FlashAttention-3 (2024), arXiv:2407.08608.

Supports fp16 and bf16, head dims 64, 96, 128, 192 with values of 128, and 256, and every option but dropout. The
portable kernel (forward.py), which computes the same, does the rest. Masks, changes to scores and the softmax are those
of _jit/. Gluon has no interpreter.
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

from .._host.descriptors import unchecked_descriptor
from .._host.device import launch
from .._host.gpu import gpu_of
from .._host.layout import heads_in_l2, tiles_each
from .._jit.args import Heads, Scores, Window
from .._jit.blocks import visible_range
from .._jit.heads import assign_work, row_pointer, sequence_bounds, slots_left_over
from .._jit.masks import first_column, last_column, scale_and_cap, subtract_distance
from .._jit.softmax import LOG2_E, load_sink, softmax_finish, softmax_weights
from .._jit.tiles import sequence_coords
from ..dense.arguments import LENGTHS, alike_of, common_arguments
from ..dense.tiles import FlashCase
from ..dense.tma import tma_geometry
from .configs import HopperConfig

# Renamed in Triton 3.8.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

GROUP_ROWS: gl.constexpr = gl.constexpr(64)
MINUS_INF: gl.constexpr = gl.constexpr(float("-inf"))
# By how much (log2 units) a running maximum may be behind with `lazy`: weights up to 2^SLACK keep their bits in fp16.
SLACK: gl.constexpr = gl.constexpr(8)


class _Head(NamedTuple):
    """The queries of one head of one sequence, and its keys. coords are those of the first, see `sequence_coords`."""

    coords_q: object
    coords_k: object
    seqlen_q: object
    seqlen_k: object
    offset: object  # position of query 0, counted from key 0
    window: object


class _Series(NamedTuple):
    """The tiles of queries of a program that computes several, at most `each`, of the num_tiles of its head. The head
    has num_programs, of which it is number `program`."""

    program: object
    num_programs: object
    num_tiles: object
    each: object


class _Past(NamedTuple):
    """How many tiles of queries, and of keys for these, a program has loaded before."""

    queries: object
    keys: object


class _Keys(NamedTuple):
    """The num_tiles tiles of keys, from start on, that a tile of queries sees. The last one needs a mask, and so do
    left_tiles at the start and those from full_end on."""

    start: object
    num_tiles: object
    left_tiles: object
    full_end: object


class _Work(NamedTuple):
    """A tile of queries: the rows of a _Head from start_m on, over their _Keys. past is a _Past, or None for a
    program with one tile of queries. In a group rows are its own, see `_rows_of_group`."""

    head: object
    past: object
    start_m: object
    keys: object
    rows: object = None


class _Program(NamedTuple):
    """What a program computes: one _Work, or, if that is None, a _Series of a _Head."""

    head: object
    series: object
    work: object


class _HeadScores(NamedTuple):
    """The `Scores` of one head: slope is that of ALiBi, or None, and sink is in log2 units. lazy None: the running
    maximum is exact, see SLACK. An assignment would make a False a tensor."""

    scale_log2: object
    softcap: object
    slope: object
    window: object
    sink: object
    lazy: object


class _Ring(NamedTuple):
    """Tiles of keys or values in shared memory, one for each stage, in pieces of the head dimension. The barrier `full`
    completes when a tile has arrived, `free` when all groups have read it."""

    tiles: object
    full: object
    free: object


class _Shared(NamedTuple):
    """Shared memory. q has a tile for each group, in pieces, with a barrier for its arrival. A program with one tile of
    queries stores its results from there: out is q, and q_free None. With several, the next one is loaded to q as soon
    as a group has computed the last scores of this one: then q_free completes."""

    q: object
    q_full: object
    q_free: object
    out: object
    k: object
    v: object


class _Results(NamedTuple):
    """Where results are stored: descriptors of the output's pieces, and the pointer to the log-sum-exp of the
    sequence's first row, or None."""

    descs: object
    lse_ptr: object


class _Softmax(NamedTuple):
    """Running state of a group: maxima, sums and output of its rows, and the weights of the last tile, which the output
    does not contain yet."""

    m_i: object  # (64,), in log2 units
    l_i: object  # (64, 4)
    acc: object  # (64, HEAD_DIM_V), in pieces
    p: object  # (64, BLOCK_N)


@gluon.jit
def _barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """NUM barriers, each completed by ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _allocate(descs, NUM: gl.constexpr):
    """Shared memory for NUM tiles of each descriptor."""
    tiles = ()
    for i in gl.static_range(len(descs)):
        desc = descs[i]
        tiles += (
            gl.allocate_shared_memory(
                desc.dtype, [NUM, 1, 1, 1, desc.block_type.shape[3], desc.block_type.shape[4]], desc.layout
            ),
        )
    return tiles


@gluon.jit
def _matrix(tiles, i):
    """Tile i of (tiles, 1, 1, 1, rows, dim) as a matrix (rows, dim)."""
    return tiles.index(i).reshape([tiles.shape[4], tiles.shape[5]])


@gluon.jit
def _stage(ring, work, step):
    """Stage of a step's tile, and the parity of its barriers."""
    STAGES: gl.constexpr = ring.tiles[0].shape[0]
    if work.past is not None:
        step += work.past.keys
    return step % STAGES, step // STAGES & 1


@gluon.jit
def _load(descs, coords, start, full, tiles, i):
    """Start the load of the rows from start on, counted from coords, into tile i; their arrival completes full."""
    outer, batch, head, row = coords
    BYTES: gl.constexpr = descs[0].block_type.nbytes
    REST: gl.constexpr = descs[1].block_type.nbytes if len(tiles) > 1 else 0
    mbarrier.expect(full, BYTES + REST)
    _tma_load(descs[0], [outer, batch, head, row + start, 0], full, tiles[0].index(i))
    if len(tiles) > 1:
        _tma_load(descs[1], [outer, batch, head, row + start, tiles[0].shape[5]], full, tiles[1].index(i))


@gluon.jit
def _load_next(descs, work, start, ring, step):
    """Start the load of a step's tile, after all groups have read the tile before it in the same stage."""
    stage, parity = _stage(ring, work, step)
    mbarrier.wait(ring.free.index(stage), parity ^ 1)
    _load(descs, work.head.coords_k, start, ring.full.index(stage), ring.tiles, stage)


@gluon.jit
def _start_of(work, shared, step):
    """The first key of a step's tile; the last tile comes first."""
    BLOCK_N: gl.constexpr = shared.k.tiles[0].shape[4]
    return work.keys.start + (work.keys.num_tiles - 1 - step) * BLOCK_N


@gluon.jit
def _load_tiles(program, shared, q_descs, k_descs, v_descs):
    """The warp that loads what a _Program computes from."""
    if program.series is None:
        _load_work(program.work, shared, q_descs, k_descs, v_descs)
    else:
        past = _nothing_past()
        for i in range(program.series.each):
            start_m = _next_start(program.head, program.series, i, shared)
            work = _Work(program.head, past, start_m, _keys_of(program.head, start_m, shared))
            _load_work(work, shared, q_descs, k_descs, v_descs)
            past = _past_with(work)


@gluon.jit
def _load_work(work, shared, q_descs, k_descs, v_descs):
    """Load queries of all groups, then keys and values, from the last tile to the first."""
    GROUPS: gl.constexpr = shared.q[0].shape[0]
    if work.start_m < work.head.seqlen_q:
        for group in gl.static_range(GROUPS):
            start = work.start_m + group * GROUP_ROWS
            if work.past is not None:
                mbarrier.wait(shared.q_free.index(group), work.past.queries & 1 ^ 1)
            _load(q_descs, work.head.coords_q, start, shared.q_full.index(group), shared.q, group)
        for step in range(work.keys.num_tiles):
            start = _start_of(work, shared, step)
            _load_next(k_descs, work, start, shared.k, step)
            _load_next(v_descs, work, start, shared.v, step)


@gluon.jit
def _by_thread(x):
    """(rows, columns) as (rows, j, t, e), column 8 j + 2 t + e: in a wgmma's result a thread holds one t of a row."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def _columns_of_rows(of_row, t):
    """A column of each row, (rows,), as (rows, 1, 4, 1), counted from each thread's first one."""
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(of_row, 1), 2), 3) - t


@gluon.jit
def _change_scores(work, s, origin, scores, MASKED: gl.constexpr):
    """The scores (64, BLOCK_N) of a tile as the softmax takes them, see `scale_scores` and `mask_scores`. origin is its
    rows and its first column.

    Each thread compares constants, 8 j + e, with limits of its own. Column indices of its own would stay in registers
    throughout the loop.
    """
    left, right = scores.window
    rows, start_n = origin
    x = _by_thread(s)
    if scores.softcap is not None or scores.slope is not None:
        x = scale_and_cap(x, scores, False)
    OF_E: gl.constexpr = gl.SliceLayout(3, x.type.layout)
    OF_T: gl.constexpr = gl.SliceLayout(2, OF_E)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, OF_T))
    j = gl.arange(0, x.shape[1], gl.SliceLayout(0, OF_T)) * 8
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, OF_E))) * 2
    e = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout))))
    j = gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 2), 3)
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 3)
    columns = j + gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 0), 1), 2)
    if scores.slope is not None:
        position = _columns_of_rows(rows + (work.head.offset - start_n), t)
        x = subtract_distance(x, columns.to(gl.float32) - position.to(gl.float32), scores.slope)
    if MASKED:
        last = gl.zeros_like(rows) + last_column(rows, start_n, work.head.seqlen_k, work.head.offset, right)
        visible = columns <= _columns_of_rows(last, t)
        if left is not None:
            visible &= columns >= _columns_of_rows(first_column(rows, start_n, work.head.offset, left), t)
        x = gl.where(visible, x, MINUS_INF)
    return gl.convert_layout(x.reshape(s.shape), s.type.layout)


@gluon.jit
def _softmax_of(work, s, m_i, origin, scores, MASKED: gl.constexpr):
    """`softmax_weights` of a tile of q . k, whose rows and first column are the origin. The exponential takes the scale
    along where nothing else comes between."""
    FOLDS: gl.constexpr = scores.softcap is None and scores.slope is None
    if MASKED or not FOLDS:
        s = _change_scores(work, s, origin, scores, MASKED)
    slack: gl.constexpr = 0 if scores.lazy is None else SLACK
    return softmax_weights(s, m_i, scores.scale_log2 if FOLDS else 1.0, MASKED, slack)


@gluon.jit
def _partial_sums(p):
    """Row sums (rows, 4), one for each of the four threads that hold a row. They are added up after the last tile."""
    return gl.sum(gl.sum(_by_thread(p), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    """x with each row multiplied by its factor (rows,)."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.constexpr_function
def _multiply_if_any(num):
    """PTX and constraints: multiply num elements of two rows that a thread holds, in wgmma's order, by the factors of
    their rows, unless the factors of all rows of the warp are 1."""
    factors = 2 * num, 2 * num + 2
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${factors[i // 2 % 2]};" for i in range(num))
    asm = f"""{{ .reg .pred p;
        setp.neu.f32 p, ${factors[0]}, 0f3F800000;
        setp.neu.or.f32 p, ${factors[1]}, 0f3F800000, p;
        vote.sync.any.pred p, p, 0xffffffff;
        @!p bra SKIP;
        {multiply}
        SKIP: }}"""
    return asm, ",".join(["=&f"] * num + [str(i) for i in range(num)] + ["f"] * num)


@gluon.jit
def _scale_rows_if_any(x, factor):
    """_scale_rows by a warp where one of its rows has a factor other than 1."""
    NUM: gl.constexpr = x.shape[0] * x.shape[1] // 128  # elements of a thread
    CODE: gl.constexpr = _multiply_if_any(NUM)
    factors = gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout)), 1)
    return gl.inline_asm_elementwise(CODE[0], CODE[1], [x, factors], dtype=gl.float32, is_pure=False, pack=NUM)


@gluon.jit
def _rescale(acc, factor, scores):
    """_scale_rows of the pieces of an output; lazy: most factors are 1."""
    scaled = ()
    for i in gl.static_range(len(acc)):
        scaled += (_scale_rows(acc[i], factor) if scores.lazy is None else _scale_rows_if_any(acc[i], factor),)
    return scaled


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
def _issue_scores(GROUP: gl.constexpr, work, shared, step):
    """Issue the matmuls of the scores (64, BLOCK_N) of this step's tile; nothing waits for them here."""
    ring = shared.k
    stage, parity = _stage(ring, work, step)
    mbarrier.wait(ring.full.index(stage), parity)
    s = _zeros(ring.tiles[0].shape[4])
    for i in gl.static_range(len(ring.tiles)):
        k = _matrix(ring.tiles[i], stage).permute([1, 0])
        s = warpgroup_mma(_matrix(shared.q[i], GROUP), k, s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def _issue_output(work, shared, step, state):
    """Issue the matmuls that add this step's tile to the output (64, HEAD_DIM_V), in pieces; nothing waits for them
    here."""
    ring = shared.v
    stage, parity = _stage(ring, work, step)
    mbarrier.wait(ring.full.index(stage), parity)
    output = ()
    for i in gl.static_range(len(ring.tiles)):
        p = gl.convert_layout(state.p, gl.DotOperandLayout(0, state.acc[i].type.layout, 2))
        output += (warpgroup_mma(p, _matrix(ring.tiles[i], stage), state.acc[i], is_async=True),)
    return output


@gluon.jit
def _wait_for_output(output):
    """The pieces of an output, once their matmuls are done."""
    if len(output) > 1:
        return warpgroup_mma_wait(0, [output[0], output[1]])
    else:
        return (warpgroup_mma_wait(0, [output[0]]),)


@gluon.jit
def _wait_with_weights(output, p):
    """_wait_for_output, and p, which is computed before it."""
    if len(output) > 1:
        first, second, p = warpgroup_mma_wait(0, [output[0], output[1], p])
        return (first, second), p
    else:
        first, p = warpgroup_mma_wait(0, [output[0], p])
        return (first,), p


@gluon.jit
def _step(GROUP: gl.constexpr, work, shared, step, state, scores, MASKED: gl.constexpr):
    """Scores of this step's tile; their softmax overlaps the matmul of the output of the tile before."""
    DTYPE: gl.constexpr = state.p.dtype
    P_LAYOUT: gl.constexpr = state.p.type.layout
    EARLY: gl.constexpr = shared.q[0].shape[0] == 2  # with three groups there are no registers for two P
    s = _issue_scores(GROUP, work, shared, step)
    output = _issue_output(work, shared, step - 1, state)
    s = warpgroup_mma_wait(len(output), [s])
    stage, _ = _stage(shared.k, work, step)
    mbarrier.arrive(shared.k.free.index(stage), count=1)
    origin = work.rows, _start_of(work, shared, step)
    weights, alpha, m_i = _softmax_of(work, s, state.m_i, origin, scores, MASKED)
    l_i = _scale_rows(state.l_i, alpha) + _partial_sums(weights)
    if EARLY:
        p = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
        _end_of_block()
        acc, p = _wait_with_weights(output, p)
    else:
        _end_of_block()
        acc = _wait_for_output(output)
        p = gl.convert_layout(weights.to(DTYPE), P_LAYOUT)
    stage, _ = _stage(shared.v, work, step - 1)
    mbarrier.arrive(shared.v.free.index(stage), count=1)
    return _Softmax(m_i, l_i, _rescale(acc, alpha, scores), p)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    """Zeros (64, COLUMNS) in the layout of wgmma's results."""
    return gl.zeros([GROUP_ROWS, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))


@gluon.jit
def _first_tile(GROUP: gl.constexpr, work, shared, dtype: gl.constexpr, scores):
    """The state of a group after the scores of its first step, of the last tile. Some rows may see none of its keys."""
    mbarrier.wait(shared.q_full.index(GROUP), 0 if work.past is None else work.past.queries & 1)
    s = warpgroup_mma_wait(0, [_issue_scores(GROUP, work, shared, 0)])
    stage, _ = _stage(shared.k, work, 0)
    mbarrier.arrive(shared.k.free.index(stage), count=1)
    origin = work.rows, _start_of(work, shared, 0)
    m_i = gl.full([GROUP_ROWS], scores.sink, gl.float32, gl.SliceLayout(1, s.type.layout))
    weights, alpha, m_i = _softmax_of(work, s, m_i, origin, scores, True)
    l_i = _partial_sums(weights)
    # The sink counts as a weight of 1, a fourth in each of the four sums.
    l_i += gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1) * 0.25
    acc = ()
    for i in gl.static_range(len(shared.v.tiles)):
        acc += (_zeros(shared.v.tiles[i].shape[5]),)
    return _Softmax(m_i, l_i, acc, gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, acc[0].type.layout, 2)))


@gluon.constexpr_function
def _comment(group):
    return f"// group {group}"


@gluon.jit
def _end_of_group(GROUP: gl.constexpr):
    """End the code of a group in a way of its own. LLVM would merge the ends of two groups into one, for which ptxas
    keeps addresses in registers throughout the loops, and spills them."""
    COMMENT: gl.constexpr = _comment(GROUP)
    gl.inline_asm_elementwise(COMMENT, "=r,r", [gl.program_id(2)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _rows_of_group(GROUP: gl.constexpr, start_m, shared):
    """The rows of a group (64,), by an instruction that compilers leave where it is. They would compute what of the
    rows depends on the thread at the start of the program, and spill it until a mask needs it."""
    BLOCK_N: gl.constexpr = shared.k.tiles[0].shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows = start_m + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, LAYOUT))
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [rows], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _attend(GROUP: gl.constexpr, program, shared, results, scores):
    """A group of four warps computes 64 rows of out and lse of each tile of queries of a _Program."""
    if program.series is None:
        _attend_tile(GROUP, program.work, shared, results, scores)
    else:
        past = _nothing_past()
        for i in range(program.series.each):
            start_m = _next_start(program.head, program.series, i, shared)
            work = _Work(program.head, past, start_m, _keys_of(program.head, start_m, shared))
            _attend_tile(GROUP, work, shared, results, scores)
            past = _past_with(work)
    tma.store_wait(0)
    _end_of_group(GROUP)


@gluon.jit
def _attend_tile(GROUP: gl.constexpr, work, shared, results, scores):
    """A group computes its rows of a tile of queries."""
    if work.start_m < work.head.seqlen_q:
        left, right = scores.window
        own = _Work(work.head, work.past, work.start_m, work.keys, _rows_of_group(GROUP, work.start_m, shared))
        state = _first_tile(GROUP, own, shared, results.descs[0].dtype, scores)
        full_start = gl.maximum(1, work.keys.num_tiles - work.keys.full_end)
        full_steps = work.keys.num_tiles - work.keys.left_tiles
        if right is not None:
            for step in range(1, full_start):
                state = _step(GROUP, own, shared, step, state, scores, True)
        for step in range(full_start, full_steps):
            state = _step(GROUP, own, shared, step, state, scores, False)
        if left is not None:
            for step in range(gl.maximum(full_start, full_steps), work.keys.num_tiles):
                state = _step(GROUP, own, shared, step, state, scores, True)
        _store(GROUP, own, shared, results, state)


@gluon.jit
def _store(GROUP: gl.constexpr, work, shared, results, state):
    """Add the first tile to the output of a group's state, and store out and lse."""
    if shared.q_free is not None:
        mbarrier.arrive(shared.q_free.index(GROUP), count=1)
    output = _issue_output(work, shared, work.keys.num_tiles - 1, state)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, state.acc[0].type.layout)
    start_m = work.start_m + GROUP * GROUP_ROWS
    m_i = gl.convert_layout(state.m_i, OF_ROWS)
    norm, lse = softmax_finish(m_i, gl.convert_layout(gl.sum(state.l_i, 1), OF_ROWS))
    if results.lse_ptr is not None:
        rows = start_m + gl.arange(0, GROUP_ROWS, OF_ROWS)
        gl.store(results.lse_ptr + rows, lse, mask=rows < work.head.seqlen_q)
    acc = _wait_for_output(output)
    if work.past is not None:
        stage, _ = _stage(shared.v, work, work.keys.num_tiles - 1)
        mbarrier.arrive(shared.v.free.index(stage), count=1)
        tma.store_wait(0)
    # The buffers are free now. TMA does not store rows past the sequence's end.
    for i in gl.static_range(len(acc)):
        _matrix(shared.out[i], GROUP).store(_scale_rows(acc[i], norm).to(results.descs[i].dtype))
    fence_async_shared()
    _store_pieces(results.descs, work.head.coords_q, start_m, shared.out, GROUP)


@gluon.jit
def _store_pieces(descs, coords, start, tiles, GROUP: gl.constexpr):
    """Start the store of a group's tile to the rows from start on, counted from coords."""
    outer, batch, head, row = coords
    for i in gl.static_range(len(descs)):
        column = i * tiles[0].shape[5]
        _tma_store(descs[i], [outer, batch, head, row + start, column], tiles[i].index(GROUP))


@gluon.jit
def _attend_0(program, shared, results, scores):
    """Group 0, as a function for warp_specialize."""
    _attend(0, program, shared, results, scores)


@gluon.jit
def _attend_1(program, shared, results, scores):
    """Group 1, as a function for warp_specialize."""
    _attend(1, program, shared, results, scores)


@gluon.jit
def _attend_2(program, shared, results, scores):
    """Group 2, as a function for warp_specialize."""
    _attend(2, program, shared, results, scores)


@gluon.jit
def _clear(tile, LAYOUT: gl.constexpr):
    """Store zeros in a matrix in shared memory."""
    COLUMNS: gl.constexpr = tile.shape[1]
    tile.store(gl.zeros([GROUP_ROWS, COLUMNS], tile.dtype, LAYOUT))


@gluon.jit
def _clear_spare_rows(shared, results, head, first, start, end):
    """Clear a program's rows [start, end), at most 64 * GROUPS, counted from `first`, the first row after a packed
    batch's last sequence. results has the pointer to the head's lse of row 0."""
    GROUPS: gl.constexpr = shared.out[0].shape[0]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    start = gl.minimum(gl.maximum(start, 0), end).to(gl.int32)
    end = end.to(gl.int32)
    if start < end:
        for group in gl.static_range(GROUPS):
            for i in gl.static_range(len(results.descs)):
                _clear(_matrix(shared.out[i], group), ROWS)
        fence_async_shared()
        # TMA does not store rows past the end.
        coords = sequence_coords(0, head, first, end, True)
        for group in gl.static_range(GROUPS):
            start_m = start + group * GROUP_ROWS
            _store_pieces(results.descs, coords, start_m, shared.out, group)
            if results.lse_ptr is not None:
                rows = start_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, ROWS))
                minus_inf = gl.full([GROUP_ROWS], MINUS_INF, gl.float32, gl.SliceLayout(1, ROWS))
                gl.store(results.lse_ptr + first + rows, minus_inf, mask=rows < end)
        tma.store_wait(0)


@gluon.jit
def _clear_left_over(shared, results, packed, own, bounds, tile, num_tiles):
    """Clear the spare rows of a tile of a sequence, see `spare_rows`. packed: cu_seqlens of the queries and their rows;
    results has the pointer to the head's lse of row 0."""
    cu_seqlens_ptr, num_rows = packed
    BLOCK_M: gl.constexpr = shared.out[0].shape[0] * GROUP_ROWS
    start_m = tile * BLOCK_M
    if start_m + BLOCK_M > bounds.seqlen_q:
        first = gl.minimum(gl.load(cu_seqlens_ptr + own.num_sequences), num_rows)
        slot = slots_left_over(own.batch * num_tiles + tile, bounds.first_q + bounds.seqlen_q, BLOCK_M)
        start = slot + gl.maximum(bounds.seqlen_q - start_m, 0)
        end = gl.minimum(slot + BLOCK_M, num_rows - first)
        _clear_spare_rows(shared, results, own.head, first, start, end)


@gluon.jit
def _keys_of(head, start_m, shared):
    """The _Keys of the tile of queries that starts at start_m."""
    BLOCK_M: gl.constexpr = shared.q[0].shape[0] * GROUP_ROWS
    BLOCK_N: gl.constexpr = shared.k.tiles[0].shape[4]
    end_m = gl.minimum(start_m + BLOCK_M, head.seqlen_q)
    blocks = visible_range(start_m + head.offset, end_m + head.offset, head.seqlen_k, head.window, BLOCK_N)
    num_tiles = gl.cdiv(blocks.hi - blocks.lo, BLOCK_N)
    return _Keys(
        gl.where(num_tiles > 0, blocks.lo, 0),
        gl.maximum(1, num_tiles),  # rows that see no key have one tile, all of it masked
        (blocks.full_lo - blocks.lo) // BLOCK_N,
        (blocks.full_hi - blocks.lo) // BLOCK_N,
    )


@gluon.jit
def _tile_of(head, series, i):
    """Tile number i of a program; not below num_tiles if there is none.

    Programs take turns, each time in the reverse order, from the last tile on if queries see no later keys. So with an
    even number of tiles all programs of a head take equally long.
    """
    turn = gl.where(i % 2 == 0, series.program, series.num_programs - 1 - series.program)
    tile = i * series.num_programs + turn
    if head.window.right is not None:
        tile = gl.where(tile < series.num_tiles, series.num_tiles - 1 - tile, tile)
    return tile


@gluon.jit
def _next_start(head, series, i, shared):
    """The first query of tile number i of a program; after the last one if there is no such tile."""
    BLOCK_M: gl.constexpr = shared.q[0].shape[0] * GROUP_ROWS
    tile = _tile_of(head, series, i)
    return gl.where(tile < series.num_tiles, tile * BLOCK_M, head.seqlen_q)


@gluon.jit
def _nothing_past():
    """The _Past before a program's first tile."""
    return _Past(gl.to_tensor(0), gl.to_tensor(0))


@gluon.jit
def _past_with(work):
    """The _Past after a _Work."""
    computes = work.start_m < work.head.seqlen_q
    past = work.past
    return _Past(past.queries + computes.to(gl.int32), past.keys + gl.where(computes, work.keys.num_tiles, 0))


@gluon.jit(do_not_specialize=LENGTHS)
def _flash_fwd_hopper_kernel(
    q_desc,
    q_desc_rest,
    k_desc,
    k_desc_rest,
    v_desc,
    v_desc_rest,
    out_desc,
    out_desc_rest,
    lse_ptr,
    lse_stride,
    sinks_ptr,
    seqs,
    seqlen_q,
    seqlen_k,
    num_tiles,
    section_size,
    heads,
    scores,
    per_program,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    LAZY: gl.constexpr,
):
    """One program computes tiles of 64 GROUPS rows of out and lse for one query head of one sequence: one, or
    per_program at most.

    Grid: num_tiles / (per_program or 1), rounded up, * num_heads * batch, in the order of the portable kernel.
    Descriptors are those of `tma_geometry`, one for each piece of a head dimension, or None. lse_ptr None: not wanted.
    The rest as in the portable kernel. LAZY: see `_HeadScores`.
    """
    BLOCK_M: gl.constexpr = GROUPS * GROUP_ROWS
    VARLEN: gl.constexpr = seqs.cu_seqlens_q_ptr is not None
    q_descs = (q_desc,) if q_desc_rest is None else (q_desc, q_desc_rest)
    k_descs = (k_desc,) if k_desc_rest is None else (k_desc, k_desc_rest)
    v_descs = (v_desc,) if v_desc_rest is None else (v_desc, v_desc_rest)
    out_descs = (out_desc,) if out_desc_rest is None else (out_desc, out_desc_rest)
    LAST_FIRST: gl.constexpr = scores.window.right is not None
    num_programs = num_tiles if per_program is None else gl.cdiv(num_tiles, per_program)
    own = assign_work(num_programs, section_size, heads.num, 1, LAST_FIRST and per_program is None)
    bounds = sequence_bounds(seqs, own.batch, seqlen_q, seqlen_k)
    head = _Head(
        sequence_coords(own.batch, own.head, bounds.first_q, bounds.seqlen_q, VARLEN),
        sequence_coords(own.batch, own.head // heads.group_size, bounds.first_k, bounds.seqlen_k, VARLEN),
        bounds.seqlen_q,
        bounds.seqlen_k,
        bounds.offset,
        scores.window,
    )
    slope = None
    if scores.alibi is not None:
        slope = gl.load(row_pointer(scores.alibi, own.batch, 0, own.head)).to(gl.float32)
    sink = load_sink(sinks_ptr, own.head)
    scores = _HeadScores(scores.scale_log2, scores.softcap, slope, scores.window, sink, LAZY)
    q = _allocate(q_descs, GROUPS)
    out, q_free = q, None
    if per_program is not None:
        out, q_free = _allocate(out_descs, GROUPS), _barriers(GROUPS, 1)
    shared = _Shared(
        q,
        _barriers(GROUPS, 1),
        q_free,
        out,
        _Ring(_allocate(k_descs, STAGES), _barriers(STAGES, 1), _barriers(STAGES, GROUPS)),
        _Ring(_allocate(v_descs, STAGES), _barriers(STAGES, 1), _barriers(STAGES, GROUPS)),
    )
    if lse_ptr is not None:
        lse_ptr += (own.head if VARLEN else own.batch_head).to(gl.int64) * lse_stride
    results = _Results(out_descs, lse_ptr)
    packed = seqs.cu_seqlens_q_ptr, seqlen_q
    if per_program is None:
        start_m = own.start * BLOCK_M
        if VARLEN:
            _clear_left_over(shared, results, packed, own, bounds, own.start, num_tiles)
        program = _Program(head, None, _Work(head, None, start_m, _keys_of(head, start_m, shared)))
    else:
        series = _Series(own.start, num_programs, num_tiles, per_program)
        if VARLEN:
            for i in range(per_program):
                tile = _tile_of(head, series, i)
                if tile < num_tiles:
                    _clear_left_over(shared, results, packed, own, bounds, tile, num_tiles)
        program = _Program(head, series, None)
    if lse_ptr is not None:
        lse_ptr += bounds.first_q
    loads = program, shared, q_descs, k_descs, v_descs
    sums = program, shared, _Results(out_descs, lse_ptr), scores
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
    geometries: list  # fields of the descriptors of q, k, v and out, of each for one or two pieces
    counts: tuple  # arguments from seqlen_q to heads
    scores: Scores  # without ALiBi
    per_program: int | None  # tiles of queries of a program; None: one
    constants: dict
    alike: object  # of this plan alone, see `alike_of`


def launch_flash_fwd_hopper(plan, call, out, lse):
    """Launch the kernel of a HopperPlan; the rest as in launch_flash_fwd."""
    q, k, v, *_ = call
    args = (
        *(
            fields and unchecked_descriptor(TensorDescriptor, x, fields)
            for x, pieces in zip((q, k, v, out), plan.geometries)
            for fields in pieces
        ),
        lse,
        0 if lse is None else lse.shape[-1],
        call.options.sinks,
        *common_arguments(call, plan)[:-1],  # no dropout
        plan.per_program,
    )
    alike = alike_of(call, plan, lse)
    launch(_flash_fwd_hopper_kernel, (plan.num_programs,), q.device, args, plan.constants, alike)


def plan_hopper(key, wanted, config=None):
    """The HopperPlan of a CallKey, None where the portable kernel runs. The kernel supports all options but dropout;
    with wanted "auto" it takes calls like those that sweeps time.

    wanted as in `HopperConfig.choose`, which chooses config if it is None.
    """
    if key.has_dropout or not gpu_of(key.arch).wgmma:
        return None
    if not (key.q_aligned and key.kv_aligned and key.suits_tma(0, 1, 2, 3)):
        return None
    problem = key.problem
    is_plain = key.is_plain and not problem.has_sinks and not problem.has_shard
    is_plain = is_plain and problem.window in ((None, None), (None, 0))
    case = FlashCase(key.arch, problem.dtype, *key.head_dims, key.causal, is_plain=is_plain, seqlen_k=key.max_seqlen_k)
    config = config or HopperConfig.choose(case, wanted)
    if config is None:
        return None
    (shape_q, _), (shape_k, _), *_ = problem.layout
    *_, num_rows, num_heads, _ = shape_q
    group_size = num_heads // shape_k[-2]
    num_tiles = tiles_each(key.max_seqlen_q, num_rows, key.batch, config.block_m)
    num_all_heads = num_heads * key.batch
    per_program = _tiles_per_program(config.tiles, num_tiles, num_all_heads, gpu_of(key.arch).num_sms)
    section_size = 1
    if key.causal:
        bytes_per_head = key.max_seqlen_k * sum(key.head_dims) * problem.dtype.itemsize
        section_size = heads_in_l2(bytes_per_head, group_size, num_all_heads)
    rows = GROUP_ROWS.value, config.block_n, config.block_n, GROUP_ROWS.value
    constants = dict(
        BLOCK_N=config.block_n,
        GROUPS=config.groups,
        STAGES=config.num_stages,
        LAZY=True if config.lazy else None,
        num_warps=4,
    )
    return HopperPlan(
        -(-num_tiles // per_program) * num_all_heads,
        [_geometries(*of_tensor, count) for of_tensor, count in zip(key.layouts, rows)],
        (num_rows, shape_k[-3], num_tiles, section_size, Heads(num_heads, group_size)),
        Scores(problem.softmax_scale * LOG2_E.value, problem.softcap, None, Window(*problem.window)),
        per_program if per_program > 1 else None,
        constants,
        object(),
    )


def _tiles_per_program(most, num_tiles, num_heads, num_sms):
    """Tiles of queries of a program: `most`, or half, a quarter, ... of it, so that the waves of programs leave at most
    5 % of the SMs idle; otherwise 1."""
    while most > 1:
        programs = -(-num_tiles // most) * num_heads
        if most <= num_tiles and programs >= 0.95 * num_sms * -(-programs // num_sms):
            return most
        most //= 2
    return 1


def _geometries(shape, strides, block_rows):
    """Fields of the descriptors of both pieces; None for a second one that there is not."""
    pieces = [
        fields | {"layout": gl.NVMMASharedLayout(min(128, 2 * fields["block_shape"][-1]), element_bitwidth=16, rank=5)}
        for fields in tma_geometry(shape, strides, block_rows)
    ]
    return pieces if len(pieces) == 2 else [*pieces, None]
