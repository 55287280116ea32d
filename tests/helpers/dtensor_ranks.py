"""Attention on DTensors over gloo processes on a CPU, each call held against one process in fp64."""

import functools
import re
from dataclasses import dataclass, field

import mla_over_ranks
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from perf.harness.traffic import counted
from triton_attn import PagedKVCache, flash_attention, flash_attention_varlen, mla_decode, mla_prefill, reference
from triton_attn.parallel import (
    context_parallel_attention,
    context_parallel_attention_varlen,
    context_parallel_mla_prefill,
    shard_sequence,
)
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
    context_parallel: dict | None = None  # options of the call over the mesh's dimension "cp", its last
    on_other_mesh: bool = False  # the DTensors are on the dimension "other" alone, and have the rows of a rank of "cp"
    options: dict = field(default_factory=lambda: dict(causal=True))

    @property
    def rows(self):
        return (self.batch * self.seqlen,) if self.packed else (self.batch, self.seqlen)

    @property
    def sequence_dim(self):
        return len(self.rows) - 1

    def inputs(self):
        return Inputs(self)


@dataclass(frozen=True, kw_only=True)
class LatentCase(Case):
    """A call of MLA: of_keys are those of latent vectors and rotary keys."""

    of_weights: tuple
    options: dict = field(default_factory=dict)

    def inputs(self):
        return LatentInputs(self)


class WholeTensors:
    """Tensors of a case, the same on all ranks. Subclasses have `tensors`, whose gradients are wanted, as (name,
    tensor, placements, dimension of the sequence or None), and the functions of a call and of its reference."""

    def __init__(self, case, head_dim_v):
        self.case, self.generator = case, torch.Generator().manual_seed(0)
        self.dout = self.draw(*case.rows, 8, head_dim_v)
        self.dlse = self.draw(8, *case.rows) if case.packed else self.draw(case.batch, 8, case.seqlen)
        self.cu_seqlens = torch.tensor([0, 5, 5, case.batch * case.seqlen - 2], dtype=torch.int32)
        self.tensors = []

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    @property
    def names(self):
        return ["out", "lse", *(f"d{name}" for name, *_ in self.tensors)]

    @property
    def sequence_dims(self):
        """Of out, lse and the gradients."""
        return [self.case.sequence_dim, -1, *(dim for *_, dim in self.tensors)]

    def reorder(self, rows):
        """Put the rows of the sequence into another order."""
        self.dout, self.dlse = self.dout.index_select(self.case.sequence_dim, rows), self.dlse[..., rows]
        self.tensors = [
            (name, x if dim is None else x.index_select(dim, rows), placements, dim)
            for name, x, placements, dim in self.tensors
        ]

    def attend(self, function, leaves):
        """([out, lse and the gradients of the leaves], number of collectives beside those of context parallelism)."""
        with CommDebugMode() as moved:
            outputs = function(*leaves)
        douts = [self.dout, self.dlse]
        if isinstance(outputs[0], DTensor):
            douts = [distribute_tensor(d, out.device_mesh, out.placements) for d, out in zip(douts, outputs)]
        douts = [d.to(out.dtype) for d, out in zip(douts, outputs)]
        with CommDebugMode() as moved_backward:
            gradients = torch.autograd.grad(outputs, leaves, douts)
        return [*outputs, *gradients], self._collectives(moved) + self._collectives(moved_backward)

    def _collectives(self, moved):
        """Beside context parallelism DTensors could start some, which are functional ones."""
        counts = moved.get_comm_counts().items()
        of_call = self.case.context_parallel is not None
        return sum(number for op, number in counts if not (of_call and str(op).startswith("c10d.")))

    def by_reference(self, dtype):
        leaves = [x.to(dtype).requires_grad_() for _, x, *_ in self.tensors]
        return [x.detach() for x in self.attend(self.reference, leaves)[0]]


