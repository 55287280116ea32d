"""Two kernels, tested on a machine without a GPU. docs/testing-without-a-gpu.md explains the steps.

    TRITON_INTERPRET=1 python examples/without_a_gpu.py    # interpreted, then under guard
    python examples/without_a_gpu.py                       # compiled, then emulated, then without a barrier

The first kernel is plain Triton. The second is Gluon for Hopper: one warp loads tiles by TMA, four others sum them.
Triton interprets or compiles for a whole process. Gluon has no interpreter.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_attn.toolchain import EmulationError, MemoryAccessError, compile_only, emulate, fix_interpreter, guard

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8


# --- the plain kernel
@triton.jit
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, DIM: tl.constexpr, BARRIER: tl.constexpr):
    """Rotary positions, in place: one program turns the pairs (x[i], x[i + DIM / 2]) of one row."""
    row = tl.program_id(0)
    i = tl.arange(0, DIM)
    x = tl.load(x_ptr + row * DIM + i)
    partner = tl.load(x_ptr + row * DIM + (i + DIM // 2) % DIM)
    cos = tl.load(cos_ptr + row * (DIM // 2) + i % (DIM // 2))
    sin = tl.load(sin_ptr + row * (DIM // 2) + i % (DIM // 2))
    if BARRIER:
        tl.debug_barrier()  # before a warp stores, every warp has loaded
    tl.store(x_ptr + row * DIM + i, x * cos + tl.where(i < DIM // 2, -partner, partner) * sin)


def rotate(num_programs=3, barrier=True):
    x, (cos, sin) = torch.randn(3, 256), torch.randn(2, 3, 128)
    x1, x2 = x.double().chunk(2, dim=1)
    rotate_kernel[(num_programs,)](x, cos, sin, DIM=256, BARRIER=barrier)
    return x, torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=1)


# --- the Gluon kernel
ROWS = gl.constexpr(64)  # of a tile
COLUMNS = gl.constexpr(64)
STAGES = gl.constexpr(2)  # tiles in shared memory


@gluon.jit
def load_tiles(x_desc, tiles, full, free, num_tiles, FORGET: gl.constexpr):
    for step in range(num_tiles):
        stage, parity = step % STAGES, step // STAGES & 1
        if FORGET != "free":
            mbarrier.wait(free.index(stage), parity ^ 1)  # its last tile has been added
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        tma_load(x_desc, [step * ROWS, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def add_tiles(out_ptr, tiles, full, free, num_tiles, FORGET: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    sums = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    for step in range(num_tiles):
        stage, parity = step % STAGES, step // STAGES & 1
        if FORGET != "full":
            mbarrier.wait(full.index(stage), parity)  # the copy is over
        sums += tiles.index(stage).load(LAYOUT).to(gl.float32)
        mbarrier.arrive(free.index(stage), count=1)
    gl.store(out_ptr + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT)), gl.sum(sums, 0))


@gluon.jit
def column_sums_kernel(x_desc, out_ptr, num_tiles, FORGET: gl.constexpr):
    tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, COLUMNS], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    gl.warp_specialize(
        [
            (add_tiles, (out_ptr, tiles, full, free, num_tiles, FORGET)),
            (load_tiles, (x_desc, tiles, full, free, num_tiles, FORGET)),
        ],
        [1],  # warps of the second, and their registers; the first has the launch's own
        [24],
    )


def column_sums(forget=None):
    x, out = torch.randn(317, 64).half(), torch.empty(64)
    tile = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    descriptor = TensorDescriptor.from_tensor(x, [64, 64], tile)
    column_sums_kernel[(1,)](descriptor, out, triton.cdiv(317, 64), FORGET=forget)
    return out, x.double().sum(0)


def check(computed, expected):
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-4)


# --- what sees what
def interpret():
    fix_interpreter()
    check(*rotate())
    print("rotate_kernel, interpreted: right")
    with guard() as accesses:
        check(*rotate())
    loaded = ", ".join(f"{count} from {name}" for name, count in accesses.bytes_loaded.items())
    print(f"under guard: right; bytes loaded: {loaded}")
    try:
        with guard():
            rotate(num_programs=4)
    except MemoryAccessError as error:
        print(f"under guard, a program too many: {error}")
    check(*rotate(barrier=False))
    print("without its barrier: right, as far as the interpreter can tell")


def compile_for_gpus():
    for arch, call in [("sm_80", rotate), ("sm_90", rotate), ("gfx942", rotate), ("sm_90", column_sums)]:
        with compile_only(arch) as launches:
            call()  # computes nothing
        for launch in launches:
            print(
                f"{launch.name} for {arch}: {launch.registers} registers, {launch.spill_bytes} bytes spilled, "
                f"{launch.shared_bytes} bytes of shared memory{', TMA' if launch.uses_tma else ''}"
            )


def run_in_the_emulator():
    for arch, call in [("sm_80", rotate), ("sm_90", rotate), ("sm_90", column_sums)]:
        with emulate(arch) as launches:
            check(*call())
        for launch in launches:
            print(f"{launch.name} on {arch}: right; {launch.instructions} warp instructions")
    for title, call, changed in [
        ("rotate_kernel without its barrier", rotate, {"barrier": False}),
        ("column_sums_kernel without the wait for `full`", column_sums, {"forget": "full"}),
        ("column_sums_kernel without the wait for `free`", column_sums, {"forget": "free"}),
    ]:
        print(f"\n{title}:")
        try:
            with emulate("sm_90"):
                call(**changed)
        except EmulationError as error:
            print(error)


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        interpret()
    else:
        compile_for_gpus()
        run_in_the_emulator()
