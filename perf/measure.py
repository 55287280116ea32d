"""Throughput on the GPU of this machine. Nothing is timed before its result was found right."""

from dataclasses import replace

import torch

from perf.checks import check_gradients, check_sample
from perf.device import gpu_name, versions
from perf.results import MEASURED, Row
from perf.timing import time_interleaved


def throughput(problem, dtype, providers, roof, device="cuda"):
    """A row for each of {name: provider} (perf/providers.py); one that fails has no figures and a note that says why.

    `roof` is the TFLOP/s that a matrix product reached on this GPU.
    """
    torch.manual_seed(0)
    shape = (problem.batch, problem.seqlen, problem.num_heads, problem.head_dim)
    q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype), device=device) for _ in range(3))
    functions, failures = {}, {}
    for name, provider in providers.items():
        try:
            attention = provider(problem, device)
            check_sample(attention(q, k, v), q, k, v, problem.causal)
            if problem.direction != "forward":
                short = replace(problem, batch=1, seqlen=min(problem.seqlen, 256), num_heads=2)
                check_gradients(provider(short, device), short, q.dtype, device)
            functions[name] = _pass(problem.direction, attention, q, k, v)
        except Exception as error:  # a peer may fail in any way of its own
            failures[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    times = time_interleaved(functions)
    return [_row(name, problem, dtype, times.get(name), roof, failures.get(name, "")) for name in providers]


def _pass(direction, attention, q, k, v):
    """What is timed: the forward, the backward of one kept forward, or one of each."""
    if direction == "forward":
        return lambda: attention(q, k, v)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(v)
    if direction == "both":
        return lambda: torch.autograd.grad(attention(*inputs), inputs, dout)
    out = attention(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _row(provider, problem, dtype, time, roof, note):
    figures = {}
    if time is not None:
        tflops = problem.flops / time.p50 / 1e9
        figures = {
            "p20_ms": time.p20,
            "p50_ms": time.p50,
            "p80_ms": time.p80,
            "tflops": tflops,
            "gbps": problem.bytes(element_size=2) / time.p50 / 1e6,
            "roof_share": tflops / roof,
        }
    return Row(
        **problem.columns(),
        **figures,
        **versions(),
        provider=provider,
        dtype=dtype,
        gpu=gpu_name(),
        source=MEASURED,
        note=note,
    )
