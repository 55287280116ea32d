"""Context-parallel MLA over gloo processes on a CPU, each held against one process in fp64."""

from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from sharded_caches import largest

from triton_attn import mla_prefill, reference
from triton_attn.parallel import context_parallel_mla_prefill, shard_sequence, unshard_sequence
from triton_attn.testing import assert_close_to_reference

NAMES = "out", "lse", "dq_nope", "dq_pe", "dkv_latent", "dk_pe", "dw_uk", "dw_uv"


@dataclass(frozen=True, kw_only=True)
class Case:
    load_balance: str | None = "head_tail"
    batch: int = 1
    seqlen: int = 37
    num_heads: int = 3
    nope: int = 16
    rope: int = 8
    rank: int = 32
    v_dim: int = 12
    dtype: torch.dtype = torch.float32
    causal: bool = True
    mode: str = "auto"
    dlse: bool = True
    seed: int = 0

    def bytes(self, rank, ranks):
        """(forward, backward) that a rank receives: the others' rows, and their parts of its rows' gradients."""
        own = len(shard_rows(self, rank, ranks))
        of_a_row = self.batch * (self.rank + self.rope)
        forward = (self.seqlen - own) * of_a_row * self.dtype.itemsize
        return forward, forward + (ranks - 1) * own * of_a_row * 4


def shard_rows(case, rank, ranks):
    number = 2 * ranks if case.load_balance else ranks
    cuts = [case.seqlen * i // number for i in range(number + 1)]
    chunks = (rank, number - 1 - rank) if case.load_balance else (rank,)
    return [row for i in chunks for row in range(cuts[i], cuts[i + 1])]


class Inputs:
    """The whole tensors of a case, the same on all ranks; four of them have rows."""

    def __init__(self, case):
        self.case, generator = case, torch.Generator().manual_seed(case.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

        rows, heads = (case.batch, case.seqlen), case.num_heads
        self.rows = [draw(*rows, heads, case.nope), draw(*rows, heads, case.rope)]
        self.rows += [draw(*rows, case.rank), draw(*rows, case.rope)]
        self.weights = [draw(heads, dim, case.rank) * case.rank**-0.5 for dim in (case.nope, case.v_dim)]
        self.dout = draw(*rows, heads, case.v_dim)
        self.dlse = draw(case.batch, heads, case.seqlen).float() if case.dlse else None

    def over_ranks(self, mesh):
        """out, lse and gradients of the whole, from those of the ranks."""
        case = self.case
        leaves = [self.own(x, mesh) for x in self.rows] + [w.clone() for w in self.weights]
        leaves = [x.requires_grad_() for x in leaves]
        outputs = context_parallel_mla_prefill(
            *leaves, mesh=mesh, load_balance=case.load_balance, seqlen=case.seqlen, **self.options
        )
        douts = [self.own(self.dout, mesh)] + ([] if self.dlse is None else [self.own(self.dlse, mesh, 2)])
        gradients = torch.autograd.grad(outputs[: len(douts)], leaves, douts)
        for of_weight in gradients[4:]:
            dist.all_reduce(of_weight)
        return [
            x.detach() if dim is None else unshard_sequence(x.detach(), mesh, dim, case.load_balance, case.seqlen)
            for x, dim in zip((*outputs, *gradients), (1, 2, 1, 1, 1, 1, None, None))
        ]

    @property
    def options(self):
        return dict(causal=self.case.causal, mode=self.case.mode, return_lse=True)

    def own(self, x, mesh, dim=1):
        return shard_sequence(x, mesh, dim, self.case.load_balance)

    def of_one(self, dtype=None):
        """The same of one process, by the definition in a dtype or by the kernel."""
        leaves = [x.detach().to(dtype or self.case.dtype).requires_grad_() for x in (*self.rows, *self.weights)]
        attend = mla_prefill if dtype is None else reference.mla_prefill
        outputs = attend(*leaves, **(self.options | dict(mode="auto")))
        pairs = [(out, x.to(out.dtype)) for out, x in zip(outputs, (self.dout, self.dlse)) if x is not None]
        outs, douts = zip(*pairs)
        gradients = torch.autograd.grad(outs, leaves, douts)
        return [x.detach() for x in (*outputs, *gradients)]


def check_values(case, mesh):
    """out, lse and gradients are those of one process."""
    inputs = Inputs(case)
    found = inputs.over_ranks(mesh)
    exact, by_torch, by_kernel = (inputs.of_one(dtype) for dtype in (torch.float64, case.dtype, None))
    eps = torch.finfo(case.dtype).eps
    for name, result, of_exact, *others in zip(NAMES, found, exact, by_torch, by_kernel):
        assert result.dtype == others[1].dtype, name
        error = max(largest(x.double() - of_exact) for x in others)
        floor = 8 * eps * max(1.0, largest(of_exact))
        assert_close_to_reference(result, of_exact, torch_error=error, factor=3.0, floor=floor, name=name)


def check_bytes(case, mesh):
    """The bytes that a rank receives are those of the docstring."""
    inputs, sizes = Inputs(case), []
    exchange = dist.all_to_all_single

    def counting(output, x, output_sizes, *args, **options):
        sizes.append((sum(output_sizes) - output_sizes[mesh.get_local_rank()]) * output.element_size())
        return exchange(output, x, output_sizes, *args, **options)

    leaves = [inputs.own(x, mesh).requires_grad_() for x in inputs.rows] + inputs.weights
    placing = dict(mesh=mesh, load_balance=case.load_balance, seqlen=case.seqlen)
    dout = inputs.own(inputs.dout, mesh)
    with mock.patch.object(dist, "all_to_all_single", counting):
        out, _ = context_parallel_mla_prefill(*leaves, **placing, **inputs.options)
        forward = sum(sizes)
        out.backward(dout)
    assert (forward, sum(sizes) - forward) == case.bytes(mesh.get_local_rank(), mesh.size()), sizes


def check_difference(cases, mesh):
    """Fails with what the call raises; cases are those of the ranks."""
    try:
        Inputs(cases[mesh.get_local_rank()]).over_ranks(mesh)
    except ValueError as error:
        raise AssertionError(str(error)) from error
