"""torch's context parallelism over our kernels, on one rank: tests run it in processes of their own."""

import datetime
from unittest import mock

import torch
import torch.distributed as dist
from groups import join_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention

from triton_attn import reference
from triton_attn.interop.torch import override

SEQLEN, SCALE = 32, 0.25
TIMEOUT = datetime.timedelta(seconds=240)


def run_rank(rank, world_size, store):
    """(rank, largest errors against fp64 by what was computed, None), or (rank, None, the exception's text)."""
    options = _attention._cp_options
    try:
        join_group(store, rank, world_size, TIMEOUT)
        with mock.patch.object(options, "enable_load_balance", options.enable_load_balance):
            handle = override("CPU")
            try:
                return rank, _errors(rank, world_size), None
            finally:
                handle.remove()
                dist.destroy_process_group()
    except Exception as error:
        return rank, None, repr(error)


def send_rank(results, *args):
    """`run_rank` of a process, sent to a queue."""
    torch.set_num_threads(1)
    results.put(run_rank(*args))


def _errors(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        f"{name}, {'causal' if causal else 'full'}": error
        for causal in (True, False)
        for name, error in _attend(mesh, rank, world_size, causal).items()
    }


def _attend(mesh, rank, world_size, causal):
    """Causal ranks have their load balanced: each has a chunk from the front and its mirror image from the back."""
    _attention._cp_options.enable_load_balance = causal
    num_chunks = 2 * world_size
    own = (rank, num_chunks - 1 - rank) if causal else (2 * rank, 2 * rank + 1)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2, SEQLEN, 16, generator=generator) for _ in range(4)]
    expected = _expected(*whole, causal)

    def local(x):
        return torch.cat([x.chunk(num_chunks, dim=2)[i] for i in own], dim=2)

    q, k, v, dout = map(local, whole)
    out, lse, *_ = _attention._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=causal, scale=SCALE)
    found = {"ring out": out, "ring lse": lse}
    _attention._enable_context_parallel_dispatcher_impl(2, mesh)
    try:
        inputs = [DTensor.from_local(x, mesh, [Shard(2)]).requires_grad_() for x in (q, k, v)]
        operator = torch.ops.aten._scaled_dot_product_flash_attention.default
        result = operator(*inputs, 0.0, causal, False, scale=SCALE)[0]
        gradients = torch.autograd.grad(result, inputs, DTensor.from_local(dout, mesh, [Shard(2)]))
    finally:
        _attention._disable_context_parallel_dispatcher_impl()
    found["DTensor out"] = result.to_local().detach()
    found |= {f"DTensor {name}": x.to_local() for name, x in zip(("dq", "dk", "dv"), gradients)}
    return {name: float((x - local(expected[name.split()[1]])).abs().max()) for name, x in found.items()}


def _expected(q, k, v, dout, causal):
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out, lse = reference.flash_attention(q, k, v, causal=causal, softmax_scale=SCALE, return_lse=True)
    gradients = torch.autograd.grad(out.transpose(1, 2), inputs, dout.double())
    return {"out": out.detach().transpose(1, 2), "lse": lse.detach()} | dict(zip(("dq", "dk", "dv"), gradients))
