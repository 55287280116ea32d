"""What kernels do for the compiler's sake: each function says what it works around, and on which Triton versions."""

import triton
import triton.language as tl
from triton.language.target_info import current_target

from .args import Strides, View

_FENCE_MISSING: tl.constexpr = tl.constexpr(
    triton.__version__.startswith("3.6.") and not triton.knobs.runtime.interpret
)


def tanh_spills(head_dim):
    """Whether a loop that takes tanh of its scores must not hoist. For `disable_licm`.

    LICM hoists tanh's constants. At head_dim > 192 on sm_90 Triton 3.6.0 then spills up to 20 bytes, 3.9.0 none.
    """
    return head_dim > 192


def may_hoist(kernel, multiplies_shared_memory, head_dim, head_dim_v):
    """Whether a loop of the backward pass, "dkdv", "dq" or "fused", may hoist what is the same in every trip: `HOIST`.

    Triton hoists all that it can and does not weigh registers (LICM in 3.6 to 3.9). Five matmuls leave none to hold it,
    nor do wide ones where matmuls read shared memory: on sm_90 at head dim 256 dkdv would spill a kilobyte.
    """
    if kernel == "fused":
        return False
    narrow = head_dim + head_dim_v <= (255 if kernel == "dq" else 256)
    return narrow or not multiplies_shared_memory


@triton.constexpr_function
def _has_wgmma():
    target = current_target()
    return target is not None and target.arch == 90


@triton.jit
def fence_copies():
    """Between the loads of a loop and their matmul, of 64 rows or more: wgmma is to see what cp.async copied.

    Triton 3.6 alone puts no proxy fence there (triton PR 9610). It puts the wait for the copies, and a barrier, where
    the loads are, so before this one.
    """
    if _FENCE_MISSING and _has_wgmma():
        tl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def in_vectors(view, VECTOR: tl.constexpr):
    """The View, so that the compiler sees that VECTOR divides its strides.

    Triton looks for the divisor 16 alone, and a stride of 8 elements of 2 bytes would be loaded element by element.
    """
    batch_stride, row_stride, head_stride = view.strides
    strides = Strides(batch_stride // VECTOR * VECTOR, row_stride // VECTOR * VECTOR, head_stride // VECTOR * VECTOR)
    return View(view.ptr, strides)


@triton.jit
def multiple_of(stride, VECTOR: tl.constexpr):
    """A stride that VECTOR divides, so that the compiler sees it, as in `in_vectors`."""
    return stride // VECTOR * VECTOR


@triton.jit
def dot_in_if(a, b, acc, always, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b.T under a condition that always holds, which the compiler cannot know.

    Where wgmma's results feed each other Triton lays all warps along rows: with 64 rows both warpgroups would compute
    the same scores. An `if` hides one matmul from the next; two with the same condition would become one. Seen on
    Triton 3.6.0 and 3.9.0.
    """
    if always:
        acc = tl.dot(a, b.T, acc, input_precision=INPUT_PRECISION)
    return acc


def halve_widest(pieces):
    """The widths of two pieces of a tile; for one of 512 columns 256 and 256, so that fewer registers are live.

    No default config of MLA decode spills without it (Triton 3.6.0 and 3.9.0); on gfx942 it halves the shared memory.
    """
    return (256, 256) if pieces[0] > 256 else pieces
