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
from perf.model.context_parallel import predict
from perf.results import MEASURED
from triton_attn import flash_attention
from triton_attn.parallel import context_parallel_attention, shard_sequence
from triton_attn.parallel.cost import GPUS_PER_NODE

WARMUPS, ROUNDS = 3, 10


@contextlib.contextmanager
def process_group():
    """The mesh of all ranks: GPUs over NCCL, or processes on a CPU over gloo."""
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, backend = ("cuda", "nccl") if has_gpu() else ("cpu", "gloo")
    dist.init_process_group(backend)
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def measure(model, seqlen, mesh):
    """Rows of `predict` with measured figures. All ranks call it. Each method's out is first compared with that of
    the others.
    """
    torch.manual_seed(0)  # all ranks draw the same whole tensors
    heads = model.num_heads_q, model.num_heads_kv, model.num_heads_kv
    dims = model.head_dim, model.head_dim, model.head_dim_v or model.head_dim
    dtype = torch.bfloat16
    own = []
    for num_heads, dim in zip(heads, dims):
        whole = torch.randn(1, seqlen, num_heads, dim, dtype=dtype, device=mesh.device_type)
        own.append(shard_sequence(whole, mesh).requires_grad_())
        del whole
    alone = _time_alone([x.detach().requires_grad_() for x in own], mesh)
    rows, first = [], None
    for row in predict(model, mesh.size(), seqlen):
        attend = partial(context_parallel_attention, **_placing(row.method, mesh), seqlen=seqlen, causal=True)
        found = _measure(attend, own, mesh)
        out = found.pop("out")
        first = out if first is None else first
        torch.testing.assert_close(out, first, atol=2e-2, rtol=2e-2)
        shares = {name: mesh.size() * alone[name] / found[f"{name}_ms"] for name in alone}
        figures = found | {f"{name}_share": share for name, share in shares.items()}
        rows.append(replace(row, **figures, **versions(), gpu=gpu_name() or "CPU", source=MEASURED))
    return rows


def _placing(method, mesh):
    """Rows lie over a mesh of two dimensions, nodes and their GPUs, as over that of all ranks."""
    if "+" not in method:
        return dict(mesh=mesh, method=method)
    nodes = init_device_mesh(mesh.device_type, (mesh.size() // GPUS_PER_NODE, GPUS_PER_NODE))
    return dict(mesh=nodes, method=tuple(method.split("+")))


def _measure(attend, own, mesh):
    """The figures of a row, and this rank's out."""

    def forward():
        with torch.no_grad():
            return attend(*own)

    def both():
        out = attend(*own)
        return torch.autograd.grad(out, own, torch.ones_like(out))

    found = {"out": forward()}
    for name, function in (("forward", forward), ("both", both)):
        with counted() as received:
            found[f"{name}_memory"] = _peak_memory(function)
        found[f"{name}_received"] = _most(sum(received), mesh)
        found[f"{name}_ms"] = _time(function, mesh)
    return found


def _time_alone(rows, mesh):
    """ms of attention over a rank's own rows: as many FLOPs as 1 / num_gpus of its part of the whole."""

    def forward():
        with torch.no_grad():
            return flash_attention(*rows, causal=True)

    def both():
        out = flash_attention(*rows, causal=True)
        return torch.autograd.grad(out, rows, torch.ones_like(out))

    return {"forward": _time(forward, mesh), "both": _time(both, mesh)}


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
    """Median of the slowest rank's ms."""
    times = []
    for _ in range(WARMUPS + ROUNDS):
        _synchronize()
        dist.barrier(mesh.get_group())
        start = time.perf_counter()
        function()
        _synchronize()
        times.append(_most(1e3 * (time.perf_counter() - start), mesh))
    return statistics.median(times[WARMUPS:])


def _synchronize():
    if has_gpu():
        torch.cuda.synchronize()


def _most(value, mesh):
    most = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    dist.all_reduce(most, dist.ReduceOp.MAX, mesh.get_group())
    return type(value)(most.item())
