"""Measured throughput on this machine's GPU. Every result is checked before it is timed."""

import traceback
from dataclasses import replace
from functools import partial

import torch

from perf.harness.checks import check_gradients, check_latent_decode, check_latent_prefill, check_sample
from perf.harness.device import gpu_name, versions
from perf.harness.isolation import describe
from perf.harness.timing import time_interleaved
from perf.results import MEASURED, Row
from perf.workloads.problems import ChunkProblem, DecodeProblem, LatentDecodeProblem, LatentPrefillProblem, Problem
from perf.workloads.providers import latent_pages
from triton_attn._host.latent import read_latent_cache


def throughput(problem, dtype, providers, roof, device="cuda", tracebacks=None, errors=None, **timing):
    """A row for each of {name: provider} (perf/workloads/providers.py). A provider that fails has no figures and a note
    with the reason.

    `roof` is the measured bound of the problem's figure on this GPU: TFLOP/s of a matmul or GB/s of a copy; None if it
    is unknown. Two dicts, if given, receive more: `tracebacks` those of providers that failed, `errors` the Closeness
    of the others' outputs. `timing` goes to `time_interleaved`.
    """
    inputs = _inputs(problem, dtype, device)
    prepare = PREPARE[type(problem)]
    functions, failures = {}, {}
    for name, provider in providers.items():
        try:
            functions[name], closeness = prepare(problem, provider, *inputs)
            if errors is not None:
                errors[name] = closeness
        except Exception as error:  # a peer may raise any exception
            failures[name] = describe(error)
            if tracebacks is not None:
                tracebacks[name] = traceback.format_exc()
    times = time_interleaved(functions, **timing)
    return [_row(name, problem, dtype, times.get(name), roof, failures.get(name, "")) for name in providers]


def compile_all(problem, dtype, providers, device="cuda"):
    """Call each provider once, as `throughput` would time it, so that later processes find its kernels in the disk
    caches.
    """
    inputs = _inputs(problem, dtype, device)
    for provider in providers.values():
        function, _ = PREPARE[type(problem)](problem, provider, *inputs)
        function()


def _inputs(problem, dtype, device):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=getattr(torch, dtype), device=device) for shape in problem.shapes]


def _checked_pass(problem, provider, q, k, v):
    attention = provider(problem, q.device)
    closeness = check_sample(attention(q, k, v), q, k, v, problem.causal)
    if problem.direction != "forward":
        short = replace(problem, batch=1, seqlen=min(problem.seqlen, 256), num_heads=2)
        check_gradients(provider(short, q.device), short, q.dtype, q.device)
    return _pass(problem.direction, attention, q, k, v), closeness


def _checked_step(problem, provider, q, k_cache, v_cache):
    step = provider(problem, q, k_cache, v_cache)
    return step, check_sample(step(), q, k_cache, v_cache, causal=True)


def _checked_latent_step(problem, provider, q, rows):
    step = provider(problem, q, rows)
    ends = rows[[0, -1]]  # the rows in the cache
    cache, _, block_table = latent_pages(replace(problem, batch=2), ends)
    held = read_latent_cache(cache[block_table.long()], problem.kv_lora_rank, problem.qk_rope_head_dim)
    held = held.flatten(1, 2)[:, : problem.seqlen_k].to(q.dtype)
    return step, check_latent_decode(step()[[0, -1]], q[[0, -1]], held)


def _checked_prefill(problem, provider, *tensors):
    *inputs, w_uk, w_uv = tensors
    tensors = *inputs, *(w * problem.kv_lora_rank**-0.5 for w in (w_uk, w_uv))  # keys and values of size 1
    return partial(provider, *tensors), check_latent_prefill(provider(*tensors), *tensors)


PREPARE = {  # functions that give the timed function and the Closeness of its output
    Problem: _checked_pass,
    DecodeProblem: _checked_step,
    ChunkProblem: _checked_step,
    LatentDecodeProblem: _checked_latent_step,
    LatentPrefillProblem: _checked_prefill,
}


def _pass(direction, attention, q, k, v):
    """The timed function: the forward, the backward of a retained forward, or both."""
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
        figures["roof_share"] = roof and figures[problem.figure] / roof
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
