"""A fence that Triton 3.6 leaves out."""

import triton
import triton.language as tl
from triton.language.target_info import current_target

_MISSING: tl.constexpr = tl.constexpr(triton.__version__.startswith("3.6.") and not triton.knobs.runtime.interpret)


@triton.constexpr_function
def _has_wgmma():
    target = current_target()
    return target is not None and target.arch == 90


@triton.jit
def fence_copies():
    """Between the loads of a loop and their product, of 64 rows or more: wgmma is to see what cp.async copied.

    Triton 3.6 alone puts no proxy fence there (triton PR 9610). It puts the wait for the copies, and a barrier, where
    the loads are, so before this one.
    """
    if _MISSING and _has_wgmma():
        tl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)
