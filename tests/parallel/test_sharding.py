"""Which rows a rank has and which calls it makes, in one process; wrong arguments."""

import itertools
from unittest import mock

import pytest
import torch
from parallel_ranks import check_rows_of_torch, run
from torch.distributed.device_mesh import init_device_mesh

from triton_attn.parallel import (
    balance,
    context_parallel_attention,
    context_parallel_attention_varlen,
    gather,
    ring,
    shard_sequence,
    unshard_sequence,
)
from triton_attn.parallel.balance import (
    are_regular,
    check_load_balance,
    in_teams,
    rows_at_most,
    rows_of_rank,
    sharding_of,
)
from triton_attn.parallel.local import Mask
from triton_attn.parallel.ulysses import check_heads

X = torch.randn(1, 6, 2, 16)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(method="tree"), "method: expected 'auto' or 'all_gather' or 'ring' or 'ulysses', got 'tree'"),
        (
            dict(load_balance="zigzag"),
            "load_balance: expected 'head_tail', None or a load balancer of torch",
        ),
        (dict(seqlen=7), "seqlen: expected the length of a sequence of which rank 0 of 1 has 6 rows, got 7"),
        (dict(seqlen=-1), "seqlen: expected 0 or more, got -1"),
        (dict(k=X[:, :5]), "v: expected k's shape except for the last dimension, .*, got"),
        (dict(k=X[:, :5], v=X[:, :5]), "k: expected q's 6 rows, got 5"),
        (dict(v=X[0]), r"v: expected \(batch, seqlen, heads, head_dim\), got shape \(6, 2, 16\)"),
        (
            dict(dropout_p=0.5),
            "dropout_seed: expected an int or a tensor, the same on all ranks, with dropout, got None",
        ),
        (dict(softcap=-1.0), "softcap: expected 0"),
        (dict(mesh="cp"), "mesh: expected a DeviceMesh, got str"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(mesh, arguments, said):
    arguments = dict(q=X, k=X, v=X, mesh=mesh) | arguments
    with pytest.raises((TypeError, ValueError), match=said):
        context_parallel_attention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(cu_seqlens=[0, 6]), "cu_seqlens: expected a tensor, got list"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens: expected dtype torch.int32, got torch.int64"),
        (dict(cu_seqlens=bounds(1, 6)), r"cu_seqlens\[0\]: expected 0, got 1"),
        (dict(cu_seqlens=bounds(0, 4, 3, 6)), r"cu_seqlens\[2\]: expected 4 or more, got 3"),
        (dict(cu_seqlens=bounds(0, 7)), r"cu_seqlens\[-1\]: expected at most the 6 rows of the whole, got 7"),
        (
            dict(load_balance="zigzag"),
            "load_balance: expected 'head_tail', 'per_document', None or a load",
        ),
        (dict(q=X), r"q: expected \(total, heads, head_dim\), got shape \(1, 6, 2, 16\)"),
        (dict(alibi_slopes=torch.zeros(3, 2)), r"alibi_slopes: expected shape \(2,\) or shape \(2, 2\), got"),
        (dict(seqlen=5), "seqlen: expected the length of a sequence of which rank 0 of 1 has 6 rows, got 5"),
        (dict(seqlen=10**9 + 1), r"seqlen: expected at most 10\*\*9, got"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors_of_packed_documents(mesh, arguments, said):
    arguments = dict(q=X[0], k=X[0], v=X[0], cu_seqlens=bounds(0, 3, 5), mesh=mesh) | arguments
    with pytest.raises((TypeError, ValueError), match=said):
        context_parallel_attention_varlen(**arguments)


def test_lengths_on_a_gpu_are_read_once_until_they_change(monkeypatch):
    cu_seqlens, reads = bounds(0, 2, 6), []
    monkeypatch.setattr(balance, "_is_on_host", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or [0, 2, len(reads) + 5])
    assert balance.bounds_of(cu_seqlens, 9) == balance.bounds_of(cu_seqlens, 9) == (0, 2, 6)
    cu_seqlens[2] = 7
    assert balance.bounds_of(cu_seqlens, 9) == (0, 2, 7)
    assert len(reads) == 2


def test_balancers_of_torch(mesh):
    from torch.distributed.tensor.experimental._context_parallel import _load_balancer as of_torch

    x, balancer = torch.arange(48), of_torch._HeadTailLoadBalancer(48, 4, "cpu")
    assert check_load_balance(balancer, is_packed=False) == "head_tail"
    _, (team,) = in_teams(sharding_of((0, 48), 48, 4, "head_tail"), 1)
    assert torch.equal(team.order_of_ranks.take(x), balancer._generate_indices()[0].long())
    assert torch.equal(shard_sequence(x, mesh, 0, balancer), x)


def test_ranks_have_the_rows_that_torch_gives_them(tmp_path):
    assert run(check_rows_of_torch, [None], 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (torch.arange(46)[None], "load_balance: expected a load balancer of 48 rows, got 46"),
        (torch.arange(48).expand(2, -1), r"load_balance: expected .* one order for all sequences, .*, got \(2, 48\)"),
        (torch.zeros(1, 48, dtype=torch.long), "load_balance: expected a load balancer whose order has each row once"),
    ],
    ids=["length", "two", "twice"],
)
def test_errors_of_a_balancer(mesh, order, said):
    balancer = mock.Mock(_generate_indices=lambda: order)
    with pytest.raises(ValueError, match=said):
        shard_sequence(torch.arange(48), mesh, 0, balancer)


def test_a_length_that_the_ranks_of_a_balancer_do_not_divide():
    with pytest.raises(ValueError, match=r"load_balance: expected .*, a length in multiples of 4 ranks, got 6"):
        sharding_of((0, 6), 6, 4, "Balancer 0-6")


def test_ranks_compare_the_whole_of_a_long_order():
    orders = [" ".join(["Balancer", *(f"{i}-{i + 1}" for i in range(last, -1, -1))]) for last in (98, 99)]
    orders.append(orders[0][:-3] + "1-0")
    assert len({balance.described(order) for order in orders}) == 3
    assert max(len(balance.described(order)) for order in orders) < 150


def test_few_calls_for_many_documents():
    """Under a causal mask a rank has one for its head chunks and one for its tail chunks, and at a step of the ring
    one; with positions (ALiBi) two."""
    sharding = sharding_of(tuple(range(0, 30001, 30)), 30000, 4, "per_document")
    mask = Mask(-1, 0, False, False)
    for rank in range(4):
        assert len(gather._parts(sharding, mask, rank)) <= 2
        for source in range(4):
            assert len(ring._parts(sharding, mask, rank, source)) == 1
            assert len(ring._parts(sharding, mask._replace(has_alibi=True), rank, source)) <= 2
            assert len(ring._parts(sharding, Mask(50, 50, True, False), rank, source)) <= 3


def test_plain_causal_calls_need_no_positions():
    """So Hopper's kernel takes them."""
    for load_balance in ("head_tail", "per_document", None):
        sharding = sharding_of((0, 200, 650, 1000), 1000, 4, load_balance)
        for mask in (Mask(-1, 0, False, False), Mask(-1, -1, False, False)):
            for rank in range(4):
                parts = [*gather._parts(sharding, mask, rank)]
                for source in range(4):
                    parts += ring._parts(sharding, mask, rank, source)
                assert not any(part.needs_positions for part in parts)
        assert all(part.needs_positions for part in gather._parts(sharding, Mask(-1, 0, False, True), 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            dict(method="ring"),
            r"method: expected 'auto' or \('all_gather', 'ulysses'\) or \('ring', 'ulysses'\), got 'ring'",
        ),
        (dict(method=("ulysses", "ring")), r"method: expected .*, got \('ulysses', 'ring'\)"),
        (dict(method=["ring", "ulysses"]), r"method: expected .*, got \['ring', 'ulysses'\]"),
        (dict(shape=(1, 1, 1)), "mesh: expected one or two dimensions, got 3"),
    ],
    ids=str,
)
def test_errors_of_a_mesh_of_two_dimensions(mesh, arguments, said):
    arguments = dict(arguments)
    two = init_device_mesh("cpu", arguments.pop("shape", (1, 1)))
    with pytest.raises(ValueError, match=said):
        context_parallel_attention(X, X, X, mesh=two, **arguments)


