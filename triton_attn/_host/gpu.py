"""Facts about GPUs: one entry per architecture, which all other code uses."""

import functools
from dataclasses import dataclass, replace

import torch

from .checks import fail


@dataclass(frozen=True)
class Gpu:
    """One architecture.

    `configs` names the architecture whose default configs it takes, in every kernel family: its own, or one with the
    same matrix instructions and no more shared memory. Without a GPU, calls are planned for the `num_sms` of `device`.
    """

    arch: str  # "sm_90", "gfx942"
    configs: str
    shared_bytes: int  # shared memory (AMD: LDS) that one program may use
    device: str
    num_sms: int  # AMD: compute units
    tma: bool = False
    wgmma: bool = False
    tensor_memory: bool = False  # the accumulators of tcgen05
    native_fp8: tuple = ()  # mantissa bits of the fp8 formats that an instruction converts
    warp_size: int = 32

    @property
    def is_amd(self):
        return self.arch.startswith("gfx")

    @property
    def multiplies_shared_memory(self):
        """Whether matrix instructions read their operands from shared memory, in tiles of 64 rows or more."""
        return self.wgmma or self.tensor_memory

    @property
    def uses_mma_sync(self):
        """Whether warps multiply what they have in their registers (NVIDIA)."""
        return not self.is_amd and not self.multiplies_shared_memory

    def buffers(self, num_stages):
        """Number of tiles that a pipelined loop keeps in shared memory. mma.sync reads its operands into registers,
        which frees one tile."""
        return num_stages if self.multiplies_shared_memory else num_stages - 1

    def lacks(self, shared_bytes):
        """Why a program cannot use so many bytes of shared memory; None if it can."""
        if shared_bytes <= self.shared_bytes:
            return None
        return f"{shared_bytes} bytes of shared memory, {self.arch} has {self.shared_bytes}"

    def lacks_registers(self, registers):
        """Why a thread should not hold tiles in so many 32-bit registers; None if it may."""
        limit = 448 if self.is_amd else 224
        if registers <= limit:
            return None
        return f"{registers} registers a thread for tiles, {limit} leave room for the rest"


_E5M2, _E4M3 = 2, 3
# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", the most per block;
# AMD CDNA3 and CDNA4 ISA. fp16 has e5m2's exponent, so that every NVIDIA GPU converts it. gfx942 has fp8 formats with
# another bias, and Triton converts those of gfx950 in software too.
_LISTED = (
    Gpu("sm_80", "sm_80", 166912, "A100", 108, native_fp8=(_E5M2,)),
    Gpu("sm_86", "sm_86", 101376, "RTX 3090", 82, native_fp8=(_E5M2,)),
    Gpu("sm_89", "sm_86", 101376, "RTX 4090", 128, native_fp8=(_E5M2, _E4M3)),
    Gpu("sm_90", "sm_90", 232448, "H100 SXM", 132, tma=True, wgmma=True, native_fp8=(_E5M2, _E4M3)),
    Gpu("sm_100", "sm_100", 232448, "B200", 148, tma=True, tensor_memory=True, native_fp8=(_E5M2, _E4M3)),
    Gpu("sm_103", "sm_100", 232448, "B300", 148, tma=True, tensor_memory=True, native_fp8=(_E5M2, _E4M3)),
    Gpu("sm_120", "sm_120", 101376, "RTX 5090", 170, tma=True, native_fp8=(_E5M2, _E4M3)),
    Gpu("sm_121", "sm_120", 101376, "GB10", 48, tma=True, native_fp8=(_E5M2, _E4M3)),
    Gpu("gfx942", "gfx942", 65536, "MI300X", 304, warp_size=64),
    Gpu("gfx950", "gfx942", 163840, "MI355X", 256, warp_size=64),
)
GPUS = {gpu.arch: gpu for gpu in _LISTED}
INTERPRETER = Gpu("interpreter", "interpreter", 2**31, "CPU", 132)


@functools.cache
def gpu_of(arch):
    """The Gpu of an architecture. One that is not listed counts as the nearest below it, an AMD one as gfx942.

    Raises:
        ValueError: a compute capability below 8.0, which Triton does not support.
    """
    if arch == INTERPRETER.arch:
        return INTERPRETER
    if arch in GPUS:
        return GPUS[arch]
    if arch.startswith("gfx"):
        return replace(GPUS["gfx942"], arch=arch)
    number = int(arch.removeprefix("sm_"))
    below = [gpu for gpu in _LISTED if not gpu.is_amd and int(gpu.arch.removeprefix("sm_")) <= number]
    if not below:
        fail("the GPU", "compute capability 8.0 or more", arch)
    return replace(below[-1], arch=arch)


def has_wgmma(arch):
    """Whether an architecture has wgmma."""
    return gpu_of(arch).wgmma


def repeats_chains(arch, rows, num_warps):
    """Whether the warpgroups of a tile would repeat each other's matmuls, if one fed the next (see `dot_in_if`)."""
    return has_wgmma(arch) and 64 <= rows < 16 * num_warps


def repeats_rows(arch, rows, num_warps):
    """Whether so few rows have work for a part of the warps only, if one matmul feeds the next. With tensor memory, and
    on AMD GPUs, the warps share a matmul in another way."""
    gpu = gpu_of(arch)
    return not (gpu.is_amd or gpu.tensor_memory) and rows < 16 * num_warps


@functools.cache
def gpu_arch(index):
    """The architecture of a GPU of this machine."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def count_sms(device, arch):
    """Number of SMs of a device; without a GPU, that of the device listed for arch."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return gpu_of(arch).num_sms
