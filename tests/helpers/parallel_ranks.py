"""Calls over a mesh of gloo processes on a CPU, each held against one process in fp64."""

import contextlib
import datetime
import functools
import itertools
import os
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from groups import join_group
from sharded_caches import largest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental._context_parallel import _load_balancer
from torch.distributed.tensor.experimental._context_parallel._attention import _context_parallel_shard
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from perf.harness.traffic import counted
from triton_attn import reference
from triton_attn.parallel import (
    agreement,
    context_parallel_attention,
    context_parallel_attention_varlen,
    heads,
    local,
    shard_sequence,
    ulysses,
    unshard_sequence,
)
from triton_attn.parallel.balance import sharding_of_batch
from triton_attn.parallel.cost import costs, ranks_of, sizes_of
from triton_attn.parallel.local import Mask
from triton_attn.testing import assert_close_to_reference

TIMEOUT = datetime.timedelta(seconds=240)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of whole sequences."""

    method: str | tuple = "all_gather"
    inner: int | None = None  # ranks of the second dimension of a mesh of two
    load_balance: str | None = "head_tail"  # or of BALANCERS
    batch: int = 1
    seqlen: int = 50
    even: bool = False  # the length is not given, since all ranks have as many rows
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
    frozen: tuple = ()  # names of gradients that are not wanted
    seed: int = 0
    rows_from_others: tuple | None = None  # keys that a rank needs of others, and others of it, by rank; None: all

    @property
    def rows(self):
        """(batch, seqlen) of the whole, or (rows,) of a packed batch."""
        return (self.batch, self.seqlen) if self.documents is None else (sum(self.documents) + self.rows_of_none,)

    @property
    def cu_seqlens(self):
        return torch.tensor([0, *itertools.accumulate(self.documents)], dtype=torch.int32)

    keys = "dk", "dv"

    def elements(self, ranks=1):
        """Of a token: {name of the gradient of a tensor with rows: its elements of a rank's heads with "ulysses"}."""
        heads, heads_kv = self.num_heads_q // ranks, max(self.num_heads_kv // ranks, 1)
        return dict(dq=heads * self.head_dim, dk=heads_kv * self.head_dim, dv=heads_kv * self.head_dim_v)

    @property
    def head_dims(self):
        return heads.HEADS.costs_of((self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v))

    def inputs(self):
        return Inputs(self)

    operator = "context_parallel_attention"

    @property
    def passes(self):
        """The module that calls attention."""
        return heads

    def bytes(self, rank, ranks):
        """(forward, backward) that a rank receives, by the table of `context_parallel_attention`, of even shards."""
        if self.inner is not None:
            outer, inner = ranks // self.inner, self.inner
            exchanged = replace(self, method="ulysses", inner=None, seqlen=self.seqlen // outer).bytes(0, inner)
            shares = dict(num_heads_q=self.num_heads_q // inner, num_heads_kv=max(self.num_heads_kv // inner, 1))
            inside = replace(self, method=self.method[0], inner=None, **shares).bytes(0, outer)
            return tuple(a + b for a, b in zip(exchanged, inside))
        of_rows, size = self.batch * self.seqlen * (ranks - 1) // ranks, self.dtype.itemsize
        if self.rows_from_others is not None:
            of_rows = self.batch * self.rows_from_others[rank]
        if self.method == "ulysses":
            elements, heads = self.elements(ranks), self.num_heads_q // ranks
            of_results = of_rows * heads * (self.head_dim_v * size + 4)
            return tuple(of_rows * n * size + of_results for n in (sum(elements.values()), self._wanted(elements)))
        elements = {name: self.elements()[name] for name in self.keys}
        of_keys = of_rows * sum(elements.values()) * size
        rows_of_gradients = of_rows if self.method == "all_gather" else self.batch * self.seqlen
        of_sinks_alone = {"dq", *self.keys} <= {*self.frozen}
        return of_keys, 0 if of_sinks_alone else of_keys + rows_of_gradients * self._wanted(elements) * 4

    def _wanted(self, elements):
        return sum(number for name, number in elements.items() if name not in self.frozen)


class Shuffled:
    """A balancer whose ranks have rows of any places, in any order."""

    def __init__(self, seqlen):
        self.seqlen = seqlen

    def _generate_indices(self, restore=False):
        return torch.randperm(self.seqlen, generator=torch.Generator().manual_seed(3))[None]


def _of_documents(seqlen, num_ranks):
    parts = [2 * num_ranks] * (seqlen // (2 * num_ranks) - 2) + [4 * num_ranks]
    return _load_balancer._PerDocumentHeadTailLoadBalancer([parts], num_ranks, "cpu")


def _of_blocks(seqlen, num_ranks):
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, seqlen, seqlen, device="cpu", BLOCK_SIZE=2)
    return _load_balancer._PTRRLoadBalancer(mask, num_ranks)


BALANCERS = dict(of_documents=_of_documents, of_blocks=_of_blocks, shuffled=lambda seqlen, num_ranks: Shuffled(seqlen))


@functools.cache
def balancer(name, seqlen, num_ranks):
    """What `load_balance` takes."""
    return BALANCERS[name](seqlen, num_ranks) if name in BALANCERS else name


def run(check, cases, num_ranks, store):
    """What `check(case, mesh)` found wrong on each rank: [(rank, case, text)]."""
    results = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    processes = _start(_run_rank, [(results, check, cases, rank, num_ranks, store) for rank in range(num_ranks)])
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return [failure for of_rank in found for failure in of_rank]


def _start(target, arguments):
    """A process for each rank, forked from one that has imported what they need: imports take seconds."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.testing", __name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    processes = [context.Process(target=_of_rank, args=(dict(os.environ), target, of_rank)) for of_rank in arguments]
    for process in processes:
        process.start()
    return processes


def _of_rank(environment, target, arguments):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def _run_rank(results, check, cases, rank, num_ranks, store):
    failures = []
    try:
        join_group(store, rank, num_ranks, TIMEOUT)
        mesh = init_device_mesh("cpu", (num_ranks,))
        for case in cases:
            try:
                check(case, mesh)
            except AssertionError as error:
                failures.append((rank, case, str(error)))
        dist.destroy_process_group()
    except BaseException:  # pytest's Failed is no Exception, and the others would wait for it
        failures.append((rank, None, traceback.format_exc()))
    results.put(failures)


@functools.cache
def mesh_of_two(*shape):
    return init_device_mesh("cpu", shape)


class WholeTensors:
    """The whole tensors of a case, the same on all ranks. Subclasses have `rows`, tensors of which ranks have shards,
    `parameters`, which all have, and dout and dlse."""

    def __init__(self, case):
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        self.dim = len(case.rows) - 1  # of the sequence
        self._balance = ...
        self.packing = {} if case.documents is None else dict(cu_seqlens=case.cu_seqlens)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    def draw_dlse(self):
        """(..., heads, rows), or None"""
        dlse = self.draw(*self.case.rows, self.case.num_heads_q).transpose(-1, -2).float()
        return dlse if self.case.dlse else None

    def leaves(self, mesh):
        """This rank's rows, and the parameters."""
        leaves = [self.own(x, mesh) for x in self.rows] + [x.clone() for x in self.parameters]
        return [x.requires_grad_(name not in self.case.frozen) for name, x in zip(self.names[2:], leaves)]

    def attend(self, mesh):
        """out and lse of this rank, and the leaves."""
        leaves = self.leaves(mesh)
        return self.attend_to(leaves, mesh), leaves

    def placing(self, mesh):
        """How the rows lie over the ranks."""
        case = self.case
        seqlen = None if case.even else case.rows[-1]
        return dict(mesh=self.over(mesh), method=case.method, load_balance=self.balance(mesh), seqlen=seqlen)

    def balance(self, mesh):
        if self._balance is Ellipsis:
            self._balance = balancer(self.case.load_balance, self.case.rows[-1], mesh.size())
        return self._balance

    def over(self, mesh):
        """The mesh of the call, of all ranks."""
        if self.case.inner is None or mesh.ndim == 2:
            return mesh
        return mesh_of_two(mesh.size() // self.case.inner, self.case.inner)

    def own(self, x, mesh, dim=None):
        return shard_sequence(x, self.over(mesh), self.dim if dim is None else dim, self.balance(mesh), **self.packing)

    def whole(self, x, mesh, dim=None):
        placing = self.balance(mesh), self.case.rows[-1]
        return unshard_sequence(x.detach(), self.over(mesh), self.dim if dim is None else dim, *placing, **self.packing)

    def gradients(self, outputs, leaves, own=lambda x, dim=None: x):
        """Of the leaves, None: it requires none; own gives this rank's rows of the gradients of out and lse."""
        douts = [own(self.dout)] if self.dlse is None else [own(self.dout), own(self.dlse, -1)]
        douts = [x.to(output.dtype) for x, output in zip(douts, outputs)]
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(outputs[: len(douts)], wanted, douts))
        return [next(found) if x.requires_grad else None for x in leaves]


class Inputs(WholeTensors):
    """Of flash attention."""

    names = "out", "lse", "dq", "dk", "dv", "dsinks"

    def __init__(self, case):
        super().__init__(case)
        heads, heads_kv = case.num_heads_q, case.num_heads_kv
        q, k = (self.draw(*case.rows, number, case.head_dim) for number in (heads, heads_kv))
        v, self.dout = (self.draw(*case.rows, number, case.head_dim_v) for number in (heads_kv, heads))
        self.rows, self.dlse, self.options = [q, k, v], self.draw_dlse(), dict(case.options)
        if case.alibi:
            batch = case.batch if case.documents is None else len(case.documents)
            shape = (batch, case.num_heads_q) if case.slopes_each else (case.num_heads_q,)
            self.options["alibi_slopes"] = torch.rand(shape, generator=self.generator)
        self.parameters = [torch.randn(case.num_heads_q, generator=self.generator)] if case.sinks else []

    def attend_to(self, leaves, mesh):
        """out and lse of this rank."""
        attend = context_parallel_attention if self.case.documents is None else context_parallel_attention_varlen
        sinks = leaves[3] if self.case.sinks else None
        return attend(*leaves[:3], **self.packing, **self.placing(mesh), return_lse=True, sinks=sinks, **self.options)

    def by_reference(self, dtype):
        """out, lse and gradients of one process."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.rows]
        leaves += [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in self.parameters]
        options = dict(sinks=leaves[3] if self.case.sinks else None, return_lse=True, **self.options)
        if self.case.documents is None:
            outputs = reference.flash_attention(*leaves[:3], **options)
        else:
            lengths = self.case.cu_seqlens, self.case.cu_seqlens, self.case.rows[0], self.case.rows[0]
            outputs = reference.flash_attention_varlen(*leaves[:3], *lengths, **options)
        return *(x.detach() for x in outputs), *self.gradients(outputs, leaves)

    def of_one_process(self):
        """In fp64, and what shows the accuracy that the inputs allow."""
        return self.by_reference(torch.float64), [self.by_reference(self.case.dtype)]

    def rounding(self, out):
        return rounding(self, out)


def check_values(case, mesh):
    """out, lse and gradients are those of one process."""
    inputs = case.inputs()
    exact, others = inputs.of_one_process()
    outputs, leaves = inputs.attend(mesh)
    gradients = inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    number = len(inputs.rows)
    parts = zip((*outputs, *gradients[:number]), (None, -1, *[None] * number))
    results = [None if x is None else inputs.whole(x, mesh, dim) for x, dim in parts]
    for of_parameter in gradients[number:]:
        if of_parameter is not None:
            dist.all_reduce(of_parameter)
        results.append(of_parameter)
    floors = inputs.rounding(exact[0])
    for name, result, of_exact, *of_others in zip(inputs.names, results, exact, *others):
        assert (result is None) == (name in case.frozen), name
        if result is None:
            continue
        assert {x.dtype for x in of_others} == {result.dtype}, name
        error = max(largest(x.double() - of_exact) for x in of_others)
        floor = max(8 * torch.finfo(case.dtype).eps * max(1.0, largest(of_exact)), floors.get(name, 0.0))
        assert_close_to_reference(result, of_exact, torch_error=error, factor=3.0, floor=floor, name=name)


def rounding(inputs, out):
    """The rounding errors of gradients whose large terms cancel, as of rows that see one key: see `backward_cases`."""
    case, products = inputs.case, inputs.dout.double() * out.double()
    if not products.numel():
        return {}
    eps, eps_of_sums = torch.finfo(case.dtype).eps, 4 * torch.finfo(torch.float32).eps
    rounds_out = case.sinks or "dropout_p" in case.options
    scale = case.options.get("softmax_scale", case.head_dim**-0.5)
    row = torch.linalg.vector_norm(products, dim=-1).max().item() * (
        max(eps, eps_of_sums) if rounds_out else eps_of_sums
    )
    largest_q, largest_k = (x.abs().max().item() for x in inputs.rows[:2])
    queries = case.rows[-1] * case.num_heads_q // case.num_heads_kv
    of_heads = torch.linalg.vector_norm(products.transpose(0, -2).flatten(1), dim=1).max().item()
    return dict(dq=row * scale * largest_k, dk=row * scale * largest_q * queries**0.5, dsinks=of_heads * eps)


class BesideFakes(TorchDispatchMode):
    """Finds out whether results of our operators have the shapes, strides and dtypes of their fake kernels'."""

    def __init__(self):
        super().__init__()
        self.operators, self.differ = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "triton_attn":
            self.operators.append(function.name())
            with FakeTensorMode() as mode:
                fakes = function(*tree_map_only(Tensor, mode.from_tensor, args), **(kwargs or {}))
            of_real, of_fake = (list(map(_layout, tree_leaves(each))) for each in (results, fakes))
            if of_real != of_fake:
                self.differ.append(f"{function.name()}: {of_real}, fake {of_fake}")
        return results


def _layout(x):
    """Shape, dtype, and the strides that matter."""
    strides = [stride for size, stride in zip(x.shape, x.stride()) if size > 1] if x.numel() else []
    return tuple(x.shape), x.dtype, strides


def check_fakes(case, mesh):
    """Graphs are compiled for what the operators return."""
    inputs = case.inputs()
    with BesideFakes() as fakes:
        outputs, leaves = inputs.attend(mesh)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    name = f"triton_attn::{case.operator}"
    assert fakes.operators == [name, f"{name}_backward"]
    assert not fakes.differ, fakes.differ


def check_bytes(case, mesh):
    """The bytes that this rank receives from others are those of the docstring's table."""
    inputs = case.inputs()
    with counted() as received:
        outputs, leaves = inputs.attend(mesh)
        forward = sum(received)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    assert (forward, sum(received) - forward) == case.bytes(mesh.get_local_rank(), mesh.size()), (
        f"{forward}, {sum(received) - forward}"
    )


def check_transfers(case, mesh):
    """Each of them brings something."""
    inputs = case.inputs()
    with counted() as received:
        outputs, leaves = inputs.attend(mesh)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    assert min(received) > 0, f"bytes: {received}"


def check_bytes_of_model(case, mesh):
    """The most bytes that a rank receives are those of the cost model; with a causal mask, backward at most those."""
    inputs = case.inputs()
    with counted() as received:
        outputs, leaves = inputs.attend(mesh)
        forward = sum(received)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    most = torch.tensor([forward, sum(received) - forward])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    left, right = case.options.get("window_size", (-1, -1))
    right = 0 if case.options.get("causal") else right
    sharding = sharding_of_batch(case.batch, case.seqlen, mesh.size(), case.load_balance)
    mask = Mask(left, right, False, False)
    ranks = map(ranks_of, inputs.over(mesh).get_all_groups())
    method = case.method if case.inner is None else case.method[0]
    found = costs(sizes_of(case.head_dims, case.dtype, sharding, mask, *ranks))[method]
    expected = tuple(each.bytes for each in found)
    most, text = most.tolist(), f"{most.tolist()} of {expected}"
    assert most[0] == expected[0], text
    if method == "all_gather" and right == 0 and left < 0:
        assert 0.7 * expected[1] < most[1] <= expected[1], text
    else:
        assert most[1] == expected[1], text


def check_difference(cases, mesh):
    """Fails with what the call raises; cases are those of the ranks."""
    try:
        cases[mesh.get_local_rank()].inputs().attend(mesh)
    except ValueError as error:
        raise AssertionError(str(error)) from error


def check_refusal(case, mesh):
    """Fails with what the call raises before anything has travelled."""
    with counted() as received:
        try:
            case.inputs().attend(mesh)
        except ValueError as error:
            raise AssertionError(f"{len(received)} transfers before {error}" if received else str(error)) from error


def check_irregular_mesh(ranks, mesh):
    """Each rank raises by itself: such a mesh does not say who the others are."""
    with pytest.raises(ValueError, match="mesh: expected ranks in ascending order, row by row, as far apart in each"):
        attend_over(DeviceMesh("cpu", ranks))


def attend_over(mesh):
    x = torch.randn(1, 4, 4, 16)
    return context_parallel_attention(x, x, x, mesh=mesh)


def check_difference_later(cases, mesh):
    """Fails with what the next call raises, where the host waits for no transfer; cases are those of the ranks. A
    group of the ranks' hosts is made for it."""
    inputs = cases[mesh.get_local_rank()].inputs()
    with (
        mock.patch.object(agreement, "waits_for_transfers", return_value=False),
        mock.patch.object(agreement, "_sends_from_host", return_value=False),
    ):
        outputs, leaves = inputs.attend(mesh)
        try:
            if mesh.get_local_rank() == 0:
                inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
            else:
                inputs.attend(mesh)
        except ValueError as error:
            raise AssertionError(str(error)) from error


def check_calls(case, mesh):
    """Of the ring under a causal mask: each step makes one call, and the backward pass forms its row sums once."""
    inputs = case.inputs()
    passes = (case.passes, "forward_pass"), (local, "row_sums_pass"), (case.passes, "gradients_pass")
    with contextlib.ExitStack() as patches:
        spies = [patches.enter_context(mock.patch.object(x, name, wraps=getattr(x, name))) for x, name in passes]
        outputs, leaves = inputs.attend(mesh)
        inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
    assert [spy.call_count for spy in spies] == [mesh.size(), 1, mesh.size()]


def check_rows_of_torch(_, mesh):
    """A balancer gives this rank the rows, in the order, that torch's context parallelism gives it."""
    x = torch.arange(2 * 48 * 3).view(2, 48, 3)
    for name in BALANCERS:
        load_balance = balancer(name, 48, mesh.size())
        order = load_balance._generate_indices()[0].long()
        (own,) = _context_parallel_shard(mesh, [x], [1], load_balance)
        assert torch.equal(own, x[:, order.chunk(mesh.size())[mesh.get_local_rank()]]), name
        found = shard_sequence(x, mesh, load_balance=load_balance)
        assert torch.equal(found, own), name
        assert torch.equal(unshard_sequence(found, mesh, load_balance=load_balance), x), name


def check_training(case, mesh):
    """A compiled call without a graph break and a checkpoint give what a plain call gives; gradients accumulate."""
    inputs = case.inputs()
    mesh = inputs.over(mesh)
    torch.compiler.reset()  # each case compiles anew

    def attend(*leaves):
        return inputs.attend_to(leaves, mesh)

    def gradients(function):
        leaves = inputs.leaves(mesh)
        outputs = function(*leaves)
        found = inputs.gradients(outputs, leaves, lambda x, dim=None: inputs.own(x, mesh, dim))
        return *outputs, *(x for x in found if x is not None)

    plain = gradients(attend)
    compiled = gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"))
    recomputed = gradients(lambda *leaves: checkpoint(attend, *leaves, use_reentrant=False))
    for name, other in (("compiled", compiled), ("recomputed", recomputed)):
        assert all(map(torch.equal, plain, other)), name

    leaves, other = inputs.leaves(mesh), replace(case, seed=case.seed + 1).inputs()
    for of_step in (inputs, other):  # two steps with the same inputs and other gradients
        outputs = attend(*leaves)
        douts = [of_step.own(x, mesh, dim) for x, dim in ((of_step.dout, None), (of_step.dlse, -1))]
        torch.autograd.backward(outputs, douts)
    inputs.dout, inputs.dlse = other.dout, other.dlse
    expected = [a + b for a, b in zip(plain[2:], gradients(attend)[2:])]
    assert all(map(torch.equal, (leaf.grad for leaf in leaves if leaf.requires_grad), expected)), "accumulated"


def check_choice(case, mesh):
    """A graph takes Ulysses where a plain call does, if it has the lengths as constants."""
    inputs = case.inputs()

    def attend(*leaves):
        return inputs.attend_to(leaves, mesh)

    with mock.patch.object(ulysses, "forward", wraps=ulysses.forward) as spy:
        expected = attend(*inputs.leaves(mesh))
        assert spy.call_count == 1, "choose a case for which auto is ulysses"
        for dynamic, count in ((False, 2), (None, 3), (True, 3)):
            torch.compiler.reset()
            found = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*inputs.leaves(mesh))
            torch.testing.assert_close(found, expected)
            assert spy.call_count == count, f"dynamic={dynamic}"


def run_without_a_rank(call, num_ranks, folder, timeout=100):
    """{rank: what `call(mesh)` raised} where the last rank dies in it, or stays away; None: it did not end."""
    arguments = [(call, rank, num_ranks, folder, timeout) for rank in range(num_ranks)]
    processes = _start(_run_without_a_rank, arguments)
    for process in processes[:-1]:
        process.join(TIMEOUT.total_seconds())
    found = {}
    for rank, process in enumerate(processes):
        said = folder / f"rank {rank}"
        found[rank] = said.read_text() if said.exists() and not process.is_alive() else None
        process.kill()
    return {rank: said for rank, said in found.items() if rank < num_ranks - 1}


def _run_without_a_rank(call, rank, num_ranks, folder, timeout):
    join_group(folder / "store", rank, num_ranks, datetime.timedelta(seconds=timeout))
    said = "nothing"
    try:
        call(init_device_mesh("cpu", (num_ranks,)))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"rank {rank}").write_text(said)
    os._exit(0)


def attend_without_the_last(case, dies, mesh):
    """A second call, to which the last rank does not come."""
    inputs = case.inputs()
    inputs.attend(mesh)
    if mesh.get_local_rank() == mesh.size() - 1:
        if dies:
            os._exit(1)
        time.sleep(TIMEOUT.total_seconds())
    inputs.attend(mesh)
