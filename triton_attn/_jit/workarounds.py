"""Workarounds for the compiler. Each function says what it works around, and on which Triton versions."""

import triton
import triton.language as tl
from triton.language.target_info import current_target

from .args import Strides, View

_IS_3_6: tl.constexpr = tl.constexpr(triton.__version__.startswith("3.6."))
_FENCE_MISSING: tl.constexpr = tl.constexpr(_IS_3_6.value and not triton.knobs.runtime.interpret)


def tanh_spills(head_dim):
    """Whether LICM must be off (`disable_licm`) in a loop that computes tanh of its scores.

    LICM hoists tanh's constants. At head dim 320 on sm_90 Triton 3.6.0 then spills 84 bytes; 3.9.0 does not.
    """
    return head_dim > 256


def may_hoist(kernel, multiplies_shared_memory, head_dim, head_dim_v):
    """Whether LICM may be on (`HOIST`) in a loop of the backward pass: "dkdv", "dq" or "fused".

    Triton 3.6 to 3.9 hoist every invariant and do not count registers. The five matmuls of "fused" leave no registers
    for them. Nor do wide heads where matmuls read shared memory: on sm_90 dkdv would spill 1 KB at head_dim 256.
    """
    if kernel == "fused":
        return False
    narrow = head_dim + head_dim_v <= (255 if kernel == "dq" else 256)
    return narrow or not multiplies_shared_memory


@triton.constexpr_function
def _has_wgmma():
    """Whether the kernel is compiled for sm_90."""
    target = current_target()
    return target is not None and target.arch == 90


@triton.constexpr_function
def _has_ptx():
    """Whether the kernel is compiled for an NVIDIA GPU."""
    target = current_target()
    return target is not None and target.backend == "cuda" and not triton.knobs.runtime.interpret


@triton.constexpr_function
def fills_registers(head_dim, head_dim_v):
    """1 on sm_90 where sums wider than 256 columns leave few registers for the rest of a kernel; 0 elsewhere.

    Full tiles come first then: ptxas of Triton 3.6.0 keeps the descriptors of the matmuls of one loop in uniform
    registers, and computes those of the next in others, which takes up to 150 instructions per trip, and spills in the
    backward pass. There, what stores the sums is `computed_again` after the loops.
    """
    return int(_has_wgmma() and max(head_dim, head_dim_v) > 256)


@triton.jit
def reciprocal(x):
    """1 / x for x of at least 2^-126 in fp32, with a relative error of 2^-23 at most; 0 where that is below 2^-126.

    Triton's division by a tensor is div.full, which scales both operands lest 1 / x be subnormal: four instructions
    more, and a register that is live during the reciprocal.
    """
    if _has_ptx():
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def fence_copies():
    """Fence between the loads of a loop and their matmul of 64 rows or more, so that wgmma sees what cp.async copied.

    Only Triton 3.6 leaves this proxy fence out (triton PR 9610). It waits for the copies, and puts a barrier, where the
    loads are: before this fence.
    """
    if _FENCE_MISSING and _has_wgmma():
        tl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def computed_again(x):
    """The same int32, which the compiler takes for another number: what follows from it is computed again.

    Without it LLVM keeps in registers, throughout a loop, what is computed from x before the loop and used after it. In
    paged attention and MLA decode these are the rows of the output. On sm_90, Triton 3.6.0 and 3.9.0, they take up to
    38 registers: with 128 rows of 64 columns two programs do not fit on an SM, and MLA's nodes of a prefix tree spill
    up to 308 bytes. On sm_80 it changes little, in both directions.
    """
    if _has_wgmma():
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    else:
        return x


@triton.jit
def multiple_of(stride, VECTOR: tl.constexpr):
    """The same stride, which the compiler then knows to be a multiple of VECTOR.

    Triton 3.6 to 3.9 specialise integers on divisibility by 16 only. With a stride of 8 elements of 2 bytes they load
    single elements.
    """
    return stride // VECTOR * VECTOR