class Inputs(WholeTensors):
    """Of flash attention."""

    def __init__(self, case):
        super().__init__(case, 24)
        dims = (8, 16), (case.num_heads_kv, 16), (case.num_heads_kv, 24)
        for name, shape, placements in zip("qkv", dims, (case.of_q, case.of_keys, case.of_keys)):
            self.tensors.append((name, self.draw(*case.rows, *shape), placements, case.sequence_dim))
        self.options = dict(case.options, return_lse=True)
        if case.alibi:
            self.options["alibi_slopes"] = torch.rand(8, generator=self.generator)
        if case.sinks is not None:
            self.tensors.append(("sinks", self.draw(8).float(), case.sinks, None))
        most = int(self.cu_seqlens[-1])
        self.lengths = [self.cu_seqlens, self.cu_seqlens, most, most] if case.packed else []

    def call(self, q, k, v, sinks=None):
        function = flash_attention_varlen if self.case.packed else flash_attention
        return function(q, k, v, *self.lengths, sinks=sinks, **self.options)

    def call_over(self, mesh, q, k, v, sinks=None):
        options = self.case.context_parallel | self.options
        if self.case.packed:
            return context_parallel_attention_varlen(q, k, v, self.cu_seqlens, mesh=mesh, sinks=sinks, **options)
        return context_parallel_attention(q, k, v, mesh=mesh, sinks=sinks, **options)

    def reference(self, q, k, v, sinks=None):
        sinks = None if sinks is None else sinks.to(torch.promote_types(q.dtype, torch.float32))
        function = reference.flash_attention_varlen if self.case.packed else reference.flash_attention
        return function(q, k, v, *self.lengths, sinks=sinks, **self.options)


class LatentInputs(WholeTensors):
    """Of MLA."""

    def __init__(self, case):
        super().__init__(case, 12)
        for name, shape, placements in (
            ("q_nope", (8, 16), case.of_q),
            ("q_pe", (8, 8), case.of_q),
            ("kv_latent", (32,), case.of_keys),
            ("k_pe", (8,), case.of_keys),
        ):
            self.tensors.append((name, self.draw(*case.rows, *shape), placements, case.sequence_dim))
        for name, dim in (("w_uk", 16), ("w_uv", 12)):
            self.tensors.append((name, self.draw(8, dim, 32) * 32**-0.5, case.of_weights, None))
        self.options, self.lengths = dict(case.options, return_lse=True), {}
        if case.packed:
            most = int(self.cu_seqlens[-1])
            self.lengths = dict(cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=self.cu_seqlens)
            self.lengths |= dict(max_seqlen_q=most, max_seqlen_k=most)

    def call(self, *tensors):
        return mla_prefill(*tensors, **self.lengths, **self.options)

    def call_over(self, mesh, *tensors):
        packing = dict(cu_seqlens=self.cu_seqlens) if self.case.packed else {}
        return context_parallel_mla_prefill(
            *tensors, mesh=mesh, **packing, **self.case.context_parallel, **self.options
        )

    def reference(self, *tensors):
        return reference.mla_prefill(*tensors, **self.lengths, **self.options)


def check_values(case, mesh):
    """Results are those of one process, placed like q, and nothing has moved but by context parallelism."""
    inputs, order = case.inputs(), _order(case)
    if order is not None:
        inputs.reorder(order)
    mesh = _mesh_of(case)
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for _, x, placements, _ in inputs.tensors]
    results, collectives = inputs.attend(_function(inputs, mesh), leaves)
    if not case.on_other_mesh:  # there the helper's own DTensors sum gradients
        assert collectives == 0, "values have moved"
    assert results[0].placements == results[2].placements == case.of_q
    results = [x.full_tensor().detach() for x in results]
    if order is not None:
        back = order.argsort()
        results = [x if dim is None else x.index_select(dim, back) for x, dim in zip(results, inputs.sequence_dims)]
    _compare(case.inputs(), results)


def _mesh_of(case):
    names = ("cp",) if len(case.mesh_shape) == 1 else ("other", "cp")
    return init_device_mesh("cpu", case.mesh_shape, mesh_dim_names=names)


def _function(inputs, mesh):
    """The call of a case, of DTensors on the mesh."""
    if inputs.case.context_parallel is None:
        return inputs.call
    call = functools.partial(inputs.call_over, mesh["cp"] if mesh.ndim > 1 else mesh)
    if not inputs.case.on_other_mesh:
        return call

    def attend(*tensors):
        outputs = call(*(_on_other_mesh(x, mesh) for x in tensors))
        lse_of = {0: 1, 1: 0} if inputs.case.packed else {0: 0, 1: 2, 2: 1}
        whole = []
        for x, of_dim in zip(outputs, ({}, lse_of)):
            assert x.device_mesh == mesh["other"], x.device_mesh
            placements = [Shard(of_dim.get(p.dim, p.dim)) if isinstance(p, Shard) else p for p in inputs.case.of_q]
            assert x.placements == tuple(placements[:1])
            whole.append(DTensor.from_local(x.to_local(), mesh, placements, run_check=False))
        return whole

    return attend


