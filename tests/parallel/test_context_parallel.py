"""Attention over 2 and 4 processes gives what one process gives: out, lse and all gradients."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import (
    Case,
    check_bytes,
    check_calls,
    check_difference,
    check_difference_later,
    check_training,
    check_values,
    run,
    run_without_a_rank,
)
from torch.distributed.device_mesh import init_device_mesh

from triton_attn import flash_attention, flash_attention_varlen
from triton_attn.parallel import (
    balance,
    context_parallel_attention,
    context_parallel_attention_varlen,
    gather,
    ring,
    shard_sequence,
    ulysses,
    unshard_sequence,
)
from triton_attn.parallel.balance import check_load_balance, sharding_of
from triton_attn.parallel.local import Mask
from triton_attn.parallel.ulysses import check_heads

METHODS = ("all_gather", "ring", "ulysses")
MASKS = [
    dict(options=dict(causal=True)),
    dict(options=dict(causal=False)),
    dict(options=dict(causal=True, window_size=(9, -1)), sinks=True),
    dict(options=dict(window_size=(7, 5), softcap=2.0), alibi=True),
    dict(options=dict(causal=True, dropout_p=0.3, dropout_seed=5)),
    dict(options=dict(causal=True, window_size=(0, 0), deterministic=True), sinks=True, dlse=False),
]


def readable(num_ranks):
    """Each mask by each method."""
    return [Case(method=method, seqlen=37, num_heads_kv=num_ranks, **mask) for method in METHODS for mask in MASKS]


PACKED = [
    Case(documents=(17, 0, 3, 1, 30), rows_of_none=4, load_balance="per_document"),
    Case(documents=(5, 40, 2), load_balance="head_tail", rows_of_none=9),
    Case(documents=(23, 19, 1), load_balance=None, sinks=True),
]


def packed(num_ranks):
    """Each mask by each method, over packed documents."""
    for i, (method, mask) in enumerate(itertools.product(METHODS, MASKS)):
        case = replace(PACKED[i % 3], method=method, num_heads_kv=num_ranks if i % 2 else 1, **mask)
        yield replace(case, slopes_each=i % 2 == 0)


def more(num_ranks):
    """One KV head for all ranks, several sequences, lengths at the edge, 16 bits."""
    for method, mask in itertools.product(METHODS, MASKS):
        yield Case(method=method, load_balance=None, num_heads_kv=1, batch=2, seqlen=37, **mask)
    for method, seqlen in itertools.product(METHODS, (0, 1, num_ranks - 1, 2 * num_ranks + 1)):
        yield Case(method=method, seqlen=seqlen)
        yield Case(method=method, seqlen=seqlen, load_balance=None, sinks=True)
    for method, dtype in itertools.product((*METHODS, "auto"), (torch.float16, torch.bfloat16)):
        yield Case(method=method, dtype=dtype, head_dim=24, head_dim_v=32, seqlen=64, num_heads_kv=4)


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, readable, "reference", id="4 ranks by reference"),
        pytest.param(2, packed, "triton", id="2 ranks, packed"),
        pytest.param(4, packed, "reference", id="4 ranks by reference, packed"),
        pytest.param(4, packed, "triton", id="4 ranks, packed", marks=pytest.mark.ci),
        pytest.param(2, more, "triton", id="2 ranks, more", marks=pytest.mark.ci),
        pytest.param(3, more, "reference", id="3 ranks by reference, more", marks=pytest.mark.ci),
        pytest.param(4, readable, "triton", id="4 ranks", marks=pytest.mark.ci),
        pytest.param(4, more, "triton", id="4 ranks, more", marks=pytest.mark.full),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    given = [case for case in cases(num_ranks) if num_ranks != 3 or case.method != "ulysses"]  # 3 divides no heads
    assert run(check_values, given, num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    shape = dict(batch=2, seqlen=64, num_heads_q=8, head_dim_v=32, options={})
    given = [
        Case(method=method, dtype=torch.bfloat16, num_heads_kv=heads, **shape)
        for method in METHODS
        for heads in (2, 4, 8)
    ]
    # Chunks 0 to 7 are of the ranks 0 1 2 3 3 2 1 0, and each needs 15 keys of the chunk before it.
    window = dict(causal=True, window_size=(15, -1))
    given.append(Case(seqlen=128, options=window, rows_from_others=(15, 30, 30, 15)))
    assert run(check_bytes, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        (dict(options=dict(causal=False)), r"window_size: expected the same on all ranks, \(-1, 0\) as on rank 0, got"),
        (dict(alibi=True), "alibi_slopes: expected the same on all ranks, None as on rank 0, got"),
        (dict(num_heads_q=2), r"q: expected the same on all ranks, \(\(4, 16\), torch.float32\) as on rank 0, got"),
        (dict(method="ring"), "method: expected the same on all ranks, all_gather as on rank 0, got ring on rank 1"),
        (dict(seqlen=49), "seqlen: expected the same on all ranks, 50 as on rank 0, got 49 on rank 1"),
        (
            dict(documents=(20, 30)),
            r"batch: expected the same on all ranks, 1 as on rank 0, got None on rank 1",
        ),
        (dict(dtype=torch.float16), r"q: expected the same on all ranks, .*float32.* rank 0, got .*float16.* rank 1"),
        # What one rank refuses:
        (dict(num_heads_kv=3), r"k: expected a number of heads that divides q's 4, got 3( \(on rank 1\))?$"),
        (dict(method="tree"), r"method: expected .*, got 'tree'"),
        (dict(method="ulysses", num_heads_q=3, num_heads_kv=1), r"q: expected query heads in multiples of 2 ranks"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.ci(but_each=5)
def test_ranks_that_differ_are_named_on_every_rank(rank_1, said, tmp_path):
    case = Case(load_balance=None)
    (_, _, first), (_, _, second) = run(check_difference, [(case, replace(case, **rank_1))], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


@pytest.mark.ci
def test_values_are_compared_where_they_are_checked(tmp_path, monkeypatch):
    case = Case(alibi=True)
    cases = [(case, replace(case, seed=1))]
    assert run(check_difference, cases, 2, tmp_path / "store") == []
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    found = run(check_difference, cases, 2, tmp_path / "another store")
    assert [said.startswith("alibi_slopes: expected the same on all ranks") for *_, said in found] == [True, True]


def test_where_no_transfer_is_waited_for_the_next_call_names_the_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(method="ring", documents=(20, 31))
    cases = [(case, replace(case, options=dict(causal=True, softcap=3.0)))]
    found = run(check_difference_later, cases, 2, tmp_path / "store")
    assert len(found) == 2
    for *_, said in found:
        assert re.search(r"softcap: expected the same on all ranks, 0.0 as on rank 0, got 3.0 on rank 1", said), said


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "stays away"])
@pytest.mark.ci(but_each=2)
def test_a_rank_that_does_not_come_ends_the_others(dies, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    found = run_without_a_rank(Case(), 3, tmp_path, dies, timeout=100 if dies else 20)
    for rank in (0, 1):
        assert found[rank] is not None, "no end"
        assert re.search("(?i)connection|timed out|timeout", found[rank]), found[rank]


def test_calls_of_the_ring(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [
        Case(method="ring"),
        Case(method="ring", batch=3, options={}),
        Case(method="ring", documents=(40, 33, 1, 50), load_balance="per_document"),
    ]
    assert run(check_calls, cases, 2, tmp_path / "store") == []


def test_compiled_recomputed_and_accumulated(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    options = dict(causal=True, window_size=(12, -1), dropout_p=0.2, dropout_seed=3)
    cases = [Case(method=method, sinks=True, options=options) for method in METHODS]
    cases += [replace(PACKED[0], method=method, alibi=True, slopes_each=True) for method in METHODS]
    assert run(check_training, cases, 2, tmp_path / "store") == []


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of this process alone."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_rank(mesh, method):
    for mask in MASKS:
        check_values(Case(method=method, **mask), mesh)


def test_a_call_in_inference_mode_and_then_a_training_step(mesh):
    """Positions are cached; those of an inference tensor could not be saved for the backward pass."""
    ulysses._parts.cache_clear()
    options = dict(mesh=mesh, method="ulysses", dropout_p=0.3, dropout_seed=1)
    x = torch.randn(1, 6, 2, 16)
    with torch.inference_mode():
        out = context_parallel_attention(x, x, x, **options)
    leaf = x.clone().requires_grad_()
    trained = context_parallel_attention(leaf, leaf, leaf, **options)
    trained.sum().backward()
    assert torch.equal(trained, out)
    assert leaf.grad.isfinite().all()


X = torch.randn(1, 6, 2, 16)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(method="tree"), "method: expected 'auto' or 'all_gather' or 'ring' or 'ulysses', got 'tree'"),
        (dict(load_balance="zigzag"), "load_balance: expected 'head_tail' or None, got 'zigzag'"),
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
        (dict(load_balance="zigzag"), "load_balance: expected 'head_tail', 'per_document' or None, got 'zigzag'"),
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
    order = sharding_of((0, 48), 48, 4, "head_tail").order_of_ranks
    assert torch.equal(order.take(x), balancer._generate_indices()[0].long())
    assert torch.equal(shard_sequence(x, mesh, 0, balancer), x)
    by_documents = of_torch._PerDocumentHeadTailLoadBalancer([[16, 32]], 4, "cpu")
    with pytest.raises(ValueError, match="load_balance: expected 'head_tail', 'per_document' or None, got <torch"):
        shard_sequence(x, mesh, 0, by_documents, cu_seqlens=bounds(0, 16, 48))


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


def test_a_mesh_of_two_dimensions_is_refused(mesh):
    two = init_device_mesh("cpu", (1, 1))
    with pytest.raises(ValueError, match="mesh: expected one dimension"):
        shard_sequence(X, two)


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
        assert [row for chunk in sharding.order_of_ranks.chunks for row in range(*chunk)] == rows
        assert torch.equal(sharding.order.take(torch.tensor(rows, dtype=torch.int32)), torch.arange(sharding.seqlen))
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


def test_the_page_runs(mesh, device):
    page = Path(__file__).parents[2] / "docs/many-gpus.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 3
    names = {"device": device}
    exec(code[0], names)
    q, k, v = (names[name] for name in "qkv")
    found = unshard_sequence(names["out"].detach(), mesh, seqlen=q.shape[1])
    torch.testing.assert_close(found, flash_attention(q, k, v, causal=True), atol=1e-5, rtol=1e-5)
    exec("\n".join(code[1:]), names)
    cu_seqlens = names["cu_seqlens"].to(device)
    expected = flash_attention_varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 300, 300, causal=True)
    torch.testing.assert_close(names["documents"].detach(), expected, atol=1e-5, rtol=1e-5)
