"""What a launch must know of the device: its architecture, its arithmetic for fp32, the current device."""

import functools

import torch
import triton

from .checks import fail

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from ..testing import fix_interpreter

    fix_interpreter()


@functools.cache
def gpu_arch(index):
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(tensor):
    """ "sm_90", "gfx942", ..., or "interpreter"."""
    if tensor.is_cuda:
        return gpu_arch(tensor.device.index)
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


@functools.cache
def num_processors(device):
    """Streaming multiprocessors (AMD: compute units); those of an H100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def input_precision(dtype, arch):
    """How tl.dot multiplies this dtype: fp32 follows torch.get_float32_matmul_precision()."""
    if dtype != torch.float32:
        return "ieee"
    wanted = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    return "ieee" if arch.startswith("gfx") and wanted == "tf32x3" else wanted


def launch(kernel, grid, device, *args, **constants):
    """kernel[grid](*args, **constants) on the given device."""
    launch_packed(kernel, grid, device, args, constants)


def launch_packed(kernel, grid, device, args, constants):
    """launch for a hot path: nothing is unpacked on the way, and kernel[grid] makes no bound function."""
    if grid[0] >= 2**31:
        fail("the call's tiles", "fewer than 2**31", grid[0])
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **constants)
    else:
        kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=True, **constants)