@triton.jit
def in_vectors(view, VECTOR: tl.constexpr):
    """The same View, with strides that are `multiple_of` VECTOR."""
    batch_stride, row_stride, head_stride = view.strides
    strides = multiple_of(batch_stride, VECTOR), multiple_of(row_stride, VECTOR), multiple_of(head_stride, VECTOR)
    return View(view.ptr, Strides(strides[0], strides[1], strides[2]))


@triton.jit
def of_head(view, head, VECTOR: tl.constexpr):
    """The View of one head, whose addresses the compiler then knows to be multiples of VECTOR elements.

    Triton 3.6 to 3.9 specialise pointers on divisibility by 16 bytes only. From others they load single elements.
    """
    ptr = view.ptr + tl.cast(head, tl.int64) * view.strides.head
    BYTES: tl.constexpr = VECTOR * ptr.dtype.element_ty.primitive_bitwidth // 8
    if VECTOR > 1 and BYTES < 16:
        ptr = tl.multiple_of(ptr, BYTES)
    return View(ptr, view.strides)


@triton.jit
def loaded_once(x):
    """The same vector, which stays loaded in one layout.

    Triton 3.6 moves a change of the layout before the load of a vector that is shorter than the number of threads. In
    that of a tile of scores each thread would copy 16 scales to shared memory, not one, and compute 16 addresses. It
    does not move the change before a sum. Triton 3.9 does not move it, and the sum costs up to 1 % of `lock` there.
    """
    return tl.sum(x[:, None], 1)


@triton.jit
def dot_in_if(a, b, acc, always, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b.T under a condition that always holds, but that the compiler cannot evaluate.

    If the result of one wgmma is the input of another, Triton places all warps along the rows: with 64 rows both
    warpgroups would compute the same scores. The `if` hides one matmul from the next. Two ifs with the same condition
    would be merged. Seen on Triton 3.6.0 and 3.9.0.
    """
    if always:
        acc = tl.dot(a, b.T, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def one_trip(start, end):
    """`one` of `dot_once` for a tile that begins at start, before end: the end of its Blocks or of the sequence."""
    return (start < end).to(tl.int32)


@triton.jit
def apart(acc, one):
    """The same accumulator of a first `dot_once`, each element in a register of its own.

    Equal elements, such as zeros, would be one register, and LLVM copies it after wgmma.fence, which has to follow such
    copies. The compiler does not join what it cannot read. Triton 3.9 takes the result of instructions that may have
    side effects through shared memory, which 64 x 64 scores with 384 columns leave no registers for. Others of equal
    operands are joined, and moved out of the loop: hence the number of an element, which depends on `one` too. Triton
    3.6 needs none of this, and spills what the numbers take.
    """
    if _has_wgmma():
        if _IS_3_6:
            return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, False, 1)
        else:
            columns = tl.arange(0, acc.shape[1]) + one
            number = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + columns[None, :]
            return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [acc, number], tl.float32, True, 1)
    else:
        return acc


@triton.jit
def dot_once(a, b, acc, one, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b.T in a loop of one trip: `one` is 1, but the compiler cannot know it.

    It does what `dot_in_if` does, for a loop without software pipeline. Triton 3.6 moves changes of layout into an
    `if`: the backward pass would convert S and dP in fp32, and both warpgroups would compute all of dS.
    """
    for _ in tl.range(0, one, num_stages=1):
        acc = tl.dot(a, b.T, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def dot_in_ifs(a, b, acc, start, blocks, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b.T for a tile of keys that begins at start, one of the Blocks: each piece in a `dot_in_if`."""
    acc = dot_in_if(a[0], b[0], acc, start < blocks.hi, INPUT_PRECISION)
    if len(a) > 1:
        acc = dot_in_if(a[1], b[1], acc, start >= blocks.lo, INPUT_PRECISION)
    return acc
