"""Launches, and what they depend on: the GPU's architecture, the arithmetic for fp32, the current device."""

import torch
import triton

from .checks import fail
from .gpu import gpu_arch, gpu_of

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from ..toolchain import fix_interpreter

    fix_interpreter()


def arch_of(tensor):
    """ "sm_90", "gfx942", ..., or "interpreter"."""
    if tensor.is_cuda:
        return gpu_arch(tensor.device.index)
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def input_precision(dtype, arch):
    """The input_precision of tl.dot for a dtype; fp32 follows torch.get_float32_matmul_precision()."""
    if dtype != torch.float32:
        return "ieee"
    wanted = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    return "ieee" if gpu_of(arch).is_amd and wanted == "tf32x3" else wanted


def launch(kernel, grid, device, args, constants):
    """kernel[grid](*args, **constants) on the given device, without the cost of creating kernel[grid]."""
    if grid[0] >= 2**31:
        fail("the call's tiles", "fewer than 2**31", grid[0])
    if device.index is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **constants)
    else:
        kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **constants)


def hold_pinned(tensors, device):
    """Keep pinned memory from being allocated again before the device's current stream got so far.

    torch's allocator waits for transfers to and from such memory, but does not know of kernels that use it. So this
    transfers one element of each tensor that is not on the device.
    """
    for x in tensors:
        if x.device != device and x.numel():
            x.as_strided((1,), (1,)).to(device, non_blocking=True)