def _on_other_mesh(x, mesh):
    """The part of a DTensor that a rank of "cp" has, as a DTensor on "other"."""
    other, cp = x.placements
    part = x.to_local(grad_placements=[other, cp if isinstance(cp, Shard) else Partial()])
    return DTensor.from_local(part, mesh["other"], [other], run_check=False)


def _order(case):
    """The rows of all ranks, in the order of the ranks; None: that of the sequence."""
    if case.context_parallel is None:
        return None
    load_balance = case.context_parallel.get("load_balance", "head_tail")
    sharding = sharding_of_batch(1, case.rows[-1], case.mesh_shape[-1], load_balance)
    return torch.tensor([row for place in sharding.places for chunk in place.chunks for row in range(*chunk)])


def _compare(inputs, results):
    exact, by_torch = (inputs.by_reference(dtype) for dtype in (torch.float64, inputs.case.dtype))
    for name, result, of_exact, of_torch in zip(inputs.names, results, exact, by_torch):
        finite = of_exact[of_exact.isfinite()].abs()
        floor = 8 * torch.finfo(inputs.case.dtype).eps * max(1.0, finite.max().item())
        assert_close_to_reference(result, of_exact, torch_out=of_torch, factor=3.0, floor=floor, name=name)


def check_bytes(case, mesh):
    """Ranks of "cp" send each other what local tensors would, however the heads are sharded; others send nothing."""
    inputs, mesh = case.inputs(), _mesh_of(case)
    leaves = [distribute_tensor(x, mesh, placements).requires_grad_() for _, x, placements, _ in inputs.tensors]
    with counted() as received:
        outputs = _function(inputs, mesh)(*leaves)
        forward = sum(received)
        torch.autograd.grad([x.to_local() for x in outputs], leaves, [torch.ones_like(x.to_local()) for x in outputs])
    placing = dict(case.context_parallel, batch=case.batch, seqlen=case.seqlen)
    expected = mla_over_ranks.Case(rank=32, rope=8, **placing).bytes(mesh.get_local_rank("cp"), mesh["cp"].size())
    assert (forward, sum(received) - forward) == expected, f"{forward}, {sum(received) - forward}, {expected}"


def check_error(case, mesh):
    """Fails with what the call raises."""
    try:
        check_values(case, mesh)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def check_common_ranks(_, mesh):
    """A mesh of the call that has other ranks of the DTensors' mesh, and is none of its dimensions, raises."""
    of_x = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "cp"))
    x = distribute_tensor(torch.randn(2, 6, 4, 16), of_x, [S2, R])
    with pytest.raises(
        ValueError, match=r"mesh: expected a dimension of the DTensors' mesh .* without its other ranks"
    ):
        context_parallel_attention(x, x, x, mesh=mesh)


def check_mixed_parts(case, mesh):
    """Ranks that share sequences and whose DTensors, on a mesh made by hand, have other heads or sequences, raise."""
    of_rows = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("other", "cp"))["cp"]
    of_part = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("cp", "other"))["other"]
    inputs = case.inputs()
    leaves = [distribute_tensor(x, of_part, placements) for _, x, placements, _ in inputs.tensors]
    what, first, second = {0: ("sequences", (0, 1), (1, 2)), 2: ("heads", (0, 4), (4, 8))}[case.of_q[0].dim]
    first, second = (f"[{start}, {end})" for start, end in (first, second))
    of_ranks = (first, second) if mesh.get_local_rank() in (0, 3) else (second, first)
    said = f"{inputs.tensors[0][0]}'s {what}: expected the same on all ranks, {of_ranks[0]} as on rank 0, got "
    with pytest.raises(ValueError, match=re.escape(f"{said}{of_ranks[1]} on rank 1")):
        inputs.call_over(of_rows, *leaves)


