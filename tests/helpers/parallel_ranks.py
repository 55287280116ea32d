"""Calls over a mesh of gloo processes on a CPU, each held against one process in fp64."""

import contextlib
import datetime
import itertools
import traceback
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from triton_attn import reference
from triton_attn.parallel import (
    context_parallel_attention,
    context_parallel_attention_varlen,
    shard_sequence,
    unshard_sequence,
)
from triton_attn.testing import assert_close_to_reference

TIMEOUT = datetime.timedelta(seconds=240)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of whole sequences."""

    method: str = "all_gather"
    load_balance: str | None = "head_tail"
    batch: int = 1
    seqlen: int = 50
    documents: tuple | None = None  # their lengths in a packed batch; batch and seqlen are then not used
    rows_of_none: int = 0  # after the last document
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=lambda: dict(causal=True))
    alibi: bool = False
    slopes_each: bool = False  # of each sequence or document
    sinks: bool = False
    dlse: bool = True
    seed: int = 0
    rows_from_others: tuple | None = None  # keys that a rank needs of others, and others of it, by rank; None: all

    @property
    def rows(self):
        """(batch, seqlen) of the whole, or (rows,) of a packed batch."""
        return (self.batch, self.seqlen) if self.documents is None else (sum(self.documents) + self.rows_of_none,)

    @property
    def cu_seqlens(self):
        return torch.tensor([0, *itertools.accumulate(self.documents)], dtype=torch.int32)

    def bytes(self, rank, ranks):
        """(forward, backward) that a rank receives, by the table of `context_parallel_attention`, of even shards."""
        of_rows = self.batch * self.seqlen * (ranks - 1) // ranks
        of_a_key = self.num_heads_kv * (self.head_dim + self.head_dim_v)
        size = self.dtype.itemsize
        if self.rows_from_others is not None:
            of_rows = self.batch * self.rows_from_others[rank]
        if self.method == "all_gather":
            return of_rows * of_a_key * size, of_rows * of_a_key * (size + 4)
        if self.method == "ring":
            return of_rows * of_a_key * size, of_rows * of_a_key * size + self.batch * self.seqlen * of_a_key * 4
        heads = self.num_heads_q + max(self.num_heads_kv, ranks)
        of_a_row = heads * (self.head_dim + self.head_dim_v)
        of_lse = of_rows * self.num_heads_q // ranks * 4
        return (of_rows * of_a_row // ranks * size + of_lse,) * 2


def run(check, cases, num_ranks, store):
    """What `check(case, mesh)` found wrong on each rank: [(rank, case, text)]."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = [(results, check, cases, rank, num_ranks, store) for rank in range(num_ranks)]
    processes = [context.Process(target=_run_rank, args=of_rank) for of_rank in arguments]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return [failure for of_rank in found for failure in of_rank]


def _run_rank(results, check, cases, rank, num_ranks, store):
    torch.set_num_threads(1)
    failures = []
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
        mesh = init_device_mesh("cpu", (num_ranks,))
        for case in cases:
            try:
                check(case, mesh)
            except AssertionError as error:
                failures.append((rank, case, str(error)))
        dist.destroy_process_group()
    except Exception:
        failures.append((rank, None, traceback.format_exc()))
    results.put(failures)