def test_ranks_of_a_mesh_are_in_order(mesh):
    assert are_regular([(1, 4, 7), (10, 13, 16)])
    for ranks in ([(0, 2), (1, 3)], [(0, 1), (3, 2)], [(0, 1), (3, 5)]):
        assert not are_regular(ranks)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ((6, 2, 4), "q: expected query heads in multiples of 4 ranks for 'ulysses', got 6"),
        ((12, 3, 4), "k: expected KV heads that divide 4 ranks or are a multiple of them for 'ulysses', got 3"),
        ((8, 2, 4), None),
        ((8, 8, 4), None),
    ],
)
def test_heads_of_ulysses(heads, said):
    if said is None:
        check_heads(*heads)
    else:
        with pytest.raises(ValueError, match=said):
            check_heads(*heads)


@pytest.mark.parametrize("load_balance", ["head_tail", "per_document", None])
def test_shards_of_each_length(load_balance):
    """Every row is in one chunk."""
    for bounds, rest, num_ranks in itertools.product(
        ((0, 0), (0, 1), (0, 5), (0, 16), (0, 37), (0, 0, 3, 20, 20, 31)), (0, 7), (1, 2, 3, 8)
    ):
        sharding = sharding_of(bounds, bounds[-1] + rest, num_ranks, load_balance)
        rows = [row for place in sharding.places for chunk in place.chunks for row in range(*chunk)]
        assert sorted(rows) == list(range(sharding.seqlen))
        for number in (n for n in (1, 2, 4) if num_ranks % n == 0):
            of_teams, teams = in_teams(sharding, number)
            assert of_teams.places[0].num_rows <= rows_at_most(sharding.seqlen, number, len(bounds))
            for i, (whole, team) in enumerate(zip(of_teams.places, teams)):
                size = num_ranks // number
                places = sharding.places[i * size : (i + 1) * size]
                own = torch.tensor([row for chunk in whole.chunks for row in range(*chunk)], dtype=torch.int32)
                of_ranks = [row for place in places for chunk in place.chunks for row in range(*chunk)]
                assert team.order_of_ranks.take(own).tolist() == of_ranks
                assert torch.equal(team.order.take(torch.tensor(of_ranks, dtype=torch.int32)), own)
                if load_balance != "per_document":
                    assert len(own) == rows_of_rank(sharding.seqlen, i, number, load_balance)
        number = 1 if load_balance == "per_document" else 0  # a row more of each document, and of the rest
        assert max(sharding.num_rows) - min(sharding.num_rows) <= 2 + 2 * number * len(bounds)