def check_descending_ranks(_, mesh):
    """Of a mesh whose ranks do not ascend, torch itself gives a rank one shard here and another there."""
    of_x = DeviceMesh("cpu", [1, 0])
    x = DTensor.from_local(torch.randn(2, 6, 4, 16), of_x, [S2])
    for call in (
        lambda: flash_attention(x, x, x),
        lambda: context_parallel_attention(x, x, x, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=r"q: expected a mesh whose ranks ascend along .*, got \[1, 0\]"):
            call()
    rows = x.to_local()
    for call in (
        lambda: context_parallel_attention(rows, rows, rows, mesh=of_x),
        lambda: shard_sequence(rows, of_x),
        lambda: PagedKVCache(2, 16, num_layers=1, num_kv_heads=2, head_dim=16, device="cpu", mesh=of_x),
    ):
        with pytest.raises(ValueError, match=r"mesh: expected ranks in ascending order, got \[1, 0\]"):
            call()


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
    _compare_blocks(whole, sharded, x)


def _compare_blocks(whole, sharded, x):
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


class LatentBlock(nn.Module):
    """Attention of DeepSeek-V3, without rotary positions, norms and low-rank queries."""

    def __init__(self, dim=32, num_heads=8, nope=16, rope=8, rank=24, v_dim=12):
        super().__init__()
        self.q = nn.Linear(dim, num_heads * (nope + rope), bias=False)
        self.kv_a, self.kv_b = nn.Linear(dim, rank + rope, bias=False), nn.Linear(rank, num_heads * (nope + v_dim))
        self.kv_b.bias = None
        self.o = nn.Linear(num_heads * v_dim, dim, bias=False)
        self.num_heads, self.of_q, self.of_kv, self.of_w = num_heads, (nope, rope), (rank, rope), (nope, v_dim)

    def forward(self, x):
        queries = self.q(x).unflatten(-1, (self.num_heads, -1)).split(self.of_q, -1)
        weights = self.kv_b.weight.unflatten(0, (self.num_heads, -1)).split(self.of_w, 1)
        return self.o(mla_prefill(*queries, *self.kv_a(x).split(self.of_kv, -1), *weights).flatten(2))


def check_latent_block(seqlen, mesh):
    """A tensor-parallel layer of MLA, whose latent vectors all ranks compute, has the results of a whole one."""
    torch.manual_seed(0)
    whole, sharded, x = LatentBlock(), LatentBlock(), torch.randn(2, seqlen, 32)
    sharded.load_state_dict(whole.state_dict())
    plan = dict.fromkeys(("q", "kv_b"), ColwiseParallel(use_local_output=False))
    parallelize_module(sharded, mesh, plan | dict(o=RowwiseParallel(input_layouts=Shard(-1))))
    distribute_module(
        sharded.kv_a, mesh, input_fn=lambda _, inputs, mesh: DTensor.from_local(inputs[0], mesh, [R], run_check=False)
    )
    _compare_blocks(whole, sharded, x)


def check_decode(case, mesh):
    """Heads of MLA decode over one cache that all ranks have: the results of one process, and nothing has moved."""
    of_weights, options = case
    generator = torch.Generator().manual_seed(0)
    packed, with_weights = "max_seqlen_q" in options, options.get("softmax_scale") is None
    rows = (3,) if packed else (2, 2)
    q_nope, q_pe, cache, rope, w_uk, w_uv = (
        torch.randn(shape, generator=generator)
        for shape in ((*rows, 8, 16), (*rows, 8, 8), (4, 8, 32), (4, 8, 8), (8, 16, 32), (8, 12, 32))
    )
    if not with_weights:
        q_nope, w_uk, w_uv = torch.randn((*rows, 8, 32), generator=generator), None, None
    lengths, table = torch.tensor([9, 14], dtype=torch.int32), torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    options = dict(options, rope_cache=rope, return_lse=True)
    if packed:
        options["cu_seqlens_q"] = torch.tensor([0, 2, 3], dtype=torch.int32)
    expected = mla_decode(q_nope, q_pe, cache, lengths, table, w_uk, w_uv, **options)
    of_heads = Shard(len(rows))
    queries = [distribute_tensor(x, mesh, [of_heads]) for x in (q_nope, q_pe)]
    weights = [None if x is None else distribute_tensor(x, mesh, [of_weights]) for x in (w_uk, w_uv)]
    cache = distribute_tensor(cache, mesh, [R])  # a plain tensor has the same values
    with CommDebugMode() as moved:
        out, lse = mla_decode(*queries, cache, lengths, table, *weights, **options)
    assert moved.get_total_counts() == 0, "values have moved"
    assert (out.placements, lse.placements) == ((of_heads,), (Shard(0 if packed else 1),))
    for found, of_one in zip((out, lse), expected):
        torch.testing.assert_close(found.full_tensor(), of_one, atol=1e-5, rtol=1e-5)