class Inputs:
    """The whole tensors of a case, the same on all ranks."""

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.q, self.k = self._draw(case.num_heads_q, case.head_dim), self._draw(case.num_heads_kv, case.head_dim)
        self.v, self.dout = (
            self._draw(case.num_heads_kv, case.head_dim_v),
            self._draw(case.num_heads_q, case.head_dim_v),
        )
        dlse = self._draw(case.num_heads_q, 1)[..., 0].transpose(-1, -2).float()
        self.dlse = dlse if case.dlse else None
        self.options = dict(case.options)
        if case.alibi:
            batch = case.batch if case.documents is None else len(case.documents)
            shape = (batch, case.num_heads_q) if case.slopes_each else (case.num_heads_q,)
            self.options["alibi_slopes"] = torch.rand(shape, generator=self.generator)
        self.sinks = torch.randn(case.num_heads_q, generator=self.generator) if case.sinks else None
        self.dim = len(case.rows) - 1  # of the sequence
        self.packing = {} if case.documents is None else dict(cu_seqlens=case.cu_seqlens)

    def _draw(self, heads, dim):
        shape = *self.case.rows, heads, dim
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    def leaves(self, mesh):
        """This rank's q, k and v, and the sinks."""
        leaves = [self.own(x, mesh) for x in (self.q, self.k, self.v)]
        leaves += [] if self.sinks is None else [self.sinks.clone()]
        return [x.requires_grad_() for x in leaves]

    def attend_to(self, leaves, mesh):
        """out and lse of this rank."""
        case = self.case
        attend = context_parallel_attention if case.documents is None else context_parallel_attention_varlen
        placing = dict(mesh=mesh, method=case.method, load_balance=case.load_balance, seqlen=case.rows[-1])
        sinks = None if self.sinks is None else leaves[3]
        return attend(*leaves[:3], **self.packing, **placing, return_lse=True, sinks=sinks, **self.options)

    def attend(self, mesh):
        """out and lse of this rank, and the leaves."""
        leaves = self.leaves(mesh)
        return self.attend_to(leaves, mesh), leaves

    def own(self, x, mesh, dim=None):
        return shard_sequence(x, mesh, self.dim if dim is None else dim, self.case.load_balance, **self.packing)

    def whole(self, x, mesh, dim=None):
        placing = self.case.load_balance, self.case.rows[-1]
        return unshard_sequence(x.detach(), mesh, self.dim if dim is None else dim, *placing, **self.packing)

    def gradients(self, outputs, leaves, own=lambda x, dim=None: x):
        """Of the leaves; own gives this rank's rows of the gradients of out and lse."""
        douts = [own(self.dout)] if self.dlse is None else [own(self.dout), own(self.dlse, -1)]
        douts = [x.to(output.dtype) for x, output in zip(douts, outputs)]
        return list(torch.autograd.grad(outputs[: len(douts)], leaves, douts))

    def by_reference(self, dtype):
        """out, lse and gradients of one process."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        if self.sinks is not None:
            leaves.append(self.sinks.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        options = dict(sinks=None if self.sinks is None else leaves[3], return_lse=True, **self.options)
        if self.case.documents is None:
            outputs = reference.flash_attention(*leaves[:3], **options)
        else:
            lengths = self.case.cu_seqlens, self.case.cu_seqlens, self.case.rows[0], self.case.rows[0]
            outputs = reference.flash_attention_varlen(*leaves[:3], *lengths, **options)
        return *(x.detach() for x in outputs), *self.gradients(outputs, leaves)


def check_values(case, mesh):
    """out, lse and gradients are those of one process."""
    inputs = Inputs(case)
    exact, by_torch = (inputs.by_reference(dtype) for dtype in (torch.float64, case.dtype))
    outputs, leaves = inputs.attend(mesh)
    gradients = inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    parts = zip((*outputs, *gradients[:3]), (None, -1, None, None, None))
    results = [inputs.whole(x, mesh, dim) for x, dim in parts]
    if case.sinks:
        dist.all_reduce(gradients[3])
        results.append(gradients[3])
    eps = torch.finfo(case.dtype).eps
    for name, result, of_exact, of_torch in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), results, exact, by_torch):
        floor = 8 * eps * max(1.0, of_exact.abs().max().item()) if of_exact.numel() else 0.0
        assert_close_to_reference(result, of_exact, torch_out=of_torch, factor=3.0, floor=floor, name=name)


def check_bytes(case, mesh):
    """The bytes that this rank receives from others are those of the docstring's table."""
    inputs = Inputs(case)
    with _counted(mesh.get_local_rank()) as received:
        outputs, leaves = inputs.attend(mesh)
        forward = sum(received)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    assert (forward, sum(received) - forward) == case.bytes(mesh.get_local_rank(), mesh.size()), (
        f"{forward}, {sum(received) - forward}"
    )


def check_difference(cases, mesh):
    """Fails with what the call raises; cases are those of the ranks."""
    try:
        Inputs(cases[mesh.get_local_rank()]).attend(mesh)
    except ValueError as error:
        raise AssertionError(str(error)) from error


@contextlib.contextmanager
def _counted(rank):
    """A list, to which each collective adds the bytes that this rank receives from other ranks."""
    received = []
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def count_exchange(output, x, output_sizes, *args, **options):
        received.append(output[: sum(output_sizes) - output_sizes[rank]].nbytes)
        return all_to_all_single(output, x, output_sizes, *args, **options)

    def count_shift(operations):
        received.append(sum(op.tensor.nbytes for op in operations if op.op is dist.irecv))
        return batch_isend_irecv(operations)

    with (
        mock.patch.object(dist, "all_to_all_single", count_exchange),
        mock.patch.object(dist, "batch_isend_irecv", count_shift),
    ):
        yield received
