"""GPUs of the loop model: rates for the cycle model, and SM sizes for occupancy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """`mma_flops` (dense, fp16 or bf16) and `fp32_lanes` are per clock and SM.

    `memory_gbps` is the data sheet's GB/s of `memory_gpu`, since GPUs of one architecture differ in it. The L2 cache
    delivers L2_BYTES_PER_CLOCK to all SMs together.
    """

    name: str
    num_sms: int
    clock_ghz: float
    mma_flops: int
    mma_sync_share: float  # of mma_flops, for matmuls without wgmma
    fp32_lanes: int
    memory_gpu: str
    memory_gbps: int


# L2 bandwidth: NVIDIA A100 Tensor Core GPU Architecture. No document gives another value for Hopper.
L2_BYTES_PER_CLOCK = 5120

# The clock of H100 and H200 is an assumption between base and boost; TFLOP/s scale with it. An H200 differs only in its
# memory (4800 GB/s). The share of mma.sync is from Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
# Architecture via Microbenchmarking", arXiv 2402.13499.
RATES = {
    "sm_80": Rates(
        "A100 SXM",
        num_sms=108,
        clock_ghz=1.41,
        mma_flops=2048,
        mma_sync_share=1.0,
        fp32_lanes=64,
        memory_gpu="A100 80GB SXM",
        memory_gbps=2039,
    ),
    "sm_90": Rates(
        "H100 or H200 SXM",
        num_sms=132,
        clock_ghz=1.755,
        mma_flops=4096,
        mma_sync_share=0.62,
        fp32_lanes=128,
        memory_gpu="H100 SXM",
        memory_gbps=3350,
    ),
}


@dataclass(frozen=True)
class Capacity:
    """Limits of one SM (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    shared_bytes: int
    warps: int
    ctas: int
    registers: int = 65536


CAPACITY = {
    "sm_80": Capacity(shared_bytes=167936, warps=64, ctas=32),
    "sm_86": Capacity(shared_bytes=102400, warps=48, ctas=16),
    "sm_89": Capacity(shared_bytes=102400, warps=48, ctas=24),
    "sm_90": Capacity(shared_bytes=233472, warps=64, ctas=32),
    "sm_100": Capacity(shared_bytes=233472, warps=64, ctas=32),
    "sm_103": Capacity(shared_bytes=233472, warps=64, ctas=32),
    "sm_120": Capacity(shared_bytes=102400, warps=48, ctas=24),
    "sm_121": Capacity(shared_bytes=102400, warps=48, ctas=24),
}
SHARED_BYTES_RESERVED_PER_CTA = 1024
REGISTER_ALLOCATION_UNIT = 256  # per warp
