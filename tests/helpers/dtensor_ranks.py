"""Attention on DTensors over gloo processes on a CPU, each call held against one process in fp64."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from triton_attn import flash_attention, flash_attention_varlen, reference
from triton_attn.parallel import context_parallel_attention
from triton_attn.parallel.balance import sharding_of_batch
from triton_attn.testing import assert_close_to_reference

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of whole sequences; placements of q, and of k and v, by dimension of the mesh."""

    mesh_shape: tuple
    of_q: tuple
    of_keys: tuple
    sinks: tuple | None = None  # placements; None: none
    alibi: bool = False
    num_heads_kv: int = 4
    batch: int = 3
    seqlen: int = 24
    packed: bool = False
    dtype: torch.dtype = torch.float32
    context_parallel: dict | None = None  # options of context_parallel_attention, over the mesh's dimension "cp"
    options: dict = field(default_factory=lambda: dict(causal=True))


class Inputs:
    def __init__(self, case):
        self.case, self.generator = case, torch.Generator().manual_seed(0)
        rows = (case.batch * case.seqlen,) if case.packed else (case.batch, case.seqlen)
        self.q, self.dout = (self._draw(*rows, 8, dim) for dim in (16, 24))
        self.k, self.v = self._draw(*rows, case.num_heads_kv, 16), self._draw(*rows, case.num_heads_kv, 24)
        self.dlse = self._draw(8, *rows) if case.packed else self._draw(case.batch, 8, case.seqlen)
        self.options = dict(case.options, return_lse=True)
        if case.alibi:
            self.options["alibi_slopes"] = torch.rand(8, generator=self.generator)
        self.sinks = None if case.sinks is None else self._draw(8).float()
        self.lengths = []
        if case.packed:
            starts = [0, 5, 5, case.batch * case.seqlen - 2]
            cu_seqlens = torch.tensor(starts, dtype=torch.int32)
            self.lengths = [cu_seqlens, cu_seqlens, max(starts), max(starts)]

    def reorder(self, rows):
        """Put the rows of the sequence into another order."""
        self.q, self.k, self.v, self.dout = (x[:, rows] for x in (self.q, self.k, self.v, self.dout))
        self.dlse = self.dlse[:, :, rows]

    def _draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    def attend(self, function, leaves):
        """([out, lse and the gradients of the leaves: q, k, v and perhaps sinks], number of collectives)."""
        sinks = leaves[3] if len(leaves) > 3 else None
        with CommDebugMode() as moved:
            outputs = function(*leaves[:3], *self.lengths, sinks=sinks, **self.options)
        douts = [self.dout, self.dlse]
        if isinstance(outputs[0], DTensor):
            douts = [distribute_tensor(d, out.device_mesh, out.placements) for d, out in zip(douts, outputs)]
        douts = [d.to(out.dtype) for d, out in zip(douts, outputs)]
        with CommDebugMode() as moved_backward:
            gradients = torch.autograd.grad(outputs, leaves, douts)
        return [*outputs, *gradients], moved.get_total_counts() + moved_backward.get_total_counts()

    def by_reference(self, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        if self.sinks is not None:
            leaves.append(self.sinks.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        function = reference.flash_attention_varlen if self.case.packed else reference.flash_attention
        return [x.detach() for x in self.attend(function, leaves)[0]]


def check_values(case, mesh):
    """Results are those of one process, placed like q, and nothing has moved."""
    inputs, order = Inputs(case), _order(case)
    if order is not None:
        inputs.reorder(order)
    names = ("cp",) if len(case.mesh_shape) == 1 else ("other", "cp")
    mesh = init_device_mesh("cpu", case.mesh_shape, mesh_dim_names=names)
    given = zip((inputs.q, inputs.k, inputs.v), (case.of_q, case.of_keys, case.of_keys))
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for x, placements in given]
    if case.sinks is not None:
        leaves.append(distribute_tensor(inputs.sinks, mesh, case.sinks).requires_grad_())
    function = flash_attention_varlen if case.packed else flash_attention
    if case.context_parallel is not None:

        def function(*qkv, **options):
            own = mesh["cp"] if mesh.ndim > 1 else mesh
            return context_parallel_attention(*qkv, mesh=own, **case.context_parallel, **options)

    results, collectives = inputs.attend(function, leaves)
    if case.context_parallel is None:
        assert collectives == 0, "values have moved"
    assert results[0].placements == results[2].placements == case.of_q
    results = [x.full_tensor().detach() for x in results]
    if order is not None:
        back = torch.tensor(order).argsort()
        dims = (1, 2, 1, 1, 1)
        results[:5] = [x.index_select(dim, back) for x, dim in zip(results, dims)]
    _compare(Inputs(case), results)


def _order(case):
    """The rows of all ranks, in the order of the ranks; None: that of the sequence."""
    if case.context_parallel is None:
        return None
    load_balance = case.context_parallel.get("load_balance", "head_tail")
    sharding = sharding_of_batch(1, case.seqlen, case.mesh_shape[-1], load_balance)
    return [row for place in sharding.places for chunk in place.chunks for row in range(*chunk)]


def _compare(inputs, results):
    exact, by_torch = (inputs.by_reference(dtype) for dtype in (torch.float64, inputs.case.dtype))
    for name, result, of_exact, of_torch in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), results, exact, by_torch):
        finite = of_exact[of_exact.isfinite()].abs()
        floor = 8 * torch.finfo(inputs.case.dtype).eps * max(1.0, finite.max().item())
        assert_close_to_reference(result, of_exact, torch_out=of_torch, factor=3.0, floor=floor, name=name)


def check_error(case, mesh):
    """Fails with what the call raises."""
    try:
        check_values(case, mesh)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


class Block(nn.Module):
    """A layer of Llama, without rotary positions; q, k and v may be DTensors."""

    def __init__(self, dim=32, num_heads_q=8, num_heads_kv=4, head_dim=8):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v = (
            nn.Linear(dim, heads * head_dim, bias=False) for heads in (num_heads_q, num_heads_kv, num_heads_kv)
        )
        self.o = nn.Linear(num_heads_q * head_dim, dim, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*dims, bias=False) for dims in ((dim, 64), (dim, 64), (64, dim)))
        self.head_dim = head_dim

    def forward(self, x):
        y = self.norm_1(x)
        q, k, v = (project(y).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        x = x + self.o(flash_attention(q, k, v, causal=True).flatten(2))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def check_block(use_local_output, mesh):
    """A tensor-parallel Llama layer has the output and the gradients of a whole one."""
    torch.manual_seed(0)
    whole, x = Block(), torch.randn(2, 10, 32)
    sharded = Block()
    sharded.load_state_dict(whole.state_dict())
    plan = dict.fromkeys("qkv", ColwiseParallel(use_local_output=use_local_output)) | dict.fromkeys(
        ("gate", "up"), ColwiseParallel()
    )
    plan |= dict.fromkeys(("o", "down"), RowwiseParallel())
    if not use_local_output:
        plan["o"] = RowwiseParallel(input_layouts=Shard(-1))
    sharded = parallelize_module(sharded, mesh, plan)
    results = []
    for block in (whole, sharded):
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        out.square().sum().backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in block.parameters()]
        results.append([out, leaf.grad, *gradients])
    for found, expected in zip(*reversed(results)):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert dist.get_world_size() > 1
