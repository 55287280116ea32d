"""Throughput on the GPU of this machine. Nothing is timed before its result was found right."""

from dataclasses import replace

import torch

from perf.checks import check_gradients, check_sample
from perf.device import gpu_name, versions
from perf.results import MEASURED, Row
from perf.timing import time_interleaved


def throughput(problem, dtype, providers, roof, device="cuda"):
    """A row for each of {name: provider} (perf/providers.py); one that fails has no figures and a note that says why.

    `roof` is what bounds the problem's figure on this GPU, measured: TFLOP/s of a matrix product, GB/s of a copy.
    """
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=getattr(torch, dtype), device=device) for shape in problem.shapes]
    prepare = {"flash": _checked_pass, "paged": _checked_step}[problem.family]
    functions, failures = {}, {}
    for name, provider in providers.items():
        try:
            functions[name] = prepare(problem, provider, *inputs)
        except Exception as error:  # a peer may fail in any way of its own
            failures[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    times = time_interleaved(functions)
    return [_row(name, problem, dtype, times.get(name), roof, failures.get(name, "")) for name in providers]


def _checked_pass(problem, provider, q, k, v):
    attention = provider(problem, q.device)
    check_sample(attention(q, k, v), q, k, v, problem.causal)
    if problem.direction != "forward":
        short = replace(problem, batch=1, seqlen=min(problem.seqlen, 256), num_heads=2)
        check_gradients(provider(short, q.device), short, q.dtype, q.device)
    return _pass(problem.direction, attention, q, k, v)


def _checked_step(problem, provider, q, k_cache, v_cache):
    step = provider(problem, q, k_cache, v_cache)
    check_sample(step(), q, k_cache, v_cache, causal=False)  # the newest token sees all
    return step


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
        figures = {
            "p20_ms": time.p20,
            "p50_ms": time.p50,
            "p80_ms": time.p80,
            "tflops": problem.flops / time.p50 / 1e9,
            "gbps": problem.bytes(getattr(torch, dtype).itemsize) / time.p50 / 1e6,
        }
        figures["roof_share"] = figures[problem.figure] / roof
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