def test_each_row_has_its_document():
    sharding = sharding_of((0, 0, 3, 20, 20, 31), 40, 3, "per_document")
    for place, segments in zip(sharding.places, sharding.segments):
        rows = [row for chunk in place.chunks for row in range(*chunk)]
        for document, chunk, row in segments:
            assert rows[row : row + chunk.size] == list(range(*chunk))
            assert sharding.bounds[document] <= chunk.start < chunk.end <= sharding.bounds[document + 1]
        assert sum(segment.chunk.size for segment in segments) == sum(row < 31 for row in rows)


@pytest.mark.parametrize(("bounds", "load_balance"), [((0, 64), "head_tail"), ((0, 16, 56, 64), "per_document")])
def test_all_ranks_have_the_same_causal_work(bounds, load_balance):
    segments = sharding_of(bounds, 64, 4, load_balance).segments
    work = [
        sum(row + 1 - bounds[document] for document, chunk, _ in of_rank for row in range(*chunk))
        for of_rank in segments
    ]
    assert len(set(work)) == 1


def test_gradients_of_shards(mesh):
    x = X.clone().requires_grad_()
    whole = unshard_sequence(shard_sequence(x, mesh), mesh)
    assert torch.equal(whole, x)
    dout = torch.randn_like(X)
    assert torch.equal(torch.autograd.grad(whole, x, dout)[0], dout)
