"""Device and versions of a machine; on a GPU also the measured roofs that other figures are compared with."""

import platform
import time

import torch
import triton

from perf.harness.device import gpu_name, has_gpu, versions
from perf.harness.timing import time_one

COPY, MATMUL = "copy, GB/s", "bf16 matmul, TFLOP/s"


def copy_bandwidth(size=2**30):
    """GB/s of a copy of this many bytes; reads and writes both count."""
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_one(lambda: target.copy_(source)).p50 / 1e6


def read_bandwidth(size=2**30):
    """GB/s of a maximum over this many bytes. It writes almost nothing, like a decode step."""
    source = torch.zeros(size // 2, dtype=torch.bfloat16, device="cuda")
    return source.nbytes / time_one(source.amax).p50 / 1e6


def matmul_rate(size=8192):
    """TFLOP/s of a square bf16 matmul."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / time_one(lambda: a @ b).p50 / 1e9


@triton.jit
def _empty_kernel():
    pass


def launch_time(calls=1000):
    """Microseconds from one launch of an empty kernel to the next."""
    _empty_kernel[(1,)]()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        _empty_kernel[(1,)]()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def describe():
    """{name: value} of this machine; roofs only if there is a GPU."""
    about = {
        "device": gpu_name() or f"{platform.machine()} CPU, no GPU",
        "kernels run": "on the GPU"
        if has_gpu()
        else "in Triton's interpreter on the CPU; compiled for a GPU to predict",
        "python": platform.python_version(),
        **versions(),
    }
    if has_gpu():
        about |= {
            COPY: round(copy_bandwidth()),
            "read, GB/s": round(read_bandwidth()),
            MATMUL: round(matmul_rate()),
            "launch, us": round(launch_time(), 1),
        }
    return {what: value for what, value in about.items() if value is not None}
