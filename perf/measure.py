"""Throughput against sequence length, measured on the GPU of this machine."""

import torch
from tqdm import tqdm

from perf import machine
from perf.checks import check_output
from perf.device import gpu_name, versions
from perf.providers import PROVIDERS
from perf.results import MEASURED, Row
from perf.timing import time_interleaved


def flash_forward(problems, dtype):
    """Rows of every provider for each problem; a provider that fails has a row that says why."""
    roof = machine.matmul_rate()
    for problem in tqdm(problems, desc=f"measuring on {gpu_name()}", unit="shape"):
        torch.manual_seed(0)
        shape = (problem.batch, problem.seqlen, problem.num_heads, problem.head_dim)
        q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype), device="cuda") for _ in range(3))
        functions, failures = {}, {}
        for name, provider in PROVIDERS.items():
            try:
                functions[name] = _checked(provider, problem, q, k, v)
            except Exception as error:  # a peer may fail in any way; ours too is recorded, not hidden
                failures[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        times = time_interleaved(functions)
        for name in PROVIDERS:
            yield _row(name, problem, dtype, times.get(name), roof, failures.get(name, ""))


def _checked(provider, problem, q, k, v):
    attention = provider(problem, "cuda")
    check_output(attention(q, k, v), q, k, v, problem.causal)
    return lambda: attention(q, k, v)


def _row(name, problem, dtype, time, roof, note):
    tflops = time and problem.flops / time.p50 / 1e9
    return Row(
        **problem.columns(),
        dtype=dtype,
        provider=name,
        p20_ms=time and time.p20,
        p50_ms=time and time.p50,
        p80_ms=time and time.p80,
        tflops=tflops,
        gbps=time and problem.bytes(element_size=2) / time.p50 / 1e6,
        roof_share=time and tflops / roof,
        gpu=gpu_name(),
        **versions(),
        source=MEASURED,
        note=note,
    )
