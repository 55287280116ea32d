"""Context-parallel attention, timed over the ranks of a process group that torchrun has started."""

import contextlib
import os
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from perf.harness.device import gpu_name, has_gpu, versions
from perf.harness.traffic import counted
from perf.model.context_parallel import flops_of, kind_of, predict, sizes_of
from perf.results import MEASURED
from triton_attn import flash_attention, mla_prefill
from triton_attn.parallel import context_parallel_attention, context_parallel_mla_prefill, shard_sequence
from triton_attn.parallel.cost import GPUS_PER_NODE
from triton_attn.parallel.heads import HEADS
from triton_attn.parallel.latent import LATENTS

ROUNDS, ENOUGH = 12, 2e3  # most rounds of a call, and the ms after which it has no more than two
PASSES = "forward", "both"
CALLS = {  # over ranks, and of one GPU
    HEADS: (context_parallel_attention, flash_attention),
    LATENTS: (context_parallel_mla_prefill, mla_prefill),
}


@contextlib.contextmanager
def process_group():
    """The mesh of all ranks: GPUs over NCCL, or processes on a CPU over gloo."""
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, backend = ("cuda", "nccl") if has_gpu() else ("cpu", "gloo")
    dist.init_process_group(backend)
    dist.barrier()  # a rank that ends at once would close connections that others still make
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def measure(model, seqlen, mesh):
    """Rows of `predict` with measured figures. All ranks call it. Each method's out is first compared with that of
    the others.
    """
    attend_over_ranks, attend_alone = CALLS[kind_of(model)[0]]
    tensors = _tensors(model, seqlen, mesh)
    alone = _time_of_part(model, seqlen, mesh, partial(attend_alone, causal=True), tensors)
    rows, first = [], None
    for row in predict(model, mesh.size(), seqlen):
        attend = partial(attend_over_ranks, **_placing(row.method, mesh), seqlen=seqlen, causal=True)
        found = _measure(attend, tensors, mesh)
        out = found.pop("out")
        first = out if first is None else first
        torch.testing.assert_close(out, first, atol=2e-2, rtol=2e-2)
        shares = {f"{name}_share": ms / found[f"{name}_ms"] for name, ms in alone.items()}
        rows.append(replace(row, **found, **shares, **versions(), gpu=gpu_name() or "CPU", source=MEASURED))
    return rows


def _tensors(model, seqlen, mesh):
    """This rank's rows, and the weights of latent vectors. They have gradients."""
    torch.manual_seed(0)  # all ranks draw the same whole tensors
    kind, head_dims = kind_of(model)
    new = partial(torch.randn, dtype=torch.bfloat16, device=mesh.device_type)
    tensors = [shard_sequence(new(1, seqlen, *shape), mesh) for shape in kind.shapes_of_rows(head_dims)]
    if kind is LATENTS:
        num_heads, nope, _, rank, dim_v = head_dims
        tensors += [new(num_heads, dim, rank) * rank**-0.5 for dim in (nope, dim_v)]
    return [x.requires_grad_() for x in tensors]


def _placing(method, mesh):
    """Rows lie over a mesh of two dimensions, nodes and their GPUs, as over that of all ranks."""
    if "+" not in method:
        return dict(mesh=mesh, method=method)
    nodes = init_device_mesh(mesh.device_type, (mesh.size() // GPUS_PER_NODE, GPUS_PER_NODE))
    return dict(mesh=nodes, method=tuple(method.split("+")))


def _measure(attend, tensors, mesh):
    """The figures of a row, and this rank's out."""
    passes = _passes(attend, tensors)
    found = {"out": passes[0]()}
    for name, function in zip(PASSES, passes):
        with counted() as received:
            found[f"{name}_memory"] = _peak_memory(function)
        found[f"{name}_received"] = _most(sum(received), mesh)
        found[f"{name}_ms"] = _time(function, mesh)
    return found


def _time_of_part(model, seqlen, mesh, attend, tensors):
    """ms of a rank's part of the FLOPs, at the speed of one GPU with the rank's rows alone. These have fewer pairs, but
    as many latent vectors whose keys and values are computed."""
    whole, alone = sizes_of(model, mesh.size(), seqlen), sizes_of(model, 1, tensors[0].shape[1])
    (forward, backward), (forward_alone, backward_alone) = flops_of(whole), flops_of(alone)
    parts = forward / forward_alone, (forward + backward) / (forward_alone + backward_alone)
    times = [_time(function, mesh) for function in _passes(attend, tensors)]
    return {name: part / mesh.size() * ms for name, part, ms in zip(PASSES, parts, times)}


def _passes(attend, tensors):
    """The forward pass without gradients, and both passes."""

    def forward():
        with torch.no_grad():
            return attend(*tensors)

    def both():
        out = attend(*tensors)
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    return forward, both


def _peak_memory(function):
    """Bytes allocated at the peak of a call, inputs included; None on a CPU."""
    if not has_gpu():
        function()
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _time(function, mesh):
    """Median of the slowest rank's ms, without the first quarter of the rounds. All ranks stop at the same round."""
    times = []
    while len(times) < ROUNDS and (len(times) < 2 or sum(times) < ENOUGH):
        _synchronize()
        dist.barrier(mesh.get_group())
        start = time.perf_counter()
        function()
        _synchronize()
        times.append(_most(1e3 * (time.perf_counter() - start), mesh))
    return statistics.median(times[-(-len(times) // 4) :])


def _synchronize():
    if has_gpu():
        torch.cuda.synchronize()


def _most(value, mesh):
    most = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    dist.all_reduce(most, dist.ReduceOp.MAX, mesh.get_group())
    return type(value)(most.item())
